//! Looking for requests for a while before waiting to be notified of them: what comes soon then costs the driver no exit and
//! the device no wake-up.

use std::time::{Duration, Instant};

/// How often at most nothing is looked for after it was in vain.
const SKIPPED_MAX: u32 = 1023;

/// When it pays to look. After each time that nothing came, it is left be twice as often: a driver that lets the device wait,
/// or shares its CPU, costs next to no time.
#[derive(Debug, Default)]
pub struct Polling {
    /// How often it is left be after this time in vain,
    skipped: u32,
    /// and how often it is to be from now on.
    left: u32,
}

impl Polling {
    /// Looks until there is something, for up to `limit`; what there is.
    pub fn look<T>(&mut self, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if limit.is_zero() {
            return None;
        }
        if self.left > 0 {
            self.left -= 1;
            return None;
        }
        let start = Instant::now();
        loop {
            if let Some(found) = look() {
                self.skipped = 0;
                return Some(found);
            }
            if start.elapsed() >= limit {
                self.skipped = (2 * self.skipped + 1).min(SKIPPED_MAX);
                self.left = self.skipped;
                return None;
            }
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_time_is_found() {
        let (mut polling, mut looks) = (Polling::default(), 0);
        let third = || {
            looks += 1;
            (looks == 3).then_some("found")
        };
        assert_eq!(polling.look(Duration::MAX, third), Some("found"));
        assert_eq!(polling.look(Duration::ZERO, || -> Option<()> { panic!("it is off") }), None);
    }

    #[test]
    fn what_does_not_come_is_looked_for_less_and_less() {
        let mut polling = Polling::default();
        let mut times = |count: u32| {
            let mut looked = 0;
            for _ in 0..count {
                let mut found = None;
                polling.look(Duration::from_nanos(1), || {
                    found = Some(());
                    None::<()>
                });
                looked += u32::from(found.is_some());
            }
            looked
        };
        // 1, 2, 4, ... 1024 apart.
        assert_eq!(times(2048), 11);
        assert_eq!(times(10240), 10);
        assert_eq!((0..1023).filter_map(|_| polling.look(Duration::from_nanos(1), || Some(()))).count(), 1);
        assert_eq!((0..10).filter_map(|_| polling.look(Duration::from_nanos(1), || Some(()))).count(), 10);
    }
}
