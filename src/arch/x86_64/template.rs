//! CPU templates: what a guest's CPU has otherwise than KVM would give it, in the format of Firecracker's custom CPU
//! templates.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::text::serde_as_text;

/// Changes of a guest's CPU.
///
/// ```
/// use bantam::arch::x86_64::template::Template;
/// // Without RDRAND: CPUID.1:ECX, bit 30.
/// let template: Template = serde_json::from_str(r#"{"cpuid_modifiers": [{
///     "leaf": "0x1", "subleaf": "0x0", "flags": 0,
///     "modifiers": [{"register": "ecx", "bitmap": "0bx0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]
/// }]}"#)?;
/// assert_eq!(template.cpuid_modifiers[0].modifiers[0].bitmap.apply(u64::MAX), !(1 << 30));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuTemplate"))]
pub struct Template {
    /// Capabilities of KVM (`KVM_CAP_*`) that the host must have, by their numbers. After a `!` it need not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kvm_capabilities: Vec<Capability>,
    /// What CPUID says.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// What model specific registers have when the guest starts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A change of a leaf of CPUID, which KVM must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CpuidModifier {
    /// The leaf: EAX when CPUID is executed.
    pub leaf: Number,
    /// The subleaf: ECX; 0 for leaves without.
    pub subleaf: Number,
    /// `KVM_CPUID_FLAG_*`: 1 if the subleaf counts.
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of what CPUID gives in a register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RegisterModifier {
    /// The register.
    pub register: Register,
    /// The change.
    pub bitmap: Bitmap<32>,
}

/// A register that CPUID fills in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "these are names of registers")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model specific register, which KVM must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MsrModifier {
    /// Its number.
    pub addr: Number,
    /// The change.
    pub bitmap: Bitmap<64>,
}

/// Why a host cannot have such a CPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The host's KVM is another one.
    #[error("cannot use the CPU template: KVM on this host does not have the capability {0}")]
    Capability(u32),
    /// There is no such leaf.
    #[error("cannot use the CPU template: KVM on this host does not have CPUID leaf {0:#x}, subleaf {1:#x}")]
    Leaf(u32, u32),
    /// There is no such register.
    #[error("cannot use the CPU template: KVM on this host does not have the MSR {0:#x}")]
    Msr(u32),
    /// The register cannot have that value.
    #[error("cannot use the CPU template: KVM on this host does not take {value:#x} for the MSR {addr:#x}")]
    Value {
        /// The register's number.
        addr: u32,
        /// What it was to have.
        value: u64,
    },
}

impl Template {
    /// Changes what KVM supports of CPUID.
    ///
    /// # Errors
    /// When that does not have a leaf that is to be changed.
    pub fn apply(&self, supported: &mut CpuId) -> Result<(), Error> {
        for CpuidModifier { leaf, subleaf, flags, modifiers } in &self.cpuid_modifiers {
            let is_it = |entry: &&mut kvm_cpuid_entry2| (entry.function, entry.index) == (leaf.0, subleaf.0);
            let entry = supported.as_mut_slice().iter_mut().find(is_it).ok_or(Error::Leaf(leaf.0, subleaf.0))?;
            entry.flags = *flags;
            for RegisterModifier { register, bitmap } in modifiers {
                let value = match register {
                    Register::Eax => &mut entry.eax,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                *value = u32::try_from(bitmap.apply((*value).into())).expect("it changes the lower 32 bits");
            }
        }
        Ok(())
    }
}

/// Text that is none of those below.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}")]
pub struct BadText {
    text: String,
    what: &'static str,
}

/// A number of 32 bits: decimal, or after `0x` or `0b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number(pub u32);

impl FromStr for Number {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let (digits, radix) = match text.split_at_checked(2) {
            Some(("0x", digits)) => (digits, 16),
            Some(("0b", digits)) => (digits, 2),
            _ => (text, 10),
        };
        // What Rust reads may have a sign.
        let number = u32::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'));
        let what = "number of 32 bits: write it like 0x10a, 0b101 or 266";
        number.map(Self).ok_or_else(|| BadText { text: text.to_owned(), what })
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

serde_as_text!(Number);

/// A capability of KVM: its number, after `!` if it need not be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// `KVM_CAP_*`.
    pub number: u32,
    /// Whether the host must have it.
    pub needed: bool,
}

impl FromStr for Capability {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let (digits, needed) = text.strip_prefix('!').map_or((text, true), |digits| (digits, false));
        let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
        let what = "capability of KVM: write its number, like 121, or !121";
        number.map(|number| Self { number, needed }).ok_or_else(|| BadText { text: text.to_owned(), what })
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.needed { "" } else { "!" }, self.number)
    }
}

serde_as_text!(Capability);

/// A change of bits: `0b` and a digit for each, the highest first: `0` clears it, `1` sets it, `x` leaves it. Those that
/// are left out at the front stay, and `_` may be anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bitmap<const BITS: usize> {
    changed: u64,
    value: u64,
}

impl<const BITS: usize> Bitmap<BITS> {
    /// The value with these changes.
    pub fn apply(self, value: u64) -> u64 {
        value & !self.changed | self.value
    }

    fn read(digits: &str) -> Option<Self> {
        let mut bitmap = Self { changed: 0, value: 0 };
        let mut count = 0;
        for digit in digits.bytes().filter(|digit| *digit != b'_') {
            let (changed, value) = match digit {
                b'0' => (1, 0),
                b'1' => (1, 1),
                b'x' => (0, 0),
                _ => return None,
            };
            bitmap = Self { changed: bitmap.changed << 1 | changed, value: bitmap.value << 1 | value };
            count += 1;
        }
        (1..=BITS).contains(&count).then_some(bitmap)
    }
}

impl<const BITS: usize> FromStr for Bitmap<BITS> {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let what = "bitmap: write 0b and a 0, a 1 or an x for each bit that the register has, the highest first";
        text.strip_prefix("0b").and_then(Self::read).ok_or_else(|| BadText { text: text.to_owned(), what })
    }
}

impl<const BITS: usize> fmt::Display for Bitmap<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        (0..BITS).rev().try_for_each(|bit| {
            f.write_str(match (self.changed >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })
        })
    }
}

serde_as_text!(Bitmap<32>);
serde_as_text!(Bitmap<64>);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn leaves_are_changed_and_those_that_are_not_there_are_refused() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ecx: 0b1100, edx: 7, ..Default::default() };
        let mut supported = CpuId::from_entries(&[leaf(7, 0), leaf(7, 1)]).unwrap();
        let template = |subleaf: &str| -> Template {
            let text = r#"{"cpuid_modifiers": [{"leaf": "0b111", "subleaf": "SUB", "flags": 1,
                "modifiers": [{"register": "ecx", "bitmap": "0b0x_1"}, {"register": "eax", "bitmap": "0b1"}]}]}"#;
            serde_json::from_str(&text.replace("SUB", subleaf)).unwrap()
        };
        template("1").apply(&mut supported).unwrap();
        let found = supported.as_slice();
        assert_eq!(found[0], leaf(7, 0));
        assert_eq!(found[1], kvm_cpuid_entry2 { ecx: 0b1001, eax: 1, flags: 1, ..leaf(7, 1) });
        assert_eq!(template("0x2").apply(&mut supported), Err(Error::Leaf(7, 2)));
    }

    #[test]
    fn what_is_no_change_is_refused() {
        for text in ["", "0b", "0x1", "0b2", "0b_", "1", &format!("0b{}", "x".repeat(33))] {
            assert!(text.parse::<Bitmap<32>>().is_err(), "{text}");
        }
        assert!(format!("0b{}", "x_".repeat(64)).parse::<Bitmap<64>>().is_ok());
        for text in ["", "0x", "0b3", "+1", "0x+1", "-1", "4294967296", "0X1", "é"] {
            assert!(text.parse::<Number>().is_err(), "{text}");
        }
        for text in ["", "!", "!!1", "+1", "x"] {
            assert!(text.parse::<Capability>().is_err(), "{text}");
        }
        assert_eq!("!121".parse::<Capability>().unwrap(), Capability { number: 121, needed: false });
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read(bits in "[01x]{1,32}", number: u32, needed: bool, value: u32) {
            let bitmap: Bitmap<32> = format!("0b{bits}").parse().unwrap();
            prop_assert_eq!(bitmap.to_string().parse(), Ok(bitmap));
            let applied = bitmap.apply(value.into());
            for (at, bit) in bits.bytes().rev().enumerate() {
                let expected = match bit { b'0' => 0, b'1' => 1, _ => value >> at & 1 };
                prop_assert_eq!(applied >> at & 1, u64::from(expected));
            }
            prop_assert_eq!(Number(number).to_string().parse(), Ok(Number(number)));
            let capability = Capability { number, needed };
            prop_assert_eq!(capability.to_string().parse(), Ok(capability));
        }
    }
}
