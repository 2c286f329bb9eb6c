//! A limit of the CPU time that a machine's vCPUs take, without privileges: a timer of each vCPU thread's own CPU time has
//! it leave the guest when its share is used up, and it waits until there is more.
//!
//! What the threads of devices take is not counted.

#![expect(unsafe_code, reason = "timers of CPU time have no safe wrapper here")]

use std::io;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often there is new CPU time.
const PERIOD: Duration = Duration::from_millis(100);
/// How much of it a vCPU takes at once: so that of several each gets some.
const SLICE: Duration = Duration::from_millis(10);
/// A timer that finds the thread outside of the guest tries again.
const AGAIN: Duration = Duration::from_millis(2);

/// The CPU time that all vCPUs of a machine have together.
#[derive(Debug)]
pub struct Budget {
    /// Nanoseconds for each period.
    quota: i64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When there is new time.
    next: Instant,
    /// Nanoseconds that are left until then. What was taken too much is owed.
    left: i64,
}

impl Budget {
    /// A budget of so many percent of one CPU.
    pub fn new(percent: u32) -> Self {
        let quota = nanoseconds(PERIOD) / 100 * i64::from(percent);
        Self { quota, state: Mutex::new(State { next: Instant::now() + PERIOD, left: quota }) }
    }

    /// Charges what was `used` of the last slice, beyond it too, and takes the next; `Err` is how long to wait for it.
    fn take(&self, now: Instant, granted: Duration, used: Duration) -> Result<Duration, Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.left += nanoseconds(granted) - nanoseconds(used);
        if let Some(late) = now.checked_duration_since(state.next) {
            let periods = late.as_nanos() / PERIOD.as_nanos() + 1;
            let periods = u32::try_from(periods).unwrap_or(u32::MAX);
            let more = self.quota.saturating_mul(periods.into());
            // What is not used does not gather.
            state.left = state.left.saturating_add(more).min(self.quota);
            state.next += PERIOD * periods;
        }
        if state.left <= 0 {
            return Err(state.next.saturating_duration_since(now));
        }
        let slice = SLICE.min(Duration::from_nanos(state.left.unsigned_abs()));
        state.left -= nanoseconds(slice);
        Ok(slice)
    }
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// What one vCPU has of a budget. It belongs to the vCPU's thread.
pub(super) struct Throttle {
    budget: std::sync::Arc<Budget>,
    timer: libc::timer_t,
    granted: Duration,
    /// What the thread had used when it was granted that.
    since: Duration,
}

impl Throttle {
    /// For this thread, which `signal` has leave the guest.
    pub fn new(budget: std::sync::Arc<Budget>, signal: i32) -> io::Result<Self> {
        // SAFETY: all zeros is a valid sigevent.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = rustix::thread::gettid().as_raw_nonzero().get();
        let mut timer = MaybeUninit::uninit();
        // SAFETY: both point to what the call expects.
        let made = unsafe { libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &mut event, timer.as_mut_ptr()) };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: timer_create has written it.
        let timer = unsafe { timer.assume_init() };
        Ok(Self { budget, timer, granted: Duration::ZERO, since: used() })
    }

    /// Goes on with the slice, or with the next; else how long to wait for one.
    pub fn wait(&mut self) -> Option<Duration> {
        let now = used();
        let used = now.saturating_sub(self.since);
        if used < self.granted {
            return None;
        }
        let taken = self.budget.take(Instant::now(), self.granted, used);
        (self.granted, self.since) = (taken.unwrap_or_default(), now);
        if let Ok(slice) = taken {
            self.set(slice);
        }
        taken.err()
    }

    fn set(&self, slice: Duration) {
        let time = |duration: Duration| libc::timespec {
            tv_sec: duration.as_secs().cast_signed(),
            tv_nsec: duration.subsec_nanos().into(),
        };
        let times = libc::itimerspec { it_interval: time(AGAIN), it_value: time(slice) };
        // SAFETY: the timer is this one's, and `times` outlives the call.
        unsafe { libc::timer_settime(self.timer, 0, &times, std::ptr::null_mut()) };
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // SAFETY: the timer is this one's, and not used after this.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// The CPU time that this thread has used.
fn used() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it is written to. rustix would first look for the vDSO, on kernels before Linux 6.4 in a file, which a thread in
    // a sandbox may not open.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_period_has_its_quota_and_no_more() {
        let budget = Budget::new(25);
        let start = budget.state.lock().unwrap().next - PERIOD;
        let taken: Vec<_> = (0..4).map(|_| budget.take(start, Duration::ZERO, Duration::ZERO)).collect();
        assert_eq!(taken, [Ok(10 * MS), Ok(10 * MS), Ok(5 * MS), Err(100 * MS)]);
        // What was used too much is paid in the next period, and what is left of one is not kept.
        assert_eq!(budget.take(start + 70 * MS, 5 * MS, 25 * MS), Err(30 * MS));
        assert_eq!(budget.take(start + 100 * MS, Duration::ZERO, Duration::ZERO), Ok(5 * MS));
        assert_eq!(budget.take(start + 100 * MS, 5 * MS, 5 * MS), Err(100 * MS));
        assert_eq!(budget.take(start + 1000 * MS, Duration::ZERO, Duration::ZERO), Ok(10 * MS));
        assert_eq!(budget.take(start + 1000 * MS, 10 * MS, 10 * MS), Ok(10 * MS));
        assert_eq!(budget.take(start + 1000 * MS, 10 * MS, 10 * MS), Ok(5 * MS));
        assert_eq!(budget.take(start + 1000 * MS, 5 * MS, 5 * MS), Err(100 * MS));
    }

    #[test]
    fn a_thread_that_never_rests_has_to_wait() {
        let signal = crate::signal::kick_signal().unwrap();
        let budget = std::sync::Arc::new(Budget::new(10));
        let mut throttle = Throttle::new(budget, signal).unwrap();
        let (begin, mut waits) = (Instant::now(), 0);
        let before = used();
        while waits < 5 {
            if let Some(wait) = throttle.wait() {
                waits += 1;
                std::thread::sleep(wait);
            }
        }
        let (used, elapsed) = (used() - before, begin.elapsed());
        // 10% of each period, and of the first one a bit more.
        assert!(used.as_secs_f64() <= 0.1 * elapsed.as_secs_f64() + 0.03, "{used:?} of {elapsed:?}");
    }
}
