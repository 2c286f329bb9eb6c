//! How far a long task is, on standard error if that is a terminal.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bantam::image::Progress;

/// The line is written as often as an eye sees it change.
const INTERVAL: Duration = Duration::from_millis(100);
/// How much of what is being done is shown, in characters.
const WHAT: usize = 40;
/// The length of a full bar.
const BAR: usize = 20;

/// One line that is written over and over, and is gone at the end.
#[derive(Default)]
pub struct ProgressLine(Mutex<Option<Part>>);

struct Part {
    what: String,
    done: u64,
    bytes: Option<u64>,
    shown: Option<Instant>,
}

impl ProgressLine {
    fn part(&self) -> MutexGuard<'_, Option<Part>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for ProgressLine {
    fn begin(&self, what: &str, bytes: Option<u64>) {
        if io::stderr().is_terminal() {
            // A name may come from a registry.
            let what = what.chars().filter(|c| !c.is_control()).take(WHAT).collect();
            *self.part() = Some(Part { what, done: 0, bytes, shown: None });
            self.advance(0);
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(part) = &mut *self.part() {
            part.done += bytes;
            if part.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
                part.shown = Some(Instant::now());
                write(&part.line());
            }
        }
    }

    fn end(&self) {
        if self.part().take().is_some() {
            write("");
        }
    }
}

impl Part {
    fn line(&self) -> String {
        let mib = |bytes: u64| format!("{}.{} MiB", bytes >> 20, ((bytes % (1 << 20)) * 10) >> 20);
        let Some(bytes) = self.bytes else { return format!("{}: {}", self.what, mib(self.done)) };
        let steps = u128::from(self.done.min(bytes)) * BAR as u128 / u128::from(bytes.max(1));
        let bar = &"####################"[..usize::try_from(steps).unwrap_or(BAR)];
        format!("{}: [{bar:BAR$}] {} of {}", self.what, mib(self.done), mib(bytes))
    }
}

/// Writes `line` in place of the one that is there. If that cannot be written nobody sees it.
fn write(line: &str) {
    let _ = io::stderr().write_all(format!("\r\x1b[K{line}").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_says_how_far_it_is() {
        let part = |done, bytes| Part { what: "layer".into(), done, bytes, shown: None }.line();
        assert_eq!(part(0, None), "layer: 0.0 MiB");
        assert_eq!(part((1 << 20) + (1 << 19), Some(20 << 20)), "layer: [#                   ] 1.5 MiB of 20.0 MiB");
        assert_eq!(part(3 << 20, Some(2 << 20)), "layer: [####################] 3.0 MiB of 2.0 MiB");
        assert_eq!(part(0, Some(0)), "layer: [                    ] 0.0 MiB of 0.0 MiB");
    }
}
