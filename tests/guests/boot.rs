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
fn few_exits_until_user_space() {
    // Exits that are not the console's.
    const OTHERS: u64 = 450;
    for cmdline in ["quiet", "loglevel=7"] {
        let ended = Guest::new(Kernel::Tiny).cmdline(cmdline).run().succeeded();
        let count = |device: &str, what: &str| ended.report["statistics"][device][what].as_u64().unwrap();
        let (exits, written) = (count("vcpu0", "device-accesses"), count("serial", "written-bytes"));
        eprintln!("{exits} exits for {written} bytes with {cmdline}");
        // The status is read for each byte that the kernel writes, which is gathered.
        let budget = OTHERS + written * 6 / 5;
        assert!(exits <= budget, "{exits} exits for {written} bytes: {}", ended.report["statistics"]);
        assert_eq!(count("keyboard", "reads"), 0, "nothing looks for a keyboard");
    }
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

/// The system calls before a machine's guest runs. A release makes about 12 less: its dynamic linker loads no libgcc, and the
/// standard library does not check what it closes.
fn calls_before_the_guest(options: &[&str]) -> (usize, String) {
    calls_of(&Kernel::Tiny.vmlinux(), Path::new("/nowhere"), options)
}

/// The same with any kernel, and the folder for what bantam keeps.
fn calls_of(kernel: &Path, cache: &Path, options: &[&str]) -> (usize, String) {
    let calls = NamedTempFile::new().unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(calls.path()).arg(env!("CARGO_BIN_EXE_bantam"));
    strace.args(["run", "--timeout", "1s", "--kernel"]).arg(kernel).env("XDG_CACHE_HOME", cache);
    strace.arg("--initrd").arg(Kernel::Tiny.file("initramfs.cpio")).args(options);
    // cargo has the dynamic linker look into folders of its own.
    let output = strace.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).output().unwrap();
    let calls = fs::read_to_string(calls.path()).unwrap();
    let before = calls.split_once("KVM_RUN").unwrap_or_else(|| panic!("{output:?}")).0;
    // The other half of one, signals, the ends of threads.
    let is_call = |line: &&str| !["resumed>", "---", "+++"].iter().any(|part| line.contains(part));
    (before.lines().filter(is_call).count(), before.to_owned())
}

/// What a machine must not do: more before its guest runs. What the run loop does while the vCPU's thread starts counts or does not.
#[test]
fn few_system_calls_come_before_the_guest() {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let disk = disk.path().to_str().unwrap();
    for (budget, options) in [(135, &["--memory", "128M"][..]), (144, &["--memory", "128M", "--disk", disk])] {
        let (count, calls) = calls_before_the_guest(options);
        assert!(count <= budget, "{count} system calls, of {budget}, with {options:?}:\n{calls}");
    }
}

/// The threads of a machine that is starting take turns as they like: what one does while another is about to enter the guest
/// counts or does not.
const CHANCE: usize = 4;

#[test]
fn neither_memory_nor_cpus_cost_many_system_calls() {
    let count = |memory, cpus| calls_before_the_guest(&["--memory", memory, "--cpus", cpus]).0;
    let [small, large] = [count("1G", "1"), count("3G", "1")];
    assert!(large <= small + CHANCE, "{small} for 1 GiB, {large} for 3 GiB");
    // Memory above 4 GiB is a mapping, advice and a slot of its own, and up to four calls that have it where huge pages can be.
    let larger = count("5G", "1");
    assert!(larger <= small + 7 + CHANCE, "{small} for 1 GiB, {larger} for 5 GiB");
    // KVM's, its page, CPUID and MSRs, and a thread; those of the others that begin come late or not.
    const EACH: usize = 18;
    let [one, four, eight] = [small, count("1G", "4"), count("1G", "8")];
    assert!(four <= one + 3 * EACH + CHANCE && eight <= one + 7 * EACH + CHANCE, "{one}, {four}, {eight}");
}

/// What bantam says of a machine that is ended at once.
fn said(kernel: &Path, cache: &Path, options: &[&str]) -> String {
    let mut bantam = Command::new(env!("CARGO_BIN_EXE_bantam"));
    bantam.args(["run", "-vv", "--serial", "none", "--timeout", "1s", "--kernel"]).arg(kernel).args(options);
    let output = bantam.env("XDG_CACHE_HOME", cache).stdin(Stdio::null()).output().unwrap();
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_bzimage_is_unpacked_once() {
    const KEPT: &str = "the kernel is unpacked as";
    const MAPPED: &str = "mapping the unpacked kernel";
    const ALONE: &str = "unpacking the kernel for this machine alone";
    let cache = tempfile::tempdir().unwrap();
    let image = Kernel::Tiny.bzimage();
    let run = |words: &str| {
        let mut guest = Guest::with_image(Kernel::Tiny, &image).script("uname -a").flag("-vv");
        guest.command().env("XDG_CACHE_HOME", cache.path());
        let ended = guest.run().succeeded();
        ended.require(ended.stderr.contains(words), words);
        (ended.stdout.lines().find(|line| line.starts_with("Linux")).map(String::from), ended.report["kernel"].clone())
    };
    assert_eq!(run(KEPT), run(MAPPED));
    let folder = cache.path().join("bantam/unpacked");
    let count = || fs::read_dir(&folder).unwrap().count();
    let kept = count();
    assert!(kept <= 2, "the kernel, and what file it is in");

    // Of the file only its ends are read: 13 system calls more than with an ELF kernel, and 2 of a build that is no release.
    let (calls, list) = calls_of(&image, cache.path(), &["--memory", "128M"]);
    assert!(calls <= 152, "{calls} system calls:\n{list}");
    assert!(said(&image, cache.path(), &["--jail"]).contains(MAPPED), "it is mapped in a jail");

    // What only the guest can unpack, and what is none, are not there.
    let packed = changed(&image, |bytes| {
        let at = |field: usize| u32::from_le_bytes(bytes[field..field + 4].try_into().unwrap()) as usize;
        let start = (usize::from(bytes[0x1f1]) + 1) * 512 + at(0x248);
        bytes[start..start + 8].fill(0xff);
    });
    let words = said(packed.path(), cache.path(), &[]);
    assert!(![KEPT, MAPPED, ALONE].iter().any(|word| words.contains(word)), "{words}");
    assert_eq!(count(), kept);

    // Without a place to keep it, or room there, it boots as well.
    assert!(said(&image, Path::new("/proc/nowhere"), &[]).contains(ALONE));
    if rustix::process::geteuid().is_root() {
        let small = tempfile::tempdir().unwrap();
        let mount = |program: &str, arguments: &[&str]| {
            assert!(Command::new(program).args(arguments).arg(small.path()).status().unwrap().success(), "{program}");
        };
        mount("mount", &["-t", "tmpfs", "-o", "size=4m", "none"]);
        let words = said(&image, small.path(), &[]);
        let left = fs::read_dir(small.path().join("bantam/unpacked")).map(|entries| entries.count());
        mount("umount", &[]);
        assert!(words.contains(ALONE) && words.contains("No space left"), "{words}");
        assert_eq!(left.ok(), Some(0));
    }
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

/// What starting a machine has this program do, whatever the host's speed: its arguments and building it.
#[test]
fn few_instructions_come_before_the_guest() {
    const BUDGET: u64 = 2_100_000;
    let folder = tempfile::tempdir().unwrap();
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--toggle-collect=*try_parse*", "--toggle-collect=bantam::build*"]);
    valgrind.arg(format!("--callgrind-out-file={}", folder.path().join("out").display()));
    valgrind.arg(env!("CARGO_BIN_EXE_bantam"));
    valgrind.args(["run", "--memory", "128M", "--timeout", "1s", "--kernel"]).arg(Kernel::Tiny.vmlinux());
    valgrind.arg("--initrd").arg(Kernel::Tiny.file("initramfs.cpio"));
    valgrind.args(["--serial", "none", "--sandbox", "off"]);
    let output = match valgrind.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return eprintln!("SKIPPED: no instructions are counted, as there is no valgrind");
        }
        output => output.unwrap(),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse::<u64>().ok());
    let collected = collected.unwrap_or_else(|| panic!("{output:?}"));
    eprintln!("{collected} instructions");
    assert!((BUDGET / 4..=BUDGET).contains(&collected), "{collected} instructions, of {BUDGET}");
}
