//! What the run loop knows about the guest, and when it looks at it again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Until the vCPUs are first asked whether they have halted for good. Each time after that is twice as far from the last,
/// up to a limit: a guest that halts is noticed after it has stood for as long as it had run, or a minute.
const HALT_LOOK: Duration = Duration::from_secs(1);
const LAST_HALT_LOOK: Duration = Duration::from_secs(60);
/// The same, after "System halted": they halt a moment later.
const ANNOUNCED_HALT_LOOK: Duration = Duration::from_millis(20);

/// What the run loop knows about the guest.
#[derive(Default)]
pub(super) struct Watch {
    pub(super) panic: Option<String>,
    pub(super) panic_end: Option<Instant>,
    pub(super) halt: Option<HaltWatch>,
    pub(super) user_space: bool,
    pub(super) seen_console: bool,
    pub(super) output_ended: bool,
    /// What the kernel last said of a process that it ended for its memory.
    pub(super) out_of_memory: Option<String>,
    /// When `--timeout` is over, and what it is.
    pub(super) time_limit: Option<(Instant, Duration)>,
    /// The same of `--boot-timeout`.
    pub(super) boot_limit: Option<(Instant, Duration)>,
}

impl Watch {
    /// The guest stood still for so long, which counts for nothing.
    pub(super) fn stood_still(&mut self, time: Duration) {
        for limit in [&mut self.time_limit, &mut self.boot_limit] {
            *limit = limit.and_then(|(deadline, limit)| Some((deadline.checked_add(time)?, limit)));
        }
        self.panic_end.iter_mut().for_each(|deadline| *deadline += time);
        self.halt.iter_mut().for_each(|halt| halt.next_look += time);
    }

    /// What comes next, unless the guest stands still.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let limits = [self.time_limit, self.boot_limit.filter(|_| !self.user_space)];
        let halt = self.halt.as_ref().map(|halt| halt.next_look);
        limits.map(|limit| Some(limit?.0)).into_iter().chain([self.panic_end, halt]).flatten().min()
    }
}

/// The next look at the vCPUs, and what came of the last.
pub(super) struct HaltWatch {
    pub(super) next_look: Instant,
    /// From the next look to that after it.
    interval: Duration,
    /// The kernel said that it halts.
    pub(super) announced: bool,
    /// Those that have answered: a late answer to the last look may come before that to this one.
    pub(super) answered: BTreeSet<u32>,
    pub(super) all_stopped: bool,
}

impl HaltWatch {
    /// Of a guest that begins now.
    pub(super) fn from_start(now: Instant) -> Self {
        Self::new(now + HALT_LOOK, HALT_LOOK, false)
    }

    /// Of a kernel that has just said that it halts.
    pub(super) fn announced(now: Instant) -> Self {
        Self::new(now, ANNOUNCED_HALT_LOOK, true)
    }

    fn new(next_look: Instant, interval: Duration, announced: bool) -> Self {
        Self { next_look, interval, announced, answered: BTreeSet::new(), all_stopped: true }
    }

    /// The watch from a look at `now` on.
    pub(super) fn looked(&self, now: Instant) -> Self {
        Self::new(now + self.interval, (2 * self.interval).min(LAST_HALT_LOOK), self.announced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_for_a_halt_become_rare() {
        let begin = Instant::now();
        let mut watch = HaltWatch::from_start(begin);
        let mut looks = vec![];
        for _ in 0..9 {
            looks.push((watch.next_look - begin).as_secs());
            watch = watch.looked(watch.next_look);
        }
        assert_eq!(looks, [1, 2, 4, 8, 16, 32, 64, 124, 184]);
    }

    #[test]
    fn limits_do_not_run_while_the_guest_stands_still() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut watch = Watch {
            time_limit: Some((now + 9 * second, 9 * second)),
            boot_limit: Some((now + 5 * second, 5 * second)),
            halt: Some(HaltWatch::new(now + 7 * second, second, false)),
            ..Default::default()
        };
        watch.stood_still(10 * second);
        assert_eq!(watch.deadline(), Some(now + 15 * second));
        watch.user_space = true;
        assert_eq!(watch.deadline(), Some(now + 17 * second));
        watch.halt = None;
        assert_eq!(watch.deadline(), Some(now + 19 * second));
        assert_eq!(watch.time_limit, Some((now + 19 * second, 9 * second)));
        watch.panic_end = Some(now + second);
        watch.stood_still(second);
        assert_eq!(watch.deadline(), Some(now + 2 * second));
    }
}
