//! The device between a driver made by hand and real Unix sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use super::packet::{RECEIVES_NO_MORE, SENDS_NO_MORE};
use super::*;
use crate::virtio::testing::{BUFFERS, Driver};

const CID: u64 = 7;
const PORT: u32 = 5000;
/// Length of each receive buffer.
const ROOM: u32 = 4096;
/// Where the driver's packets are.
const OUT: u64 = BUFFERS;
/// Where the receive buffers are.
const IN: u64 = BUFFERS + 0x4_0000;

struct Guest {
    driver: Driver,
    folder: tempfile::TempDir,
    received: u32,
    sent: u64,
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spec = Spec { cid: u32::try_from(CID).unwrap(), socket: folder.path().join("vsock") };
        let mut driver = Driver::new(Box::new(spec.open().unwrap()));
        driver.start();
        Guest { driver, folder, received: 0, sent: 0 }
    }

    /// What listens for the guest's connections to [`PORT`].
    fn listener(&self) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("vsock_{PORT}"))).unwrap()
    }

    fn client(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("vsock")).unwrap()
    }

    fn header(op: Op, guest: u32, host: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len: 0,
            kind: STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let at = OUT + self.sent % 2 * 0x2_0000;
        self.sent += 1;
        let header = Header { len: u32::try_from(data.len()).unwrap(), ..header };
        self.driver.put(at, &header.to_bytes());
        self.driver.put(at + HEADER as u64, data);
        let length = u32::try_from(HEADER + data.len()).unwrap();
        self.driver.rings[TX].add(&[(at, length, false)]);
        self.driver.finish(TX, 1);
    }

    /// The next packet, which `make` may first cause.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let at = self.offer();
        self.received_at(at)
    }

    /// Gives a buffer to receive a packet in: where it is.
    fn offer(&mut self) -> u64 {
        // In two parts, the header's end in the second.
        let at = IN + u64::from(self.received % 16) * 0x4000;
        self.received += 1;
        self.driver.rings[RX].add(&[(at, 40, true), (at + 0x1000, ROOM, true)]);
        at
    }

    /// What comes into that.
    fn received_at(&mut self, at: u64) -> (Header, Vec<u8>) {
        let used = self.driver.finish(RX, 1);
        let mut bytes = self.driver.get(at, 40);
        bytes.extend(self.driver.get(at + 0x1000, ROOM as usize));
        let header = Header::from_bytes(bytes[..HEADER].try_into().unwrap());
        assert_eq!(used[0].1, u32::try_from(HEADER).unwrap() + header.len);
        (header, bytes[HEADER..][..header.len as usize].to_vec())
    }

    fn receive_op(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(header.op, Some(op), "{header:?}");
        (header, data)
    }

    /// A connection that the guest opens from `port`.
    fn open(&mut self, port: u32) -> UnixStream {
        let listener = self.listener();
        self.send(Self::header(Op::Request, port, PORT), b"");
        let (header, _) = self.receive_op(Op::Response);
        assert_eq!((header.src_port, header.dst_port, header.dst_cid), (PORT, port, CID));
        let stream = listener.accept().unwrap().0;
        std::fs::remove_file(self.folder.path().join(format!("vsock_{PORT}"))).unwrap();
        stream
    }
}

#[test]
fn the_guest_connects_and_both_sides_talk() {
    let mut guest = Guest::new();
    let mut host = guest.open(1234);
    let rw = Guest::header(Op::Rw, 1234, PORT);
    guest.send(rw, b"from the guest");
    let mut text = [0; 14];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest");

    // Larger than a receive buffer: it comes in two packets.
    let large: Vec<u8> = (0..5000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    host.write_all(&large).unwrap();
    let (_, mut data) = guest.receive_op(Op::Rw);
    assert_eq!(data.len(), ROOM as usize - 4);
    data.extend(guest.receive_op(Op::Rw).1);
    assert_eq!(data, large);

    // The host is done, then the guest: the connection is no more.
    host.shutdown(Shutdown::Write).unwrap();
    let (header, _) = guest.receive_op(Op::Shutdown);
    assert_eq!(header.flags, SENDS_NO_MORE);
    assert_eq!(header.fwd_cnt, 14);
    guest.send(rw, b"!");
    guest.send(Header { flags: RECEIVES_NO_MORE | SENDS_NO_MORE, ..Guest::header(Op::Shutdown, 1234, PORT) }, b"");
    guest.receive_op(Op::Rst);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "!");
}

#[test]
fn the_host_connects_and_is_told_so() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 99\nhello").unwrap();
    let (request, _) = guest.receive_op(Op::Request);
    assert_eq!((request.src_cid, request.dst_cid, request.dst_port, request.kind), (HOST_CID, CID, 99, STREAM));
    guest.send(Guest::header(Op::Response, 99, request.src_port), b"");
    let (_, data) = guest.receive_op(Op::Rw);
    assert_eq!(data, b"hello");
    guest.send(Guest::header(Op::Rw, 99, request.src_port), b"hi\n");
    guest.send(Guest::header(Op::Rst, 99, request.src_port), b"");
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, format!("OK {}\nhi\n", request.src_port));
}

#[test]
fn a_client_that_hangs_up_ends_the_connection() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 99\n").unwrap();
    let (request, _) = guest.receive_op(Op::Request);
    guest.send(Guest::header(Op::Response, 99, request.src_port), b"");
    let mut line = [0; 14];
    client.read_exact(&mut line).unwrap();
    drop(client);
    let (header, _) = guest.receive_op(Op::Shutdown);
    assert_eq!(header.flags, RECEIVES_NO_MORE | SENDS_NO_MORE);
    guest.send(Header { flags: 3, ..Guest::header(Op::Shutdown, 99, request.src_port) }, b"");
    guest.receive_op(Op::Rst);
}

#[test]
fn a_client_that_gives_up_is_not_waited_for() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 99\n").unwrap();
    let (request, _) = guest.receive_op(Op::Request);
    drop(client);
    let (reset, _) = guest.receive_op(Op::Rst);
    assert_eq!((reset.src_port, reset.dst_port), (request.src_port, 99));
}

#[test]
fn of_clients_that_the_guest_never_heard_of_it_hears_nothing() {
    let mut guest = Guest::new();
    for _ in 0..20 {
        guest.client().write_all(b"CONNECT 99\n").unwrap();
    }
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\n").unwrap();
    // There were no buffers to tell it in, but for those whose end the device had not seen by then.
    let mut told = 0;
    let request = loop {
        let (header, _) = guest.receive();
        if header.dst_port == 7 {
            break header;
        }
        told += 1;
    };
    guest.send(Guest::header(Op::Rst, 7, request.src_port), b"");
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert!(guest.driver.mmio.metrics().to_json()["resets"].as_u64().unwrap() <= told);
}

#[test]
fn who_writes_to_a_guest_that_has_gone_learns_it() {
    let mut guest = Guest::new();
    let mut host = guest.open(1);
    (0..4).for_each(|_| guest.send(Guest::header(Op::Rw, 1, PORT), &[1; 0x1_0000]));
    guest.send(Header { flags: SENDS_NO_MORE, ..Guest::header(Op::Shutdown, 1, PORT) }, b"");
    guest.send(Guest::header(Op::Rst, 1, PORT), b"");
    assert_eq!(host.write(b"answer").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut all = vec![];
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 4 * 0x1_0000);
}

#[test]
fn the_end_of_a_host_that_is_not_read_from_is_told() {
    let mut guest = Guest::new();
    let host = guest.open(1);
    guest.send(Header { flags: RECEIVES_NO_MORE, ..Guest::header(Op::Shutdown, 1, PORT) }, b"");
    drop(host);
    let (header, _) = guest.receive_op(Op::Shutdown);
    assert_eq!(header.flags, RECEIVES_NO_MORE | SENDS_NO_MORE);
    guest.send(Header { flags: 3, ..Guest::header(Op::Shutdown, 1, PORT) }, b"");
    guest.receive_op(Op::Rst);
}

/// As Linux ends a connection whose other end does not agree to its end within eight seconds.
#[test]
fn what_was_sent_before_a_reset_arrives() {
    let mut guest = Guest::new();
    let mut host = guest.open(1);
    let part = |index: u8| vec![index; 0x1_0000];
    (0..4).for_each(|index| guest.send(Guest::header(Op::Rw, 1, PORT), &part(index)));
    guest.send(Header { flags: 3, ..Guest::header(Op::Shutdown, 1, PORT) }, b"");
    guest.send(Guest::header(Op::Rst, 1, PORT), b"");
    // Its ports are free.
    let mut other = guest.open(1);
    guest.send(Guest::header(Op::Rw, 1, PORT), b"other");
    let mut text = [0; 5];
    other.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"other");

    let mut all = vec![];
    host.read_to_end(&mut all).unwrap();
    assert!(all == (0..4).flat_map(part).collect::<Vec<_>>(), "{} bytes of {}", all.len(), 4 * 0x1_0000);

    // Without an end before it, a reset is one.
    (0..4).for_each(|index| guest.send(Guest::header(Op::Rw, 1, PORT), &part(index)));
    guest.send(Guest::header(Op::Rst, 1, PORT), b"");
    all.clear();
    other.read_to_end(&mut all).unwrap();
    assert!(all.len() < 4 * 0x1_0000);
}

#[test]
fn nobody_listens() {
    let mut guest = Guest::new();
    guest.send(Guest::header(Op::Request, 1, PORT), b"");
    let (reset, _) = guest.receive_op(Op::Rst);
    assert_eq!((reset.src_port, reset.dst_port), (PORT, 1));
    // A connection that there is not, and another type.
    guest.send(Guest::header(Op::Rw, 1, PORT), b"lost");
    guest.receive_op(Op::Rst);
    guest.send(Header { kind: 9, ..Guest::header(Op::Request, 2, PORT) }, b"");
    guest.receive_op(Op::Rst);
    // The guest refuses.
    let mut client = guest.client();
    client.write_all(b"CONNECT 99\n").unwrap();
    let (request, _) = guest.receive_op(Op::Request);
    guest.send(Guest::header(Op::Rst, 99, request.src_port), b"");
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "");
}

#[test]
fn credit_is_kept_in_both_directions() {
    let mut guest = Guest::new();
    let mut host = guest.open(1);
    // Ten bytes and no more.
    guest.send(Header { buf_alloc: 10, ..Guest::header(Op::CreditUpdate, 1, PORT) }, b"");
    host.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(guest.receive_op(Op::Rw).1, b"0123456789");
    guest.receive_op(Op::CreditRequest);
    // It is asked once, as long as it has none. When the second is taken, all that follows from the first is done.
    let at = guest.offer();
    for _ in 0..2 {
        guest.send(Header { buf_alloc: 10, ..Guest::header(Op::CreditUpdate, 1, PORT) }, b"");
    }
    assert_eq!(guest.driver.rings[RX].used(), []);
    guest.send(Header { buf_alloc: 10, fwd_cnt: 4, ..Guest::header(Op::CreditUpdate, 1, PORT) }, b"");
    let (header, data) = guest.received_at(at);
    assert_eq!((header.op, &data[..]), (Some(Op::Rw), &b"abcd"[..]));
    guest.receive_op(Op::CreditRequest);
    guest.send(Header { buf_alloc: 10, fwd_cnt: 14, ..Guest::header(Op::CreditUpdate, 1, PORT) }, b"");
    assert_eq!(guest.receive_op(Op::Rw).1, b"ef");

    // The host reads nothing: what the guest may send is kept, and not a byte is lost.
    let data = vec![0x5a; 0x1_0000];
    let mut sent = 0;
    while sent + data.len() <= connection::BUFFER as usize {
        guest.send(Guest::header(Op::Rw, 1, PORT), &data);
        sent += data.len();
    }
    host.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut all = vec![0; sent];
    host.read_exact(&mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0x5a));
    let (mut header, _) = guest.receive_op(Op::CreditUpdate);
    while header.fwd_cnt as usize != sent {
        guest.send(Guest::header(Op::CreditRequest, 1, PORT), b"");
        header = guest.receive_op(Op::CreditUpdate).0;
    }
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_reset() {
    let mut guest = Guest::new();
    let host = guest.open(1);
    let data = vec![0; 0x1_0000];
    // What a socket takes differs; the device keeps no more than it said.
    for _ in 0..100 {
        guest.send(Guest::header(Op::Rw, 1, PORT), &data);
    }
    let mut header = guest.receive().0;
    while header.op == Some(Op::CreditUpdate) {
        header = guest.receive().0;
    }
    assert_eq!(header.op, Some(Op::Rst));
    drop(host);
}

#[test]
fn requests_without_receive_buffers_are_held_up() {
    let mut guest = Guest::new();
    let half = MAX_RESETS / 2;
    for (batch, taken) in [(0, half), (1, half - 1)] {
        for i in 0..half {
            let at = OUT + i as u64 * 64;
            let port = u32::try_from(batch * half + i).unwrap();
            guest.driver.put(at, &Guest::header(Op::Request, port, PORT).to_bytes());
            guest.driver.rings[TX].add(&[(at, 44, false)]);
        }
        assert_eq!(guest.driver.finish(TX, taken).len(), taken);
    }
    // The last one's turn comes when there is room for another reset.
    for port in 0..MAX_RESETS {
        let (reset, _) = guest.receive_op(Op::Rst);
        assert_eq!(reset.dst_port as usize, port);
    }
    assert_eq!(guest.driver.rings[TX].used().len(), 1);
}

#[test]
fn what_is_no_packet_stops_the_device() {
    for (queue, buffer) in [(TX, (OUT, 43, false)), (RX, (IN, 43, true)), (TX, (OUT, 44, true)), (RX, (IN, 44, false))]
    {
        let mut guest = Guest::new();
        let _client = (queue == RX).then(|| {
            let mut client = guest.client();
            client.write_all(b"CONNECT 1\n").unwrap();
            client
        });
        guest.driver.rings[queue].add(&[buffer]);
        guest.driver.notify(u32::try_from(queue).unwrap());
        guest.driver.wait_for_needs_reset();
        // And after a reset it works.
        guest.driver.start();
        guest.send(Guest::header(Op::Request, 1, PORT), b"");
        guest.receive_op(Op::Rst);
    }
}

#[test]
fn packets_of_others_are_left_out() {
    let mut guest = Guest::new();
    guest.send(Header { src_cid: 8, ..Guest::header(Op::Request, 1, PORT) }, b"");
    guest.send(Header { dst_cid: 3, ..Guest::header(Op::Request, 2, PORT) }, b"");
    guest.send(Guest::header(Op::Request, 3, PORT), b"");
    let (reset, _) = guest.receive_op(Op::Rst);
    assert_eq!(reset.dst_port, 3);
    assert_eq!(guest.driver.mmio.metrics().to_json()["tx-errors"], 2);
}

#[test]
fn many_clients_come_and_go() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        let clients: Vec<_> = (0..20).map(|_| guest.client()).collect();
        for mut client in clients {
            client.write_all(b"NONSENSE\n").unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "");
        }
    }
    assert_eq!(guest.driver.mmio.metrics().to_json()["connections-to-guest"], 60);
    let _stream = guest.open(1);
}

#[test]
fn a_reserved_context_id_is_refused() {
    for cid in [0, 1, 2, u32::MAX] {
        let refused = Spec { cid, socket: "nowhere".into() }.open().err().unwrap();
        assert!(refused.to_string().contains(&format!("context ID {cid}:")), "{refused}");
    }
}

#[test]
fn a_path_without_room_for_a_port_is_refused() {
    let path = |length| Spec { cid: 3, socket: "x".repeat(length).into() }.validate();
    assert!(path(MAX_PATH).is_ok());
    assert!(matches!(path(MAX_PATH + 1), Err(Error::LongPath(_))));
}

#[test]
fn an_end_in_the_process_is_connected_once() {
    let (mut host, end) = UnixStream::pair().unwrap();
    let mut driver = Driver::new(Box::new(Vsock::with_ends(HashMap::from([(PORT, end)]))));
    driver.start();
    let mut guest = Guest { driver, folder: tempfile::tempdir().unwrap(), received: 0, sent: 0 };
    let from = |header| Header { src_cid: FIRST_CID.into(), ..header };
    guest.send(from(Guest::header(Op::Request, 1, PORT)), b"");
    guest.receive_op(Op::Response);
    guest.send(from(Guest::header(Op::Rw, 1, PORT)), b"hello");
    let mut text = [0; 5];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    for port in [PORT, PORT + 1] {
        guest.send(from(Guest::header(Op::Request, 2, port)), b"");
        guest.receive_op(Op::Rst);
    }
}
