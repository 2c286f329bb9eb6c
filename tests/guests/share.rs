//! Folders of the host that a guest has mounted.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use tempfile::TempDir;

use crate::support::{Guest, Kernel, noise, sha256};

fn guest(kernel: Kernel, folder: &TempDir, mode: &str) -> Guest {
    Guest::new(kernel).option("--share", format!("{}:/mnt{mode}", folder.path().display()))
}

#[test]
fn files_are_the_hosts() {
    let folder = TempDir::new().unwrap();
    let data = noise(5 << 20);
    fs::write(folder.path().join("from-host"), &data).unwrap();
    let script = "
        mount -t virtiofs share0 /mnt
        cd /mnt
        echo read=$(sha256sum <from-host)
        cp from-host from-guest

        mkdir -m 750 folder
        ln from-host folder/hard
        echo links=$(stat -c %h from-host)
        ln -s ../from-guest folder/soft
        echo through=$(sha256sum <folder/soft)
        mv folder/hard folder/moved
        echo text >appended
        echo more >>appended
        chmod 4711 appended
        touch -d '2001-02-03 04:05:06' appended
        mkfifo pipe
        truncate -s 1G sparse
        echo blocks=$(stat -c %b sparse)

        exec 3>gone
        rm gone
        echo 'written after it was removed' >&3
        exec 3>&-

        mkdir many
        i=0
        while [ $i -lt 500 ]; do : >many/$i; i=$((i + 1)); done
        echo count=$(ls many | wc -l)
        rm -r many
        if ln from-host pipe; then exit 1; fi
        if cat missing; then exit 1; fi
        df /mnt | tail -n 1
        umount -l /mnt || true
        sync
    ";
    let ended = guest(Kernel::Debian61, &folder, "").script(script).run().succeeded();
    let hash = sha256(&data);
    let path = |name: &str| folder.path().join(name);
    assert!(ended.value("read").starts_with(&hash));
    assert!(ended.value("through").starts_with(&hash));
    assert_eq!((ended.number("links"), ended.number("blocks"), ended.number("count")), (2, 0, 500));
    assert_eq!(sha256(&fs::read(path("from-guest")).unwrap()), hash);
    assert_eq!(fs::metadata(path("folder")).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(fs::metadata(path("folder/moved")).unwrap().nlink(), 2);
    assert_eq!(fs::read_link(path("folder/soft")).unwrap().to_str(), Some("../from-guest"));
    assert_eq!(fs::read_to_string(path("appended")).unwrap(), "text\nmore\n");
    let appended = fs::metadata(path("appended")).unwrap();
    assert_eq!((appended.mode() & 0o7777, appended.mtime()), (0o4711, 981_173_106));
    assert_eq!(fs::metadata(path("sparse")).unwrap().len(), 1 << 30);
    assert!(!path("gone").exists() && !path("many").exists());
    assert_eq!(ended.counted("share0", "errors"), 0);
}

#[test]
fn a_readonly_folder_stays_as_it_is() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("file"), "text").unwrap();
    symlink("/secret", folder.path().join("link")).unwrap();
    let script = "
        echo 'of the guest' >/secret
        mount -t virtiofs share0 /mnt
        echo file=$(cat /mnt/file)
        echo link=$(cat /mnt/link)
        if echo x >/mnt/file; then exit 1; fi
        if echo x >/mnt/new; then exit 1; fi
        if rm /mnt/file; then exit 1; fi
        if chmod 777 /mnt/file; then exit 1; fi
        if mv /mnt/file /mnt/other; then exit 1; fi
    ";
    let ended = guest(Kernel::Debian612, &folder, ":ro").script(script).run().succeeded();
    assert_eq!((ended.value("file"), ended.value("link")), ("text", "of the guest"));
    assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "text");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn what_is_written_in_any_order_and_way_is_read_back() {
    let folder = TempDir::new().unwrap();
    let script = "
        mount -t virtiofs share0 /mnt
        verified() {
            program fio --directory=/mnt --size=4M --rw=randwrite --fsync=64 --minimal --verify=crc32c --verify_fatal=1 \\
                \"$@\" >/output || { cat /output; exit 1; }
        }
        verified --name=psync --ioengine=psync --bsrange=512-64k --bs_unaligned
        verified --name=mmap --ioengine=mmap --bs=4k
    ";
    let guest = guest(Kernel::Debian61, &folder, "").memory("512M").program("fio");
    guest.script(script).run().succeeded();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}
