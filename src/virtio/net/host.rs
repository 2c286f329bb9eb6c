//! The host's end of the cable: what brings the guest's packets further, and where those to it come from.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::passt::Passt;
use super::tap::Tap;
use crate::virtio::iovec::Iovecs;

/// Takes packets and gives packets, each behind the header of virtio 1.2, 5.1.6, and never blocks.
pub trait Host {
    /// Reads a packet into `buffers`, and what they have no room for into `rest`; its length, with the header.
    fn receive(&mut self, buffers: &mut Iovecs, rest: &mut [u8]) -> io::Result<usize>;

    /// Whether a packet may be had by [`receive`](Self::receive) although the descriptor is not readable.
    fn has_more(&self) -> bool {
        false
    }

    /// Takes the packet in `packet`, all of it or, when there is no room, none: then the list is of no use any more.
    fn send(&mut self, packet: &mut Iovecs) -> io::Result<()>;

    /// Brings on its way what was taken and is still here.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Host for Tap {
    fn receive(&mut self, buffers: &mut Iovecs, rest: &mut [u8]) -> io::Result<usize> {
        buffers.readv(self, rest)
    }

    fn send(&mut self, packet: &mut Iovecs) -> io::Result<()> {
        packet.writev(self).map(drop)
    }
}

/// What a card is connected to.
pub enum Backend {
    Tap(Tap),
    User(Passt),
}

impl Backend {
    /// Whether nothing will come from it any more.
    pub fn is_gone(&self) -> bool {
        match self {
            // Reading or writing it says so.
            Self::Tap(_) => false,
            Self::User(passt) => passt.is_gone(),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(tap) => write!(f, "tap {}", tap.name()),
            Self::User(_) => f.write_str("passt"),
        }
    }
}

impl Host for Backend {
    fn receive(&mut self, buffers: &mut Iovecs, rest: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tap(tap) => tap.receive(buffers, rest),
            Self::User(passt) => passt.stream().receive(buffers, rest),
        }
    }

    fn has_more(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.has_more(),
            Self::User(passt) => passt.has_more(),
        }
    }

    fn send(&mut self, packet: &mut Iovecs) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.send(packet),
            Self::User(passt) => passt.stream().send(packet),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.flush(),
            Self::User(passt) => passt.stream().flush(),
        }
    }
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.as_fd(),
            Self::User(passt) => passt.as_fd(),
        }
    }
}
