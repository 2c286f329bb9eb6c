//! The end of a stream, for those who look at it later.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// The last bytes that went through a stream.
///
/// ```
/// use bantam::command::Tail;
/// let mut tail = Tail::new(4);
/// tail.push(b"one");
/// tail.push(b"two");
/// assert_eq!((tail.bytes(), tail.dropped()), (b"etwo".to_vec(), 2));
/// ```
#[derive(Debug)]
pub struct Tail {
    bytes: VecDeque<u8>,
    limit: usize,
    dropped: u64,
}

impl Tail {
    /// One that keeps `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit, dropped: 0 }
    }

    /// Takes what goes through.
    pub fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.limit)..];
        let over = (self.bytes.len() + kept.len()).saturating_sub(self.limit);
        self.bytes.drain(..over);
        self.bytes.extend(kept);
        self.dropped += (bytes.len() - kept.len() + over) as u64;
    }

    /// What is kept.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    /// How many bytes went before that.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// The end of a command's output.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Of its standard output, or of its terminal.
    pub stdout: Arc<Mutex<Tail>>,
    /// Of its standard error.
    pub stderr: Arc<Mutex<Tail>>,
}

impl Kept {
    /// Keeps `limit` bytes of each.
    pub(super) fn new(limit: usize) -> Self {
        let tail = || Arc::new(Mutex::new(Tail::new(limit)));
        Self { stdout: tail(), stderr: tail() }
    }

    /// What there is of standard output and standard error.
    pub fn take(&self) -> [Tail; 2] {
        [&self.stdout, &self.stderr].map(|tail| {
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            let limit = tail.limit;
            std::mem::replace(&mut *tail, Tail::new(limit))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_end_is_kept_and_the_rest_counted(pieces: Vec<Vec<u8>>, limit in 0usize..64) {
            let mut tail = Tail::new(limit);
            pieces.iter().for_each(|piece| tail.push(piece));
            let all = pieces.concat();
            let from = all.len().saturating_sub(limit);
            prop_assert_eq!(tail.bytes(), &all[from..]);
            prop_assert_eq!(tail.dropped(), from as u64);
        }
    }
}
