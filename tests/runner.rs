//! What cargo runs tests by: resources/kvm-host/cargo-runner.sh.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

/// What becomes of a program in a folder of this name, with a limit of so many seconds.
fn run(folder: &str, script: &str, limit: u32) -> Output {
    let target = tempfile::tempdir().unwrap();
    let program = target.path().join(folder).join("program-0123456789abcdef");
    fs::create_dir(program.parent().unwrap()).unwrap();
    fs::write(&program, format!("#!/bin/bash\n{script}\n")).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/kvm-host/cargo-runner.sh");
    Command::new(runner).arg(program).arg("argument").env("TEST_TIMEOUT", limit.to_string()).output().unwrap()
}

#[test]
fn a_test_that_hangs_is_killed_and_named() {
    let ended = run("deps", "echo begun; (sleep 20; echo survived) & read <>/dev/ptmx", 1);
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!((ended.status.signal(), &*ended.stdout), (Some(9), &b"begun\n"[..]), "{stderr}");
    let thread = "\nprogram-0123456\n";
    for words in ["HANGS: ", "/deps/program-0123456789abcdef has not ended after 1 s (TEST_TIMEOUT)", thread] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
}

#[test]
fn a_test_that_ends_is_as_it_would_be_without_a_limit() {
    let ended = run("deps", "echo $1; echo wrong >&2; exit 101", 600);
    let (stdout, stderr) = (&*ended.stdout, &*ended.stderr);
    assert_eq!((ended.status.code(), stdout, stderr), (Some(101), &b"argument\n"[..], &b"wrong\n"[..]));
}

#[test]
fn cargo_run_has_no_limit() {
    let ended = run("debug", "read -t 2 <>/dev/ptmx; exit 7", 1);
    assert_eq!((ended.status.code(), &*ended.stderr), (Some(7), &b""[..]));
}
