//! The bytes of a kernel image: a file, or a payload unpacked on the fly.
//!
//! Both put segments straight into guest memory; neither holds an image in its own.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestRam, into_io, load_file};

/// How much of the start of an image is kept: the headers of all formats.
pub(super) const HEAD: usize = 4096;

/// The bytes of an image, to be read in ascending order of offset after its first [`HEAD`].
pub(super) trait Image {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether reads may go back to where they were before.
    fn seekable(&self) -> bool;

    /// Fills `buf` with what is at `offset`.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Puts `len` bytes from `offset` into fresh guest memory at `address`.
    fn load(&mut self, offset: u64, len: u64, ram: &GuestRam, address: u64) -> io::Result<()>;
}

/// An image that is a file.
pub(super) struct FileImage<'a> {
    /// The file.
    pub file: &'a File,
    /// Its first bytes.
    pub head: &'a [u8],
    /// Its length.
    pub len: u64,
}

impl Image for FileImage<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn seekable(&self) -> bool {
        true
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        match start.and_then(|start| self.head.get(start..start.checked_add(buf.len())?)) {
            Some(kept) => {
                buf.copy_from_slice(kept);
                Ok(())
            }
            None => self.file.read_exact_at(buf, offset),
        }
    }

    fn load(&mut self, offset: u64, len: u64, ram: &GuestRam, address: u64) -> io::Result<()> {
        load_file(ram, address, self.file, offset, len)
    }
}

/// An image that comes out of a decompressor.
pub(super) struct StreamImage<R> {
    reader: R,
    head: Vec<u8>,
    position: u64,
    len: u64,
    chunk: Vec<u8>,
}

const PAGE: usize = 4096;

impl<R: Read> StreamImage<R> {
    /// The first `len` bytes that `reader` gives.
    pub fn new(mut reader: R, len: u64) -> io::Result<Self> {
        let mut head = Vec::with_capacity(HEAD);
        (&mut reader).take(len.min(HEAD as u64)).read_to_end(&mut head)?;
        Ok(Self { reader, position: head.len() as u64, head, len, chunk: vec![0; 32 * PAGE] })
    }

    fn fill(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_or(self.head.len(), |offset| offset.min(self.head.len()));
        let kept = buf.len().min(self.head.len() - start);
        buf[..kept].copy_from_slice(&self.head[start..start + kept]);
        let rest = &mut buf[kept..];
        if rest.is_empty() {
            return Ok(());
        }
        let skip = (offset + kept as u64)
            .checked_sub(self.position)
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "an unpacked image cannot be read backwards"))?;
        if io::copy(&mut (&mut self.reader).take(skip), &mut io::sink())? < skip {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.reader.read_exact(rest)?;
        self.position += skip + rest.len() as u64;
        Ok(())
    }
}

impl<R: Read> Image for StreamImage<R> {
    fn len(&self) -> u64 {
        self.len
    }

    fn seekable(&self) -> bool {
        false
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.fill(offset, buf)
    }

    /// Pages of zeros are left untouched: fresh memory has them, and a kernel's unpacked `.bss` is megabytes of them.
    fn load(&mut self, offset: u64, len: u64, ram: &GuestRam, address: u64) -> io::Result<()> {
        let mut chunk = std::mem::take(&mut self.chunk);
        let mut done = 0;
        while done < len {
            let size = usize::try_from(len - done).map_or(chunk.len(), |left| left.min(chunk.len()));
            self.fill(offset + done, &mut chunk[..size])?;
            for page in chunk[..size].chunks(PAGE) {
                if *page != [0; PAGE][..page.len()] {
                    ram.write_slice(page, GuestAddress(address + done)).map_err(into_io)?;
                }
                done += page.len() as u64;
            }
        }
        self.chunk = chunk;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    #[test]
    fn a_stream_skips_ahead_and_serves_its_head_again() {
        let bytes: Vec<u8> = (0..3 * PAGE).map(|i| (i / 16).to_le_bytes()[0]).collect();
        let mut image = StreamImage::new(bytes.as_slice(), bytes.len() as u64).unwrap();
        let mut buf = [0; 32];
        for offset in [0, HEAD - 16, 2 * PAGE, 8] {
            image.read(offset as u64, &mut buf).unwrap();
            assert_eq!(buf, bytes[offset..offset + 32], "{offset}");
        }
        assert_eq!(image.read(PAGE as u64, &mut buf).unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(image.read(3 * PAGE as u64, &mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_stream_loads_across_pages_of_zeros() {
        let mut bytes = vec![0; 5 * PAGE + 7];
        bytes[3] = 1;
        bytes[4 * PAGE] = 2;
        bytes[5 * PAGE + 6] = 3;
        let ram = reserve(&[0..1 << 20]).unwrap();
        let mut image = StreamImage::new(bytes.as_slice(), bytes.len() as u64).unwrap();
        image.load(0, bytes.len() as u64, &ram, 0x1001).unwrap();
        let mut loaded = vec![0xff; bytes.len()];
        ram.read_slice(&mut loaded, GuestAddress(0x1001)).unwrap();
        assert_eq!(loaded, bytes);
    }
}
