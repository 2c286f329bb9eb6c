//! How much CPU time a machine may take.

use std::fmt;
use std::str::FromStr;

use crate::text::serde_as_text;

/// The most that can be said, in percent: more CPUs than there are in a host.
const MAX: u32 = 1_000_000;

/// A share of CPU time: a percentage of one CPU, of which there may be more than 100.
///
/// ```
/// use bantam::config::Quota;
/// let quota: Quota = "150%".parse()?;
/// assert_eq!(quota.percent(), 150);
/// # Ok::<(), bantam::config::BadQuota>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota(u32);

/// A text that is no share of CPU time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a percentage of one CPU from 1%, such as 50% or 150%")]
pub struct BadQuota;

impl Quota {
    /// How much of one CPU.
    pub fn percent(self) -> u32 {
        self.0
    }
}

impl FromStr for Quota {
    type Err = BadQuota;

    fn from_str(text: &str) -> Result<Self, BadQuota> {
        let number = text.strip_suffix('%').filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        let percent = number.and_then(|number| number.parse().ok()).filter(|percent| (1..=MAX).contains(percent));
        percent.map(Self).ok_or(BadQuota)
    }
}

serde_as_text!(Quota);

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_a_percentage() {
        for (text, percent) in [("50%", 50), ("1%", 1), ("150%", 150)] {
            let quota: Quota = text.parse().unwrap();
            assert_eq!((quota.percent(), quota.to_string().as_str()), (percent, text));
        }
        for bad in ["", "%", "50", "0%", "-5%", "+5%", "0.5", "1.5%", "5 %", "1000001%", "99999999999%"] {
            assert_eq!(bad.parse::<Quota>(), Err(BadQuota), "{bad}");
        }
        let json = serde_json::to_string(&Quota(50)).unwrap();
        assert_eq!((json.as_str(), serde_json::from_str(&json).ok()), ("\"50%\"", Some(Quota(50))));
    }
}
