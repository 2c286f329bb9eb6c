//! Drivers that let go of their device and take it again.

use std::fs;

use tempfile::NamedTempFile;

use crate::support::{Guest, Kernel, noise, sha256};

#[test]
fn rng_gives_bytes() {
    let script = "
        echo current=$(cat /sys/class/misc/hw_random/rng_current)
        dd if=/dev/hwrng of=/bytes bs=64 count=16 iflag=fullblock
        echo size=$(wc -c </bytes)
        echo packed=$(gzip -c /bytes | wc -c)
    ";
    let ended = Guest::new(Kernel::Tiny).script(script).run().succeeded();
    assert_eq!(ended.value("current"), "virtio_rng.0");
    assert_eq!(ended.number("size"), 1024);
    assert!(ended.number("packed") >= 1024, "random bytes are not to be compressed");
    assert!(ended.counted("rng", "bytes") >= 1024);
}

/// As many as there are interrupts for, with a kernel whose other drivers claim theirs by number.
#[test]
fn seventeen_devices_interrupt() {
    let disks: Vec<_> = (0..16).map(|_| NamedTempFile::new().unwrap()).collect();
    let mut guest = Guest::new(Kernel::Tiny);
    for (number, disk) in disks.iter().enumerate() {
        fs::write(disk.path(), format!("{number:<512}")).unwrap();
        guest = guest.disk(disk.path().display());
    }
    let script = "
        for disk in /dev/vd[a-p]; do echo disk=$(cat $disk); done
        dd if=/dev/hwrng of=/bytes bs=64 count=1
        cat /proc/interrupts
        echo claimed=$(grep -c virtio /proc/interrupts)
    ";
    let ended = guest.script(script).run().succeeded();
    let numbers: Vec<_> = (0..16).map(|number| number.to_string()).collect();
    assert_eq!(ended.values("disk").collect::<Vec<_>>(), numbers);
    assert_eq!(ended.number("claimed"), 17);
}

#[test]
fn devices_work_again_after_their_driver_was_unbound() {
    let script = r#"
        rebind() {
            driver=/sys/bus/virtio/drivers/$1
            device=$(cd $driver && echo virtio[0-9]*)
            echo $device >$driver/unbind
            [ ! -e $driver/$device ]
            echo $device >$driver/bind
            [ -e $driver/$device ]
        }
        works() {
            echo 3 >/proc/sys/vm/drop_caches
            echo disk=$(sha256sum </dev/vda)
            [ $(dd if=/dev/hwrng bs=16 count=1 status=none | wc -c) = 16 ]
            ip address add 10.0.0.2/24 dev eth0
            ip link set eth0 up
            ping -c 1 -w 20 10.0.0.1
        }
        works
        for time in 1 2 3; do
            for driver in virtio_blk virtio_net virtio_rng; do rebind $driver; done
            works
        done
    "#;
    let disk = NamedTempFile::new().unwrap();
    let content = noise(4 << 20);
    fs::write(&disk, &content).unwrap();
    for kernel in [Kernel::Debian61, Kernel::Debian612, Kernel::Tiny] {
        let network = crate::net::network();
        let vhost = if kernel == Kernel::Debian612 { "auto" } else { "off" };
        let guest = Guest::new(kernel).disk(disk.path().display()).net(format!("tap=tap0,vhost={vhost}"));
        let ended = guest.inside(network.name()).script(script).run().succeeded();
        let expected = sha256(&content);
        assert_eq!(ended.values("disk").filter(|hash| hash.starts_with(&expected)).count(), 4, "{ended:?}");
        assert!(ended.counted("blk0", "read-bytes") >= 4 * content.len() as u64);
        assert_eq!(ended.counted("net0", "tx-errors"), 0);
    }
}
