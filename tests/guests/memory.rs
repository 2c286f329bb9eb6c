//! Memory below and above the MMIO gap.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::support::{Guest, Kernel};

#[test]
fn little_memory_is_enough() {
    let guest = Guest::new(Kernel::Debian61).memory("128M");
    let ended = guest.script("echo total=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)").run().succeeded();
    let total = ended.number("total") >> 10;
    assert!((64..=128).contains(&total), "{total} MiB");
}

#[test]
fn all_of_much_memory_is_there() {
    // The zone named Normal begins at 4 GiB; pages of files come from there first.
    let script = r#"
        free() { awk '/zone +Normal/ { found = 1 } found && /nr_free_pages/ { print $2; exit }' /proc/zoneinfo; }
        echo total=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)
        mount -t tmpfs tmpfs /mnt
        dd if=/dev/urandom of=/mnt/block bs=1M count=1 status=none
        echo before=$(free)
        for i in $(seq 64); do cat /mnt/block; done >/mnt/file
        echo after=$(free)
        echo written=$(sha256sum </mnt/file)
        echo expected=$(for i in $(seq 64); do cat /mnt/block; done | sha256sum)
    "#;
    let ended = Guest::new(Kernel::Debian61).memory("5G").script(script).run().succeeded();
    let total = ended.number("total") >> 10;
    assert!((4700..=5120).contains(&total), "{total} MiB");
    let high_pages = ended.number("before") - ended.number("after");
    assert!(high_pages > 60 << 20 >> 12, "{high_pages} pages of the file are above 4 GiB");
    assert_eq!(ended.value("written"), ended.value("expected"));
}

#[test]
fn both_sides_of_the_gap_are_different_memory() {
    // The tiny kernel lets /dev/mem read and write memory that it was told to leave alone.
    let addresses = ["0xb0000000", "0xbffffff8", "0x100000000", "0x130000000", "0x13ffffff8"];
    let mut script = String::new();
    for (i, address) in addresses.iter().enumerate() {
        script += &format!("devmem {address} 64 0x1122334455667700\ndevmem {address} 64 0x112233445566770{i}\n");
    }
    for address in addresses {
        script += &format!("echo read=$(devmem {address} 64)\n");
    }
    let guest = Guest::new(Kernel::Tiny).memory("4G").cmdline("memmap=16M$0xb0000000 memmap=16M$0xbf000000");
    let guest = guest.cmdline("memmap=16M$0x100000000 memmap=256M$0x130000000");
    let ended = guest.script(&script).run().succeeded();
    let expected: Vec<_> = (0..addresses.len()).map(|i| format!("0x112233445566770{i}")).collect();
    assert_eq!(ended.values("read").collect::<Vec<_>>(), expected);
}

#[test]
fn memory_is_in_huge_pages_where_the_host_makes_them() {
    let debugfs = tempfile::tempdir().unwrap();
    let call = |program: &str, arguments: &[&str]| {
        assert!(Command::new(program).args(arguments).arg(debugfs.path()).status().unwrap().success());
    };
    call("mount", &["-t", "debugfs", "debugfs"]);
    let setting = Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    let before = fs::read_to_string(setting).unwrap();
    fs::write(setting, "madvise").unwrap();
    let running = Guest::new(Kernel::Tiny).script("echo up; sleep 1000").spawn();
    running.wait_for("up");
    let name = format!("{}-", running.pid());
    let machines = fs::read_dir(debugfs.path().join("kvm")).unwrap().map(|entry| entry.unwrap().path());
    let machine = machines.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with(&name));
    let mapped = fs::read_to_string(machine.unwrap().join("pages_2m")).unwrap();
    running.signal(Signal::KILL);
    running.wait();
    let before = before.split(['[', ']']).nth(1).unwrap();
    fs::write(setting, before).unwrap();
    call("umount", &[]);
    assert!(mapped.trim().parse::<u32>().unwrap() > 0, "none of the guest's pages is huge");
}

#[test]
fn memory_is_in_huge_pages_if_there_are_so_many() {
    let pool = |file: &str| Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").join(file);
    let pages = |file: &str| fs::read_to_string(pool(file)).unwrap().trim().parse::<u64>().unwrap();
    let before = pages("nr_hugepages");
    let guest = || Guest::new(Kernel::Tiny).memory("128M").flag("--hugepages");
    if let Err(error) = fs::write(pool("nr_hugepages"), (before + 64).to_string()) {
        return eprintln!("SKIPPED: memory_is_in_huge_pages_if_there_are_so_many: cannot reserve huge pages: {error}");
    }
    assert_eq!(pages("nr_hugepages"), before + 64, "the host has memory for them");

    let running = guest().script("dd if=/dev/zero of=/noise bs=1M count=32; echo here; sleep 1000").start();
    running.wait_for("here");
    // It has touched some, and nobody else gets the others.
    let (free, reserved) = (pages("free_hugepages"), pages("resv_hugepages"));
    assert!(free <= before + 64 - 16, "{free}");
    assert_eq!(free - reserved, before);
    let ended = guest().run();
    assert_eq!(ended.status, 125);
    let expected = format!("cannot reserve 128 MiB of guest memory in huge pages: the host has {before} of 2 MiB left");
    assert!(ended.stderr.contains(&expected), "{}", ended.stderr);
    running.signal(Signal::TERM);
    assert_eq!(running.wait().status, 128 + 15);
    assert_eq!(pages("free_hugepages"), before + 64);
    fs::write(pool("nr_hugepages"), before.to_string()).unwrap();
}
