//! Processors: all there, all running, and in the places that a guest expects.

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
