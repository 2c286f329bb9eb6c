//! A tap: the host's end of the guest's Ethernet cable. What is written to its descriptor arrives on the host's
//! interface, and the other way round; each packet follows the header of virtio 1.2, 5.1.6.
//!
//! Linux, Documentation/networking/tuntap.rst and `<linux/if_tun.h>`.

#![expect(unsafe_code, reason = "the ioctls of tap devices, and descriptors that the caller hands over by number")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::ioctl::{self, Opcode, opcode};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice};

use super::HEADER;

const TUNSETIFF: Opcode = opcode::write::<libc::c_int>(b'T', 202);
const TUNSETOFFLOAD: Opcode = opcode::write::<libc::c_uint>(b'T', 208);
const TUNGETIFF: Opcode = opcode::read::<libc::c_uint>(b'T', 210);
const TUNSETQUEUE: Opcode = opcode::write::<libc::c_int>(b'T', 217);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<libc::c_int>(b'T', 216);
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFMTU: Opcode = 0x8922;
const SIOCETHTOOL: Opcode = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

const IFF_UP: i16 = 0x0001;
const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

/// What the reader of a tap can take, so that the host need not finish packets for it: `TUN_F_*`.
pub mod offload {
    /// Checksums that are not computed yet.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// TCP over IPv4 that is not segmented yet.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// TCP over IPv6 that is not segmented yet.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// TCP with congestion notification that is not segmented yet.
    pub const ECN: u32 = libc::TUN_F_TSO_ECN;
    /// UDP that is not fragmented yet.
    pub const UFO: u32 = libc::TUN_F_UFO;
}

/// What kernels take, from the newest to the oldest.
const KNOWN_OFFLOADS: [u32; 5] = {
    use offload::{CSUM, ECN, TSO4, TSO6, UFO};
    [CSUM | TSO4 | TSO6 | ECN | UFO, CSUM | TSO4 | TSO6 | ECN, CSUM | TSO4 | TSO6, CSUM, 0]
};

/// Why there is no tap to work with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No interface can have this name.
    #[error(
        "`{name}` cannot be the name of a tap: it must have 1 to 15 characters, none of them a space or one of /:%"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// `/dev/net/tun` cannot be opened.
    #[error(
        "cannot open /dev/net/tun{}",
        if .0.kind() == io::ErrorKind::NotFound { " (`sudo modprobe tun` makes it)" } else { "" }
    )]
    Tun(#[source] io::Error),
    /// There is no such tap, and no privilege to create one.
    #[error(
        "tap {name} does not exist, and creating it is not permitted: `sudo ip tuntap add dev {name} mode tap user $USER`"
    )]
    Missing {
        /// The tap's name.
        name: String,
    },
    /// The tap is another user's.
    #[error("tap {name} belongs to another user")]
    NotPermitted {
        /// The tap's name.
        name: String,
    },
    /// The tap has its reader already.
    #[error("tap {name} is in use by another process")]
    Busy {
        /// The tap's name.
        name: String,
    },
    /// The interface exists, but is of another kind.
    #[error("cannot use the interface {name} as a tap: it is something else, or a tap with several queues (queues=2)")]
    NotATap {
        /// The interface's name.
        name: String,
    },
    /// The same, where several queues are needed.
    #[error(
        "cannot use the interface {name} as a tap with several queues: it is something else, or has one queue; \
         `sudo ip tuntap add dev {name} mode tap multi_queue user $USER` makes one"
    )]
    NotMultiQueue {
        /// The interface's name.
        name: String,
    },
    /// The number is not that of an open descriptor.
    #[error("fd={fd} is not open")]
    NotOpen {
        /// The descriptor.
        fd: RawFd,
    },
    /// The number is one of the standard streams'.
    #[error("fd={fd} is standard input, output or error")]
    Standard {
        /// The descriptor.
        fd: RawFd,
    },
    /// The descriptor is open, but on something else.
    #[error("fd={fd} is not a tap")]
    FdNotATap {
        /// The descriptor.
        fd: RawFd,
    },
    /// The tap was set up for packets in another form.
    #[error("fd={fd} is the tap {name} without IFF_VNET_HDR: open it with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")]
    FdHeader {
        /// The descriptor.
        fd: RawFd,
        /// The tap's name.
        name: String,
    },
    /// The host refused something else.
    #[error("cannot {what} tap {name}")]
    Refused {
        /// What was attempted.
        what: &'static str,
        /// The tap's name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An open tap. It is the only reader of its queue, and never blocks.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    offloads: u32,
    created: bool,
}

impl Tap {
    /// Opens so many queues of the tap `name` of this thread's network namespace. One that does not exist is created, if that
    /// is permitted, set up (as `ip link set up` does), and vanishes when all are closed. Only the first queue
    /// [is attached](Self::attach).
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, Error> {
        let mut request = InterfaceRequest::new(name)?;
        let refused = |what| move |source: Errno| Error::Refused { what, name: name.to_owned(), source: source.into() };
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(refused("ask about"))?;
        let created = match netdevice::name_to_index(&socket, name) {
            Ok(_) => false,
            Err(Errno::NODEV) => true,
            Err(error) => return Err(refused("look for")(error)),
        };
        let multi_queue = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
        let open = |request: &mut InterfaceRequest| {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd =
                rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|error| Error::Tun(error.into()))?;
            request.set_flags(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | multi_queue);
            request.update::<TUNSETIFF>(&fd).map_err(|error| {
                let name = name.to_owned();
                match error {
                    Errno::PERM if created => Error::Missing { name },
                    Errno::PERM => Error::NotPermitted { name },
                    Errno::BUSY => Error::Busy { name },
                    Errno::INVAL if queues > 1 => Error::NotMultiQueue { name },
                    Errno::INVAL => Error::NotATap { name },
                    error => Error::Refused { what: "attach to", name, source: error.into() },
                }
            })?;
            Ok(fd)
        };
        let fd = open(&mut request)?;
        request.update::<SIOCGIFFLAGS>(&socket).map_err(refused("read the flags of"))?;
        if created {
            request.set_flags(request.flags() | IFF_UP);
            request.update::<SIOCSIFFLAGS>(&socket).map_err(refused("set up"))?;
        } else if request.flags() & IFF_UP == 0 {
            log::warn!("tap {name} is down: the guest reaches no one until `ip link set {name} up`");
        }
        // A tap with several queues lets in any number of machines, which would get parts of each other's packets.
        if queues > 1 && request.attached_queues(&socket).is_ok_and(|attached| attached > 1) {
            return Err(Error::Busy { name: name.to_owned() });
        }
        let mut taps = vec![Self::with_header(fd, name.to_owned(), created)?];
        let offloads = taps[0].offloads;
        for _ in 1..queues {
            let tap = Self { fd: open(&mut request)?, name: name.to_owned(), offloads, created };
            tap.attach(false)?;
            taps.push(tap);
        }
        Ok(taps)
    }

    /// Has the interface use this one of its queues, or not: then nothing comes by it, and what waited to be read is lost.
    pub fn attach(&self, is_attached: bool) -> Result<(), Error> {
        if cfg!(fuzzing) {
            return Ok(());
        }
        let mut request = InterfaceRequest::EMPTY;
        request.set_flags(if is_attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE });
        let what = if is_attached { "attach a queue of" } else { "detach a queue of" };
        request.update::<TUNSETQUEUE>(&self.fd).map_err(|error| self.refused(what, error))
    }

    /// Takes over the tap that is open as `fd`, which was attached with IFF_NO_PI and IFF_VNET_HDR: the number must not
    /// be used for anything else from now on.
    pub fn from_fd(fd: RawFd) -> Result<Self, Error> {
        match fd {
            ..0 => return Err(Error::NotOpen { fd }),
            0..3 => return Err(Error::Standard { fd }),
            _ => {}
        }
        // SAFETY: the number is not negative. If nothing is open there, the next call says so.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let flags = rustix::io::fcntl_getfd(borrowed).map_err(|_| Error::NotOpen { fd })?;
        let mut request = InterfaceRequest::EMPTY;
        request.update::<TUNGETIFF>(borrowed).map_err(|_| Error::FdNotATap { fd })?;
        if request.flags() & IFF_TAP == 0 {
            return Err(Error::FdNotATap { fd });
        }
        let name = request.name();
        // IFF_NO_PI cannot be seen: the kernel answers with another flag in its place.
        if request.flags() & IFF_VNET_HDR == 0 {
            return Err(Error::FdHeader { fd, name });
        }
        let refused = |source: Errno| Error::Refused {
            what: "set the descriptor's flags of",
            name: request.name(),
            source: source.into(),
        };
        rustix::io::fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).map_err(refused)?;
        let status = rustix::fs::fcntl_getfl(borrowed).map_err(refused)?;
        rustix::fs::fcntl_setfl(borrowed, status | OFlags::NONBLOCK).map_err(refused)?;
        // SAFETY: it is open, and whoever gave the number gave up the descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Self::with_header(fd, name, false)
    }

    /// A socket of datagrams in place of a tap, with packets and headers as of one.
    #[cfg(fuzzing)]
    pub fn of_socket(socket: std::os::unix::net::UnixDatagram) -> Self {
        Self { fd: socket.into(), name: "socket".into(), offloads: KNOWN_OFFLOADS[0], created: false }
    }

    /// Sets the header's size and finds out which offloads the kernel knows; none is on afterwards.
    fn with_header(fd: OwnedFd, name: String, created: bool) -> Result<Self, Error> {
        let mut tap = Self { fd, name, offloads: 0, created };
        let size = libc::c_int::try_from(HEADER).expect("the header has 12 bytes");
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        let setter = unsafe { ioctl::Setter::<TUNSETVNETHDRSZ, libc::c_int>::new(size) };
        // SAFETY: as above; it changes nothing but the tap.
        let result = unsafe { ioctl::ioctl(&tap.fd, setter) };
        result.map_err(|error| tap.refused("set the header's size of", error))?;
        tap.offloads = KNOWN_OFFLOADS.into_iter().find(|&known| tap.set_offloads(known).is_ok()).unwrap_or(0);
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether [`Tap::open`] created the interface.
    pub fn created(&self) -> bool {
        self.created
    }

    /// The [`offload`]s that the host's kernel knows.
    pub fn offloads(&self) -> u32 {
        self.offloads
    }

    /// Says which [`offload`]s the reader takes from now on.
    pub fn set_offloads(&self, offloads: u32) -> Result<(), Error> {
        if cfg!(fuzzing) {
            return Ok(());
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let setter = unsafe { ioctl::IntegerSetter::<TUNSETOFFLOAD>::new_usize(offloads as usize) };
        // SAFETY: as above; it changes nothing but the tap.
        let result = unsafe { ioctl::ioctl(&self.fd, setter) };
        result.map_err(|error| self.refused("set the offloads of", error))
    }

    /// Throws away the packets that wait to be read; how many.
    pub fn discard(&self) -> u64 {
        // More would have arrived since: this must end.
        (0..10_000).take_while(|_| rustix::io::read(&self.fd, &mut [0; 64]).is_ok()).count() as u64
    }

    /// Sets the interface's MTU, in bytes: what the host sends at most. It needs CAP_NET_ADMIN.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), Error> {
        let refused = |error| self.refused("set the MTU of", error);
        let mut request = InterfaceRequest::new(&self.name)?;
        request.set_number(mtu.into());
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        request.update::<SIOCSIFMTU>(socket.map_err(refused)?).map_err(refused)
    }

    fn refused(&self, what: &'static str, source: Errno) -> Error {
        Error::Refused { what, name: self.name.clone(), source: source.into() }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `struct ifreq`, with the two members of its union that are used here.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    /// `ifr_flags` in the first two bytes, or `ifr_mtu` in the first four.
    value: [u8; size_of::<libc::ifreq>() - libc::IFNAMSIZ],
}

impl InterfaceRequest {
    const EMPTY: Self = Self { name: [0; _], value: [0; _] };

    fn new(name: &str) -> Result<Self, Error> {
        let bytes = name.as_bytes();
        // As the kernel's dev_valid_name; `%` would make a pattern of it.
        let wrong = |byte: u8| matches!(byte, b'/' | b':' | b'%' | 0) || byte.is_ascii_whitespace();
        let len = bytes.len();
        if len == 0 || len >= libc::IFNAMSIZ || matches!(name, "." | "..") || bytes.iter().copied().any(wrong) {
            return Err(Error::Name { name: name.to_owned() });
        }
        let mut request = Self::EMPTY;
        request.name[..len].copy_from_slice(bytes);
        Ok(request)
    }

    fn name(&self) -> String {
        String::from_utf8_lossy(self.name.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
    }

    fn flags(&self) -> i16 {
        i16::from_ne_bytes([self.value[0], self.value[1]])
    }

    fn set_flags(&mut self, flags: i16) {
        self.value[..2].copy_from_slice(&flags.to_ne_bytes());
    }

    /// How many queues of the interface are attached, by anybody; an error if it does not tell.
    fn attached_queues(&self, socket: impl AsFd) -> rustix::io::Result<u32> {
        // struct ethtool_channels: the command, four maxima, and of receive, transmit, other and combined queues how many.
        let mut channels = [0_u32; 9];
        channels[0] = ETHTOOL_GCHANNELS;
        let mut request = Self { name: self.name, ..Self::EMPTY };
        request.value[..size_of::<usize>()].copy_from_slice(&channels.as_mut_ptr().expose_provenance().to_ne_bytes());
        request.update::<SIOCETHTOOL>(socket)?;
        Ok(channels[8])
    }

    fn set_number(&mut self, number: i32) {
        self.value[..4].copy_from_slice(&number.to_ne_bytes());
    }

    /// Makes one of the ioctls that read or write a `struct ifreq`.
    fn update<const OPCODE: Opcode>(&mut self, fd: impl AsFd) -> rustix::io::Result<()> {
        // SAFETY: all operations given here take a `struct ifreq`, whose layout this is, SIOCETHTOOL with the address of a
        // structure that the caller has.
        let updater = unsafe { ioctl::Updater::<OPCODE, Self>::new(self) };
        // SAFETY: as above; they change nothing but the interface.
        unsafe { ioctl::ioctl(fd, updater) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use rustix::thread::CapabilitySet;

    use super::super::tests::{ip, namespace};
    use super::*;

    fn open(name: &str) -> Result<Tap, Error> {
        Tap::open(name, 1).map(|mut taps| taps.remove(0))
    }

    /// Takes CAP_NET_ADMIN from this thread.
    fn drop_privilege() {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
    }

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", ".", "..", "a/b", "a b", "a:b", "tap%d", "a\0", "0123456789abcdef"] {
            assert!(matches!(open(name), Err(Error::Name { .. })), "{name}");
        }
    }

    #[test]
    fn descriptors_that_are_no_tap_are_refused() {
        let file = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let text = |fd| Tap::from_fd(fd).unwrap_err().to_string();
        assert_eq!(text(file), format!("fd={file} is not a tap"));
        assert_eq!(text(-1), "fd=-1 is not open");
        assert_eq!(text(99_999), "fd=99999 is not open");
        assert!(text(1).contains("standard"));
    }

    #[test]
    fn a_tap_has_one_reader() {
        if !namespace() {
            return;
        }
        let tap = open("tap0").unwrap();
        assert!(tap.created());
        assert_eq!(open("tap0").unwrap_err().to_string(), "tap tap0 is in use by another process");
        assert!(matches!(open("lo"), Err(Error::NotATap { .. })));
    }

    #[test]
    fn a_tap_has_as_many_queues_as_are_wanted() {
        if !namespace() {
            return;
        }
        let taps = Tap::open("tap0", 3).unwrap();
        assert_eq!(taps.len(), 3);
        // Only the first is attached, and each changes once.
        assert!(taps[0].attach(true).is_err() && taps[1].attach(false).is_err());
        taps[1].attach(true).unwrap();
        assert!(taps[1].attach(true).is_err());

        ip("tuntap add dev one mode tap");
        ip("tuntap add dev many mode tap multi_queue");
        let text = Tap::open("one", 2).unwrap_err().to_string();
        assert!(text.contains("ip tuntap add dev one mode tap multi_queue"), "{text}");
        let text = open("many").unwrap_err().to_string();
        assert!(text.contains("a tap with several queues (queues=2)"), "{text}");
        assert!(Tap::open("many", 2).is_ok());
    }

    #[test]
    fn a_tap_is_taken_over_by_number() {
        if !namespace() {
            return;
        }
        let Tap { fd, .. } = open("tap0").unwrap();
        rustix::io::fcntl_setfd(&fd, FdFlags::empty()).unwrap();
        let tap = Tap::from_fd(fd.into_raw_fd()).unwrap();
        assert_eq!((tap.name(), tap.created()), ("tap0", false));
        assert_eq!(rustix::io::fcntl_getfd(&tap).unwrap(), FdFlags::CLOEXEC);
        assert_ne!(tap.offloads() & offload::CSUM, 0);

        let fd = rustix::fs::open("/dev/net/tun", OFlags::RDWR, Mode::empty()).unwrap();
        let mut request = InterfaceRequest::new("tap1").unwrap();
        request.set_flags(IFF_TAP | IFF_NO_PI);
        request.update::<TUNSETIFF>(&fd).unwrap();
        assert!(matches!(Tap::from_fd(fd.into_raw_fd()), Err(Error::FdHeader { .. })));
    }

    #[test]
    fn another_users_tap_is_refused() {
        if !namespace() {
            return;
        }
        ip("tuntap add dev mine mode tap user 0");
        ip("tuntap add dev theirs mode tap user 12345");
        drop_privilege();
        assert!(!open("mine").unwrap().created());
        assert_eq!(open("theirs").unwrap_err().to_string(), "tap theirs belongs to another user");
    }

    #[test]
    fn without_privilege_a_missing_tap_is_said_how_to_make() {
        if !namespace() {
            return;
        }
        drop_privilege();
        let text = open("tap7").unwrap_err().to_string();
        assert!(text.contains("tap tap7 does not exist"), "{text}");
        assert!(text.contains("ip tuntap add dev tap7 mode tap user $USER"), "{text}");
    }
}
