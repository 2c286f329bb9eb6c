//! Layers of images: archives as they are, compressed or not, merged and written as an EROFS image.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use bantam::image::{Limits, unpack_layers};
use bantam_fuzz::input::{self, Result, Unstructured};
use rustix::fs::{MemfdFlags, memfd_create};

const LIMITS: Limits = Limits { bytes: 1 << 20, files: 1000, text: 64 << 10 };
const BLOCK: u64 = 4096;
const NAMES: [&str; 14] = [
    "a",
    "b",
    "a/b",
    "a/b/c",
    "a/../b",
    "./a",
    "/a",
    "a//b",
    "..",
    ".wh.a",
    "a/.wh.b",
    "a/.wh..wh..opq",
    "",
    ".wh..wh.aufs",
];

fn name(u: &mut Unstructured) -> Result<Vec<u8>> {
    if u.ratio(7, 8)? { Ok(u.choose(&NAMES)?.as_bytes().to_vec()) } else { input::bytes(u, 120) }
}

/// An entry of an archive: a header whose checksum is right, and data.
fn entry(u: &mut Unstructured, archive: &mut Vec<u8>) -> Result<()> {
    let kind = if u.ratio(7, 8)? { *u.choose(b"0123456LKxgS")? } else { u.arbitrary()? };
    let data = match kind {
        b'x' | b'g' => {
            let mut records = vec![];
            for _ in 0..u.int_in_range(1..=3)? {
                let key = *u.choose(&[
                    "path",
                    "linkpath",
                    "size",
                    "mtime",
                    "uid",
                    "SCHILY.xattr.user.a",
                    "SCHILY.xattr.b",
                    "GNU.sparse.major",
                    "GNU.sparse.minor",
                    "GNU.sparse.realsize",
                    "GNU.sparse.name",
                    "GNU.sparse.map",
                ])?;
                let value = if u.ratio(1, 2)? { input::number(u)?.to_string().into_bytes() } else { name(u)? };
                let length = key.len() + value.len() + 3;
                let length = length + (length + 2).to_string().len();
                records.extend(format!("{length} {key}=").bytes().chain(value).chain(*b"\n"));
            }
            records
        }
        b'L' | b'K' => [name(u)?, vec![0]].concat(),
        b'0' | b'S' if u.ratio(1, 2)? => vec![u.arbitrary()?; u.int_in_range(0..=10_000)?],
        b'0' | b'S' => input::bytes(u, 100)?,
        _ => vec![],
    };
    let mut header = [0; 512];
    let path = name(u)?;
    header[..path.len().min(100)].copy_from_slice(&path[..path.len().min(100)]);
    header[100..108].copy_from_slice(b"0000755\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = kind;
    let link = name(u)?;
    header[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
    header[257..265].copy_from_slice(if u.arbitrary()? { b"ustar\x0000" } else { b"ustar  \0" });
    header[329..337].copy_from_slice(b"0000001\0");
    header[337..345].copy_from_slice(b"0000003\0");
    if u.ratio(1, 8)? {
        let at = u.choose_index(500)?;
        header[at..at + 8].copy_from_slice(&u.arbitrary::<[u8; 8]>()?);
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.extend(header);
    archive.extend(&data);
    archive.resize(archive.len().next_multiple_of(512), 0);
    Ok(())
}

fn layers(u: &mut Unstructured) -> Result<Vec<Vec<u8>>> {
    if u.ratio(1, 4)? {
        let rest = u.len();
        return Ok(vec![u.bytes(rest)?.to_vec()]);
    }
    let mut layers = vec![];
    while !u.is_empty() && layers.len() < 4 {
        let mut layer = vec![];
        for _ in 0..u.int_in_range(1..=12)? {
            entry(u, &mut layer)?;
        }
        layers.push(layer);
    }
    Ok(layers)
}

/// An EROFS image, read without the code that is under test.
struct Image {
    bytes: Vec<u8>,
    meta: u64,
    seen: std::collections::BTreeMap<u64, u32>,
    directories: usize,
}

impl Image {
    fn number(&self, at: u64, len: u64) -> u64 {
        let range = usize::try_from(at).expect("64 bits")..usize::try_from(at + len).expect("64 bits");
        let bytes = self.bytes.get(range).unwrap_or_else(|| panic!("{at:#x} is not in the image"));
        bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// Walks all below an inode.
    fn walk(&mut self, id: u64, parent: u64, kind: u64) {
        let first = !self.seen.contains_key(&id);
        *self.seen.entry(id).or_default() += 1;
        let at = self.meta + 32 * id;
        let (format, xattrs, mode, size) =
            (self.number(at, 2), self.number(at + 2, 2), self.number(at + 4, 2), self.number(at + 8, 8));
        let block = self.number(at + 16, 4);
        let expected = match mode >> 12 {
            0o10 => 1,
            0o4 => 2,
            0o2 => 3,
            0o6 => 4,
            0o1 => 5,
            0o12 => 7,
            other => panic!("inode {id} is of the type {other:#o}"),
        };
        assert!(kind == expected && format & 1 == 1, "inode {id}: {mode:#o}, and {kind} in its folder");
        if !first {
            assert_ne!(kind, 2, "a directory has two names");
            return;
        }
        let inline = format >> 1 == 2;
        let beside = at + 64 + if xattrs > 0 { 12 + 4 * (xattrs - 1) } else { 0 };
        let whole = if inline { size / BLOCK } else { size.div_ceil(BLOCK) };
        if matches!(kind, 1 | 2 | 7) {
            assert!(
                size == 0 || whole == 0 || block > 0 && (block + whole) * BLOCK <= self.meta,
                "inode {id}: its blocks"
            );
            if inline {
                assert_eq!(beside / BLOCK, (beside + size % BLOCK - 1) / BLOCK, "inode {id}: what is beside it");
                let _ = self.number(beside, size % BLOCK);
            }
        }
        if kind != 2 {
            return;
        }
        self.directories += 1;
        let mut names: Vec<Vec<u8>> = vec![];
        for part in 0..size.div_ceil(BLOCK) {
            let len = BLOCK.min(size - part * BLOCK);
            let start = if part < whole { (block + part) * BLOCK } else { beside };
            let count = self.number(start + 8, 2) / 12;
            for i in 0..count {
                let entry = start + 12 * i;
                let (child, name_at, kind) =
                    (self.number(entry, 8), self.number(entry + 8, 2), self.number(entry + 10, 1));
                let end = if i + 1 < count { self.number(entry + 20, 2) } else { len };
                let name = &self.bytes[(start + name_at) as usize..(start + end) as usize];
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
                assert!(!name.is_empty() && !name.contains(&b'/') && name.len() <= 255, "{name:?}");
                match name.as_slice() {
                    b"." => assert_eq!((child, kind), (id, 2)),
                    b".." => assert_eq!((child, kind), (parent, 2)),
                    _ => self.walk(child, id, kind),
                }
                names.push(name);
            }
        }
        assert!(names.is_sorted_by(|one, other| one < other), "{names:?}");
    }

    /// Each inode has as many names as it tells.
    fn check_links(&self) {
        for (id, names) in &self.seen {
            let at = self.meta + 32 * id;
            if self.number(at + 4, 2) >> 12 != 0o4 {
                assert_eq!(self.number(at + 44, 4), u64::from(*names), "the links of inode {id}");
            }
        }
    }
}

fn check(file: &File) {
    let mut bytes = vec![0; file.metadata().expect("its size").len() as usize];
    assert!(bytes.len() % (2 << 20) == 0 && bytes.len() <= 16 << 20, "an image of {} bytes", bytes.len());
    file.read_exact_at(&mut bytes, 0).expect("it is a file");
    let mut image = Image { bytes, meta: 0, seen: Default::default(), directories: 0 };
    assert_eq!(image.number(1024, 4), 0xe0f5_e1e2);
    image.meta = image.number(1024 + 40, 4) * BLOCK;
    let (root, inodes) = (image.number(1024 + 14, 2), image.number(1024 + 16, 8));
    image.walk(root, root, 2);
    assert_eq!(image.seen.len() as u64, inodes, "inodes");
    image.check_links();
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let Ok(layers) = layers(&mut u) else { return };
    let memory = || File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a file in memory"));
    let layers: Vec<_> = layers.iter().map(Vec::as_slice).collect();
    if let Ok(image) = unpack_layers(&layers, LIMITS, memory(), memory()) {
        check(&image);
    }
});
