//! A serial console that several may watch, beside where it is.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SendFlags, send};

/// Bytes of the past that who comes sees.
const RECENT: usize = 4 << 10;
/// The most who watch at once.
const WATCHERS_MAX: usize = 32;

/// Those who watch a console.
#[derive(Debug, Clone, Default)]
pub struct Watchers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    recent: VecDeque<u8>,
    next: u64,
    all: Vec<(u64, UnixStream)>,
}

impl Watchers {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What writes to `output`, and shows it to those who watch. They are not waited for: one who stalls misses some.
    pub fn tee(&self, output: Box<dyn Write + Send>) -> Box<dyn Write + Send> {
        Box::new(Tee { watchers: self.clone(), output })
    }

    /// Shows `stream` what was last written, and what comes, until it is [removed](Self::remove) by the number returned.
    /// `None` when too many watch.
    pub(super) fn add(&self, stream: UnixStream) -> Option<u64> {
        let mut state = self.state();
        if state.all.len() >= WATCHERS_MAX {
            return None;
        }
        let recent: Vec<u8> = state.recent.iter().copied().collect();
        let _ = send(&stream, &recent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        state.next += 1;
        let number = state.next;
        state.all.push((number, stream));
        Some(number)
    }

    pub(super) fn remove(&self, number: u64) {
        self.state().all.retain(|(it, _)| *it != number);
    }

    fn show(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.recent.extend(bytes);
        let old = state.recent.len().saturating_sub(RECENT);
        state.recent.drain(..old);
        state.all.retain(|(_, stream)| {
            let sent = send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            matches!(sent, Ok(_) | Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR))
        });
    }
}

struct Tee {
    watchers: Watchers,
    output: Box<dyn Write + Send>,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // First: the output may be slow, or gone.
        self.watchers.show(bytes);
        // What was not written comes again, and those who watch have seen it.
        let _ = self.output.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.output.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn who_comes_late_sees_the_last_of_it_and_who_stalls_holds_nobody_up() {
        let watchers = Watchers::default();
        let mut console = watchers.tee(Box::new(io::sink()));
        console.write_all(&[b'a'; RECENT]).unwrap();
        console.write_all(b"b").unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        let (stalled, _stays) = UnixStream::pair().unwrap();
        assert!(watchers.add(here).is_some() && watchers.add(stalled).is_some());
        console.write_all(b"c").unwrap();
        let mut seen = vec![0; RECENT + 1];
        there.read_exact(&mut seen).unwrap();
        assert_eq!((&seen[RECENT - 2..], seen[0]), (&b"abc"[..], b'a'));
        drop(there);
        for _ in 0..1000 {
            console.write_all(&[b'd'; 4096]).unwrap();
        }
        assert_eq!(watchers.state().all.len(), 1, "who went is forgotten");
    }
}
