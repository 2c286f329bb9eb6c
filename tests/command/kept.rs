//! Root file systems whose changes are kept: folders that are written to, and overlays in a file.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::roots::{Root, tree};
use crate::support::{Ended, Guest, Kernel};

fn shell(kernel: Kernel, root: &Path, script: &str) -> Guest {
    let mut guest = Guest::running(kernel.bzimage(), &["sh", "-c", script]).root(root);
    let cache = guest.folder().to_owned();
    guest.command().env("XDG_CACHE_HOME", cache);
    guest
}

fn kept(root: &Path, file: &Path, script: &str) -> Guest {
    shell(Kernel::Tiny, root, script).option("--overlay", format!("{},size=64M", file.display()))
}

#[track_caller]
fn require_refused(ended: &Ended, why: &str) {
    ended.require(ended.status == 125 && ended.stderr.contains(why), why);
}

#[track_caller]
fn require_clean(image: &Path) {
    let check = Command::new("e2fsck").arg("-fn").arg(image).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
}

#[test]
fn a_folder_is_the_root_and_is_written() {
    let tree = tree();
    fs::create_dir(tree.path().join("private")).unwrap();
    fs::set_permissions(tree.path().join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(tree.path().join("private/file"), "").unwrap();
    for path in ["private", "private/file"] {
        chown(tree.path().join(path), Some(4321), Some(4321)).unwrap();
    }
    let script = "mount; cat /private/file; cat /data/file; echo new >/data/file; mkdir -p /made/here; echo x >/tmp/x; \
                  chown 1000:100 /made; id -u >/made/user; ln -s file /data/link; exit 4";
    for (kernel, before, flags) in [
        (Kernel::Tiny, "from the image\n", ["--rw", "--sandbox=on"]),
        (Kernel::Debian61, "new\n", ["--rw", "--sandbox=on"]),
        (Kernel::Tiny, "new\n", ["--rw", "--jail"]),
    ] {
        let ended = flags.into_iter().fold(shell(kernel, tree.path(), script), Guest::flag).run();
        ended.require(ended.status == 4 && ended.stdout.contains("root on / type virtiofs (rw"), "it is the root");
        ended.require(ended.stdout.ends_with(before), "it is read");
        fs::remove_file(tree.path().join("data/link")).unwrap();
    }
    assert_eq!(fs::read_to_string(tree.path().join("data/file")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(tree.path().join("made/user")).unwrap(), "0\n");
    let made = fs::metadata(tree.path().join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1000, 100), "the host of the tests is root");
    assert!(tree.path().join("proc").is_dir() && fs::read_dir(tree.path().join("tmp")).unwrap().count() == 0);
}

#[test]
fn changes_are_kept_for_the_next_run() {
    let (root, folder) = (Root::new(), TempDir::new().unwrap());
    let file = folder.path().join("changes");
    let before = fs::read(root.image()).unwrap();
    let script = "cat /data/file; echo new >/data/file; mkdir /made; id -u >/made/user; rm /etc/group; exit 4";
    let ended = kept(&root.image(), &file, script).run();
    ended.require(ended.status == 4 && ended.stdout == "from the image\n", "the first run");
    require_clean(&file);
    assert!(fs::metadata(&file).unwrap().blocks() * 512 < 32 << 20, "it is sparse");
    let script = "cat /data/file /made/user; ls /etc; touch /dev/vda";
    let ended = kept(&root.image(), &file, script).run();
    ended.require(ended.status == 0 && ended.stdout == "new\n0\npasswd\n", "the second run sees it");
    assert!(fs::read(root.image()).unwrap() == before, "the image has changed");

    // Of a directory, which is the same whatever is in it, and with another kernel.
    let (tree, file) = (tree(), folder.path().join("of-directory"));
    let ended = kept(tree.path(), &file, "echo new >/data/file; echo >/data/more").run();
    ended.require(ended.status == 0, "the first run");
    fs::write(tree.path().join("data/later"), "later\n").unwrap();
    let guest = shell(Kernel::Debian61, tree.path(), "cat /data/file /data/later");
    let ended = guest.option("--overlay", file.display()).run();
    ended.require(ended.status == 0 && ended.stdout == "new\nlater\n", "the second run sees both");
    require_clean(&file);
}

#[test]
fn what_was_synced_survives_a_killed_machine() {
    let (root, folder) = (Root::new(), TempDir::new().unwrap());
    let file = folder.path().join("changes");
    let script = "echo synced >/synced; sync /synced; sync /; echo lost >/lost; echo done; cat";
    let running = kept(&root.image(), &file, script).spawn();
    running.wait_for("done");

    // It is locked meanwhile.
    require_refused(&kept(&root.image(), &file, "").run(), "is being written by another machine");
    running.signal(Signal::KILL);
    assert_eq!(running.wait().status, 137);
    let ended = kept(&root.image(), &file, "cat /synced").run();
    ended.require(ended.status == 0 && ended.stdout == "synced\n", "it is there");
    require_clean(&file);
}

#[test]
fn an_overlay_that_makes_no_sense_is_refused() {
    let (root, other, folder) = (Root::new(), tree(), TempDir::new().unwrap());
    let file = folder.path().join("changes");
    let run = |root: &Path, option: &str| shell(Kernel::Tiny, root, "true").option("--overlay", option).run();
    let plain = file.to_str().unwrap();
    require_refused(&run(&root.image(), &format!("{plain},size=1M")), "it takes at least 64M");
    assert!(!file.exists());
    let without = kept(&root.image(), &file, "true").run();
    assert_eq!(without.status, 0);
    require_refused(&run(other.path(), plain), "has those of another root file system");
    require_refused(&run(&root.image(), &format!("{plain},size=1G")), "was made with 67108864 bytes");
    require_refused(&run(&root.image(), root.image().to_str().unwrap()), "was not made for that by bantam");
    require_refused(&run(&root.image(), "/nowhere/changes"), "cannot make /nowhere/changes to keep changes in");

    let writable = shell(Kernel::Tiny, &root.image(), "true").flag("--rw").option("--overlay", plain);
    require_refused(&writable.run(), "cannot be used with");
}
