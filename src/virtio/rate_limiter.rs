//! How much a device may do: token buckets, one for bytes and one for operations, which are filled as fast as the limit
//! says and hold what it allows in a second.
//!
//! An operation may start while there is something in each bucket, and takes what it costs when it is done. So one that is
//! larger than the bucket is done too; what comes after it waits until the debt is paid.

use std::io;
use std::num::{NonZeroU32, NonZeroU64};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::size::Size;

/// How long a bucket takes to fill.
const FULL: Duration = Duration::from_secs(1);
/// The shortest time that is waited: a timer for each operation would cost more than the limit is worth.
const SHORTEST: Duration = Duration::from_millis(1);

/// A token bucket. It is told by when it is full again, which is later than `FULL` from now when it owes something.
#[derive(Debug)]
struct Bucket {
    /// Tokens in a second.
    rate: NonZeroU64,
    full_at: Instant,
}

impl Bucket {
    fn new(rate: NonZeroU64, now: Instant) -> Self {
        Self { rate, full_at: now }
    }

    /// How long until it owes nothing.
    fn wait(&self, now: Instant) -> Duration {
        self.full_at.saturating_duration_since(now).saturating_sub(FULL)
    }

    fn take(&mut self, tokens: u64, now: Instant) {
        let (seconds, rest) = (tokens / self.rate, tokens % self.rate);
        let nanoseconds = u128::from(rest) * 1_000_000_000 / u128::from(self.rate.get());
        let time = Duration::new(seconds, u32::try_from(nanoseconds).expect("less than a second"));
        let from = self.full_at.max(now);
        self.full_at = from.checked_add(time).unwrap_or(from);
    }
}

/// The limits of a device, or of one direction of it.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: OwnedFd,
    waiting: bool,
}

impl RateLimiter {
    /// Allows so many bytes and operations in a second; `None` if neither is limited.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn new(bytes: Option<Size>, operations: Option<NonZeroU32>) -> io::Result<Option<Self>> {
        let now = Instant::now();
        let bytes = bytes.and_then(|size| NonZeroU64::new(size.get())).map(|rate| Bucket::new(rate, now));
        let operations = operations.map(|rate| Bucket::new(rate.into(), now));
        if bytes.is_none() && operations.is_none() {
            return Ok(None);
        }
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Some(Self { bytes, operations, timer, waiting: false }))
    }

    /// Whether one more operation may start. If not, the descriptor becomes readable when it may.
    pub fn allows(&mut self, now: Instant) -> bool {
        let wait = self.wait(now);
        if wait.is_zero() {
            return true;
        }
        let Ok(time) = Timespec::try_from(wait.max(SHORTEST)) else { return true };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: time };
        // Of a timer that cannot be set no one would hear.
        self.waiting = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
        !self.waiting
    }

    fn wait(&self, now: Instant) -> Duration {
        [&self.bytes, &self.operations].into_iter().flatten().map(|bucket| bucket.wait(now)).max().unwrap_or_default()
    }

    /// An operation of so many bytes was done.
    pub fn take(&mut self, bytes: u64, now: Instant) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            bucket.iter_mut().for_each(|bucket| bucket.take(tokens, now));
        }
    }

    /// Whether an operation waits for the descriptor to be readable.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// The descriptor was readable.
    pub fn woken(&mut self) {
        // It says how often the timer ran out.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.waiting = false;
    }
}

impl AsFd for RateLimiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn bucket(rate: u64, now: Instant) -> Bucket {
        Bucket::new(NonZeroU64::new(rate).unwrap(), now)
    }

    #[test]
    fn a_second_of_it_is_there_at_once_and_then_what_comes_in() {
        let start = Instant::now();
        let mut bucket = bucket(1000, start);
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
    fn what_is_larger_than_the_bucket_is_done_and_paid_for() {
        let start = Instant::now();
        let mut bucket = bucket(1000, start);
        bucket.take(60_000, start);
        assert_eq!(bucket.wait(start), Duration::from_secs(59));
        assert!(bucket.wait(start + Duration::from_secs(59)).is_zero());
        bucket.take(u64::MAX, start);
        assert!(bucket.wait(start) > Duration::from_secs(1 << 50) || bucket.wait(start) == Duration::from_secs(59));
    }

    #[test]
    fn both_limits_hold() {
        let mut limiter = RateLimiter::new(Some(Size::bytes(1000)), NonZeroU32::new(10)).unwrap().unwrap();
        let start = Instant::now() + Duration::from_secs(10);
        (0..20).for_each(|_| limiter.take(10, start));
        assert_eq!(limiter.wait(start), Duration::from_secs(1));
        limiter.take(3000, start);
        assert_eq!(limiter.wait(start), Duration::from_millis(2200));
        assert!(RateLimiter::new(None, None).unwrap().is_none());
    }

    #[test]
    fn the_descriptor_says_when_there_is_more() {
        let mut limiter = RateLimiter::new(Some(Size::mib(1)), None).unwrap().unwrap();
        let now = Instant::now();
        assert!(limiter.allows(now) && !limiter.is_waiting());
        limiter.take((1 << 20) + 1000, now);
        assert!(!limiter.allows(now) && limiter.is_waiting());
        assert_eq!(poll(&mut [PollFd::new(&limiter, PollFlags::IN)], None), Ok(1));
        limiter.woken();
        assert!(!limiter.is_waiting());
        let timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&limiter, PollFlags::IN)], Some(&timeout)), Ok(0));
    }

    proptest! {
        #[test]
        fn no_more_passes_than_the_rate_and_one_burst(
            rate in 1u64..10_000_000,
            costs in proptest::collection::vec(1u64..1_000_000, 1..50),
        ) {
            let start = Instant::now();
            let mut bucket = bucket(rate, start);
            let (mut now, mut before) = (start, 0u128);
            for cost in costs {
                now += bucket.wait(now);
                // What was done before this one, and no less than is allowed.
                let allowed = u128::from(rate) * ((now - start).as_nanos() + FULL.as_nanos()) / 1_000_000_000;
                prop_assert!(before <= allowed + 50, "{} of {}", before, allowed);
                bucket.take(cost, now);
                before += u128::from(cost);
            }
        }
    }
}
