//! Reading tar archives, entry by entry: ustar, GNU and PAX.
//!
//! Archives may be hostile. Every length is checked before memory is taken for it, records of PAX may hold any byte, and
//! an archive that ends before its end-of-archive mark is refused, unless a digest tells that it is whole.

use std::collections::BTreeMap;
use std::io::{self, Read};

/// The unit of an archive, in bytes.
pub(super) const BLOCK: usize = 512;
/// The most that the records before an entry (long names, extended attributes) may take, in bytes.
const RECORDS_MAX: u64 = 1 << 20;
/// The longest path and link target, in bytes: Linux's `PATH_MAX` without its NUL.
pub(super) const PATH_MAX: usize = 4095;
/// The most pieces of data in a sparse file.
const PIECES_MAX: usize = 1 << 16;

/// What an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink(Vec<u8>),
    /// Another name for the file with this path.
    HardLink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// Who owns a file, and the like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As the archive has it.
    pub path: Vec<u8>,
    pub kind: Kind,
    pub metadata: Metadata,
    /// Of the file as it is unpacked, holes included.
    pub size: u64,
    /// Where a sparse file has data, ascending: offset and length. `None`: all of it.
    pub pieces: Option<Vec<(u64, u64)>>,
}

/// An archive. After [`next`](Self::next) has returned a file, the reader's `Read` gives its data.
pub(crate) struct Reader<R> {
    input: R,
    /// Bytes read so far.
    position: u64,
    /// Data of the current entry that is still to come.
    left: u64,
    /// Zeros after it.
    padding: u64,
    /// Whether it may end after an entry.
    markless: bool,
}

/// Records that change the entry after them.
#[derive(Default)]
struct Records {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Records {
    fn is_empty(&self) -> bool {
        self.long_name.is_none() && self.long_link.is_none() && self.pax.is_empty()
    }
}

pub(crate) fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl<R: Read> Reader<R> {
    pub fn new(input: R) -> Self {
        Self { input, position: 0, left: 0, padding: 0, markless: false }
    }

    /// A reader of what may have no end-of-archive mark, and no zeros after the last entry's data, as layers that umoci
    /// makes: whether `input` is whole, its digest tells.
    pub fn of_whole(input: R) -> Self {
        Self { markless: true, ..Self::new(input) }
    }

    /// Where in the archive the data of the current entry begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How much data the current entry has in the archive.
    pub fn stored(&self) -> u64 {
        self.left
    }

    /// The next entry; `None` at the end-of-archive mark.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut records = Records::default();
        let mut budget = RECORDS_MAX;
        loop {
            self.skip()?;
            let may_end = self.markless && records.is_empty();
            let Some(header) = self.header(may_end)? else {
                return Ok(None);
            };
            let size = header.size()?;
            match header.kind() {
                b'L' => records.long_name = Some(cut(self.record(size, &mut budget)?)),
                b'K' => records.long_link = Some(cut(self.record(size, &mut budget)?)),
                b'x' => parse_pax(&self.record(size, &mut budget)?, &mut records.pax)?,
                // Of the whole archive: a comment, as `git archive` writes it. A volume's label.
                b'g' | b'V' => drop(self.record(size, &mut budget)?),
                _ => return self.entry(&header, size, records).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header, size: u64, mut records: Records) -> io::Result<Entry> {
        let pax = &mut records.pax;
        let text = |key: &str| pax.get(key.as_bytes()).and_then(|value| std::str::from_utf8(value).ok());
        let number = |key: &str| match text(key) {
            Some(text) => text.parse::<u64>().map(Some).map_err(|_| invalid(format!("`{key}` is no number"))),
            None => Ok(None),
        };
        let size = number("size")?.unwrap_or(size);
        if i64::try_from(size).is_err() {
            return Err(invalid(format!("its size {size} is too large")));
        }
        let id = |key, field| {
            let id = number(key)?.map_or_else(|| header.number(field), Ok)?;
            u32::try_from(id).map_err(|_| invalid(format!("its {key} {id} is too large")))
        };
        let (uid, gid) = (id("uid", UID)?, id("gid", GID)?);
        let mtime = match text("mtime") {
            Some(text) => parse_time(text).ok_or_else(|| invalid(format!("its time {text:?} is none")))?,
            None => (header.signed(MTIME)?, 0),
        };
        let realsize = number("GNU.sparse.realsize")?.or(number("GNU.sparse.size")?);
        let version = (text("GNU.sparse.major").map(str::to_owned), text("GNU.sparse.minor").map(str::to_owned));
        let old_pax_sparse =
            pax.contains_key(b"GNU.sparse.map".as_slice()) || pax.contains_key(b"GNU.sparse.numblocks".as_slice());

        let path = pax.remove(b"GNU.sparse.name".as_slice()).or_else(|| pax.remove(b"path".as_slice()));
        let path = path.or(records.long_name).unwrap_or_else(|| header.path());
        let link = pax.remove(b"linkpath".as_slice()).or(records.long_link);
        let link = link.unwrap_or_else(|| cut(header.field(LINK).to_vec()));
        for text in [&path, &link] {
            if text.len() > PATH_MAX {
                return Err(invalid(format!("a path has {} bytes, more than {PATH_MAX}", text.len())));
            }
            if text.contains(&0) {
                return Err(invalid("a path has a NUL byte"));
            }
        }
        let xattrs = std::mem::take(pax).into_iter();
        let xattrs = xattrs.filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value)));

        let device = || -> io::Result<_> {
            let part =
                |field| u32::try_from(header.number(field)?).map_err(|_| invalid("its device number is too large"));
            Ok((part(MAJOR)?, part(MINOR)?))
        };
        let kind = match header.kind() {
            // Before POSIX a slash made the directory.
            0 | b'0' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(invalid(format!("its type {:?} is not known", char::from(other)))),
        };
        // What is no file has no data, whatever its size says: so do all writers of images read it.
        self.left = if kind == Kind::File { size } else { 0 };
        self.padding = padding(self.left);
        let mut entry = Entry {
            path,
            metadata: Metadata {
                // The mask leaves 12 bits.
                mode: u16::try_from(header.number(MODE)? & 0o7777).unwrap_or_default(),
                uid,
                gid,
                mtime,
                xattrs: xattrs.collect(),
            },
            size: self.left,
            pieces: None,
            kind,
        };
        if entry.kind == Kind::File {
            if header.kind() == b'S' {
                (entry.pieces, entry.size) = (Some(self.gnu_pieces(header)?), header.number(REAL_SIZE)?);
            } else if let (Some(major), Some(minor)) = (version.0.as_deref(), version.1.as_deref()) {
                if (major, minor) != ("1", "0") {
                    return Err(invalid(format!(
                        "it is a sparse file of the version {major}.{minor}, which is not known"
                    )));
                }
                entry.size = realsize.ok_or_else(|| invalid("it is a sparse file without a size"))?;
                entry.pieces = Some(self.pax_pieces()?);
            } else if old_pax_sparse {
                return Err(invalid("it is a sparse file in the format 0.x: pack it with --sparse-version=1.0"));
            }
            check_pieces(&entry, self.left)?;
        }
        Ok(entry)
    }

    /// The next header; `None` at the end.
    fn header(&mut self, may_end: bool) -> io::Result<Option<Header>> {
        let mut block = [0; BLOCK];
        let first = self.some(&mut block)?;
        if first == 0 && may_end {
            return Ok(None);
        }
        self.fill(&mut block[first..])?;
        if block == [0; BLOCK] {
            return Ok(None);
        }
        let header = Header(block);
        header.check()?;
        Ok(Some(header))
    }

    /// The pieces of a sparse file in GNU's old format: in the header, and in blocks after it.
    fn gnu_pieces(&mut self, header: &Header) -> io::Result<Vec<(u64, u64)>> {
        let mut pieces = vec![];
        let mut take = |slots: &[u8]| {
            for slot in slots.chunks_exact(24) {
                let (offset, length) = (number(&slot[..12]), number(&slot[12..]));
                let (offset, length) = offset.zip(length).ok_or_else(|| invalid("its map of data is broken"))?;
                if slot[12] != 0 {
                    pieces.push((offset, length));
                }
            }
            if pieces.len() > PIECES_MAX {
                Err(invalid(format!("it has more than {PIECES_MAX} pieces")))
            } else {
                Ok(())
            }
        };
        take(&header.0[386..482])?;
        let mut more = header.0[482] != 0;
        let mut blocks = 0;
        while more {
            // Each may have no piece.
            blocks += 1;
            if blocks > PIECES_MAX {
                return Err(invalid(format!("its map of data has more than {PIECES_MAX} blocks")));
            }
            let mut block = [0; BLOCK];
            self.fill(&mut block)?;
            take(&block[..504])?;
            more = block[504] != 0;
        }
        Ok(pieces)
    }

    /// The pieces of a sparse file in PAX's format 1.0: decimal lines at the start of the data, to a block's end.
    fn pax_pieces(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let mut block = [0; BLOCK];
        let mut at = BLOCK;
        let mut number = |reader: &mut Self| -> io::Result<u64> {
            let mut value = 0u64;
            for _ in 0..21 {
                if at == BLOCK {
                    reader.read_exact(&mut block)?;
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'\n' => return Ok(value),
                    b'0'..=b'9' => {
                        let next = value.checked_mul(10).and_then(|value| value.checked_add(u64::from(byte - b'0')));
                        value = next.ok_or_else(|| invalid("its map of data is broken"))?;
                    }
                    _ => break,
                }
            }
            Err(invalid("its map of data is broken"))
        };
        let count = number(self)?;
        if count > PIECES_MAX as u64 {
            return Err(invalid(format!("it has more than {PIECES_MAX} pieces")));
        }
        (0..count).map(|_| Ok((number(self)?, number(self)?))).collect()
    }

    /// The data of a record before an entry.
    fn record(&mut self, size: u64, budget: &mut u64) -> io::Result<Vec<u8>> {
        let over = || invalid(format!("the records before an entry have more than {RECORDS_MAX} bytes"));
        *budget = budget.checked_sub(size).ok_or_else(over)?;
        let mut data = vec![0; usize::try_from(size).map_err(|_| over())?];
        self.fill(&mut data)?;
        self.padding = padding(size);
        Ok(data)
    }

    /// Goes to the end of the current entry.
    fn skip(&mut self) -> io::Result<()> {
        let mut rest = [0; 8 << 10];
        while self.left > 0 {
            let size = usize::try_from(self.left).unwrap_or(rest.len()).min(rest.len());
            self.fill(&mut rest[..size])?;
            self.left -= size as u64;
        }
        let zeros = &mut rest[..usize::try_from(std::mem::take(&mut self.padding)).expect("less than a block")];
        if zeros.is_empty() {
            // The decompressor of xz takes an empty read for the end of a block.
            return Ok(());
        }
        let first = self.some(zeros)?;
        if first == 0 && self.markless {
            return Ok(());
        }
        self.fill(&mut zeros[first..])
    }

    /// Takes note that the caller has gone to the end of the current entry by itself, by seeking.
    pub fn skipped(&mut self) -> u64 {
        let bytes = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        self.position += bytes;
        bytes
    }

    pub fn get_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// Some of what comes next: nothing only at the end.
    fn some(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.input.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => {
                    let read = read?;
                    self.position += read as u64;
                    return Ok(read);
                }
            }
        }
    }

    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.input.read_exact(buf).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(error.kind(), "the archive is cut off: it ends before its end-of-archive mark")
            }
            _ => error,
        })?;
        self.position += buf.len() as u64;
        Ok(())
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let size = usize::try_from(self.left).unwrap_or(buf.len()).min(buf.len());
        if size == 0 {
            return Ok(0);
        }
        let read = self.input.read(&mut buf[..size])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut off within the entry's data"));
        }
        self.left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}

/// Pieces ascend, do not overlap, lie in the file, and are what is stored.
fn check_pieces(entry: &Entry, stored: u64) -> io::Result<()> {
    let Some(pieces) = &entry.pieces else { return Ok(()) };
    let mut end = 0;
    let mut sum = 0u64;
    for (offset, length) in pieces {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= entry.size);
        end = next.ok_or_else(|| invalid("its map of data is broken"))?;
        sum += length;
    }
    // In PAX's format the map is part of what is stored.
    if sum == stored { Ok(()) } else { Err(invalid("its map of data does not fit its size")) }
}

type Field = std::ops::Range<usize>;
const MODE: Field = 100..108;
const UID: Field = 108..116;
const GID: Field = 116..124;
const SIZE: Field = 124..136;
const MTIME: Field = 136..148;
const CHECKSUM: Field = 148..156;
const KIND: usize = 156;
const LINK: Field = 157..257;
const MAGIC: Field = 257..263;
const MAJOR: Field = 329..337;
const MINOR: Field = 337..345;
const PREFIX: Field = 345..500;
const REAL_SIZE: Field = 483..495;

/// The block before an entry's data (POSIX.1-2017, pax, "ustar Interchange Format").
struct Header([u8; BLOCK]);

impl Header {
    fn field(&self, field: Field) -> &[u8] {
        &self.0[field]
    }

    fn kind(&self) -> u8 {
        self.0[KIND]
    }

    fn number(&self, field: Field) -> io::Result<u64> {
        number(self.field(field)).ok_or_else(|| invalid("a number in its header is broken"))
    }

    fn size(&self) -> io::Result<u64> {
        self.number(SIZE)
    }

    /// A number that GNU tar writes in binary when it is negative.
    fn signed(&self, field: Field) -> io::Result<i64> {
        let bytes = self.field(field);
        if bytes[0] == 0xff {
            let last = bytes.last_chunk().expect("the field has 12 bytes");
            return Ok(i64::from_be_bytes(*last));
        }
        i64::try_from(self.number(MTIME)?).map_err(|_| invalid("a number in its header is too large"))
    }

    fn path(&self) -> Vec<u8> {
        let name = cut(self.field(0..100).to_vec());
        // GNU's own format has other things there.
        let prefix = if self.field(MAGIC) == b"ustar\0" { cut(self.field(PREFIX).to_vec()) } else { vec![] };
        if prefix.is_empty() { name } else { [prefix, name].join(&b'/') }
    }

    fn check(&self) -> io::Result<()> {
        let spaces = 8 * u64::from(b' ');
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        let own: u64 = self.field(CHECKSUM).iter().map(|byte| u64::from(*byte)).sum();
        if number(self.field(CHECKSUM)) == Some(sum - own + spaces) {
            return Ok(());
        }
        Err(invalid("this is no header of a tar archive: its checksum is wrong"))
    }
}

/// Whether a file with these first bytes is a tar archive.
pub(super) fn is_archive(start: &[u8]) -> bool {
    start.first_chunk().is_some_and(|block| *block != [0; BLOCK] && Header(*block).check().is_ok())
}

/// A number in octal, or in binary with the first bit set. Nothing at all is zero.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let bytes = field.iter().enumerate().map(|(i, byte)| if i == 0 { byte & 0x7f } else { *byte });
        return bytes
            .into_iter()
            .try_fold(0u64, |value, byte| if value >> 56 == 0 { Some(value << 8 | u64::from(byte)) } else { None });
    }
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let text = std::str::from_utf8(&field[..end]).ok()?.trim_matches(' ');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// How many zeros follow data of this size.
fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// What is before the first NUL.
fn cut(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// Records of the form `LENGTH KEY=VALUE\n`, where the length counts all of the record.
fn parse_pax(mut data: &[u8], found: &mut BTreeMap<Vec<u8>, Vec<u8>>) -> io::Result<()> {
    let broken = || invalid("a PAX record is broken");
    while !data.is_empty() {
        let space = data.iter().take(20).position(|byte| *byte == b' ').ok_or_else(broken)?;
        let length = std::str::from_utf8(&data[..space]).ok().and_then(|text| text.parse::<usize>().ok());
        let length = length.filter(|length| *length > space + 1 && *length <= data.len()).ok_or_else(broken)?;
        let (record, rest) = data.split_at(length);
        let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(broken)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(broken)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        // Nothing takes back what an earlier record said.
        if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
            found.remove(key);
        } else {
            found.insert(key.to_vec(), value.to_vec());
        }
        data = rest;
    }
    Ok(())
}

/// Decimal seconds, with a fraction that counts forwards also before 1970.
fn parse_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a decompressor gives, some of which fail when nothing is asked for.
    struct Unpacked<'a>(&'a [u8]);

    impl Read for Unpacked<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            assert!(!buf.is_empty(), "nothing is asked for");
            self.0.read(buf)
        }
    }

    fn read(archive: &[u8]) -> io::Result<Vec<(Entry, Vec<u8>)>> {
        let mut reader = Reader::new(Unpacked(archive));
        let mut found = vec![];
        while let Some(entry) = reader.next()? {
            let mut data = vec![];
            reader.read_to_end(&mut data)?;
            found.push((entry, data));
        }
        Ok(found)
    }

    fn archive(write: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = tar::Builder::new(vec![]);
        write(&mut builder);
        builder.into_inner().unwrap()
    }

    fn file(size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o4755);
        header.set_uid(1000);
        header.set_gid(0o777_7777 + 1);
        header.set_mtime(77);
        header
    }

    #[test]
    fn files_links_and_devices_are_read() {
        let long = "d/".repeat(150) + "f";
        let bytes = archive(|builder| {
            builder.append_data(&mut file(3), "f", &b"abc"[..]).unwrap();
            builder.append_data(&mut file(600), &long, &[7; 600][..]).unwrap();
            let mut link = file(0);
            link.set_entry_type(tar::EntryType::Link);
            builder.append_link(&mut link, "g", &long).unwrap();
            let mut device = file(0);
            device.set_entry_type(tar::EntryType::Char);
            device.set_device_major(5).unwrap();
            device.set_device_minor(1).unwrap();
            builder.append_data(&mut device, "console", &b""[..]).unwrap();
        });
        let found = read(&bytes).unwrap();
        assert_eq!(found[0].0.path, b"f");
        assert_eq!(found[0].1, b"abc");
        let expected = Metadata { mode: 0o4755, uid: 1000, gid: 0o1000_0000, mtime: (77, 0), ..Metadata::default() };
        assert_eq!(found[0].0.metadata, expected);
        assert_eq!((&found[1].0.path, found[1].1.len()), (&long.clone().into_bytes(), 600));
        assert_eq!(found[2].0.kind, Kind::HardLink(long.into_bytes()));
        assert_eq!(found[3].0.kind, Kind::CharDevice(5, 1));
    }

    #[test]
    fn pax_records_may_hold_any_byte() {
        let value = b"\x01\0\0\x02\n9 x=y\n\0=".as_slice();
        let bytes = archive(|builder| {
            builder
                .append_pax_extensions([
                    ("SCHILY.xattr.security.capability", value),
                    ("mtime", b"-1.25".as_slice()),
                    ("uid", b"4000000000".as_slice()),
                    ("path", b"longer".as_slice()),
                ])
                .unwrap();
            builder.append_data(&mut file(0), "short", &b""[..]).unwrap();
        });
        let (entry, _) = &read(&bytes).unwrap()[0];
        assert_eq!(entry.path, b"longer");
        assert_eq!(entry.metadata.xattrs[b"security.capability".as_slice()], value);
        assert_eq!(entry.metadata.mtime, (-2, 750_000_000));
        assert_eq!(entry.metadata.uid, 4_000_000_000);
    }

    #[test]
    fn a_cut_archive_is_refused_wherever_it_is_cut() {
        let bytes = archive(|builder| {
            builder.append_data(&mut file(600), "d/".repeat(60) + "f", &[7; 600][..]).unwrap();
            builder.append_data(&mut file(0), "g", &b""[..]).unwrap();
        });
        assert_eq!(read(&bytes).unwrap().len(), 2);
        let mark = bytes.len() - 2 * BLOCK;
        for end in 0..=mark {
            assert!(read(&bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_long_name_takes_no_memory_before_it_is_there() {
        let mut header = file(1 << 40);
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_path("x").unwrap();
        header.set_cksum();
        let error = read(header.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("records before an entry"), "{error}");
    }

    #[test]
    fn a_sparse_file_in_the_pax_format() {
        let mut data = b"2\n4096\n3\n10000\n2\n".to_vec();
        data.resize(BLOCK, 0);
        data.extend(b"abcde");
        let bytes = archive(|builder| {
            builder
                .append_pax_extensions([
                    ("GNU.sparse.major", b"1".as_slice()),
                    ("GNU.sparse.minor", b"0".as_slice()),
                    ("GNU.sparse.name", b"s".as_slice()),
                    ("GNU.sparse.realsize", b"20000".as_slice()),
                ])
                .unwrap();
            builder.append_data(&mut file(data.len() as u64), "GNUSparseFile.1/s", &data[..]).unwrap();
        });
        let (entry, data) = &read(&bytes).unwrap()[0];
        assert_eq!((entry.path.as_slice(), entry.size), (b"s".as_slice(), 20000));
        assert_eq!(entry.pieces, Some(vec![(4096, 3), (10000, 2)]));
        assert_eq!(data, b"abcde");
    }

    #[test]
    fn times() {
        assert_eq!(parse_time("12.5"), Some((12, 500_000_000)));
        assert_eq!(parse_time("-0.5"), Some((-1, 500_000_000)));
        assert_eq!(parse_time("1."), Some((1, 0)));
        assert_eq!(parse_time("x"), None);
        assert_eq!(parse_time("1.+5"), None);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), BLOCK..4 * BLOCK)) {
            // A right checksum, so that more than the header's check is reached.
            bytes[CHECKSUM].fill(b' ');
            let sum: u32 = bytes[..BLOCK].iter().map(|byte| u32::from(*byte)).sum();
            bytes[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            for kind in [b'0', b'5', b'L', b'x', b'S'] {
                let before = bytes[KIND];
                bytes[KIND] = kind;
                let sum: u32 = bytes[..BLOCK].iter().map(|byte| u32::from(*byte)).sum();
                let own: u32 = bytes[CHECKSUM].iter().map(|byte| u32::from(*byte)).sum();
                bytes[CHECKSUM].copy_from_slice(format!("{:06o}\0 ", sum - own + 256).as_bytes());
                let _ = read(&bytes);
                bytes[KIND] = before;
            }
        }
    }
}
