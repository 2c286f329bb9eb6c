#!/usr/bin/env bash
# Boots a stock Debian kernel and a busybox shell under bantam, on a Debian or Ubuntu machine with Rust. Without a terminal
# the guest prints what it runs on and powers off.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { echo "==> $*" >&2; }

resources/setup.sh quickstart

step "Building bantam"
# Without a dynamic loader the program starts sooner, and runs in a guest or a container of any kind.
cargo rustc --release --locked --bin bantam -- -C target-feature=+crt-static

guest=$PWD/target/guest/debian-6.1
initrd=$guest/initramfs.cpio
if [[ ! -t 0 || ! -t 1 ]]; then
    # The kernel unpacks archives that follow one another: the second brings /test.sh, which the first's /init runs.
    initrd=$PWD/target/guest/quickstart.cpio
    echo 'uname -a; cat /proc/cpuinfo' >target/guest/test.sh
    (cat "$guest/initramfs.cpio" && cd target/guest && echo test.sh | cpio -o -H newc --quiet) >"$initrd"
fi
bantam=$(realpath "${CARGO_TARGET_DIR:-target}")/release/bantam
command=("$bantam" run --kernel "$guest/vmlinuz" --initrd "$initrd" --cmdline quiet)

if ! grep -qwE 'vmx|svm' /proc/cpuinfo; then
    step "This machine has neither VT-x (vmx) nor SVM (svm): starting the emulated KVM host, which is slow"
    command=(resources/kvm-host/run.sh "${command[@]}")
fi
step "Booting Debian's Linux 6.1 ('exit' or Ctrl-A x ends it; 'PCI: Fatal' is harmless)"
"${command[@]}"
