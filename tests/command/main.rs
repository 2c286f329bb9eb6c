//! One command in a guest: its status, its streams, its root file system.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/registry.rs"]
mod docker_registry;
#[path = "../support/namespace.rs"]
mod namespace;
#[path = "../support/mod.rs"]
mod support;

mod images;
mod kept;
mod kernels;
mod limits;
mod many;
mod net;
mod roots;
mod share;
mod status;
mod streams;
mod warm;

use support::{Guest, Kernel};

/// A guest whose root is the initramfs of [`Kernel::Tiny`], with busybox, and that will run this command.
fn tiny(command: &[&str]) -> Guest {
    Guest::running(Kernel::Tiny.vmlinux(), command).initramfs_root(Kernel::Tiny)
}

/// The same, for the shell.
fn shell(script: &str) -> Guest {
    tiny(&["sh", "-c", script])
}
