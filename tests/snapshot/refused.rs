//! What `bantam restore` says to what it cannot restore: each time with status 125, and nothing on standard output.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use bantam::snapshot::{self, BANTAM, FORMAT, Hex};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The state of a machine with one vCPU, which src/machine/snapshot.rs reads and writes, too.
const GOLDEN: &[u8] = include_bytes!("golden/state");

/// A folder with a snapshot, `saved`, and with what its machine has from the host.
struct Folder {
    folder: TempDir,
    state: Value,
}

impl Folder {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let body = GOLDEN.splitn(2, |byte| *byte == b'\n').nth(1).unwrap();
        let mut state: Value = serde_json::from_slice(body).unwrap();
        state["config"]["disks"][0]["path"] = json!(folder.path().join("disk"));
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(folder.path().join("saved")).unwrap();
        let folder = Self { folder, state };
        folder.sparse("disk", 16 << 20);
        folder.sparse("saved/memory", folder.memory());
        folder.put(&folder.state);
        folder
    }

    fn memory(&self) -> u64 {
        self.state["memory"].as_u64().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn sparse(&self, name: &str, len: u64) {
        let _ = fs::remove_file(self.path(name));
        File::create(self.path(name)).unwrap().set_len(len).unwrap();
    }

    fn put(&self, state: &Value) {
        self.write(&snapshot::encode(state).unwrap());
    }

    fn write(&self, state: &[u8]) {
        let _ = fs::remove_file(self.path("saved/state"));
        fs::write(self.path("saved/state"), state).unwrap();
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command.arg("restore").args(flags).args(["--serial", "none", "--timeout", "100ms"]);
        command.current_dir(&self.folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    #[track_caller]
    fn refuses(&self, flags: &[&str], words: &[&str]) {
        refused(&self.command(flags).output().unwrap(), words);
    }

    /// Refuses the snapshot with another value in its state.
    #[track_caller]
    fn refuses_with(&self, place: &str, value: Value, words: &[&str]) {
        let mut state = self.state.clone();
        *state.pointer_mut(place).unwrap() = value;
        self.put(&state);
        self.refuses(&["saved"], words);
        self.put(&self.state);
    }

    fn pipe(&self, name: &str) {
        let _ = fs::remove_file(self.path(name));
        mknodat(CWD, self.path(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    assert!(output.stdout.is_empty() && error.starts_with("bantam: ") && !error.contains("internal error"), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["none"], &["cannot read none/state of a snapshot", "No such file"]);
    folder.refuses(&["disk"], &["cannot read disk/state of a snapshot", "Not a directory"]);
    folder.refuses(&["."], &["cannot read ./state of a snapshot", "No such file"]);
    // What would be waited for, or read without end.
    folder.pipe("saved/state");
    folder.refuses(&["saved"], &["cannot read saved/state", "it is not a regular file"]);
    folder.sparse("saved/state", 65 << 20);
    folder.refuses(&["saved"], &["cannot read saved/state", "it has more than 64 MiB"]);
    fs::remove_file(folder.path("saved/state")).unwrap();
    symlink("/dev/zero", folder.path("saved/state")).unwrap();
    folder.refuses(&["saved"], &["cannot read saved/state", "it is not a regular file"]);
    fs::remove_file(folder.path("saved/state")).unwrap();
    fs::create_dir(folder.path("saved/state")).unwrap();
    folder.refuses(&["saved"], &["cannot read saved/state", "is a directory"]);
    fs::remove_dir(folder.path("saved/state")).unwrap();
    folder.write(b"of affairs");
    folder.refuses(&["saved"], &["saved/state", "it is no state of a bantam machine"]);

    folder.put(&folder.state);
    fs::set_permissions(folder.path("saved/state"), fs::Permissions::from_mode(0o000)).unwrap();
    let mut command = folder.command(&["saved"]);
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    refused(&command.output().unwrap(), &["cannot read saved/state", "Permission denied"]);
}

#[test]
fn a_state_of_another_version_or_cpu_is_refused() {
    let folder = Folder::new();
    let whole = fs::read(folder.path("saved/state")).unwrap();
    let line = whole.iter().position(|byte| *byte == b'\n').unwrap();
    let (line, rest) = (std::str::from_utf8(&whole[..line]).unwrap(), &whole[line..]);
    let refuses = |from: &str, to: &str, words: &[&str]| {
        let other = line.replacen(from, to, 1);
        assert_ne!(other, line);
        folder.write(&[other.as_bytes(), rest].concat());
        folder.refuses(&["saved"], words);
    };
    let (old, new) = (FORMAT - 1, FORMAT + 1);
    for other in [0, old, new] {
        let (from, to) = (format!("bantam-state {FORMAT} "), format!("bantam-state {other} "));
        refuses(&from, &to, &[&format!("it has version {other} of the format"), &format!("only version {FORMAT}")]);
    }
    let bantam = format!("it was made by bantam 99.1.2, and this is bantam {BANTAM}");
    refuses(BANTAM, "99.1.2", &[&bantam, "make it again"]);
    folder.refuses_with("/cpu/name", json!("A CPU 2000"), &["they ran on A CPU 2000, and this host has "]);
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let folder = Folder::new();
    let whole = fs::read(folder.path("saved/state")).unwrap();
    // The library's tests have every byte.
    for sample in 0..24 {
        let at = if sample < 12 { sample * 8 } else { whole.len() * (sample - 11) / 13 };
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        folder.write(&damaged);
        folder.refuses(&["saved"], &["saved/state"]);
        folder.write(&whole[..at]);
        folder.refuses(&["saved"], &["saved/state"]);
    }
    folder.write(&whole);
    let memory = folder.memory();
    for len in [0, memory - 4096, memory - 1, memory + 1, 2 * memory] {
        folder.sparse("saved/memory", len);
        folder.refuses(&["saved"], &["saved/memory", &format!("of {memory} bytes: it has {len}")]);
    }
    folder.pipe("saved/memory");
    folder.refuses(&["saved"], &["saved/memory", "it is not a regular file"]);
    fs::remove_file(folder.path("saved/memory")).unwrap();
    folder.refuses(&["saved"], &["cannot read saved/memory", "No such file"]);
}

#[test]
fn a_machine_that_cannot_be_is_refused() {
    let folder = Folder::new();
    folder.refuses_with("/config/cpus", json!(2), &["it has 1 vCPUs, and the machine is to have 2"]);
    folder.refuses_with("/config/memory", json!("1M"), &["1M of memory"]);
    folder.refuses(&["saved", "--disk", "vdz=disk"], &["cannot put the disk `vdz` elsewhere", "vda"]);
    folder.refuses(&["saved", "--net", "tap0", "--net", "tap1"], &["2 network cards"]);
    folder.refuses(&["saved", "--vsock", "cid=4,socket=s"], &["cannot put the socket device elsewhere"]);
    folder.refuses(&["saved", "--disk", "vda=none"], &["cannot open disk image none", "No such file"]);
    fs::remove_file(folder.path("disk")).unwrap();
    folder.refuses(&["saved"], &["cannot open disk image", "disk", "No such file"]);

    let base = |path: &str| json!({"path": path, "sha256": Hex(vec![0; 32]), "changed": [[0, 1]]});
    let path = folder.path("saved").display().to_string();
    folder.refuses_with("/base", base("/nowhere"), &["cannot read /nowhere/state", "No such file"]);
    folder.refuses_with("/base", base("/dev/null"), &["cannot read /dev/null/state", "Not a directory"]);
    folder.refuses_with("/base", base(&path), &["it has only what changed since", "which is another one now"]);
    folder.pipe("state");
    let path = folder.path("").display().to_string();
    folder.refuses_with("/base", base(&path), &["state of a snapshot", "it is not a regular file"]);
    let mut outside = base(&path);
    outside["changed"] = json!([[folder.memory() / 4096, 1]]);
    folder.refuses_with("/base", outside, &["the pages that have changed"]);
}
