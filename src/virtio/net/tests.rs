//! The device with a driver's side made by hand: rings in guest memory, against sockets and against real taps in
//! network namespaces of their own.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, epoll};
use serde_json::Value;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::host::Host;
use super::rx::Rx;
use super::tx::Tx;
use super::*;
use crate::bus::BusDevice;
use crate::memory::{self, GuestRam};
use crate::virtio::queue::{InterruptState, Queue};
use crate::virtio::testing::{self, Buffer, Ring};

const NEXT: u32 = 1;
const WRITE: u32 = 2;
const INDIRECT: u32 = 4;

/// What the host's end is watched as.
const HOST: u32 = 0;
/// Where buffers are.
const BUFFERS: u64 = 0x10_0000;

fn ram() -> GuestRam {
    memory::reserve(std::slice::from_ref(&(0..0x80_0000))).unwrap()
}

/// A queue, its driver's side, and the eventfd that its interrupts arrive on.
fn queue(ram: &GuestRam, index: usize, size: u16) -> (Ring, Queue, EventFd) {
    let driver = Ring::new(ram, index as u64, size);
    let mut ring = virtio_queue::Queue::new(size).unwrap();
    ring.set_desc_table_address(u32::try_from(driver.descriptors()).ok(), None);
    ring.set_avail_ring_address(u32::try_from(driver.driver()).ok(), None);
    ring.set_used_ring_address(u32::try_from(driver.device()).ok(), None);
    ring.set_event_idx(true);
    ring.set_ready(true);
    assert!(ring.is_valid(ram));
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let state = Arc::new(InterruptState::new(Arc::new(interrupt.try_clone().unwrap())));
    let queue = Queue::new(index, ring, Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), state);
    (driver, queue, interrupt)
}

fn to_device(buffers: &[(u64, u32)]) -> Vec<Buffer> {
    buffers.iter().map(|&(addr, len)| (addr, len, false)).collect()
}

fn from_device(buffers: &[(u64, u32)]) -> Vec<Buffer> {
    buffers.iter().map(|&(addr, len)| (addr, len, true)).collect()
}

fn get(ram: &GuestRam, addr: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    ram.read_slice(&mut data, GuestAddress(addr)).unwrap();
    data
}

fn put(ram: &GuestRam, addr: u64, data: &[u8]) {
    ram.write_slice(data, GuestAddress(addr)).unwrap();
}

/// In place of a tap.
impl Host for UnixDatagram {
    fn receive(&mut self, buffers: &mut Iovecs, rest: &mut [u8]) -> io::Result<usize> {
        buffers.readv(self, rest)
    }

    fn send(&mut self, packet: &mut Iovecs) -> io::Result<()> {
        packet.writev(self).map(drop)
    }
}

/// A receiving half with a socket in place of the tap.
struct Receiver {
    rx: Rx,
    ram: GuestRam,
    driver: Ring,
    queue: Queue,
    interrupt: EventFd,
    host: UnixDatagram,
    tap: UnixDatagram,
    statistics: Statistics,
}

fn receiver(size: u16, mergeable: bool) -> Receiver {
    let ram = ram();
    let (driver, queue, interrupt) = queue(&ram, RX, size);
    let (host, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let rx = Rx::new(&ram, mergeable);
    Receiver { rx, ram, driver, queue, interrupt, host, tap, statistics: Statistics::default() }
}

impl Receiver {
    fn run(&mut self) -> Result<Wait, device::Error> {
        self.rx.run(&mut self.tap, &self.ram, &mut self.queue, &mut None, &self.statistics)
    }

    /// Sends a packet of `length` bytes with the header, numbered bytes after it.
    fn send(&self, length: usize) -> Vec<u8> {
        let mut packet: Vec<u8> = (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect();
        packet[..HEADER].fill(0);
        self.host.send(&packet).unwrap();
        packet
    }

    fn malformed(&mut self) {
        let error = self.run().unwrap_err();
        assert!(error.to_string().contains("malformed"), "{error}");
    }
}

#[test]
fn a_packet_fills_as_many_buffers_as_it_needs() {
    let mut r = receiver(8, true);
    for i in 0..4 {
        // Two descriptors each, the first shorter than the header.
        r.driver.add(&from_device(&[(BUFFERS + i * 0x1000, 5), (BUFFERS + i * 0x1000 + 0x800, 95)]));
    }
    let sent = r.send(250);
    r.send(50);
    assert_eq!(r.run().unwrap(), Wait::Driver);
    assert_eq!(r.driver.used(), [(0, 100), (2, 100), (4, 50), (6, 50)]);
    assert_eq!(r.interrupt.read().unwrap(), 1, "one interrupt for both");
    let mut received = vec![];
    for i in 0..3 {
        received.extend(get(&r.ram, BUFFERS + i * 0x1000, 5));
        received.extend(get(&r.ram, BUFFERS + i * 0x1000 + 0x800, 95));
    }
    assert_eq!(received[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(received[12..250], sent[12..]);
    assert_eq!(get(&r.ram, BUFFERS + 0x3000 + 0x800 + 5, 2), [1, 0]);
    assert_eq!((r.statistics.rx_packets.get(), r.statistics.rx_bytes.get()), (2, 238 + 38));
}

#[test]
fn the_longest_packet_arrives_whole_in_small_buffers() {
    let mut r = receiver(256, true);
    for i in 0..256 {
        r.driver.add(&from_device(&[(BUFFERS + i * 0x800, 1526)]));
    }
    let sent = r.send(MAX_PACKET);
    assert_eq!(r.run().unwrap(), Wait::Host);
    let used = r.driver.used();
    assert_eq!(used.len(), MAX_PACKET.div_ceil(1526));
    let received: Vec<u8> =
        used.iter().flat_map(|&(id, len)| get(&r.ram, BUFFERS + u64::from(id) * 0x800, len as usize)).collect();
    assert_eq!(received[10..12], u16::try_from(used.len()).unwrap().to_le_bytes());
    assert_eq!(received[12..], sent[12..]);
}

#[test]
fn without_buffers_packets_wait_and_none_is_lost() {
    let mut r = receiver(4, true);
    r.send(60);
    r.send(61);
    assert_eq!(r.run().unwrap(), Wait::Driver);
    assert_eq!((r.driver.used(), r.statistics.rx_stops.get()), (vec![], 1));
    for length in [60, 61] {
        r.driver.add(&from_device(&[(BUFFERS, 200)]));
        assert_eq!(r.run().unwrap(), Wait::Driver);
        assert_eq!(r.driver.used().iter().map(|used| used.1).collect::<Vec<_>>(), [length]);
    }
    assert_eq!(r.statistics.rx_drops.get(), 0);
}

#[test]
fn a_packet_longer_than_the_buffers_waits_for_more() {
    let mut r = receiver(8, true);
    r.driver.add(&from_device(&[(BUFFERS, 100)]));
    let sent = r.send(250);
    r.send(70);
    assert_eq!(r.run().unwrap(), Wait::Driver);
    r.driver.add(&from_device(&[(BUFFERS + 100, 100)]));
    assert_eq!(r.run().unwrap(), Wait::Driver);
    assert_eq!(r.driver.used(), [], "the driver gets a packet whole or not at all");
    r.driver.add(&from_device(&[(BUFFERS + 200, 100)]));
    r.driver.add(&from_device(&[(BUFFERS + 300, 100)]));
    assert_eq!(r.run().unwrap(), Wait::Driver);
    assert_eq!(r.driver.used(), [(0, 100), (1, 100), (2, 50), (3, 70)]);
    let received = get(&r.ram, BUFFERS, 250);
    assert_eq!(received[10..12], [3, 0]);
    assert_eq!(received[12..], sent[12..]);
    assert_eq!(r.statistics.rx_drops.get(), 0);
}

#[test]
fn a_packet_longer_than_the_whole_ring_is_dropped() {
    let mut r = receiver(2, true);
    r.driver.add(&from_device(&[(BUFFERS, 100)]));
    r.driver.add(&from_device(&[(BUFFERS + 100, 100)]));
    r.send(201);
    r.send(20);
    assert_eq!(r.run().unwrap(), Wait::Host);
    assert_eq!(r.driver.used(), [(0, 20)]);
    assert_eq!((r.statistics.rx_drops.get(), r.statistics.rx_packets.get()), (1, 1));
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_chain() {
    let mut r = receiver(8, false);
    r.driver.add(&from_device(&[(BUFFERS, 12), (BUFFERS + 100, 88)]));
    r.driver.add(&from_device(&[(BUFFERS + 200, 100)]));
    r.send(101);
    let sent = r.send(100);
    assert_eq!(r.run().unwrap(), Wait::Host);
    assert_eq!(r.driver.used(), [(0, 100)], "the longer one is dropped and its buffer used for the next");
    assert_eq!(get(&r.ram, BUFFERS, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(get(&r.ram, BUFFERS + 100, 88), sent[12..]);
    assert_eq!(r.statistics.rx_drops.get(), 1);
}

#[test]
fn stopping_gives_back_what_was_not_used() {
    let mut r = receiver(8, true);
    for i in 0..3 {
        r.driver.add(&from_device(&[(BUFFERS + i * 0x1000, 100)]));
    }
    r.send(60);
    assert_eq!(r.run().unwrap(), Wait::Host);
    r.rx.stop(&mut r.queue, &r.statistics);
    r.rx = Rx::new(&r.ram, true);
    r.send(61);
    r.send(62);
    assert_eq!(r.run().unwrap(), Wait::Driver);
    assert_eq!(r.driver.used(), [(0, 60), (1, 61), (2, 62)]);
}

#[test]
fn packets_come_in_batches() {
    let mut r = receiver(256, true);
    let batch = usize::try_from(BATCH).unwrap();
    for i in 0..200 {
        r.driver.add(&from_device(&[(BUFFERS + i * 0x1000, 2048)]));
    }
    r.host.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut received = 0;
    while received < 150 {
        while sent < 150 && r.host.send(&[0; 60]).is_ok() {
            sent += 1;
        }
        assert_eq!(r.run().unwrap(), Wait::Host);
        let used = r.driver.used().len();
        assert!((1..=batch).contains(&used), "{used}");
        received += used;
    }
}

#[test]
fn a_malformed_receive_chain_needs_a_reset() {
    let outside = [(0x900_0000, 100), (0x7f_ffff, 2), (u64::MAX - 10, 100), (0, u32::MAX)];
    for buffer in outside {
        let mut r = receiver(4, true);
        r.driver.add(&from_device(&[buffer]));
        r.malformed();
    }
    for short in [0, 11] {
        let mut r = receiver(4, true);
        r.driver.add(&from_device(&[(BUFFERS, short)]));
        r.malformed();
    }
    let mut r = receiver(4, true);
    r.driver.add(&to_device(&[(BUFFERS, 100)]));
    r.malformed();
    // A loop of two, and a next descriptor beyond the table.
    let mut r = receiver(4, true);
    r.driver.write_descriptor(r.driver.descriptors(), 0, (BUFFERS, 100), WRITE | NEXT, 1);
    r.driver.write_descriptor(r.driver.descriptors(), 1, (BUFFERS, 100), WRITE | NEXT, 0);
    r.driver.publish(0);
    r.malformed();
    let mut r = receiver(4, true);
    r.driver.write_descriptor(r.driver.descriptors(), 0, (BUFFERS, 100), WRITE | NEXT, 4);
    r.driver.publish(0);
    r.malformed();
    // Indirect tables: outside memory, odd, nested, longer than the queue.
    for (addr, len) in [(0x900_0000, 64), (BUFFERS, 63), (BUFFERS, 0)] {
        let mut r = receiver(4, true);
        r.driver.write_descriptor(r.driver.descriptors(), 0, (addr, len), INDIRECT, 0);
        r.driver.publish(0);
        r.malformed();
    }
    let mut r = receiver(4, true);
    r.driver.write_descriptor(BUFFERS, 0, (BUFFERS, 16), INDIRECT, 0);
    r.driver.write_descriptor(r.driver.descriptors(), 0, (BUFFERS, 16), INDIRECT, 0);
    r.driver.publish(0);
    r.malformed();
    let mut r = receiver(4, true);
    for i in 0..1000 {
        r.driver.write_descriptor(BUFFERS, i, (BUFFERS + 0x1_0000, 12), WRITE | if i < 999 { NEXT } else { 0 }, i + 1);
    }
    r.driver.write_descriptor(r.driver.descriptors(), 0, (BUFFERS, 16000), INDIRECT, 0);
    r.driver.publish(0);
    r.malformed();
    // More available than there are descriptors.
    let mut r = receiver(4, true);
    for _ in 0..5 {
        r.driver.publish(0);
    }
    assert!(r.run().is_err());
}

#[test]
fn indirect_receive_chains_work() {
    let mut r = receiver(4, true);
    r.driver.write_descriptor(BUFFERS, 0, (BUFFERS + 0x1000, 12), WRITE | NEXT, 2);
    r.driver.write_descriptor(BUFFERS, 2, (BUFFERS + 0x2000, 100), WRITE, 0);
    r.driver.write_descriptor(r.driver.descriptors(), 3, (BUFFERS, 48), INDIRECT, 0);
    r.driver.publish(3);
    let sent = r.send(112);
    assert_eq!(r.run().unwrap(), Wait::Driver);
    assert_eq!(r.driver.used(), [(3, 112)]);
    assert_eq!(get(&r.ram, BUFFERS + 0x2000, 100), sent[12..]);
}

/// A transmitting half with a socket in place of the tap.
struct Transmitter {
    tx: Tx,
    ram: GuestRam,
    driver: Ring,
    queue: Queue,
    interrupt: EventFd,
    host: UnixDatagram,
    tap: UnixDatagram,
    statistics: Statistics,
}

fn transmitter(size: u16) -> Transmitter {
    let ram = ram();
    let (driver, queue, interrupt) = queue(&ram, TX, size);
    let (host, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let tx = Tx::new(&ram);
    Transmitter { tx, ram, driver, queue, interrupt, host, tap, statistics: Statistics::default() }
}

impl Transmitter {
    fn run(&mut self) -> Wait {
        self.tx.run(&mut self.tap, &self.ram, &mut self.queue, &mut None, &self.statistics).unwrap()
    }
}

#[test]
fn packets_are_sent_from_where_they_are() {
    let mut t = transmitter(8);
    let packet: Vec<u8> = (0..100).collect();
    put(&t.ram, BUFFERS, &packet);
    t.driver.add(&to_device(&[(BUFFERS, 5), (BUFFERS + 5, 20), (BUFFERS + 25, 75)]));
    t.driver.write_descriptor(BUFFERS + 0x1000, 0, (BUFFERS, 12), NEXT, 1);
    t.driver.write_descriptor(BUFFERS + 0x1000, 1, (BUFFERS + 12, 50), 0, 0);
    t.driver.write_descriptor(t.driver.descriptors(), 7, (BUFFERS + 0x1000, 32), INDIRECT, 0);
    t.driver.publish(7);
    assert_eq!(t.run(), Wait::Driver);
    let mut received = [0; 200];
    assert_eq!(t.host.recv(&mut received).unwrap(), 100);
    assert_eq!(received[..100], packet);
    assert_eq!(t.host.recv(&mut received).unwrap(), 62);
    assert_eq!(t.driver.used(), [(0, 0), (7, 0)]);
    assert_eq!(t.interrupt.read().unwrap(), 1, "one interrupt for both");
    assert_eq!((t.statistics.tx_packets.get(), t.statistics.tx_bytes.get()), (2, 88 + 50));
}

#[test]
fn a_full_tap_holds_packets_up_and_none_is_lost() {
    let mut t = transmitter(256);
    for i in 0..200u8 {
        put(&t.ram, BUFFERS + u64::from(i) * 0x1000, &[i; 3000]);
    }
    for i in 0..200 {
        t.driver.add(&to_device(&[(BUFFERS + i * 0x1000, 3000)]));
    }
    let (mut next, mut used) = (0, 0);
    let mut packet = [0; 4096];
    while used < 200 {
        let wait = t.run();
        used += t.driver.used().len();
        assert_eq!(t.statistics.tx_packets.get(), used as u64);
        while let Ok(length) = t.host.recv(&mut packet) {
            assert_eq!((length, packet[0]), (3000, next));
            next += 1;
        }
        assert!(wait == Wait::Host || used == 200 || used % 64 == 0 || t.queue.kick().read().is_ok());
    }
    assert_eq!(next, 200);
    assert!(t.statistics.tx_stops.get() > 0);
    assert_eq!(t.statistics.tx_drops.get() + t.statistics.tx_errors.get(), 0);
}

#[test]
fn what_is_no_packet_is_given_back_unsent() {
    let mut t = transmitter(16);
    t.driver.add(&to_device(&[(BUFFERS, 11)]));
    t.driver.add(&to_device(&[(BUFFERS, 0)]));
    t.driver.add(&from_device(&[(BUFFERS, 100)]));
    t.driver.add(&to_device(&[(0x900_0000, 100)]));
    t.driver.add(&to_device(&[(BUFFERS, u32::try_from(MAX_PACKET).unwrap() + 1)]));
    t.driver.write_descriptor(t.driver.descriptors(), 10, (BUFFERS, 100), NEXT, 10);
    t.driver.publish(10);
    t.driver.write_descriptor(t.driver.descriptors(), 11, (0x900_0000, 32), INDIRECT, 0);
    t.driver.publish(11);
    t.driver.add(&to_device(&[(BUFFERS, 60)]));
    assert_eq!(t.run(), Wait::Driver);
    assert_eq!(t.driver.used().iter().map(|used| used.0).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 10, 11, 5]);
    assert_eq!((t.statistics.tx_errors.get(), t.statistics.tx_packets.get()), (7, 1));
    assert_eq!(t.host.recv(&mut [0; 100]).unwrap(), 60);
    assert!(t.host.recv(&mut [0; 100]).is_err());
}

#[test]
fn a_driver_that_never_stops_sending_lets_go_of_the_thread() {
    let mut t = transmitter(256);
    for _ in 0..250 {
        t.driver.add(&to_device(&[(BUFFERS, 4)]));
    }
    for _ in 0..3 {
        t.run();
        assert_eq!(t.driver.used().len(), usize::try_from(BATCH).unwrap());
        assert_eq!(t.queue.kick().read().unwrap(), 1, "it calls itself again");
    }
    t.run();
    assert_eq!(t.driver.used().len(), 250 - 3 * usize::try_from(BATCH).unwrap());
    assert!(t.queue.kick().read().is_err());
}

fn descriptors() -> impl Strategy<Value = Vec<(u64, u32, u16, u16)>> {
    let addr = prop_oneof![Just(BUFFERS), Just(0x4000), Just(0x7f_fff0), Just(0x80_0000), any::<u64>()];
    let len = prop_oneof![0u32..64, Just(2048), Just(0x1_0000), any::<u32>()];
    let flags = prop_oneof![0u16..8, any::<u16>()];
    prop::collection::vec((addr, len, flags, 0u16..10), 8)
}

proptest! {
    #[test]
    fn no_ring_stops_the_host(table in descriptors(), indirect in descriptors(), heads in prop::collection::vec(0u16..9, 0..10)) {
        let mut r = receiver(8, heads.len() % 2 == 0);
        let mut t = transmitter(8);
        for (i, (addr, len, flags, next)) in (0u16..).zip(&table) {
            r.driver.write_descriptor(r.driver.descriptors(), i, (*addr, *len), (*flags).into(), *next);
            t.driver.write_descriptor(t.driver.descriptors(), i, (*addr, *len), (*flags).into(), *next);
        }
        for (i, (addr, len, flags, next)) in (0u16..).zip(&indirect) {
            r.driver.write_descriptor(BUFFERS, i, (*addr, *len), (*flags).into(), *next);
            t.driver.write_descriptor(BUFFERS, i, (*addr, *len), (*flags).into(), *next);
        }
        for head in heads {
            r.driver.publish(head);
            t.driver.publish(head);
        }
        for length in [0, 5, 60, 3000] {
            r.host.send(&vec![7; length]).unwrap();
        }
        let _ = r.run();
        let moved = r.statistics.rx_packets.get() + r.statistics.rx_drops.get();
        prop_assert!(moved <= 4);
        let _ = t.tx.run(&mut t.tap, &t.ram, &mut t.queue, &mut None, &t.statistics);
        let sent = t.statistics.tx_packets.get();
        for _ in 0..sent {
            prop_assert!(t.host.recv(&mut [0; 100]).is_ok());
        }
        prop_assert!(t.host.recv(&mut [0; 100]).is_err());
    }
}

#[test]
fn a_limit_holds_packets_up_in_both_directions() {
    let limit = || RateLimiter::new(Rates { bytes: Some("1000".parse().unwrap()), operations: None }).unwrap();
    let wait = |limit: &mut Option<RateLimiter>| {
        let limit = limit.as_mut().unwrap();
        rustix::event::poll(&mut [PollFd::new(limit, PollFlags::IN)], None).unwrap();
        limit.woken();
    };
    let mut r = receiver(8, true);
    for i in 0..4 {
        r.driver.add(&from_device(&[(BUFFERS + i * 0x1000, 0x1000)]));
    }
    let sent: Vec<_> = (0..3).map(|_| r.send(812)).collect();
    let mut limited = limit();
    let run = |r: &mut Receiver, limit: &mut _| r.rx.run(&mut r.tap, &r.ram, &mut r.queue, limit, &r.statistics);
    assert_eq!(run(&mut r, &mut limited).unwrap(), Wait::Limit);
    assert_eq!((r.driver.used().len(), r.statistics.rx_throttled.get()), (2, 1));
    wait(&mut limited);
    assert_eq!(run(&mut r, &mut limited).unwrap(), Wait::Limit);
    wait(&mut limited);
    assert_eq!(run(&mut r, &mut limited).unwrap(), Wait::Host);
    assert_eq!((r.driver.used().len(), r.statistics.rx_packets.get()), (1, 3));
    assert_eq!(get(&r.ram, BUFFERS + 0x2000 + HEADER as u64, 800), sent[2][HEADER..]);

    let mut t = transmitter(8);
    for i in 0..3 {
        t.driver.add(&to_device(&[(BUFFERS + i * 0x1000, 812)]));
    }
    let mut limited = limit();
    let run = |t: &mut Transmitter, limit: &mut _| t.tx.run(&mut t.tap, &t.ram, &mut t.queue, limit, &t.statistics);
    assert_eq!(run(&mut t, &mut limited).unwrap(), Wait::Limit);
    assert_eq!((t.driver.used().len(), t.statistics.tx_throttled.get()), (2, 1));
    wait(&mut limited);
    assert_eq!(run(&mut t, &mut limited).unwrap(), Wait::Driver);
    assert_eq!((t.driver.used().len(), t.statistics.tx_packets.get()), (1, 3));
}

#[test]
fn a_spec_names_one_tap() {
    let validate = |json: &str| serde_json::from_str::<Spec>(json).unwrap().validate().map_err(|e| e.to_string());
    assert!(validate("{}").unwrap_err().contains("either tap=NAME, fd=N or user"));
    assert!(validate(r#"{"tap": "a", "fd": 3}"#).unwrap_err().contains("either tap=NAME, fd=N or user"));
    assert!(validate(r#"{"tap": "a", "mtu": 67}"#).unwrap_err().contains("68 to 65521"));
    assert_eq!(validate(r#"{"fd": 3, "mtu": 9000}"#), Ok(()));
    assert_eq!(validate(r#"{"tap": "a", "queues": 16}"#), Ok(()));
    assert_eq!(validate(r#"{"fd": 3, "queues": 1}"#), Ok(()));
    for queues in [0, 17] {
        let error = validate(&format!(r#"{{"tap": "a", "queues": {queues}}}"#)).unwrap_err();
        assert_eq!(error, format!("queues={queues} cannot be used: it must be 1 to 16"));
    }
    assert!(validate(r#"{"fd": 3, "queues": 2}"#).unwrap_err().contains("a tap that is given by its descriptor"));
    assert!(validate(r#"{"user": true, "queues": 2}"#).unwrap_err().contains("queues=2 with a user network"));
    let unknown = serde_json::from_str::<Spec>(r#"{"tap": "a", "vlan": 3}"#).unwrap_err();
    assert!(unknown.to_string().contains("unknown field `vlan`"), "{unknown}");
    let spec = Spec { tap: Some("tap0".into()), mac: Some(MacAddr::from_name("x")), ..Spec::default() };
    assert_eq!(serde_json::from_str::<Spec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
}

#[test]
fn offloads_that_the_kernel_would_refuse_are_left_out() {
    let bit = |bit: u32| 1u64 << bit;
    assert_eq!(guest_offloads(bit(VIRTIO_NET_F_GUEST_TSO4)), 0);
    assert_eq!(guest_offloads(bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_ECN)), offload::CSUM);
    let all = OFFLOADS.iter().fold(0, |all, (_, guest, _)| all | bit(*guest));
    assert_eq!(guest_offloads(all), offload::CSUM | offload::TSO4 | offload::TSO6 | offload::ECN | offload::UFO);
}

/// Moves this thread to an empty network namespace where taps can be created. False, said loudly, if it cannot.
pub(super) fn namespace() -> bool {
    let privileged = || -> io::Result<()> {
        #[expect(deprecated, reason = "NEWNET does not touch what makes unshare unsafe: memory and descriptors")]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)?;
        std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        Command::new("ip").arg("-V").output()?;
        // Else the host's own IPv6 chatter fills the queue.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
    };
    match privileged() {
        Ok(()) => true,
        Err(error) => {
            // Not by eprintln, which is shown only of tests that fail.
            let _ = writeln!(io::stderr(), "SKIPPED a test: no network namespace with taps can be made here: {error}");
            false
        }
    }
}

pub(super) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A started device on a real tap.
struct Machine {
    net: Net,
    io: Io,
    rx: Ring,
    tx: Ring,
    buffers: u64,
}

/// A device on the tap `tap0`, and the host's UDP socket, at 10.0.0.1, to the guest, at 10.0.0.2.
fn on_tap(mtu: Option<u16>) -> (Net, UdpSocket) {
    on_spec(Spec { mtu, ..Spec::default() })
}

/// The same with what else is said.
fn on_spec(spec: Spec) -> (Net, UdpSocket) {
    let mac = Some("02:00:00:00:00:02".parse().unwrap());
    let net = Spec { tap: Some("tap0".into()), mac, ..spec }.open().unwrap();
    ip("addr add 10.0.0.1/24 dev tap0");
    ip("neigh add 10.0.0.2 lladdr 02:00:00:00:00:02 dev tap0");
    let host = UdpSocket::bind("10.0.0.1:7").unwrap();
    host.connect("10.0.0.2:7").unwrap();
    host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (net, host)
}

fn machine(mut net: Net, features: u64) -> Machine {
    let ram = ram();
    let (rx, rx_queue, _) = queue(&ram, RX, 256);
    let (tx, tx_queue, _) = queue(&ram, TX, 256);
    let interrupt = Arc::new(InterruptState::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())));
    let events = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let mut io = Io { ram, queues: vec![Some(rx_queue), Some(tx_queue)], interrupt, events };
    net.start(features | 1 << VIRTIO_NET_F_MRG_RXBUF, &mut io).unwrap();
    Machine { net, io, rx, tx, buffers: 0 }
}

impl Machine {
    /// Whether the tap has what the device waits for; then the device was called.
    fn turn(&mut self) -> bool {
        let mut events = Vec::with_capacity(4);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.io.events, rustix::buffer::spare_capacity(&mut events), Some(&now)).unwrap();
        if !events.is_empty() {
            self.net.host_ready(HOST, &mut self.io).unwrap();
        }
        !events.is_empty()
    }

    fn add_buffers(&mut self, count: u64) {
        for _ in 0..count {
            let addr = BUFFERS + self.buffers % 256 * 0x1000;
            self.buffers += 1;
            self.rx.add(&from_device(&[(addr, 2048)]));
        }
        self.net.queue_ready(RX, &mut self.io).unwrap();
    }

    /// The packets that arrived, each from the header on.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let mut packets = vec![];
        let mut used = self.rx.used().into_iter();
        while let Some((id, len)) = used.next() {
            let mut packet = get(&self.io.ram, BUFFERS + u64::from(id) * 0x1000, len as usize);
            for _ in 1..u16::from_le_bytes([packet[10], packet[11]]) {
                let (id, len) = used.next().unwrap();
                packet.extend(get(&self.io.ram, BUFFERS + u64::from(id) * 0x1000, len as usize));
            }
            packets.push(packet);
        }
        packets
    }
}

/// A frame with the UDP datagram `data` from the guest to the host.
fn frame(data: &[u8]) -> Vec<u8> {
    let mac = Command::new("ip").args(["-o", "link", "show", "tap0"]).output().unwrap().stdout;
    let mac = String::from_utf8(mac).unwrap().split("link/ether ").nth(1).unwrap()[..17].to_owned();
    let mut frame = vec![0; HEADER];
    frame.extend(mac.parse::<MacAddr>().unwrap().bytes());
    frame.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    let length = u16::try_from(28 + data.len()).unwrap();
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    let sum = header.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    frame.extend(header);
    frame.extend([0, 7, 0, 7]);
    frame.extend((length - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(data);
    frame
}

#[test]
fn a_tap_takes_packets_both_ways() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(None);
    let mut m = machine(net, 0);
    m.add_buffers(8);
    host.send(b"to the guest").unwrap();
    while m.turn() {}
    let packets = m.received();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0][..10], [0; 10], "no offload was negotiated");
    assert_eq!(packets[0][HEADER..HEADER + 6], [2, 0, 0, 0, 0, 2]);
    assert!(packets[0].ends_with(b"to the guest"));

    let frame = frame(b"to the host");
    put(&m.io.ram, 0x70_0000, &frame);
    m.tx.add(&to_device(&[(0x70_0000, u32::try_from(frame.len()).unwrap())]));
    m.net.queue_ready(TX, &mut m.io).unwrap();
    let mut data = [0; 100];
    let length = host.recv(&mut data).unwrap();
    assert_eq!(data[..length], *b"to the host");
    assert_eq!(m.tx.used(), [(0, 0)]);
}

#[test]
fn a_checksum_is_left_to_a_guest_that_takes_it() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(None);
    let mut m = machine(net, 1 << VIRTIO_NET_F_GUEST_CSUM);
    assert_ne!(m.net.features() & 1 << VIRTIO_NET_F_GUEST_CSUM, 0);
    m.add_buffers(8);
    host.send(b"unfinished").unwrap();
    while m.turn() {}
    // VIRTIO_NET_HDR_F_NEEDS_CSUM, from the UDP header on, 6 bytes into it.
    assert_eq!(m.received()[0][..10], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
}

#[test]
fn a_jumbo_frame_spans_buffers() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(Some(65521));
    let mut m = machine(net, 0);
    assert_eq!(m.net.config()[10..], 65521u16.to_le_bytes());
    m.add_buffers(100);
    let data: Vec<u8> = (0..60000).map(|i| u8::try_from(i % 253).unwrap()).collect();
    host.send(&data).unwrap();
    host.send(b"short").unwrap();
    while m.turn() {}
    let packets = m.received();
    assert_eq!(packets.len(), 2);
    assert_eq!(packets[0].len(), HEADER + 14 + 28 + 60000);
    assert!(packets[0].ends_with(&data) && packets[1].ends_with(b"short"));
    assert_eq!(packets[0][10..12], 30u16.to_le_bytes());
}

#[test]
fn without_buffers_packets_stay_in_the_tap() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(None);
    let mut m = machine(net, 0);
    for i in 0..300u16 {
        host.send(&i.to_be_bytes()).unwrap();
    }
    assert!(m.turn(), "it finds that there are no buffers");
    assert!(!m.turn(), "and stops watching the tap");
    let mut packets = vec![];
    while packets.len() < 300 {
        m.add_buffers(100);
        while m.turn() {}
        let more = m.received();
        assert!(!more.is_empty());
        packets.extend(more);
    }
    for (i, packet) in (0..300u16).zip(&packets) {
        assert!(packet.ends_with(&i.to_be_bytes()));
    }
    assert!(m.net.statistics().rx_stops.get() >= 3);
}

#[test]
fn a_stopped_device_starts_again() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(None);
    let mut m = machine(net, 1 << VIRTIO_NET_F_GUEST_CSUM);
    m.add_buffers(8);
    let mut restart = |features: u64, text: &str| {
        m.net.stop(&mut m.io);
        host.send(text.as_bytes()).unwrap();
        assert!(!m.turn(), "nothing is watched");
        m.net.start(1 << VIRTIO_NET_F_MRG_RXBUF | features, &mut m.io).unwrap();
        while m.turn() {}
        (m.received(), m.net.statistics().rx_drops.get())
    };
    let (packets, dropped) = restart(1 << VIRTIO_NET_F_GUEST_CSUM, "meanwhile");
    assert!(packets[0].ends_with(b"meanwhile") && dropped == 0);
    assert_eq!(restart(0, "unfinished"), (vec![], 1), "a packet that is not for a driver without checksums");
    let (packets, dropped) = restart(0, "finished");
    assert!(packets[0].ends_with(b"finished") && packets[0][0] == 0 && dropped == 1);
    m.net.stop(&mut m.io);
}

#[test]
fn a_driver_and_the_host_talk_through_registers_and_rings() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(None);
    let statistics = net.statistics().clone();
    let mut driver = testing::Driver::new(Box::new(net));
    driver.start();
    for i in 0..16 {
        driver.rings[RX].add(&from_device(&[(testing::BUFFERS + i * 0x1000, 2048)]));
    }
    driver.notify(0);
    for text in ["one", "two"] {
        host.send(text.as_bytes()).unwrap();
        while driver.rings[RX].used().is_empty() {
            driver.wait();
        }
    }
    let packet = driver.get(testing::BUFFERS + 0x1000, 12 + 42 + 3);
    assert!(packet.ends_with(b"two"));

    let frame = frame(b"three");
    driver.put(testing::BUFFERS + 0x10_0000, &frame);
    driver.rings[TX].add(&to_device(&[(testing::BUFFERS + 0x10_0000, u32::try_from(frame.len()).unwrap())]));
    assert_eq!(driver.finish(TX, 1), [(0, 0)]);
    let mut data = [0; 100];
    assert_eq!(host.recv(&mut data).unwrap(), 5);
    assert_eq!(statistics.to_json()["rx-packets"], 2);
    assert_eq!(statistics.to_json()["tx-packets"], 1);
}

#[test]
fn a_header_that_makes_no_sense_costs_only_its_packet() {
    if !namespace() {
        return;
    }
    let (net, host) = on_tap(None);
    let mut m = machine(net, 0);
    // Unknown GSO type; TCP segmentation without a size; a checksum beyond the packet; a header longer than the
    // packet; a frame of one byte.
    let headers: [[u8; 10]; 4] = [
        [0, 9, 0, 0, 100, 0, 0, 0, 0, 0],
        [1, 1, 54, 0, 0, 0, 34, 0, 16, 0],
        [1, 0, 0, 0, 0, 0, 255, 255, 255, 255],
        [1, 1, 255, 255, 100, 0, 34, 0, 16, 0],
    ];
    let good = frame(b"good");
    for (i, header) in (0u64..).zip(headers) {
        let mut frame = good.clone();
        frame[..10].copy_from_slice(&header);
        put(&m.io.ram, 0x70_0000 + i * 0x1000, &frame);
        m.tx.add(&to_device(&[(0x70_0000 + i * 0x1000, u32::try_from(frame.len()).unwrap())]));
    }
    m.tx.add(&to_device(&[(0x70_0000, 13)]));
    put(&m.io.ram, 0x71_0000, &good);
    m.tx.add(&to_device(&[(0x71_0000, u32::try_from(good.len()).unwrap())]));
    m.net.queue_ready(TX, &mut m.io).unwrap();
    let mut data = [0; 100];
    assert_eq!(host.recv(&mut data).unwrap(), 4);
    assert_eq!(m.tx.used().len(), 6);
    assert_eq!((m.net.statistics().tx_drops.get(), m.net.statistics().tx_packets.get()), (5, 1));
}

#[test]
fn a_tap_that_goes_away_needs_a_reset() {
    if !namespace() {
        return;
    }
    let (net, _) = on_tap(None);
    let mut m = machine(net, 0);
    m.add_buffers(8);
    ip("link del tap0");
    let error = m.net.host_ready(HOST, &mut m.io).unwrap_err();
    assert!(error.to_string().contains("cannot read from"), "{error}");
    m.net.stop(&mut m.io);
}

#[test]
fn packets_that_wait_for_a_passt_that_ends_are_dropped() {
    let (passt, mut passt_end) = Passt::in_test();
    let mut m = machine(Net::with(vec![Backend::User(passt)], MacAddr::from_name("x"), None), 0);
    // A packet that there is no buffer for: from now on the host is watched for room only.
    passt_end.write_all(&[0, 0, 0, 14]).unwrap();
    passt_end.write_all(&[0; 14]).unwrap();
    assert!(m.turn() && !m.turn());
    for _ in 0..100 {
        m.tx.add(&to_device(&[(BUFFERS, 60000)]));
    }
    m.net.queue_ready(TX, &mut m.io).unwrap();
    let mut given_back = m.tx.used().len();
    assert!(given_back < 100 && m.net.statistics().tx_stops.get() == 1);

    // Not dropped: a child of another test may have it for a moment.
    passt_end.shutdown(std::net::Shutdown::Both).unwrap();
    m.add_buffers(2);
    assert_eq!(m.net.config()[CONFIG_STATUS], 0, "no link");
    // The device has kicked itself.
    while m.io.queue(TX).unwrap().1.kick().read().is_ok() {
        m.net.queue_ready(TX, &mut m.io).unwrap();
        given_back += m.tx.used().len();
    }
    assert_eq!(given_back, 100);
    assert!(!m.turn(), "nothing is watched");
}

/// Takes what one device received and has the other transmit it, as it is: the longest packet passed on.
fn pass_on(from: &mut Machine, to: &mut Machine) -> usize {
    while from.turn() {}
    let mut longest = 0;
    for (i, packet) in (0u64..).zip(from.received()) {
        from.add_buffers(u16::from_le_bytes([packet[10], packet[11]]).into());
        let addr = 0x20_0000 + i % 64 * 0x1_1000;
        put(&to.io.ram, addr, &packet);
        to.tx.add(&to_device(&[(addr, u32::try_from(packet.len()).unwrap())]));
        to.net.queue_ready(TX, &mut to.io).unwrap();
        assert_eq!(to.tx.used().len(), 1);
        longest = longest.max(packet.len());
    }
    longest
}

#[test]
fn tcp_passes_two_devices_in_large_packets() {
    const BYTES: usize = 20_000_000;
    let byte = |i: usize| u8::try_from(i * 7 % 251).unwrap();
    if !namespace() {
        return;
    }
    // Two hosts, a device each; between them one guest that passes packets on.
    let (net, _) = on_tap(None);
    let listener = TcpListener::bind("10.0.0.1:7").unwrap();
    let offloads = net.features();
    let mut one = machine(net, offloads);
    assert!(namespace());
    let net = Spec { tap: Some("tap0".into()), ..Spec::default() }.open().unwrap();
    ip("addr add 10.0.0.2/24 dev tap0");
    ip("link set tap0 address 02:00:00:00:00:02");
    let mut two = machine(net, offloads);

    let connect = std::thread::spawn(move || {
        let patience = Duration::from_secs(20);
        let mut stream = TcpStream::connect_timeout(&"10.0.0.1:7".parse().unwrap(), patience).unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(patience)).unwrap();
        let data: Vec<u8> = (0..BYTES).map(byte).collect();
        stream.write_all(&data).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = vec![];
        stream.read_to_end(&mut back).unwrap();
        assert!(back == data, "what came back is what was sent");
    });
    let accept = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut data = vec![];
        stream.read_to_end(&mut data).unwrap();
        stream.write_all(&data).unwrap();
    });
    one.add_buffers(256);
    two.add_buffers(256);
    let mut longest = [0; 2];
    while !connect.is_finished() {
        longest[0] = longest[0].max(pass_on(&mut one, &mut two));
        longest[1] = longest[1].max(pass_on(&mut two, &mut one));
        let soon = rustix::event::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let fds = [&one, &two].map(|machine| PollFd::new(&machine.io.events, PollFlags::IN));
        rustix::event::poll(&mut { fds }, Some(&soon)).unwrap();
    }
    connect.join().unwrap();
    accept.join().unwrap();
    assert!(longest.iter().all(|&bytes| bytes > 20_000), "segmentation was left to the end: {longest:?}");
    for m in [one, two] {
        let statistics = m.net.statistics();
        assert_eq!(statistics.tx_drops.get() + statistics.tx_errors.get() + statistics.rx_drops.get(), 0);
    }
}

#[test]
fn limits_that_are_taken_away_let_what_waits_go_on() {
    if !namespace() {
        return;
    }
    let (mut net, _host) = on_tap(None);
    // Otherwise it would take a minute.
    let slow = Rates { operations: Some("1".parse().unwrap()), ..Default::default() };
    net.change(&Change::NetRates { rx: Some(slow), tx: Some(slow) }, None).unwrap();
    let mut driver = testing::Driver::new(Box::new(net));
    driver.start();
    for _ in 0..60 {
        driver.rings[TX].add(&[(testing::BUFFERS, 12 + 60, false)]);
    }
    let mut used = driver.finish(TX, 1).len();
    let change = Change::NetRates { rx: None, tx: Some(Rates::default()) };
    driver.mmio.change(change).recv().unwrap().unwrap();
    while used < 60 {
        driver.wait();
        used += driver.rings[TX].used().len();
    }
    let error = driver.mmio.change(Change::Rates(Rates::default())).recv().unwrap().unwrap_err().to_string();
    assert!(error.contains("a device of this type has none"), "{error}");
}

/// Three pairs of queues, and the control queue, by which commands are given.
struct Pairs(testing::Driver);

const CONTROL: usize = 6;

impl Pairs {
    /// What the device answers to a command, and how much of it it says to have written.
    fn command(&mut self, bytes: &[u8]) -> (u8, u32) {
        let at = testing::BUFFERS + 0x18_0000;
        self.0.put(at, bytes);
        self.0.put(at + 0x100, &[0xaa]);
        self.0.rings[CONTROL].add(&[(at, u32::try_from(bytes.len()).unwrap(), false), (at + 0x100, 1, true)]);
        let used = self.0.finish(CONTROL, 1);
        (self.0.get(at + 0x100, 1)[0], used[0].1)
    }

    fn use_pairs(&mut self, count: u16) -> (u8, u32) {
        let [low, high] = count.to_le_bytes();
        self.command(&[4, 0, low, high])
    }

    /// Gives buffers, whose content nobody looks at, to the first so many pairs.
    fn add_buffers(&mut self, pairs: usize, count: usize) {
        for pair in 0..pairs {
            for _ in 0..count {
                self.0.rings[2 * pair].add(&from_device(&[(testing::BUFFERS, 2048)]));
            }
        }
    }

    /// How many of so many packets arrive in each queue.
    fn received(&mut self, count: usize) -> [usize; 3] {
        let mut arrived = [0; 3];
        loop {
            for (pair, arrived) in arrived.iter_mut().enumerate() {
                *arrived += self.0.rings[2 * pair].used().len();
            }
            if arrived.iter().sum::<usize>() >= count {
                return arrived;
            }
            self.0.wait();
        }
    }
}

/// Sends a datagram from each of so many ports: each is a flow of its own, and the host's kernel chooses a queue for it.
fn send_flows(count: usize) {
    for _ in 0..count {
        let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
        socket.send_to(b"flow", "10.0.0.2:7").unwrap();
    }
}

#[test]
fn as_many_pairs_are_used_as_the_driver_says() {
    if !namespace() {
        return;
    }
    let (net, host) = on_spec(Spec { queues: Some(3), ..Spec::default() });
    let mut pairs = Pairs(testing::Driver::new(Box::new(net)));
    pairs.0.start();
    assert_eq!(pairs.0.rings.len(), 7);
    assert_eq!(pairs.0.read(0x108) & 0xffff, 3, "max_virtqueue_pairs");
    pairs.add_buffers(3, 200);
    pairs.0.notify(0);
    send_flows(60);
    assert_eq!(pairs.received(60), [60, 0, 0], "one pair until the driver says otherwise");

    assert_eq!(pairs.use_pairs(3), (0, 1));
    (0..3).for_each(|pair| pairs.0.notify(2 * pair));
    send_flows(60);
    let arrived = pairs.received(60);
    assert!(arrived.iter().all(|count| *count > 0), "{arrived:?}");
    for pair in 0..3 {
        let frame = frame(&[pair; 5]);
        let at = testing::BUFFERS + 0x17_0000;
        pairs.0.put(at, &frame);
        let queue = 2 * usize::from(pair) + 1;
        pairs.0.rings[queue].add(&to_device(&[(at, u32::try_from(frame.len()).unwrap())]));
        pairs.0.finish(queue, 1);
        let mut data = [0; 100];
        assert_eq!((host.recv(&mut data).unwrap(), data[..5] == [pair; 5]), (5, true));
    }

    for command in
        [&[4, 0, 0, 0][..], &[4, 0, 4, 0], &[4, 0, 0xff, 0xff], &[4, 1, 1, 0], &[0, 0, 1, 0], &[4, 0, 1], &[]]
    {
        assert_eq!(pairs.command(command), (1, 1), "{command:?}");
    }
    assert_eq!(pairs.command(&[4, 0, 1, 0, 0]), (1, 1));

    pairs.0.mmio.pause();
    let mut state = pairs.0.mmio.save();
    assert_eq!(state["queue-pairs"], 3);
    pairs.0.mmio.resume();
    send_flows(30);
    pairs.received(30);
    assert_eq!(pairs.use_pairs(2), (0, 1));
    send_flows(30);
    assert_eq!(pairs.received(30)[2], 0);
    assert_eq!(pairs.use_pairs(2), (0, 1));
    // What is sent by a pair that is not in use is given back.
    pairs.0.rings[5].add(&to_device(&[(testing::BUFFERS, 60)]));
    assert_eq!(pairs.0.finish(5, 1).len(), 1);
    let other = Spec { tap: Some("tap0".into()), queues: Some(2), ..Spec::default() }.open();
    assert!(matches!(other, Err(Error::Tap(tap::Error::Busy { .. }))));

    // A driver that starts over has one, and one that knows of no others has the control queue behind its own.
    for features in [u64::MAX, !(1 << VIRTIO_NET_F_MQ), !(1 << VIRTIO_NET_F_CTRL_VQ)] {
        let offered = pairs.0.offered();
        pairs.0.start_with(offered & features);
        pairs.add_buffers(1, 20);
        pairs.0.notify(0);
        send_flows(20);
        assert_eq!(pairs.received(20), [20, 0, 0]);
        pairs.0.mmio.pause();
        assert!(pairs.0.mmio.save().get("queue-pairs").is_none());
        pairs.0.mmio.resume();
    }
    // One whose queue it broke has none in use before a reset.
    pairs.0.start();
    assert_eq!(pairs.use_pairs(3), (0, 1));
    pairs.0.rings[1].publish(u16::MAX);
    pairs.0.notify(1);
    pairs.0.wait_for_needs_reset();
    pairs.0.mmio.pause();
    let broken = pairs.0.mmio.save();
    drop(pairs);

    let restored = |state: &Value| {
        let net = Spec { tap: Some("tap0".into()), queues: Some(3), ..Spec::default() }.open().unwrap();
        let mut driver = testing::Driver::new(Box::new(net));
        driver.mmio.restore(state).map(|()| driver.mmio.save()["queue-pairs"].clone())
    };
    assert_eq!(restored(&state).unwrap(), 3);
    assert_eq!(restored(&broken).unwrap(), Value::Null);
    for pairs in [0, 4, 65535] {
        state["queue-pairs"] = pairs.into();
        assert!(restored(&state).unwrap_err().to_string().contains(&format!("uses {pairs} pairs of queues")));
    }
}

#[test]
fn pairs_share_a_limit() {
    if !namespace() {
        return;
    }
    let limit: Directions = "1".parse().unwrap();
    let (net, host) = on_spec(Spec { queues: Some(3), pps: Some(limit), ..Spec::default() });
    let mut pairs = Pairs(testing::Driver::new(Box::new(net)));
    pairs.0.start();
    assert_eq!(pairs.use_pairs(3), (0, 1));
    // Far more than the first one may send soon; and one of another, which has its turn.
    let at = testing::BUFFERS + 0x17_0000;
    for (queue, count, text) in [(1, 60, b"many"), (5, 1, b"last")] {
        let frame = frame(text);
        let at = at + 0x1000 * queue as u64;
        pairs.0.put(at, &frame);
        for _ in 0..count {
            pairs.0.rings[queue].add(&to_device(&[(at, u32::try_from(frame.len()).unwrap())]));
        }
        pairs.0.notify(u32::try_from(queue).unwrap());
    }
    let mut data = [0; 100];
    let before = (0..60).take_while(|_| host.recv(&mut data).unwrap() == 4 && &data[..4] == b"many").count();
    assert!(before < 60, "the other pair had no turn");
    let rates = Some(Rates::default());
    pairs.0.mmio.change(Change::NetRates { rx: rates, tx: rates }).recv().unwrap().unwrap();
    for _ in before..60 {
        host.recv(&mut data).unwrap();
    }
}
