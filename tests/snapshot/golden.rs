//! The state that the tests of the format have: see docs/TESTING.md.

use std::fs;
use std::path::PathBuf;

use bantam::config::Config;
use bantam::machine::{Builder, Destination};
use bantam::snapshot;
use bantam::virtio::{balloon, blk};

use crate::support::Kernel;
use crate::{Lab, Running};

#[test]
#[ignore = "it prints a state to put in place of tests/snapshot/golden/state"]
fn a_state_for_the_golden_file() {
    let mut lab = Lab::new(Kernel::Tiny, "echo ready; read line");
    let disk = lab.disk("disk");
    lab.config = lab.config.disk(blk::Spec::new(&disk)).balloon(balloon::Spec::default());
    let folder = lab.path("saved");
    let machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_for("ready");
    machine.handle.snapshot(Destination::Folder(folder.clone())).unwrap();
    machine.stop();
    let state = fs::read(folder.join("state")).unwrap();
    let value: serde_json::Value = snapshot::decode(&state).unwrap();
    // Nobody's own paths: they are replaced in the text, as the order of members is part of the format.
    let config: Config = serde_json::from_value(value["config"].clone()).unwrap();
    let paths = [config.kernel, config.initrd, Some(PathBuf::from(&config.disks[0].path))];
    let body = String::from_utf8(state).unwrap().split_once('\n').unwrap().1.to_owned();
    let names = ["/srv/vmlinux", "/srv/initramfs.cpio", "/srv/disk.img"];
    let body = paths
        .iter()
        .flatten()
        .zip(names)
        .fold(body, |body, (path, name)| body.replace(&format!("\"{}\"", path.display()), &format!("\"{name}\"")));
    println!("GOLDEN {body}");
}
