//! What KVM holds of a machine, taken out and put back. Nothing runs meanwhile.
//!
//! The orders are those that KVM's code asks for; where one matters, it is said.

#![expect(unsafe_code, reason = "KVM_GET_XSAVE2 and KVM_SET_XSAVE move as much as the host's features need")]

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES,
    Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_mp_state, kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::{Cap, KvmNestedStateBuffer};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Error, Vcpu, Vm};
use crate::snapshot::{self, Hex};

/// The time-stamp counter, and when it next interrupts. The latter counts from the former.
const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// How far the frequencies of two hosts' counters may be apart to be the same, in parts of a million: what a clock is
/// corrected by.
const TSC_TOLERANCE: u64 = 250;

/// KVM's interrupt controllers.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// Words of `struct kvm_xsave` without what comes after it.
const REGION: usize = size_of::<kvm_xsave>() / 4;
/// More MSRs than any KVM lists.
const MAX_MSRS: usize = 4096;

/// MSRs that KVM has and does not list (`KVM_GET_MSR_INDEX_LIST`): memory types, and the banks of machine checks.
fn unlisted_msrs() -> impl Iterator<Item = u32> {
    // Physical ranges, fixed ranges of 64, 16 and 4 KiB, and the default; four registers for each of 32 banks.
    (0x200..0x210).chain([0x250, 0x258, 0x259]).chain(0x268..0x270).chain([0x2ff]).chain(0x400..0x480)
}

/// What KVM has of a vCPU's state on this host.
pub struct Extent {
    /// Numbers.
    msrs: Vec<u32>,
    /// Of the extended registers, in bytes.
    xsave: usize,
    /// The vCPU may have a guest of its own.
    nested: bool,
}

/// The state of a vCPU, in KVM's structs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VcpuState {
    cpuid: Hex,
    mp_state: u32,
    regs: Hex,
    sregs: Hex,
    xsave: Hex,
    xcrs: Hex,
    debug_regs: Hex,
    lapic: Hex,
    tsc_khz: u32,
    /// Numbers and values.
    msrs: Vec<(u32, u64)>,
    /// That of a guest of the guest, on hosts that can have one.
    nested: Option<Hex>,
    events: Hex,
}

/// The state of what is in KVM outside of the vCPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmState {
    /// PIC (two) and IOAPIC, if they are KVM's.
    chips: Vec<Hex>,
    pit: Option<Hex>,
    /// KVM's clock, in nanoseconds.
    clock: u64,
    /// The host's time then, in nanoseconds since 1970.
    time: u64,
}

/// A moment, by KVM's clock and by the host's.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    clock: u64,
    time: u64,
}

/// The CPU that a machine runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    name: String,
    /// Leaf, subleaf, and which of EAX to EDX: a word with a bit for each feature.
    features: Vec<(u32, u32, usize, u32)>,
}

/// Words of CPUID that have a bit for each feature (Intel SDM volume 2, AMD APM volume 3): leaf, subleaf, register.
const FEATURE_WORDS: [(u32, u32, usize); 13] = [
    (0x1, 0, 2),
    (0x1, 0, 3),
    (0x7, 0, 1),
    (0x7, 0, 2),
    (0x7, 0, 3),
    (0x7, 1, 0),
    (0xd, 0, 0),
    (0xd, 1, 0),
    (0x4000_0001, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0007, 0, 3),
    (0x8000_0008, 0, 1),
];

impl Cpu {
    fn of(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |function, index| cpuid.iter().find(|entry| (entry.function, entry.index) == (function, index));
        let registers = |entry: &kvm_cpuid_entry2| [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned();
        let vendor = leaf(0, 0).map_or_else(String::new, |entry| text(bytes(&[entry.ebx, entry.edx, entry.ecx])));
        let brand = (0x8000_0002..=0x8000_0004).filter_map(|function| leaf(function, 0)).flat_map(registers);
        let brand = text(bytes(&brand.collect::<Vec<_>>()));
        let signature = leaf(1, 0).map_or(0, |entry| entry.eax);
        let words = FEATURE_WORDS.iter().filter_map(|(function, index, register)| {
            Some((*function, *index, *register, registers(leaf(*function, *index)?)[*register]))
        });
        Cpu { name: format!("{vendor} {brand} (signature {signature:#x})"), features: words.collect() }
    }

    /// Whether a machine of this CPU can go on on the `host`'s.
    pub fn check_on(&self, host: &Cpu) -> Result<(), snapshot::Error> {
        if self.name != host.name {
            return Err(snapshot::Error::part(
                "the vCPUs",
                format_args!("they ran on {}, and this host has {}", self.name, host.name),
            ));
        }
        for (function, index, register, bits) in &self.features {
            let here = host.features.iter().find(|word| (word.0, word.1, word.2) == (*function, *index, *register));
            let missing = bits & !here.map_or(0, |word| word.3);
            if missing != 0 {
                let register = ["EAX", "EBX", "ECX", "EDX"].get(*register).unwrap_or(&"?");
                return Err(snapshot::Error::part(
                    "the vCPUs",
                    format_args!(
                        "they ran on {} with features that KVM does not have on this host, of the same name: \
                         CPUID.{function:#x}.{index}:{register} bits {missing:#x}",
                        self.name
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn hex(value: &(impl IntoBytes + Immutable)) -> Hex {
    Hex(value.as_bytes().to_vec())
}

fn value<T: FromBytes>(hex: &Hex, what: &str) -> Result<T, Error> {
    T::read_from_bytes(&hex.0).map_err(|_| {
        Error::State(snapshot::Error::part(what, format_args!("{} bytes are not as many as KVM takes", hex.0.len())))
    })
}

/// The host's time in nanoseconds since 1970.
fn now() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Vcpu {
    /// The vCPU's state. It is outside of the guest, and has finished the access it was there for.
    ///
    /// `extent` is what [`Vm::extent`] gives.
    pub fn save(&self, extent: &Extent) -> Result<VcpuState, Error> {
        let fail = |what: &str| Error::ioctl(format!("read the {what} of vCPU {}", self.index));
        let fd = &self.fd;
        // First: it lets pending INITs and SIPIs take effect, which changes the others.
        let mp_state = fd.get_mp_state().map_err(fail("state (KVM_GET_MP_STATE)"))?.mp_state;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(fail("CPUID (KVM_GET_CPUID2)"))?;
        let mut state = VcpuState {
            cpuid: Hex(cpuid.as_slice().iter().flat_map(|entry| entry.as_bytes().to_vec()).collect()),
            mp_state,
            regs: hex(&fd.get_regs().map_err(fail("registers (KVM_GET_REGS)"))?),
            sregs: hex(&fd.get_sregs().map_err(fail("special registers (KVM_GET_SREGS)"))?),
            xsave: self.save_xsave(extent.xsave)?,
            xcrs: hex(&fd.get_xcrs().map_err(fail("extended control registers (KVM_GET_XCRS)"))?),
            debug_regs: hex(&fd.get_debug_regs().map_err(fail("debug registers (KVM_GET_DEBUGREGS)"))?),
            lapic: hex(&fd.get_lapic().map_err(fail("local APIC (KVM_GET_LAPIC)"))?),
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            msrs: self.save_msrs(&extent.msrs)?,
            nested: extent.nested.then(|| self.save_nested()).transpose()?,
            // Last: what is pending depends on the rest.
            events: hex(&fd.get_vcpu_events().map_err(fail("pending events (KVM_GET_VCPU_EVENTS)"))?),
        };
        let tsc = state.msrs.iter().find(|(number, _)| *number == IA32_TSC).map(|(_, value)| *value);
        // A deadline that has passed reads as 0 before its interrupt is anywhere else: it is due at once.
        if let (Some(tsc), Some((_, deadline @ 0))) =
            (tsc, state.msrs.iter_mut().find(|(number, _)| *number == IA32_TSC_DEADLINE))
        {
            *deadline = tsc;
        }
        Ok(state)
    }

    fn save_xsave(&self, size: usize) -> Result<Hex, Error> {
        let fail = |how: &str| Error::ioctl(format!("read the extended registers ({how}) of vCPU {}", self.index));
        let Some(more) = size.checked_sub(size_of::<kvm_xsave>()).filter(|more| *more > 0) else {
            return Ok(hex(&self.fd.get_xsave().map_err(fail("KVM_GET_XSAVE"))?));
        };
        let mut xsave = Xsave::new(more.div_ceil(4)).expect("KVM's size is within bounds");
        // SAFETY: it has as many bytes as KVM says that it writes.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(fail("KVM_GET_XSAVE2"))?;
        let region = xsave.as_fam_struct_ref().xsave.region;
        Ok(Hex([region.as_bytes(), xsave.as_slice().as_bytes()].concat()))
    }

    fn restore_xsave(&self, saved: &Hex, size: usize) -> Result<(), Error> {
        let (words, rest) = saved.0.as_chunks::<4>();
        let words: Vec<_> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let (region, more) = words.split_at(words.len().min(REGION));
        if !rest.is_empty() || saved.0.len() != size.max(size_of::<kvm_xsave>()).next_multiple_of(4) {
            let why = format_args!("{} bytes are not as many as KVM takes", saved.0.len());
            return Err(Error::State(snapshot::Error::part("the extended registers", why)));
        }
        let mut xsave = Xsave::from_entries(more).expect("KVM's size is within bounds");
        // SAFETY: how many entries there are stays as it is.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
        // SAFETY: it has as many bytes as KVM says that it reads.
        let set = unsafe { self.fd.set_xsave2(&xsave) };
        set.map_err(Error::ioctl(format!("set the extended registers (KVM_SET_XSAVE) of vCPU {}", self.index)))
    }

    fn save_nested(&self) -> Result<Hex, Error> {
        let mut nested = Box::new(KvmNestedStateBuffer::empty());
        let what = format!("read the nested state (KVM_GET_NESTED_STATE) of vCPU {}", self.index);
        self.fd.nested_state(&mut nested).map_err(Error::ioctl(what))?;
        let bytes = nested.as_bytes();
        Ok(Hex(bytes[..bytes.len().min(nested.size as usize)].to_vec()))
    }

    fn restore_nested(&self, saved: &Hex) -> Result<(), Error> {
        let mut nested = Box::new(KvmNestedStateBuffer::empty());
        let len = saved.0.len();
        if let Some(bytes) = nested.as_mut_bytes().get_mut(..len) {
            bytes.copy_from_slice(&saved.0);
        }
        if nested.size as usize != len {
            let why = format_args!("{len} bytes are not as many as it says");
            return Err(Error::State(snapshot::Error::part("the nested state", why)));
        }
        let what = format!("set the nested state (KVM_SET_NESTED_STATE) of vCPU {}", self.index);
        self.fd.set_nested_state(&nested).map_err(Error::ioctl(what))
    }

    fn save_msrs(&self, numbers: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
        let mut saved = Vec::with_capacity(numbers.len());
        let mut left = numbers;
        while !left.is_empty() {
            let some = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<_> =
                some.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries).expect("no more than KVM_MAX_MSR_ENTRIES");
            let read = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(Error::ioctl(format!("read the MSRs of vCPU {} (KVM_GET_MSRS)", self.index)))?;
            saved.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
            // It stops at one that this guest does not have.
            left = &left[(read + usize::from(read < some.len()))..];
        }
        Ok(saved)
    }

    /// Puts the vCPU where one was when it was saved. `elapsed` is how many nanoseconds the counters have to be ahead of
    /// that, and `extent` what [`Vm::extent`] gives.
    pub fn restore(&self, state: &VcpuState, elapsed: u64, extent: &Extent) -> Result<(), Error> {
        let fail = |what: &str| Error::ioctl(format!("set the {what} of vCPU {}", self.index));
        let fd = &self.fd;
        self.restore_frequency(state.tsc_khz)?;
        // It may wait to be started: what else is set must not start it.
        fd.set_mp_state(kvm_mp_state { mp_state: state.mp_state }).map_err(fail("state (KVM_SET_MP_STATE)"))?;
        // Its APIC base says how the local APIC is to be read.
        fd.set_sregs(&value(&state.sregs, "the special registers")?)
            .map_err(fail("special registers (KVM_SET_SREGS)"))?;
        self.restore_xsave(&state.xsave, extent.xsave)?;
        let xcrs: kvm_bindings::kvm_xcrs = value(&state.xcrs, "the extended control registers")?;
        if xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&xcrs).map_err(fail("extended control registers (KVM_SET_XCRS)"))?;
        }
        fd.set_debug_regs(&value(&state.debug_regs, "the debug registers")?)
            .map_err(fail("debug registers (KVM_SET_DEBUGREGS)"))?;
        fd.set_lapic(&value(&state.lapic, "the local APIC")?).map_err(fail("local APIC (KVM_SET_LAPIC)"))?;
        // The local APIC's mode of timer is known now, which a deadline needs, and the deadline comes after the counter.
        let ahead = u64::try_from(u128::from(elapsed) * u128::from(state.tsc_khz) / 1_000_000).unwrap_or(0);
        let (deadline, others): (Vec<_>, Vec<_>) =
            state.msrs.iter().copied().partition(|(number, _)| *number == IA32_TSC_DEADLINE);
        let (tsc, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|(number, _)| *number == IA32_TSC);
        let tsc = tsc.into_iter().map(|(number, value)| (number, value.wrapping_add(ahead)));
        self.restore_msrs(tsc.chain(others).chain(deadline).collect())?;
        // It takes the control registers, and what the MSRs allow it, for those of the guest's guest, if that runs.
        state.nested.as_ref().map_or(Ok(()), |nested| self.restore_nested(nested))?;
        fd.set_regs(&value(&state.regs, "the registers")?).map_err(fail("registers (KVM_SET_REGS)"))?;
        // After the registers, whose setting takes back what is pending.
        fd.set_vcpu_events(&value(&state.events, "the pending events")?)
            .map_err(fail("pending events (KVM_SET_VCPU_EVENTS)"))?;
        self.tell_pause();
        Ok(())
    }

    fn restore_frequency(&self, khz: u32) -> Result<(), Error> {
        let here = self.fd.get_tsc_khz().unwrap_or(0);
        let apart = u64::from(here.abs_diff(khz)) * 1_000_000;
        if khz == 0 || apart <= u64::from(here) * TSC_TOLERANCE {
            return Ok(());
        }
        self.fd.set_tsc_khz(khz).map_err(Error::ioctl(format!(
            "have the time-stamp counter of vCPU {} run at {khz} kHz, as where it was saved, and not at the {here} kHz of \
             this host (KVM_SET_TSC_KHZ)",
            self.index
        )))
    }

    fn restore_msrs(&self, msrs: Vec<(u32, u64)>) -> Result<(), Error> {
        if msrs.len() > MAX_MSRS {
            let what = format!("the MSRs of vCPU {}", self.index);
            return Err(Error::State(snapshot::Error::part(what, format_args!("there are {} of them", msrs.len()))));
        }
        let mut left = &msrs[..];
        while let [first, ..] = left {
            let some = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
            let entry = |(index, data): &(u32, u64)| kvm_msr_entry { index: *index, data: *data, ..Default::default() };
            let entries: Vec<_> = some.iter().map(entry).collect();
            let entries = Msrs::from_entries(&entries).expect("no more than KVM_MAX_MSR_ENTRIES");
            let what = |number: u32| format!("set the MSR {number:#x} of vCPU {} (KVM_SET_MSRS)", self.index);
            let set = self.fd.set_msrs(&entries).map_err(Error::ioctl(what(first.0)))?;
            left = &left[set..];
            if set < some.len() {
                // It stops at one that cannot be set. One that reads as 0 may be of a feature that is not there.
                let (number, value) = left[0];
                if value != 0 {
                    let source = io::Error::other(format!("KVM does not take {value:#x}"));
                    return Err(Error::Ioctl { what: what(number), source });
                }
                left = &left[1..];
            }
        }
        Ok(())
    }
}

impl VcpuState {
    /// The CPUID that the vCPU has.
    pub(super) fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let size = size_of::<kvm_cpuid_entry2>();
        self.cpuid.0.chunks(size).map(|entry| value(&Hex(entry.to_vec()), "the CPUID")).collect()
    }
}

impl Vm {
    /// The CPU that the machine runs on.
    pub fn cpu(&self) -> Cpu {
        Cpu::of(self.cpuid.as_slice())
    }

    /// What KVM has of the state of a vCPU on this host, with `more` MSRs than it lists.
    pub fn extent(&self, more: impl Iterator<Item = u32>) -> Result<Extent, Error> {
        let list = self.kvm.get_msr_index_list().map_err(Error::ioctl("list the MSRs (KVM_GET_MSR_INDEX_LIST)"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.extend(unlisted_msrs().chain(more).filter(|number| !list.as_slice().contains(number)));
        let number = |cap| usize::try_from(self.fd.check_extension_int(cap)).unwrap_or(0);
        // Without the capability it is the struct's.
        Ok(Extent { msrs, xsave: number(Cap::Xsave2), nested: number(Cap::NestedState) > 0 })
    }

    /// KVM's clock, in nanoseconds, and the host's.
    pub fn clock(&self) -> Result<Clock, Error> {
        let clock = self.fd.get_clock().map_err(Error::ioctl("read the clock (KVM_GET_CLOCK)"))?.clock;
        Ok(Clock { clock, time: now() })
    }

    /// The state of interrupt controllers and timer, with what [`clock`](Self::clock) gave before the vCPUs were saved, so that
    /// none of their time-stamp counters ever goes back. No vCPU runs.
    pub fn save(&self, Clock { clock, time }: Clock) -> Result<VmState, Error> {
        let mut chips = Vec::new();
        let mut pit = None;
        if !self.x2apic {
            for chip_id in CHIPS {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                self.fd
                    .get_irqchip(&mut chip)
                    .map_err(Error::ioctl("read an interrupt controller (KVM_GET_IRQCHIP)"))?;
                chips.push(hex(&chip));
            }
            pit = Some(hex(&self.fd.get_pit2().map_err(Error::ioctl("read the timer (KVM_GET_PIT2)"))?));
        }
        Ok(VmState { chips, pit, clock, time })
    }

    /// Puts interrupt controllers and timer where they were, and the clock `elapsed` nanoseconds ahead.
    pub fn restore(&self, state: &VmState, elapsed: u64) -> Result<(), Error> {
        let (chips, timers) = if self.x2apic { (&[][..], 0) } else { (&CHIPS[..], 1) };
        let (saved_chips, saved_timers) = (state.chips.len(), usize::from(state.pit.is_some()));
        if (saved_chips, saved_timers) != (chips.len(), timers) {
            let (what, chips) = ("the interrupt controllers and the timer", chips.len());
            let why =
                format_args!("there are {saved_chips} and {saved_timers}, and this machine has {chips} and {timers}");
            return Err(Error::State(snapshot::Error::part(what, why)));
        }
        for (chip, chip_id) in state.chips.iter().zip(chips) {
            let what = "an interrupt controller";
            let chip: kvm_irqchip = value(chip, what)?;
            if chip.chip_id != *chip_id {
                let why = format_args!("it is number {}, and {chip_id} comes here", chip.chip_id);
                return Err(Error::State(snapshot::Error::part(what, why)));
            }
            self.fd.set_irqchip(&chip).map_err(Error::ioctl("set an interrupt controller (KVM_SET_IRQCHIP)"))?;
        }
        if let Some(pit) = &state.pit {
            let pit = value(pit, "the timer")?;
            self.fd.set_pit2(&pit).map_err(Error::ioctl("set the timer (KVM_SET_PIT2)"))?;
        }
        let clock = kvm_clock_data { clock: state.clock.saturating_add(elapsed), ..Default::default() };
        self.fd.set_clock(&clock).map_err(Error::ioctl("set the clock (KVM_SET_CLOCK)"))
    }

    /// Creates a vCPU with the CPUID of one that was saved; its other state comes with [`Vcpu::restore`].
    pub fn create_saved_vcpu(&self, index: u32, state: &VcpuState) -> Result<Vcpu, Error> {
        self.create_vcpu_with(index, &state.cpuid()?)
    }
}

impl VmState {
    /// How many nanoseconds ago that was, by the host's clock; none if it was set back.
    pub fn elapsed(&self) -> u64 {
        now().saturating_sub(self.time)
    }
}
