//! The network: the loopback interface, the card in the user's network, and what /etc says of names.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use core::ffi::CStr;

use crate::file::{self, make_folder, make_folders, path};
use crate::spec::{Network, Root, Spec};
use crate::sys::{self, Fd};

const AF_INET: u16 = 2;
const SOCK_DGRAM: i32 = 2;
const SIOCADDRT: usize = 0x890b;
const SIOCGIFFLAGS: usize = 0x8913;
const SIOCSIFFLAGS: usize = 0x8914;
const SIOCSIFADDR: usize = 0x8916;
const SIOCSIFNETMASK: usize = 0x891c;
const SIOCGIFHWADDR: usize = 0x8927;
const IFF_UP: u16 = 1;
const RTF_UP: u16 = 1;
const RTF_GATEWAY: u16 = 2;

/// How many network cards are looked at.
const CARDS: u32 = 32;

/// Where files are that are mounted over those of a root that is not ours.
const OVER: &str = "/run/bantam";

/// `struct sockaddr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Address {
    family: u16,
    data: [u8; 14],
}

impl Address {
    /// Of IPv4; the port is zero.
    fn new([a, b, c, d]: [u8; 4]) -> Self {
        Self { family: AF_INET, data: [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0] }
    }
}

/// `struct ifreq`, with an address or, in `address.family`, the flags.
#[repr(C, align(8))]
struct Request {
    name: [u8; 16],
    address: Address,
    rest: [u8; 8],
}

impl Request {
    fn new(name: &str) -> Self {
        let mut request = Self { name: [0; 16], address: Address::default(), rest: [0; 8] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request
    }

    fn make(&mut self, socket: Fd, what: usize) -> sys::Result<()> {
        sys::ioctl(socket, what, &raw mut *self as usize).map(drop)
    }

    fn raise(&mut self, socket: Fd) -> sys::Result<()> {
        self.make(socket, SIOCGIFFLAGS)?;
        self.address.family |= IFF_UP;
        self.make(socket, SIOCSIFFLAGS)
    }
}

/// `struct rtentry`.
#[repr(C)]
#[derive(Default)]
struct Route {
    pad1: u64,
    destination: Address,
    gateway: Address,
    mask: Address,
    flags: u16,
    rest: [u64; 7],
}

/// Brings the loopback interface up, and the card in the user's network if there is one.
pub fn set_up(spec: &Spec) -> Result<(), String> {
    let socket = match (sys::socket(AF_INET, SOCK_DGRAM), &spec.network) {
        (Ok(socket), _) => socket,
        // A kernel without a network.
        (Err(_), None) => return Ok(()),
        (Err(error), Some(_)) => return Err(format!("cannot set up the network: {error}")),
    };
    let _ = Request::new("lo").raise(socket);
    let result = spec.network.as_ref().map_or(Ok(()), |network| connect(socket, network));
    sys::close(socket);
    result
}

fn connect(socket: Fd, network: &Network) -> Result<(), String> {
    let name = find(socket, network.card).ok_or("there is no card for the network: has the kernel virtio_net?")?;
    let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix_length)).unwrap_or(0);
    let set = || -> sys::Result<()> {
        let mut request = Request::new(&name);
        request.address = Address::new(network.address);
        request.make(socket, SIOCSIFADDR)?;
        request.address = Address::new(mask.to_be_bytes());
        request.make(socket, SIOCSIFNETMASK)?;
        request.raise(socket)?;
        let any = Address::new([0; 4]);
        let gateway = Address::new(network.gateway);
        let flags = RTF_UP | RTF_GATEWAY;
        let route = Route { destination: any, gateway, mask: any, flags, ..Route::default() };
        sys::ioctl(socket, SIOCADDRT, &raw const route as usize).map(drop)
    };
    set().map_err(|error| format!("cannot set up the network card {name}: {error}"))
}

/// The name of the card with this address. Its driver may take a moment.
fn find(socket: Fd, card: [u8; 6]) -> Option<String> {
    for _ in 0..1000 {
        for number in 0..CARDS {
            let name = format!("eth{number}");
            let mut request = Request::new(&name);
            if request.make(socket, SIOCGIFHWADDR).is_ok() && request.address.data.starts_with(&card) {
                return Some(name);
            }
        }
        sys::pause_for(5);
    }
    None
}

/// Has /etc/resolv.conf name the network's server, and /etc/hosts the guest itself.
pub fn write_names(spec: &Spec) {
    let ours = match spec.root {
        Root::Initramfs => true,
        Root::Overlay(_) => spec.upper.is_none(),
        Root::Writable(_) | Root::Share(_) => false,
    };
    let replace = |name: &str, content: &[u8]| {
        let target = path(&format!("/etc/{name}"));
        let written = if ours {
            make_folder(c"/etc", 0o755).and_then(|()| write(&target, content))
        } else {
            cover(name, &target, content)
        };
        if let Err(error) = written {
            crate::say(&format!("cannot write /etc/{name}: {error}"));
        }
    };
    if let Some(network) = &spec.network {
        let [a, b, c, d] = network.name_server;
        replace("resolv.conf", format!("nameserver {a}.{b}.{c}.{d}\n").as_bytes());
    }
    if let Some(host) = &spec.host_name {
        let mut hosts = file::read(c"/etc/hosts").unwrap_or_else(|_| b"127.0.0.1\tlocalhost\n".to_vec());
        if !names(&hosts, host) {
            if hosts.last().is_some_and(|byte| *byte != b'\n') {
                hosts.push(b'\n');
            }
            hosts.extend_from_slice(b"127.0.1.1\t");
            hosts.extend_from_slice(host);
            hosts.push(b'\n');
            replace("hosts", &hosts);
        }
    }
}

/// Whether a line of `hosts` is about `host`.
fn names(hosts: &[u8], host: &[u8]) -> bool {
    let lines = hosts.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b'#').next());
    let mut words = lines.flat_map(|line| line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).skip(1));
    words.any(|word| word == host)
}

/// Puts a file with this content in the place of what is there, be it a symlink.
fn write(target: &CStr, content: &[u8]) -> sys::Result<()> {
    let _ = sys::unlink(target);
    let fd = sys::open(target, sys::WRITE_ONLY | sys::CREATE)?;
    let result = sys::write(fd, content).map(drop);
    sys::close(fd);
    result
}

/// Mounts a file with this content over what is there, as the root is not ours to write.
fn cover(name: &str, target: &CStr, content: &[u8]) -> sys::Result<()> {
    match sys::open(target, sys::READ) {
        Ok(there) => sys::close(there),
        Err(error) => {
            // A symlink to where a service would put it is for us to fill, as /run is in memory.
            let file = target_in_run(target).ok_or(error)?;
            let end = file.as_bytes().iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            make_folders(&CString::new(&file.as_bytes()[..end]).unwrap_or_default())?;
            return write(&file, content);
        }
    }
    let over = path(&format!("{OVER}/{name}"));
    make_folders(&path(OVER))?;
    write(&over, content)?;
    sys::mount(&over, target, c"", sys::MS_BIND, c"")
}

/// Where a symlink of /etc leads to, if that is in /run.
fn target_in_run(link: &CStr) -> Option<CString> {
    let mut buffer = [0; 512];
    let length = sys::read_link(link, &mut buffer).ok()?;
    let target = &buffer[..length];
    let rest = target.strip_prefix(b"/run/").or_else(|| target.strip_prefix(b"../run/"))?;
    CString::new([b"/run/", rest].concat()).ok()
}
