//! Writing a snapshot: each file is there under its name when all of it is on the disk.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::destination::Destination;
use super::folder::{self, CONFIG, MEMORY, OLD_STATE, STATE};
use super::memory_copy::{Child, Runs, Source};
use super::snapshot::{Error, State};
use crate::file::{FileId, file_id};
use crate::snapshot;

/// A snapshot that is being written.
pub(super) struct Writing {
    destination: Destination,
    /// What is there until it is whole.
    place: Place,
    /// The same of memory that goes elsewhere.
    memory_place: Option<Place>,
    files: Vec<File>,
    copying: Option<Copying>,
}

/// How guest memory gets to its file.
enum Copying {
    /// It is there; which pages.
    Done(Runs),
    /// A child writes what it was.
    Child(Child),
}

/// A locked folder beside what is to be there at the end, on the same file system.
struct Place {
    folder: PathBuf,
    lock: File,
}

impl Place {
    fn beside(target: &Path) -> Result<Self, Error> {
        let made = folder::temporary(target).map_err(|source| Error::Write { path: target.to_owned(), source });
        made.map(|(folder, lock)| Self { folder, lock })
    }

    /// A file that only the owner may read: guest memory is nobody else's.
    fn create(&self, name: &str) -> io::Result<File> {
        use std::os::unix::fs::OpenOptionsExt;
        File::options().write(true).create_new(true).mode(0o600).open(self.folder.join(name))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What became of the folder that was replaced, or what was not finished.
        if let Err(error) = folder::remove(&self.folder)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", self.folder.display());
        }
    }
}

impl Writing {
    /// Takes guest memory as it is, while the machine stands still. If it `goes_on` before the end, a child process has the
    /// memory copy-on-write, and writes it; if the host makes none, or it does not go on, the memory is written here.
    pub fn begin(destination: Destination, memory: &Source, goes_on: bool) -> Result<Self, Error> {
        let place = Place::beside(destination.path())?;
        let memory_place = destination.memory().map(Place::beside).transpose()?;
        let mut writing = Writing { destination, place, memory_place, files: vec![], copying: None };
        writing.take_memory(memory, goes_on).map_err(|source| {
            let path = writing.destination.memory().unwrap_or(writing.destination.path()).to_owned();
            Error::Write { path, source }
        })?;
        Ok(writing)
    }

    fn take_memory(&mut self, memory: &Source, goes_on: bool) -> io::Result<()> {
        let file = self.memory_place.as_ref().unwrap_or(&self.place).create(MEMORY)?;
        let child = goes_on.then(|| memory.fork(&file)).transpose().unwrap_or_else(|error| {
            log::warn!("the machine stands still while its memory is written: cannot make a process for it: {error}");
            None
        });
        self.copying = Some(match child {
            Some(child) => Copying::Child(child),
            None => Copying::Done(memory.copy(&file)?),
        });
        self.files.push(file);
        Ok(())
    }

    /// The new file of memory.
    pub fn memory_id(&self) -> Option<FileId> {
        self.files.first().and_then(|file| file.metadata().ok()).map(|metadata| file_id(&metadata))
    }

    /// Writes the state when memory is written, waits until all is on the disk, and puts it where it belongs.
    pub fn finish(mut self, state: &mut State) -> Result<(), Error> {
        let path = self.destination.path().to_owned();
        let written = self.write_state(state).and_then(|()| Ok(self.give_names()?));
        written.map_err(|error| match error {
            Problem::Host(source) => Error::Write { path, source },
            Problem::State(error) => Error::Part(error),
        })
    }

    fn write_state(&mut self, state: &mut State) -> Result<(), Problem> {
        let runs = match self.copying.take().expect("memory was taken first") {
            Copying::Done(runs) => runs,
            Copying::Child(child) => child.wait()?,
        };
        if let Some(base) = &mut state.base {
            base.changed = runs;
        }
        let mut file = self.place.create(STATE)?;
        file.write_all(&snapshot::encode(state).map_err(Problem::State)?)?;
        self.files.push(file);
        if !matches!(self.destination, Destination::Files { .. }) {
            let mut config = self.place.create(CONFIG)?;
            serde_json::to_writer_pretty(&mut config, &state.config).map_err(io::Error::other)?;
            config.write_all(b"\n")?;
            self.files.push(config);
        }
        Ok(())
    }

    fn give_names(&self) -> io::Result<()> {
        self.files.iter().try_for_each(File::sync_all)?;
        let target = self.destination.path();
        if let (Some(place), Some(memory)) = (&self.memory_place, self.destination.memory()) {
            self.replace(&place.folder.join(MEMORY), memory, target)?;
        } else {
            // What it stands on must not be what it replaces.
            let may_replace = matches!(self.destination, Destination::Folder(_));
            self.place.lock.sync_all()?;
            folder::give_name(&self.place.folder, target, may_replace)?;
        }
        sync_parent(target)
    }

    /// Gives two files their names. At no time is there a state beside memory that it is not of: an old one goes first, and
    /// the new one comes last.
    fn replace(&self, new_memory: &Path, memory: &Path, state: &Path) -> io::Result<()> {
        let old = self.place.folder.join(OLD_STATE);
        let is_there = fs::symlink_metadata(state).is_ok_and(|metadata| !metadata.is_dir());
        if is_there {
            fs::rename(state, &old)?;
        }
        let placed = if is_there { sync_parent(state) } else { Ok(()) }.and_then(|()| fs::rename(new_memory, memory));
        if let Err(error) = placed {
            if is_there && let Err(error) = fs::rename(&old, state) {
                log::error!("cannot put {} back, which was not replaced: {error}", state.display());
            }
            return Err(error);
        }
        sync_parent(memory)?;
        fs::rename(self.place.folder.join(STATE), state)
    }
}

/// Has the disk know what is in the folder of `path`.
fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(folder::parent(path))?.sync_all()
}

enum Problem {
    Host(io::Error),
    State(snapshot::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory_copy::{PAGE, Pages};
    use crate::memory::{self, GuestRam};
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    fn state() -> State {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshot/golden/state");
        serde_json::from_str(fs::read_to_string(path).unwrap().split_once('\n').unwrap().1).unwrap()
    }

    /// Memory of 4 MiB whose second page begins with `byte`.
    fn ram(byte: u8) -> GuestRam {
        let ram = memory::reserve(&[0..4 << 20]).unwrap();
        ram.write_obj(byte, GuestAddress(PAGE)).unwrap();
        ram
    }

    fn save(destination: &Destination, byte: u8) -> Result<(), Error> {
        let source = Source::new(&ram(byte), Pages::Used);
        Writing::begin(destination.clone(), &source, false)?.finish(&mut state())
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn who_has_the_old_memory_keeps_it_on_any_file_system() {
        let disk = tempfile::tempdir().unwrap();
        for elsewhere in ["/dev/shm", "/tmp"] {
            let Ok(other) = tempfile::tempdir_in(elsewhere) else { continue };
            let (state, memory) = (disk.path().join("state"), other.path().join("memory"));
            let destination = Destination::Files { state: state.clone(), memory: memory.clone(), diff: false };
            save(&destination, 1).unwrap();
            let mut old = File::open(&memory).unwrap();
            save(&destination, 2).unwrap();
            let (mut was, mut is) = (vec![], fs::read(&memory).unwrap());
            old.read_to_end(&mut was).unwrap();
            assert_eq!((was.len(), was[4096], is.len(), is[4096]), (4 << 20, 1, 4 << 20, 2), "{elsewhere}");
            is[4096] = 0;
            assert!(is.iter().all(|byte| *byte == 0));
            let metadata = fs::metadata(&memory).unwrap();
            assert!(metadata.blocks() * 512 <= 16 * PAGE && metadata.mode() & 0o777 == 0o600, "{metadata:?}");
            assert_eq!((names(disk.path()), names(other.path())), (vec!["state".into()], vec!["memory".into()]));
        }
    }

    #[test]
    fn a_state_is_never_beside_memory_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let (state, memory) = (folder.path().join("state"), folder.path().join("memory"));
        let destination = Destination::Files { state: state.clone(), memory: memory.clone(), diff: false };
        save(&destination, 1).unwrap();
        fs::write(&state, "old").unwrap();
        // Memory does not get its name: all is as it was.
        fs::remove_file(&memory).unwrap();
        fs::create_dir(&memory).unwrap();
        save(&destination, 2).unwrap_err();
        assert_eq!(
            (fs::read(&state).unwrap(), names(folder.path())),
            (b"old".into(), vec!["memory".into(), "state".into()])
        );
        // It does, and the state does not, as when the process is killed between.
        fs::remove_dir(&memory).unwrap();
        let source = Source::new(&ram(3), Pages::Used);
        let mut writing = Writing::begin(destination, &source, false).unwrap();
        writing.write_state(&mut self::state()).unwrap_or_else(|_| panic!("it is written"));
        fs::remove_file(writing.place.folder.join(STATE)).unwrap();
        writing.give_names().unwrap_err();
        drop(writing);
        assert_eq!((fs::read(&memory).unwrap()[4096], names(folder.path())), (3, vec!["memory".into()]));
    }
}
