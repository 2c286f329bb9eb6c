//! vhost-net: a thread of the host's kernel that moves packets between the driver's rings and the tap, in the place of
//! the device's own.
//!
//! Linux, `<linux/vhost.h>` and drivers/vhost. The kernel is given the queues when the driver starts, and gives them back
//! with their positions when the device is paused or reset: what is saved is the same with it and without.

#![expect(unsafe_code, reason = "the ioctls of vhost, and descriptors of eventfds that are borrowed")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll::EventFlags;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode as FileMode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, opcode};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;
use crate::virtio::device::{Error, Io};
use crate::virtio::queue::Queue;

const VHOST_SET_FEATURES: Opcode = opcode::write::<u64>(0xaf, 0x00);
const VHOST_GET_FEATURES: Opcode = opcode::read::<u64>(0xaf, 0x00);
const VHOST_SET_OWNER: Opcode = opcode::none(0xaf, 0x01);
const VHOST_SET_MEM_TABLE: Opcode = opcode::write::<[u32; 2]>(0xaf, 0x03);
const VHOST_SET_VRING_NUM: Opcode = opcode::write::<[u32; 2]>(0xaf, 0x10);
const VHOST_SET_VRING_ADDR: Opcode = opcode::write::<RingAddresses>(0xaf, 0x11);
const VHOST_SET_VRING_BASE: Opcode = opcode::write::<[u32; 2]>(0xaf, 0x12);
const VHOST_GET_VRING_BASE: Opcode = opcode::read_write::<[u32; 2]>(0xaf, 0x12);
const VHOST_SET_VRING_KICK: Opcode = opcode::write::<RingFile>(0xaf, 0x20);
const VHOST_SET_VRING_CALL: Opcode = opcode::write::<RingFile>(0xaf, 0x21);
const VHOST_SET_VRING_ERR: Opcode = opcode::write::<RingFile>(0xaf, 0x22);
const VHOST_NET_SET_BACKEND: Opcode = opcode::write::<RingFile>(0xaf, 0x30);

/// What the kernel has to know of the rings; the rest of the features is between the tap and the driver.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// The most regions of guest memory, of the 64 that the kernel takes.
const MAX_REGIONS: usize = 8;
/// What a queue's backend is when it has none.
const NONE: RawFd = -1;

/// Whether the host's kernel moves a card's packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Vhost"))]
pub enum Mode {
    /// It does, or there is no card.
    On,
    /// It does not: all of it stays in the sandbox, is counted, and can be limited.
    #[default]
    Off,
    /// It does on a tap without limits, if `/dev/vhost-net` can be used.
    Auto,
}

/// An open `/dev/vhost-net`, which has a card's queues or does not.
#[derive(Debug)]
pub struct Vhost {
    fd: OwnedFd,
    /// Whether its thread is there.
    has_owner: bool,
    /// What it works with while it has the queues.
    attached: Option<Attached>,
}

#[derive(Debug)]
struct Attached {
    /// Signalled when the driver is to be interrupted,
    call: OwnedFd,
    /// and when it broke a ring.
    broken: OwnedFd,
    /// The queues that the kernel has, by its numbers, and the device's number of the first.
    queues: Vec<u32>,
    first: usize,
    /// The memory that the kernel reads and writes by its addresses.
    _ram: GuestRam,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct RingFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_memory`, with room for some regions.
#[repr(C)]
#[derive(Default)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; MAX_REGIONS],
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest_address: u64,
    bytes: u64,
    host_address: u64,
    flags: u64,
}

impl Vhost {
    /// Opens `/dev/vhost-net`. Nothing runs before it [is attached](Self::attach).
    ///
    /// # Errors
    /// When there is none, it is not permitted, or it cannot do what a driver may ask for.
    pub fn open() -> io::Result<Self> {
        let fd = rustix::fs::open("/dev/vhost-net", OFlags::RDWR | OFlags::CLOEXEC, FileMode::empty())?;
        // SAFETY: VHOST_GET_FEATURES writes a u64.
        let getter = unsafe { ioctl::Getter::<VHOST_GET_FEATURES, u64>::new() };
        // SAFETY: as above; it changes nothing.
        let known = unsafe { ioctl::ioctl(&fd, getter) }?;
        if known & FEATURES != FEATURES {
            return Err(io::Error::other(format!("the host's kernel lacks the features {:#x}", FEATURES & !known)));
        }
        Ok(Self { fd, has_owner: false, attached: None })
    }

    /// Whether it has the queues.
    pub fn is_attached(&self) -> bool {
        self.attached.is_some()
    }

    /// Gives two queues of `io`, from `first` on, to the kernel, to move packets between them and `tap`, for a driver that
    /// negotiated `features`. Calls `host_ready` with the first of the tokens when the driver is to be interrupted, and with the second
    /// when it broke a ring.
    ///
    /// # Errors
    /// When the host refuses: it has none of the queues then.
    pub fn attach(
        &mut self,
        tap: impl AsFd,
        features: u64,
        tokens: [u32; 2],
        first: usize,
        io: &mut Io,
    ) -> io::Result<()> {
        if !self.has_owner {
            // Here, not when it is opened: the kernel's thread is in the control group and namespaces of this one.
            // SAFETY: VHOST_SET_OWNER has no argument.
            let no_arg = unsafe { ioctl::NoArg::<VHOST_SET_OWNER>::new() };
            // SAFETY: as above; the thread that it makes does nothing by itself.
            unsafe { ioctl::ioctl(&self.fd, no_arg) }?;
            self.has_owner = true;
        }
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let attached = Attached { call: event()?, broken: event()?, queues: vec![], first, _ram: io.ram.clone() };
        for (token, event) in tokens.into_iter().zip([&attached.call, &attached.broken]) {
            io.watch(token, event, EventFlags::IN | EventFlags::ET)?;
        }
        // From here on it is there to be taken back.
        self.attached = Some(attached);
        let given = self.give(tap.as_fd(), features, io);
        if given.is_err() {
            // What it did meanwhile counts.
            self.detach(io).map_err(io::Error::other)?;
        }
        given
    }

    fn give(&mut self, tap: BorrowedFd<'_>, features: u64, io: &Io) -> io::Result<()> {
        let Some(Attached { call, broken, first, .. }) = &self.attached else { return Ok(()) };
        let first = *first;
        self.set::<VHOST_SET_FEATURES, _>(features & FEATURES)?;
        self.set::<VHOST_SET_MEM_TABLE, _>(memory_table(&io.ram)?)?;
        let queues = || (0..2).zip(&io.queues[first..]).filter_map(|(index, queue)| Some((index, queue.as_ref()?)));
        for (index, queue) in queues() {
            let file = |fd: RawFd| RingFile { index, fd };
            self.set::<VHOST_SET_VRING_NUM, _>([index, queue.ring().size().into()])?;
            self.set::<VHOST_SET_VRING_BASE, _>([index, queue.ring().next_avail().into()])?;
            self.set::<VHOST_SET_VRING_ADDR, _>(ring_addresses(&io.ram, index, queue)?)?;
            self.set::<VHOST_SET_VRING_CALL, _>(file(call.as_raw_fd()))?;
            self.set::<VHOST_SET_VRING_ERR, _>(file(broken.as_raw_fd()))?;
            self.set::<VHOST_SET_VRING_KICK, _>(file(queue.kick().as_raw_fd()))?;
        }
        for (index, queue) in queues() {
            self.set::<VHOST_NET_SET_BACKEND, _>(RingFile { index, fd: tap.as_raw_fd() })?;
            self.attached.iter_mut().for_each(|attached| attached.queues.push(index));
            // Each notification is for the kernel alone. It was so already if the device was only paused.
            match io.unwatch(kick(queue)) {
                Err(error) if error.raw_os_error() != Some(Errno::NOENT.raw_os_error()) => return Err(error),
                _ => {}
            }
            // What the driver added before is not told otherwise.
            queue.kick_again();
        }
        Ok(())
    }

    /// Takes the queues back from the kernel, which has finished what it took from them.
    ///
    /// # Errors
    /// When the driver broke a ring, or the host refuses.
    pub fn detach(&mut self, io: &mut Io) -> Result<(), Error> {
        let Some(attached) = self.take_queues(io) else { return Ok(()) };
        for index in attached.queues {
            // SAFETY: VHOST_GET_VRING_BASE reads and writes a `struct vhost_vring_state`, which is an index and a number.
            let mut state = [index, 0];
            // SAFETY: as above.
            let updater = unsafe { ioctl::Updater::<VHOST_GET_VRING_BASE, [u32; 2]>::new(&mut state) };
            // SAFETY: as above; it changes nothing but the state.
            unsafe { ioctl::ioctl(&self.fd, updater) }.map_err(|error| Error::Host {
                what: format!("cannot take virtqueue {index} back from vhost (VHOST_GET_VRING_BASE)"),
                source: error.into(),
            })?;
            if let Some((ram, queue)) = io.queue(attached.first + index as usize) {
                queue.go_on_after(ram, (state[1] & 0xffff) as u16)?;
            }
        }
        Ok(())
    }

    /// Has the kernel leave the queues alone.
    fn take_queues(&mut self, io: &Io) -> Option<Attached> {
        let attached = self.attached.take()?;
        self.stop(&attached.queues);
        for event in [&attached.call, &attached.broken] {
            if let Err(error) = io.unwatch(event) {
                log::error!("cannot stop watching vhost: {error}");
            }
        }
        Some(attached)
    }

    fn stop(&self, queues: &[u32]) {
        for index in queues {
            if let Err(error) = self.set::<VHOST_NET_SET_BACKEND, _>(RingFile { index: *index, fd: NONE }) {
                log::error!("cannot take virtqueue {index} back from vhost (VHOST_NET_SET_BACKEND): {error}");
            }
        }
    }

    /// Has the device's thread hear the driver's notifications by two queues again, from `first` on.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn give_kicks_back(first: usize, io: &Io) -> io::Result<()> {
        for (index, queue) in io.queues.iter().enumerate().skip(first).take(2) {
            if let Some(queue) = queue {
                io.watch_kick(index, kick(queue))?;
                queue.kick_again();
            }
        }
        Ok(())
    }

    /// Makes one of the ioctls that read a `T`.
    fn set<const OPCODE: Opcode, T>(&self, value: T) -> io::Result<()> {
        // SAFETY: each operation is given the structure that it reads.
        let setter = unsafe { ioctl::Setter::<OPCODE, T>::new(value) };
        // SAFETY: the kernel reads and writes guest memory by what it is told here, and nothing else. No reference to that exists,
        // and it is kept mapped until the kernel was told to leave it.
        Ok(unsafe { ioctl::ioctl(&self.fd, setter) }?)
    }
}

impl Drop for Vhost {
    /// A forked process may have the descriptor open for some time yet.
    fn drop(&mut self) {
        if let Some(attached) = &self.attached {
            self.stop(&attached.queues);
        }
    }
}

/// The eventfd of a queue's notifications.
fn kick(queue: &Queue) -> BorrowedFd<'_> {
    // SAFETY: it is open for as long as the queue is borrowed.
    unsafe { BorrowedFd::borrow_raw(queue.kick().as_raw_fd()) }
}

/// All of guest memory, and nothing else.
fn memory_table(ram: &GuestRam) -> io::Result<MemoryTable> {
    let mut table = MemoryTable::default();
    for region in ram.iter() {
        let pages = region.as_volatile_slice().map_err(io::Error::other)?;
        let next = table.regions.get_mut(table.count as usize);
        *next.ok_or_else(|| io::Error::other("guest memory has too many regions for vhost"))? = MemoryRegion {
            guest_address: region.start_addr().0,
            bytes: region.len(),
            host_address: pages.ptr_guard_mut().as_ptr() as u64,
            flags: 0,
        };
        table.count += 1;
    }
    Ok(table)
}

/// Where a queue's rings are in this process.
fn ring_addresses(ram: &GuestRam, index: u32, queue: &Queue) -> io::Result<RingAddresses> {
    let size = usize::from(queue.ring().size());
    let host = |guest: u64, bytes: usize| {
        let part = ram.get_slice(GuestAddress(guest), bytes).map_err(io::Error::other)?;
        Ok::<_, io::Error>(part.ptr_guard_mut().as_ptr() as u64)
    };
    Ok(RingAddresses {
        index,
        flags: 0,
        descriptors: host(queue.ring().desc_table(), 16 * size)?,
        available: host(queue.ring().avail_ring(), 6 + 2 * size)?,
        used: host(queue.ring().used_ring(), 6 + 8 * size)?,
        log: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::virtio::queue::InterruptState;

    struct Line;

    impl crate::interrupt::Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn queue(descriptors: u64, available: u64, used: u64) -> Queue {
        let mut ring = virtio_queue::Queue::new(256).unwrap();
        ring.try_set_desc_table_address(GuestAddress(descriptors)).unwrap();
        ring.try_set_avail_ring_address(GuestAddress(available)).unwrap();
        ring.try_set_used_ring_address(GuestAddress(used)).unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Queue::new(0, ring, kick, Arc::new(InterruptState::new(Arc::new(Line))))
    }

    #[test]
    fn the_kernel_is_told_of_guest_memory_and_nothing_else() {
        let ram = crate::memory::reserve(&[0..0x10_0000, 0x20_0000..0x28_0000]).unwrap();
        let table = memory_table(&ram).unwrap();
        let regions = &table.regions[..table.count as usize];
        let guest: Vec<_> = regions.iter().map(|region| (region.guest_address, region.bytes)).collect();
        assert_eq!(guest, [(0, 0x10_0000), (0x20_0000, 0x8_0000)]);
        for region in regions {
            let host = ram.get_host_address(GuestAddress(region.guest_address)).unwrap();
            assert_eq!(region.host_address, host as u64);
        }
        let many: Vec<_> = (0..9).map(|index| index << 20..(index << 20) + 0x1000).collect();
        assert!(memory_table(&crate::memory::reserve(&many).unwrap()).is_err());
    }

    #[test]
    fn rings_are_whole_in_one_region_or_refused() {
        let ram = crate::memory::reserve(&[0..0x10_0000, 0x10_0000..0x20_0000]).unwrap();
        let addresses = ring_addresses(&ram, 1, &queue(0x10_0000, 0x2000, 0x3000)).unwrap();
        let host = |guest| ram.get_host_address(GuestAddress(guest)).unwrap() as u64;
        let RingAddresses { index, descriptors, available, used, .. } = addresses;
        assert_eq!((index, descriptors, available, used), (1, host(0x10_0000), host(0x2000), host(0x3000)));
        // The table of 4096 bytes has its end in the next region, which is elsewhere in this process.
        assert!(ring_addresses(&ram, 1, &queue(0xf_f800, 0x2000, 0x3000)).is_err());
    }
}
