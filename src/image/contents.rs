//! What is in the files of an image: written to its place in the image as it is unpacked, block by block.
//!
//! A short end of a file goes beside its inode, which is made when all files are known. Until then it waits in a file
//! without a name.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::archive::invalid;

/// The size of a block of the image, in bytes.
pub(super) const BLOCK: u64 = BLOCK_SIZE as u64;
pub(super) const BLOCK_SIZE: usize = 4096;
/// The longest end of a file that goes beside its inode, in bytes: more would leave large gaps between inodes.
const TAIL_MAX: u64 = BLOCK / 2;

/// Where the data of a file is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Data {
    /// Bytes.
    pub size: u64,
    /// The first block of the image that has some, if any has.
    pub block: u64,
    /// Where the end waits that does not fill a block, if it is to go beside the inode.
    pub tail: Option<u64>,
}

impl Data {
    /// How many blocks of the image have it.
    pub fn blocks(&self) -> u64 {
        if self.tail.is_some() { self.size / BLOCK } else { self.size.div_ceil(BLOCK) }
    }

    /// How many bytes go beside the inode.
    pub fn tail_len(&self) -> u64 {
        if self.tail.is_some() { self.size % BLOCK } else { 0 }
    }
}

/// The data of all files.
pub(super) struct Contents {
    image: File,
    /// The first block that is not used.
    next: u64,
    /// The most blocks that there may be.
    limit: u64,
    tails: BufWriter<File>,
    tails_len: u64,
    buffer: Vec<u8>,
}

impl Contents {
    /// Fills the empty `image` from its second block on, with at most `limit` bytes; `scratch` is empty too.
    pub fn new(image: File, scratch: File, limit: u64) -> Self {
        let tails = BufWriter::with_capacity(256 << 10, scratch);
        Self { image, next: 1, limit: limit / BLOCK, tails, tails_len: 0, buffer: vec![0; 256 << 10] }
    }

    /// Takes `size` bytes from `input`, or `pieces` of them where the rest is zero. Up to `room` bytes fit beside the
    /// inode.
    pub fn add(
        &mut self,
        size: u64,
        pieces: Option<&[(u64, u64)]>,
        room: u64,
        input: &mut impl Read,
    ) -> io::Result<Data> {
        let end = size % BLOCK;
        // A sparse file's end may be a hole: it stays in a block.
        let tail = (end > 0 && end <= room.min(TAIL_MAX) && pieces.is_none()).then_some(self.tails_len);
        let mut data = Data { size, block: self.next, tail };
        if data.blocks() == 0 {
            data.block = 0;
        }
        if data.blocks() > self.limit - self.next.min(self.limit) {
            return Err(invalid(format!("the files have more than {} MiB", (self.limit * BLOCK) >> 20)));
        }
        self.next += data.blocks();
        let start = data.block * BLOCK;
        match pieces {
            None => self.copy(input, start, size - data.tail_len())?,
            Some(pieces) => {
                for (offset, length) in pieces {
                    self.copy(input, start + offset, *length)?;
                }
            }
        }
        if tail.is_some() {
            // Shorter than a block.
            let buffer = &mut self.buffer[..usize::try_from(end).expect("it is shorter than a block")];
            input.read_exact(buffer)?;
            self.tails.write_all(buffer)?;
            self.tails_len += end;
        }
        Ok(data)
    }

    fn copy(&mut self, input: &mut impl Read, mut offset: u64, mut left: u64) -> io::Result<()> {
        while left > 0 {
            let size = usize::try_from(left).unwrap_or(self.buffer.len()).min(self.buffer.len());
            input.read_exact(&mut self.buffer[..size])?;
            self.image.write_all_at(&self.buffer[..size], offset)?;
            offset += size as u64;
            left -= size as u64;
        }
        Ok(())
    }

    /// Gives back the space of data that no file has any more.
    pub fn free(&mut self, data: Data) {
        if data.blocks() > 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where the host's file system has no holes, the image is larger.
            let _ = fallocate(&self.image, flags, data.block * BLOCK, data.blocks() * BLOCK);
        }
    }

    /// The image, the first block that is not used, and the ends.
    pub fn finish(self) -> io::Result<(File, u64, Tails)> {
        let mut tails = self.tails.into_inner().map_err(io::IntoInnerError::into_error)?;
        tails.seek(SeekFrom::Start(0))?;
        Ok((self.image, self.next, Tails(tails)))
    }
}

/// The ends of files that wait.
pub(super) struct Tails(File);

impl Tails {
    /// Reads the end of a file.
    pub fn read(&self, data: &Data, into: &mut [u8]) -> io::Result<()> {
        match data.tail {
            Some(at) => self.0.read_exact_at(into, at),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(limit: u64) -> Contents {
        Contents::new(tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap(), limit)
    }

    #[test]
    fn short_ends_wait_and_long_ones_take_a_block() {
        let mut contents = contents(1 << 20);
        let bytes: Vec<u8> = (0..10_000u32).map(|i| i.to_le_bytes()[0]).collect();
        let short = contents.add(5000, None, 4000, &mut &bytes[..]).unwrap();
        assert_eq!(short, Data { size: 5000, block: 1, tail: Some(0) });
        let long = contents.add(8000, None, 4000, &mut &bytes[..]).unwrap();
        assert_eq!(long, Data { size: 8000, block: 2, tail: None });
        let tight = contents.add(5000, None, 100, &mut &bytes[..]).unwrap();
        assert_eq!(tight, Data { size: 5000, block: 4, tail: None });
        let small = contents.add(7, None, 4000, &mut &b"seventh"[..]).unwrap();
        assert_eq!(small, Data { size: 7, block: 0, tail: Some(904) });
        let (image, next, tails) = contents.finish().unwrap();
        assert_eq!(next, 6);
        let mut found = vec![0; 8000];
        image.read_exact_at(&mut found, 2 * BLOCK).unwrap();
        assert_eq!(found, bytes[..8000]);
        let mut found = [0; 7];
        tails.read(&small, &mut found).unwrap();
        assert_eq!(&found, b"seventh");
        let mut found = [0; 904];
        tails.read(&short, &mut found).unwrap();
        assert_eq!(found, bytes[4096..5000]);
    }

    #[test]
    fn holes_are_zeros_and_count() {
        let mut contents = contents(1 << 20);
        let data = contents.add(10_000, Some(&[(5000, 3)]), 4000, &mut &b"abc"[..]).unwrap();
        assert_eq!(data.blocks(), 3);
        assert!(contents.add(1 << 40, Some(&[]), 4000, &mut &b""[..]).is_err());
        let (image, next, _) = contents.finish().unwrap();
        image.set_len(next * BLOCK).unwrap();
        let mut found = [9; 5];
        image.read_exact_at(&mut found, BLOCK + 4999).unwrap();
        assert_eq!(&found, b"\0abc\0");
    }
}
