//! Starts that the host does not allow: each time status 125, and a line that says what could not be had.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::support::{Ended, Running, payload};

/// How long one may take: under strace, in an emulated host.
const LIMIT: Duration = Duration::from_secs(120);

/// A machine with devices of most kinds, and a guest that ends at once, or one that goes in and out for ever.
struct Lab(TempDir);

impl Lab {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        for (name, code) in [("reboot", payload::REBOOT), ("knock", payload::KNOCK)] {
            fs::write(folder.path().join(name), payload::elf(code)).unwrap();
        }
        fs::write(folder.path().join("disk"), [0; 4096]).unwrap();
        Lab(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Has `program`, with these arguments, start bantam with this kernel.
    fn run(&self, program: &str, arguments: &[&str], kernel: &str) -> Ended {
        let mut command = Command::new(program);
        command.args(arguments).args([env!("CARGO_BIN_EXE_bantam"), "run", "--memory", "32M", "--cpus", "2"]);
        command.args(["--balloon", "stats=1s", "--sandbox", "off", "--kernel"]).arg(self.path(kernel));
        command.arg("--disk").arg(self.path("disk"));
        command.arg("--vsock").arg(format!("cid=3,socket={}", self.path("vsock").display()));
        // cargo has the dynamic linker look into folders of its own.
        command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = Running::start(&mut command, TempDir::new().unwrap(), LIMIT).wait();
        assert!(!self.path("vsock").exists(), "the socket is left: {}", ended.stderr);
        assert!(!ended.stderr.contains("internal error"), "{}", ended.stderr);
        ended
    }

    /// The calls that bantam's first thread makes, in their order.
    fn calls(&self, call: &str) -> Vec<String> {
        let log = self.path("log");
        let (trace, log) = (format!("trace={call}"), log.to_str().unwrap());
        let ended = self.run("strace", &["-f", "-qq", "-o", log, "-e", &trace], "reboot");
        ended.require(ended.status == 0, "expected a guest that ends");
        let log = fs::read_to_string(log).unwrap();
        let thread = log.split(' ').next().unwrap();
        let own = log.lines().filter_map(|line| line.strip_prefix(thread)).map(|line| line.trim().to_owned());
        own.filter(|line| line.starts_with(call)).collect()
    }

    /// Has one call fail, that of this number in each thread.
    fn fail(&self, call: &str, error: &str, number: usize, kernel: &str) -> Ended {
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={error}:when={number}"));
        self.run("strace", &["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject], kernel)
    }
}

#[test]
fn each_ioctl_of_kvm_that_fails_is_named() {
    let lab = Lab::new();
    let calls = lab.calls("ioctl");
    let name = |call: &String| call.split(", ").nth(1).unwrap_or_default().trim_end_matches(')').to_owned();
    let mut seen = 0;
    for (number, call) in (1..).zip(&calls) {
        let name = name(call);
        if !name.starts_with("KVM_") || name == "KVM_CHECK_EXTENSION" {
            continue;
        }
        // One call of a library makes both.
        let said = if name == "KVM_GET_VCPU_MMAP_SIZE" { "KVM_CREATE_VM" } else { &name };
        let ended = lab.fail("ioctl", "EIO", number, "reboot");
        ended.require(ended.status == 125 && ended.stderr.contains(said), &format!("expected words of {call}"));
        seen += 1;
    }
    assert!(seen > 10, "{calls:?}");
    // Later than any of the first thread.
    let ended = lab.fail("ioctl", "EIO", calls.len() + 10, "knock");
    ended.require(ended.status == 125 && ended.stderr.contains("KVM_RUN"), "expected words of KVM_RUN");
}

#[test]
fn too_few_descriptors_are_said() {
    let lab = Lab::new();
    // With fewer its libraries cannot be opened.
    let started = (4..64).find(|limit| {
        let ended = lab.run("prlimit", &[&format!("--nofile={limit}")], "reboot");
        let said = ended.stderr.contains("Too many open files");
        ended.require(ended.status == 0 || ended.status == 125 && said, &format!("of {limit} descriptors"));
        ended.status == 0
    });
    assert!(started > Some(8), "{started:?}");
}

#[test]
fn too_little_memory_is_said() {
    let lab = Lab::new();
    let started = (12..256).step_by(4).find(|mib: &u64| {
        let ended = lab.run("prlimit", &[&format!("--as={}", mib << 20)], "reboot");
        // 127: the dynamic linker's.
        ended.require([0, 125, 127].contains(&ended.status), &format!("in {mib} MiB of addresses"));
        ended.require(ended.status != 125 || ended.stderr.contains("annot"), "what could not be done is not said");
        ended.status == 0
    });
    assert!(started > Some(32), "{started:?}");
}

#[test]
fn a_thread_or_a_mapping_that_cannot_be_had_is_said() {
    let lab = Lab::new();
    for (call, error, first) in [("clone3", "EAGAIN", "CLONE_VM"), ("mmap", "ENOMEM", "MAP_NORESERVE")] {
        let calls = lab.calls(call);
        // Those before guest memory are the dynamic linker's.
        let first = calls.iter().position(|call| call.contains(first)).unwrap();
        assert!(calls.len() - first > 2, "{calls:?}");
        for number in first + 1..=calls.len() {
            let ended = lab.fail(call, error, number, "reboot");
            // The last thread is for the end, and asked for until it is there; its stack may be the last but one.
            let is_last = number + 1 >= calls.len();
            let said = ended.status == 125 && ended.stderr.contains("cannot ");
            // It only has memory where huge pages can be.
            let may_fail = is_last || calls[number - 1].contains("MAP_FIXED_NOREPLACE");
            ended.require(said || may_fail && ended.status == 0, &format!("expected words of {call} {number}"));
        }
    }
}
