//! Host I/O that takes forever: here the thread that does it is stopped, as a debugger does.

#![expect(unsafe_code, reason = "ptrace(2) has no safe form")]

use std::fs;
use std::ptr::null_mut;

use rustix::process::Signal;

use crate::eventually;
use crate::support::{Guest, Kernel, Running};

/// The thread of that name, if there is one.
fn find(running: &Running, name: &str) -> Option<libc::pid_t> {
    let tasks = fs::read_dir(format!("/proc/{}/task", running.pid())).unwrap();
    let ids = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let comm = |id: &String| fs::read_to_string(format!("/proc/{}/task/{id}/comm", running.pid()));
    let mut named = ids.filter(|id| comm(id).is_ok_and(|comm| comm.trim() == name));
    named.next().map(|id| id.parse().unwrap())
}

fn stop(id: libc::pid_t) {
    let none = null_mut::<libc::c_void>();
    for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
        // SAFETY: neither request has this process's memory read or written.
        let result = unsafe { libc::ptrace(request, id, none, none) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Waits until the thread has gone: its process ends only when it was waited for.
fn gone(id: libc::pid_t) {
    eventually(|| {
        let mut status = 0;
        // SAFETY: `status` is valid for the call.
        let waited = unsafe { libc::waitpid(id, &raw mut status, libc::__WALL | libc::WNOHANG) };
        waited == -1 || waited == id && !libc::WIFSTOPPED(status)
    });
}

/// Runs a guest that does `last` when its disk is stuck.
fn spawn(last: &str) -> (Running, libc::pid_t) {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let script = format!("echo ready; read line; {last}");
    let mut running = Guest::new(Kernel::Tiny).disk(disk.path().display()).script(&script).spawn();
    running.wait_for("ready");
    let id = find(&running, "bantam-blk0").unwrap();
    stop(id);
    running.write("go\n");
    (running, id)
}

#[test]
fn a_signal_ends_a_machine_with_a_stuck_disk() {
    let (running, id) = spawn("echo now; dd if=/dev/vda of=/dev/null count=1");
    running.wait_for("now");
    running.signal(Signal::TERM);
    gone(id);
    let ended = running.wait();
    assert_eq!(ended.status, 128 + Signal::TERM.as_raw(), "{}", ended.stderr);
}

#[test]
fn a_signal_ends_the_wait_for_a_stuck_disk() {
    let (running, id) = spawn("echo b >/proc/sysrq-trigger");
    eventually(|| find(&running, "bantam-vcpu0").is_none());
    assert!(find(&running, "bantam-blk0").is_some());
    running.signal(Signal::TERM);
    gone(id);
    let ended = running.wait();
    assert_eq!(ended.status, 128 + Signal::TERM.as_raw(), "{}", ended.stderr);
}
