//! Root file systems that are no disks.

use std::fs;
use std::process::Command;

use crate::roots::tree;
use crate::support::{Guest, Kernel};

fn guest(rootfs: &std::path::Path, cache: &std::path::Path, words: &[&str]) -> Guest {
    let mut guest = Guest::running(Kernel::Tiny.bzimage(), words).root(rootfs);
    guest.command().env("XDG_CACHE_HOME", cache);
    guest
}

#[test]
fn a_directory_and_an_archive_of_it_are_roots() {
    let (tree, cache) = (tree(), tempfile::tempdir().unwrap());
    let archive = cache.path().join("root.tar");
    assert!(
        Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(tree.path()).arg(".").status().unwrap().success()
    );
    let words = ["sh", "-c", "cat /data/file; echo new >/data/file; cat /data/file; mount; exit 3"];
    for root in [tree.path(), &archive, tree.path()] {
        let ended = guest(root, cache.path(), &words).run();
        ended.require(ended.status == 3 && ended.stdout.starts_with("from the image\nnew\n"), "it reads and writes");
    }
    assert_eq!(fs::read_to_string(tree.path().join("data/file")).unwrap(), "from the image\n");
}

#[test]
fn what_makes_no_sense_of_a_directory_is_refused() {
    let (tree, cache) = (tree(), tempfile::tempdir().unwrap());
    let ended = guest(tree.path(), cache.path(), &[]).run();
    ended.require(ended.status == 125 && ended.stderr.contains("it names no command"), "there is no command");
    let ended = guest(tree.path(), cache.path(), &[]).flag("--rw").run();
    ended.require(ended.status == 125 && ended.stderr.contains("it names no command"), "there is no command");
    let archive = cache.path().join("root.tar");
    fs::write(&archive, [0; 1024]).unwrap();
    let ended = guest(&archive, cache.path(), &["true"]).flag("--rw").run();
    ended.require(
        ended.status == 125 && ended.stderr.contains("(--overlay FILE keeps changes)"),
        "it cannot be written",
    );
}

#[test]
fn a_shared_folder_is_where_it_was_asked_for() {
    let (tree, shared, cache) = (tree(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(shared.path().join("in"), "from the host\n").unwrap();
    let words = ["sh", "-c", "cat /src/in; echo from the guest >/src/out; cat /ro/in; echo >/ro/x"];
    let ended = guest(tree.path(), cache.path(), &words)
        .option("--share", format!("{}:/src", shared.path().display()))
        .option("--share", format!("{}:/ro:ro", shared.path().display()))
        .run();
    ended.require(ended.status != 0 && ended.stdout == "from the host\nfrom the host\n", "it is read");
    assert_eq!(fs::read_to_string(shared.path().join("out")).unwrap(), "from the guest\n");
    assert!(!shared.path().join("x").exists());
}
