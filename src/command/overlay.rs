//! The file that keeps what a command changes: a disk with an ext4 file system, made by `mke2fs` when it is first wanted.
//!
//! Its label says that it is ours, and its UUID for which root file system it was made.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::boot::filesystem;
use crate::image::Digest;

/// The file system that is on it.
pub const KIND: &str = "ext4";
const LABEL: &str = "bantam-overlay";
/// Where ext4's superblock has its UUID, which the label follows.
const UUID_AT: u64 = 0x468;
/// Bytes of a UUID, and of a label.
const FIELD: usize = 16;
/// MiB of the journal. It is written as a whole when it is made.
const JOURNAL: &str = "size=16";
/// Users do not have it in their PATH everywhere.
const MKE2FS: [&str; 3] = ["mke2fs", "/sbin/mke2fs", "/usr/sbin/mke2fs"];

/// Changes cannot be kept in a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is something else, and stays as it is.
    #[error("cannot keep changes in {}: it is there, and was not made for that by bantam (name a new file)", .0.display())]
    Foreign(PathBuf),
    /// It has the changes of another root.
    #[error(
        "cannot keep changes in {}: it has those of another root file system (use that one, name a new file, or remove \
         this one)", .0.display()
    )]
    OtherRoot(PathBuf),
    /// It has another size.
    #[error("cannot keep changes in {}: it was made with {has} bytes, not with {asked} (leave out size=)", .path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// The size asked for.
        asked: u64,
    },
    /// The root has nothing to be told by.
    #[error("cannot keep changes to {}: its file system has no identifier (base=NAME names it)", .0.display())]
    NoIdentity(PathBuf),
    /// The program is missing.
    #[error("cannot make {} to keep changes in: there is no mke2fs (Debian and others: apt-get install e2fsprogs)", .0.display())]
    NoProgram(PathBuf),
    /// The program failed.
    #[error("cannot make {} to keep changes in: mke2fs says: {said}", .path.display())]
    Program {
        /// The file.
        path: PathBuf,
        /// What it said.
        said: String,
    },
    /// The host refused something.
    #[error("cannot {what} {} to keep changes in", .path.display())]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Opens a file or a disk to look at it. Nothing else: a pipe would be waited for.
fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    Err(io::Error::new(ErrorKind::InvalidInput, "it is neither a file nor a disk"))
}

/// What the root file system on `disk` is told by.
///
/// # Errors
/// When it cannot be read, or has no identifier.
pub fn identity(disk: &Path) -> Result<String, Error> {
    let read = open(disk).and_then(|file| filesystem::identity(&file));
    let found = read.map_err(|source| Error::Host { what: "look into", path: disk.into(), source })?;
    found.ok_or_else(|| Error::NoIdentity(disk.into()))
}

/// Makes the file if it is not there, `size` bytes large, for the root that is told by `base`. One that is there has to be
/// made for the same, and to have the size that was `asked` for. Nothing is overwritten.
///
/// # Errors
/// When it is something else, or cannot be made.
pub fn prepare(path: &Path, size: u64, asked: Option<u64>, base: &str) -> Result<(), Error> {
    let host = |what| move |source| Error::Host { what, path: path.into(), source };
    let file = match open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            make(path, size, base)?;
            open(path).map_err(host("open"))?
        }
        opened => opened.map_err(host("open"))?,
    };
    let mut found = [0; 2 * FIELD];
    let is_ext4 = filesystem::detect(&file).map_err(host("read"))? == Some(KIND);
    if !is_ext4 || file.read_exact_at(&mut found, UUID_AT).is_err() || found[FIELD..] != label() {
        return Err(Error::Foreign(path.into()));
    }
    if found[..FIELD] != uuid(base) {
        return Err(Error::OtherRoot(path.into()));
    }
    let has = file.metadata().map_err(host("read"))?.len();
    match asked {
        Some(asked) if asked != has => Err(Error::Size { path: path.into(), has, asked }),
        _ => Ok(()),
    }
}

fn label() -> [u8; FIELD] {
    let mut label = [0; FIELD];
    label[..LABEL.len()].copy_from_slice(LABEL.as_bytes());
    label
}

/// The UUID for a root: RFC 9562, version 8, of its digest.
fn uuid(base: &str) -> [u8; FIELD] {
    let mut uuid = Digest::of(base.as_bytes()).uuid();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Makes it beside its place, and moves it there when all of it is on the disk.
fn make(path: &Path, size: u64, base: &str) -> Result<(), Error> {
    let host = |what| move |source| Error::Host { what, path: path.into(), source };
    let (file, partial) = create_beside(path).map_err(host("make"))?;
    file.set_len(size).map_err(host("make"))?;
    let digits: String = uuid(base).iter().map(|byte| format!("{byte:02x}")).collect();
    let uuid = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-");
    let arguments = ["-q", "-F", "-t", KIND, "-L", LABEL, "-U", &uuid, "-m", "0", "-J", JOURNAL, "--"];
    let output =
        run(&MKE2FS, &arguments, &partial.0).map_err(host("make"))?.ok_or_else(|| Error::NoProgram(path.into()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program { path: path.into(), said });
    }
    file.sync_all().map_err(host("write"))?;
    match renameat_with(CWD, &partial.0, CWD, path, RenameFlags::NOREPLACE) {
        // Another process was faster: its file is looked at as any that is there.
        Err(Errno::EXIST) => Ok(()),
        // The file system has no such call. Nor does this one replace a file.
        Err(Errno::INVAL) => match fs::hard_link(&partial.0, path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            linked => linked.map_err(host("make")),
        },
        renamed => renamed.map_err(|error| host("make")(error.into())),
    }
}

/// A file in the folder of `path`. Others may have been left there by processes that were killed.
fn create_beside(path: &Path) -> io::Result<(File, Partial)> {
    let name = path.file_name().unwrap_or(OsStr::new("overlay")).to_string_lossy();
    let mut number = std::process::id();
    loop {
        let partial = path.with_file_name(format!(".{name}.{number}.partial"));
        match OpenOptions::new().write(true).create_new(true).open(&partial) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number = number.wrapping_add(1),
            made => return Ok((made?, Partial(partial))),
        }
    }
}

/// Runs the first of `programs` that is there; `None` if there is none.
fn run(programs: &[&str], arguments: &[&str], file: &Path) -> io::Result<Option<Output>> {
    for program in programs {
        match Command::new(program).args(arguments).arg(file).stdin(Stdio::null()).output() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            run => return run.map(Some),
        }
    }
    Ok(None)
}

/// A file that goes again, unless it was moved to its place.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn it_is_made_once_and_for_one_root() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("-changes");
        prepare(&path, 64 * MIB, None, "root").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 64 * MIB);
        let first = fs::read(&path).unwrap();
        prepare(&path, 128 * MIB, None, "root").unwrap();
        prepare(&path, 64 * MIB, Some(64 * MIB), "root").unwrap();
        assert!(matches!(prepare(&path, 64 * MIB, None, "other"), Err(Error::OtherRoot(_))));
        assert!(matches!(prepare(&path, 65 * MIB, Some(65 * MIB), "root"), Err(Error::Size { .. })));
        assert!(fs::read(&path).unwrap() == first, "it was changed");
        assert_eq!(identity(&path).unwrap(), identity(&path).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(Command::new("e2fsck").arg("-fn").arg(&path).output().unwrap().status.success());
    }

    #[test]
    fn what_is_something_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes");
        for content in [&b""[..], b"text", &[0; 4096]] {
            fs::write(&path, content).unwrap();
            assert!(matches!(prepare(&path, 64 * MIB, None, "root"), Err(Error::Foreign(_))));
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        let disk = folder.path().join("disk");
        File::create(&disk).unwrap().set_len(MIB).unwrap();
        assert!(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&disk).status().unwrap().success());
        assert!(matches!(prepare(&disk, 64 * MIB, None, "root"), Err(Error::Foreign(_))));
        assert!(matches!(prepare(folder.path(), 64 * MIB, None, "root"), Err(Error::Host { .. })));
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        assert!(matches!(prepare(&pipe, 64 * MIB, None, "root"), Err(Error::Host { .. })), "it is not waited for");
        assert!(matches!(prepare(&path.join("x"), 64 * MIB, None, "root"), Err(Error::Host { .. })));
        assert!(matches!(identity(&path), Err(Error::NoIdentity(_))));
    }

    #[test]
    fn the_first_program_that_is_there_is_run() {
        let run = |programs: &[&str]| run(programs, &["x"], "y".as_ref()).unwrap();
        assert!(run(&["/no/such/program"]).is_none());
        assert_eq!(run(&["/no/such/program", "echo"]).unwrap().stdout, b"x y\n");
    }

    #[test]
    fn what_mke2fs_refuses_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny");
        assert!(matches!(prepare(&path, 4096, None, "root"), Err(Error::Program { said, .. }) if !said.is_empty()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
