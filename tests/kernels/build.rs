//! `bantam kernel build`, with a `make` that only pretends to compile.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use super::{Place, guest, refused, text};

/// What a kernel's `make` is asked for, done in no time. It counts how often it compiles.
const MAKE: &str = r#"#!/bin/sh
case "$*" in
*allnoconfig*) cp "$CONFIG" "$3/.config" ;;
*kernelversion*) echo 6.1.0 ;;
*vmlinux*)
    echo "compiled" >>"$COUNT"
    for i in 1 2 3; do echo "  CC      file$i.o"; done
    [ ! -e "$FAIL" ] || { echo "file4.c:1: error: no"; exit 2; }
    cp "$KERNEL" "$2/vmlinux"
    ;;
*) echo "unexpected: $*" >&2; exit 1 ;;
esac
"#;

/// A folder of programs, with all that the script needs.
fn programs(place: &Place, more: &[&str]) -> PathBuf {
    let folder = place.path("bin");
    fs::create_dir_all(&folder).unwrap();
    let base = "sh find sort tail cat ls sha256sum flock mkdir rm tar xz sed grep realpath mv cp nproc printf ld strip";
    for name in base.split(' ').chain(more.iter().copied()) {
        let which = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
        let path = text(&which.stdout);
        if path.starts_with('/') {
            let _ = symlink(path.trim(), folder.join(name));
        }
    }
    let make = folder.join("make");
    fs::write(&make, MAKE).unwrap();
    fs::set_permissions(&make, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

fn build(place: &Place, more: &[&str], arguments: &[&str]) -> Command {
    let mut command = place.command(&[&["kernel", "build"], arguments].concat());
    command.env("PATH", programs(place, more));
    command.env("CONFIG", concat!(env!("CARGO_MANIFEST_DIR"), "/resources/guest-kernel/bantam.config"));
    command.env("COUNT", place.path("count")).env("FAIL", place.path("fail")).env("KERNEL", guest("tiny/vmlinux"));
    command
}

const COMPILERS: [&str; 5] = ["gcc", "flex", "bison", "bc", "perl"];

/// The archive `NAME.tar.xz`.
fn source(place: &Place, name: &str) -> String {
    fs::create_dir(place.path(name)).unwrap();
    place.write(&format!("{name}/README"), "a kernel");
    let archive = format!("{name}.tar.xz");
    let mut tar = Command::new("tar");
    tar.arg("-cJf").arg(place.path(&archive)).arg("-C").arg(place.path("")).arg(name);
    assert!(tar.status().unwrap().success());
    place.path(&archive).to_str().unwrap().to_owned()
}

#[test]
fn what_is_missing_is_told_with_what_installs_it() {
    let place = Place::new();
    let output = build(&place, &["gcc", "bc", "perl"], &["--source", "linux.tar.xz"]).output().unwrap();
    refused(&output, &["sudo apt install flex bison", "cannot build a kernel: its script ended with exit status: 1"]);
    let output = build(&place, &COMPILERS, &["--source", "linux.tar.xz"]).output().unwrap();
    refused(&output, &["cannot read the kernel's source linux.tar.xz"]);
    assert_eq!(place.list().len(), 0);
}

#[test]
fn a_kernel_is_built_once_and_shows_how_far_it_is() {
    let place = Place::new();
    let source = source(&place, "linux-6.1");
    let compiled = || fs::read_to_string(place.path("count")).map_or(0, |count| count.lines().count());
    fs::write(place.path("fail"), "").unwrap();
    let output = build(&place, &COMPILERS, &["--source", &source]).output().unwrap();
    refused(&output, &["==> Unpacking", "==> Compiling Linux 6.1.0", "file4.c:1: error: no", "does not compile"]);
    assert_eq!((compiled(), place.list().len()), (1, 0));
    fs::remove_file(place.path("fail")).unwrap();
    for _ in 0..2 {
        let output = build(&place, &COMPILERS, &["--source", &source]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).starts_with("default: Linux 6.1."));
        assert!(!text(&output.stderr).contains("Unpacking"), "it goes on where it was");
    }
    assert_eq!(compiled(), 2);
    let output = build(&place, &COMPILERS, &["other", "--source", &source]).output().unwrap();
    assert!(output.status.success() && compiled() == 2, "{}", text(&output.stderr));
    assert_eq!(place.list().len(), 2);
    assert_eq!(place.cached(), [".linux", "default", "other"]);
}

#[test]
fn builds_of_different_sources_at_once_do_not_mix() {
    let place = Place::new();
    let kernels = [("one", "tiny/vmlinux", "6.1."), ("two", "debian-6.12/vmlinux", "6.12.")];
    let builds = kernels.map(|(name, kernel, _)| {
        let mut command = build(&place, &COMPILERS, &[name, "--source", &source(&place, name)]);
        command.env("KERNEL", guest(kernel)).spawn().unwrap()
    });
    for (build, (name, _, version)) in builds.into_iter().zip(kernels) {
        let output = build.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let said = text(&output.stdout);
        assert!(said.starts_with(&format!("{name}: Linux {version}")), "{said}");
    }
    let sources: Vec<_> = place.list().into_iter().map(|listed| listed["source"].clone()).collect();
    assert_eq!(sources, ["bantam kernel build"; 2]);
    assert_eq!(place.cached(), [".linux", "one", "two"]);
}
