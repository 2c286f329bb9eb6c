//! CPUID as a guest sees it: what KVM supports, with the topology of N cores in one socket, one thread each.

use std::arch::x86_64::__cpuid;

use super::needs_x2apic;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Whether the CPU that this runs on has VT-x (CPUID.1:ECX.VMX, bit 5) or SVM (CPUID.8000_0001:ECX.SVM, bit 2).
pub fn has_virtualization() -> bool {
    let bit = |leaf, bit: u32| __cpuid(leaf).ecx & 1 << bit != 0;
    bit(1, 5) || __cpuid(0x8000_0000).eax > 0x8000_0000 && bit(0x8000_0001, 2)
}

/// The CPUID of vCPU `index` of `cpus`, made from `supported` (`KVM_GET_SUPPORTED_CPUID`). The vCPU's index is its
/// APIC id. `tsc_deadline` says whether KVM emulates the LAPIC's TSC deadline timer, which that ioctl leaves out.
///
/// Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
pub fn for_vcpu(supported: &CpuId, index: u32, cpus: u32, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    // Bits of the APIC id that number the cores of the socket.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    let last_core = cpus - 1;
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|e| e.function != 0xb && e.function != 0x1f).copied().collect();
    let max_leaf = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                // EBX: initial APIC id, logical processors in the package, CLFLUSH line size.
                entry.ebx = (index & 0xff) << 24 | (1 << core_bits).min(0xff) << 16 | 8 << 8;
                // ECX: runs under a hypervisor; TSC deadline timer.
                set_bit(&mut entry.ecx, 31, true);
                set_bit(&mut entry.ecx, 24, tsc_deadline);
                // EDX: HTT, that is, EBX's count is valid.
                set_bit(&mut entry.edx, 28, cpus > 1);
            }
            // Cache parameters: cores in the package (0x4 only) and who shares this cache.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { last_core } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing & 0xfff) << 14;
                if entry.function == 0x4 {
                    entry.eax |= ((1 << core_bits) - 1u32).min(0x3f) << 26;
                }
            }
            // KVM's features: the IOAPIC takes destinations of 15 bits (KVM_FEATURE_MSI_EXT_DEST_ID), if it is ours.
            0x4000_0001 => set_bit(&mut entry.eax, 15, needs_x2apic(cpus)),
            // AMD ECX: CmpLegacy, more than one core.
            0x8000_0001 if is_amd(supported) => set_bit(&mut entry.ecx, 1, cpus > 1),
            // AMD ECX: ApicIdSize, number of cores - 1.
            0x8000_0008 if is_amd(supported) => {
                entry.ecx = (entry.ecx & !0xf0ff) | core_bits.min(0xf) << 12 | last_core.min(0xff);
            }
            // AMD: extended APIC id; one thread a core; one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
            _ => {}
        }
    }
    if max_leaf >= 0xb {
        // Extended topology: a level for threads (type 1), one for cores (type 2), the end.
        let level = |sub: u32, shift, count, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index: sub,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | sub,
            edx: index,
            ..Default::default()
        };
        entries.extend([level(0, 0, 1, 1), level(1, core_bits, cpus, 2), level(2, 0, 0, 0)]);
    }
    entries
}

/// Whether it says that the LAPIC has a TSC deadline timer (CPUID.1:ECX, bit 24).
pub fn has_tsc_deadline(cpuid: &CpuId) -> bool {
    cpuid.as_slice().iter().any(|entry| entry.function == 1 && entry.ecx & 1 << 24 != 0)
}

/// Has it say so, or not.
pub fn set_tsc_deadline(cpuid: &mut CpuId, value: bool) {
    let entry = cpuid.as_mut_slice().iter_mut().find(|entry| entry.function == 1);
    entry.into_iter().for_each(|entry| set_bit(&mut entry.ecx, 24, value));
}

fn is_amd(supported: &CpuId) -> bool {
    let vendor = |e: &&kvm_cpuid_entry2| e.function == 0;
    // "AuthenticAMD" or "HygonGenuine".
    supported.as_slice().iter().find(vendor).is_some_and(|e| e.ebx == 0x6874_7541 || e.ebx == 0x6f67_7948)
}

fn set_bit(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index, eax, ebx| kvm_cpuid_entry2 { function, index, eax, ebx, ..Default::default() };
        // Vendor "AuthenticAMD"; L1 data and L3 caches; a host topology that must not leak.
        let leaves = [
            leaf(0, 0, 0x1f, 0x6874_7541),
            leaf(1, 0, 0, 0x1f10_0800),
            leaf(4, 0, 0x1c00_4121, 0),
            leaf(4, 3, 0x1c03_c163, 0),
            leaf(0xb, 0, 1, 2),
            leaf(0x1f, 0, 1, 2),
            leaf(0x4000_0001, 0, 1, 0),
            leaf(0x8000_0008, 0, 0, 0),
        ];
        CpuId::from_entries(&leaves).unwrap()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn four_cores_of_one_socket() {
        let entries = for_vcpu(&supported(), 3, 4, true);
        assert_eq!(find(&entries, 1, 0).ebx, 3 << 24 | 4 << 16 | 8 << 8);
        assert_eq!(find(&entries, 1, 0).ecx, 1 << 31 | 1 << 24);
        assert_eq!(find(&entries, 1, 0).edx, 1 << 28);
        let cores = find(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 4, 0x201, 3));
        assert_eq!(find(&entries, 0xb, 0).ebx, 1, "one thread a core");
        assert_eq!(find(&entries, 4, 0).eax >> 14 & 0xfff, 0, "level 1 is private");
        assert_eq!(find(&entries, 4, 3).eax >> 14 & 0xfff, 3, "level 3 is shared");
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 2 << 12 | 3);
        assert!(!entries.iter().any(|e| e.function == 0x1f));
    }

    #[test]
    fn more_cores_than_xapic_ids_have_wider_ones() {
        let entries = for_vcpu(&supported(), 256, 260, true);
        let cores = find(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (9, 260, 256));
        assert_eq!(find(&entries, 1, 0).ebx, 0xff << 16 | 8 << 8, "the low byte of the id, and as many as fit");
        assert_eq!(find(&entries, 4, 3).eax >> 14 & 0xfff, 259);
        assert_eq!(find(&entries, 0x4000_0001, 0).eax, 1 | 1 << 15);
        assert_eq!(find(&for_vcpu(&supported(), 254, 255, true), 0x4000_0001, 0).eax, 1);
    }

    #[test]
    fn one_core_is_no_multiprocessor() {
        let entries = for_vcpu(&supported(), 0, 1, false);
        assert_eq!(find(&entries, 1, 0).edx, 0);
        let cores = find(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx), (0, 1));
    }
}
