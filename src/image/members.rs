//! The blobs of an image in files: those of a layout's directory, or the members of an archive.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::archive::{Kind, Reader, invalid};
use super::digest::Digest;
use super::oci::Blobs;

/// The most members that the archive of an image is looked through for: a root file system may have more.
const MEMBERS_MAX: usize = 1 << 21;
/// How many links between members are followed.
const LINKS_MAX: usize = 8;

/// The path of a blob in an OCI image layout.
fn blob_path(digest: &str) -> io::Result<String> {
    let digest: Digest = digest.parse().map_err(|error: super::BadDigest| invalid(error.to_string()))?;
    Ok(format!("blobs/sha256/{}", digest.hex()))
}

/// An OCI image layout in a directory.
pub(super) struct Layout(pub PathBuf);

impl Blobs for Layout {
    fn open(&self, name: &str, _size: Option<u64>) -> io::Result<Box<dyn Read + '_>> {
        open_regular(&self.0.join(blob_path(name)?)).map(|file| Box::new(file) as Box<dyn Read>)
    }
}

/// Opens a file that is nothing else: a pipe would wait for ever.
fn open_regular(path: &Path) -> io::Result<File> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(invalid("it is no file"));
    }
    File::open(path)
}

/// What is in an archive.
enum Member {
    /// Data: where it begins, and its length.
    Data(u64, u64),
    /// Another name for the member.
    Link(String),
}

/// The members of an archive that a file has uncompressed.
pub(super) struct Members {
    file: File,
    members: HashMap<String, Member>,
}

impl Members {
    /// Looks through the archive. `None` if it is no image's, but a root file system itself.
    pub fn read(file: File) -> io::Result<Option<Self>> {
        let mut reader = Reader::new(BufReader::with_capacity(64 << 10, file.try_clone()?));
        let length = file.metadata()?.len();
        let mut members = HashMap::new();
        while let Some(entry) = reader.next()? {
            let name = normal(&entry.path);
            match entry.kind {
                Kind::File => drop(members.insert(name, Member::Data(reader.position(), reader.stored()))),
                Kind::HardLink(target) => drop(members.insert(name, Member::Link(normal(&target)))),
                Kind::Symlink(target) => {
                    let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
                    let target = [folder.as_bytes(), b"/", &target].concat();
                    members.insert(name, Member::Link(normal(&target)));
                }
                // No image has devices beside its blobs.
                Kind::CharDevice(..) | Kind::BlockDevice(..) | Kind::Fifo => return Ok(None),
                Kind::Directory => {}
            }
            if members.len() > MEMBERS_MAX {
                return Ok(None);
            }
            let skipped = reader.skipped();
            if reader.position() > length {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut off"));
            }
            reader.get_mut().seek_relative(i64::try_from(skipped).map_err(|_| invalid("an entry is too large"))?)?;
        }
        let image = ["manifest.json", "oci-layout"].iter().any(|name| members.contains_key(*name));
        Ok(image.then_some(Self { file, members }))
    }

    /// Whether there is such a member.
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Opens a member by its path.
    pub fn member(&self, name: &str) -> io::Result<Range<'_>> {
        let mut name = normal(name.as_bytes());
        for _ in 0..LINKS_MAX {
            match self.members.get(&name) {
                Some(Member::Data(at, left)) => return Ok(Range { file: &self.file, at: *at, left: *left }),
                Some(Member::Link(target)) => name.clone_from(target),
                None => break,
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, format!("the archive has no {name:?}")))
    }
}

impl Blobs for Members {
    fn open(&self, name: &str, _size: Option<u64>) -> io::Result<Box<dyn Read + '_>> {
        // What `docker save` has written names members; an OCI image layout names digests.
        let path = if name.starts_with("sha256:") { blob_path(name)? } else { name.to_owned() };
        Ok(Box::new(self.member(&path)?))
    }
}

/// A path without `.` and `..`. It only has to match others: nothing is opened by it on the host.
fn normal(path: &[u8]) -> String {
    let path = String::from_utf8_lossy(path);
    let mut names: Vec<&str> = vec![];
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    names.join("/")
}

/// A part of a file.
pub(super) struct Range<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let size = usize::try_from(self.left).unwrap_or(buf.len()).min(buf.len());
        let read = self.file.read_at(&mut buf[..size], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    fn members(names: &[(&str, &[u8])]) -> io::Result<Option<Members>> {
        let mut builder = tar::Builder::new(vec![]);
        for (name, data) in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            builder.append_data(&mut header, name, *data)?;
        }
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "a/link", "../b/layer.tar")?;
        let mut file = tempfile::tempfile()?;
        file.write_all(&builder.into_inner()?)?;
        file.seek(SeekFrom::Start(0))?;
        Members::read(file)
    }

    #[test]
    fn members_are_read_by_their_paths_and_links() {
        let found = members(&[("b/layer.tar", &[7; 1000]), ("manifest.json", b"[]")]).unwrap().unwrap();
        for name in ["b/layer.tar", "./b/layer.tar", "a/link"] {
            let mut data = vec![];
            found.member(name).unwrap().read_to_end(&mut data).unwrap();
            assert_eq!(data, [7; 1000], "{name}");
        }
        assert!(found.member("c").is_err());
        assert!(found.has("manifest.json"));
    }

    #[test]
    fn an_archive_of_files_is_no_image() {
        assert!(members(&[("etc/passwd", b"root")]).unwrap().is_none());
    }
}
