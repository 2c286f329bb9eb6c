//! The device and a FUSE client made by hand.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use rustix::io::Errno;

use super::tree::ROOT;
use super::wire::{IN_HEADER, OPEN_KILL_SUIDGID, OUT_HEADER, Reply, WRITE_KILL_SUIDGID, fattr, init, op};
use super::*;
use crate::virtio::testing::{BUFFERS, Driver};

/// Where the answers go.
const ANSWER: u64 = BUFFERS + 0x8_0000;
const ROOM: u32 = 0x1_0000;

struct Guest {
    driver: Driver,
    folder: tempfile::TempDir,
}

impl Guest {
    fn with(readonly: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shared = folder.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(folder.path().join("secret"), "outside").unwrap();
        let spec = Spec { path: shared, tag: "test".into(), readonly };
        let mut driver = Driver::new(Box::new(spec.open().unwrap()));
        driver.start();
        let mut guest = Self { driver, folder };
        let mut args = Reply::default();
        args.u32(7).u32(36).u32(0x1000).u32(u32::MAX);
        let answer = guest.ask(op::INIT, 0, &args.0).unwrap();
        assert_eq!((number(&answer, 0, 4), number(&answer, 4, 4), answer.len()), (7, 31, 64));
        assert_eq!(number(&answer, 20, 4), u64::from(MAX_WRITE));
        assert!(number(&answer, 12, 4) & u64::from(init::MAX_PAGES) != 0);
        guest
    }

    fn new() -> Self {
        Self::with(false)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("shared").join(name)
    }

    /// Sends a request; the body of its answer.
    fn ask(&mut self, opcode: u32, node: u64, args: &[u8]) -> Result<Vec<u8>, Errno> {
        let answer = self.ask_for(opcode, node, args, 1);
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[OUT_HEADER..].to_vec()),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    /// The answer, which has the same room so many times.
    fn ask_for(&mut self, opcode: u32, node: u64, args: &[u8], times: usize) -> Vec<u8> {
        let mut request = Reply::default();
        let length = u32::try_from(IN_HEADER + args.len()).unwrap();
        let caller = fs::metadata(self.folder.path()).unwrap();
        request.u32(length).u32(opcode).u64(77).u64(node).u32(caller.uid()).u32(caller.gid()).u64(0).bytes(args);
        self.driver.put(BUFFERS, &request.0);
        // The header apart, as Linux has it.
        let rest = (BUFFERS + 16, length - 16, false);
        let mut buffers = vec![(BUFFERS, 16, false), rest, (ANSWER, 16, true)];
        buffers.extend(vec![(ANSWER + 16, ROOM, true); times]);
        self.driver.rings[1].add(&buffers);
        let used = self.driver.finish(1, 1)[0].1;
        let answer = self.driver.get(ANSWER, used.min(16 + ROOM) as usize);
        assert_eq!(number(&answer, 0, 4), u64::from(used));
        assert_eq!(number(&answer, 8, 8), 77);
        answer
    }

    fn lookup(&mut self, node: u64, name: &str) -> Result<u64, Errno> {
        self.ask(op::LOOKUP, node, &text(name)).map(|entry| number(&entry, 0, 8))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let mut args = Reply::default();
        args.u32(flags.cast_unsigned()).u32(0);
        self.ask(op::OPEN, node, &args.0).map(|answer| number(&answer, 0, 8))
    }

    fn create(&mut self, name: &str, mode: u32) -> Result<(u64, u64), Errno> {
        let mut args = Reply::default();
        args.u32((libc::O_RDWR | libc::O_CREAT | libc::O_EXCL).cast_unsigned()).u32(mode).u32(0).u32(0);
        args.bytes(&text(name));
        let answer = self.ask(op::CREATE, ROOT, &args.0)?;
        Ok((number(&answer, 0, 8), number(&answer, 128, 8)))
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Result<u64, Errno> {
        let mut args = Reply::default();
        args.u64(handle).u64(offset).u32(u32::try_from(data.len()).unwrap()).u32(0).u64(0).u32(0).u32(0).bytes(data);
        self.ask(op::WRITE, 0, &args.0).map(|answer| number(&answer, 0, 4))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut args = Reply::default();
        args.u64(handle).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        self.ask(op::READ, 0, &args.0)
    }

    fn list(&mut self, opcode: u32, size: u32) -> Vec<String> {
        let opened = self.ask(op::OPENDIR, ROOT, &[0; 8]).unwrap();
        let (mut offset, mut names) = (0, Vec::new());
        loop {
            let mut args = Reply::default();
            args.u64(number(&opened, 0, 8)).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
            let answer = self.ask(opcode, ROOT, &args.0).unwrap();
            assert!(answer.len() <= size as usize);
            if answer.is_empty() {
                return names;
            }
            let mut at = 0;
            while at < answer.len() {
                at += if opcode == op::READDIRPLUS { 128 } else { 0 };
                offset = number(&answer, at + 8, 8);
                let length = usize::try_from(number(&answer, at + 16, 4)).unwrap();
                names.push(String::from_utf8(answer[at + 24..][..length].to_vec()).unwrap());
                at += (24 + length).next_multiple_of(8);
            }
        }
    }
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[test]
fn files_are_written_and_read() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("file", 0o444).unwrap();
    let data: Vec<u8> = (0..40_000u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
    assert_eq!(guest.write(handle, 100, &data), Ok(40_000));
    assert_eq!(guest.read(handle, 100, 50_000).unwrap(), data);
    assert_eq!(guest.read(handle, 99, 2).unwrap(), [0, data[0]]);
    let on_host = fs::metadata(guest.path("file")).unwrap();
    assert_eq!((on_host.len(), on_host.mode() & 0o7777), (40_100, 0o444));
    assert_eq!(&fs::read(guest.path("file")).unwrap()[100..], data);

    let mut args = Reply::default();
    args.u32(fattr::SIZE | fattr::FH | fattr::MODE | fattr::MTIME).u32(0).u64(handle).u64(7).u64(0);
    args.u64(1).u64(1_000_000_000).u64(0).u32(0).u32(5).u32(0).u32(0o600).u32(0).u32(0).u32(0).u32(0);
    let attr = guest.ask(op::SETATTR, node, &args.0).unwrap();
    assert_eq!(number(&attr, 16 + 8, 8), 7);
    let on_host = fs::metadata(guest.path("file")).unwrap();
    assert_eq!((on_host.len(), on_host.mode() & 0o7777), (7, 0o600));
    assert_eq!((on_host.mtime(), on_host.mtime_nsec()), (1_000_000_000, 5));

    // It is there until the last one closes it.
    guest.ask(op::UNLINK, ROOT, &text("file")).unwrap();
    assert!(!guest.path("file").exists());
    assert_eq!(guest.write(handle, 0, b"still"), Ok(5));
    guest.ask(op::RELEASE, node, &handle.to_le_bytes()).unwrap();
    assert_eq!(guest.write(handle, 0, b"no more"), Err(Errno::BADF));
    assert_eq!(guest.driver.mmio.metrics().to_json()["errors"], 0);
}

#[test]
fn names_are_made_changed_and_listed() {
    let mut guest = Guest::new();
    let mut args = Reply::default();
    args.u32(0o1777).u32(0).bytes(b"folder\0");
    let folder = number(&guest.ask(op::MKDIR, ROOT, &args.0).unwrap(), 0, 8);
    assert_eq!(fs::metadata(guest.path("folder")).unwrap().mode() & 0o7777, 0o1777);
    let (file, _) = guest.create("file", 0o600).unwrap();

    let mut args = Reply::default();
    args.u64(file).bytes(b"hard\0");
    let linked = guest.ask(op::LINK, folder, &args.0).unwrap();
    assert_eq!(number(&linked, 0, 8), file, "the same file is the same node");
    let mut args = Reply::default();
    args.u64(folder).u32(1).u32(0).bytes(b"file\0hard\0");
    assert_eq!(guest.ask(op::RENAME2, ROOT, &args.0), Err(Errno::EXIST), "RENAME_NOREPLACE");
    let mut args = Reply::default();
    args.u64(ROOT).bytes(b"hard\0moved\0");
    guest.ask(op::RENAME, folder, &args.0).unwrap();
    assert_eq!(fs::metadata(guest.path("moved")).unwrap().nlink(), 2);

    let link = guest.ask(op::SYMLINK, ROOT, b"link\0../secret\0").unwrap();
    assert_eq!(guest.ask(op::READLINK, number(&link, 0, 8), b"").unwrap(), b"../secret");
    assert_eq!(fs::read_link(guest.path("link")).unwrap().to_str(), Some("../secret"));

    for i in 0..100 {
        fs::write(guest.path(&format!("entry {i}")), "").unwrap();
    }
    for (opcode, size) in [(op::READDIR, 300), (op::READDIR, ROOM), (op::READDIRPLUS, 700), (op::READDIRPLUS, ROOM)] {
        let mut names = guest.list(opcode, size);
        names.sort();
        let mut expected: Vec<_> = (0..100).map(|i| format!("entry {i}")).collect();
        expected.extend([".", "..", "file", "folder", "link", "moved"].map(String::from));
        expected.sort();
        assert_eq!(names, expected);
    }
    assert_eq!(guest.ask(op::UNLINK, ROOT, b"folder\0"), Err(Errno::ISDIR));
    guest.ask(op::RMDIR, ROOT, b"folder\0").unwrap();
    assert_eq!(guest.lookup(ROOT, "folder"), Err(Errno::NOENT));
}

#[test]
fn a_listing_is_no_longer_than_what_is_read_at_once() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    for i in 0..4000 {
        fs::hard_link(guest.path("file"), guest.path(&format!("{i:0>255}"))).unwrap();
    }
    let handle = number(&guest.ask(op::OPENDIR, ROOT, &[0; 8]).unwrap(), 0, 8);
    let mut args = Reply::default();
    args.u64(handle).u64(0).u32(u32::MAX).u32(0).u64(0).u32(0).u32(0);
    let answer = guest.ask_for(op::READDIR, ROOT, &args.0, 24);
    let most = u64::from(MAX_WRITE) + OUT_HEADER as u64;
    assert!((most - 300..=most).contains(&number(&answer, 0, 4)), "{}", number(&answer, 0, 4));
}

#[test]
fn a_folder_that_is_emptied_while_it_is_read_is_read_to_its_end() {
    let mut guest = Guest::new();
    for i in 0..200 {
        fs::write(guest.path(&format!("entry {i}")), "").unwrap();
    }
    let handle = number(&guest.ask(op::OPENDIR, ROOT, &[0; 8]).unwrap(), 0, 8);
    let (mut offset, mut seen) = (0, 0);
    loop {
        let mut args = Reply::default();
        args.u64(handle).u64(offset).u32(400).u32(0).u64(0).u32(0).u32(0);
        let answer = guest.ask(op::READDIR, ROOT, &args.0).unwrap();
        let mut at = 0;
        while at < answer.len() {
            offset = number(&answer, at + 8, 8);
            let length = usize::try_from(number(&answer, at + 16, 4)).unwrap();
            let name = str::from_utf8(&answer[at + 24..][..length]).unwrap();
            if name.starts_with("entry") {
                fs::remove_file(guest.path(name)).unwrap();
                seen += 1;
            }
            at += (24 + length).next_multiple_of(8);
        }
        if answer.is_empty() {
            break;
        }
    }
    assert_eq!((seen, fs::read_dir(guest.path("")).unwrap().count()), (200, 0));
}

#[test]
fn nothing_outside_can_be_reached() {
    let mut guest = Guest::new();
    for name in ["..", ".", "", "a/b", "/etc/passwd", "../secret"] {
        assert_eq!(guest.lookup(ROOT, name), Err(Errno::INVAL), "{name}");
        assert_eq!(guest.ask(op::UNLINK, ROOT, &text(name)), Err(Errno::INVAL), "{name}");
        assert_eq!(guest.create(name, 0o600), Err(Errno::INVAL), "{name}");
    }
    symlink("../secret", guest.path("out")).unwrap();
    symlink("..", guest.path("up")).unwrap();
    let (out, up) = (guest.lookup(ROOT, "out").unwrap(), guest.lookup(ROOT, "up").unwrap());
    assert_eq!(guest.open(out, libc::O_RDWR), Err(Errno::PERM));
    assert_eq!(guest.lookup(up, "secret"), Err(Errno::NOTDIR));
    assert_eq!(guest.ask(op::OPENDIR, up, &[0; 8]), Err(Errno::PERM));
    // A pipe would be waited for, a device is one of the host's.
    let mut args = Reply::default();
    args.u32(0o010_644).u32(0).u32(0).u32(0).bytes(b"pipe\0");
    let pipe = number(&guest.ask(op::MKNOD, ROOT, &args.0).unwrap(), 0, 8);
    assert!(fs::metadata(guest.path("pipe")).unwrap().file_type().is_fifo());
    assert_eq!(guest.open(pipe, libc::O_RDONLY), Err(Errno::PERM));
    let mut args = Reply::default();
    args.u32(0o020_666).u32(0x0103).u32(0).u32(0).bytes(b"null\0");
    assert_eq!(guest.ask(op::MKNOD, ROOT, &args.0), Err(Errno::PERM));
    assert_eq!(fs::read_to_string(guest.folder.path().join("secret")).unwrap(), "outside");
}

#[test]
fn a_readonly_folder_stays_as_it_is() {
    let mut guest = Guest::with(true);
    fs::write(guest.path("file"), "text").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"text");
    assert_eq!(guest.write(handle, 0, b"x"), Err(Errno::BADF));
    fs::set_permissions(guest.path("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    let mut kill = Reply::default();
    kill.u64(handle).u64(0).u32(0).u32(WRITE_KILL_SUIDGID).u64(0).u32(0).u32(0);
    assert_eq!(guest.ask(op::WRITE, 0, &kill.0), Err(Errno::BADF));
    assert_eq!(fs::metadata(guest.path("file")).unwrap().mode() & 0o7777, 0o4755);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags), Err(Errno::ROFS));
    }
    let mut set = Reply::default();
    set.u32(fattr::MODE).u32(0).bytes(&[0; 80]);
    let mut rename = Reply::default();
    rename.u64(ROOT).bytes(b"file\0new\0");
    let mut link = Reply::default();
    link.u64(node).bytes(b"new\0");
    let mut xattr = Reply::default();
    xattr.u32(1).u32(0).bytes(b"user.x\0v");
    let made = [&[0; 16], &b"new\0"[..]].concat();
    for (opcode, about, args) in [
        (op::SETATTR, node, &set.0[..]),
        (op::RENAME, ROOT, &rename.0),
        (op::LINK, ROOT, &link.0),
        (op::SETXATTR, node, &xattr.0),
        (op::REMOVEXATTR, node, b"user.x\0"),
        (op::MKDIR, ROOT, &made[8..]),
        (op::MKNOD, ROOT, &made),
        (op::CREATE, ROOT, &made),
        (op::SYMLINK, ROOT, b"new\0target\0"),
        (op::UNLINK, ROOT, b"file\0"),
        (op::RMDIR, ROOT, b"file\0"),
    ] {
        assert_eq!(guest.ask(opcode, about, args), Err(Errno::ROFS), "{opcode}");
    }
    let mut space = Reply::default();
    space.u64(handle).u64(0).u64(100).u32(0).u32(0);
    assert_eq!(guest.ask(op::FALLOCATE, node, &space.0), Err(Errno::BADF));
    assert_eq!(fs::read_to_string(guest.path("file")).unwrap(), "text");
    assert_eq!(fs::metadata(guest.path("file")).unwrap().permissions().mode() & 0o7000, 0o4000);
}

#[test]
fn extended_attributes_are_those_of_users() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let mut args = Reply::default();
    args.u32(5).u32(0).bytes(b"user.name\0value");
    match guest.ask(op::SETXATTR, node, &args.0) {
        Err(Errno::OPNOTSUPP) => return eprintln!("SKIPPED: this file system has no extended attributes"),
        result => assert_eq!(result, Ok(vec![])),
    }
    let get = |size: u32, name: &str| {
        let mut args = Reply::default();
        args.u32(size).u32(0).bytes(&text(name));
        args.0
    };
    assert_eq!(guest.ask(op::GETXATTR, node, &get(0, "user.name")).unwrap(), [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.ask(op::GETXATTR, node, &get(100, "user.name")).unwrap(), b"value");
    assert_eq!(guest.ask(op::GETXATTR, node, &get(4, "user.name")), Err(Errno::RANGE));
    assert_eq!(guest.ask(op::GETXATTR, node, &get(0, "user.other")), Err(Errno::NODATA));
    assert_eq!(guest.ask(op::LISTXATTR, node, &get(100, "")).unwrap(), b"user.name\0");
    guest.ask(op::REMOVEXATTR, node, b"user.name\0").unwrap();
    assert_eq!(guest.ask(op::LISTXATTR, node, &get(100, "")).unwrap(), b"");
    let mut args = Reply::default();
    args.u32(5).u32(0).bytes(b"security.capability\0value");
    assert_eq!(guest.ask(op::SETXATTR, node, &args.0), Err(Errno::OPNOTSUPP));
}

#[test]
fn who_writes_takes_privileges_away() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("file", 0o755).unwrap();
    let path = guest.path("file");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let give = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();

    give(0o6755);
    let mut write = Reply::default();
    write.u64(handle).u64(0).u32(1).u32(WRITE_KILL_SUIDGID).u64(0).u32(0).u32(0).bytes(b"x");
    guest.ask(op::WRITE, 0, &write.0).unwrap();
    assert_eq!(mode(), 0o755);

    // Without the group's right to execute, that bit means something else.
    give(0o6745);
    let mut open = Reply::default();
    open.u32((libc::O_WRONLY | libc::O_TRUNC).cast_unsigned()).u32(OPEN_KILL_SUIDGID);
    guest.ask(op::OPEN, node, &open.0).unwrap();
    assert_eq!(mode(), 0o2745);

    give(0o4755);
    let mut truncate = Reply::default();
    truncate.u32(fattr::SIZE | fattr::KILL_SUIDGID).u32(0).u64(0).u64(7).bytes(&[0; 64]);
    guest.ask(op::SETATTR, node, &truncate.0).unwrap();
    assert_eq!((mode(), fs::metadata(&path).unwrap().len()), (0o755, 7));
}

#[test]
fn nodes_are_forgotten() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let first = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.lookup(ROOT, "file"), Ok(first));
    let mut args = Reply::default();
    args.u32(48).u32(op::FORGET).u64(1).u64(first).u64(0).u64(0).u64(2);
    guest.driver.put(BUFFERS, &args.0);
    guest.driver.rings[0].add(&[(BUFFERS, 48, false)]);
    assert_eq!(guest.driver.finish(0, 1)[0].1, 0);
    assert_eq!(guest.ask(op::GETATTR, first, &[0; 16]), Err(Errno::STALE));
    let second = guest.lookup(ROOT, "file").unwrap();
    assert_ne!(second, first);
    // A reset forgets all.
    guest.driver.start();
    assert_eq!(guest.ask(op::GETATTR, second, &[0; 16]), Err(Errno::INVAL));
}

#[test]
fn what_is_no_request_is_refused() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(9999, ROOT, b""), Err(Errno::NOSYS));
    for opcode in 1..60 {
        // A newline is no text, and no number of bytes is right.
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match opcode {
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => None,
            _ => Some(guest.ask(opcode, ROOT, b"\n")),
        }));
        assert!(answer.is_ok(), "{opcode}");
    }
    for buffers in
        [vec![(BUFFERS, 39, false)], vec![(ANSWER, 16, true), (BUFFERS, 40, false)], vec![(ANSWER, 16, true)]]
    {
        guest.driver.rings[1].add(&buffers);
        assert_eq!(guest.driver.finish(1, 1)[0].1, 0);
    }
    // No room for the answer.
    let mut request = Reply::default();
    request.u32(56).u32(op::GETATTR).u64(1).u64(ROOT).u64(0).u64(0).u64(0).u64(0);
    guest.driver.put(BUFFERS, &request.0);
    for (room, used) in [(15, 0), (16, 16), (119, 16), (120, 120)] {
        guest.driver.rings[1].add(&[(BUFFERS, 56, false), (ANSWER, room, true)]);
        assert!(guest.driver.finish(1, 1)[0].1 == used || used == 120);
    }
}
