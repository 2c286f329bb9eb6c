//! What a killed bantam leaves behind. terminal.rs has the other endings from outside.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::eventually;
use crate::support::{Guest, Kernel};
use rustix::process::Signal;

#[test]
fn a_killed_one_leaves_nothing_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("socket"));
    fs::write(&disk, [0; 4096]).unwrap();
    let guest = |script: &str| {
        let guest = Guest::new(Kernel::Tiny).script(script).disk(disk.display());
        guest.option("--serial", format_args!("socket={}", socket.display()))
    };
    let killed = guest("sleep 1000").start();
    eventually(|| UnixStream::connect(&socket).is_ok());
    let refused = guest("").run();
    assert_eq!(refused.status, 125, "{}", refused.stderr);
    killed.signal(Signal::KILL);
    assert_eq!(killed.wait().status, 128 + Signal::KILL.as_raw());
    assert!(Path::exists(&socket));
    assert_eq!(guest("").run().status, 0);
    assert!(!Path::exists(&socket));
}
