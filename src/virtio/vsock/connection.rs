//! One connection: a host's Unix socket at one end, a port of the guest at the other, and the credit between them.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{HOST_CID, Header, Op, RECEIVES_NO_MORE, SENDS_NO_MORE, STREAM};
use crate::virtio::iovec::Iovecs;

/// Buffer space that a connection's data from the guest has, in bytes: what the host's end does not take at once is kept.
pub const BUFFER: u32 = 256 << 10;

/// Both directions.
const BOTH: u32 = RECEIVES_NO_MORE | SENDS_NO_MORE;

/// The longest line that asks for a port: `CONNECT 4294967295\n`.
const CONNECT_LINE: usize = 19;

/// The two ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// How far a connection is.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    /// The host's client has still to say which port it wants; what it said so far.
    Asking(Vec<u8>),
    /// The guest was, or will be, sent a request.
    Requested,
    /// Data may flow.
    Open,
    /// Nothing more will come from either end; the guest has still to hear of it, or to agree.
    Closing,
    /// The guest has forgotten it, after it had said all. The host's end has still to take that.
    Left,
}

/// What a packet to the guest was made of.
pub enum Next {
    /// This header, without data.
    Control(Header),
    /// This header, and as many bytes of data as its `len` says, which are in the buffers already.
    Data(Header),
    /// There is nothing to send now.
    Nothing,
}

/// A connection.
pub struct Connection {
    /// Its ports. While it is asked for, the guest's is not known and 0.
    pub ports: Ports,
    /// How far it is.
    pub state: State,
    /// The host's end.
    pub stream: UnixStream,
    guest_cid: u64,
    /// The host's end may have something to read.
    readable: bool,
    /// It will have no more.
    ended: bool,
    /// An operation that the guest is to be sent first.
    pending: Option<Op>,
    /// The guest is to hear how much was passed on.
    update: bool,
    /// The guest was asked for its credit since it had any: it tells by itself when that changes.
    asked: bool,
    /// What the guest was told of directions that ended, and what it should be told.
    told: u32,
    to_tell: u32,
    /// What the guest said of directions that ended.
    heard: u32,
    /// The host's end was told that there will be no more data. Each time it is told is an event.
    shut: bool,
    /// The guest's buffer space and how much it passed on, as it last said.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Bytes received from the guest, those of them passed on, and what it was last told of these.
    received: u32,
    fwd_cnt: u32,
    told_fwd_cnt: u32,
    /// Data from the guest that the host's end has not taken.
    backlog: Vec<u8>,
}

/// The connection is to be reset: both ends are done with it, or the guest broke its rules.
#[derive(Debug, PartialEq, Eq)]
pub struct Over;

impl Connection {
    fn new(stream: UnixStream, guest_cid: u64, ports: Ports, state: State) -> Self {
        Self {
            ports,
            state,
            stream,
            guest_cid,
            readable: false,
            ended: false,
            pending: None,
            update: false,
            asked: false,
            told: 0,
            to_tell: 0,
            heard: 0,
            shut: false,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            received: 0,
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            backlog: Vec::new(),
        }
    }

    /// A client of the host that will ask for a port; `host` will be its own port.
    pub fn from_host(stream: UnixStream, guest_cid: u64, host: u32) -> Self {
        Self::new(stream, guest_cid, Ports { host, guest: 0 }, State::Asking(Vec::new()))
    }

    /// The guest's `request`, which `stream` answers.
    pub fn from_guest(stream: UnixStream, request: &Header) -> Self {
        let ports = Ports { host: request.dst_port, guest: request.src_port };
        let mut connection = Self::new(stream, request.src_cid, ports, State::Open);
        connection.pending = Some(Op::Response);
        connection.take_credit(request);
        connection
    }

    /// The host's end may have become readable or writable.
    pub fn host_ready(&mut self) -> Result<(), Over> {
        self.readable = true;
        match self.state {
            State::Open if self.ended && self.heard & RECEIVES_NO_MORE == 0 => self.host_ended(),
            // What it sends is not read, and its end not seen.
            State::Open if self.ended && self.is_hung_up() => {
                self.to_tell = BOTH;
                self.lose_host()?;
            }
            _ => {}
        }
        if let State::Asking(line) = &mut self.state {
            let Some(port) = read_line(&mut self.stream, line)? else { return Ok(()) };
            self.ports.guest = port;
            self.pending = Some(Op::Request);
            self.state = State::Requested;
        }
        if self.state == State::Requested && self.is_hung_up() {
            return Err(Over);
        }
        self.flush()
    }

    /// The guest sent a packet that is no request; `data` are its buffers, if it is one with data.
    pub fn receive(&mut self, header: &Header, data: &mut Iovecs) -> Result<(), Over> {
        self.take_credit(header);
        match (header.op, &self.state) {
            (Some(Op::Response), State::Requested) => {
                self.state = State::Open;
                // Nothing was written before: there is room.
                self.stream.write_all(format!("OK {}\n", self.ports.host).as_bytes()).map_err(|_| Over)
            }
            (Some(Op::Rw), State::Open) if self.heard & SENDS_NO_MORE == 0 => self.take_data(data),
            (Some(Op::Shutdown), State::Open) => {
                self.heard |= header.flags & BOTH;
                if self.heard & RECEIVES_NO_MORE != 0 {
                    self.ended = true;
                    let _ = self.stream.shutdown(Shutdown::Read);
                }
                self.flush()
            }
            (Some(Op::CreditRequest), State::Open) => {
                self.update = true;
                Ok(())
            }
            (Some(Op::CreditUpdate), State::Open) => Ok(()),
            // What crossed our own shutdown, until the guest agrees to it.
            (Some(Op::Shutdown), State::Closing) if header.flags & BOTH == BOTH => Err(Over),
            (Some(Op::Rw | Op::Shutdown | Op::CreditRequest | Op::CreditUpdate), State::Closing) => Ok(()),
            _ => Err(Over),
        }
    }

    /// The guest has forgotten the connection. What it had said before that it says no more is for the host's end still.
    ///
    /// # Errors
    /// When there is nothing of that: the connection is no more.
    pub fn leave(&mut self) -> Result<(), Over> {
        if self.heard & SENDS_NO_MORE == 0 || self.backlog.is_empty() {
            return Err(Over);
        }
        self.state = State::Left;
        // Nobody reads what it sends.
        let _ = self.stream.shutdown(Shutdown::Read);
        Ok(())
    }

    /// Whether the guest has heard of it, and has not forgotten it.
    pub fn is_known(&self) -> bool {
        !matches!(self.state, State::Asking(_) | State::Left) && self.pending != Some(Op::Request)
    }

    /// Whether the host's end is closed, or both directions are.
    fn is_hung_up(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && !fds[0].revents().is_empty()
    }

    fn take_credit(&mut self, header: &Header) {
        (self.peer_buf_alloc, self.peer_fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Passes data on, or keeps it.
    fn take_data(&mut self, data: &mut Iovecs) -> Result<(), Over> {
        let len = u32::try_from(data.bytes()).map_err(|_| Over)?;
        // What was received and not passed on is never more than BUFFER.
        if len > BUFFER - self.received.wrapping_sub(self.fwd_cnt) {
            return Err(Over);
        }
        self.received = self.received.wrapping_add(len);
        if self.backlog.is_empty() && len > 0 {
            match data.writev(&self.stream) {
                Ok(written) => {
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(u32::try_from(written).map_err(|_| Over)?);
                    data.advance(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return self.lose_host(),
            }
        }
        let kept = self.backlog.len();
        self.backlog.resize(kept + data.bytes(), 0);
        data.read(0, &mut self.backlog[kept..]);
        self.after_forwarding()
    }

    /// Writes what was kept, and shuts down what the guest has ended.
    fn flush(&mut self) -> Result<(), Over> {
        while !self.backlog.is_empty() {
            match self.stream.write(&self.backlog) {
                Ok(written) => {
                    self.backlog.drain(..written);
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(u32::try_from(written).map_err(|_| Over)?);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.lose_host(),
            }
        }
        self.after_forwarding()
    }

    fn after_forwarding(&mut self) -> Result<(), Over> {
        if self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= BUFFER / 2 {
            self.update = true;
        }
        if self.backlog.is_empty() && self.heard & SENDS_NO_MORE != 0 {
            if self.heard & RECEIVES_NO_MORE != 0 || self.state == State::Left {
                // Both ends agree: nothing is left to do but to say so.
                return Err(Over);
            }
            if !std::mem::replace(&mut self.shut, true) {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Ok(())
    }

    /// The host's end takes nothing any more. What it sent before may still be there.
    fn lose_host(&mut self) -> Result<(), Over> {
        if self.state == State::Left {
            return Err(Over);
        }
        self.fwd_cnt = self.received;
        self.backlog = Vec::new();
        self.to_tell |= RECEIVES_NO_MORE;
        Ok(())
    }

    /// Makes the next packet to the guest. Data is read into `buffers`, which are those of one packet, without its
    /// header.
    pub fn next(&mut self, buffers: &mut Iovecs) -> Next {
        if self.state == State::Left {
            return Next::Nothing;
        }
        if let Some(op) = self.pending.take() {
            return Next::Control(self.header(op, 0));
        }
        if self.state == State::Open && self.readable && !self.ended && buffers.bytes() > 0 {
            let credit = self.peer_buf_alloc.wrapping_sub(self.sent.wrapping_sub(self.peer_fwd_cnt));
            // A guest that takes credit back may make it look larger than its buffer.
            if credit == 0 || credit > self.peer_buf_alloc {
                if !self.asked {
                    self.asked = true;
                    return Next::Control(self.header(Op::CreditRequest, 0));
                }
            } else {
                self.asked = false;
                buffers.limit(credit as usize);
                match buffers.readv(&self.stream, &mut []) {
                    Ok(0) => self.host_ended(),
                    Ok(count) => {
                        let len = u32::try_from(count).expect("credit is less than 2^32");
                        self.sent = self.sent.wrapping_add(len);
                        return Next::Data(Header { len, ..self.header(Op::Rw, 0) });
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                    Err(_) => self.host_ended(),
                }
            }
        }
        if self.to_tell & !self.told != 0 && self.state == State::Open {
            self.told |= self.to_tell;
            if self.told == BOTH {
                self.state = State::Closing;
            }
            return Next::Control(self.header(Op::Shutdown, self.told));
        }
        if std::mem::take(&mut self.update) {
            return Next::Control(self.header(Op::CreditUpdate, 0));
        }
        Next::Nothing
    }

    /// The host's end has said all. If it hung up, it does not listen either.
    fn host_ended(&mut self) {
        self.ended = true;
        self.to_tell |= SENDS_NO_MORE;
        if self.is_hung_up() {
            let _ = self.lose_host();
        }
    }

    fn header(&mut self, op: Op, flags: u32) -> Header {
        self.told_fwd_cnt = self.fwd_cnt;
        self.update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.fwd_cnt,
        }
    }
}

/// Reads on at `CONNECT PORT\n`, and not a byte more; the port when all is there.
fn read_line(stream: &mut impl Read, line: &mut Vec<u8>) -> Result<Option<u32>, Over> {
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if byte == *b"\n" => break,
            Ok(1) if line.len() < CONNECT_LINE => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return Err(Over),
        }
    }
    let text = str::from_utf8(line).map_err(|_| Over)?;
    let (word, port) = text.trim_end_matches('\r').split_once(' ').ok_or(Over)?;
    let port = port.trim().parse().map_err(|_| Over)?;
    if word.eq_ignore_ascii_case("connect") { Ok(Some(port)) } else { Err(Over) }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    /// What a guest without buffers sends.
    fn header(op: Op, flags: u32) -> Header {
        let (src_cid, dst_cid, src_port, dst_port) = (3, HOST_CID, 1, 2);
        let op = Some(op);
        Header { src_cid, dst_cid, src_port, dst_port, len: 0, kind: STREAM, op, flags, buf_alloc: 0, fwd_cnt: 0 }
    }

    #[test]
    fn a_client_asks_for_a_port() {
        let ask = |text: &[u8]| read_line(&mut &text[..], &mut Vec::new());
        assert_eq!(ask(b"CONNECT 52\n"), Ok(Some(52)));
        assert_eq!(ask(b"connect 4294967295\r\n"), Ok(Some(u32::MAX)));
        for bad in ["CONNECT\n", "CONNECT x\n", "GET / HTTP/1.1\n", "CONNECT 4294967296\n", "CONNECT -1\n", "CONNECT 5"]
        {
            assert_eq!(ask(bad.as_bytes()), Err(Over), "{bad}");
        }
        assert_eq!(ask(&[b'C'; 1000]), Err(Over));
        let mut rest = &b"CONNECT 1\nhello"[..];
        assert_eq!(read_line(&mut rest, &mut Vec::new()), Ok(Some(1)));
        assert_eq!(rest, b"hello");
    }

    #[test]
    fn a_half_that_is_closed_is_closed_once() {
        use rustix::event::{Timespec, epoll};
        let (stream, mut host) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &stream, epoll::EventData::new_u64(0), flags).unwrap();
        let (at_once, mut buffer) = (Timespec::default(), Vec::with_capacity(4));
        let mut happens = || {
            buffer.clear();
            epoll::wait(&events, rustix::buffer::spare_capacity(&mut buffer), Some(&at_once)).unwrap() > 0
        };
        let mut connection = Connection::from_guest(stream, &header(Op::Request, 0));
        let ram = crate::memory::reserve(&[0..0x1000]).unwrap();
        connection.receive(&header(Op::Shutdown, SENDS_NO_MORE), &mut Iovecs::new(&ram)).unwrap();
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "the host's end hears of it");
        // What the device does for each event makes no other.
        let rounds = (0..10).take_while(|_| happens() && connection.host_ready() == Ok(())).count();
        assert!(rounds < 3, "{rounds}");
        host.write_all(b"x").unwrap();
        assert!(happens(), "it still sends");
    }

    #[test]
    fn no_packet_is_larger_than_the_credit_whatever_waits() {
        let (mut stream, _host) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 4096]).is_ok() {}
        let header = header(Op::Rw, 0);
        let mut connection = Connection::from_guest(stream, &header);
        let ram = crate::memory::reserve(&[0..512 << 20]).unwrap();
        let mut data = Iovecs::new(&ram);
        data.push(GuestAddress(0), 100).unwrap();
        assert_eq!(connection.receive(&header, &mut data), Ok(()));
        // Modulo 2^32, 100 and this are 0 bytes.
        data.clear();
        for _ in 0..7 {
            data.push(GuestAddress(0), 512 << 20).unwrap();
        }
        data.push(GuestAddress(0), (512 << 20) - 100).unwrap();
        assert_eq!(connection.receive(&header, &mut data), Err(Over));
        data.clear();
        data.push(GuestAddress(0), BUFFER - 100).unwrap();
        assert_eq!(connection.receive(&header, &mut data), Ok(()));
        data.limit(1);
        assert_eq!(connection.receive(&header, &mut data), Err(Over));
    }
}
