//! The command's root file system, and what it finds in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::support::{Guest, Kernel};

/// An image with a root file system, which goes with this.
pub struct Root {
    folder: TempDir,
}

impl Root {
    /// One with busybox, a user and a file.
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        make(&folder.path().join("root.img"));
        Self { folder }
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("root.img")
    }
}

/// A folder with it.
pub fn tree() -> TempDir {
    let tree = TempDir::new().unwrap();
    let busybox = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/busybox/busybox");
    for name in ["bin", "etc", "data"] {
        fs::create_dir(tree.path().join(name)).unwrap();
    }
    fs::copy(busybox, tree.path().join("bin/busybox")).unwrap();
    let applets = "sh cat echo id mount hostname pwd ls touch ifconfig env sync mkdir chown ln rm head".split(' ');
    applets.for_each(|name| std::os::unix::fs::symlink("busybox", tree.path().join("bin").join(name)).unwrap());
    fs::write(tree.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nme:x:1000:100::/home/me:/bin/sh\n").unwrap();
    fs::write(tree.path().join("etc/group"), "users:x:100:\naudio:x:29:me\n").unwrap();
    fs::write(tree.path().join("data/file"), "from the image\n").unwrap();
    tree
}

fn make(image: &Path) {
    let tree = tree();
    fs::File::create(image).unwrap().set_len(32 << 20).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    let made = mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(tree.path()).arg(image).status().unwrap();
    assert!(made.success(), "{mke2fs:?}");
}

fn shell(root: &Root, script: &str) -> Guest {
    Guest::running(Kernel::Tiny.bzimage(), &["sh", "-c", script]).root(&root.image())
}

#[test]
fn the_image_stays_as_it_is_and_the_command_may_write() {
    let root = Root::new();
    let before = fs::read(root.image()).unwrap();
    let script = "cat /data/file; echo new >/data/file; touch /x; cat /data/file; echo >/dev/vda";
    let ended = shell(&root, script).run();
    ended.require(ended.stdout == "from the image\nnew\n", "it reads and writes");
    ended.require(ended.status != 0 && ended.stderr.contains("not permitted"), "the disk itself cannot be written");
    assert!(fs::read(root.image()).unwrap() == before, "the image has changed");
}

#[test]
fn with_rw_the_image_is_written_and_clean() {
    let root = Root::new();
    let ended = shell(&root, "echo new >/data/file").flag("--rw").run();
    ended.require(ended.status == 0, "expected status 0");
    let check = Command::new("e2fsck").arg("-fn").arg(root.image()).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let content = Command::new("debugfs").args(["-R", "cat /data/file"]).arg(root.image()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&content.stdout), "new\n");
}

#[test]
fn the_environment_is_what_was_asked_for() {
    let root = Root::new();
    let script = "id -u; id -g; id -G; pwd; hostname; echo $A-$B-$HOME; echo $PATH; ifconfig lo; \
                  ls -d /proc/self /sys/class /dev/null /dev/pts/ptmx; \
                  echo x >/tmp/x && echo x >/dev/shm/x && echo tmp; echo out >/dev/stdout";
    let guest = shell(&root, script);
    let guest = guest.option("--user", "me").option("--workdir", "/made/here").option("--hostname", "box");
    let ended = guest.option("-e", "A=1").option("-e", "B=a b").option("-e", "A=2").run();
    ended.require(ended.status == 0, "expected status 0");
    let lines: Vec<_> = ended.stdout.lines().collect();
    assert_eq!(lines[..6], ["1000", "100", "100 29", "/made/here", "box", "2-a b-/home/me"]);
    assert_eq!(lines[6], "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    ended.require(ended.stdout.contains("127.0.0.1") || ended.stdout.contains("UP LOOPBACK"), "lo is up");
    for expected in ["/proc/self", "/sys/class", "/dev/null", "/dev/pts/ptmx", "tmp", "out"] {
        ended.require(lines.contains(&expected), expected);
    }
}

#[test]
fn what_is_no_root_is_refused_before_the_guest_runs() {
    let root = Root::new();
    fs::write(root.image(), [0; 4096]).unwrap();
    let ended = shell(&root, "").run();
    ended.require(ended.status == 125 && ended.stderr.contains("no disk image with a file system"), "it is refused");
}
