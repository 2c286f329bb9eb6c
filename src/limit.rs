//! How much may be done in a time: as people write it, `50M` or `1M/100ms+64M`, and the token buckets that keep to it.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::duration;
use crate::size::Size;
use crate::text::serde_as_text;

/// So many bytes, or operations, in a time. It is what a token bucket holds, and how fast that is filled.
///
/// As text it is `SIZE[/TIME][+BURST]`, with a time of a second unless it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// How many may be done at once when nothing was done for a while.
    pub size: NonZeroU64,
    /// How long it takes until as many may be done again.
    pub refill: Duration,
    /// How many more may be done once, before any of the others.
    pub burst: u64,
}

/// The time that is not told.
const SECOND: Duration = Duration::from_secs(1);

impl Limit {
    /// So many in a second.
    pub fn per_second(size: NonZeroU64) -> Self {
        Self { size, refill: SECOND, burst: 0 }
    }
}

/// Text that is no [`Limit`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no limit: {why}; write it like 50M or 200, in a second, or 1M/100ms, and after + what may pass once"
)]
pub struct BadLimit {
    text: String,
    why: String,
}

impl FromStr for Limit {
    type Err = BadLimit;

    fn from_str(text: &str) -> Result<Self, BadLimit> {
        let bad = |why: String| BadLimit { text: text.to_owned(), why };
        let size = |text: &str| text.parse::<Size>().map_err(|error| bad(error.why().to_owned()));
        let (rate, burst) = text.split_once('+').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let (held, time) = rate.split_once('/').map_or((rate, None), |(held, time)| (held, Some(time)));
        let refill = time.map(duration::parse).transpose().map_err(|error| bad(error.to_string()))?;
        Ok(Self {
            size: NonZeroU64::new(size(held)?.get()).expect("no text is a size of zero"),
            refill: refill.unwrap_or(SECOND),
            burst: burst.map(size).transpose()?.map_or(0, Size::get),
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size::bytes(self.size.get()).fmt(f)?;
        if self.refill != SECOND {
            write!(f, "/{}", duration::text(self.refill))?;
        }
        if self.burst > 0 {
            write!(f, "+{}", Size::bytes(self.burst))?;
        }
        Ok(())
    }
}

serde_as_text!(Limit);

/// Limits to the guest and from it. As text one [`Limit`] for each of them, or two with a colon between: `10M:1M`, `10M:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directions {
    /// To the guest.
    pub rx: Option<Limit>,
    /// From the guest.
    pub tx: Option<Limit>,
}

impl Directions {
    /// Limits of these directions; `None` if neither has one.
    pub fn new(rx: Option<Limit>, tx: Option<Limit>) -> Option<Self> {
        (rx.is_some() || tx.is_some()).then_some(Self { rx, tx })
    }
}

impl FromStr for Directions {
    type Err = BadLimit;

    fn from_str(text: &str) -> Result<Self, BadLimit> {
        let limit = |text: &str| (!text.is_empty()).then(|| text.parse()).transpose();
        let (rx, tx) = text.split_once(':').unwrap_or((text, text));
        Self::new(limit(rx)?, limit(tx)?).ok_or_else(|| BadLimit { text: text.to_owned(), why: "it is empty".into() })
    }
}

impl fmt::Display for Directions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |limit: Option<Limit>| limit.map(|limit| limit.to_string()).unwrap_or_default();
        match self.rx == self.tx {
            true => f.write_str(&text(self.rx)),
            false => write!(f, "{}:{}", text(self.rx), text(self.tx)),
        }
    }
}

serde_as_text!(Directions);

/// A token bucket. It is told by when it is full again, which is later than its time from now when it owes something.
///
/// What is done takes its tokens afterwards, and may begin while nothing is owed. So what needs more than the bucket holds is
/// done too; what comes after it waits until the debt is paid.
#[derive(Debug)]
pub struct Bucket {
    limit: Limit,
    /// What is left of the burst.
    burst: u64,
    full_at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(limit: Limit, now: Instant) -> Self {
        Self { limit, burst: limit.burst, full_at: now }
    }

    /// What it keeps to.
    pub fn limit(&self) -> Limit {
        self.limit
    }

    /// How long until it owes nothing.
    pub fn wait(&self, now: Instant) -> Duration {
        self.full_at.saturating_duration_since(now).saturating_sub(self.limit.refill)
    }

    /// Takes what something needed that was done.
    pub fn take(&mut self, tokens: u64, now: Instant) {
        let Limit { size, refill, .. } = self.limit;
        let once = tokens.min(self.burst);
        self.burst -= once;
        let nanoseconds = refill.as_nanos().saturating_mul((tokens - once).into()) / u128::from(size.get());
        let [seconds, rest] = [nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000];
        let seconds = u64::try_from(seconds).unwrap_or(u64::MAX);
        let time = Duration::new(seconds, u32::try_from(rest).expect("less than a second"));
        let from = self.full_at.max(now);
        self.full_at = from.checked_add(time).unwrap_or(from);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(text: &str, now: Instant) -> Bucket {
        Bucket::new(text.parse().unwrap(), now)
    }

    #[test]
    fn a_second_of_it_is_there_at_once_and_then_what_comes_in() {
        let start = Instant::now();
        let mut bucket = bucket("1000", start);
        for _ in 0..10 {
            assert!(bucket.wait(start).is_zero());
            bucket.take(100, start);
        }
        bucket.take(100, start);
        assert_eq!(bucket.wait(start), Duration::from_millis(100));
        let later = start + Duration::from_millis(100);
        assert!(bucket.wait(later).is_zero());
        bucket.take(1, later);
        assert_eq!(bucket.wait(later), Duration::from_millis(1));
        // However long nothing is taken, no more than a second of it gathers.
        let idle = start + Duration::from_secs(3600);
        bucket.take(1500, idle);
        assert_eq!(bucket.wait(idle), Duration::from_millis(500));
    }

    #[test]
    fn a_burst_comes_first_and_never_again() {
        let start = Instant::now();
        let mut bucket = bucket("100/10s+1000", start);
        bucket.take(1000, start);
        bucket.take(100, start);
        assert!(bucket.wait(start).is_zero());
        bucket.take(1, start);
        assert_eq!(bucket.wait(start), Duration::from_millis(100));
        let idle = start + Duration::from_secs(3600);
        bucket.take(110, idle);
        assert_eq!(bucket.wait(idle), Duration::from_secs(1));
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_done_and_paid_for() {
        let start = Instant::now();
        let mut bucket = bucket("1000", start);
        bucket.take(60_000, start);
        assert_eq!(bucket.wait(start), Duration::from_secs(59));
        assert!(bucket.wait(start + Duration::from_secs(59)).is_zero());
        bucket.take(u64::MAX, start);
        assert!(bucket.wait(start) > Duration::from_secs(1 << 50) || bucket.wait(start) == Duration::from_secs(59));
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for text in ["", "0", "1/", "1/0s", "1+", "1+0", "/1s", "1/1s/1s", "1++1", "1M/fast", "99999999T"] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
        for text in [":", "1:fast", "1:2:3"] {
            assert!(text.parse::<Directions>().is_err(), "{text}");
        }
        let error = "fast".parse::<Limit>().unwrap_err().to_string();
        assert!(error.starts_with("`fast` is no limit: it does not start with a number; write it like 50M"), "{error}");
    }

    proptest! {
        #[test]
        fn no_more_passes_than_the_rate_and_one_burst(
            size in 1u64..10_000_000,
            refill in 1u64..10_000,
            burst in 0u64..2_000_000,
            costs in proptest::collection::vec(1u64..1_000_000, 1..50),
        ) {
            let start = Instant::now();
            let refill = Duration::from_millis(refill);
            let mut bucket = Bucket::new(Limit { size: NonZeroU64::new(size).unwrap(), refill, burst }, start);
            let (mut now, mut before) = (start, 0u128);
            for cost in costs {
                now += bucket.wait(now);
                // What was done before this one, and no less than is allowed.
                let time = (now - start).as_nanos() + refill.as_nanos();
                let allowed = u128::from(burst) + u128::from(size) * time / refill.as_nanos();
                prop_assert!(before <= allowed + 500, "{} of {}", before, allowed);
                bucket.take(cost, now);
                before += u128::from(cost);
            }
        }

        #[test]
        fn what_is_printed_is_read(size in 1u64.., refill in 1u64..u64::from(u32::MAX), burst: u64) {
            let size = NonZeroU64::new(size).unwrap();
            let limit = Limit { size, refill: Duration::from_millis(refill), burst };
            prop_assert_eq!(limit.to_string().parse(), Ok(limit));
            for (rx, tx) in [(Some(limit), Some(limit)), (Some(limit), None), (None, Some(limit))] {
                let both = Directions { rx, tx };
                prop_assert_eq!(both.to_string().parse(), Ok(both));
            }
        }
    }
}
