//! The working set of a restored machine: the pages that it used are recorded in the folder of its snapshot, so that those
//! restored later have them read ahead. docs/snapshot-format.md describes the file.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::folder::{self, NEW_WORKING_SET, WORKING_SET};
use super::memory_copy::{PAGE, Runs};
use crate::file;
use crate::memory::{self, GuestRam};
use crate::sandbox::Access;
use crate::snapshot::Hex;

const MAGIC: &str = "bantam-working-set 1";
/// The most runs of pages in a file.
const MAX_RUNS: usize = 4096;
/// The most bytes in a file.
const MAX_BYTES: u64 = 256 << 10;
const PAGEMAP: &str = "/proc/self/pagemap";
/// An entry of it: the page is in memory.
const PRESENT: u64 = 1 << 63;

/// How long the pages that a machine uses are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Until it ends.
    ToTheEnd,
    /// Until it has run for so long.
    For(Duration),
}

/// What is to be done when a machine runs.
#[derive(Debug, Default)]
pub enum Plan {
    #[default]
    Nothing,
    /// Read what a file says ahead.
    ReadAhead(File, PathBuf, Hex),
    /// Record what is used.
    Record(Record, PathBuf, Hex, io::Result<File>),
}

/// A thread that does something with memory, until the first is gone.
pub type Helper = (mpsc::Sender<()>, JoinHandle<()>);

impl Plan {
    /// That for a machine of the `snapshot` in a folder, whose state has the digest `state`.
    pub fn new(snapshot: &Path, state: &Hex, record: Option<Record>) -> Self {
        let path = snapshot.join(WORKING_SET);
        match record {
            // It may not be opened when the machine runs.
            Some(record) => Self::Record(record, path, state.clone(), File::open(PAGEMAP)),
            None => file::open(&path).map_or(Self::Nothing, |file| Self::ReadAhead(file, path, state.clone())),
        }
    }

    /// Where files are made while the machine runs.
    pub fn opened_later(&self) -> Option<(PathBuf, Access)> {
        match self {
            Self::Record(_, path, ..) => Some((folder::parent(path).to_owned(), Access::Replace)),
            _ => None,
        }
    }

    /// Begins with it, on a thread: the guest does not wait.
    pub fn start(self, ram: &GuestRam) -> Option<Helper> {
        let ram = ram.clone();
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let spawned = crate::threads::named(name.into()).spawn(work);
            spawned.map_err(|error| log::warn!("cannot start a thread for the working set: {error}")).ok()
        };
        match self {
            Self::Nothing => None,
            Self::ReadAhead(file, path, state) => {
                let work = move || match read(&file, &state) {
                    Ok(runs) => read_ahead(&ram, &runs),
                    Err(why) => log::warn!("cannot read ahead what {} says: {why}", path.display()),
                };
                spawn("bantam-ahead", Box::new(work));
                None
            }
            Self::Record(record, path, state, pagemap) => {
                let (stop, stopped) = mpsc::channel();
                let work = move || {
                    // Nothing is ever sent.
                    let _ = match record {
                        Record::ToTheEnd => stopped.recv().is_ok(),
                        Record::For(time) => stopped.recv_timeout(time).is_ok(),
                    };
                    if let Err(error) =
                        pagemap.and_then(|pagemap| used(&ram, &pagemap)).and_then(|runs| write(&path, &state, &runs))
                    {
                        log::warn!("cannot record what memory was used in {}: {error}", path.display());
                    }
                };
                Some((stop, spawn("bantam-record", Box::new(work))?))
            }
        }
    }
}

/// The pages that are in memory.
fn used(ram: &GuestRam, pagemap: &File) -> io::Result<Runs> {
    let mut runs = Runs::new();
    let mut first = 0;
    let mut entries = vec![0; 8 * 512];
    for region in ram.iter() {
        let (start, pages) = (region.as_ptr() as u64 / PAGE, region.len() / PAGE);
        for chunk in (0..pages).step_by(512) {
            let count = usize::try_from(pages - chunk).map_or(512, |left| left.min(512));
            let entries = &mut entries[..8 * count];
            pagemap.read_exact_at(entries, (start + chunk) * 8)?;
            for (page, entry) in (first + chunk..).zip(entries.chunks(8)) {
                if entry.try_into().map_or(0, u64::from_ne_bytes) & PRESENT == 0 {
                    continue;
                }
                match runs.last_mut() {
                    Some((from, count)) if *from + *count == page => *count += 1,
                    _ => runs.push((page, 1)),
                }
            }
        }
        first += pages;
    }
    Ok(joined(runs))
}

/// As few runs as a file may have: those that are near one another become one.
fn joined(mut runs: Runs) -> Runs {
    let mut gap = 1;
    while runs.len() > MAX_RUNS {
        let mut fewer = Runs::new();
        for (first, count) in runs {
            match fewer.last_mut() {
                Some((from, length)) if first - (*from + *length) <= gap => *length = first + count - *from,
                _ => fewer.push((first, count)),
            }
        }
        (runs, gap) = (fewer, gap * 2);
    }
    runs
}

/// Writes the file, in place of one that is there.
fn write(path: &Path, state: &Hex, runs: &Runs) -> io::Result<()> {
    let lines: String = runs.iter().map(|(first, count)| format!("{first} {count}\n")).collect();
    let new = path.with_file_name(NEW_WORKING_SET);
    let written = fs::write(&new, format!("{MAGIC} {state}\n{lines}end {}\n", runs.len()));
    let done = written.and_then(|()| fs::rename(&new, path));
    if done.is_err() {
        let _ = fs::remove_file(&new);
    }
    done
}

/// What the file says, if it is whole, and about memory of this `state`.
fn read(file: &File, state: &Hex) -> Result<Runs, String> {
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(|error| error.to_string())?;
    let damaged = || "it is damaged".to_owned();
    let mut lines = text.split_inclusive('\n').map(|line| line.strip_suffix('\n').unwrap_or_default());
    let first = lines.next().ok_or_else(damaged)?;
    let about = first.strip_prefix(MAGIC).ok_or_else(damaged)?;
    if about.trim_start() != state.to_string() {
        return Err("it is about another snapshot".into());
    }
    let mut runs = Runs::new();
    for line in lines.by_ref().take_while(|line| !line.starts_with("end ")) {
        let number = |word: &str| word.parse().map_err(|_| damaged());
        let (first, count) = line.split_once(' ').ok_or_else(damaged)?;
        runs.push((number(first)?, number(count)?));
    }
    let is_whole = text.ends_with(&format!("\nend {}\n", runs.len())) && lines.next().is_none();
    if is_whole && runs.len() <= MAX_RUNS { Ok(runs) } else { Err(damaged()) }
}

/// Has the host read these pages, all of them at once, and then has them there. What is no memory is left out.
fn read_ahead(ram: &GuestRam, runs: &Runs) {
    for is_awaited in [false, true] {
        let mut offset = 0;
        for region in ram.iter() {
            let end = offset + region.len();
            for (first, count) in runs {
                let from = first.saturating_mul(PAGE).clamp(offset, end);
                let to = first.saturating_add(*count).saturating_mul(PAGE).clamp(offset, end);
                let start = region.start_addr().raw_value() - offset;
                if let (true, Err(error)) = (from < to, memory::read_ahead(ram, start + from..start + to, is_awaited)) {
                    return log::debug!("cannot read memory ahead: {error}");
                }
            }
            offset = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory_file;
    use proptest::prelude::*;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    fn state(byte: u8) -> Hex {
        crate::snapshot::digest(&[byte])
    }

    fn parse(text: &[u8]) -> Result<Runs, String> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(text, 0).unwrap();
        read(&file, &state(1))
    }

    #[test]
    fn what_a_machine_used_is_there_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(8 << 20).unwrap();
        let map = || memory_file::map(&file, &[0..4 << 20, 16 << 20..20 << 20]).unwrap();
        let ram = map();
        for address in [0x1000, 0x2000, 18 << 20] {
            ram.write_obj(1u8, GuestAddress(address)).unwrap();
        }
        assert!(matches!(Plan::new(folder.path(), &state(1), None), Plan::Nothing));
        let plan = Plan::new(folder.path(), &state(1), Some(Record::ToTheEnd));
        let (stop, thread) = plan.start(&ram).unwrap();
        drop(stop);
        thread.join().unwrap();
        let Plan::ReadAhead(written, ..) = Plan::new(folder.path(), &state(1), None) else { panic!("it was recorded") };
        let runs = read(&written, &state(1)).unwrap();
        assert!(runs.contains(&(1, 2)) && runs.contains(&(1024 + 512, 1)), "{runs:?}");
        let next = map();
        assert_eq!(used(&next, &File::open(PAGEMAP).unwrap()).unwrap(), []);
        read_ahead(&next, &vec![(1, 2), (1024 + 512, 1), (5000, 1), (u64::MAX, u64::MAX)]);
        let there = used(&next, &File::open(PAGEMAP).unwrap()).unwrap();
        assert!(there.iter().any(|(first, count)| (*first..first + count).contains(&1536)), "{there:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_damaged_or_foreign_is_refused() {
        let mine = format!("{MAGIC} {}\n1 2\n7 1\nend 2\n", state(1));
        assert_eq!(parse(mine.as_bytes()).unwrap(), [(1, 2), (7, 1)]);
        assert_eq!(
            parse(mine.replace(&state(1).to_string(), &state(2).to_string()).as_bytes()).unwrap_err(),
            "it is about another snapshot"
        );
        for length in 0..mine.len() {
            assert!(parse(&mine.as_bytes()[..length]).is_err(), "{length}");
        }
        for other in ["1 2\n7 1\nend 3\n", "1 2\n7\nend 2\n", "1 -2\nend 1\n", "end 0\nend 0\n", "1 2\nend 1\n3 4\n"] {
            assert!(parse(format!("{MAGIC} {}\n{other}", state(1)).as_bytes()).is_err(), "{other}");
        }
        let many = "1 1\n".repeat(MAX_RUNS + 1);
        assert!(parse(format!("{MAGIC} {}\n{many}end {}\n", state(1), MAX_RUNS + 1).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in prop::collection::vec(any::<u8>(), 0..200), tail in "[0-9 \nend]{0,80}") {
            let _ = parse(&text);
            let _ = parse(format!("{MAGIC} {}\n{tail}", state(1)).as_bytes());
        }

        #[test]
        fn few_runs_have_all_that_many_had(gaps in prop::collection::vec((1u64..40, 1u64..4), 1..9000)) {
            let mut runs = Runs::new();
            let mut next = 0;
            for (gap, count) in gaps {
                runs.push((next + gap, count));
                next += gap + count;
            }
            let fewer = joined(runs.clone());
            prop_assert!(fewer.len() <= MAX_RUNS);
            let mut at = fewer.iter().peekable();
            for (first, count) in &runs {
                while at.next_if(|(from, length)| from + length <= *first).is_some() {}
                let (from, length) = at.peek().unwrap();
                prop_assert!(from <= first && first + count <= from + length);
            }
        }
    }
}
