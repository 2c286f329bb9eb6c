//! What a bzImage has in it, compressed.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::bzimage::BzImage;
use super::unpack::{Compression, unpack};

/// How much of a payload is read at once.
const READ_AHEAD: usize = 256 << 10;
/// How much of its end is kept. Checksums are there, of all compressions but LZ4.
const END: usize = 64;

/// The compressed payload of a bzImage.
pub(super) struct Payload<'a> {
    /// The bzImage.
    pub file: &'a File,
    /// How it is compressed.
    pub compression: Compression,
    /// Where it is in the file.
    range: Range<u64>,
    end: Vec<u8>,
}

impl<'a> Payload<'a> {
    /// That of `image`, which `file` is; `None` if it is not known how it is compressed.
    pub fn of(file: &'a File, image: &BzImage) -> io::Result<Option<Self>> {
        let range = image.payload.clone();
        let mut start = [0; 8];
        file.read_exact_at(&mut start, range.start)?;
        let Some(compression) = Compression::detect(&start) else { return Ok(None) };
        let size = usize::try_from(range.end - range.start).map_or(END, |size| size.min(END));
        let mut end = vec![0; size];
        file.read_exact_at(&mut end, range.end - size as u64)?;
        Ok(Some(Self { file, compression, range, end }))
    }

    /// Its last bytes.
    pub fn end(&self) -> &[u8] {
        &self.end
    }

    /// What it unpacks to, in bytes: the build puts it last, as gzip does by itself.
    pub fn unpacked_size(&self) -> u64 {
        self.end.last_chunk().map_or(0, |size| u32::from_le_bytes(*size)).into()
    }

    /// Its length, in bytes.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// All of it.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.len()).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, self.range.start)?;
        Ok(bytes)
    }

    /// How many of its bytes are compressed.
    pub fn packed_len(&self) -> u64 {
        self.len() - self.compression.trailer()
    }

    /// What is in it; `None` if only the guest can tell.
    pub fn unpack(&self) -> io::Result<Option<Box<dyn Read + 'a>>> {
        let range = self.range.start..self.range.start + self.packed_len();
        let packed = Part { file: self.file, range };
        unpack(self.compression, BufReader::with_capacity(READ_AHEAD, packed)).transpose()
    }
}

/// A part of a file, as a reader.
struct Part<'a> {
    file: &'a File,
    range: Range<u64>,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let size = left.min(buf.len());
        let read = self.file.read_at(&mut buf[..size], self.range.start)?;
        self.range.start += read as u64;
        Ok(read)
    }
}
