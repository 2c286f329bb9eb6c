//! Root file systems that are no disks.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::docker_registry::Registry;
use crate::roots::tree;
use crate::support::{Guest, Kernel, file};

fn guest(rootfs: &Path, cache: &Path, words: &[&str]) -> Guest {
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

/// Runs a program in `folder`; it has to succeed.
fn program(folder: &Path, line: &str) {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).current_dir(folder).output();
    let output = output.unwrap_or_else(|error| panic!("{line} (resources/setup.sh test installs it): {error}"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_image_of_a_layout_or_a_registry_runs_as_it_says() {
    let (tree, folder) = (tree(), tempfile::tempdir().unwrap());
    fs::write(tree.path().join("start"), "#!/bin/sh\necho $0 $@, $A-$B, $(id -u):$(id -g), $(pwd); exit 3\n").unwrap();
    program(tree.path(), "chmod 755 start");
    let path = folder.path();
    program(path, "umoci init --layout layout");
    program(path, "umoci new --image layout:v1");
    program(path, &format!("umoci insert --rootless --image layout:v1 {} /", tree.path().display()));
    let says = "--config.entrypoint=/start --config.cmd=one --config.cmd=two --config.env=A=1 --config.env=B=2";
    program(path, &format!("umoci config --image layout:v1 {says} --config.user=me --config.workingdir=/work"));
    let run = |root: &str, words: &[&str]| guest(Path::new(root), path, words);
    let layout = format!("oci:{}:v1", path.join("layout").display());
    let ended = run(&layout, &[]).run();
    ended.require(ended.status == 3 && ended.stdout == "/start one two, 1-2, 1000:100, /work\n", "as the image says");

    let registry = Registry::start(path);
    let reference = format!("docker://{}/team/app:1", registry.address);
    program(path, &format!("skopeo copy -q --insecure-policy --dest-tls-verify=false oci:layout:v1 {reference}"));
    program(path, "rm -r bantam");
    let guest = run(&reference, &["three"]).option("-e", "B=3").option("--user", "0").option("--workdir", "/");
    let ended = guest.option("--overlay", path.join("changes").display()).run();
    ended.require(ended.status == 3 && ended.stdout == "/start three, 1-3, 0:0, /\n", "as it was asked for");
    // Without the registry, and in another guise: it is the same image.
    drop(registry);
    let ended = run(&layout, &[]).option("--overlay", path.join("changes").display()).run();
    ended.require(ended.status == 3, "the image is in the cache, and its changes are its own");
}

#[test]
fn debian_installs_a_package() {
    let (root, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    program(root.path(), &format!("tar -xf {}", file("debian-root.tar").display()));
    let run = |script: &str| {
        let guest = guest(root.path(), cache.path(), &["/bin/bash", "-c", script]);
        guest.option("--overlay", cache.path().join("changes").display()).run()
    };
    let script = r#"
        set -e
        mkdir -p /tmp/probe/DEBIAN /tmp/probe/usr/share/probe
        printf '%s\n' 'Package: probe' 'Version: 1.5' 'Architecture: all' 'Maintainer: A <a@example.org>' \
            'Description: probes' >/tmp/probe/DEBIAN/control
        perl -e 'print "sum ", eval { my $n = 0; $n += $_ for 1..1000; $n }, "\n"' | tee /tmp/probe/usr/share/probe/file
        dpkg-deb --build --root-owner-group /tmp/probe /tmp >&2
        dpkg --install /tmp/probe_1.5_all.deb >&2
        dpkg --audit
    "#;
    let ended = run(script);
    ended.require(ended.status == 0 && ended.stdout == "sum 500500\n", "perl and dpkg run");
    let ended = run("dpkg-query -W probe; cat /usr/share/probe/file; dpkg --verify probe; stat -c '%U:%a' /etc/shadow");
    ended.require(ended.stdout == "probe\t1.5\nsum 500500\nroot:640\n", "it is still installed");
}
