//! Continuous integration: `bantam test`, and what `bantam run` tells others, with real guests.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use support::Kernel;
use tempfile::TempDir;

const BANTAM: &str = env!("CARGO_BIN_EXE_bantam");

/// A kernel and a root file system with busybox.
const MACHINE: &str = r#"
[defaults]
timeout = "100s"
memory = "96M"
[[kernel]]
name = "tiny"
path = "vmlinux"
[[root]]
name = "busybox"
initrd = "initramfs.cpio"
"#;

/// A folder with a test file in it.
struct Folder(TempDir);

impl Folder {
    fn new(file: &str) -> Self {
        let folder = Self(TempDir::new().unwrap());
        fs::create_dir(folder.path("state")).unwrap();
        std::os::unix::fs::symlink(Kernel::Tiny.vmlinux(), folder.path("vmlinux")).unwrap();
        std::os::unix::fs::symlink(Kernel::Tiny.file("initramfs.cpio"), folder.path("initramfs.cpio")).unwrap();
        fs::write(folder.path("ci.toml"), file).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(BANTAM);
        // Its folder is not the current one.
        command.arg("test").arg(self.path("ci.toml")).args(flags).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn test(&self, flags: &[&str]) -> Output {
        self.command(flags).output().unwrap()
    }

    /// Checks that the file is refused, with these words.
    #[track_caller]
    fn refuses(&self, file: &str, words: &str) {
        fs::write(self.path("ci.toml"), file).unwrap();
        let output = self.test(&["--list"]);
        let error = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(125), String::new()), "{error}");
        let place = self.path("ci.toml").display().to_string();
        assert!(error.contains(&place) && error.contains(words), "{words}: {error}");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What Python reads in a JUnit file: the counts, and for each case its result, its reason, and its outputs.
fn read_junit(path: &Path) -> BTreeMap<String, Vec<String>> {
    const READER: &str = r#"
import sys, xml.etree.ElementTree as tree
root = tree.parse(sys.argv[1]).getroot()
suites = list(root)
assert root.tag == "testsuites" and [suite.tag for suite in suites] == ["testsuite"]
cases = list(suites[0])
for element in [root, suites[0]]:
    assert int(element.get("tests")) == len(cases)
    for attribute, tag in [("failures", "failure"), ("errors", "error"), ("skipped", "skipped")]:
        assert int(element.get(attribute)) == len([case for case in cases if case.find(tag) is not None]), attribute
    assert float(element.get("time")) >= 0
for case in cases:
    assert case.tag == "testcase" and float(case.get("time")) >= 0
    words = [case.get("classname") + "/" + case.get("name")]
    for child in case:
        words.append(child.tag + ":" + (child.get("type") or "") + ":" + (child.get("message") or "") + ":" + "".join(child.itertext()))
    print("\0".join(words), end="\1")
"#;
    let output = Command::new("python3").args(["-c", READER]).arg(path).output().unwrap();
    assert!(output.status.success(), "{}\n{}", text(&output.stderr), fs::read_to_string(path).unwrap());
    let words = |case: &str| case.split('\0').map(String::from).collect::<Vec<_>>();
    let cases = text(&output.stdout);
    cases.split_terminator('\u{1}').map(words).map(|mut words| (words.remove(0), words)).collect()
}

#[test]
fn each_kind_of_end_has_a_reason_of_its_own() {
    let folder = Folder::new(&format!(
        r#"{MACHINE}
[[command]]
name = "pass"
pids = 100
run = ["sh", "-c", "printf 'fine \\033[31m\\377<&>]]>'; exit $STATUS"]
env = "STATUS=0"
[[command]]
name = "fail"
run = "echo the reason >&2; exit 7"
[[command]]
name = "panic"
run = "echo c >/proc/sysrq-trigger; sleep 100"
[[command]]
name = "hang"
run = "echo waiting; sleep 1000"
timeout = "25s"
[[command]]
name = "no boot"
run = "true"
boot-timeout = "10ms"
[[command]]
name = "memory"
run = "tail /dev/zero"
[[command]]
name = "lost"
run = "poweroff -f; sleep 100"
[[command]]
name = "flaky"
run = "test -e /state/mark || {{ touch /state/mark; echo not yet; exit 3; }}"
retry = 2
shares = ["state:/state"]
[[command]]
name = "not there"
run = ["true"]
user = "nobody-here"
"#
    ));
    let junit = folder.path("result.xml");
    let kept = folder.path("kept");
    let flags = ["--jobs", "2", "--github", "--junit", junit.to_str().unwrap(), "--output", kept.to_str().unwrap()];
    let output = folder.test(&flags);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{stdout}\n{stderr}");
    assert!(
        stdout.contains("\n9 cases in ") && stdout.contains(": 1 passed, 1 flaky, 6 failed, 1 could not be done"),
        "{stdout}"
    );
    let cases = read_junit(&junit);
    for (name, expected) in [
        ("pass", "system-out:::fine \u{fffd}<&>]]>"),
        ("fail", "failure:exit-status:the command exited with status 7:"),
        ("fail", "\nThe last lines of standard error:\n  the reason\n"),
        ("fail", "system-err:::the reason\n"),
        ("panic", "failure:panic:the guest kernel panicked: Kernel panic - not syncing: sysrq triggered crash:"),
        ("panic", "\nThe last lines of the guest's console:\n"),
        ("hang", "failure:timeout:the guest was still running after 25s:"),
        ("hang", "\nThe last lines of standard output:\n  waiting\n"),
        ("no boot", "failure:boot-timeout:the guest did not reach user space within 10ms"),
        (
            "memory",
            "failure:out-of-memory:the command was killed by signal 9: the guest ran out of memory (Out of memory: Killed process ",
        ),
        ("lost", "failure:lost-guest:the guest halted all its vCPUs before the command had ended:"),
        ("lost", "reboot: System halted"),
        ("flaky", "flakyFailure:exit-status:the command exited with status 3:"),
        ("flaky", "\nThe last lines of standard output:\n  not yet\n"),
        ("not there", "error:error:cannot run the command in the guest: there is no user `nobody-here`"),
    ] {
        let words = &cases[&format!("tiny/busybox/{name}")];
        assert!(words.iter().any(|word| word.contains(expected)), "{name}: {expected:?} is not in {words:?}");
    }
    assert_eq!(cases.len(), 9);
    let annotation = "::error title=tiny/busybox/fail::the command exited with status 7%0A%0AThe last lines";
    assert!(stdout.contains(annotation), "{stdout}");
    assert_eq!(fs::read(kept.join("tiny/busybox/pass/stdout")).unwrap(), b"fine \x1b[31m\xff<&>]]>");
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(kept.join("tiny/busybox/flaky/report.json")).unwrap()).unwrap();
    assert_eq!((&report["failure"], &report["earlier-attempts"][0]["status"]), (&serde_json::Value::Null, &3.into()));
    let console = fs::read_to_string(kept.join("tiny/busybox/panic/console")).unwrap();
    assert!(console.contains("Kernel panic"), "{console}");
}

/// Waits until `path` is there, or the process ends.
fn wait_for(path: &Path, child: &mut Child) {
    while !path.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_signal_ends_all_machines_and_what_is_known_is_told() {
    let folder = Folder::new(&format!(
        r#"{MACHINE}
[[command]]
name = "first"
run = "trap '' INT TERM; touch /state/ready; sleep 1000"
shares = "state:/state"
[[command]]
name = "second"
run = "true"
"#
    ));
    let junit = folder.path("result.xml");
    // A supervisor may ignore what tells of the end of children.
    let script =
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])";
    let ignoring = ["-c", script, BANTAM];
    let command = folder.command(&["-j1", "--junit", junit.to_str().unwrap()]);
    let mut child = Command::new("python3");
    let child = child.args(ignoring).args(command.get_args()).current_dir("/").stdin(Stdio::null());
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&folder.path("state/ready"), &mut child);
    let machines = children(&child);
    assert_eq!(machines.len(), 1);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    assert!(!Path::new(&format!("/proc/{}", machines[0])).exists(), "the machine has ended");
    assert!(text(&output.stdout).contains(": 1 stopped, 1 not run"), "{}", text(&output.stdout));
    let cases = read_junit(&junit);
    let [first, second] = ["first", "second"].map(|name| &cases[&format!("tiny/busybox/{name}")][0]);
    assert!(first.starts_with("error:interrupted:the machine was ended by signal 15, as all were:"), "{first}");
    assert!(second.starts_with("skipped:"), "{second}");

    // Nobody is left behind by one that is killed.
    fs::remove_file(folder.path("state/ready")).unwrap();
    let mut child = folder.command(&["--filter", "first"]).spawn().unwrap();
    wait_for(&folder.path("state/ready"), &mut child);
    let machines = children(&child);
    child.kill().unwrap();
    child.wait().unwrap();
    let path = format!("/proc/{}", machines[0]);
    while Path::new(&path).exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn children(child: &Child) -> Vec<String> {
    let path = format!("/proc/{0}/task/{0}/children", child.id());
    fs::read_to_string(path).unwrap().split_whitespace().map(String::from).collect()
}

#[test]
fn a_run_tells_of_its_attempts() {
    let folder = Folder::new("");
    let run = |flags: &[&str], script: &str| {
        let mut command = Command::new(BANTAM);
        command.args(["run", "--kernel", "vmlinux", "--initrd", "initramfs.cpio", "--share", "state:/state"]);
        command.args(flags).args(["--", "sh", "-c", script]).current_dir(&folder.0);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let script =
        "printf '::set-output name=x::y'; test -e /state/mark || { touch /state/mark; poweroff -f; sleep 100; }";
    let output = run(&["--retry", "1", "--github", "--junit", "out.xml", "--report", "out.json"], script);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let why = "the guest halted all its vCPUs before the command had ended";
    assert_eq!(stderr, format!("bantam: attempt 1 of 2 failed, and another follows: {why}\n"));
    let lines: Vec<_> = stdout.lines().collect();
    let token = lines[1].strip_prefix("::stop-commands::").unwrap();
    let group =
        [&*format!("::stop-commands::{token}"), "::set-output name=x::y", &*format!("::{token}::"), "::endgroup::"];
    assert_eq!((lines[0].starts_with("::group::sh -c "), &lines[1..5]), (true, &group[..]), "{stdout}");
    assert!(lines[5].ends_with(" (attempt 2 of 2)"), "{stdout}");
    assert!(lines.last().unwrap().starts_with("::warning title=sh -c "), "{stdout}");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(folder.path("out.json")).unwrap()).unwrap();
    assert_eq!((&report["status"], &report["failure"]), (&0.into(), &serde_json::Value::Null));
    let earlier = &report["earlier-attempts"][0];
    assert_eq!(
        (&earlier["outcome"], &earlier["failure"], &earlier["cause"]),
        (&"halted".into(), &"lost-guest".into(), &why.into())
    );
    let cases = read_junit(&folder.path("out.xml"));
    let (name, words) = cases.first_key_value().unwrap();
    assert!(name.starts_with("vmlinux/sh -c "), "{name}");
    assert!(words[0].starts_with(&format!("flakyFailure:lost-guest:{why}:")), "{words:?}");
}

#[test]
fn mistakes_in_the_file_are_told_with_their_place() {
    let folder = Folder::new("");
    let command = "[[command]]\nname = 'a'\nrun = 'true'\n";
    for (file, words) in [
        ("", ":1: there is nothing to run"),
        ("x = [", ":1: "),
        ("\n[[comand]]\n", ":2: `comand` is no key of the file: did you mean `command`?"),
        ("[[command]]\nname = 'a'\nrum = 'x'", ":3: `rum` is no key of [[command]]: did you mean `run`?"),
        ("[[command]]\nname = 'a'", ":1: [[command]] has no `run`"),
        ("[[command]]\nrun = 'x'", ":1: [[command]] has no `name`"),
        ("[[command]]\nname = '../x'\nrun = 'x'", ":2: `../x` is no name"),
        (&format!("[[command]]\nname = '{}'\nrun = 'x'", "x".repeat(256)), "longer than 255 bytes"),
        (&format!("{command}\n{command}"), ":6: there are two by the name of `a`"),
        (&format!("{command}timeout = '5 minutes'"), ":4: invalid value '5 minutes' for '--timeout <TIME>'"),
        (&format!("{command}memory = true"), ":4: `memory` is a text, and not a boolean"),
        (&format!("{command}cpus = -1"), ":4: invalid value '-1' for '--cpus <N>'"),
        (&format!("{command}shares = ['nowhere:/x']"), ":4: cannot find nowhere: No such file or directory"),
        (&format!("{command}options = ['--no-rgn']"), ":4: `options`: unexpected argument '--no-rgn' found"),
        (&format!("{command}options = ['--report=x']"), ":4: `options`: --report cannot be one"),
        ("[[kernel]]\nname = 'k'\npath = './gone'", ":3: cannot find ./gone: No such file or directory"),
        ("[[kernel]]\nname = 'k'\npath = 'gone'", ":3: cannot load kernel gone: No such file or directory, and "),
        ("[[root]]\nname = 'r'", ":1: [[root]] has no `path`, and no `initrd`"),
        (&format!("{command}[[exclude]]\ncommand = 'b'"), ":5: there is no command `b`: did you mean `a`?"),
        (&format!("{command}[[exclude]]"), ":4: this names no `kernel`, `root` or `command`"),
        (&format!("{command}[[exclude]]\ncommand = 'a'"), ": everything is excluded"),
        (
            &format!("{command}memory = '1G'\noptions = ['--memory=2G']"),
            ": the argument '--memory <SIZE>' cannot be used multiple",
        ),
    ] {
        folder.refuses(file, words);
    }
    fs::write(folder.path("ci.toml"), command).unwrap();
    for (flags, words) in [
        (&["--filter", "b"][..], "no name has the text of --filter"),
        (&["--junit", "/"], "cannot write the JUnit file /: "),
        (&["--junit", folder.path("ci.toml").to_str().unwrap()], "it is where the tests are"),
        (&["--output", "/dev/null/x"], "cannot keep output in /dev/null/x: "),
        (&["--jobs", "0"], "invalid value '0' for '--jobs <N>'"),
    ] {
        let output = folder.test(flags);
        assert_eq!(output.status.code(), Some(125));
        assert!(text(&output.stderr).contains(words), "{words}: {}", text(&output.stderr));
    }
    let output = Command::new(BANTAM).args(["test", "no-such.toml"]).output().unwrap();
    assert!(text(&output.stderr).contains("cannot read the tests in no-such.toml: No such file"), "{output:?}");
    for (flags, words) in [
        (&["--retry", "1", "--net", "fd=7"][..], "cannot try again (--retry) with --net fd=7"),
        (&["--retry", "1", "-t"], "cannot be used with"),
        (&["--junit", "vmlinux"], "cannot write the JUnit file to vmlinux: it is the machine's kernel"),
    ] {
        let mut command = Command::new(BANTAM);
        let output = command.args(["run", "--kernel", "vmlinux"]).args(flags).current_dir(&folder.0).output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        assert!(text(&output.stderr).contains(words), "{words}: {}", text(&output.stderr));
    }
}

#[test]
fn cases_are_listed_in_the_order_of_the_file() {
    let file = r#"
[[kernel]]
name = "k2"
path = "vmlinux"
[[kernel]]
name = "k1"
path = "vmlinux"
[[root]]
name = "r"
path = "docker://127.0.0.1:1/app:1"
[[command]]
name = "b"
run = "true"
[[command]]
name = "a"
run = ["true"]
[[exclude]]
kernel = "k1"
[[include]]
kernel = "k1"
command = ["a"]
"#;
    let folder = Folder::new(file);
    assert_eq!(text(&folder.test(&["--list"]).stdout), "k2/r/b\nk2/r/a\nk1/r/a\n");
    assert_eq!(text(&folder.test(&["--list", "--filter", "k1", "--filter", "/b"]).stdout), "k2/r/b\nk1/r/a\n");
}
