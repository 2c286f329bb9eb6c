//! Kernels in every form, from their first instruction to user space.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use bantam::boot::inspect::inspect;
use memchr::memmem;
use tempfile::NamedTempFile;

use crate::support::{Ended, Guest, Kernel};

fn boots(kernel: Kernel, image: &Path, release: &str) -> Ended {
    let ended = Guest::with_image(kernel, image).script("echo release=$(uname -r)").run().succeeded();
    assert!(ended.value("release").starts_with(release), "{ended:?}");
    // Without ACPI a guest cannot power off.
    assert_eq!(ended.report["outcome"], if kernel == Kernel::Tiny { "halted" } else { "powered-off" });
    let durations = &ended.report["durations"];
    let times = ["first-kvm-run", "first-console-byte", "user-space", "end"].map(|name| durations[name].as_f64());
    assert!(times.is_sorted() && times[0] > Some(0.0), "{durations}");
    ended
}

/// A changed copy of a kernel.
fn changed(image: &Path, change: impl FnOnce(&mut [u8])) -> NamedTempFile {
    let mut bytes = fs::read(image).unwrap();
    change(&mut bytes);
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, bytes).unwrap();
    file
}

#[test]
fn debian_6_1_bzimage() {
    boots(Kernel::Debian61, &Kernel::Debian61.bzimage(), "6.1.");
}

#[test]
fn debian_6_1_vmlinux() {
    boots(Kernel::Debian61, &Kernel::Debian61.vmlinux(), "6.1.");
}

#[test]
fn debian_6_12_bzimage() {
    boots(Kernel::Debian612, &Kernel::Debian612.bzimage(), "6.12.");
}

#[test]
fn debian_6_12_vmlinux() {
    boots(Kernel::Debian612, &Kernel::Debian612.vmlinux(), "6.12.");
}

#[test]
fn tiny_bzimage() {
    boots(Kernel::Tiny, &Kernel::Tiny.bzimage(), "6.");
}

#[test]
fn tiny_vmlinux() {
    boots(Kernel::Tiny, &Kernel::Tiny.vmlinux(), "6.");
}

#[test]
fn vmlinux_without_pvh_is_entered_in_64_bits() {
    for kernel in [Kernel::Tiny, Kernel::Debian61] {
        let image = changed(&kernel.vmlinux(), |bytes| {
            // XEN_ELFNOTE_PHYS32_ENTRY with a name of 4 bytes.
            let notes: Vec<_> = memmem::find_iter(bytes, b"\x12\0\0\0Xen\0").collect();
            assert_eq!(notes.len(), 1);
            bytes[notes[0]] = 0xff;
        });
        assert!(!inspect(image.path()).unwrap().pvh);
        boots(kernel, image.path(), "6.");
    }
}

/// What a machine must not do: more before its guest runs. A release makes some less, which its dynamic linker does for libgcc.
#[test]
fn few_system_calls_come_before_the_guest() {
    const BUDGET: usize = 180;
    let calls = NamedTempFile::new().unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(calls.path()).arg(env!("CARGO_BIN_EXE_bantam"));
    strace.args(["run", "--memory", "128M", "--timeout", "3s", "--kernel"]).arg(Kernel::Tiny.vmlinux());
    strace.arg("--initrd").arg(Kernel::Tiny.file("initramfs.cpio"));
    // cargo has the dynamic linker look into folders of its own.
    let output = strace.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).output().unwrap();
    let calls = fs::read_to_string(calls.path()).unwrap();
    let before = calls.split_once("KVM_RUN").unwrap_or_else(|| panic!("{output:?}")).0;
    // The other half of one, signals, the ends of threads.
    let is_call = |line: &&str| !["resumed>", "---", "+++"].iter().any(|part| line.contains(part));
    let count = before.lines().filter(is_call).count();
    assert!(count <= BUDGET, "{count} system calls, of {BUDGET}:\n{before}");
}

#[test]
fn bzimage_of_unknown_compression_is_unpacked_by_the_guest() {
    let image = changed(&Kernel::Debian612.bzimage(), |bytes| {
        // payload_offset and payload_length of the setup header: behind the magic number, which the guest's own code
        // does not need.
        for (field, change) in [(0x248, 8), (0x24c, -8)] {
            let value = i32::from_le_bytes(bytes[field..field + 4].try_into().unwrap());
            bytes[field..field + 4].copy_from_slice(&(value + change).to_le_bytes());
        }
    });
    assert!(inspect(image.path()).unwrap().packed);
    boots(Kernel::Debian612, image.path(), "6.12.");
}

#[test]
fn a_kernel_without_acpi_is_told_of_its_devices_whatever_else_it_is_told() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(disk.path(), vec![7; 512]).unwrap();
    for text in
        ["console=ttyS0 reboot=k panic=-1", "console=ttyS0 reboot=k panic=-1 virtio_mmio.device=0x1000@0xd0000000:5"]
    {
        let script = "echo disk=$(wc -c </dev/vda) devices=$(grep -o virtio_mmio.device /proc/cmdline | wc -l)x";
        let guest = Guest::new(Kernel::Tiny).disk(disk.path().display()).script(script);
        let ended = guest.flag("--cmdline-only").cmdline(text).run().succeeded();
        let devices = if text.contains("device") { 1 } else { 2 };
        assert!(ended.stdout.contains(&format!("disk=512 devices={devices}x")), "{}", ended.stdout);
    }
}
