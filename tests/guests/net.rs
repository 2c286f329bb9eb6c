//! Networks: a guest and the host talk through a tap, in a network namespace of their own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::namespace::Namespace;
use crate::support::{Ended, Guest, Kernel, noise, sha256};

/// How long a guest may take to receive and send what the tests give it.
const LIMIT: Duration = Duration::from_secs(300);

/// How much they give it, in bytes.
const SIZE: usize = 100 << 20;

/// A network namespace with a tap, `tap0`, whose address is 10.0.0.1/24.
pub fn network() -> Namespace {
    let network = Namespace::new();
    network.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap"]);
    network.ip(&["address", "add", "10.0.0.1/24", "dev", "tap0"]);
    network.ip(&["link", "set", "tap0", "up"]);
    network
}

/// The guest's part of an exchange.
///
/// `cat` sends them by sendfile(2), and nobody ends before all have come. `nc` itself would write 1 KiB at a time, each of
/// which may wait until the one before is acknowledged, and the host may take 40 ms to do that: an hour for all.
const EXCHANGE: &str = "
ip address add 10.0.0.2/24 dev eth0
ip link set eth0 up
ping -c 3 -w 30 10.0.0.1
mount -t tmpfs tmpfs /mnt
nc -l -p 5000 >/mnt/data &
until netstat -ltn | grep -q :5000; do sleep 0.1; done
echo listening
wait $!
echo rx-packets=$(cat /sys/class/net/eth0/statistics/rx_packets)
acknowledgements=$(cat /sys/class/net/eth0/statistics/tx_packets)
echo received=$(sha256sum </mnt/data)
nc 10.0.0.1 5001 -e /bin/sh -c 'cat /mnt/data; read end || true'
echo tx-packets=$(($(cat /sys/class/net/eth0/statistics/tx_packets) - acknowledgements))
";

/// Sends so many bytes to the guest by TCP, and has them sent back.
fn exchange(guest: Guest, network: &Namespace, size: usize) -> Ended {
    exchange_by(EXCHANGE, guest, network, size)
}

/// The same by a script of the guest's that does its part.
fn exchange_by(script: &str, guest: Guest, network: &Namespace, size: usize) -> Ended {
    let data = noise(size);
    let (guest, returned) = network.inside(|| {
        let listener = TcpListener::bind("10.0.0.1:5001").unwrap();
        let guest = guest.inside(network.name()).limit(LIMIT).script(script).start();
        guest.wait_for("listening\r\n");
        let ping = Command::new("ping").args(["-c", "3", "-w", "30", "10.0.0.2"]).output().unwrap();
        assert!(ping.status.success(), "{ping:?}");
        let mut stream = TcpStream::connect("10.0.0.2:5000").unwrap();
        stream.write_all(&data).unwrap();
        drop(stream);
        guest.wait_for("received=");
        let mut returned = vec![0; size];
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.read_exact(&mut returned).unwrap();
        (guest, returned)
    });
    let ended = guest.wait().succeeded();
    assert!(ended.value("received").starts_with(&sha256(&data)));
    assert!(returned == data, "other bytes came back");
    ended
}

/// Checks that bantam counted what was exchanged.
fn counted(ended: &Ended) {
    let size = SIZE as u64;
    for direction in ["rx", "tx"] {
        let bytes = ended.counted("net0", &format!("{direction}-bytes"));
        assert!((size..size + size / 5).contains(&bytes), "{direction} {bytes}");
        assert_eq!(ended.counted("net0", &format!("{direction}-errors")), 0);
        assert_eq!(ended.counted("net0", &format!("{direction}-drops")), 0);
    }
}

/// The mean size of the packets, as the guest counts them, that brought so many bytes in one direction.
fn packet_size(ended: &Ended, direction: &str, size: usize) -> usize {
    size / ended.value(&format!("{direction}-packets")).parse::<usize>().unwrap()
}

#[test]
fn tcp_goes_both_ways_in_large_packets() {
    let network = network();
    let guest = Guest::new(Kernel::Debian612).memory("512M").net("tap0");
    let ended = exchange(guest, &network, SIZE);
    counted(&ended);
    for direction in ["rx", "tx"] {
        let size = packet_size(&ended, direction, SIZE);
        assert!(size > 2000, "{direction}: {size} bytes a packet");
    }
}

#[test]
fn tcp_goes_both_ways_without_offloads() {
    let network = network();
    network.ip(&["link", "set", "tap0", "gso_max_segs", "1"]);
    let guest = Guest::new(Kernel::Tiny).memory("512M").net("tap=tap0");
    let ended = exchange(guest.cmdline("virtio_net.csum=0 virtio_net.gso=0"), &network, SIZE);
    counted(&ended);
    for direction in ["rx", "tx"] {
        let size = packet_size(&ended, direction, SIZE);
        assert!(size <= 1514, "{direction}: {size} bytes a packet");
    }
}

#[test]
fn tcp_goes_both_ways_through_vhost() {
    if !Path::new("/dev/vhost-net").exists() {
        eprintln!("SKIPPED a test: this host has no /dev/vhost-net");
        return;
    }
    let network = network();
    let guest = Guest::new(Kernel::Tiny).memory("512M").net("tap0,vhost=on");
    let size = SIZE / 4;
    let ended = exchange(guest, &network, size);
    assert!(packet_size(&ended, "rx", size) > 1600, "{ended:?}");
    // Nothing of it went through bantam.
    for counter in ["rx-packets", "tx-packets", "rx-drops", "tx-drops"] {
        assert_eq!(ended.counted("net0", counter), 0, "{counter}");
    }
    assert!(ended.counted("net0", "interrupts") > 0);
}

#[test]
fn each_cpu_has_a_pair_of_queues() {
    let vhosts: &[&str] = if Path::new("/dev/vhost-net").exists() { &["off", "on"] } else { &["off"] };
    for vhost in vhosts {
        let network = Namespace::new();
        network.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap", "multi_queue"]);
        network.ip(&["address", "add", "10.0.0.1/24", "dev", "tap0"]);
        network.ip(&["link", "set", "tap0", "up"]);
        let script = format!(
            "echo queues=$(ls /sys/class/net/eth0/queues)
            echo complaints=$(dmesg | grep -c 'queue pairs')
            {EXCHANGE}
            for cpu in 0 1; do taskset -c $cpu ping -c 3 -w 60 10.0.0.1; done"
        );
        let card = format!("tap0,queues=4,vhost={vhost}");
        let guest = Guest::new(Kernel::Debian61).cpus(2).memory("512M").net(card).option("--sandbox", "on");
        let ended = exchange_by(&script, guest, &network, SIZE / 10);
        // Linux takes no more than it has CPUs.
        assert_eq!(ended.value("queues"), "rx-0 rx-1 tx-0 tx-1");
        assert_eq!(ended.value("complaints"), "0");
        let moved = ended.counted("net0", "rx-packets") > 0 && ended.counted("net0", "tx-packets") > 0;
        assert_eq!(moved, *vhost == "off", "{ended:?}");
    }
}

/// In a mount namespace in which that is another device.
#[test]
fn without_vhost_net_bantam_moves_packets_unless_it_must_not() {
    let network = network();
    let hidden = |vhost: &str, script: &str| {
        let mut guest =
            Guest::new(Kernel::Tiny).net(format!("tap0,vhost={vhost}")).script(script).inside(network.name());
        let command = guest.command();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        // `ip netns exec NAME` is in a mount namespace of its own.
        let hide = r#"[ ! -e /dev/vhost-net ] || mount --bind /dev/null /dev/vhost-net; exec "$@""#;
        let mut shell = Command::new("ip");
        shell.args(&arguments[..3]).args(["sh", "-c", hide, "sh"]).args(&arguments[3..]);
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        *command = shell;
        guest.run()
    };
    let refused = hidden("on", "");
    assert_eq!(refused.status, 125, "{refused:?}");
    assert!(refused.stderr.contains("cannot open /dev/vhost-net, for vhost=on"), "{refused:?}");
    let script = "
        ip address add 10.0.0.2/24 dev eth0
        ip link set eth0 up
        ping -c 1 -w 30 10.0.0.1
    ";
    let ended = hidden("auto", script).succeeded();
    assert!(ended.counted("net0", "rx-packets") > 0 && ended.counted("net0", "tx-packets") > 0, "{ended:?}");
}

#[test]
fn the_guest_has_the_address_and_mtu_that_were_asked_for() {
    let network = network();
    let guest = Guest::new(Kernel::Debian61).net("tap=tap0,mac=52:54:00:ab:cd:ef,mtu=1400").net("tap=tap1,mtu=9000");
    let script = "
        for card in eth0 eth1; do
            echo mac=$(cat /sys/class/net/$card/address)
            echo mtu=$(cat /sys/class/net/$card/mtu)
        done
        ip address add 10.0.0.2/24 dev eth0
        ip link set eth0 up
        echo carrier=$(cat /sys/class/net/eth0/carrier)
        ping -c 1 -w 20 -s 1300 10.0.0.1
    ";
    let ended = guest.inside(network.name()).script(script).run().succeeded();
    let values = |name| ended.values(name).collect::<Vec<_>>();
    assert_eq!(values("mac")[0], "52:54:00:ab:cd:ef");
    assert_ne!(values("mac")[1], values("mac")[0]);
    assert_eq!(values("mtu"), ["1400", "9000"]);
    assert_eq!(ended.value("carrier"), "1");
}
