//! Kernels in every form, from their first instruction to user space.

use crate::support::{Ended, Guest, Kernel};

const SCRIPT: &str = "echo release=$(uname -r)";

fn boots(guest: Guest) -> Ended {
    guest.script(SCRIPT).run().succeeded()
}

#[test]
fn debian_6_1_bzimage() {
    let ended = boots(Guest::with_image(Kernel::Debian61, Kernel::Debian61.bzimage()));
    assert!(ended.value("release").starts_with("6.1."), "{ended:?}");
}

#[test]
fn debian_6_1_vmlinux() {
    let ended = boots(Guest::new(Kernel::Debian61));
    assert!(ended.value("release").starts_with("6.1."), "{ended:?}");
}

#[test]
fn debian_6_12_bzimage() {
    let ended = boots(Guest::with_image(Kernel::Debian612, Kernel::Debian612.bzimage()));
    assert!(ended.value("release").starts_with("6.12."), "{ended:?}");
}

#[test]
fn debian_6_12_vmlinux() {
    let ended = boots(Guest::new(Kernel::Debian612));
    assert!(ended.value("release").starts_with("6.12."), "{ended:?}");
}

#[test]
fn tiny_bzimage() {
    boots(Guest::with_image(Kernel::Tiny, Kernel::Tiny.bzimage()));
}

#[test]
fn tiny_vmlinux() {
    boots(Guest::new(Kernel::Tiny));
}
