//! Kernels with and without modules.

use std::path::Path;
use std::process::Command;

use rustix::process::geteuid;

use crate::roots::{Root, tree};
use crate::support::{Guest, Kernel};

fn shell(kernel: Kernel, root: &Root, script: &str) -> Guest {
    Guest::running(kernel.bzimage(), &["sh", "-c", script]).root(&root.image())
}

#[test]
fn debian_6_1_with_its_modules() {
    let script = "echo x >/x; cat /proc/modules; cat /proc/version; exit 5";
    let ended = shell(Kernel::Debian61, &Root::new(), script).run();
    ended.require(ended.status == 5, "expected status 5");
    ended.require(ended.stdout.contains("vmw_vsock_virtio_transport ") && ended.stdout.contains("overlay "), "modules");
    ended.require(ended.stdout.contains("Linux version 6.1"), "the version");
}

#[test]
fn debian_6_12_with_its_packed_modules() {
    let ended = shell(Kernel::Debian612, &Root::new(), "echo x >/x; cat /proc/version; exit 5").run();
    ended.require(ended.status == 5 && ended.stdout.contains("Linux version 6.12"), "expected status 5");
}

#[test]
fn missing_modules_are_said_before_and_after_the_start() {
    let (root, empty) = (Root::new(), tempfile::tempdir().unwrap());
    let ended = shell(Kernel::Debian61, &root, "").option("--modules", empty.path().display()).run();
    ended.require(ended.status == 125 && ended.stderr.contains("cannot find kernel modules in"), "it is refused");

    // A kernel whose modules are nowhere.
    let kernel = empty.path().join("vmlinuz");
    std::fs::copy(Kernel::Debian61.bzimage(), &kernel).unwrap();
    let ended = Guest::running(&kernel, &["true"]).root(&root.image()).run();
    ended.require(ended.status == 125, "expected status 125");
    ended.require(ended.stderr.contains("before the command had ended"), "the end is told");
    ended.require(ended.stderr.contains("no modules were found for its kernel"), "the reason is told");
    ended.require(ended.stderr.contains("bantam init: cannot connect to the host by vsock"), "the console is shown");
}

#[test]
fn two_kernels_run_at_once_by_their_names() {
    let (root, cache) = (Root::new(), tempfile::tempdir().unwrap());
    let names = ["6.1", "6.12"];
    let mut guests = names.map(|name| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(format!("debian-{name}"));
        let mut import = Command::new(env!("CARGO_BIN_EXE_bantam"));
        import.args(["kernel", "import", name]).arg(folder.join("vmlinux")).env("XDG_CACHE_HOME", cache.path());
        assert!(import.status().unwrap().success(), "{import:?}");
        let mut guest = Guest::running(name, &["sh", "-c", "cat /proc/version; cat; exit 5"]).root(&root.image());
        guest.command().env("XDG_CACHE_HOME", cache.path());
        guest.spawn()
    });
    // Neither ends before both are there.
    for (guest, name) in guests.iter().zip(names) {
        guest.wait_for(&format!("Linux version {name}."));
    }
    guests.iter_mut().for_each(|guest| guest.write("go on"));
    for mut guest in guests {
        drop(guest.stdin().take());
        let ended = guest.wait();
        ended.require(ended.status == 5 && ended.stdout.ends_with("go on"), "expected status 5");
    }
}

#[test]
#[ignore = "its kernel is made by resources/guest-kernel/bantam.sh build, in some minutes"]
fn the_small_kernel_has_all_that_a_command_needs_built_in() {
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/bantam/vmlinux");
    let (tree, folder) = (tree(), tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("file"), "shared\n").unwrap();
    let script = "cat /src/file; echo x >/x; ls /sys/bus/virtio/drivers/*; busybox unshare -p -f -n -m -i -u true
        busybox grep -E 'cmdline|Seccomp:' /proc/self/status; cat /sys/fs/cgroup/cgroup.controllers; busybox nproc";
    let mut guest = Guest::running(&kernel, &["sh", "-c", script]).root(tree.path());
    guest.command().env("XDG_CACHE_HOME", folder.path());
    let guest = guest.option("--share", format!("{}:/src", folder.path().display())).cpus(2).option("--pids", 100);
    let guest = guest.option("--vsock", format!("cid=3,socket={}/vsock", folder.path().display()));
    let ended = if geteuid().is_root() { guest.net("kernel0") } else { guest }.run();
    ended.require(ended.status == 0 && ended.stdout.starts_with("shared\n"), "it runs and has the share");
    let drivers = ["virtio_blk", "virtio_net", "virtio_rng", "virtiofs", "vmw_vsock_virtio_transport"];
    for word in drivers.iter().chain(&["Seccomp:\t0", "cpuset cpu io memory pids", "\n2\n"]) {
        ended.require(ended.stdout.contains(word), word);
    }
    assert_eq!(ended.report["limits"]["pids"], "a control group of the guest");
}
