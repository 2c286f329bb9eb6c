//! A command in a user network, which passt makes; the host is a network namespace with an address of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::process::{self, Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::namespace::Namespace;
use crate::roots;
use crate::support::{Guest, Kernel, noise, sha256};
use crate::tiny;

/// How much is sent each way, in bytes.
const SIZE: usize = 512 << 10;

/// A network namespace in which the host's address is 192.0.2.1, and a DNS server there and at 127.0.0.1 knows
/// `example.test`. It is the resolver of what runs inside.
struct Network {
    namespace: Namespace,
    dnsmasq: Child,
}

impl Network {
    fn new(resolver: &str) -> Self {
        let namespace = Namespace::new();
        let name = namespace.name();
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace.ip(&["address", "add", "192.0.2.1/32", "dev", "lo"]);
        // `ip netns exec` has it be /etc/resolv.conf.
        fs::create_dir_all(format!("/etc/netns/{name}")).unwrap();
        fs::write(format!("/etc/netns/{name}/resolv.conf"), format!("nameserver {resolver}\n")).unwrap();
        let mut dnsmasq = Command::new("ip");
        dnsmasq.args(["netns", "exec", name, "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts"]);
        dnsmasq.args(["--conf-file=/dev/null", "--pid-file=", "--user=root", "--address=/example.test/198.51.100.7"]);
        let dnsmasq = dnsmasq.stdin(Stdio::null()).spawn().unwrap();
        Self { namespace, dnsmasq }
    }

    fn name(&self) -> &str {
        self.namespace.name()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.dnsmasq.kill();
        let _ = self.dnsmasq.wait();
        let _ = fs::remove_dir_all(format!("/etc/netns/{}", self.name()));
    }
}

/// The processes whose name is passt.
fn passts() -> Vec<i32> {
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let name = |number: &i32| fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
    numbers.filter(|number| name(number).starts_with("passt")).collect()
}

/// Those of them that this process started.
fn children(parent: i32) -> Vec<i32> {
    let is_child = |number: &i32| {
        let status = fs::read_to_string(format!("/proc/{number}/status")).unwrap_or_default();
        status.lines().any(|line| line == format!("PPid:\t{parent}"))
    };
    passts().into_iter().filter(is_child).collect()
}

#[test]
fn names_tcp_and_published_ports_work_at_the_rate_allowed_and_the_hosts_loopback_is_not_reached() {
    // As with systemd-resolved.
    let network = Network::new("127.0.0.1");
    let script = "
        set -e
        nslookup -type=a example.test
        echo name=$(cat /etc/resolv.conf)
        echo address=$(ip -4 -o address show eth0)
        echo hosts=$(grep box /etc/hosts)
        : >/tmp/data
        (while ! [ -e /tmp/received ]; do sleep 0.2; done) | nc 192.0.2.1 5001 >/tmp/data &
        until [ $(wc -c </tmp/data) -ge 524288 ]; do sleep 0.2; done
        touch /tmp/received
        echo received=$(sha256sum </tmp/data)
        nc 192.0.2.1 5002 </tmp/data
        echo loopback=$( (sleep 2 | nc -w 2 10.0.2.2 5003; sleep 2 | nc -w 2 127.0.0.1 5003) 2>/dev/null)
        ip address delete 127.0.0.1/8 dev lo
        ip route delete local 127.0.0.0/8 dev lo table local || true
        ip route add 127.0.0.1 via 10.0.2.2
        echo loopback=$( (sleep 2 | nc -w 2 127.0.0.1 5003) 2>/dev/null)
        nc -l -p 80 >/tmp/in &
        until netstat -ltn | grep -q :80; do sleep 0.1; done
        echo listening
        wait %2
        echo in=$(cat /tmp/in)
        # Datagrams that nobody waits for.
        until [ $(grep Udp: /proc/net/snmp | tail -n 1 | cut -d ' ' -f 3) -gt 0 ]; do sleep 0.1; done
        echo udp=arrived
    ";
    let data = noise(SIZE);
    let (running, returned) = network.namespace.inside(|| {
        let [down, up] = ["192.0.2.1:5001", "192.0.2.1:5002"].map(|address| TcpListener::bind(address).unwrap());
        let hidden = TcpListener::bind("127.0.0.1:5003").unwrap();
        let guest = tiny(&["sh", "-c", script]).option("--net", "user,bw=64K").option("-p", "8080:80");
        let guest = guest.option("--publish", "127.0.0.1:5353:53/udp").option("--hostname", "box");
        let running = guest.inside(network.name()).start();
        running.wait_for("hosts=");
        let (mut stream, _) = down.accept().unwrap();
        stream.write_all(&data).unwrap();
        running.wait_for("received=");
        let mut returned = vec![];
        up.accept().unwrap().0.read_to_end(&mut returned).unwrap();
        running.wait_for("listening");
        TcpStream::connect("192.0.2.1:8080").unwrap().write_all(b"hello by TCP\n").unwrap();
        running.wait_for("in=");
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let deadline = Instant::now() + Duration::from_secs(300);
        while !running.stdout().contains("udp=") && Instant::now() < deadline {
            let _ = socket.send_to(b"hello by UDP\n", "127.0.0.1:5353");
            thread::sleep(Duration::from_millis(200));
        }
        hidden.set_nonblocking(true).unwrap();
        assert!(hidden.accept().is_err(), "the guest has reached the host's loopback interface");
        (running, returned)
    });
    let ended = running.wait();
    ended.require(ended.status == 0, "expected status 0");
    ended.require(ended.stdout.contains("198.51.100.7"), "the name is known");
    assert_eq!(ended.value("name"), "nameserver 10.0.2.3");
    ended.require(ended.value("address").contains("10.0.2.15/24"), "the address is set");
    assert_eq!(ended.value("hosts"), "127.0.1.1 box");
    assert!(ended.value("received").starts_with(&sha256(&data)));
    assert!(returned == data, "{} bytes came back, or others", returned.len());
    assert_eq!(ended.values("loopback").collect::<Vec<_>>(), ["", ""]);
    assert_eq!((ended.value("in"), ended.value("udp")), ("hello by TCP", "arrived"));
    ended.require(ended.counted("net0", "tx-drops") > 0, "packets to 127.0.0.1 are dropped");
    assert_eq!(ended.counted("net0", "rx-errors"), 0);
    for counter in ["rx-throttled", "tx-throttled"] {
        assert!(ended.counted("net0", counter) > 0, "{counter}");
    }
}

#[test]
fn a_writable_root_keeps_its_resolv_conf() {
    let network = Network::new("192.0.2.1");
    let tree = roots::tree();
    symlink("busybox", tree.path().join("bin/nslookup")).unwrap();
    for (content, kept) in [(Some("nameserver 203.0.113.1\n"), true), (None, false)] {
        let path = tree.path().join("etc/resolv.conf");
        match content {
            Some(content) => fs::write(&path, content).unwrap(),
            None => {
                fs::remove_file(&path).unwrap();
                symlink("../run/systemd/resolve/stub-resolv.conf", &path).unwrap();
            }
        }
        let script = "cat /etc/resolv.conf; nslookup -type=a example.test";
        let guest = Guest::running(Kernel::Tiny.bzimage(), &["sh", "-c", script]).root(tree.path());
        let ended = guest.flag("--rw").option("--net", "user").inside(network.name()).run();
        ended.require(ended.stdout.starts_with("nameserver 10.0.2.3\n"), "the guest has the network's server");
        ended.require(ended.stdout.contains("198.51.100.7"), "the name is known");
        if kept {
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), content);
        }
        assert_eq!(fs::read_link(&path).is_ok(), !kept);
    }
    assert!(!tree.path().join("run/systemd").exists());
}

#[test]
fn an_ordinary_user_has_a_network_without_a_command_and_dhcp() {
    let network = Network::new("192.0.2.1");
    let script = "
        ip link set eth0 up
        echo '#!/bin/sh
        [ $1 = bound ] && echo leased=$ip/$mask router=$router dns=$dns mtu=$mtu && ip address add $ip/$mask dev eth0 &&
        ip route add default via $router' >/lease
        chmod +x /lease
        udhcpc -i eth0 -s /lease -n -q -t 20 -T 3 -O mtu
        nslookup -type=a example.test 10.0.2.3
    ";
    let mut guest = Guest::new(Kernel::Tiny).net("user").script(script);
    // Its report is for another user's folder.
    let reachable = ["setpriv", "--reuid", "4321", "--regid", "4321", "--clear-groups"];
    let folder = guest.folder().to_owned();
    process::Command::new("chmod").args(["-R", "a+rwX"]).arg(&folder).status().unwrap();
    let arguments: Vec<_> = guest.command().get_args().map(ToOwned::to_owned).collect();
    let program = guest.command().get_program().to_owned();
    let mut command = Command::new(reachable[0]);
    command.args(&reachable[1..]).arg(program).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    *guest.command() = command;
    let ended = guest.inside(network.name()).run().succeeded();
    let leased = ended.value("leased");
    assert!(leased.starts_with("10.0.2.15/24 router=10.0.2.2 dns="), "{leased}");
    ended.require(ended.stdout.contains("198.51.100.7"), "the name is known");
}

#[test]
fn passt_and_bantam_end_with_each_other_as_they_should() {
    let network = Network::new("192.0.2.1");
    let script = "until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; echo ready; \
                  until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; echo lost; read -r _; echo on";
    let guest = Guest::running(Kernel::Debian612.vmlinux(), &["sh", "-c", script]).initramfs_root(Kernel::Tiny);
    let mut running = guest.option("--net", "user").inside(network.name()).spawn();
    running.wait_for("ready");
    let passt = children(running.pid().as_raw_nonzero().get());
    assert_eq!(passt.len(), 1, "passt is bantam's child");
    rustix::process::kill_process(rustix::process::Pid::from_raw(passt[0]).unwrap(), Signal::KILL).unwrap();
    running.wait_for("lost");
    running.write("\n");
    running.wait_for("on");
    let ended = running.wait();
    ended.require(ended.status == 0, "the machine goes on without its network");
    ended.require(ended.stderr.contains("passt has ended"), "it is said");

    let running = tiny(&["sh", "-c", "echo ready; sleep 1000"]).option("--net", "user").inside(network.name()).spawn();
    running.wait_for("ready");
    let passt = children(running.pid().as_raw_nonzero().get());
    assert_eq!(passt.len(), 1, "passt is bantam's child");
    running.signal(Signal::KILL);
    let deadline = Instant::now() + Duration::from_secs(300);
    while passts().contains(&passt[0]) {
        assert!(Instant::now() < deadline, "passt is still there");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_that_was_saved_has_the_network_of_the_run_that_goes_on_with_it() {
    let (network, root, cache) = (Network::new("192.0.2.1"), roots::Root::new(), tempfile::TempDir::new().unwrap());
    for start in ["cold", "warm"] {
        let words = ["sh", "-c", "busybox nslookup -type=a example.test; cat /etc/resolv.conf; ifconfig eth0"];
        let guest = Guest::running(Kernel::Tiny.vmlinux(), &words).root(&root.image());
        let mut guest = guest.net("user").option("--warm", "net").inside(network.name());
        guest.command().env("XDG_CACHE_HOME", cache.path());
        let ended = guest.run();
        assert_eq!(ended.report["warm"]["start"], start);
        for word in ["198.51.100.7", "nameserver 10.0.2.3", "inet addr:10.0.2.15"] {
            ended.require(ended.status == 0 && ended.stdout.contains(word), word);
        }
    }
}
