//! Unpacking one layer, or a plain archive, into the merged tree.

use std::io::{self, Read};

use super::archive::{Entry, Kind, Reader, invalid};
use super::contents::Contents;
use super::erofs;
use super::tree::{Content, Tree};

/// The name before the names of what a layer removes (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Removes all that layers below have in the directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why an archive was not unpacked: the entry, where it is known, and the reason.
pub(super) struct Refused {
    pub entry: Option<Vec<u8>>,
    pub source: io::Error,
}

impl From<io::Error> for Refused {
    fn from(source: io::Error) -> Self {
        Self { entry: None, source }
    }
}

/// Puts what is in the archive `input` into the tree, as the layer above all before it. A layer of an image, which has a
/// digest, may have `whiteouts` and no end-of-archive mark. The input may have more bytes behind that mark, which are not
/// read.
pub(super) fn unpack(
    input: &mut dyn Read,
    whiteouts: bool,
    tree: &mut Tree,
    contents: &mut Contents,
) -> Result<(), Refused> {
    tree.next_layer();
    let mut reader = if whiteouts { Reader::of_whole(input) } else { Reader::new(input) };
    let mut last: Option<Vec<u8>> = None;
    loop {
        let entry = reader.next().map_err(|source| match &last {
            None => Refused::from(source),
            // Headers tell no name before they are whole.
            Some(last) => Refused { entry: None, source: after(last, source) },
        })?;
        let Some(entry) = entry else { break };
        let path = entry.path.clone();
        if let Err(source) = apply(entry, whiteouts, &mut reader, tree, contents) {
            return Err(Refused { entry: Some(path), source });
        }
        for data in tree.take_freed() {
            contents.free(data);
        }
        last = Some(path);
    }
    Ok(())
}

fn after(entry: &[u8], source: io::Error) -> io::Error {
    io::Error::new(source.kind(), format!("after entry {}: {source}", show(entry)))
}

/// A path of an archive, fit to be printed.
pub(super) fn show(path: &[u8]) -> String {
    let shown: String = String::from_utf8_lossy(path).chars().take(200).collect();
    format!("{shown:?}")
}

fn apply(
    mut entry: Entry,
    whiteouts: bool,
    reader: &mut Reader<&mut dyn Read>,
    tree: &mut Tree,
    contents: &mut Contents,
) -> io::Result<()> {
    erofs::check_xattrs(&entry.metadata)?;
    if whiteouts && apply_whiteout(&entry.path, tree)? {
        return Ok(());
    }
    let Some((parent, name)) = tree.parent(&entry.path)? else {
        if entry.kind != Kind::Directory {
            return Err(invalid("it is the root, and no directory"));
        }
        tree.set_root(entry.metadata);
        return Ok(());
    };
    let content = match entry.kind {
        Kind::HardLink(target) => {
            let id = tree.find(&target)?;
            let id =
                id.ok_or_else(|| invalid(format!("it is a hard link to {}, which is not there", show(&target))))?;
            if let Content::Directory(_) = tree.node(id).content {
                return Err(invalid(format!("it is a hard link to {}, a directory", show(&target))));
            }
            return tree.link(parent, name, id);
        }
        Kind::File => {
            let room = erofs::room(&entry.metadata);
            Content::File(contents.add(entry.size, entry.pieces.as_deref(), room, reader)?)
        }
        Kind::Directory => Content::Directory(Default::default()),
        Kind::Symlink(target) if target.is_empty() => return Err(invalid("it is a symlink to nothing")),
        Kind::Symlink(target) => {
            // Linux has no others, whatever an archive says.
            entry.metadata.mode = 0o777;
            Content::Symlink(target)
        }
        Kind::CharDevice(major, minor) if is_device(major, minor) => Content::CharDevice(major, minor),
        Kind::BlockDevice(major, minor) if is_device(major, minor) => Content::BlockDevice(major, minor),
        Kind::CharDevice(..) | Kind::BlockDevice(..) => return Err(invalid("its device number is too large")),
        Kind::Fifo => Content::Fifo,
    };
    tree.put(parent, name, entry.metadata, content).map(|_| ())
}

/// Removes what an entry says is to be removed; whether it says so.
fn apply_whiteout(path: &[u8], tree: &mut Tree) -> io::Result<bool> {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(false) };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(invalid("it is a whiteout of nothing"));
    }
    // Where the layer has put a file in place of the directory there is nothing left to remove.
    if let Some((parent, _)) = tree.existing_parent(path)? {
        match hidden {
            _ if name == OPAQUE => tree.hide_children(parent),
            // Of aufs: its own bookkeeping.
            _ if hidden.starts_with(WHITEOUT) => {}
            hidden => tree.hide(parent, hidden),
        }
    }
    Ok(true)
}

/// Whether Linux has such a number: 12 bits and 20.
fn is_device(major: u32, minor: u32) -> bool {
    major < 1 << 12 && minor < 1 << 20
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::archive::BLOCK;
    use crate::image::tree::Limits;
    use proptest::prelude::*;

    /// One entry of each type, each header followed by at most one block of data.
    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(vec![]);
        let kinds = [
            tar::EntryType::Directory,
            tar::EntryType::Regular,
            tar::EntryType::Link,
            tar::EntryType::Symlink,
            tar::EntryType::Char,
            tar::EntryType::Fifo,
            tar::EntryType::Regular,
        ];
        for (i, kind) in kinds.into_iter().enumerate() {
            let data: &[u8] = if kind == tar::EntryType::Regular { b"data" } else { b"" };
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_path(if i == 6 { "0/.wh.x".into() } else { format!("{i}") }).unwrap();
            header.set_link_name(if i == 2 { "1" } else { "0/x" }).unwrap();
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    /// Unpacks an archive, and makes an image of what is in it.
    fn image(archive: &[u8]) -> Result<(), String> {
        let file = || tempfile::tempfile().unwrap();
        let mut tree = Tree::new(Limits { nodes: 1000, text: 100_000 });
        let mut contents = Contents::new(file(), file(), 1 << 20);
        unpack(&mut &*archive, true, &mut tree, &mut contents).map_err(|refused| refused.source.to_string())?;
        erofs::finish(&tree, contents, [0; 16]).map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_archive_becomes_an_image() {
        assert_eq!(image(&archive()), Ok(()));
    }

    #[test]
    fn only_a_layer_may_have_no_end_of_archive_mark() {
        let whole = archive();
        let cut = &whole[..whole.len() - 2 * BLOCK];
        assert_eq!(image(cut), Ok(()));
        // Within the zeros after the data, before them, and in the data.
        let data = cut.len() - BLOCK + 4;
        assert!(image(&cut[..cut.len() - 1]).unwrap_err().contains("cut off"));
        assert_eq!(image(&cut[..data]), Ok(()));
        assert!(image(&cut[..data - 1]).unwrap_err().contains("cut off"));
        let file = || tempfile::tempfile().unwrap();
        let mut tree = Tree::new(Limits { nodes: 1000, text: 100_000 });
        let refused = unpack(&mut &*cut, false, &mut tree, &mut Contents::new(file(), file(), 1 << 20)).err().unwrap();
        assert!(refused.source.to_string().contains("cut off"));
    }

    proptest! {
        #[test]
        fn a_changed_archive_is_an_image_or_refused(
            changes in proptest::collection::vec((0usize..9, 0usize..BLOCK, any::<u8>()), 1..4),
        ) {
            let mut bytes = archive();
            for (block, at, value) in changes {
                let header = &mut bytes[block * BLOCK..][..BLOCK];
                header[at] = value;
                // What is no header takes no harm from a checksum.
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
                header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            if let Err(why) = image(&bytes) {
                prop_assert!(!why.is_empty());
            }
        }
    }
}
