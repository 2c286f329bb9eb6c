//! A save that is killed before any call that puts its files in place: there is the old snapshot, none, or the new one, and never
//! a state beside memory of another.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use bantam::devices::console::Console;
use bantam::machine::{Builder, Snapshot};
use bantam::outcome::Outcome;
use serde_json::json;
use tempfile::TempDir;

use crate::client::Api;
use crate::eventually;
use crate::support::payload;
use crate::support::screen::Screen;

/// A guest that has a letter in a register and in memory, and prints both for ever.
fn guest(letter: u8) -> Vec<u8> {
    // mov bl, letter; mov [0x200000], bl; mov dx, 0x3f8
    let begin = [0xb3, letter, 0x88, 0x1d, 0, 0, 0x20, 0, 0x66, 0xba, 0xf8, 0x03];
    // mov al, bl; out dx, al; mov al, [0x200000]; out dx, al; jmp to the first
    let print = [0x88, 0xd8, 0xee, 0xa0, 0, 0, 0x20, 0, 0xee, 0xeb, 0xf5];
    payload::elf(&[&begin[..], &print].concat())
}

const FILES: [&str; 2] = ["state", "memory"];

struct Lab(TempDir);

impl Lab {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Has a machine with this letter save itself, by a process that is killed before it makes `call` for the time of this number in
    /// one thread. Whether it was saved.
    fn save(&self, letter: u8, killed: Option<(&str, usize)>) -> bool {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), guest(letter)).unwrap();
        let config = json!({
            "boot-source": {"kernel_image_path": path("kernel")},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        });
        fs::write(path("config"), config.to_string()).unwrap();
        let bantam = env!("CARGO_BIN_EXE_bantam");
        let mut command = match killed {
            None => Command::new(bantam),
            Some((call, number)) => {
                let mut strace = Command::new("strace");
                // It is bantam that this process has for a child, and ends.
                strace.args(["-D", "-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
                strace.args(["-e", &format!("inject={call}:signal=KILL:when={number}"), bantam]);
                strace
            }
        };
        command.args(["api", "--sandbox", "off", "--api-sock", "api.sock", "--config-file", "config"]);
        command.current_dir(&folder).env_remove("LD_LIBRARY_PATH");
        let child = command.stdin(Stdio::null()).stdout(File::create(path("printed")).unwrap()).spawn().unwrap();
        let printed = path("printed");
        let mut api = Api { child, folder };
        eventually(|| fs::metadata(&printed).unwrap().len() >= 2);
        api.done("PATCH", "/vm", r#"{"state": "Paused"}"#);
        let body = json!({"snapshot_path": self.path("state"), "mem_file_path": self.path("memory")}).to_string();
        let mut stream = api.connect();
        write!(stream, "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = vec![];
        let mut part = [0; 1024];
        // Who is killed says nothing more.
        while !answer.ends_with(b"\r\n\r\n") {
            match stream.read(&mut part) {
                Ok(0) | Err(_) => break,
                Ok(count) => answer.extend_from_slice(&part[..count]),
            }
        }
        let is_saved = answer.starts_with(b"HTTP/1.1 204");
        if !is_saved {
            assert_eq!((api.wait(), answer.is_empty()), (None, true), "{}", String::from_utf8_lossy(&answer));
        }
        is_saved
    }

    /// The letters that the machine which was saved prints when it goes on, if there is one.
    fn letters(&self) -> Option<BTreeSet<char>> {
        let snapshot = match Snapshot::open_files(self.path("state"), self.path("memory")) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                assert!(!self.path("state").exists(), "{error}");
                return None;
            }
        };
        let screen = Screen::default();
        let mut machine = Builder::restore(snapshot).console(Console::to(screen.clone())).build().unwrap();
        let handle = machine.handle();
        let thread = thread::spawn(move || machine.run());
        let printed = screen.wait_until(|printed| printed.len() >= 8);
        handle.stop();
        assert_eq!(thread.join().unwrap().unwrap(), Outcome::Stopped);
        Some(printed.chars().collect())
    }
}

#[test]
fn a_save_that_is_killed_leaves_one_snapshot_or_none() {
    let old = Lab::new();
    assert!(old.save(b'A', None));
    let mut left = BTreeSet::new();
    for call in ["rename", "fsync", "unlink"] {
        let mut killed = 0;
        loop {
            let lab = Lab::new();
            for name in FILES {
                fs::copy(old.path(name), lab.path(name)).unwrap();
            }
            let is_saved = lab.save(b'B', Some((call, killed + 1)));
            let letters = lab.letters();
            assert!(letters.iter().all(|letters| letters.len() == 1), "{call} {killed}: {letters:?}");
            if is_saved {
                assert_eq!(letters, Some(['B'].into()), "{call} {killed}");
                break;
            }
            killed += 1;
            // What was left is in nobody's way.
            if letters.is_none() {
                assert!(lab.save(b'C', None));
                assert_eq!(lab.letters(), Some(['C'].into()), "{call} {killed}");
                let mut names: Vec<_> = fs::read_dir(&lab.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
                names.sort();
                assert_eq!(names, ["memory", "state"], "{call} {killed}");
            }
            left.insert(letters);
        }
        assert!(killed > 0, "{call} is not called");
    }
    let old_or_none_or_new = [None, Some(['A'].into()), Some(['B'].into())];
    assert_eq!(left, old_or_none_or_new.into());
}
