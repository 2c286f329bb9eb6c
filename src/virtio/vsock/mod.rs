//! The socket device: virtio 1.2, section 5.10. Its host end is Unix sockets, with the conventions of Firecracker and
//! Cloud Hypervisor, so that existing programs work.
//!
//! A host program connects to the socket PATH, writes `CONNECT PORT\n`, and reads `OK HOST_PORT\n` when a guest program
//! that listens on vsock port PORT has accepted. A guest program that connects to port PORT of the host (CID 2) reaches
//! whatever listens on the Unix socket PATH_PORT. From there on it is a stream both ways.
//!
//! Data moves between the guest's buffers and the socket without a copy; one that is full holds up its own connection
//! only, as each has a credit of `connection::BUFFER` bytes.

mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::Bytes;

use self::connection::{Connection, Next, Over, Ports, State};
use self::packet::{HEADER, HOST_CID, Header, Op, STREAM};
use super::device::{Error as DeviceError, Io, VirtioDevice};
use super::iovec::Iovecs;
use super::queue::{self, Chain};
use crate::metrics::{Counter, Metrics};
use crate::socket::Listener;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;
/// The most connections at once, and the token of the listening socket.
pub const MAX_CONNECTIONS: u32 = 1024;
const LISTENER: u32 = MAX_CONNECTIONS;
/// The most resets that wait for receive buffers. Then the guest's packets wait, too.
const MAX_RESETS: usize = 256;
/// The most packets moved in one go, so that both directions have their turn and the device can be stopped.
const BATCH: u32 = 64;
/// The context ID of a guest for which none is given, and the first that it may have.
const FIRST_CID: u32 = 3;
/// The longest path, in bytes: with `_4294967295` at its end it is still one that a socket can have.
const MAX_PATH: usize = 107 - 11;
/// The first port that a host's client has; those below are for listening.
const FIRST_PORT: u32 = 1 << 30;

/// A socket device to be made.
///
/// ```
/// use bantam::virtio::vsock::Spec;
/// let spec: Spec = serde_json::from_str(r#"{"cid": 3, "socket": "/tmp/guest.vsock"}"#)?;
/// assert_eq!(spec.cid, 3);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Vsock"))]
pub struct Spec {
    /// The guest's context ID, from 3 to 2^32 - 2. Several machines may have the same.
    pub cid: u32,
    /// The Unix socket for connections to the guest; those from the guest arrive at this path with `_PORT` appended.
    pub socket: PathBuf,
}

/// Why there is no socket device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A reserved context ID.
    #[error("cannot give the guest the vsock context ID {0}: it must be 3 to 4294967294")]
    Cid(u32),
    /// A path that leaves no room for the ports of the guest's connections.
    #[error("cannot use the socket {} for vsock: its path may have at most {MAX_PATH} bytes", .0.display())]
    LongPath(PathBuf),
    /// The socket could not be created.
    #[error("cannot listen on the socket {} for vsock", .path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl Spec {
    /// Checks what can be checked without opening anything.
    pub fn validate(&self) -> Result<(), Error> {
        if !(FIRST_CID..u32::MAX).contains(&self.cid) {
            Err(Error::Cid(self.cid))
        } else if self.socket.as_os_str().len() > MAX_PATH {
            Err(Error::LongPath(self.socket.clone()))
        } else {
            Ok(())
        }
    }

    /// Creates the socket and makes the device. The socket vanishes with it.
    pub fn open(&self) -> Result<Vsock, Error> {
        self.open_with(HashMap::new())
    }

    /// The same, and the guest's first connection to each port of `ends` is to that end and not to a Unix socket.
    pub fn open_with(&self, ends: HashMap<u32, UnixStream>) -> Result<Vsock, Error> {
        self.validate()?;
        let listen = || {
            let listener = Listener::bind(&self.socket)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(|source| Error::Socket { path: self.socket.clone(), source })?;
        Ok(Vsock::new(self.cid, Some(listener), ends))
    }
}

/// What the device did.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Statistics {
    /// Connections that the guest opened, or tried to.
    connections_from_guest: Counter,
    /// Connections that the host opened, or tried to.
    connections_to_guest: Counter,
    /// Packets given to the guest, and their data.
    rx_packets: Counter,
    rx_bytes: Counter,
    /// Packets taken from the guest, and their data.
    tx_packets: Counter,
    tx_bytes: Counter,
    /// Packets that were none, or for somebody else.
    tx_errors: Counter,
    /// Resets sent to the guest.
    resets: Counter,
}

/// A socket device.
pub struct Vsock {
    cid: u64,
    config: [u8; 8],
    /// Without one there are only the ends of this process.
    listener: Option<Listener>,
    ends: HashMap<u32, UnixStream>,
    statistics: Arc<Statistics>,
    /// The guest is to be told that its connections are gone.
    tell_reset: bool,
    running: Option<Running>,
}

impl Vsock {
    /// A device without a socket on the host: the guest's first connection to each port of `ends` is to that end.
    pub fn with_ends(ends: HashMap<u32, UnixStream>) -> Self {
        Self::new(FIRST_CID, None, ends)
    }

    fn new(cid: u32, listener: Option<Listener>, ends: HashMap<u32, UnixStream>) -> Self {
        Self {
            cid: cid.into(),
            config: u64::from(cid).to_le_bytes(),
            listener,
            ends,
            statistics: Arc::default(),
            tell_reset: false,
            running: None,
        }
    }

    /// Tells the guest, once it has a buffer for that, that all its connections are gone, and that it may have another
    /// context ID (5.10.6.7).
    fn tell_reset(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if let (true, Some((ram, queue))) = (self.tell_reset, io.queue(EVENT))
            && let Some(mut chain) = queue.pop(ram)?
        {
            let head = chain.head_index();
            let event =
                chain.next().filter(|buffer| buffer.is_write_only() && buffer.len() as usize >= TRANSPORT_RESET.len());
            let written = event.map(|buffer| ram.write_slice(&TRANSPORT_RESET, buffer.addr()));
            let Some(Ok(())) = written else { return Err(malformed(EVENT).into()) };
            queue.add_used(ram, head, u32::try_from(TRANSPORT_RESET.len()).expect("4"))?;
            queue.notify(ram)?;
            self.tell_reset = false;
        }
        Ok(())
    }
}

/// `struct virtio_vsock_event` with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// What there is only between start and stop.
struct Running {
    cid: u64,
    /// Where the guest's connections go, if not to one of `ends`: this and `_PORT`.
    path: Option<PathBuf>,
    ends: HashMap<u32, UnixStream>,
    statistics: Arc<Statistics>,
    /// The connections by token.
    connections: Vec<Option<Connection>>,
    by_ports: HashMap<Ports, u32>,
    /// Those that may have something for the guest, in turn.
    ready: VecDeque<u32>,
    /// Resets of connections that are no more.
    resets: VecDeque<Header>,
    next_port: u32,
    /// The header and the data of the packet at hand.
    head: Iovecs,
    body: Iovecs,
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.statistics.clone()
    }

    fn start(&mut self, _features: u64, io: &mut Io) -> Result<(), DeviceError> {
        self.running = Some(Running {
            cid: self.cid,
            path: self.listener.as_ref().map(|listener| listener.path().to_owned()),
            ends: std::mem::take(&mut self.ends),
            statistics: self.statistics.clone(),
            connections: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            head: Iovecs::new(&io.ram),
            body: Iovecs::new(&io.ram),
        });
        let Some(listener) = &self.listener else { return Ok(()) };
        io.watch(LISTENER, &**listener, EventFlags::IN | EventFlags::ET)
            .map_err(|source| DeviceError::Host { what: "cannot watch the vsock socket".into(), source })
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        match &mut self.running {
            Some(running) if index == RX || index == TX => running.work(io),
            _ => self.tell_reset(io),
        }
    }

    fn replace(&mut self) {
        self.tell_reset = true;
    }

    fn host_ready(&mut self, token: u32, io: &mut Io) -> Result<(), DeviceError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        if token == LISTENER {
            self.listener.iter().for_each(|listener| running.accept(listener, io));
        } else if let Some(Some(connection)) = running.connections.get_mut(token as usize) {
            match connection.host_ready() {
                Ok(()) => running.set_ready(token),
                Err(Over) => running.reset(token, io),
            }
        }
        running.work(io)
    }

    fn stop(&mut self, io: &mut Io) {
        if let Some(listener) = &self.listener
            && let Err(error) = io.unwatch(&**listener)
        {
            log::error!("cannot stop watching the vsock socket: {error}");
        }
        if let Some(mut running) = self.running.take() {
            (0..MAX_CONNECTIONS).for_each(|token| drop(running.remove(token, io)));
            self.ends = running.ends;
        }
    }
}

impl Running {
    /// Does what can be done in both directions. Receiving makes room for resets, which transmitting may wait for.
    fn work(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        self.receive(io)?;
        self.transmit(io)?;
        self.receive(io)
    }

    /// Takes the clients that wait.
    fn accept(&mut self, listener: &UnixListener, io: &Io) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    self.statistics.connections_to_guest.inc();
                    let port = self.free_port();
                    // With too many, the client sees its connection end.
                    let _ = self.insert(stream, io, |stream, cid| Connection::from_host(stream, cid, port));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return log::warn!("cannot accept a vsock client: {error}"),
            }
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port == u32::MAX - 1 { FIRST_PORT } else { port + 1 };
            if !self.connections.iter().flatten().any(|connection| connection.ports.host == port) {
                return port;
            }
        }
    }

    /// Adds a connection; its token.
    fn insert(
        &mut self,
        stream: UnixStream,
        io: &Io,
        make: impl FnOnce(UnixStream, u64) -> Connection,
    ) -> io::Result<u32> {
        stream.set_nonblocking(true)?;
        let token = match self.connections.iter().position(Option::is_none) {
            Some(free) => u32::try_from(free).expect("there are few connections"),
            None if self.connections.len() < MAX_CONNECTIONS as usize => {
                self.connections.push(None);
                u32::try_from(self.connections.len() - 1).expect("there are few connections")
            }
            // The guest was told of its end, and keeps silent: nobody misses it. Or a host program does not take what was said.
            None => self
                .find_ending()
                .map(|token| (self.remove(token, io), token).1)
                .ok_or_else(|| io::Error::other(format!("there are {MAX_CONNECTIONS} connections")))?,
        };
        // Edge-triggered: what cannot be done now is remembered, and costs no system call.
        io.watch(token, &stream, EventFlags::IN | EventFlags::OUT | EventFlags::ET)?;
        self.connections[token as usize] = Some(make(stream, self.cid));
        Ok(token)
    }

    /// One that is over but for what nobody may ever do.
    fn find_ending(&self) -> Option<u32> {
        let find = |state: State| {
            let is_so = |connection: &Option<Connection>| connection.as_ref().is_some_and(|it| it.state == state);
            self.connections.iter().position(is_so)
        };
        find(State::Closing).or_else(|| find(State::Left)).and_then(|token| u32::try_from(token).ok())
    }

    /// Forgets a connection.
    fn remove(&mut self, token: u32, io: &Io) -> Option<Connection> {
        let connection = self.connections.get_mut(token as usize)?.take()?;
        if self.by_ports.get(&connection.ports) == Some(&token) {
            self.by_ports.remove(&connection.ports);
        }
        if let Err(error) = io.unwatch(&connection.stream) {
            log::error!("cannot stop watching a vsock connection: {error}");
        }
        Some(connection)
    }

    /// Forgets a connection as the guest has, or has only the host's end take what is there for it: the guest may have another
    /// one with these ports.
    fn leave(&mut self, token: u32, io: &Io) {
        if let Some(Some(connection)) = self.connections.get_mut(token as usize)
            && connection.leave() == Ok(())
        {
            self.by_ports.remove(&connection.ports);
        } else {
            drop(self.remove(token, io));
        }
    }

    /// Forgets a connection, and tells the guest if it knows of it.
    fn reset(&mut self, token: u32, io: &Io) {
        if let Some(connection) = self.remove(token, io)
            && connection.is_known()
        {
            self.push_reset(connection.ports);
        }
    }

    fn push_reset(&mut self, ports: Ports) {
        self.statistics.resets.inc();
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: STREAM,
            op: Some(Op::Rst),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    /// Has a connection asked for what it has for the guest.
    fn set_ready(&mut self, token: u32) {
        let Some(Some(connection)) = self.connections.get(token as usize) else { return };
        if connection.state == State::Requested {
            let ports = connection.ports;
            self.by_ports.entry(ports).or_insert(token);
        }
        if !self.ready.contains(&token) {
            self.ready.push_back(token);
        }
    }

    /// Sends the guest what there is for it, as far as it has buffers.
    fn receive(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let Some((ram, queue)) = io.queue(RX) else { return Ok(()) };
        queue.disable_kicks(ram)?;
        let mut budget = BATCH;
        while !self.resets.is_empty() || !self.ready.is_empty() {
            if budget == 0 {
                queue.kick_again();
                break;
            }
            budget -= 1;
            let Some(chain) = queue.pop(ram)? else {
                if queue.enable_kicks(ram)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            split(chain, true, queue.size(), &mut self.head, &mut self.body).ok_or(malformed(RX))?;
            let Some(header) = self.next() else {
                queue.undo_pop();
                break;
            };
            self.statistics.rx_packets.inc();
            self.statistics.rx_bytes.add(header.len.into());
            self.head.write(0, &header.to_bytes());
            queue.add_used(ram, head, u32::try_from(HEADER).expect("44") + header.len)?;
        }
        Ok(queue.notify(ram)?)
    }

    /// The next packet for the guest; its data is in `body`.
    fn next(&mut self) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(Some(connection)) = self.connections.get_mut(token as usize) else { continue };
            match connection.next(&mut self.body) {
                Next::Control(header) | Next::Data(header) => {
                    self.ready.push_back(token);
                    return Some(header);
                }
                Next::Nothing => {}
            }
        }
        None
    }

    /// Takes what the guest sends.
    fn transmit(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let mut budget = BATCH;
        // One packet makes at most two resets: of the connection that there was, and of the request.
        while self.resets.len() + 1 < MAX_RESETS {
            let Some((ram, queue)) = io.queue(TX) else { return Ok(()) };
            if budget == 0 {
                queue.kick_again();
                break;
            }
            budget -= 1;
            queue.disable_kicks(ram)?;
            let Some(chain) = queue.pop(ram)? else {
                if queue.enable_kicks(ram)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            split(chain, false, queue.size(), &mut self.head, &mut self.body).ok_or(malformed(TX))?;
            let mut header = [0; HEADER];
            self.head.read(0, &mut header);
            self.take(&Header::from_bytes(&header), io);
            let Some((ram, queue)) = io.queue(TX) else { return Ok(()) };
            queue.add_used(ram, head, 0)?;
        }
        let Some((ram, queue)) = io.queue(TX) else { return Ok(()) };
        Ok(queue.notify(ram)?)
    }

    /// Does what a packet says, whose data is in `body`.
    fn take(&mut self, header: &Header, io: &Io) {
        self.statistics.tx_packets.inc();
        if header.src_cid != self.cid || header.dst_cid != HOST_CID || self.body.bytes() < header.len as usize {
            return self.statistics.tx_errors.inc();
        }
        self.body.limit(header.len as usize);
        self.statistics.tx_bytes.add(header.len.into());
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = self.by_ports.get(&ports).copied();
        match (header.op, known) {
            (Some(Op::Rst), Some(token)) => self.leave(token, io),
            (Some(Op::Rst), None) => {}
            (Some(Op::Request), None) if header.kind == STREAM => {
                self.statistics.connections_from_guest.inc();
                if let Err(error) = self.connect(header, io) {
                    log::debug!("vsock: cannot connect the guest to port {}: {error}", header.dst_port);
                    self.push_reset(ports);
                }
            }
            (_, Some(token)) => {
                let Some(Some(connection)) = self.connections.get_mut(token as usize) else { return };
                if header.kind == STREAM && connection.receive(header, &mut self.body) == Ok(()) {
                    self.set_ready(token);
                } else {
                    self.reset(token, io);
                }
            }
            (_, None) => self.push_reset(ports),
        }
    }

    /// Connects the guest to what listens for it on the host.
    fn connect(&mut self, request: &Header, io: &Io) -> io::Result<()> {
        let stream = match (self.ends.remove(&request.dst_port), &self.path) {
            (Some(end), _) => end,
            (None, Some(path)) => connect_to(path, request.dst_port)?,
            (None, None) => return Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let token = self.insert(stream, io, |stream, _| Connection::from_guest(stream, request))?;
        self.by_ports.insert(Ports { host: request.dst_port, guest: request.src_port }, token);
        self.set_ready(token);
        Ok(())
    }
}

/// Connects to the Unix socket for a port of the host.
fn connect_to(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    // Not blocking: one whose backlog is full refuses.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Splits the buffers of `chain` after the header. `None` if they are not such as the driver has to give.
fn split(chain: Chain<'_>, writable: bool, queue_size: u16, head: &mut Iovecs, body: &mut Iovecs) -> Option<()> {
    head.clear();
    body.clear();
    let mut whole = false;
    for (count, descriptor) in chain.enumerate() {
        if count >= usize::from(queue_size) || descriptor.is_write_only() != writable {
            return None;
        }
        body.push(descriptor.addr(), descriptor.len()).ok()?;
        whole = !descriptor.has_next();
    }
    body.split_front(HEADER, head);
    (whole && head.bytes() == HEADER).then_some(())
}

fn malformed(index: usize) -> queue::Error {
    queue::Error::Ring {
        index,
        what: "cannot use a buffer that is malformed or shorter than the header",
        source: virtio_queue::Error::InvalidChain,
    }
}
