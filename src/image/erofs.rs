//! Writing an EROFS image: a read-only file system that Linux has since 5.4, uncompressed, so that the guest reads files
//! straight from the host's page cache.
//!
//! The image has, in this order: the superblock's block, the blocks of files, those of large directories, and the inodes,
//! each followed by its extended attributes and the end of its data that fills no block. Names are those of Linux'
//! `fs/erofs/erofs_fs.h`. One tree gives the same bytes always.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::archive::{Metadata, invalid};
use super::contents::{BLOCK, BLOCK_SIZE, Contents, Tails};
use super::tree::{Content, Id, Name, ROOT, Tree};

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPER_OFFSET: usize = 1024;
/// The superblock has a checksum; inodes have times.
const FEATURE_COMPAT: u32 = 1 | 1 << 1;
const BLOCK_BITS: u8 = 12;
/// The size of an extended inode, in bytes.
const INODE: u64 = 64;
/// Inodes are addressed in units of this, in bytes.
const SLOT: u64 = 32;
const DIRENT: usize = 12;
/// An inode's layout: whole blocks only, or the end of the data beside the inode.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
/// The image's size is a multiple of this, in bytes, so that it can also be mapped as persistent memory.
const ALIGN: u64 = 2 << 20;
const XATTR_HEADER: usize = 12;

/// How many bytes of data fit beside the inode of a file with this metadata.
pub(super) fn room(metadata: &Metadata) -> u64 {
    BLOCK.saturating_sub(INODE + xattrs_len(metadata))
}

/// Where an inode and its data are.
#[derive(Clone, Copy, Default)]
struct Place {
    /// In bytes from the first inode block; 0 for nodes that are in no directory.
    offset: u64,
    size: u64,
    block: u64,
    inline: bool,
    parent: Id,
    /// How many directories are in this one.
    folders: u32,
}

/// Writes what `tree` has, with the data that `contents` has written already, and gives back the image.
pub(super) fn finish(tree: &Tree, contents: Contents, uuid: [u8; 16]) -> io::Result<File> {
    let (image, mut next, tails) = contents.finish()?;
    let order = order(tree);
    let mut places = vec![Place::default(); tree.len()];
    // Slot 0 would make an inode number 0, which readers of directories take for a deleted file.
    let mut end = INODE;
    for (id, parent) in &order {
        let node = tree.node(*id);
        let mut place = Place { parent: *parent, ..Place::default() };
        let room = room(&node.metadata);
        let tail = match &node.content {
            Content::File(data) => {
                (place.size, place.block, place.inline) = (data.size, data.block, data.tail.is_some());
                data.tail_len()
            }
            Content::Symlink(target) => {
                place.size = target.len() as u64;
                place.inline = place.size <= room;
                if place.inline { place.size } else { 0 }
            }
            Content::Directory(children) => {
                place.size = directory_size(&entries(children, *id, *parent));
                let subdirectory = |id: &Id| matches!(tree.node(*id).content, Content::Directory(_));
                let folders = children.values().filter(|child| subdirectory(&child.id)).count();
                place.folders = u32::try_from(folders).map_err(|_| invalid("a directory has too many directories"))?;
                place.inline = place.size % BLOCK <= room && !place.size.is_multiple_of(BLOCK);
                if place.inline { place.size % BLOCK } else { 0 }
            }
            _ => 0,
        };
        if let Content::Symlink(_) | Content::Directory(_) = node.content {
            place.block = next;
            next += if place.inline { place.size / BLOCK } else { place.size.div_ceil(BLOCK) };
        }
        // The inode does not cross blocks, and data beside it is in the same one.
        let whole = INODE + if place.inline { xattrs_len(&node.metadata) + tail } else { 0 };
        if end % BLOCK + whole > BLOCK {
            end = end.next_multiple_of(BLOCK);
        }
        place.offset = end;
        end = (end + INODE + xattrs_len(&node.metadata) + tail).next_multiple_of(SLOT);
        places[*id] = place;
    }
    let writer = Writer { tree, places: &places, tails: &tails, image: &image, meta: next };
    let blocks = u32::try_from(next + end.div_ceil(BLOCK)).map_err(|_| invalid("the image would have over 16 TiB"))?;
    writer.inodes(&order)?;
    writer.superblock(blocks, order.len() as u64, uuid)?;
    image.set_len((u64::from(blocks) * BLOCK).next_multiple_of(ALIGN))?;
    Ok(image)
}

/// Every node that has a name, once, with the directory that it was found in: a directory before what is in it.
fn order(tree: &Tree) -> Vec<(Id, Id)> {
    let mut seen = vec![false; tree.len()];
    let mut order = vec![(ROOT, ROOT)];
    seen[ROOT] = true;
    let mut at = 0;
    while let Some((id, _)) = order.get(at).copied() {
        if let Content::Directory(children) = &tree.node(id).content {
            for child in children.values() {
                if !std::mem::replace(&mut seen[child.id], true) {
                    order.push((child.id, id));
                }
            }
        }
        at += 1;
    }
    order
}

/// How many entries fit into one block, from the first on, and the bytes that they take.
fn fit(entries: &[(&[u8], Id)]) -> (usize, usize) {
    let (mut count, mut used) = (0, 0);
    for (name, _) in entries {
        if used + DIRENT + name.len() > BLOCK_SIZE {
            break;
        }
        (count, used) = (count + 1, used + DIRENT + name.len());
    }
    (count, used)
}

/// The size of a directory with these entries, in bytes.
fn directory_size(entries: &[(&[u8], Id)]) -> u64 {
    let mut left = entries;
    let mut size = 0;
    loop {
        let (count, used) = fit(left);
        left = &left[count..];
        if left.is_empty() {
            return size + used as u64;
        }
        size += BLOCK;
    }
}

/// The index of an extended attribute's prefix, and the rest of its name.
fn prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => {
            let prefixes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
            prefixes.into_iter().find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
        }
    }
}

/// The extended attributes that EROFS can have, as it has them.
fn xattrs(metadata: &Metadata) -> impl Iterator<Item = (u8, &[u8], &[u8])> {
    metadata.xattrs.iter().filter_map(|(name, value)| {
        let (index, name) = prefix(name)?;
        Some((index, name, value.as_slice()))
    })
}

/// Whether an extended attribute can be kept: its name and size.
pub(super) fn check_xattrs(metadata: &Metadata) -> io::Result<()> {
    for (name, value) in &metadata.xattrs {
        let text = String::from_utf8_lossy(name);
        let Some((_, rest)) = prefix(name) else { continue };
        if rest.len() > 255 || value.len() > usize::from(u16::MAX) {
            return Err(invalid(format!("its extended attribute {text:.40} is too long")));
        }
    }
    // The inode counts them in units of 4 bytes.
    if xattrs_len(metadata) > 4 * u64::from(u16::MAX) {
        return Err(invalid("its extended attributes are too long"));
    }
    Ok(())
}

fn xattrs_len(metadata: &Metadata) -> u64 {
    let sum: usize = xattrs(metadata).map(|(_, name, value)| (4 + name.len() + value.len()).next_multiple_of(4)).sum();
    if sum == 0 { 0 } else { (XATTR_HEADER + sum) as u64 }
}

struct Writer<'a> {
    tree: &'a Tree,
    places: &'a [Place],
    tails: &'a Tails,
    image: &'a File,
    /// The block of the first inode.
    meta: u64,
}

impl Writer<'_> {
    fn inodes(&self, order: &[(Id, Id)]) -> io::Result<()> {
        let mut image = self.image;
        let start = self.meta * BLOCK;
        image.seek(SeekFrom::Start(start))?;
        let mut out = BufWriter::with_capacity(256 << 10, image);
        let mut at = 0;
        for (id, _) in order {
            let (node, place) = (self.tree.node(*id), &self.places[*id]);
            out.write_all(&vec![0; usize::try_from(place.offset - at).expect("gaps are smaller than a block")])?;
            let mut bytes = self.inode(*id);
            for (index, name, value) in xattrs(&node.metadata) {
                bytes.push(u8::try_from(name.len()).expect("names are checked as they are read"));
                bytes.push(index);
                bytes.extend(u16::try_from(value.len()).expect("values are checked as they are read").to_le_bytes());
                bytes.extend(name);
                bytes.extend(value);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            self.data(*id, &mut bytes)?;
            out.write_all(&bytes)?;
            at = place.offset + bytes.len() as u64;
        }
        out.flush()
    }

    /// Writes the data of symlinks and directories that goes into blocks, and appends what goes beside the inode.
    fn data(&self, id: Id, bytes: &mut Vec<u8>) -> io::Result<()> {
        let place = &self.places[id];
        let data = match &self.tree.node(id).content {
            Content::File(data) => {
                let start = bytes.len();
                bytes.resize(start + usize::try_from(data.tail_len()).expect("it is shorter than a block"), 0);
                return self.tails.read(data, &mut bytes[start..]);
            }
            Content::Symlink(target) => target.clone(),
            Content::Directory(children) => self.directory(id, children),
            _ => return Ok(()),
        };
        let blocks = if place.inline { data.len() - data.len() % BLOCK_SIZE } else { data.len() };
        self.image.write_all_at(&data[..blocks], place.block * BLOCK)?;
        bytes.extend(&data[blocks..]);
        Ok(())
    }

    fn inode(&self, id: Id) -> Vec<u8> {
        let (node, place) = (self.tree.node(id), &self.places[id]);
        let Metadata { mode, uid, gid, mtime, .. } = node.metadata;
        let (kind, value, links) = match node.content {
            Content::Directory(_) => (0o040_000, place.block, 2 + place.folders),
            Content::File(_) => (0o100_000, place.block, node.links),
            Content::Symlink(_) => (0o120_000, place.block, node.links),
            Content::CharDevice(major, minor) => (0o020_000, device(major, minor), node.links),
            Content::BlockDevice(major, minor) => (0o060_000, device(major, minor), node.links),
            Content::Fifo => (0o010_000, 0, node.links),
        };
        let value = u32::try_from(value).expect("the number of blocks is checked before");
        let xattrs = xattrs_len(&node.metadata);
        let xattr_count = if xattrs == 0 { 0 } else { 1 + (xattrs - XATTR_HEADER as u64) / 4 };
        let layout = if place.inline { FLAT_INLINE } else { FLAT_PLAIN };
        let number = u32::try_from(id + 1).expect("there are fewer nodes");
        let mut bytes = Vec::with_capacity(BLOCK_SIZE);
        // i_format: bit 0 is the extended inode.
        bytes.extend((1 | layout << 1).to_le_bytes());
        bytes.extend(u16::try_from(xattr_count).expect("it is checked as they are read").to_le_bytes());
        bytes.extend((kind | mode).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(place.size.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(uid.to_le_bytes());
        bytes.extend(gid.to_le_bytes());
        bytes.extend(mtime.0.to_le_bytes());
        bytes.extend(mtime.1.to_le_bytes());
        bytes.extend(links.to_le_bytes());
        bytes.extend([0; 16]);
        if xattrs > 0 {
            // None of them is shared.
            bytes.extend([0; XATTR_HEADER]);
        }
        bytes
    }

    /// The blocks of a directory: entries, then their names.
    fn directory(&self, id: Id, children: &BTreeMap<Vec<u8>, Name>) -> Vec<u8> {
        let entries = entries(children, id, self.places[id].parent);
        let mut left = entries.as_slice();
        let mut data = vec![];
        while !left.is_empty() {
            let start = data.len();
            let (count, _) = fit(left);
            let (block, rest) = left.split_at(count);
            let mut name_at = block.len() * DIRENT;
            for (name, child) in block {
                data.extend((self.places[*child].offset / SLOT).to_le_bytes());
                data.extend(u16::try_from(name_at).expect("it is within the block").to_le_bytes());
                data.extend([file_type(&self.tree.node(*child).content), 0]);
                name_at += name.len();
            }
            for (name, _) in block {
                data.extend(*name);
            }
            if !rest.is_empty() {
                data.resize(start + BLOCK_SIZE, 0);
            }
            left = rest;
        }
        data
    }

    fn superblock(&self, blocks: u32, inodes: u64, uuid: [u8; 16]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(BLOCK_SIZE);
        bytes.resize(SUPER_OFFSET, 0);
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend([0; 4]); // checksum
        bytes.extend(FEATURE_COMPAT.to_le_bytes());
        bytes.extend([BLOCK_BITS, 0]);
        let root = u16::try_from(self.places[ROOT].offset / SLOT).expect("the root is the first inode");
        bytes.extend(root.to_le_bytes());
        bytes.extend(inodes.to_le_bytes());
        bytes.extend([0; 12]); // build_time, build_time_nsec
        bytes.extend(blocks.to_le_bytes());
        bytes.extend(u32::try_from(self.meta).expect("the number of blocks is checked before").to_le_bytes());
        bytes.extend([0; 4]); // xattr_blkaddr
        bytes.extend(uuid);
        bytes.resize(BLOCK_SIZE, 0);
        let checksum = crc32c(&bytes[SUPER_OFFSET..]);
        bytes[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
        self.image.write_all_at(&bytes, 0)
    }
}

/// The entries of a directory in the order of names, `.` and `..` at their places.
fn entries(children: &BTreeMap<Vec<u8>, Name>, own: Id, parent: Id) -> Vec<(&[u8], Id)> {
    let mut entries: Vec<_> = children.iter().map(|(name, child)| (name.as_slice(), child.id)).collect();
    for (name, id) in [(b".".as_slice(), own), (b"..", parent)] {
        let at = entries.partition_point(|(other, _)| *other < name);
        entries.insert(at, (name, id));
    }
    entries
}

fn file_type(content: &Content) -> u8 {
    match content {
        Content::File(_) => 1,
        Content::Directory(_) => 2,
        Content::CharDevice(..) => 3,
        Content::BlockDevice(..) => 4,
        Content::Fifo => 5,
        Content::Symlink(_) => 7,
    }
}

/// A device number as Linux encodes it in 32 bits: 12 for the major number, 20 for the minor.
fn device(major: u32, minor: u32) -> u64 {
    u64::from(minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12)
}

/// CRC-32C, as Linux computes it: not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_are_linux_own() {
        assert_eq!(device(5, 1), 0x501);
        assert_eq!(device(259, 0x12345), 0x1231_0345);
    }

    #[test]
    fn a_directory_is_as_large_as_its_entries() {
        assert_eq!(directory_size(&entries(&BTreeMap::new(), 0, 0)), 27);
        // 4096 / (12 + 244) = 16 entries fill a block.
        let name = [b'n'; 244].as_slice();
        assert_eq!(directory_size(&[(name, 0); 16]), BLOCK);
        assert_eq!(directory_size(&[(name, 0); 17]), BLOCK + 256);
    }
}
