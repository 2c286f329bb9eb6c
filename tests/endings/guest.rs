//! Endings that the guest brings about.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::{Ended, Guest, Kernel};

fn ends(guest: Guest, status: i32, outcome: &str) -> Ended {
    let ended = guest.run();
    ended.require(ended.status == status, &format!("expected status {status}"));
    ended.require(ended.report["outcome"] == outcome, &format!("expected {outcome}, got {:#}", ended.report));
    ended
}

fn tiny(script: &str) -> Guest {
    Guest::new(Kernel::Tiny).script(script)
}

/// The panic's message is in the words and in the report, and the last lines of the console in both.
fn panics(guest: Guest, message: &str) -> Ended {
    let ended = ends(guest, 121, "panicked");
    let text = ended.report["message"].as_str().unwrap();
    ended.require(text.contains(message), &format!("expected `{message}`, got `{text}`"));
    let tail = ended.report["console-tail"].as_array().unwrap();
    ended.require((5..=20).contains(&tail.len()), "expected up to 20 lines");
    let said: Vec<_> = ended.stderr.lines().collect();
    ended.require(said[0].starts_with(&format!("bantam: the guest kernel panicked: {text}; ")), "expected the message");
    let lines: Vec<_> = tail.iter().map(|line| format!("  {}", line.as_str().unwrap()).trim_end().to_owned()).collect();
    let shown: Vec<_> = said[1..].iter().map(|line| line.trim_end().to_owned()).collect();
    ended.require(shown == lines[..shown.len()] && shown.len() + 1 >= lines.len(), "expected the console's last lines");
    ended
}

#[test]
fn a_kernel_without_a_root_is_told_of() {
    let mut bantam = Command::new(env!("CARGO_BIN_EXE_bantam"));
    bantam.arg("run").arg("--kernel").arg(Kernel::Tiny.vmlinux()).args(["--timeout", "100s"]);
    let output = bantam.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(121), "{said}");
    assert!(said.contains("bantam: the machine has no root file system, and its kernel brings none"), "{said}");
}

#[test]
fn powers_off_by_acpi() {
    let ended = ends(Guest::new(Kernel::Debian61).script("poweroff -f"), 0, "powered-off");
    ended.require(ended.stderr.is_empty(), "expected no words");
    assert_eq!(ended.report["cause"], "the guest powered off");
}

#[test]
fn reboots_by_acpi() {
    ends(Guest::new(Kernel::Debian61).cmdline("reboot=a").script("reboot -f"), 0, "rebooted");
}

#[test]
fn reboots_by_the_keyboard_controller() {
    let ended = ends(tiny("echo hello; reboot -f").cpus(2), 0, "rebooted");
    ended.require(ended.stderr.is_empty(), "expected no words");
    let mut durations = ended.report["durations"].as_object().unwrap().clone();
    assert_eq!(durations.remove("command"), Some(serde_json::Value::Null));
    assert!(durations.values().all(|milliseconds| milliseconds.as_f64() > Some(0.0)), "{durations:?}");
}

#[test]
fn halts_one_vcpu() {
    ends(tiny("halt -f"), 0, "halted");
}

#[test]
fn halts_two_vcpus() {
    ends(tiny("halt -f").cpus(2), 0, "halted");
}

#[test]
fn halts_without_a_word() {
    // /dev/console leads nowhere, and the kernel keeps even its last words.
    let guest = tiny("").file("silent", b"#!/bin/sh\nsleep 1\nhalt -f\n").cpus(2);
    let guest = guest.flag("--cmdline-only").cmdline("console=ttyS1 loglevel=0 pci=off rdinit=/silent");
    let ended = ends(guest, 0, "halted");
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_vcpu_that_is_idle_has_not_halted() {
    // What a kernel says before it halts; and then it waits for a timer, time after time.
    let script = "echo 'reboot: System halted'; sleep 1; sleep 1; echo 'still here'; reboot -f";
    let ended = ends(tiny(script), 0, "rebooted");
    assert!(ended.stdout.contains("still here"));
}

#[test]
fn panics_and_resets() {
    let ended = panics(tiny("echo c > /proc/sysrq-trigger"), "sysrq triggered crash");
    assert!(ended.stdout.contains("sysrq triggered crash"));
}

#[test]
fn panics_and_stays() {
    panics(tiny("echo c > /proc/sysrq-trigger").cmdline("panic=0").cpus(2), "sysrq triggered crash");
}

#[test]
fn panics_in_the_middle_of_a_line() {
    let init = b"#!/bin/sh\nprintf 'last words'\nexit 3\n";
    panics(tiny("").file("brief", init).cmdline("rdinit=/brief"), "Attempted to kill init! exitcode=0x00000300");
}

#[test]
fn panics_without_an_init() {
    panics(tiny("").cmdline("rdinit=/nowhere"), "Unable to mount root fs");
}

#[test]
fn a_program_that_prints_a_panic_is_none() {
    let script = "echo 'Kernel panic - not syncing: a joke'; echo '---[ end Kernel panic - not syncing: a joke ]---'";
    ends(tiny(script), 0, "halted").succeeded();
}

#[test]
fn crashes_with_a_triple_fault() {
    let ended = ends(tiny("reboot -f").cmdline("reboot=t"), 122, "crashed");
    let words = "bantam: the guest crashed with a triple fault on vCPU 0 at 0xfff";
    ended.require(ended.stderr.starts_with(words), "expected a triple fault");
    let report = &ended.report;
    assert_eq!((&report["kind"], &report["vcpu"], &report["cpl"]), (&json!("triple-fault"), &json!(0), &json!(0)));
}

#[test]
fn never_says_a_word() {
    // /dev/console leads nowhere, and init only waits.
    let guest = tiny("").file("silent", b"#!/bin/sh\nexec sleep 1000\n").option("--boot-timeout", "3s");
    let guest = guest.flag("--cmdline-only").cmdline("console=ttyS1 pci=off rdinit=/silent");
    let ended = ends(guest, 123, "boot-timed-out");
    assert_eq!(ended.stdout, "");
    let words = "bantam: the guest did not reach user space within 3s: nothing was seen on its console\n";
    assert_eq!(ended.stderr, words);
    assert_eq!((&ended.report["limit-seconds"], &ended.report["seen-console"]), (&json!(3.0), &json!(false)));
}

#[test]
fn never_reaches_user_space() {
    // The kernel waits for its root disk.
    let guest = tiny("").cmdline("loglevel=7 rdinit=/nowhere root=/dev/vda rootwait").option("--boot-timeout", "30s");
    let ended = ends(guest, 123, "boot-timed-out");
    ended.require(ended.stdout.contains("Linux version"), "expected the kernel's words");
    assert_eq!(ended.stderr, "bantam: the guest did not reach user space within 30s\n");
    assert_eq!(ended.report["seen-console"], json!(true));
}
