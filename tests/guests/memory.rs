//! Memory below and above the MMIO gap.

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
