//! Limits of CPU time and of processes, and who enforces them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, geteuid};

use crate::roots::Root;
use crate::support::{Ended, Guest, Kernel, Running};

/// Starts processes that stay, and says how many it has started before each.
const MANY: &str = "busybox mkfifo /tmp/f; i=0
    while [ $i -lt 80 ]; do echo $i; (read x <>/tmp/f) & i=$((i+1)); done; echo all";

fn many(kernel: Kernel) -> Ended {
    let root = Root::new();
    let guest = Guest::running(kernel.bzimage(), &["sh", "-c", MANY]).root(&root.image());
    let ended = guest.option("--pids", 20).run();
    ended.require(ended.status == 2 && !ended.stdout.contains("all"), "the command has failed by itself");
    ended.require(ended.stderr.contains("can't fork: Resource temporarily unavailable"), "it says why");
    ended
}

#[test]
fn processes_are_limited_by_a_control_group() {
    let ended = many(Kernel::Debian61);
    // The shell is the first.
    ended.require(ended.stdout.lines().count() == 20, "20 processes");
    assert_eq!(ended.report["limits"]["pids"], "a control group of the guest");
}

#[test]
fn processes_are_limited_by_the_number_of_threads() {
    let ended = many(Kernel::Tiny);
    ended.require((20..50).contains(&ended.stdout.lines().count()), "about 20 processes");
    assert!(ended.report["limits"]["pids"].as_str().unwrap().contains("limit of all threads"), "{}", ended.report);
}

/// A guest whose command never rests. It may have a fifth of a CPU.
fn busy(root: &Root, change: impl FnOnce(&mut Guest)) -> Running {
    let words = ["sh", "-c", "echo ready; while :; do :; done"];
    let guest = Guest::running(Kernel::Tiny.vmlinux(), &words).root(&root.image());
    let mut guest = guest.option("--cpu-quota", "20%").flag("-v");
    change(&mut guest);
    let running = guest.start();
    running.wait_for("ready");
    running
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

/// The threads of a process: their numbers and names.
fn threads(running: &Running) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", running.pid().as_raw_nonzero())).unwrap();
    let tasks = tasks.map(|task| task.unwrap());
    tasks.map(|task| (task.file_name().into_string().unwrap(), read(task.path().join("comm")).trim().into())).collect()
}

fn may_make_groups() -> bool {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    geteuid().is_root() && controllers.split_whitespace().any(|name| name == "cpu")
}

/// The control group that bantam says it has made.
fn group(running: &Running) -> Option<PathBuf> {
    let said = running.stderr();
    let (_, path) = said.split_once("CPU time is limited to 20% by the control group ")?;
    Some(path.lines().next().unwrap().into())
}

fn waits_until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn cpu_time_is_limited_by_a_control_group() {
    if !may_make_groups() {
        return eprintln!("SKIPPED: only root is sure to be allowed a control group, where version 2 has the CPU");
    }
    let root = Root::new();
    let running = busy(&root, |_| {});
    let group = group(&running).unwrap_or_else(|| panic!("{}", running.stderr()));
    assert_eq!(read(group.join("cpu.max")), "20000 100000\n");
    let inside = read(group.join("cgroup.threads"));
    for (number, name) in threads(&running) {
        let limited = ["vcpu", "blk", "vsock", "rng"].iter().any(|it| name.starts_with(&format!("bantam-{it}")));
        assert_eq!(inside.lines().any(|line| line == number), limited, "{name}");
    }
    let throttled = || {
        read(group.join("cpu.stat"))
            .lines()
            .any(|line| line.strip_prefix("nr_throttled ").is_some_and(|count| count != "0"))
    };
    waits_until("it was throttled", throttled);
    running.signal(Signal::KILL);
    assert_eq!(running.wait().status, 137);

    // The next one removes what was left, and its own.
    let running = busy(&root, |_| {});
    assert!(!group.exists(), "it is left");
    let group = self::group(&running).unwrap();
    running.signal(Signal::TERM);
    running.signal(Signal::TERM);
    let ended = running.wait();
    let told = ended.report["limits"]["cpu-quota"].as_str().unwrap_or_default();
    assert_eq!(told, format!("the control group {}", group.display()));
    ended.require(!group.exists(), "its group is left");
}

/// Lets another user at the files of a guest.
fn open_to_all(guest: &Guest, root: &Root) {
    for path in [guest.folder(), root.image().parent().unwrap()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
}

#[test]
fn cpu_time_is_limited_by_a_control_group_that_is_delegated() {
    if !may_make_groups() {
        return eprintln!("SKIPPED: only root can delegate a control group, where version 2 has the CPU");
    }
    // As systemd does it for a scope with Delegate=yes.
    let script = "cd /sys/fs/cgroup; echo +cpu >cgroup.subtree_control; mkdir delegated; cd delegated
        chown 65534 . cgroup.procs cgroup.threads cgroup.subtree_control; echo $$ >cgroup.procs
        exec setpriv --reuid 65534 \"$@\"";
    let root = Root::new();
    let running = busy(&root, |guest| {
        open_to_all(guest, &root);
        let mut sh = Command::new("sh");
        sh.args(["-ec", script, "sh"]).arg(guest.command().get_program()).args(guest.command().get_args());
        sh.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        *guest.command() = sh;
    });
    let group = group(&running).unwrap_or_else(|| panic!("{}", running.stderr()));
    assert_eq!(group.parent(), Some(Path::new("/sys/fs/cgroup/delegated")));
    assert_eq!(read(group.join("cpu.max")), "20000 100000\n");
    let (vcpu, _) = threads(&running).into_iter().find(|(_, name)| name == "bantam-vcpu0").unwrap();
    assert!(read(group.join("cgroup.threads")).lines().any(|line| line == vcpu));
    running.signal(Signal::TERM);
    running.signal(Signal::TERM);
    running.wait();
    // There is nothing in it any more.
    fs::remove_dir("/sys/fs/cgroup/delegated").unwrap();
}

#[test]
fn cpu_time_is_limited_without_privileges() {
    let root = Root::new();
    let running = busy(&root, |guest| {
        if geteuid().is_root() {
            open_to_all(guest, &root);
            guest.command().uid(65534);
        }
    });
    if group(&running).is_some() {
        return eprintln!("SKIPPED: this user may make control groups");
    }
    let (vcpu, _) = threads(&running).into_iter().find(|(_, name)| name == "bantam-vcpu0").unwrap();
    let stat = format!("/proc/{}/task/{vcpu}/stat", running.pid().as_raw_nonzero());
    // User and system time, in hundredths of a second (proc_pid_stat(5)); the name is before the last bracket.
    let used = || {
        let stat = read(&stat);
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u32>().unwrap() + fields[12].parse::<u32>().unwrap()
    };
    let (begin, before) = (Instant::now(), used());
    waits_until("it runs", || used() >= before + 60);
    let (used, elapsed) = (f64::from(used() - before) / 100.0, begin.elapsed().as_secs_f64());
    // A slow host makes it less.
    assert!(used <= 0.2 * elapsed + 0.1, "{used} of {elapsed} s");
    running.signal(Signal::TERM);
    running.signal(Signal::TERM);
    let ended = running.wait();
    ended.require(ended.stderr.contains("no control group for the CPU quota: "), "it says why");
    assert!(ended.report["limits"]["cpu-quota"].as_str().unwrap().starts_with("pausing vCPUs"), "{}", ended.report);
    assert!(ended.counted("vcpu0", "throttled") > 0);
}
