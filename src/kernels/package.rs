//! Debian packages with a kernel or with modules: an `ar` archive with a compressed tar archive in it (deb(5)).

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::Error;
use crate::image::archive::{Kind, Reader, invalid};
use crate::image::compression::unpack as decompress;

const MAGIC: &[u8] = b"!<arch>\n";
/// The size of a member's header (ar(5)), and where in it the size of its data is.
const HEADER: usize = 60;
const SIZE: std::ops::Range<usize> = 48..58;
/// More than any kernel or module has, in bytes.
const FILE_MAX: u64 = 512 << 20;
/// What a file takes at least.
const BLOCK: u64 = 4096;
/// More than all that is taken of a package, in bytes.
const TOTAL_MAX: u64 = 4 << 30;

/// Whether a file is a package, or another `ar` archive.
pub(super) fn is_package(path: &Path) -> bool {
    let mut start = [0; MAGIC.len()];
    path.is_file() && File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *MAGIC
}

/// Unpacks kernel, configuration and modules of a package into `folder`, which is made: `boot/vmlinuz-*`,
/// `boot/config-*` and `lib/modules`.
pub(super) fn unpack(path: &Path, folder: &Path) -> Result<(), Error> {
    let unpacked = File::open(path).and_then(|file| unpack_archive(BufReader::new(file), folder));
    unpacked.map_err(|source| Error::Package { path: path.into(), source })
}

fn unpack_archive(mut package: impl Read, folder: &Path) -> io::Result<()> {
    package.read_exact(&mut [0; MAGIC.len()])?;
    loop {
        let mut header = [0; HEADER];
        package.read_exact(&mut header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => invalid("it has no data.tar, or is cut off"),
            _ => error,
        })?;
        let text = |range| std::str::from_utf8(&header[range]).unwrap_or_default().trim_end();
        let size = text(SIZE).parse::<u64>().map_err(|_| invalid("a size in it is no number"))?;
        let mut member = package.by_ref().take(size);
        if text(0..16).starts_with("data.tar") {
            return unpack_data(Reader::new(decompress(BufReader::new(member))?), folder);
        }
        io::copy(&mut member, &mut io::sink())?;
        io::copy(&mut package.by_ref().take(size % 2), &mut io::sink())?;
    }
}

fn unpack_data(mut data: Reader<impl Read>, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut total = 0;
    while let Some(entry) = data.next()? {
        let Some(place) = place(&entry.path).filter(|_| entry.kind == Kind::File) else { continue };
        // Empty ones take room, too.
        total += entry.size.min(FILE_MAX) + BLOCK;
        if entry.size > FILE_MAX || total > TOTAL_MAX {
            return Err(invalid(format!("{} is too large", place.display())));
        }
        let path = folder.join(&place);
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        io::copy(&mut data, &mut File::create(path)?)?;
    }
    Ok(())
}

/// Where a file of a package goes, if it is one that is needed. No part of its name leads elsewhere.
fn place(path: &[u8]) -> Option<PathBuf> {
    let path = std::str::from_utf8(path).ok()?;
    let path = path.strip_prefix("./").unwrap_or(path);
    let parts: Vec<_> = path.strip_prefix("usr/").unwrap_or(path).split('/').collect();
    if parts.iter().any(|part| matches!(*part, "" | "." | "..")) {
        return None;
    }
    let is_module = |name: &str| [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().any(|end| name.ends_with(end));
    match parts.as_slice() {
        ["boot", name] if name.starts_with("vmlinuz-") || name.starts_with("config-") => {}
        ["lib", "modules", _, "modules.builtin"] => {}
        ["lib", "modules", _, "kernel", .., name] if is_module(name) => {}
        _ => return None,
    }
    Some(parts.iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(vec![]);
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for (name, content) in members {
            writeln!(bytes, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, "100644", content.len()).unwrap();
            bytes.extend(*content);
            bytes.extend(&b"\n"[..content.len() % 2]);
        }
        bytes
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut all: Vec<_> = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
        all.sort();
        all
    }

    #[test]
    fn what_is_needed_is_unpacked_and_nothing_leads_elsewhere() {
        let wanted = [
            "boot/config-6.1",
            "boot/vmlinuz-6.1",
            "lib/modules/6.1/kernel/fs/ext4/ext4.ko",
            "lib/modules/6.1/kernel/x.ko.xz",
            "lib/modules/6.1/modules.builtin",
        ];
        let others = [
            "boot/System.map-6.1",
            "lib/modules/6.1/kernel/../../../../../../x.ko",
            "/lib/modules/6.1/kernel/x.ko",
            "../boot/vmlinuz-6.1",
            "boot/vmlinuz-6.1/x",
            "lib/modules/../kernel/x.ko",
            "etc/passwd",
        ];
        let paths: Vec<_> = wanted.iter().map(|path| format!("./usr/{path}")).collect();
        let all: Vec<_> = paths.iter().map(String::as_str).chain(others).map(|path| (path, &b"x"[..])).collect();
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gzip.write_all(&tar(&all)).unwrap();
        let package =
            ar(&[("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.gz", &gzip.finish().unwrap())]);
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        unpack_archive(&package[..], &folder).unwrap();
        let expected: Vec<_> = wanted.iter().map(|path| folder.join(path)).collect();
        assert_eq!(files(root.path()), expected);
    }

    #[test]
    fn what_is_broken_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let refused = |bytes: &[u8]| unpack_archive(bytes, root.path()).unwrap_err().to_string();
        assert_eq!(refused(&ar(&[("debian-binary", b"2.0\n")])), "it has no data.tar, or is cut off");
        let mut bad = ar(&[("data.tar", b"")]);
        bad[MAGIC.len() + SIZE.start] = b'x';
        assert_eq!(refused(&bad), "a size in it is no number");
        let whole = ar(&[("data.tar", &tar(&[("./boot/vmlinuz-1", &[1; 5000])]))]);
        for len in (8..2000).step_by(100) {
            assert!(unpack_archive(&whole[..len], root.path()).is_err(), "cut at {len}");
        }
        unpack_archive(&whole[..], root.path()).unwrap();
    }
}
