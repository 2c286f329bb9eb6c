//! Disks: what a guest writes is in the file, what is in the file a guest reads, and no more than that happens.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{Guest, Kernel, file, noise, sha256};

const MIB: usize = 1 << 20;

/// Disk images that go with it.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// Where there is direct I/O: in the emulated host not in memory.
    fn on_disk() -> Self {
        Self(TempDir::new_in("/var/tmp").unwrap())
    }

    fn add(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        File::create_new(&path).unwrap().write_all(content).unwrap();
        path
    }
}

#[test]
fn what_the_guest_writes_and_reads_is_in_the_file() {
    let images = Images::new();
    let content = noise(64 * MIB);
    let disk = images.add("disk", &content);
    let script = "
        echo before=$(sha256sum </dev/vda)
        dd if=/dev/urandom of=/block bs=1M count=1 status=none
        for i in $(seq 64); do echo $i; cat /block; done | dd of=/dev/vda bs=1M count=64 iflag=fullblock conv=fsync
        echo 3 >/proc/sys/vm/drop_caches
        echo after=$(sha256sum </dev/vda)
    ";
    let ended = Guest::new(Kernel::Debian612).disk(disk.display()).script(script).run().succeeded();
    let hash = |line: &str| line.split(' ').next().unwrap().to_owned();
    assert_eq!(hash(ended.value("before")), sha256(&content));
    assert_eq!(hash(ended.value("after")), sha256(&fs::read(&disk).unwrap()));
    assert_ne!(ended.value("before"), ended.value("after"));

    let size = 64 * MIB as u64;
    assert_eq!(ended.counted("blk0", "written-bytes"), size);
    let read = ended.counted("blk0", "read-bytes");
    assert!((2 * size..3 * size).contains(&read), "{read}");
    assert!(ended.counted("blk0", "flushes") >= 1);
    assert_eq!(ended.counted("blk0", "errors"), 0);
    let requests = ended.counted("blk0", "reads");
    assert!(read / requests > 64 << 10, "{requests} requests for {read} bytes: they have one segment each");
}

#[test]
fn a_limited_disk_is_slow_and_right() {
    let images = Images::new();
    let content = noise(6 * MIB);
    let disk = images.add("disk", &content);
    let script = "
        echo before=$(sha256sum </dev/vda)
        dd if=/dev/vda of=/block bs=1M status=none
        dd if=/block of=/dev/vda bs=64K conv=fsync
    ";
    let spec = format!("{},bw=1M,iops=100", disk.display());
    let start = Instant::now();
    let ended = Guest::new(Kernel::Tiny).disk(spec).script(script).run().succeeded();
    assert!(ended.value("before").starts_with(&sha256(&content)));
    assert!(fs::read(&disk).unwrap() == content);
    assert!(ended.counted("blk0", "throttled") > 1);
    assert_eq!(ended.counted("blk0", "errors"), 0);
    // 12 MiB, of which one second's, and one request, is not waited for.
    assert!(start.elapsed() > Duration::from_secs(9));
}

#[test]
fn disks_come_in_order_each_with_its_own_ways() {
    let images = Images::on_disk();
    let first = images.add("first", &noise(8 * MIB));
    let second = images.add("second", &noise(4 * MIB));
    // Not a multiple of anything but sectors.
    let odd = images.add("odd", &noise(10 * MIB + 7 * 512));
    let read_only = sha256(&fs::read(&second).unwrap());
    let script = r#"
        for disk in vda vdb vdc; do
            echo size=$(blockdev --getsize64 /dev/$disk)
            echo read-only=$(blockdev --getro /dev/$disk)
            echo serial=$(cat /sys/block/$disk/serial)
        done
        echo second=$(sha256sum </dev/vdb)
        dd if=/dev/zero of=/dev/vdb bs=4k count=1 && exit 1
        echo odd=$(dd if=/dev/vdc bs=3584 iflag=direct status=none | sha256sum)
        dd if=/dev/vdc of=/dev/vda bs=1M count=8 iflag=direct oflag=direct
        dd if=/dev/vda of=/dev/vdc bs=2560 seek=3 count=77 iflag=direct oflag=direct
        sync
    "#;
    let ended = Guest::new(Kernel::Debian61)
        .disk(format!("path={},id=first,direct=on", first.display()))
        .disk(format!("{},readonly=on,id=twenty-characters-no", second.display()))
        .disk(format!("path={},cache=unsafe,direct=on", odd.display()))
        .script(script);
    let mut expected = fs::read(&odd).unwrap();
    let before = sha256(&expected);
    let ended = ended.run().succeeded();

    let values = |name| ended.values(name).collect::<Vec<_>>();
    assert_eq!(values("size"), [8 * MIB, 4 * MIB, 10 * MIB + 7 * 512].map(|size| size.to_string()));
    assert_eq!(values("read-only"), ["0", "1", "0"]);
    assert_eq!(values("serial")[..2], ["first", "twenty-characters-no"]);
    assert!(ended.value("second").starts_with(&read_only));
    assert!(ended.value("odd").starts_with(&before));

    assert_eq!(sha256(&fs::read(&second).unwrap()), read_only, "the guest must not write it");
    assert!(fs::read(&first).unwrap() == expected[..8 * MIB]);
    expected.copy_within(..77 * 2560, 3 * 2560);
    assert!(fs::read(&odd).unwrap() == expected);
}

#[test]
fn what_was_flushed_is_there_after_a_kill() {
    let images = Images::new();
    let disk = images.add("disk", &vec![0; 8 * MIB]);
    let script = "
        dd if=/dev/urandom of=/block bs=1M count=3 status=none
        echo hash=$(sha256sum </block | cut -c -64).
        dd if=/block of=/dev/vda bs=4k conv=fsync
        echo flushed
        sleep 1000
    ";
    let guest = Guest::new(Kernel::Tiny).disk(disk.display()).script(script).start();
    guest.wait_for("flushed\r\n");
    guest.signal(Signal::KILL);
    let ended = guest.wait();
    assert_eq!(ended.status, 128 + 9);
    let hash = sha256(&fs::read(&disk).unwrap()[..3 * MIB]);
    assert_eq!(ended.value("hash"), hash + ".");
}

#[test]
fn discarded_blocks_are_given_back_and_zeroed_ones_read_zero() {
    let images = Images::new();
    let mut content = noise(16 * MIB);
    let disk = images.add("disk", &content);
    let before = fs::metadata(&disk).unwrap().blocks();
    let script = "
        blkdiscard -o 4M -l 8M /dev/vda
        program blkdiscard --zeroout --offset 1048576 --length 1050624 /dev/vda
        echo hash=$(sha256sum </dev/vda)
    ";
    let guest = Guest::new(Kernel::Debian61).disk(disk.display());
    let ended = guest.program("blkdiscard").script(script).run().succeeded();
    content[4 * MIB..12 * MIB].fill(0);
    content[MIB..2 * MIB + 2048].fill(0);
    assert!(fs::read(&disk).unwrap() == content);
    assert!(ended.value("hash").starts_with(&sha256(&content)));
    let freed = (before - fs::metadata(&disk).unwrap().blocks()) * 512;
    assert!(freed >= 8 * MIB as u64, "{freed} bytes freed");
    assert_eq!(ended.counted("blk0", "written-bytes"), 0);
    assert!(ended.counted("blk0", "discards") >= 1);
    assert!(ended.counted("blk0", "write-zeroes") >= 1);
}

#[test]
fn every_engine_moves_the_same_data() {
    let images = Images::on_disk();
    let content = noise(16 * MIB);
    let disks = ["io_uring,direct=on", "io_uring", "sync,direct=on"].map(|engine| {
        let path = images.add(&engine.replace([',', '='], "-"), &content);
        (format!("path={},engine={engine}", path.display()), path)
    });
    // Several requests at once of each kind, a driver that goes away meanwhile, and pieces that are not aligned for direct I/O.
    let script = r#"
        hash() { sha256sum <$1 | cut -c -64; }
        dd if=/dev/urandom of=/block bs=1M count=4 status=none
        for disk in vda vdb vdc; do
            echo before=$(hash /dev/$disk)
            for part in 0 1 2 3; do
                dd if=/block of=/dev/$disk bs=16k seek=$((part * 256 + part)) oflag=direct conv=notrunc status=none &
                dd if=/dev/$disk of=/dev/null bs=512 skip=$((part * 8001)) count=200 iflag=direct status=none &
            done
            wait
            dd if=/block of=/dev/$disk bs=512 seek=32001 count=333 oflag=direct conv=notrunc,fsync status=none
            dd if=/dev/$disk of=/dev/null bs=1M iflag=direct status=none &
            virtio=$(basename $(readlink -f /sys/block/$disk/device))
            echo $virtio >/sys/bus/virtio/drivers/virtio_blk/unbind
            wait
            echo $virtio >/sys/bus/virtio/drivers/virtio_blk/bind
            echo after=$(hash /dev/$disk)
        done
    "#;
    let guest = disks.iter().fold(Guest::new(Kernel::Debian61), |guest, (spec, _)| guest.disk(spec));
    let ended = guest.option("--sandbox", "on").script(script).run().succeeded();
    let after: Vec<_> = disks.iter().map(|(_, path)| sha256(&fs::read(path).unwrap())).collect();
    assert_eq!(ended.values("before").collect::<Vec<_>>(), [sha256(&content).as_str(); 3]);
    assert_eq!(ended.values("after").collect::<Vec<_>>(), after);
    assert_ne!(sha256(&content), after[0]);
    assert!(after.iter().all(|hash| *hash == after[0]));
    for disk in ["blk0", "blk1", "blk2"] {
        assert_eq!(ended.counted(disk, "errors"), 0);
    }
}

/// How many requests a driver without a kernel (resources/guest/driver.c) has done.
const REQUESTS: usize = 512;

/// The system calls of the disk's thread, all in all, while such a driver reads.
fn calls_of_a_disk(engine: &str, depth: usize, interrupts: bool) -> (usize, String) {
    let images = Images::new();
    let (disk, log) = (images.add("disk", &noise(MIB)), images.add("log", &[]));
    let mut guest = Guest::running(file("tools/driver"), &[])
        .memory("64M")
        .disk(format!("path={},engine={engine}", disk.display()))
        .cmdline(&format!("depth={depth} requests={REQUESTS} interrupts={}", u8::from(interrupts)));
    let bantam = guest.command();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o"]).arg(&log).arg(bantam.get_program()).args(bantam.get_args());
    strace.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    *bantam = strace;
    let ended = guest.run();
    ended.require(ended.stdout.contains("bench-end") && ended.counted("blk0", "reads") == REQUESTS as u64, "all done");
    let log = fs::read_to_string(log).unwrap();
    let name = log.lines().find(|line| line.contains("PR_SET_NAME, \"bantam-blk0\"")).unwrap();
    let thread = name.split_whitespace().next().unwrap();
    let is_call = |line: &&str| line.starts_with(thread) && !line.contains("resumed>") && !line.contains("+++");
    (log.lines().filter(is_call).count(), log.clone())
}

#[test]
fn a_request_costs_few_system_calls() {
    // Those that come before the first request and after the last one, and what is up to chance: how many requests a
    // notification is for, and how often the device yields.
    const OTHERS: usize = REQUESTS / 2;
    for (engine, depth, interrupts, budget) in [
        // One that waits and one that reads; two for an interrupt.
        ("sync", 1, false, 2 * REQUESTS),
        ("io_uring", 1, false, 2 * REQUESTS),
        ("sync", 1, true, 4 * REQUESTS),
        // A notification is for several, and so is a system call of io_uring.
        ("sync", 32, false, REQUESTS),
        ("io_uring", 32, false, REQUESTS / 8),
        ("io_uring", 32, true, REQUESTS / 4),
    ] {
        let (calls, log) = calls_of_a_disk(engine, depth, interrupts);
        eprintln!("{calls} system calls with {engine}, {depth} at once, interrupts {interrupts}");
        assert!(calls <= budget + OTHERS, "{calls} system calls with {engine}, {depth} at once:\n{log}");
        assert!(calls > REQUESTS / 32, "it is the disk's thread");
    }
}

#[test]
fn each_cpu_has_a_queue_of_its_own() {
    let images = Images::on_disk();
    let content = noise(8 * MIB);
    let disks = ["queues=2", "queues=4,engine=io_uring,direct=on"].map(|options| {
        let path = images.add(&options.replace([',', '='], "-"), &content);
        (format!("path={},{options}", path.display()), path)
    });
    // Each CPU writes and flushes its half, both at the same time, and reads the other's.
    let script = r#"
        dd if=/dev/urandom of=/block bs=1M count=4 status=none
        for disk in vda vdb; do
            for queue in /sys/block/$disk/mq/*; do echo $disk=$(basename $queue):$(cat $queue/cpu_list); done
            echo before=$(sha256sum </dev/$disk)
            for cpu in 0 1; do
                taskset -c $cpu dd if=/block of=/dev/$disk bs=64k seek=$((64 * cpu)) oflag=direct conv=notrunc,fsync status=none &
            done
            wait
            for cpu in 0 1; do
                echo half=$(taskset -c $cpu dd if=/dev/$disk bs=64k skip=$((64 - 64 * cpu)) count=64 iflag=direct status=none | sha256sum) &
            done
            wait
        done
        echo block=$(sha256sum </block)
    "#;
    let guest = disks.iter().fold(Guest::new(Kernel::Debian61).cpus(2), |guest, (spec, _)| guest.disk(spec));
    let ended = guest.option("--sandbox", "on").script(script).run().succeeded();
    // Linux takes no more than it has CPUs.
    for disk in ["vda", "vdb"] {
        let mut queues: Vec<_> = ended.values(disk).collect();
        queues.sort_unstable();
        assert_eq!(queues, ["0:0", "1:1"], "{disk}");
    }
    let hash = |value: &str| value.split(' ').next().unwrap().to_owned();
    assert!(ended.values("before").all(|before| hash(before) == sha256(&content)));
    let block = hash(ended.value("block"));
    assert_eq!(ended.values("half").map(hash).collect::<Vec<_>>(), [block.as_str(); 4]);
    for (_, path) in &disks {
        let now = fs::read(path).unwrap();
        assert!(now.chunks(4 * MIB).all(|half| sha256(half) == block), "{}", path.display());
    }
    for disk in ["blk0", "blk1"] {
        assert_eq!(ended.counted(disk, "errors"), 0);
        assert!(ended.counted(disk, "flushes") >= 2);
    }
}
