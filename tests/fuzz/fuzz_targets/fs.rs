//! The file system device, on a folder beside which there is something that no guest may see.
#![no_main]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use bantam::virtio::device::VirtioDevice;
use bantam::virtio::fs::Spec;
use bantam::virtio::mmio::Mmio;
use bantam_fuzz::device::{Device, run};
use bantam_fuzz::folder;
use bantam_fuzz::input::{self, Result, Unstructured};
use bantam_fuzz::memory::Memory;
use libfuzzer_sys::Corpus;
use rustix::process::{Resource, Rlimit, setrlimit};

const SECRET: &[u8] = b"a secret outside of the folder";
/// The most bytes in a file: guests may ask for any.
const FILE_MAX: u64 = 8 << 20;
const NAMES: [&str; 10] =
    ["file", "folder", "link", "secret-link", "new", "other", ".", "..", "../secret", "folder/inner"];

struct Shared {
    readonly: bool,
}

/// Makes the folder as it is at first.
fn make() {
    let shared = folder().join("shared");
    if shared.exists() {
        clear(&shared);
    }
    fs::create_dir(&shared).expect("a folder");
    fs::write(shared.join("file"), "some text, and more of it").expect("a file");
    fs::create_dir(shared.join("folder")).expect("a folder");
    fs::write(shared.join("folder/inner"), "inner").expect("a file");
    symlink("file", shared.join("link")).expect("a link");
    symlink("../secret", shared.join("secret-link")).expect("a link");
    let secret = folder().join("secret");
    if !secret.exists() {
        fs::write(secret, SECRET).expect("a file");
    }
}

fn clear(path: &Path) {
    // Whatever the guest has done to its mode, root removes it; others need to be allowed to.
    let _ = fs::set_permissions(path, Permissions::from_mode(0o700));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            clear(&entry.path());
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// What is known of all that is in the folder.
fn tell(path: &Path, told: &mut Vec<(String, u64, u32, i64)>) {
    for entry in fs::read_dir(path).expect("a folder").flatten() {
        let metadata = entry.metadata().expect("a file");
        told.push((entry.path().display().to_string(), metadata.len(), metadata.mode(), metadata.mtime_nsec()));
        if metadata.is_dir() {
            tell(&entry.path(), told);
        }
    }
}

fn told(path: &Path) -> Vec<(String, u64, u32, i64)> {
    let mut all = vec![];
    tell(path, &mut all);
    all.sort();
    all
}

fn name(u: &mut Unstructured) -> Result<Vec<u8>> {
    let mut name = if u.ratio(7, 8)? { u.choose(&NAMES)?.as_bytes().to_vec() } else { input::bytes(u, 20)? };
    if u.ratio(31, 32)? {
        name.push(0);
    }
    Ok(name)
}

impl Device for Shared {
    const PROBE_FIRST: bool = true;

    fn new(u: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)> {
        make();
        let readonly = u.arbitrary()?;
        let spec = Spec { path: folder().join("shared"), tag: "fuzzed".into(), readonly };
        Ok((Self { readonly }, Box::new(spec.open().expect("a folder"))))
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        // Such a machine is not saved.
        None
    }

    fn request(&self, _: u16, u: &mut Unstructured) -> Result<Vec<u8>> {
        let opcode: u32 = if u.ratio(31, 32)? { u.int_in_range(1..=46)? } else { u.arbitrary()? };
        let node = if u.ratio(1, 2)? { 1 } else { input::number(u)? };
        // Each operation is of numbers, names and data, in that order, more or less.
        let mut body: Vec<u8> = vec![];
        let handle = u.int_in_range(0..=4u64)?;
        match opcode {
            // INIT, with which all begins.
            26 => body.extend([7, 31, 0x1000, u32::MAX].map(u32::to_le_bytes).concat()),
            // LOOKUP, UNLINK, RMDIR, REMOVEXATTR.
            1 | 10 | 11 | 24 => body.extend(name(u)?),
            // SYMLINK.
            6 => body.extend([name(u)?, name(u)?].concat()),
            // MKNOD, MKDIR, OPEN, OPENDIR, CREATE, RENAME, RENAME2, LINK, GETXATTR, SETXATTR.
            8 | 9 | 12 | 13 | 14 | 21 | 22 | 27 | 35 | 45 => {
                let (numbers, names) = match opcode {
                    8 | 35 => (4, 1),
                    9 | 22 => (2, 1),
                    12 => (2, 2),
                    45 => (4, 2),
                    13 => (2, 1),
                    21 => (2, 1),
                    _ => (2, 0),
                };
                for _ in 0..numbers {
                    let number = match u.int_in_range(0..=3)? {
                        0 => 0,
                        1 => u.int_in_range(0..=2)?,
                        2 => 0o100_644 | u.int_in_range(0..=0o7777)?,
                        _ => input::number(u)? as u32,
                    };
                    body.extend(number.to_le_bytes());
                }
                for _ in 0..names {
                    body.extend(if opcode == 21 || opcode == 22 { b"user.a\0".to_vec() } else { name(u)? });
                }
                body.extend(input::bytes(u, 8)?);
            }
            // Those of an open file: READ, WRITE, RELEASE, FSYNC, READDIR, FALLOCATE, LSEEK, ...
            15 | 16 | 18 | 20 | 28 | 29 | 30 | 43 | 44 | 46 => {
                body.extend(handle.to_le_bytes());
                body.extend(input::number(u)?.to_le_bytes());
                let size = u.int_in_range(0..=0x1800u32)?;
                body.extend(size.to_le_bytes());
                body.extend((input::number(u)? as u32).to_le_bytes());
                body.extend([0; 16]);
                if opcode == 16 {
                    body.extend(vec![0x66; size as usize]);
                }
            }
            // SETATTR.
            4 => {
                body.extend((u.int_in_range(0..=0x1fffu32)? & !0x40).to_le_bytes());
                body.extend([0; 4]);
                body.extend(handle.to_le_bytes());
                body.extend(input::number(u)?.to_le_bytes());
                for _ in 0..8 {
                    body.extend(input::number(u)?.to_le_bytes());
                }
            }
            _ => body.extend(input::bytes(u, 48)?),
        }
        if u.ratio(1, 16)? && !body.is_empty() {
            body.truncate(u.choose_index(body.len())?);
        }
        let mut request = ((40 + body.len()) as u32).to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(77u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        Ok(request)
    }

    fn answer(&self, _: &[u8], _: &mut Unstructured) -> Result<Option<Vec<u32>>> {
        Ok(Some(vec![16, 4096]))
    }

    fn serves_all(&self, _: u16) -> bool {
        true
    }

    /// INIT.
    fn probe(&self) -> (u16, Vec<u8>, u32) {
        let mut request = [56u32, 26].map(u32::to_le_bytes).concat();
        request.extend([0; 32]);
        request.extend([7, 31, 0x1000, u32::MAX].map(u32::to_le_bytes).concat());
        (1, request, 4096)
    }

    fn probed(&self, answer: &[u8]) {
        assert_eq!(answer[..8], [[80, 0, 0, 0], [0; 4]].concat(), "INIT is answered by 80 bytes, and no error");
    }

    fn end(&mut self, _: &mut Mmio, memory: &Memory) {
        assert!(!memory.has(SECRET), "the guest has read what is not in its folder");
        let secret = folder().join("secret");
        let metadata = fs::symlink_metadata(&secret).expect("it is still there");
        assert_eq!((metadata.len(), metadata.nlink()), (SECRET.len() as u64, 1), "what is not in the folder");
        if self.readonly {
            let before = told(&folder().join("shared"));
            make();
            let names = |told: &[(String, u64, u32, i64)]| {
                told.iter().map(|(name, len, mode, _)| (name.clone(), *len, *mode)).collect::<Vec<_>>()
            };
            assert_eq!(names(&before), names(&told(&folder().join("shared"))), "a folder that is only read");
        }
    }
}

libfuzzer_sys::fuzz_target!(init: {
    let limit = Rlimit { current: Some(FILE_MAX), maximum: Some(FILE_MAX) };
    setrlimit(Resource::Fsize, limit).expect("a lower limit");
    // SAFETY: nobody handles it here. What is too large is an error then, and not the end.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}, |data: &[u8]| -> Corpus {
    run::<Shared>(data);
    Corpus::Keep
});
