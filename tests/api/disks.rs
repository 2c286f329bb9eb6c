//! Disks that are given other files while the guest runs, by threads that may open none.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde_json::json;

use crate::client::Api;
use crate::support::{Guest, Kernel};

/// How long a guest may take to get somewhere.
const LIMIT: Duration = Duration::from_secs(120);

/// A machine of these disks, each with an engine, whose console is the file `console`.
fn machine(guest: &Guest, disks: &[(&str, &str)]) -> serde_json::Value {
    let drive = |(name, engine): &(&str, &str)| json!({"drive_id": name, "path_on_host": name, "is_root_device": false, "io_engine": engine});
    json!({
        "boot-source": {
            "kernel_image_path": Kernel::Debian61.vmlinux(),
            "initrd_path": guest.folder().join("initramfs.cpio"),
            "boot_args": "console=ttyS0 reboot=k panic=-1 quiet",
        },
        "drives": disks.iter().map(drive).collect::<Vec<_>>(),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "serial": {"serial_out_path": "console"},
    })
}

/// A `bantam api` in its sandbox, with these files in its folder.
fn start(files: &[(&str, Vec<u8>)], variable: &str) -> Api {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
    command.args(["api", "--api-sock", "api.sock", "--config-file", "machine", "--sandbox", "on"]);
    command.env("BANTAM_TEST_VIOLATION", variable).current_dir(&folder);
    let stderr = File::create(folder.path().join("stderr")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    Api { child: command.spawn().unwrap(), folder }
}

/// Waits until the console has this text.
#[track_caller]
fn wait_for(api: &mut Api, text: &str) {
    let begin = Instant::now();
    loop {
        let seen = fs::read_to_string(api.path("console")).unwrap_or_default();
        if seen.contains(text) {
            return;
        }
        let (ended, stderr) = (api.child.try_wait().unwrap(), fs::read_to_string(api.path("stderr")).unwrap());
        assert_eq!(ended, None, "{seen}{stderr}");
        assert!(begin.elapsed() < LIMIT, "no `{text}`: {seen}{stderr}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn disks_are_changed_in_the_sandbox() {
    let script = r#"
        told() { for disk in vda vdb; do echo "$1 $disk=$(dd if=/dev/$disk bs=1 count=3 2>/dev/null)"; done; }
        told first; echo ready
        for disk in vda vdb; do until [ $(blockdev --getsz /dev/$disk) = 4096 ]; do :; done; done
        echo 3 >/proc/sys/vm/drop_caches
        told then
        for disk in vda vdb; do echo new | dd of=/dev/$disk conv=fsync 2>/dev/null; done
        echo written; sleep 1000
    "#;
    let guest = Guest::new(Kernel::Debian61).script(script);
    let config = machine(&guest, &[("sync", "Sync"), ("async", "Async")]).to_string().into_bytes();
    let [small, large] = [1, 2].map(|mib| move |byte: u8| vec![byte; mib << 20]);
    let files = [
        ("machine", config),
        ("sync", small(b'1')),
        ("async", small(b'2')),
        ("sync-2", large(b'3')),
        ("async-2", large(b'4')),
    ];
    let mut api = start(&files, "");
    wait_for(&mut api, "ready");
    let lock = |name: &str| {
        let file = File::open(api.path(name)).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
    };
    for name in ["sync", "async"] {
        assert!(!lock(name), "{name}");
        let (path, other) = (format!("/drives/{name}"), format!("{name}-2"));
        // What cannot be a disk leaves it what it is.
        for bad in ["nothing", "machine", "."] {
            let body = json!({"drive_id": name, "path_on_host": bad}).to_string();
            assert_eq!(api.request("PATCH", &path, &body).0, 400, "{bad}");
        }
        assert!(!lock(name) && lock(&other), "{name}");
        api.done("PATCH", &path, &json!({"drive_id": name, "path_on_host": other}).to_string());
        assert!(lock(name) && !lock(&other), "{name}");
    }
    wait_for(&mut api, "written");
    let seen = fs::read_to_string(api.path("console")).unwrap();
    for line in ["first vda=111", "first vdb=222", "then vda=333", "then vdb=444"] {
        assert!(seen.contains(line), "{seen}");
    }
    for (name, old) in [("sync", b"1111"), ("async", b"2222")] {
        let start = |name: &str| fs::read(api.path(name)).unwrap()[..4].to_vec();
        assert_eq!([start(name), start(&format!("{name}-2"))], [old.to_vec(), b"new\n".to_vec()]);
    }
}

#[test]
fn the_thread_of_a_disk_does_nothing_with_another_one() {
    if !cfg!(debug_assertions) {
        return;
    }
    let guest = Guest::new(Kernel::Debian61).script("sleep 1000");
    let config = machine(&guest, &[("one", "Sync"), ("two", "Sync")]).to_string().into_bytes();
    let disk = || vec![0; 1 << 20];
    let mut api = start(&[("machine", config), ("one", disk()), ("two", disk())], "another-disk");
    assert_eq!(api.wait(), Some(125));
    let stderr = fs::read_to_string(api.path("stderr")).unwrap();
    assert!(stderr.contains("sandbox: thread bantam-blk0 made the system call read (0) with 0x"), "{stderr}");
}
