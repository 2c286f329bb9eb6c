//! Root of a Linux guest that goes past its drivers (resources/guest/devmem.c).

use std::fs;
use std::time::Duration;

use crate::namespace::Namespace;
use crate::support::{Guest, Kernel, file, noise, sha256};

/// A guest that does this with all devices, its disk's content, and its network.
fn guest(script: &str) -> (Guest, Vec<u8>, Namespace) {
    let network = Namespace::new();
    network.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap"]);
    network.ip(&["address", "add", "10.0.0.1/24", "dev", "tap0"]);
    network.ip(&["link", "set", "tap0", "up"]);
    let guest = Guest::new(Kernel::Debian61).cmdline("iomem=relaxed");
    let (disk, vsock) = (guest.folder().join("disk.img"), guest.folder().join("vsock"));
    let content = noise(1 << 20);
    fs::write(&disk, &content).unwrap();
    let guest = guest
        .file("devmem", &fs::read(file("tools/devmem")).unwrap())
        .disk(disk.display())
        .net("tap=tap0,vhost=auto")
        .option("--vsock", format!("cid=3,socket={}", vsock.display()))
        .option("--balloon", "stats=1s")
        .script(script);
    (guest.inside(network.name()), content, network)
}

#[test]
fn drivers_take_their_devices_again_after_root_has_written_to_them() {
    let script = r#"
        chmod +x /devmem
        /devmem 1 200
        for driver in virtio_blk virtio_net virtio_rng; do
            cd /sys/bus/virtio/drivers/$driver
            device=$(echo virtio[0-9]*)
            echo $device >unbind
            echo $device >bind
            [ -e $device ]
        done
        echo 3 >/proc/sys/vm/drop_caches
        echo disk=$(sha256sum </dev/vda)
        echo random=$(dd if=/dev/hwrng bs=16 count=1 status=none | wc -c)
        ip address add 10.0.0.2/24 dev eth0
        ip link set eth0 up
        ping -c 1 -w 20 10.0.0.1
    "#;
    let (guest, content, _network) = guest(script);
    let ended = guest.run().succeeded();
    assert!(ended.number("devices") >= 5, "{ended:?}");
    assert_eq!(ended.number("touched"), 200);
    assert!(ended.value("disk").starts_with(&sha256(&content)));
    assert_eq!(ended.number("random"), 16);
    assert!(ended.stderr.len() < 64 << 10, "{} bytes of log", ended.stderr.len());
}

/// With queues anywhere, the guest may spoil itself; it is its own machine's end, and no more.
#[test]
fn root_can_end_its_own_machine_only() {
    let (guest, _, _network) = guest("chmod +x /devmem; /devmem 2 400 wild");
    let ended = guest.option("--timeout", "60s").limit(Duration::from_secs(240)).run();
    assert!(ended.stdout.contains("round=0"), "{ended:?}");
    // It powers off, its kernel panics or crashes, or stands still until its time is over.
    assert!([0, 121, 122, 124].contains(&ended.status), "{ended:?}");
    assert!(ended.stderr.len() < 64 << 10, "{} bytes of log", ended.stderr.len());
}
