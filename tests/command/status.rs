//! How the command ended, and what bantam makes of it.

use rustix::process::Signal;
use serde_json::json;

use crate::support::{Guest, Kernel};
use crate::{shell, tiny};

#[test]
fn a_status_is_passed_on() {
    for status in [0, 7, 255] {
        let ended = shell(&format!("exit {status}")).run();
        ended.require(ended.status == status, &format!("expected status {status}"));
        assert_eq!(ended.report["outcome"], "exited");
        assert_eq!(ended.report["status"], status);
        assert!(ended.report["durations"]["command"].as_f64().is_some());
        ended.require(ended.stdout.is_empty() && ended.stderr.is_empty(), "nothing was to be printed");
    }
}

#[test]
fn the_statuses_of_bantams_own_ends_are_told_apart_by_the_report() {
    let ended = shell("exit 121").run();
    assert_eq!((ended.status, &ended.report["outcome"]), (121, &json!("exited")));
    let ended = shell("echo c >/proc/sysrq-trigger; sleep 100").run();
    assert_eq!((ended.status, &ended.report["outcome"]), (121, &json!("panicked")));
    ended.require(ended.stderr.contains("Kernel panic - not syncing: sysrq triggered crash"), "the panic is shown");
    ended.require(ended.stdout.is_empty(), "the kernel's messages are not the command's");
}

#[test]
fn a_signal_that_killed_it_is_passed_on() {
    let ended = shell("kill -9 $$").run();
    assert_eq!((ended.status, &ended.report["outcome"], &ended.report["signal"]), (137, &json!("killed"), &json!(9)));
}

#[test]
fn what_cannot_be_run_is_said() {
    let ended = tiny(&["no-such-program"]).run();
    assert_eq!((ended.status, &ended.report["status"]), (127, &json!(127)));
    assert_eq!(ended.stderr, "bantam: cannot run `no-such-program`: no such file or directory\n");
    let ended = tiny(&["/proc/version"]).run();
    assert_eq!(ended.status, 126);
    assert_eq!(ended.stderr, "bantam: cannot run `/proc/version`: permission denied\n");
    let ended = tiny(&["true"]).option("--user", "nobody-here").run();
    assert_eq!((ended.status, &ended.report["outcome"]), (125, &json!("failed")));
    ended.require(ended.stderr.contains("in the guest: there is no user `nobody-here` in /etc/passwd"), "it is said");
}

#[test]
fn a_guest_that_goes_away_is_no_success() {
    for way in ["reboot -f", "poweroff -f"] {
        let ended = shell(way).run();
        ended.require(ended.status == 125, "expected status 125");
        ended.require(ended.stderr.contains("before the command had ended"), "it is said");
    }
}

#[test]
fn what_it_leaves_behind_is_killed_and_its_output_kept() {
    let ended = shell("(trap '' TERM HUP; echo left; exec sleep 1000) & echo done").run();
    ended.require(ended.status == 0, "expected status 0");
    let mut lines: Vec<_> = ended.stdout.lines().collect();
    lines.retain(|line| *line != "left");
    assert_eq!(lines, ["done"]);
}

#[test]
fn the_first_signal_is_for_the_command_and_the_second_for_the_machine() {
    let script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let running = shell(script).spawn();
    running.wait_for("ready");
    running.signal(Signal::TERM);
    let ended = running.wait();
    ended.require(ended.status == 9 && ended.stdout.ends_with("got it\n"), "the command takes it");

    let running = shell("trap 'echo ignored' INT; echo ready; while :; do sleep 0.1; done").spawn();
    running.wait_for("ready");
    running.signal(Signal::INT);
    running.wait_for("ignored");
    running.signal(Signal::INT);
    let ended = running.wait();
    assert_eq!((ended.status, &ended.report["outcome"]), (130, &json!("signaled")));
}

#[test]
fn signals_are_the_commands_own() {
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM] {
        let mut running = tiny(&["cat"]).spawn();
        running.write("ready");
        running.wait_for("ready");
        running.signal(signal);
        let ended = running.wait();
        ended.require(ended.status == 128 + signal.as_raw(), &format!("expected {signal:?}"));
        assert_eq!(ended.report["outcome"], "killed");
    }
}

#[test]
fn a_command_without_a_root_is_refused() {
    let ended = Guest::running(Kernel::Tiny.vmlinux(), &["true"]).run();
    ended.require(ended.status == 125 && ended.stderr.contains("without a root file system"), "it is refused");
}
