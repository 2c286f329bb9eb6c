//! Streams between programs of the guest and of the host.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::support::{Guest, Kernel, noise, sha256};

/// More than all buffers on the way together.
const SIZE: usize = 8 << 20;

fn guest() -> Guest {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/vsock");
    let program = fs::read(program).expect("target/guest/vsock is missing: run resources/test.sh, which makes it");
    let guest = Guest::new(Kernel::Debian61).file("bin/vsock", &program);
    let socket = guest.folder().join("socket");
    guest.option("--vsock", format!("cid=42,socket={}", socket.display()))
}

#[test]
fn streams_go_both_ways_whoever_connects() {
    let guest = guest().script(
        "
        vsock -l 1000 </bin/busybox >/received 2>/dev/console
        echo received=$(sha256sum </received)
        echo sent=$(sha256sum </bin/busybox)
        vsock 2000 </received >/answer
        echo answer=$(cat /answer)
        if vsock 2001 </dev/null; then exit 1; fi
        ",
    );
    let folder = guest.folder().to_owned();
    let listener = UnixListener::bind(folder.join("socket_2000")).unwrap();
    let running = guest.start();
    running.wait_for("listening");
    let data = noise(SIZE);

    let mut client = UnixStream::connect(folder.join("socket")).unwrap();
    client.write_all(b"CONNECT 1000\n").unwrap();
    let mut sender = client.try_clone().unwrap();
    let sent = data.clone();
    let sender = std::thread::spawn(move || {
        sender.write_all(&sent).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let mut from_guest = vec![];
    client.read_to_end(&mut from_guest).unwrap();
    sender.join().unwrap();
    let end_of_line = from_guest.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    assert!(from_guest.starts_with(b"OK "), "{:?}", &from_guest[..end_of_line]);

    let (mut server, _) = listener.accept().unwrap();
    let mut returned = vec![];
    server.read_to_end(&mut returned).unwrap();
    server.write_all(b"thanks").unwrap();
    drop(server);
    assert!(returned == data, "{} bytes came back, or others", returned.len());

    let ended = running.wait().succeeded();
    assert!(ended.value("received").starts_with(&sha256(&data)));
    assert!(ended.value("sent").starts_with(&sha256(&from_guest[end_of_line..])));
    assert_eq!(ended.value("answer"), "thanks");
    assert_eq!(ended.counted("vsock", "connections-to-guest"), 1);
    assert_eq!(ended.counted("vsock", "connections-from-guest"), 2);
}
