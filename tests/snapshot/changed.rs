//! What is changed while a machine runs is as it was last when the machine is restored.

use std::fs;
use std::time::Duration;

use bantam::config::Size;
use bantam::machine::{Builder, Destination, Snapshot};
use bantam::virtio::change::{Change, Rates};
use bantam::virtio::{balloon, blk};

use crate::support::{Guest, Kernel};
use crate::{Lab, Running};

#[test]
fn a_restored_machine_is_as_it_was_last() {
    let modules = Kernel::Debian61.file("lib/modules");
    let version = fs::read_dir(modules).unwrap().next().unwrap().unwrap().path();
    let module = fs::read(version.join("kernel/drivers/virtio/virtio_balloon.ko")).unwrap();
    let script = r#"
        insmod /balloon.ko
        first() { echo "$1=$(dd if=/dev/vda bs=1 count=3 iflag=direct 2>/dev/null)-$(blockdev --getsz /dev/vda) end"; }
        echo ready
        while read line; do eval "$line"; done
    "#;
    let guest = Guest::new(Kernel::Debian61).file("balloon.ko", &module).script(script);
    let mut lab = Lab::with(Kernel::Debian61, guest);
    let [first, second] = ["first", "second"].map(|name| lab.path(name));
    fs::write(&first, vec![b'1'; 1 << 20]).unwrap();
    fs::write(&second, vec![b'2'; 2 << 20]).unwrap();
    let balloon = balloon::Spec { stats: Some(Duration::from_millis(50)), ..Default::default() };
    lab.config = lab.config.memory(Size::mib(256)).disk(blk::Spec::new(&first)).balloon(balloon);
    let (saved, again) = (lab.path("saved"), lab.path("again"));

    let machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_for("ready");
    machine.handle.change_disk("blk0", &second).unwrap();
    let rates = Rates { bytes: Some("64M".parse().unwrap()), operations: Some("5000".parse().unwrap()) };
    machine.handle.change("blk0", Change::Rates(rates)).unwrap();
    machine.handle.balloon(Size::mib(32)).unwrap();
    machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
    machine.stop();

    // Nobody has to say it again.
    fs::remove_file(&first).unwrap();
    let config = Snapshot::open(&saved).unwrap().config;
    assert_eq!((&config.disks[0].path, config.disks[0].bw), (&second, rates.bytes));
    assert_eq!((config.disks[0].iops, config.balloon.unwrap().size), (rates.operations, Some(Size::mib(32))));
    let machine = Running::restore(&saved);
    machine.handle.input("until [ $(blockdev --getsz /dev/vda) = 4096 ]; do :; done; first seen\n");
    machine.screen.wait_for("seen=222-4096 end");
    let begin = std::time::Instant::now();
    let balloon = || machine.handle.balloon_statistics().unwrap();
    while balloon().actual != Size::mib(32) {
        assert!(begin.elapsed() < Duration::from_secs(120), "the guest does not follow: {:?}", balloon());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(balloon().target, Size::mib(32));

    // What is not changed any more stays as it is.
    machine.handle.balloon(Size::bytes(0)).unwrap();
    machine.handle.snapshot(Destination::Folder(again.clone())).unwrap();
    machine.stop();
    let config = Snapshot::open(&again).unwrap().config;
    assert_eq!((&config.disks[0].path, config.balloon.unwrap().size), (&second, None));
}
