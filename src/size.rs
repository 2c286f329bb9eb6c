//! Sizes as people write them: `512M`, `4G`.

use std::fmt;
use std::str::FromStr;

use crate::text::serde_as_text;

/// A number of bytes, not zero when it came from text. `K`, `M`, `G` and `T` are powers of 1024; `512M`, `512MiB`
/// and `536870912` are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

/// Text that is no [`Size`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no size: {why}; write it like 512M, 4G, 1T, 64K, 512MiB, or in bytes")]
pub struct BadSize {
    text: String,
    why: &'static str,
}

impl BadSize {
    /// What is wrong with it.
    pub fn why(&self) -> &'static str {
        self.why
    }
}

/// The suffixes, the largest first, and how far each shifts.
const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

impl Size {
    /// A size in bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }
    /// A size in MiB; one that does not fit is the largest there is.
    pub const fn mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }
    /// A size in GiB; one that does not fit is the largest there is.
    pub const fn gib(gib: u64) -> Self {
        Self(gib.saturating_mul(1 << 30))
    }
    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let bad = |why| BadSize { text: text.to_owned(), why };
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, suffix) = text.split_at(unit_at);
        if digits.is_empty() {
            return Err(bad("it does not start with a number"));
        }
        let unit = suffix.strip_suffix("iB").unwrap_or(suffix);
        let shift = match UNITS.iter().find(|(name, _)| unit.eq_ignore_ascii_case(name)) {
            Some((_, shift)) => *shift,
            None if suffix.is_empty() => 0,
            None => return Err(bad("its unit is not known")),
        };
        let number: u64 = digits.parse().map_err(|_| bad("it is too large"))?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(|| bad("it is too large"))?;
        if bytes == 0 { Err(bad("it is zero")) } else { Ok(Self(bytes)) }
    }
}

/// The shortest exact text: a whole number of the largest unit that divides it.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

serde_as_text!(Size);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_accepted_forms() {
        for (text, bytes) in [
            ("1", 1),
            ("64K", 64 << 10),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512m", 512 << 20),
            ("4G", 4 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn other_text_is_refused_with_the_forms() {
        for text in ["", "M", "12X", "12MB", "1.5G", "-1", "+1", " 1", "0", "0M", "iB", "4iB", "99999999T", "1e3"] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{text}` is no size")) && error.contains("512M, 4G"), "{error}");
        }
        let largest = u64::MAX.to_string();
        assert_eq!(largest.parse(), Ok(Size(u64::MAX)));
        assert!(format!("{largest}0").parse::<Size>().is_err());
    }

    proptest! {
        #[test]
        fn text_round_trips(number in 1u64..1 << 20, shift in 0u32..40) {
            let size = Size(number << shift);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let json = serde_json::to_string(&size).unwrap();
            prop_assert_eq!(serde_json::from_str::<Size>(&json).unwrap(), size);
        }
        #[test]
        fn any_text_is_taken_or_refused(text in "\\PC{0,8}") {
            let _ = text.parse::<Size>();
        }
    }
}
