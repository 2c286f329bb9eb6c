//! A file that tells how it went (`--report`, `--junit`): whole or not there.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bantam::devices::console::Stdout;
use bantam::sandbox::Access;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::stdio::stdout;

use super::{folder, may_create};

/// Why there is no such file.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the {what} {}", .path.display())]
pub struct Error {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where it will be written.
pub struct OutputFile {
    what: &'static str,
    path: PathBuf,
    kind: Kind,
}

/// How it is written.
enum Kind {
    /// A file is replaced.
    File(Place),
    /// A pipe or a device is opened and written to.
    Stream(Place),
    /// The same, of one that this process has open (`/dev/stdout`, `/proc/self/fd/N`).
    Open,
    /// The process that started this one, which runs in a jail, writes it: the file with this number.
    Launcher(Arc<File>, u8),
    /// `-`: standard output as it is open, which may be a socket, or a file that the guest's output goes to as well.
    Stdout,
}

/// A name in a folder that is open: a guest that shares what is above cannot put another in its place.
struct Place {
    folder: OwnedFd,
    name: OsString,
}

impl Place {
    fn new(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
        let folder = openat(CWD, folder(path), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { folder, name })
    }

    /// Opens `name` there, which is no link.
    fn open(&self, name: &OsStr, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.folder, name, flags, Mode::from_raw_mode(0o666))?.into())
    }

    /// Creates a file beside it. Others may have been left there by a process of the same number that was killed, or be in use
    /// by one of another container.
    fn create_beside(&self) -> io::Result<(File, OsString)> {
        let mut number = 0;
        loop {
            let name: OsString = format!(".bantam-report-{}-{number}", std::process::id()).into();
            match self.open(&name, OFlags::CREATE | OFlags::EXCL) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                opened => return Ok((opened?, name)),
            }
        }
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let (mut file, temporary) = self.create_beside()?;
        // Who may read the old one may read the new one, and nobody else.
        if let Ok(old) = statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW)
            && FileType::from_raw_mode(old.st_mode).is_file()
        {
            let _ = file.set_permissions(Permissions::from_mode(old.st_mode & 0o7777));
        }
        let rename = || Ok(renameat(&self.folder, &temporary, &self.folder, &self.name)?);
        // On the disk first: after a power failure there is the old report or the new one.
        let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| rename());
        if written.is_err() {
            let _ = unlinkat(&self.folder, &temporary, AtFlags::empty());
        }
        match written {
            // A file that is mounted there, as a container's may be, can only be written.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let mut file = self.open(&self.name, OFlags::TRUNC)?;
                file.write_all(bytes).and_then(|()| file.sync_all())
            }
            written => written,
        }
    }
}

impl OutputFile {
    /// Checks that `what` could be written to `path`, and touches nothing. `-` is standard output.
    pub fn new(what: &'static str, path: &Path) -> Result<Self, Error> {
        Self::check(what, path).map_err(|source| Error { what, path: path.to_owned(), source })
    }

    fn check(what: &'static str, path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            rustix::io::fcntl_getfd(stdout())?;
            return Ok(Self { what, path: path.to_owned(), kind: Kind::Stdout });
        }
        // `/dev/stdout` may lead to a file, which others write to at the same time.
        if ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc"].iter().any(|stream| path.starts_with(stream)) {
            OpenOptions::new().append(true).open(path)?;
            return Ok(Self { what, path: path.to_owned(), kind: Kind::Open });
        }
        // A link stays a link: what it points to is replaced.
        let path = match path.canonicalize() {
            // Nor is one replaced that leads to no file yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(path) {
                Ok(target) => folder(path).join(target),
                Err(_) => path.to_owned(),
            },
            real => real?,
        };
        let kind = match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(meta) if !meta.is_file() => Kind::Stream(Place::new(&path)?),
            _ => {
                let place = Place::new(&path)?;
                may_create(&path)?;
                Kind::File(place)
            }
        };
        Ok(Self { what, path, kind })
    }

    /// What is opened when it is written.
    pub fn opened_later(&self) -> Option<(PathBuf, Access)> {
        match &self.kind {
            Kind::File(_) => Some((folder(&self.path).to_owned(), Access::Replace)),
            Kind::Stream(_) | Kind::Open => Some((self.path.clone(), Access::Write)),
            Kind::Stdout | Kind::Launcher(..) => None,
        }
    }

    /// Has it be written by the process at the other end of `pipe`, which knows it as `number`.
    pub fn write_by(&mut self, pipe: Arc<File>, number: u8) {
        if !matches!(self.kind, Kind::Stdout) {
            self.kind = Kind::Launcher(pipe, number);
        }
    }

    /// Writes all of it.
    pub fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        self.try_write(bytes).map_err(|source| Error { what: self.what, path: self.path.clone(), source })
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.kind {
            Kind::File(place) => place.replace(bytes),
            Kind::Launcher(pipe, number) => {
                let length = u64::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes();
                (&**pipe).write_all(&[&[*number], &length[..], bytes].concat())
            }
            // A pipe that nobody reads is not waited for: the signals that would end that are blocked.
            Kind::Stream(place) => append(place.open(&place.name, OFlags::APPEND | OFlags::NONBLOCK)?, bytes),
            Kind::Open => {
                append(OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK).open(&self.path)?, bytes)
            }
            Kind::Stdout => Stdout::new()?.write_all(bytes),
        }
    }
}

/// Writes to what was opened so that opening it waits for nobody; writing does.
fn append(mut file: File, bytes: &[u8]) -> io::Result<()> {
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_replaces_the_file_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.json");
        fs::write(&path, "old and longer than the new one").unwrap();
        OutputFile::new("report", &path).unwrap().write(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        OutputFile::new("report", &path).unwrap().write(b"newer").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn files_that_were_left_are_not_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x".repeat(255));
        let place = Place::new(&path).unwrap();
        let left = [(); 2].map(|()| folder.path().join(place.create_beside().unwrap().1));
        OutputFile::new("report", &path).unwrap().write(b"1\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        assert!(left.iter().all(|path| fs::read(path).unwrap().is_empty()));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
    }

    #[test]
    fn a_folder_that_is_replaced_leads_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("out")).unwrap();
        fs::create_dir(path("others")).unwrap();
        let report = OutputFile::new("report", &path("out/report")).unwrap();
        // As a guest may that shares what is above it.
        fs::rename(path("out"), path("moved")).unwrap();
        std::os::unix::fs::symlink("others", path("out")).unwrap();
        report.write(b"1\n").unwrap();
        assert_eq!(fs::read_to_string(path("moved/report")).unwrap(), "1\n");
        assert_eq!(fs::read_dir(path("others")).unwrap().count(), 0);
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        for is_there in [true, false] {
            OutputFile::new("report", &link).unwrap().write(b"1\n").unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "1\n", "{is_there}");
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
            fs::remove_file(&file).unwrap();
        }
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let report = OutputFile::new("report", &path).unwrap();
        assert!(report.write(b"1\n").is_err());
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        report.write(b"1\n").unwrap();
        assert_eq!(io::read_to_string(&mut reader).unwrap(), "1\n");
    }

    #[test]
    fn a_device_is_written_to() {
        OutputFile::new("report", Path::new("/dev/null")).unwrap().write(b"1\n").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn a_place_where_no_file_can_be_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for bad in [folder.path().to_owned(), folder.path().join("missing/out.json"), "".into(), "..".into()] {
            assert!(OutputFile::new("report", &bad).is_err(), "{bad:?}");
        }
    }
}
