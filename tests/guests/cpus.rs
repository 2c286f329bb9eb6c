//! Processors: all there, all running, and in the places that a guest expects.

use std::fs;
use std::process::Command;

use crate::support::{Guest, Kernel};

const SCRIPT: &str = r#"
echo online=$(cat /sys/devices/system/cpu/online)
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    number=${cpu##*/cpu}
    echo ran=$(taskset -c $number cut -d ' ' -f 39 /proc/self/stat)
    echo core=$(cat $cpu/topology/core_id)
    echo package=$(cat $cpu/topology/physical_package_id)
    echo threads=$(cat $cpu/topology/thread_siblings_list)
done
for ticks in $(awk '/LOC:/ { for (i = 2; $i ~ /^[0-9]+$/; i++) print $i }' /proc/interrupts); do
    echo ticks=$ticks
done
"#;

fn has_cpus(kernel: Kernel, count: u32) {
    let ended = Guest::new(kernel).cpus(count).script(SCRIPT).run().succeeded();
    let numbers: Vec<_> = (0..count).map(|number| number.to_string()).collect();
    let values = |name| ended.values(name).collect::<Vec<_>>();

    assert_eq!(ended.value("online"), if count == 1 { "0".into() } else { format!("0-{}", count - 1) });
    assert_eq!(values("ran"), numbers, "the CPUs that code ran on");
    assert_eq!(values("core"), numbers, "each CPU is a core");
    assert_eq!(values("threads"), numbers, "each core has one thread");
    assert_eq!(values("package"), vec!["0"; count as usize], "all are in one package");
    assert_eq!(values("ticks").len(), count as usize);
    assert!(!values("ticks").contains(&"0"), "every CPU's timer ticks: {:?}", values("ticks"));
    let counted = numbers.iter().map(|number| ended.counted(&format!("vcpu{number}"), "device-accesses"));
    assert!(counted.sum::<u64>() > 0);
}

#[test]
fn debian_has_one_cpu() {
    has_cpus(Kernel::Debian61, 1);
}

#[test]
fn debian_has_two_cpus() {
    has_cpus(Kernel::Debian61, 2);
}

#[test]
fn debian_has_four_cpus() {
    has_cpus(Kernel::Debian612, 4);
}

#[test]
fn a_kernel_without_acpi_has_four_cpus() {
    has_cpus(Kernel::Tiny, 4);
}

/// Most stay offline, as booting them all takes too long; one whose APIC ID has more than eight bits runs code and takes
/// a disk's interrupts.
#[test]
fn more_cpus_than_xapic_has_ids() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let script = "
        cd /sys/devices/system/cpu
        echo present=$(cat present)
        echo before=$(cat online)
        echo 1 >cpu258/online
        echo after=$(cat online)
        echo ran=$(taskset -c 258 cut -d ' ' -f 39 /proc/self/stat)
        irq=$(awk -F : '/virtio/ { print $1 + 0; exit }' /proc/interrupts)
        echo 258 >/proc/irq/$irq/smp_affinity_list
        cat /dev/vda >/dev/null
        echo effective=$(cat /proc/irq/$irq/effective_affinity_list)
        echo interrupts=$(awk -v irq=$irq: 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == \"CPU258\") at = i + 1 } $1 == irq { print $at }' /proc/interrupts)
    ";
    let guest = Guest::new(Kernel::Debian612).cpus(260).memory("512M").cmdline("maxcpus=2").disk(disk.path().display());
    let ended = guest.script(script).run().succeeded();
    assert_eq!(ended.value("present"), "0-259");
    assert_eq!(ended.value("before"), "0-1");
    assert_eq!(ended.value("after"), "0-1,258");
    assert_eq!(ended.value("ran"), "258");
    assert_eq!(ended.value("effective"), "258");
    assert!(ended.number("interrupts") > 0);
}

/// The MP table tells of those that it can.
#[test]
fn a_kernel_without_acpi_starts_on_more_cpus_than_it_sees() {
    let script =
        "echo online=$(cat /sys/devices/system/cpu/online); sleep 0.1; dd if=/dev/hwrng bs=16 count=1 of=/bytes";
    let ended = Guest::new(Kernel::Tiny).cpus(260).memory("512M").cmdline("maxcpus=2").script(script).run().succeeded();
    assert_eq!(ended.value("online"), "0-1");
    assert!(ended.counted("rng", "bytes") >= 16);
}

/// A configuration file with such a CPU template.
fn template(folder: &std::path::Path, template: &str) -> std::path::PathBuf {
    let path = folder.join("template.json");
    fs::write(&path, format!(r#"{{"cpu-template": {template}}}"#)).unwrap();
    path
}

#[test]
fn a_template_changes_each_cpu() {
    // The stepping, and the revision of the microcode, which is in the upper half on Intel's. A vCPU has to have an APIC.
    let changes = r#"{
        "kvm_capabilities": ["0", "!99999"],
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0", "flags": 0, "modifiers": [
            {"register": "eax", "bitmap": "0b1101"}, {"register": "ecx", "bitmap": "0bx0xx_xxx0_xxxx_xxxx_xxxx_xxxx_xxxx_xxxx"}
        ]}],
        "msr_modifiers": [{"addr": "0x8b", "bitmap":
            "0b0000_0000_0000_0000_1100_1010_1111_1110_0000_0000_0000_0000_1100_1010_1111_1110"}]
    }"#;
    let script = "
        for what in stepping microcode; do
            for value in $(sed -n \"s/^$what.*: //p\" /proc/cpuinfo); do echo $what=$value; done
        done
        grep -wq rdrand /proc/cpuinfo && echo random=1
        grep -wq tsc_deadline_timer /proc/cpuinfo && echo deadline=1
        echo apic=$(grep -cw apic /proc/cpuinfo)
    ";
    let guest = Guest::new(Kernel::Debian61).cpus(2).script(script);
    let path = template(guest.folder(), changes);
    let ended = guest.option("--config", path.display()).run().succeeded();
    let values = |name| ended.values(name).collect::<Vec<_>>();
    assert_eq!((values("stepping"), values("microcode")), (vec!["13"; 2], vec!["0xcafe"; 2]));
    assert_eq!((values("random"), values("deadline"), ended.value("apic")), (vec![], vec![], "2"));
}

#[test]
fn a_template_that_kvm_cannot_follow_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (changes, why) in [
        (r#"{"kvm_capabilities": ["99999"]}"#, "KVM on this host does not have the capability 99999"),
        (
            r#"{"cpuid_modifiers": [{"leaf": "0x12345", "subleaf": "2", "flags": 0, "modifiers": []}]}"#,
            "KVM on this host does not have CPUID leaf 0x12345, subleaf 0x2",
        ),
        (
            r#"{"msr_modifiers": [{"addr": "0x12345", "bitmap": "0b1"}]}"#,
            "KVM on this host does not have the MSR 0x12345",
        ),
        (
            // IA32_APIC_BASE with reserved bits.
            r#"{"msr_modifiers": [{"addr": "0x1b", "bitmap": "0b1111_1111"}]}"#,
            "KVM on this host does not take 0x",
        ),
    ] {
        let mut bantam = Command::new(env!("CARGO_BIN_EXE_bantam"));
        bantam.args(["run", "--kernel"]).arg(Kernel::Tiny.vmlinux()).arg("--config");
        let output = bantam.arg(template(folder.path(), changes)).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(125) && said.contains(why), "{changes}: {said}");
    }
}
