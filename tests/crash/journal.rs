//! What resources/guest/journal.c writes: the same, once more.

/// In a sector.
const SECTOR: usize = 512;
const SECTORS_MAX: u64 = 32;
/// Names of files.
pub const SLOTS: u64 = 8;

/// What a run with one seed writes.
#[derive(Debug, Clone, Copy)]
pub struct Journal {
    pub seed: u64,
}

/// The output function of SplitMix64.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl Journal {
    fn word(self, number: u64, index: u64) -> u64 {
        mix(mix(mix(self.seed) ^ number) ^ index)
    }

    /// The data of a record or file.
    pub fn data(self, number: u64) -> Vec<u8> {
        let words = (1 + self.word(number, 0) % SECTORS_MAX) * (SECTOR as u64 / 8);
        (0..words).flat_map(|index| self.word(number, 3 + index).to_le_bytes()).collect()
    }

    /// Which name a file gets.
    pub fn slot(self, number: u64) -> u64 {
        self.word(number, 2) % SLOTS
    }

    /// Checks a disk that had been zeros: the records up to `flushed` are there, and what follows is the beginning of
    /// those after it, in which sectors are whole or not there. How many records there are whole.
    #[track_caller]
    pub fn check(self, disk: &[u8], flushed: Option<u64>) -> u64 {
        let (mut at, mut whole) = (0, None);
        for number in 0.. {
            let data = self.data(number);
            let Some(found) = disk.get(at..at + data.len()) else { break };
            at += data.len();
            if found == data && whole.is_none() {
                continue;
            }
            assert!(flushed.is_none_or(|flushed| flushed < number), "record {number} was flushed and is not there");
            let sectors = || found.chunks(SECTOR).zip(data.chunks(SECTOR));
            let torn = sectors().position(|(found, written)| found != written && found != [0; SECTOR]);
            assert_eq!(torn, None, "a sector of record {number} is torn");
            if whole.is_some() {
                let there = sectors().position(|(found, _)| found != [0; SECTOR]);
                assert_eq!(there, None, "a part of record {number} is there, and {whole:?} before it is not whole");
            }
            whole.get_or_insert(number);
        }
        whole.unwrap_or(u64::MAX)
    }
}

/// The last number that was printed whole as `name=NUMBER end`.
pub fn last(text: &str, name: &str) -> Option<u64> {
    values(text, name).last().map(|number| number.parse().unwrap())
}

/// What was printed whole as `name=VALUE end`.
pub fn values<'a>(text: &'a str, name: &str) -> impl DoubleEndedIterator<Item = &'a str> {
    let lines = text.lines().filter_map(|line| line.trim().strip_suffix(" end"));
    lines.filter_map(move |line| line.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    /// A disk with ten records, and where each begins.
    fn disk(journal: Journal) -> (Vec<u8>, Vec<usize>) {
        let mut disk = vec![];
        let begins = (0..10).map(|number| {
            disk.extend(journal.data(number));
            disk.len() - journal.data(number).len()
        });
        let begins = begins.collect();
        disk.resize(1 << 20, 0);
        (disk, begins)
    }

    #[test]
    fn what_is_lost_or_torn_is_seen() {
        let long = |seed: &u64| [4, 9].iter().all(|number| Journal { seed: *seed }.data(*number).len() > SECTOR);
        let journal = Journal { seed: (0..).find(long).unwrap() };
        let (whole, begins) = disk(journal);
        let check = |disk: &[u8], flushed| catch_unwind(|| journal.check(disk, Some(flushed))).ok();
        assert_eq!((check(&whole, 9), check(&whole, 10)), (Some(10), None));
        let changed = |from: usize, to: usize, byte: u8| {
            let mut disk = whole.clone();
            disk[from..to].fill(byte);
            disk
        };
        // The last is there in part: whole sectors of it, or not.
        let cut = changed(begins[9] + SECTOR, whole.len(), 0);
        assert_eq!((check(&cut, 8), check(&cut, 9)), (Some(9), None));
        assert_eq!(check(&changed(begins[9] + 8, whole.len(), 0), 8), None);
        // One before the last is not, or is not all there.
        assert_eq!(check(&changed(begins[4], begins[5], 0), 3), None);
        assert_eq!(check(&changed(begins[4], begins[4] + SECTOR, 0), 3), None);
        assert_eq!(check(&changed(whole.len() / 2, whole.len() / 2 + 1, 1), 9), None);
    }
}
