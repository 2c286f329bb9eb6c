//! Ethernet frames on a stream socket, each after its length in 4 bytes, big-endian: what QEMU calls `-netdev stream`, and
//! passt speaks.
//!
//! The stream may end anywhere within a frame, in both directions. What was read stays here until it is whole; a frame of
//! which the socket took only the beginning is kept until it takes the rest.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::io::{Errno, read, retry_on_intr, write};

use super::host::Host;
use super::{HEADER, MAX_PACKET};
use crate::virtio::iovec::Iovecs;

/// Bytes of the length.
const PREFIX: usize = 4;
/// The longest frame that is taken from the stream.
const LONGEST_RECEIVED: usize = MAX_PACKET - HEADER;
/// The shortest and the longest frame that is sent: an Ethernet header, and what passt takes.
const SENT: Range<usize> = 14..65536;
/// How much is read at once.
const BUFFER: usize = 256 << 10;
/// Bytes of a frame that are looked at: the headers of Ethernet and of IPv4.
const HEADERS: usize = 34;

/// A socket that frames go through.
pub struct Stream {
    socket: UnixStream,
    /// What was read and not taken yet is in `unread` of it. There is always room for the rest of a frame.
    buffer: Box<[u8]>,
    unread: Range<usize>,
    /// A sent frame, of which the socket has not taken what is from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
    gone: bool,
}

impl Stream {
    /// Frames on `socket`.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Ok(Self { socket, buffer, unread: 0..0, unsent: vec![], sent: 0, gone: false })
    }

    /// Whether the other side has closed it, or sent what is no frame.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Sends a frame that is not the guest's.
    pub fn send_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        self.flush()?;
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        self.unsent.extend_from_slice(&length.to_be_bytes());
        self.unsent.extend_from_slice(frame);
        self.flush()
    }

    /// Takes a frame, and forgets it.
    pub fn skip_frame(&mut self) -> io::Result<()> {
        self.next_frame().map(drop)
    }

    /// Where the next frame is in the buffer, which it has left.
    fn next_frame(&mut self) -> io::Result<Range<usize>> {
        loop {
            if let Some(length) = self.next_length() {
                if length > LONGEST_RECEIVED {
                    self.gone = true;
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let start = self.unread.start + PREFIX;
                if start + length <= self.unread.end {
                    self.unread.start = start + length;
                    return Ok(start..start + length);
                }
            }
            self.fill()?;
        }
    }

    fn next_length(&self) -> Option<usize> {
        let prefix = self.buffer[self.unread.clone()].first_chunk::<PREFIX>()?;
        Some(u32::from_be_bytes(*prefix) as usize)
    }

    /// Reads more.
    fn fill(&mut self) -> io::Result<()> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.buffer.len() - self.unread.start < PREFIX + LONGEST_RECEIVED {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        match retry_on_intr(|| read(&self.socket, &mut self.buffer[self.unread.end..])) {
            Ok(0) => {
                self.gone = true;
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(count) => {
                self.unread.end += count;
                Ok(())
            }
            Err(error) => Err(self.failed(error.into())),
        }
    }

    /// Notes whether an error means that nothing more goes through.
    fn failed(&mut self, error: io::Error) -> io::Error {
        self.gone |= matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        error
    }
}

impl Host for Stream {
    fn receive(&mut self, buffers: &mut Iovecs, rest: &mut [u8]) -> io::Result<usize> {
        let frame = self.next_frame()?;
        let frame = &self.buffer[frame];
        let (placed, over) = frame.split_at(frame.len().min(buffers.bytes().saturating_sub(HEADER)));
        // Nothing is left to the guest: no checksum, no segmentation.
        buffers.write(0, &[0; HEADER]);
        buffers.write(HEADER, placed);
        rest[..over.len()].copy_from_slice(over);
        Ok(HEADER + frame.len())
    }

    fn has_more(&self) -> bool {
        self.next_length().is_some_and(|length| PREFIX + length <= self.unread.len())
    }

    fn send(&mut self, packet: &mut Iovecs) -> io::Result<()> {
        self.flush()?;
        packet.advance(HEADER);
        let length = packet.bytes();
        if !SENT.contains(&length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Copied before it is looked at: the guest may change what is in its memory at any time.
        let mut front = [0; PREFIX + HEADERS];
        let (prefix, headers) = front.split_at_mut(PREFIX);
        prefix.copy_from_slice(&u32::try_from(length).map_err(io::Error::other)?.to_be_bytes());
        let headers = &mut headers[..length.min(HEADERS)];
        packet.read(0, headers);
        packet.advance(headers.len());
        if is_for_this_host(headers) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let front = &front[..PREFIX + length.min(HEADERS)];
        let sent = packet.writev_after(&self.socket, front).map_err(|error| self.failed(error))?;
        if sent < PREFIX + length {
            let (front_sent, packet_sent) = (sent.min(front.len()), sent.saturating_sub(front.len()));
            self.unsent.extend_from_slice(&front[front_sent..]);
            packet.advance(packet_sent);
            let from = self.unsent.len();
            self.unsent.resize(from + packet.bytes(), 0);
            packet.read(0, &mut self.unsent[from..]);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while self.sent < self.unsent.len() {
            match retry_on_intr(|| write(&self.socket, &self.unsent[self.sent..])) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Err(io::ErrorKind::WouldBlock.into()),
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether a frame is an IPv4 packet to an address by which the host reaches itself and nobody else can: 127.0.0.0/8, and
/// 0.0.0.0/8, which Linux connects to itself too. passt would.
fn is_for_this_host(headers: &[u8]) -> bool {
    const ETHERTYPE: Range<usize> = 12..14;
    const DESTINATION: usize = 14 + 16;
    headers.get(ETHERTYPE) == Some(&[0x08, 0x00]) && matches!(headers.get(DESTINATION), Some(0 | 127))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{self, GuestRam};

    fn ram() -> GuestRam {
        memory::reserve(std::slice::from_ref(&(0..0x40_0000))).unwrap()
    }

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(ours).unwrap(), theirs)
    }

    /// A packet in guest memory, with a header before it and in several buffers.
    fn packet(ram: &GuestRam, frame: &[u8]) -> Iovecs {
        let mut list = Iovecs::new(ram);
        ram.write_slice(&[&[0xff; HEADER], frame].concat(), GuestAddress(0x1000)).unwrap();
        let (length, first) = (u32::try_from(HEADER + frame.len()).unwrap(), 40.min(HEADER + frame.len()));
        list.push(GuestAddress(0x1000), u32::try_from(first).unwrap()).unwrap();
        list.push(GuestAddress(0x1000 + first as u64), length - u32::try_from(first).unwrap()).unwrap();
        list
    }

    fn frame(length: usize, seed: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from((i + seed) % 251).unwrap()).collect()
    }

    fn prefixed(frame: &[u8]) -> Vec<u8> {
        [&u32::try_from(frame.len()).unwrap().to_be_bytes(), frame].concat()
    }

    /// The next packet, if it is there; in a buffer of `room` bytes and what is over.
    fn receive(stream: &mut Stream, ram: &GuestRam, room: usize) -> io::Result<Vec<u8>> {
        let mut buffers = Iovecs::new(ram);
        buffers.push(GuestAddress(0x1000), u32::try_from(room).unwrap()).unwrap();
        let mut rest = vec![0; MAX_PACKET];
        let length = stream.receive(&mut buffers, &mut rest)?;
        let mut packet = vec![0; length.min(room)];
        buffers.read(0, &mut packet);
        packet.extend(&rest[..length - packet.len()]);
        assert_eq!(packet[..HEADER], [0; HEADER]);
        Ok(packet.split_off(HEADER))
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_however_the_stream_is_cut(
            lengths in proptest::collection::vec(0usize..3000, 1..20),
            cuts in proptest::collection::vec(1usize..4000, 1..40),
            room in HEADER..4000,
        ) {
            let ram = ram();
            let (mut stream, mut theirs) = pair();
            let frames: Vec<_> = lengths.iter().enumerate().map(|(seed, length)| frame(*length, seed)).collect();
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| prefixed(frame)).collect();
            let (mut received, mut sent, mut cuts) = (vec![], 0, cuts.iter().cycle());
            while sent < bytes.len() {
                let end = bytes.len().min(sent + cuts.next().unwrap());
                theirs.write_all(&bytes[sent..end]).unwrap();
                sent = end;
                while let Ok(frame) = receive(&mut stream, &ram, room) {
                    received.push(frame);
                }
                prop_assert!(!stream.has_more() && !stream.is_gone());
            }
            prop_assert_eq!(received, frames);
        }
    }

    #[test]
    fn the_longest_frames_pass_and_longer_ones_end_the_stream() {
        let ram = ram();
        let (mut stream, mut theirs) = pair();
        let longest = frame(LONGEST_RECEIVED, 1);
        let writer = std::thread::spawn(move || {
            (0..10).for_each(|_| theirs.write_all(&prefixed(&frame(LONGEST_RECEIVED, 1))).unwrap());
            let length = u32::try_from(LONGEST_RECEIVED + 1).unwrap();
            theirs.write_all(&length.to_be_bytes()).unwrap();
            theirs
        });
        let mut received = 0;
        let error = loop {
            match receive(&mut stream, &ram, 100_000) {
                Ok(frame) => assert!(frame == longest),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => break error,
            }
            received += 1;
        };
        assert_eq!((received, error.kind(), stream.is_gone()), (10, io::ErrorKind::InvalidData, true));
        drop(writer.join().unwrap());
    }

    #[test]
    fn a_full_socket_holds_frames_up_and_none_is_cut() {
        let ram = ram();
        let (mut stream, mut theirs) = pair();
        rustix::net::sockopt::set_socket_send_buffer_size(&stream.socket, 4096).unwrap();
        let frames: Vec<_> = (0..50).map(|seed| frame(14 + seed * 1300, seed)).collect();
        let (mut stops, mut received) = (0, vec![]);
        let mut take = |stream: &mut Stream| {
            stops += 1;
            let mut part = vec![0; 30_001];
            let count = theirs.read(&mut part).unwrap();
            received.extend_from_slice(&part[..count]);
            assert!(!stream.is_gone());
        };
        for frame in &frames {
            while let Err(error) = stream.send(&mut packet(&ram, frame)) {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                take(&mut stream);
            }
            // The guest may do with its buffers what it likes as soon as a packet was taken.
            ram.write_slice(&[0; 0x1_2000], GuestAddress(0x1000)).unwrap();
        }
        while stream.flush().is_err() {
            take(&mut stream);
        }
        drop(stream);
        theirs.read_to_end(&mut received).unwrap();
        assert!(stops > 2);
        assert!(received == frames.iter().flat_map(|frame| prefixed(frame)).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_no_frame_or_for_the_host_itself_is_not_sent() {
        let ram = ram();
        let (mut stream, mut theirs) = pair();
        let mut kind = |frame: &[u8]| stream.send(&mut packet(&ram, frame)).map_err(|error| error.kind());
        for length in [0, 13, 65536] {
            assert_eq!(kind(&frame(length, 0)), Err(io::ErrorKind::InvalidInput), "{length}");
        }
        let to = |address: [u8; 4], ethertype: [u8; 2]| {
            let mut frame = [0; 60];
            frame[12..14].copy_from_slice(&ethertype);
            frame[30..34].copy_from_slice(&address);
            frame
        };
        let ipv4 = [0x08, 0x00];
        for address in [[127, 0, 0, 1], [127, 255, 255, 254], [0, 0, 0, 0], [0, 1, 2, 3]] {
            assert_eq!(kind(&to(address, ipv4)), Err(io::ErrorKind::PermissionDenied), "{address:?}");
        }
        assert_eq!(kind(&to([10, 0, 2, 2], ipv4)), Ok(()));
        assert_eq!(kind(&to([127, 0, 0, 1], [0x86, 0xdd])), Ok(()));
        assert_eq!(kind(&frame(14, 0)), Ok(()));
        let mut sent = vec![0; 3 * PREFIX + 60 + 60 + 14];
        theirs.read_exact(&mut sent).unwrap();
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut [0]).is_err(), "nothing else was sent");
    }

    #[test]
    fn an_end_is_seen_from_both_directions() {
        let ram = ram();
        let (mut stream, theirs) = pair();
        drop(theirs);
        assert!(stream.send(&mut packet(&ram, &frame(100, 0))).is_err() && stream.is_gone());
        let (mut stream, theirs) = pair();
        drop(theirs);
        assert!(receive(&mut stream, &ram, 100).is_err() && stream.is_gone());
        assert!(stream.send(&mut packet(&ram, &frame(100, 0))).is_err());
    }
}
