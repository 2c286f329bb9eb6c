//! A guest that is saved, ended and restored over and over while it counts, hashes its memory, writes to a file that it has
//! open, and talks to peers outside: it loses nothing but its vsock connections, which are reset.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use bantam::machine::{Builder, Destination, Snapshot};
use bantam::virtio::change::{Change, Rates};
use bantam::virtio::net::vhost;
use bantam::virtio::{blk, vsock};
use serde_json::json;

use crate::namespace::Namespace;
use crate::support::{Guest, Kernel};
use crate::{COUNTER, Lab, Running, counts, values};

/// How long a peer waits for the guest.
const LIMIT: Duration = Duration::from_secs(120);

/// Sends what is counted to a TCP port of the host, which repeats it, and keeps a vsock connection to the host.
const PEERS: &str = r#"
ip address add 10.0.0.2/24 dev eth0
ip link set eth0 up
mkfifo /stream /hold
(while read line; do echo "echoed=$line end"; done) </stream &
exec 6<>/hold
(while :; do vsock 2000 <&6 >/dev/null 2>&1 || echo "reset=$? end"; done) &
mkfifo /counts
nc 10.0.0.1 5001 </counts >/stream &
exec 7>/counts
"#;

/// The other end of the guest's TCP connection. It repeats each count, and ends when its own connection does.
fn repeat(stream: TcpStream) -> u64 {
    let mut answer = stream.try_clone().unwrap();
    let mut last = 0;
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        // The end may come within a line.
        let Ok(count) = line.parse::<u64>() else { panic!("no count: {line}") };
        assert_eq!(count, last + 1, "something of the stream was lost");
        last = count;
        if answer.write_all(format!("{count}\n").as_bytes()).is_err() {
            break;
        }
    }
    last
}

/// Saves, ends and restores a guest so many times.
fn lives(rounds: usize, cpus: u32) {
    let network = Namespace::new();
    network.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap"]);
    network.ip(&["address", "add", "10.0.0.1/24", "dev", "tap0"]);
    network.ip(&["link", "set", "tap0", "up"]);
    let listener = network.inside(|| TcpListener::bind("10.0.0.1:5001").unwrap());
    let (sender, connected) = mpsc::channel();
    let peer = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        sender.send(stream.try_clone().unwrap()).unwrap();
        repeat(stream)
    });

    let script = format!("{PEERS}{}", COUNTER.replace(r#"echo "count"#, "echo $i >&7\n    echo \"count"));
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/vsock");
    let guest = Guest::new(Kernel::Tiny).file("bin/vsock", &fs::read(program).unwrap()).script(&script);
    let mut lab = Lab::with(Kernel::Tiny, guest);
    let (disk, socket, saved) = (lab.disk("disk"), lab.path("vsock"), lab.path("saved"));
    let listener = UnixListener::bind(lab.path("vsock_2000")).unwrap();
    let (sender, accepted) = mpsc::channel::<UnixStream>();
    thread::spawn(move || listener.incoming().flatten().try_for_each(|stream| sender.send(stream)));
    let spec = blk::Spec { engine: blk::Engine::IoUring, ..blk::Spec::new(&disk) };
    lab.config = lab.config.cpus(cpus).disk(spec).vsock(vsock::Spec { cid: 3, socket });
    lab.config = lab.config.net(serde_json::from_value(json!({"tap": "tap0", "vhost": "auto"})).unwrap());

    let mut machine = network.inside(|| Running::start(Builder::new(lab.config.clone())));
    let seen = machine.screen.wait_until(|seen| !counts(seen).is_empty());
    let noise = values(&seen, "noise")[0].to_owned();
    // One that runs goes on.
    machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
    let mut printed = String::new();
    let mut held = vec![];
    for round in 0..rounds {
        held.push(accepted.recv_timeout(LIMIT).expect("the guest connects again"));
        let more = machine.screen.text().len() + 200;
        machine.screen.wait_until(|seen| seen.len() > more);
        machine.handle.input(format!("round{round}\n"));
        // The guest has it, but not necessarily the program that reads it.
        machine.screen.wait_for(&format!("round{round}"));
        machine.handle.pause().unwrap();
        machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
        printed += &machine.stop();
        let mut snapshot = Snapshot::open(&saved).unwrap();
        // By turns bantam moves the packets, and the host's kernel, if it can.
        let vhost = if round % 2 == 0 { vhost::Mode::Off } else { vhost::Mode::Auto };
        snapshot.config.nets[0].vhost = Some(vhost);
        machine = network.inside(|| Running::start(Builder::restore(snapshot)));
    }
    held.push(accepted.recv_timeout(LIMIT).expect("the guest connects again"));
    let echoed = |text: &str| values(text, "echoed").len();
    // With a limit it is bantam again, while the guest runs.
    let rates = Rates { bytes: Some("1G".parse().unwrap()), operations: None };
    machine.handle.change("net0", Change::NetRates { rx: Some(rates), tx: Some(rates) }).unwrap();
    let before = echoed(&machine.screen.text());
    machine.screen.wait_until(|seen| echoed(seen) > before);
    machine.handle.input("last\n");
    machine.screen.wait_for("typed=last end");
    printed += &machine.stop();
    connected.recv_timeout(LIMIT).unwrap().shutdown(Shutdown::Both).unwrap();
    let received = peer.join().expect("the TCP stream is whole");

    let typed: Vec<_> = (0..rounds).map(|round| format!("round{round}")).chain(["last".into()]).collect();
    assert_eq!(values(&printed, "typed"), typed, "{printed}");
    let all = counts(&printed);
    eprintln!("{cpus} CPUs: {} counts in {rounds} rounds, {received} by TCP", all.len());
    assert!(all[0] == 1 && all.windows(2).all(|two| two[1] == two[0] + 1), "{printed}");
    assert!(values(&printed, "noise").iter().all(|seen| *seen == noise), "{printed}");
    // What came back by TCP was what was sent, without a gap. Each restore has reset the connection by vsock, and only that.
    let echoed: Vec<u64> = values(&printed, "echoed").iter().map(|count| count.parse().unwrap()).collect();
    assert!(echoed.iter().copied().eq(1..=echoed.len() as u64) && received >= echoed.len() as u64, "{printed}");
    assert_eq!((values(&printed, "reset").len(), held.len()), (rounds, rounds + 1), "{printed}");
    // What was counted before the last line was typed, which the terminal repeats at once, is on the disk.
    let disk = fs::read(&disk).unwrap();
    for count in counts(&printed[..printed.find("last").unwrap()]) {
        let at = 8 * usize::try_from(count - 1).unwrap();
        assert_eq!(disk[at..at + 8], *format!("{count:08}").as_bytes());
    }
}

#[test]
fn a_guest_loses_nothing() {
    lives(4, 1);
}

#[test]
fn a_guest_of_four_cpus_loses_nothing() {
    lives(3, 4);
}

#[test]
#[ignore = "takes many minutes in an emulated host"]
fn a_guest_loses_nothing_in_a_hundred_rounds() {
    lives(100, 1);
}

#[test]
#[ignore = "takes many minutes in an emulated host"]
fn a_guest_of_four_cpus_loses_nothing_in_a_hundred_rounds() {
    lives(100, 4);
}
