//! What a process with a sandbox has left, and what becomes of one that leaves it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::support::{Guest, Kernel};
use crate::{eventually, started_by};
use rustix::process::Signal;

/// Of each thread by its name, the fields of its status.
fn threads(pid: i32) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = |path: &Path| {
        // One may end meanwhile.
        let text = fs::read_to_string(path).ok()?;
        let field = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
        let fields: BTreeMap<_, _> = text.lines().filter_map(field).collect();
        Some((fields.get("Name")?.clone(), fields))
    };
    tasks.filter_map(|task| status(&task.unwrap().path().join("status"))).collect()
}

#[test]
fn a_machine_with_all_devices_runs_with_little() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), vec![0; 1 << 20]).unwrap();
    let console = path("console");
    let vsock = format!("cid=3,socket={}", path("vsock").display());
    let script = "dd if=/dev/zero of=/dev/vda bs=4k count=9 conv=fsync && echo written; head -c 9 /dev/hwrng | wc -c; sleep 1000";
    let guest = Guest::new(Kernel::Tiny).script(script).disk(path("disk").display()).option("--vsock", vsock);
    let guest = guest.option("--balloon", "16M").option("--sandbox", "on");
    let guest = guest.option("--serial", format_args!("socket={}", console.display()));
    let reports = guest.folder().canonicalize().unwrap();
    // Others forget to close theirs.
    let opens = "exec 7</etc/passwd 9</etc/passwd; exec \"$0\" \"$@\"";
    let running = started_by(guest, "sh", &["-c", opens]).start();
    eventually(|| UnixStream::connect(&console).is_ok());
    let pid = running.pid().as_raw_pid();
    eventually(|| threads(pid).contains_key("bantam-blk0"));
    for (name, status) in threads(pid) {
        let is = |field: &str, value: &str| assert_eq!(status[field], value, "{field} of {name}");
        is("NoNewPrivs", "1");
        is("Seccomp", "2");
        // Those that remove the sockets in the end, in folders of other users.
        for field in ["CapPrm", "CapEff"] {
            is(field, "0000000000000006");
        }
        is("CapInh", "0000000000000000");
        is("CapAmb", "0000000000000000");
    }
    let open = |name: &str| fs::read_link(path(name)).unwrap_or_else(|_| path(name));
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let file = fs::read_link(entry.unwrap().path()).unwrap();
        let kind = file.to_str().unwrap().split(':').next().unwrap();
        let is_its = ["anon_inode", "socket", "pipe", "/dev/kvm", "/dev/null", "/dev/hwrng"].contains(&kind);
        let is_its = is_its || file == open("disk") || file == reports;
        assert!(is_its, "{} is open", file.display());
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    assert_eq!(limit("Max core file size"), Some("0"));
    let descriptors: u32 = limit("Max open files").unwrap().parse().unwrap();
    assert!(descriptors <= 1537, "{descriptors}, with one CPU and a vsock device");
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.status, 128 + Signal::TERM.as_raw(), "{}", ended.stderr);
    assert!(!ended.stderr.contains("sandbox"), "{}", ended.stderr);
    assert!(!console.exists() && !path("vsock").exists(), "sockets are removed");
}

#[test]
fn a_system_call_beyond_the_lists_is_told_and_ends_it_or_not() {
    if !cfg!(debug_assertions) {
        return;
    }
    let guest = |role: &str, mode: &str| {
        let mut guest = Guest::new(Kernel::Tiny).script("").option("--sandbox", mode);
        guest.command().env("BANTAM_TEST_VIOLATION", role);
        guest.run()
    };
    for (role, thread) in
        [("main", "bantam"), ("vcpu", "bantam-vcpu0"), ("device", "bantam-rng"), ("stream", "bantam-console")]
    {
        let ended = guest(role, "on");
        assert_eq!(ended.status, 125, "{role}: {}", ended.stderr);
        let told = format!("bantam: sandbox: thread {thread} made the system call swapoff (168) with 0x0 ");
        assert!(ended.stderr.contains(&told) && ended.stderr.contains("bantam+0x"), "{role}: {}", ended.stderr);
    }
    let ended = guest("vcpu", "log");
    assert_eq!(ended.status, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("swapoff (168)") && ended.stderr.contains("it goes on"), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("made the system call").count(), 1, "{}", ended.stderr);
}

#[test]
fn the_thread_of_a_disk_does_nothing_with_another_one() {
    if !cfg!(debug_assertions) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = |name: &str| {
        let path = folder.path().join(name);
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        path
    };
    let guest = Guest::new(Kernel::Tiny).script("sleep 1000").option("--sandbox", "on");
    let mut guest = guest.disk(disk("one").display()).disk(disk("two").display());
    guest.command().env("BANTAM_TEST_VIOLATION", "another-disk");
    let ended = guest.run();
    assert_eq!(ended.status, 125, "{}", ended.stderr);
    let told = "bantam: sandbox: thread bantam-blk0 made the system call read (0) with 0x";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
}
