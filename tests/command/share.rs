//! Shared folders as file systems: pjdfstest, fsx, and what a shell cannot check.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Duration;

use tempfile::TempDir;

use crate::shell;
use crate::support::{Ended, file};

/// Runs a script of the guest, with the folder on /mnt and the programs that the host has for it on /tools.
fn run(folder: &TempDir, script: &str) -> Ended {
    let guest = shell(&format!("set -e; {script}")).memory("512M");
    let guest = guest.option("--share", format!("{}:/mnt", folder.path().display()));
    let guest = guest.option("--share", format!("{}:/tools:ro", file("tools").display()));
    let guest = guest.option("--share", format!("{}:/again:ro", folder.path().display()));
    // Hundreds of tests that each wait for the clock.
    guest.limit(Duration::from_secs(400)).run()
}

/// Accounts for pjdfstest, and what Linux has beyond its default.
const SETTINGS: &str = "
    mkdir -p /etc
    printf '%s:x:%s:%s::/:/bin/sh\\n' root 0 0 nobody 65534 65534 tests 1001 1001 >/etc/passwd
    printf '%s:x:%s:\\n' root 0 nobody 65534 tests 1001 >/etc/group
    cat >/settings <<END
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
[dummy_auth]
entries = [['nobody', 'nobody'], ['tests', 'tests']]
END
";

#[test]
fn a_share_is_a_posix_file_system() {
    let folder = TempDir::new().unwrap();
    let script = "mkdir -m 777 /mnt/posix; /tools/pjdfstest -c /settings -p /mnt/posix || true";
    let ended = run(&folder, &format!("{SETTINGS}\n{script}"));
    let failed: Vec<_> = ended.stdout.lines().filter(|line| line.ends_with("FAILED")).collect();
    // No devices can be made.
    let others: Vec<_> = failed.iter().filter(|line| !line.contains("::block ") && !line.contains("::char ")).collect();
    ended.require(others.is_empty(), &format!("{others:#?}"));
    let passed = ended.stdout.lines().filter(|line| line.ends_with(" ok")).count();
    ended.require(ended.status == 0 && passed > 280, &format!("{passed} passed"));
}

#[test]
fn data_attributes_and_locks_of_a_share_are_right() {
    // Memory may have no extended attributes; of a disk, the emulated host has one there.
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let attributes = rustix::fs::setxattr(folder.path(), "user.test", b"", rustix::fs::XattrFlags::empty()).is_ok();
    if !attributes {
        // Not by eprintln, which is shown only of tests that fail.
        let _ = writeln!(io::stderr(), "SKIPPED attributes: the file system of {} has none", folder.path().display());
    }
    // From then on nothing but the host keeps the guest from writing to the second mount of it.
    let checks = if attributes {
        "/tools/files /mnt/checked attributes; mount -o remount,rw /again; /tools/files /again/checked read-only"
    } else {
        "/tools/files /mnt/checked"
    };
    // To make them in the guest takes minutes in an emulated host.
    fs::create_dir(folder.path().join("many")).unwrap();
    (0..10_000).for_each(|number| fs::write(folder.path().join(format!("many/file-{number}")), "").unwrap());
    let script = "mkdir /mnt/checked; /tools/fsx -q -N 1000 -S 7 /mnt/data; ls /mnt/many | sort -u | wc -l";
    let ended = run(&folder, &format!("{script}; {checks}"));
    let said: Vec<_> = ended.stdout.lines().collect();
    let expected = ["All operations completed A-OK!", "10000", "all is as it has to be"];
    ended.require(ended.status == 0 && said == expected, "it is not right");
    if attributes {
        let mut value = [0; 2];
        let length = rustix::fs::getxattr(folder.path().join("checked/folder"), "user.folder", &mut value).unwrap();
        assert_eq!(&value[..length], b"x");
    }
    let path = |name: &str| folder.path().join("checked").join(name);
    assert_eq!(fs::metadata(path("times")).unwrap().mtime_nsec(), 999_999_999);
    assert_eq!(fs::read(path("mapped")).unwrap()[4096], b's');
    assert!(fs::metadata(path("sparse")).unwrap().blocks() < 2048);
}

#[test]
fn nothing_outside_a_share_is_reached() {
    let (folder, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(outside.path().join("secret"), "of the host\n").unwrap();
    symlink(outside.path(), folder.path().join("absolute")).unwrap();
    let up = format!("../{}", outside.path().file_name().unwrap().to_str().unwrap());
    symlink(&up, folder.path().join("relative")).unwrap();
    fs::create_dir(folder.path().join("below")).unwrap();
    let script = format!(
        "cd /mnt
        for link in absolute relative below/../../mnt/relative; do
            if cat $link/secret || echo x >$link/made; then exit 1; fi
        done
        if cat /mnt/{up}/secret; then exit 1; fi
        ln -s {up} mine
        if cat mine/secret; then exit 1; fi
        mv below moved && cd moved/.. && test -d moved
        readlink relative"
    );
    let ended = run(&folder, &script);
    ended.require(ended.status == 0 && ended.stdout == format!("{up}\n"), "links are the guest's");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}
