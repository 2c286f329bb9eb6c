//! A balloon and a disk, changed by the program that runs the machine.

use std::fs;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use bantam::config::{Config, Size};
use bantam::devices::console::Console;
use bantam::machine::firecracker::Metrics;
use bantam::machine::{Builder, Handle, Lines};
use bantam::outcome::Outcome;
use bantam::virtio::change::{Change, Rates};
use bantam::virtio::{balloon, balloon::Statistics, blk};

use crate::support::{Guest, Kernel};

/// A guest that is still there then has failed.
const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// A console that keeps what is written to it, for who waits for it.
#[derive(Clone, Default)]
struct Screen(Arc<(Mutex<String>, Condvar)>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().push_str(&String::from_utf8_lossy(bytes));
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    #[track_caller]
    fn wait_for(&self, text: &str) {
        let text = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), LIMIT, |seen| !seen.contains(text)).unwrap();
        assert!(!text.1.timed_out(), "{}", text.0);
    }
}

/// Waits for what the guest does in its own time.
#[track_caller]
fn eventually(handle: &Handle, so: impl Fn(&Statistics) -> bool) {
    let begin = std::time::Instant::now();
    loop {
        let statistics = handle.balloon_statistics().unwrap();
        if so(&statistics) {
            return;
        }
        assert!(begin.elapsed() < LIMIT, "it never happened: {statistics:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The memory of this process that the host has given it, in bytes.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

#[test]
fn a_balloon_and_a_disk_are_changed_while_the_guest_runs() {
    let modules = Kernel::Debian61.file("lib/modules");
    let version = fs::read_dir(modules).unwrap().next().unwrap().unwrap().path();
    let module = fs::read(version.join("kernel/drivers/virtio/virtio_balloon.ko")).unwrap();
    let guest = Guest::new(Kernel::Debian61).file("balloon.ko", &module).script("insmod /balloon.ko; echo ready; sh");
    let [first, second] = ["first", "second"].map(|name| guest.folder().join(name));
    fs::write(&first, vec![b'1'; 1 << 20]).unwrap();
    fs::write(&second, vec![b'2'; 2 << 20]).unwrap();

    let balloon = balloon::Spec {
        deflate_on_oom: true,
        stats: Some(Duration::from_millis(50)),
        free_page_reporting: false,
        ..Default::default()
    };
    let config = Config::new().kernel(Kernel::Debian61.vmlinux()).initrd(guest.folder().join("initramfs.cpio"));
    let config = config.cmdline("quiet").memory(Size::mib(256)).timeout(LIMIT).balloon(balloon);
    let config = config.disk(blk::Spec::new(&first));
    let screen = Screen::default();
    let machine = Builder::new(config).console(Console::to(screen.clone()));
    // Each minute, but for this.
    let metrics = guest.folder().join("metrics");
    let often = Metrics::default().every(Duration::from_millis(50));
    let mut machine = machine.metrics(Lines::open(&metrics).unwrap(), often).build().unwrap();
    let handle = machine.handle();
    let running = thread::spawn(move || {
        let outcome = machine.run().unwrap();
        (outcome, machine.report())
    });
    screen.wait_for("ready");

    // A disk of another size, from one read to the next.
    let read = "echo $1=$(blockdev --getsz /dev/vda)-$(dd if=/dev/vda bs=1 count=3 iflag=direct 2>/dev/null)";
    handle.input(format!("size() {{ {}; }}\nsize a\n", read.replace(" iflag=direct", "")));
    screen.wait_for("a=2048-111");
    let error = handle.change_disk("blk0", "/nowhere").unwrap_err();
    assert_eq!(error.to_string(), "cannot open disk image /nowhere");
    handle.change_disk("blk0", second).unwrap();
    // The driver looks at the size when it gets to it.
    handle
        .input("until [ $(blockdev --getsz /dev/vda) = 4096 ]; do :; done; echo 3 >/proc/sys/vm/drop_caches; size b\n");
    screen.wait_for("b=4096-222");
    let rates = Rates { bytes: Some("100M".parse().unwrap()), operations: Some("1000".parse().unwrap()) };
    handle.change("blk0", Change::Rates(rates)).unwrap();
    let error = handle.change("net0", Change::Rates(rates)).unwrap_err();
    assert_eq!(error.to_string(), "cannot change net0: the machine has no such device");

    // What the guest has had is the host's again when it is in the balloon.
    handle.input("dd if=/dev/zero of=/fill bs=1M count=80 2>/dev/null && rm /fill; echo filled=$((1 + 1))\n");
    screen.wait_for("filled=2");
    let filled = resident();
    handle.balloon(Size::mib(128)).unwrap();
    eventually(&handle, |balloon| balloon.actual == Size::mib(128));
    let inflated = resident();
    assert!(inflated + 60 * MIB < filled, "{filled} bytes before, {inflated} after");
    let free = |balloon: &Statistics| balloon.guest.as_ref().and_then(|guest| guest.free_memory);
    eventually(&handle, |balloon| free(balloon).is_some_and(|free| free < 100 * MIB));

    handle.balloon(Size::bytes(0)).unwrap();
    eventually(&handle, |balloon| balloon.actual == Size::bytes(0));
    handle.input("dd if=/dev/zero of=/fill bs=1M count=80 2>/dev/null && echo again=$((1 + 2)); exit\n");
    screen.wait_for("again=3");
    let (outcome, report) = running.join().unwrap();
    assert_eq!(outcome, Outcome::PoweredOff);
    let told = fs::read_to_string(&metrics).unwrap();
    let told: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(told.len() > 5, "{} lines", told.len());
    let written = told.iter().map(|line| line["uart"]["write_count"].as_u64().unwrap());
    assert_eq!(written.sum::<u64>(), report.statistics["serial"]["written-bytes"].as_u64().unwrap());
    let count = |name: &str| report.statistics["balloon"][name].as_u64().unwrap();
    assert_eq!((count("inflated"), count("deflated"), count("errors")), (32768, 32768, 0));
    assert!(count("statistics") > 0);
    let error = handle.balloon(Size::mib(1)).unwrap_err();
    assert_eq!(error.to_string(), "cannot change balloon: the machine has ended");
}
