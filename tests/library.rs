//! bantam as a library: machines built, run and stopped by this very process.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![expect(unsafe_code, reason = "an allocator that counts")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::io::{self, Write};
use std::sync::{Condvar, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bantam::config::{Config, Size};
use bantam::devices::console::{self, Console};
use bantam::machine::{self, Builder, Handle, Machine};
use bantam::outcome::Outcome;
use bantam::sandbox::{Mode, Sandbox};
use bantam::virtio::blk::{Engine, Spec};
use support::screen::Screen;
use support::{Guest, Kernel};

/// A guest that is still there then has failed.
const LIMIT: Duration = Duration::from_secs(120);
/// What [`SHELL`]'s guest says before it takes commands.
const READY: &str = "ready for commands";
const SHELL: &str = "echo ready for commands; sh";

/// Held for writing by the test that looks at what the whole process has.
static PROCESS: RwLock<()> = RwLock::new(());

/// A machine with the small kernel and a script for its guest, and its console.
struct Lab {
    config: Config,
    screen: Screen,
    /// Has the initramfs.
    _guest: Guest,
}

impl Lab {
    fn new(script: &str) -> Self {
        let guest = Guest::new(Kernel::Tiny).script(script);
        let initrd = guest.folder().join("initramfs.cpio");
        let config =
            Config::new().kernel(Kernel::Tiny.vmlinux()).initrd(initrd).cmdline("quiet").memory(Size::mib(128));
        Lab { config: config.timeout(LIMIT), screen: Screen::default(), _guest: guest }
    }

    fn build(&self) -> Machine {
        Builder::new(self.config.clone()).console(Console::to(self.screen.clone())).build().unwrap()
    }

    fn start(&self) -> (Handle, JoinHandle<Result<Outcome, machine::Error>>) {
        let mut machine = self.build();
        (machine.handle(), thread::spawn(move || machine.run()))
    }
}

thread_local! {
    /// How often this thread has allocated memory, and how many bytes.
    static ALLOCATED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

struct Counting;

impl Counting {
    fn count(bytes: usize) {
        // A thread that ends has none any more.
        let _ = ALLOCATED.try_with(|allocated| {
            let (count, before) = allocated.get();
            allocated.set((count + 1, before + bytes));
        });
    }
}

// SAFETY: all is done by the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size());
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller says.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count(size);
        // SAFETY: as the caller says.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn few_allocations_make_a_machine() {
    const COUNT: usize = 300;
    const BYTES: usize = 64 << 10;
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let build = |memory| {
        let config = Config::new().kernel(Kernel::Tiny.vmlinux()).initrd(Kernel::Tiny.file("initramfs.cpio"));
        let builder = Builder::new(config.memory(memory)).console(Console::to(io::sink()));
        let before = ALLOCATED.get();
        let machine = builder.build().unwrap();
        let after = ALLOCATED.get();
        drop(machine);
        (after.0 - before.0, after.1 - before.1)
    };
    // The first one finds what the process has only once.
    build(Size::mib(128));
    let (count, bytes) = build(Size::mib(128));
    eprintln!("{count} allocations, {bytes} bytes");
    assert!(count <= COUNT && bytes <= BYTES, "{count} allocations of {COUNT}, {bytes} bytes of {BYTES}");
    let larger = build(Size::gib(5));
    assert!(
        larger.0 <= count + 8 && larger.1 <= bytes + 1024,
        "{larger:?} with 5 GiB, {count} and {bytes} with 128 MiB"
    );
}

#[test]
fn one_machine_is_stopped_while_another_goes_on() {
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let (first, second) = (Lab::new(SHELL), Lab::new(SHELL));
    let ((first_handle, first_running), (second_handle, second_running)) = (first.start(), second.start());
    first.screen.wait_for(READY);
    second.screen.wait_for(READY);
    first_handle.stop();
    assert_eq!(first_running.join().unwrap().unwrap(), Outcome::Stopped);

    second_handle.input("echo sum=$((40 + 2))\n");
    second.screen.wait_for("sum=42");
    second_handle.input("exit\n");
    // Without ACPI a kernel that powers off halts.
    assert_eq!(second_running.join().unwrap().unwrap(), Outcome::Halted);
    assert!(!first.screen.text().contains("sum="), "each has a console of its own");
    // Nobody is there any more, and nothing happens.
    first_handle.stop();
    second_handle.input("echo\n");
}

#[test]
fn the_threads_of_a_program_have_a_sandbox_that_lets_io_uring_through() {
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::new("dd if=/dev/zero of=/dev/vda bs=4k count=4 conv=fsync 2>/dev/null && echo written");
    let disk = tempfile::NamedTempFile::new().unwrap();
    fs::write(&disk, [b'x'; 32 << 10]).unwrap();
    let config = lab.config.clone().disk(Spec { engine: Engine::IoUring, ..Spec::new(disk.path()) });
    let sandbox = Sandbox::new(Mode::On);
    // It may be used for more than one machine.
    let builder = Builder::new(config).sandbox(sandbox.clone()).console(Console::to(lab.screen.clone()));
    assert_eq!(builder.build().unwrap().run().unwrap(), Outcome::Halted);
    lab.screen.wait_for("written");
    let (zeros, rest) = (vec![0; 16 << 10], vec![b'x'; 16 << 10]);
    assert!(fs::read(&disk).unwrap() == [zeros, rest].concat());
    drop(sandbox);
}

#[test]
fn a_machine_that_is_paused_stands_still_and_goes_on() {
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(4 << 20).unwrap();
    let mut lab = Lab::new(
        "(while :; do dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null; done) &
         (i=0; while :; do i=$((i + 1)); echo tick $i; done) &
         echo ready for commands; sh",
    );
    lab.config = lab.config.cpus(2).disk(bantam::virtio::blk::Spec::new(disk.path()));
    let (handle, running) = lab.start();
    lab.screen.wait_for(READY);
    for round in 0..5 {
        handle.pause().unwrap();
        handle.pause().unwrap();
        assert!(!threads().iter().any(|name| name == "bantam-blk0"), "the disk's thread has ended");
        // What was printed before is on its way.
        let mut seen = lab.screen.text();
        loop {
            thread::sleep(Duration::from_millis(200));
            let now = lab.screen.text();
            if std::mem::replace(&mut seen, now) == lab.screen.text() {
                break;
            }
        }
        handle.input(format!("echo round=$((100 + {round}))\n"));
        let other = handle.clone();
        let pauses = thread::spawn(move || other.pause());
        pauses.join().unwrap().unwrap();
        assert_eq!(lab.screen.text(), seen, "a machine that is paused says nothing");
        handle.resume().unwrap();
        handle.resume().unwrap();
        lab.screen.wait_for(&format!("round={}", 100 + round));
    }
    handle.pause().unwrap();
    handle.stop();
    assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
    assert!(matches!(handle.pause(), Err(machine::Refusal::Ended("pause"))));
    assert!(matches!(handle.resume(), Err(machine::Refusal::Ended("resume"))));
}

#[test]
fn a_machine_runs_once_and_keeps_its_report() {
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::new("");
    let mut machine = lab.build();
    assert_eq!(machine.run().unwrap(), Outcome::Halted);
    let report = machine.report();
    assert!(matches!(machine.run(), Err(machine::Error::RanBefore)));
    assert_eq!(machine.report().outcome, Some(Outcome::Halted));
    assert_eq!(machine.report().durations.end, report.durations.end);
    let durations = report.durations;
    let stages = [durations.first_kvm_run, durations.first_console_byte, durations.user_space, durations.end];
    assert!(stages.iter().all(Option::is_some) && stages.is_sorted(), "{durations:?}");
    assert!(report.statistics["vcpu0"]["device-accesses"].as_u64() > Some(0), "{report:?}");
}

#[test]
fn upkeep_is_done_at_the_start_and_again() {
    static DONE: (Mutex<u32>, Condvar) = (Mutex::new(0), Condvar::new());
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::new(SHELL);
    let builder = Builder::new(lab.config.clone()).console(Console::to(lab.screen.clone())).upkeep(|| {
        *DONE.0.lock().unwrap() += 1;
        DONE.1.notify_all();
    });
    let mut machine = builder.build().unwrap();
    let (handle, running) = (machine.handle(), thread::spawn(move || machine.run()));
    let done = DONE.1.wait_timeout_while(DONE.0.lock().unwrap(), LIMIT, |times| *times < 2).unwrap();
    assert!(!done.1.timed_out());
    handle.stop();
    assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
}

#[test]
fn a_machine_that_is_stopped_before_it_runs_ends_at_once() {
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let mut machine = Lab::new("").build();
    machine.handle().stop();
    assert_eq!(machine.run().unwrap(), Outcome::Stopped);
}

#[test]
fn a_console_that_panics_does_not_stop_the_guest() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            panic!("as the test wants it")
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::new("reboot -f");
    let mut machine = Builder::new(lab.config.clone()).console(Console::to(Broken)).build().unwrap();
    assert_eq!(machine.run().unwrap(), Outcome::Rebooted);
}

#[test]
fn what_cannot_be_built_is_a_typed_error() {
    let _process = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
    let build = |config: Config| Builder::new(config).console(Console::to(io::sink())).build().err().unwrap();
    let config = || Config::new().kernel(Kernel::Tiny.vmlinux());
    assert!(matches!(build(Config::new()), machine::Error::NoKernel));
    assert!(matches!(build(config().cpus(0)), machine::Error::Config(bantam::config::Error::NoCpus)));
    assert!(matches!(build(Config::new().kernel("/dev/null")), machine::Error::Boot(_)));
    assert!(matches!(build(config().disk(bantam::virtio::blk::Spec::new("/nowhere"))), machine::Error::Disk(_)));
    let socket = console::Spec::Socket("/nowhere/socket".into());
    let error = Builder::new(config().serial(socket)).build().err().unwrap();
    assert!(matches!(error, machine::Error::Console(console::Error::Socket(..))), "{error}");
}

#[test]
fn nothing_is_left_of_a_machine_but_the_handler_of_one_signal() {
    let _process = PROCESS.write().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::new("");
    let (threads, descriptors, handlers) = (threads(), descriptors(), handlers());
    let mut machine = lab.build();
    assert_eq!(machine.run().unwrap(), Outcome::Halted);
    drop(machine);
    assert_eq!(self::threads(), threads);
    assert_eq!(self::descriptors(), descriptors);
    let kick = 1 << (bantam::signal::kick_signal().unwrap() - 1);
    assert_eq!(self::handlers() | kick, handlers | kick);
}

/// The names of this process's threads, but for those of the tests.
fn threads() -> Vec<String> {
    let names = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        // A thread may end meanwhile.
        fs::read_to_string(task.ok()?.path().join("comm")).ok()
    });
    names.filter(|name| name.starts_with("bantam")).collect()
}

/// What this process has open.
fn descriptors() -> Vec<String> {
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let mut names: Vec<_> = links.map(|link| link.display().to_string()).collect();
    names.sort();
    names
}

/// The signals that have a handler, one bit each.
fn handlers() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap()
}
