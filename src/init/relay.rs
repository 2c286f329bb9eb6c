//! Bytes on their way between the command's pipes or terminal and the host.

use alloc::vec;
use alloc::vec::Vec;

use crate::sys::{self, EAGAIN, EINTR, Fd, POLLIN, POLLOUT, PollFd};

/// Bytes that a relay holds at most.
const BUFFER: usize = 64 << 10;

/// What to do with the descriptor that is written to, when all is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The command's standard input: its reader sees the end.
    Close,
    /// A socket to the host.
    ShutDown,
    /// The terminal, which is both ways.
    Leave,
}

/// One direction.
pub struct Relay {
    from: Option<Fd>,
    to: Option<Fd>,
    end: End,
    buffer: Vec<u8>,
    start: usize,
    filled: usize,
}

impl Relay {
    /// Both descriptors become nonblocking.
    pub fn new(from: Fd, to: Fd, end: End) -> sys::Result<Self> {
        sys::set_nonblocking(from)?;
        sys::set_nonblocking(to)?;
        Ok(Self { from: Some(from), to: Some(to), end, buffer: vec![0; BUFFER], start: 0, filled: 0 })
    }

    /// Whether there is nothing more to do.
    pub fn is_done(&self) -> bool {
        self.to.is_none()
    }

    /// What to wait for: the descriptor that is read, and the one that is written.
    pub fn interests(&self) -> [PollFd; 2] {
        let empty = self.start == self.filled;
        let idle = PollFd { fd: -1, events: 0, ready: 0 };
        let from = self.from.filter(|_| empty).map_or(idle, |fd| PollFd { fd, events: POLLIN, ready: 0 });
        // Also while there is nothing to write, a pipe whose reader went away is told.
        let wanted = if empty { 0 } else { POLLOUT };
        let to = self.to.filter(|_| !empty || self.end == End::Close);
        [from, to.map_or(idle, |fd| PollFd { fd, events: wanted, ready: 0 })]
    }

    /// Moves what can be moved; `ready` is what was waited for.
    pub fn advance(&mut self, ready: [PollFd; 2]) {
        let [from, to] = ready;
        if self.start == self.filled {
            if to.ready != 0 {
                return self.stop();
            }
            match self.from {
                Some(fd) if from.ready != 0 => match sys::read(fd, &mut self.buffer) {
                    Ok(count) if count > 0 => (self.start, self.filled) = (0, count),
                    Err(EAGAIN | EINTR) => {}
                    // The end; a terminal that no program has open any more tells it by an error.
                    _ => return self.finish(),
                },
                _ => return,
            }
        }
        let Some(fd) = self.to else { return };
        while self.start < self.filled {
            match sys::write(fd, &self.buffer[self.start..self.filled]) {
                Ok(count) => self.start += count,
                Err(EAGAIN) => return,
                Err(EINTR) => {}
                Err(_) => return self.stop(),
            }
        }
    }

    /// All was read and written.
    fn finish(&mut self) {
        if let Some(fd) = self.to.filter(|_| self.end == End::ShutDown) {
            sys::shut_down_writing(fd);
        }
        self.stop();
    }

    /// Gives up both ends: who writes gets EPIPE, who reads the end.
    pub fn stop(&mut self) {
        let (from, to) = (self.from.take(), self.to.take());
        if self.end != End::Leave {
            from.into_iter().chain(to).for_each(sys::close);
        }
        (self.start, self.filled) = (0, 0);
    }
}
