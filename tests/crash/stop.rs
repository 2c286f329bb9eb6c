//! Disks whose host has no room, or takes them away: `errors=report` and `errors=stop`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::journal::{Journal, values};
use crate::support::{Guest, Kernel, file, noise, sha256};

const MIB: u64 = 1 << 20;

/// A file system with little room, which goes with this.
struct Small(TempDir);

impl Small {
    /// `None` where it cannot be had.
    fn new(size: u64) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let size = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).status();
        mount.unwrap().success().then_some(Small(folder))
    }

    /// A file of this size, without data.
    fn sparse(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

fn bantam(folder: &Path, words: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
    let output = command.args(words).env("XDG_RUNTIME_DIR", folder).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_host_without_room_is_told_to_the_guest_or_stops_the_machine() {
    let Some(small) = Small::new(6 * MIB) else { return eprintln!("SKIPPED: may not mount a tmpfs") };
    let filler = small.0.path().join("filler");
    fs::write(&filler, noise(4 << 20)).unwrap();
    let (told, stops) = (small.sparse("told", 8 * MIB), small.sparse("stops", 8 * MIB));
    let others = TempDir::new().unwrap();
    let [truncated, deleted] = ["truncated", "deleted"].map(|name| others.path().join(name));
    let content = noise(256 << 10);
    for path in [&truncated, &deleted] {
        fs::write(path, &content).unwrap();
    }

    let journal = fs::read(file("tools/journal")).unwrap();
    let script = "
        chmod +x /journal
        direct() { dd bs=4k status=none \"$@\"; }
        /journal 1 /dev/vda || true
        echo ready
        read line
        direct if=/dev/vdc iflag=direct of=/dev/null count=1 && echo first=read
        direct if=/dev/vdc iflag=direct of=/dev/null skip=8 || echo rest=failed
        direct if=/dev/zero of=/dev/vdd oflag=direct seek=63 count=1
        echo hash=$(direct if=/dev/vdd iflag=direct count=63 | sha256sum | cut -c -64)
        /journal 2 /dev/vdb 100
        echo went on
    ";
    let events = others.path().join("events");
    let mut guest = Guest::new(Kernel::Tiny).file("journal", &journal).script(script);
    guest = guest.disk(told.display()).disk(format!("{},errors=stop,engine=io_uring", stops.display()));
    guest = guest.disk(format!("{},errors=report,engine=io_uring", truncated.display())).disk(deleted.display());
    guest = guest.option("--name", "small").option("--events", events.display());
    guest.command().env("XDG_RUNTIME_DIR", others.path());
    let mut running = guest.spawn();
    running.wait_for("ready");
    File::options().write(true).open(&truncated).unwrap().set_len(8 << 10).unwrap();
    fs::remove_file(&deleted).unwrap();
    running.write("\n");

    // Whoever has it go on too early has it stop once more.
    let why = format!("cannot write disk image {}: No space left on device", stops.display());
    for times in 1..=2 {
        running.wait_for_errors(&why, times);
        let paused = || fs::read_to_string(&events).unwrap().matches("\"paused\"").count() == times;
        crate::eventually(paused);
        let machines: serde_json::Value = serde_json::from_str(&bantam(others.path(), &["ps", "--json"])).unwrap();
        assert_eq!(machines[0]["paused"], true);
        if times == 2 {
            fs::remove_file(&filler).unwrap();
        }
        bantam(others.path(), &["resume", "small"]);
    }
    running.wait_for("went on");
    let ended = running.wait().succeeded();

    assert_eq!((ended.value("first"), ended.value("rest")), ("read", "failed"));
    assert_eq!(ended.value("hash"), sha256(&content[..63 * 4096]));
    let failed: Vec<_> = values(&ended.stdout, "failed").collect();
    assert!(failed.len() == 1 && failed[0].starts_with("write ") && failed[0].ends_with("errno 5"), "{failed:?}");
    // The first of them was of the other disk.
    let numbers = || values(&ended.stdout, "record").map(|number| number.parse::<u64>().unwrap());
    let again = 1 + numbers().zip(numbers().skip(1)).position(|(one, next)| next < one).unwrap();
    Journal { seed: 1 }.check(&fs::read(&told).unwrap(), numbers().nth(again - 1));
    assert!(Journal { seed: 2 }.check(&fs::read(&stops).unwrap(), Some(99)) >= 100);
    let told = fs::read_to_string(&events).unwrap();
    let told: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_disk: Vec<_> = told.iter().filter(|line| line["event"] == "disk-error").collect();
    assert!(of_disk.len() == 2 && of_disk[0]["device"] == "blk1", "{told:?}");
    assert!(of_disk[0]["message"].as_str().unwrap().starts_with(&why), "{told:?}");
    assert_eq!((ended.counted("blk1", "errors"), fs::metadata(&truncated).unwrap().len()), (2, 8 << 10));
}
