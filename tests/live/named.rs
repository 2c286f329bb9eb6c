//! Machines by name: `bantam ps`, `stop`, `pause`, `resume`, `snapshot`, `metrics` and `console`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::support::{Guest, Kernel, Running};

/// Runs bantam where named machines have their sockets in `folder`.
fn bantam(folder: &Path, words: &[&str]) -> Output {
    command(folder, words).stdin(Stdio::null()).output().unwrap()
}

fn command(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
    command.args(words).env("XDG_RUNTIME_DIR", folder);
    command
}

fn says(folder: &Path, words: &[&str]) -> String {
    let output = bantam(folder, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn refuses(folder: &Path, words: &[&str], why: &str) {
    let output = bantam(folder, words);
    assert_eq!(output.status.code(), Some(125), "{words:?}: {output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(why), "{words:?}: {said}");
}

fn start(folder: &Path, name: &str) -> Running {
    let mut guest = Guest::new(Kernel::Tiny).script("echo ready; sh").option("--name", name);
    guest.command().env("XDG_RUNTIME_DIR", folder);
    let running = guest.spawn();
    running.wait_for("ready");
    running
}

#[test]
fn a_machine_with_a_folder_and_a_jail_has_a_name() {
    let [folder, shared] = [(); 2].map(|()| TempDir::new().unwrap());
    let folder = folder.path();
    let mut guest = Guest::new(Kernel::Tiny).script("mount -t virtiofs share0 /mnt; echo ready; cat >/mnt/typed");
    guest = guest.option("--name", "jailed").option("--share", format!("{}:/mnt", shared.path().display()));
    guest = guest.flag("--jail");
    guest.command().env("XDG_RUNTIME_DIR", folder);
    let mut running = guest.spawn();
    running.wait_for("ready");
    assert_eq!(says(folder, &["ps", "-q"]), "jailed\n");
    says(folder, &["pause", "jailed"]);
    assert!(says(folder, &["ps"]).contains("paused"));
    says(folder, &["resume", "jailed"]);
    running.write("a line\n");
    let typed = shared.path().join("typed");
    crate::eventually(|| fs::read_to_string(&typed).is_ok_and(|text| text == "a line\n"));
    assert!(says(folder, &["metrics", "jailed"]).contains("bantam_"));
    let saved = folder.join("saved");
    refuses(folder, &["snapshot", "jailed", saved.to_str().unwrap()], "cannot save");
    assert!(!saved.exists());
    says(folder, &["stop", "jailed"]);
    let ended = running.wait();
    assert_eq!(ended.report["outcome"], "stopped", "{}", ended.stderr);
    assert_eq!(says(folder, &["ps", "-q"]), "");
}

#[test]
fn a_named_machine_is_seen_paused_watched_and_stopped() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    assert_eq!(says(folder, &["ps", "-q"]), "");
    let running = start(folder, "one");
    assert_eq!(says(folder, &["ps", "-q"]), "one\n");
    let machines = || -> serde_json::Value { serde_json::from_str(&says(folder, &["ps", "--json"])).unwrap() };
    assert_eq!(machines()[0]["pid"].as_i64(), Some(running.pid().as_raw_nonzero().get().into()));
    assert!(says(folder, &["ps"]).contains("running"));
    refuses(folder, &["run", "--name", "one", "--kernel", "/dev/null"], "a machine of that name runs");

    says(folder, &["pause", "one"]);
    assert_eq!(machines()[0]["paused"], true);
    says(folder, &["resume", "one"]);
    assert_eq!(machines()[0]["paused"], false);
    let metrics = says(folder, &["metrics", "one"]);
    assert!(metrics.contains("\nbantam_vcpu_port_writes_total{device=\"vcpu0\"} "), "{metrics}");

    // Two watch; what one types both see, and so does where the console is.
    let console = || {
        let mut console = command(folder, &["console", "one"]);
        console.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let (mut typing, mut watching) = (console(), console());
    wait_for(watching.stdout.as_mut().unwrap(), "ready");
    let keys = typing.stdin.as_mut().unwrap();
    keys.write_all(b"echo sum=$((40 + 2))\n").unwrap();
    wait_for(typing.stdout.as_mut().unwrap(), "sum=42");
    wait_for(watching.stdout.as_mut().unwrap(), "sum=42");
    running.wait_for("sum=42");
    // Who leaves takes nobody along.
    typing.stdin.as_mut().unwrap().write_all(b"\x01x").unwrap();
    assert!(typing.wait().unwrap().success());

    says(folder, &["stop", "one"]);
    assert!(watching.wait().unwrap().success());
    let ended = running.wait();
    assert_eq!((ended.status, &ended.report["outcome"]), (0, &"stopped".into()));
    assert_eq!(says(folder, &["ps", "-q"]), "");
    assert_eq!(fs::read_dir(folder.join("bantam")).unwrap().count(), 0);
}

/// Reads until `text` was there; what was read.
fn wait_for(output: &mut impl Read, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        let mut bytes = [0; 256];
        let count = output.read(&mut bytes).unwrap();
        assert!(count > 0, "`{text}` was not seen: {seen}");
        seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    seen
}

/// Prints what it counts, as `count=N end`.
const COUNTER: &str = r#"i=0; while :; do i=$((i + 1)); echo "count=$i end"; done"#;

fn counts(printed: &str) -> Vec<u64> {
    let lines = printed.lines().filter_map(|line| line.trim().strip_prefix("count=")?.strip_suffix(" end"));
    lines.map(|count| count.parse().unwrap()).collect()
}

#[test]
fn a_named_machine_is_saved_and_restored() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    // The CPU is another one than the host's, which it goes on on nevertheless.
    let template = r#"{"cpu-template": {"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0,
        "modifiers": [{"register": "eax", "bitmap": "0b1101"}]}]}}"#;
    fs::write(folder.join("config.json"), template).unwrap();
    let guest = Guest::new(Kernel::Tiny).script(COUNTER).memory("128M").option("--name", "one");
    let mut guest = guest.option("--config", folder.join("config.json").display());
    guest.command().env("XDG_RUNTIME_DIR", folder);
    let running = guest.start();
    running.wait_for("count=5 end");
    refuses(folder, &["snapshot", "one", "/proc/saved"], "cannot save the machine: ");
    says(folder, &["pause", "one"]);
    refuses(folder, &["snapshot", "one", "/saved", "--diff"], "was not restored from the folder of a snapshot");
    // The folder is where the client is.
    let saved = command(folder, &["snapshot", "one", "saved"]).current_dir(folder).output().unwrap();
    assert!(saved.status.success(), "{saved:?}");
    says(folder, &["stop", "one"]);
    let before = running.wait().stdout;

    let mut printed = before;
    let mut restore = |from: &str, flag: &str, then: &dyn Fn()| {
        let mut restored = command(folder, &["restore", flag, "--name", "two"]);
        restored.arg("--events").arg(folder.join("events")).arg("--metrics").arg(folder.join("metrics"));
        let restored = restored.arg(folder.join(from)).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut restored = restored.stdout(Stdio::piped()).spawn().unwrap();
        let (output, last) = (restored.stdout.as_mut().unwrap(), counts(&printed).len() + 3);
        printed += &wait_for(output, &format!("count={last} end"));
        assert_eq!(says(folder, &["ps", "-q"]), "two\n");
        says(folder, &["pause", "two"]);
        then();
        says(folder, &["stop", "two"]);
        let restored = restored.wait_with_output().unwrap();
        assert!(restored.status.success(), "{restored:?}");
        printed += &String::from_utf8_lossy(&restored.stdout);
        // A line may have been half printed.
        let all = counts(&printed);
        assert!(all[0] == 1 && all.windows(2).all(|two| two[1] == two[0] + 1), "{all:?}");
        String::from_utf8_lossy(&restored.stderr).into_owned()
    };
    let saved = |name: &str| folder.join(name).display().to_string();
    assert_eq!(
        restore("saved", "--record", &|| drop(says(folder, &["snapshot", "two", &saved("later"), "--diff"]))),
        ""
    );
    let size = |name: &str| fs::metadata(folder.join(name).join("memory")).unwrap().blocks();
    assert!(size("later") < size("saved"));
    says(folder, &["merge", &saved("later"), &saved("whole")]);
    // What was used is read ahead, unless it is not understood.
    let used = fs::read_to_string(folder.join("saved/working-set")).unwrap();
    assert!(used.lines().count() > 10, "{used}");
    fs::write(folder.join("whole/working-set"), &used).unwrap();
    fs::remove_dir_all(folder.join("saved")).unwrap();
    refuses(folder, &["restore", &saved("later")], "saved/state of a snapshot");
    refuses(folder, &["merge", &saved("later"), &saved("again")], "saved/state of a snapshot");
    let told = restore("whole", "-v", &|| ());
    assert!(told.contains("working-set says: it is about another snapshot"), "{told}");
    // Both told of themselves.
    let told = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    for event in ["\"event\":\"started\"", "\"outcome\":\"stopped\""] {
        assert_eq!(told("events").matches(event).count(), 2, "{}", told("events"));
    }
    assert_eq!(told("metrics").lines().count(), 4, "{}", told("metrics"));
}

#[test]
fn a_guest_with_a_keyboard_is_asked_before_it_is_stopped() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    fs::write(folder.join("keyboard.json"), r#"{"keyboard": true}"#).unwrap();
    let script = "until grep -q 'Handlers=.*kbd' /proc/bus/input/devices; do :; done; echo ready; sleep 1000";
    let guest = Guest::new(Kernel::Debian61).script(script).option("--name", "one");
    let mut guest = guest.option("--config", folder.join("keyboard.json").display());
    guest.command().env("XDG_RUNTIME_DIR", folder);
    let running = guest.start();
    running.wait_for("ready");
    // It stands still, and goes on for that.
    says(folder, &["pause", "one"]);
    says(folder, &["stop", "one", "--time", "100s"]);
    // Nobody has told Linux to do something else.
    assert_eq!(running.wait().report["outcome"], "rebooted");
}

#[test]
fn what_is_no_machine_is_refused_and_what_is_dead_cleaned() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    for word in ["stop", "pause", "resume", "metrics", "console"] {
        refuses(folder, &[word, "nobody"], "no machine named nobody runs");
        refuses(folder, &[word, "../x"], "`../x` is no name for a machine");
    }
    refuses(folder, &["run", "--name", "a b", "--kernel", "/dev/null"], "`a b` is no name");
    refuses(folder, &["snapshot", "nobody", "saved"], "no machine named nobody runs");
    refuses(folder, &["stop", "x", "--time", "never"], "`never`");
    let sockets = folder.join("bantam");
    fs::DirBuilder::new().mode(0o700).create(&sockets).unwrap();
    drop(UnixListener::bind(sockets.join("dead")).unwrap());
    refuses(folder, &["pause", "dead"], "no machine named dead runs");
    assert_eq!(says(folder, &["ps", "-q"]), "");
    assert!(!sockets.join("dead").exists());
    // Somebody else could put a socket of his own there.
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o777)).unwrap();
    refuses(folder, &["ps"], "others may enter it");
    refuses(folder, &["run", "--name", "x", "--kernel", "/dev/null"], "others may enter it");
}
