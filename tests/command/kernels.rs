//! Kernels with and without modules.

use crate::roots::Root;
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
fn two_kernels_run_at_once() {
    let (root, script) = (Root::new(), "cat /proc/version");
    let (one, other) = (shell(Kernel::Debian61, &root, script).start(), shell(Kernel::Tiny, &root, script).start());
    let (one, other) = (one.wait(), other.wait());
    one.require(one.status == 0 && one.stdout.contains("-cloud-amd64"), "Debian's");
    other.require(other.status == 0 && !other.stdout.contains("-cloud-amd64"), "the small one");
}
