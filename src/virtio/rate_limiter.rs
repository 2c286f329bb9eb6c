//! How much a device may do: token buckets, one for bytes and one for operations, and a timer that tells when more may be
//! done.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::change::Rates;
use super::device::{self, Io};
use crate::limit::Bucket;

/// The shortest time that is waited: a timer for each operation would cost more than the limit is worth.
const SHORTEST: Duration = Duration::from_millis(1);

/// The limits of a device, or of one direction of it.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: OwnedFd,
    waiting: bool,
}

impl RateLimiter {
    /// Keeps to these rates; `None` if nothing is limited.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn new(rates: Rates) -> io::Result<Option<Self>> {
        if rates == Rates::default() {
            return Ok(None);
        }
        let now = Instant::now();
        let [bytes, operations] = [rates.bytes, rates.operations].map(|limit| Some(Bucket::new(limit?, now)));
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Some(Self { bytes, operations, timer, waiting: false }))
    }

    /// Puts a limiter with other rates in the place of `limiter`, and has the device that runs with `io` hear of it as of
    /// `token`. A bucket whose limit stays is as full as it was.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn change(limiter: &mut Option<Self>, rates: Rates, token: u32, io: Option<&mut Io>) -> io::Result<()> {
        let mut new = Self::new(rates)?;
        if let Some(io) = io {
            new.as_ref().map_or(Ok(()), |new| io.watch(token, new, EventFlags::IN))?;
            limiter.as_ref().map_or(Ok(()), |before| io.unwatch(before))?;
        }
        if let (Some(new), Some(before)) = (&mut new, limiter.take()) {
            for (new, before) in [(&mut new.bytes, before.bytes), (&mut new.operations, before.operations)] {
                if new.as_ref().map(Bucket::limit) == before.as_ref().map(Bucket::limit) {
                    *new = before;
                }
            }
        }
        *limiter = new;
        Ok(())
    }

    /// Has the device that runs with `io` hear of it as of `token`.
    ///
    /// # Errors
    /// When the host cannot wait for it.
    pub fn watch(&self, token: u32, io: &Io) -> Result<(), device::Error> {
        let watched = io.watch(token, self, EventFlags::IN);
        watched.map_err(|source| device::Error::Host { what: "cannot watch a timer".into(), source })
    }

    /// The device that runs with `io` is being stopped.
    pub fn unwatch(&self, io: &Io) {
        // A device that could not be started may not have come to that.
        if let Err(error) = io.unwatch(self)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::error!("cannot stop watching a timer: {error}");
        }
    }

    /// Whether one more operation may start. If not, the descriptor becomes readable when it may. Nobody comes before one who waits
    /// for that.
    pub fn allows(&mut self, now: Instant) -> bool {
        if self.waiting {
            return false;
        }
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
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn limiter(bytes: &str, operations: Option<&str>) -> RateLimiter {
        let limit = |text: &str| text.parse().unwrap();
        let rates = Rates { bytes: Some(limit(bytes)), operations: operations.map(limit) };
        RateLimiter::new(rates).unwrap().unwrap()
    }

    #[test]
    fn both_limits_hold() {
        let mut limiter = limiter("1000", Some("10"));
        let start = Instant::now() + Duration::from_secs(10);
        (0..20).for_each(|_| limiter.take(10, start));
        assert_eq!(limiter.wait(start), Duration::from_secs(1));
        limiter.take(3000, start);
        assert_eq!(limiter.wait(start), Duration::from_millis(2200));
        assert!(RateLimiter::new(Rates::default()).unwrap().is_none());
    }

    #[test]
    fn a_bucket_whose_limit_stays_is_as_full_as_it_was() {
        let mut changed = Some(limiter("1000+5000", Some("10")));
        let now = Instant::now();
        (0..15).for_each(|_| changed.as_mut().unwrap().take(400, now));
        let next = Rates { bytes: Some("1000+5000".parse().unwrap()), operations: Some("20".parse().unwrap()) };
        RateLimiter::change(&mut changed, next, 0, None).unwrap();
        let mut changed = changed.unwrap();
        assert_eq!(changed.wait(now), Duration::ZERO);
        changed.take(500, now);
        assert_eq!(changed.wait(now), Duration::from_millis(500), "there is no second burst");
    }

    #[test]
    fn the_descriptor_says_when_there_is_more() {
        let mut limiter = limiter("1M", None);
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
}
