//! Commands in guests that were saved when they were ready for one.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::roots::Root;
use crate::support::{Ended, Guest, Kernel};

/// A root file system, and a cache for its snapshots.
struct Lab {
    root: Root,
    cache: TempDir,
    kernel: Kernel,
}

impl Lab {
    fn new(kernel: Kernel) -> Self {
        Self { root: Root::new(), cache: TempDir::new().unwrap(), kernel }
    }

    fn guest(&self, words: &[&str]) -> Guest {
        self.guest_of(self.kernel.vmlinux(), self.root.image(), words)
    }

    fn guest_of(&self, kernel: PathBuf, root: PathBuf, words: &[&str]) -> Guest {
        let mut guest = Guest::running(kernel, words).root(&root);
        guest.command().env("XDG_CACHE_HOME", self.cache.path());
        guest.option("--warm", "key")
    }

    fn shell(&self, script: &str) -> Guest {
        self.guest(&["sh", "-c", script])
    }

    fn folder(&self) -> PathBuf {
        self.cache.path().join("bantam/warm")
    }

    /// A file of the snapshot.
    fn file(&self, name: &str) -> PathBuf {
        self.folder().join("key").join(name)
    }

    /// What there is but for the snapshot.
    fn others(&self) -> usize {
        fs::read_dir(self.folder()).unwrap().filter(|entry| entry.as_ref().unwrap().file_name() != "key").count()
    }

    /// Runs `bantam warm`.
    fn warm(&self, arguments: &[&str]) -> (bool, String) {
        let mut bantam = Command::new(env!("CARGO_BIN_EXE_bantam"));
        let output = bantam.arg("warm").args(arguments).env("XDG_CACHE_HOME", self.cache.path()).output().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    }
}

#[track_caller]
fn require_warm(ended: &Ended) {
    ended.require(ended.report["warm"]["start"] == "warm", &format!("{}", ended.report["warm"]));
    ended.require(ended.report["warm"].get("why").is_none() && !ended.stderr.contains("warm"), "nothing is said");
}

/// It was booted, for this reason, and said so in one line if that is not that there was no snapshot.
#[track_caller]
fn require_cold(ended: &Ended, why: &str) {
    let warm = &ended.report["warm"];
    ended.require(warm["start"] == "cold" && warm["why"].as_str().unwrap().contains(why), &format!("{why}: {warm}"));
    let said = ended.stderr.lines().filter(|line| line.contains("so the guest boots: ") && line.contains(why)).count();
    ended.require(said == usize::from(why != NOTHING) && ended.stderr.lines().count() == said, "what is said");
}

const NOTHING: &str = "there is no snapshot yet";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

const ASK: &str = "read up idle </proc/uptime; echo up=$up; echo now=$(busybox date +%s)
    echo random=$(head -c 16 /dev/urandom | busybox od -An -tx1 | busybox tr -d ' ')";

#[test]
fn a_second_run_begins_where_the_first_was_ready() {
    for kernel in [Kernel::Tiny, Kernel::Debian61] {
        let lab = Lab::new(kernel);
        let first = lab.shell(&format!("{ASK}; touch /made; exit 3")).option("-e", "SECRET=hidden-in-env").run();
        first.require(first.status == 3 && first.stderr.is_empty(), "it boots, and says no more");
        require_cold(&first, NOTHING);
        assert_eq!(lab.others(), 0);
        let about: serde_json::Value = serde_json::from_slice(&fs::read(lab.file("about.json")).unwrap()).unwrap();
        let (modules, has_some) = (about["modules"].to_string(), matches!(kernel, Kernel::Debian61));
        first.require(modules.contains("lib/modules/") && modules.contains("virtio_blk") == has_some, &modules);
        let mode = |name: &str| fs::metadata(lab.file(name)).unwrap().mode() & 0o777;
        assert_eq!([mode(""), mode("snapshot"), mode("snapshot/memory")], [0o700, 0o700, 0o600]);
        // An emulated host's clocks are not right to the second.
        let behind = now().abs_diff(first.number("now"));
        assert!(behind < 60);

        let script = format!("{ASK}; pwd; hostname; id -un; echo $A; ls /made; cat; ifconfig lo | head -1; exit 4");
        let guest = lab.shell(&script).option("--workdir", "/data").option("--hostname", "box").option("--user", "me");
        let mut second = guest.option("-e", "A=b c").option("--timeout", "100s").option("--pids", "30").spawn();
        second.write("typed\n");
        drop(second.stdin().take());
        let second = second.wait();
        second.require(second.status == 4, "it has its own status");
        require_warm(&second);
        second.require(second.stdout.contains("\n/data\nbox\nme\nb c\ntyped\nlo "), "it has all that is its own");
        second.require(second.stderr.contains("/made: No such file"), "it has nothing of the first");
        let took = second.report["durations"]["end"].as_f64().unwrap() / 1000.0;
        assert!(second.value("up").parse::<f64>().unwrap() > took, "its guest is older than it");
        second.require(second.number("now").abs_diff(now()) <= behind + 3, "the guest's clock is right");
        assert!(second.report["limits"]["pids"].is_string());

        // And once more: it is the same snapshot, and other random numbers.
        let third = lab.shell(ASK).run();
        require_warm(&third);
        let mut randoms = [&first, &second, &third].map(|ended| ended.value("random"));
        randoms.sort_unstable();
        assert!(randoms[0].len() == 32 && randoms[0] != randoms[1] && randoms[1] != randoms[2], "{randoms:?}");
        let command = |ended: &Ended| ended.report["durations"]["command"].as_f64().unwrap();
        eprintln!(
            "{kernel:?}: {} ms to the command, warm {} and {}",
            command(&first),
            command(&second),
            command(&third)
        );

        // Nothing of the first one's command is kept.
        let state = [fs::read(lab.file("snapshot/state")).unwrap(), fs::read(lab.file("about.json")).unwrap()].concat();
        assert!(memchr::memmem::find(&state, b"hidden-in-env").is_none());
        let memory = fs::read(lab.file("snapshot/memory")).unwrap();
        assert!(memchr::memmem::find(&memory, b"hidden-in-env").is_none());
    }
}

#[test]
fn what_does_not_fit_is_told_and_made_anew() {
    let lab = Lab::new(Kernel::Tiny);
    require_cold(&lab.shell("exit 1").run(), NOTHING);
    let check = |guest: Guest, why: &str| {
        let ended = guest.run();
        ended.require(ended.status == 7, "the command runs in any case");
        require_cold(&ended, why);
        assert_eq!(lab.others(), 0);
    };
    let run = || lab.shell("exit 7");
    check(run().memory("192M"), "its machine has memory 256M, and this one 192M");
    require_warm(&run().memory("192M").run());

    // Each is replaced by one that can be used.
    let state = lab.file("snapshot/state");
    let bytes = fs::read(&state).unwrap();
    fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    check(run().memory("192M"), "it is damaged: it has");
    File::options().write(true).open(lab.file("snapshot/memory")).unwrap().set_len(4096).unwrap();
    check(run().memory("192M"), "it has 4096");
    File::options().write(true).open(lab.file("snapshot/memory")).unwrap().write_all_at(&[1], 1 << 20).unwrap();
    check(run().memory("192M"), "it has changed since it was made");
    require_warm(&run().memory("192M").run());

    // Memory that is no guest's, which nobody sees.
    let memory = File::options().write(true).open(lab.file("snapshot/memory")).unwrap();
    memory.set_len(0).unwrap();
    memory.set_len(192 << 20).unwrap();
    let it = memory.metadata().unwrap();
    let stamp = [it.ino() as i64, it.size() as i64, it.mtime(), it.mtime_nsec(), it.ctime(), it.ctime_nsec()];
    let mut about: serde_json::Value = serde_json::from_slice(&fs::read(lab.file("about.json")).unwrap()).unwrap();
    about["memory"] = serde_json::json!(stamp);
    fs::write(lab.file("about.json"), about.to_string()).unwrap();
    let mut running = lab.shell("cat; exit 7").memory("192M").spawn();
    running.write("input");
    drop(running.stdin().take());
    let ended = running.wait();
    ended.require(ended.status == 7 && ended.stdout == "input", "it boots, and has all of its input");
    // The guest's devices have something to say, too.
    ended.require(ended.stderr.contains("so the guest boots: its command had not begun when the guest "), "it says so");
    assert_eq!((&ended.report["warm"]["start"], lab.others()), (&"cold".into(), 0));

    // A vCPU that waits to be started, in vain.
    let change = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut other: serde_json::Value = bantam::snapshot::decode(&fs::read(&state).unwrap()).unwrap();
        change(&mut other);
        fs::write(&state, bantam::snapshot::encode(&other).unwrap()).unwrap();
    };
    change(&|state| state["vcpus"][0]["mp-state"] = 1.into());
    check(run().memory("192M"), "its command had not begun after 30s");

    // Another CPU, with a right checksum.
    change(&|state| state["cpu"]["name"] = "Another CPU".into());
    check(run().memory("192M"), "they ran on Another CPU, and this host has ");

    // Another kernel, and another root file system.
    let other_kernel = lab.guest_of(Kernel::Tiny.bzimage(), lab.root.image(), &["sh", "-c", "exit 7"]);
    check(other_kernel.memory("192M"), "its machine has kernel ");
    let other_root = lab.cache.path().join("other.img");
    fs::copy(lab.root.image(), &other_root).unwrap();
    check(
        lab.guest_of(Kernel::Tiny.bzimage(), other_root, &["sh", "-c", "exit 7"]).memory("192M"),
        "its machine has rootfs ",
    );
    check(run().memory("192M"), "its machine has kernel ");

    // Another root file system at the same path.
    File::options().write(true).open(lab.root.image()).unwrap().write_all_at(&[0], 0).unwrap();
    check(run().memory("192M"), "root.img has changed since it was made");

    let (_, list) = lab.warm(&["ls"]);
    assert!(list.contains("key ") && list.contains("root.img"), "{list}");
    assert!(lab.warm(&["rm", "key"]).0);
    assert_eq!(fs::read_dir(lab.folder()).unwrap().count(), 0);
    let (done, said) = lab.warm(&["rm", "key"]);
    assert!(!done && said.contains("there is no warm snapshot `key`"), "{said}");
}

#[test]
fn runs_at_once_and_killed_ones_leave_nothing_that_is_in_the_way() {
    let lab = Lab::new(Kernel::Tiny);
    // One makes it, and the others do not wait for that.
    let first = lab.shell("echo begun; cat").spawn();
    let second = lab.shell("echo begun; cat").spawn();
    first.wait_for("begun");
    second.wait_for("begun");
    // Nor for its end.
    while !lab.file("about.json").exists() {
        std::thread::yield_now();
    }
    let warm = [(); 2].map(|()| lab.shell("echo begun; cat").spawn());
    warm.iter().for_each(|running| running.wait_for("begun"));
    for mut running in warm.into_iter().chain([first, second]) {
        running.write("end");
        drop(running.stdin().take());
        let ended = running.wait();
        ended.require(ended.stdout == "begun\nend" && ended.status == 0 && ended.stderr.is_empty(), "it did");
    }
    assert_eq!(lab.others(), 0);

    // Killed when it has just begun to make one.
    assert!(lab.warm(&["rm", "key"]).0);
    let running = lab.shell("exit 7").spawn();
    while lab.others() == 0 {
        std::thread::yield_now();
    }
    running.signal(Signal::KILL);
    assert_eq!(running.wait().status, 137);
    assert_eq!(lab.others(), 1);
    require_cold(&lab.shell("exit 7").run(), NOTHING);
    assert_eq!(lab.others(), 0);
    let ended = lab.guest(&["no-such-program"]).flag("--github").run();
    ended.require(ended.status == 127, "there is no such program");
    require_warm(&lab.shell("exit 7").run());
}
