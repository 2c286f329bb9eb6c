//! A file that tells how it went (`--report`, `--junit`): whole or not there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bantam::devices::console::Stdout;
use bantam::sandbox::Access;
use rustix::fs::OFlags;
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
    File,
    /// A pipe or a device is opened and written to.
    Stream,
    /// The process that started this one, which runs in a jail, writes it: the file with this number.
    Launcher(Arc<File>, u8),
    /// `-`: standard output as it is open, which may be a socket, or a file that the guest's output goes to as well.
    Stdout,
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
            return Ok(Self { what, path: path.to_owned(), kind: Kind::Stream });
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
            Ok(meta) if !meta.is_file() => Kind::Stream,
            _ => Kind::File,
        };
        if matches!(kind, Kind::File) {
            if path.file_name().is_none() {
                return Err(io::ErrorKind::InvalidFilename.into());
            }
            may_create(&path)?;
        }
        Ok(Self { what, path, kind })
    }

    /// What is opened when it is written.
    pub fn opened_later(&self) -> Option<(PathBuf, Access)> {
        match &self.kind {
            Kind::File => Some((folder(&self.path).to_owned(), Access::Replace)),
            Kind::Stream => Some((self.path.clone(), Access::Write)),
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
            Kind::File => self.replace(bytes),
            Kind::Launcher(pipe, number) => {
                let length = u64::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes();
                (&**pipe).write_all(&[&[*number], &length[..], bytes].concat())
            }
            Kind::Stream => {
                // A pipe that nobody reads is not waited for: the signals that would end that are blocked.
                let mut file = OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK).open(&self.path)?;
                rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
                file.write_all(bytes)
            }
            Kind::Stdout => Stdout::new()?.write_all(bytes),
        }
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let (mut file, temporary) = create_beside(&self.path)?;
        // Who may read the old one may read the new one, and nobody else.
        if let Ok(old) = fs::metadata(&self.path) {
            let _ = file.set_permissions(old.permissions());
        }
        // On the disk first: after a power failure there is the old report or the new one.
        let written =
            file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        match written {
            // A file that is mounted there, as a container's may be, can only be written.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let mut file = OpenOptions::new().write(true).truncate(true).open(&self.path)?;
                file.write_all(bytes).and_then(|()| file.sync_all())
            }
            written => written,
        }
    }
}

/// Creates a file in the folder of `path`. Others may have been left there by a process of the same number that was
/// killed, or be in use by one of another container.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let mut number = 0;
    loop {
        let path = folder(path).join(format!(".bantam-report-{}-{number}", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            opened => return Ok((opened?, path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
        let left = [create_beside(&path).unwrap().1, create_beside(&path).unwrap().1];
        OutputFile::new("report", &path).unwrap().write(b"1\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        assert!(left.iter().all(|path| fs::read(path).unwrap().is_empty()));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
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
