//! Unpacking a kernel's payload on the host, which takes less time and memory than the guest doing it.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::ops::Range;

use serde::Serialize;

/// How a payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// gzip.
    Gzip,
    /// XZ, usually with the x86 BCJ filter.
    Xz,
    /// Zstandard.
    Zstd,
    /// LZ4's legacy frame.
    Lz4,
    /// bzip2.
    Bzip2,
    /// LZMA, which only the guest unpacks.
    Lzma,
    /// LZO, which only the guest unpacks.
    Lzo,
}

impl Compression {
    /// The compression that a payload's first bytes tell; `None` if it has none that is known.
    pub fn detect(start: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Compression); 7] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
            (b"BZh", Compression::Bzip2),
            (&[0x5d, 0, 0], Compression::Lzma),
            (b"\x89LZO", Compression::Lzo),
        ];
        MAGIC.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, compression)| compression)
    }
}

impl Compression {
    /// Whether only the guest unpacks it.
    pub(super) fn is_for_guest(self) -> bool {
        matches!(self, Compression::Lzma | Compression::Lzo)
    }

    /// How many bytes the kernel's build appends: the unpacked size, which gzip has already.
    pub(super) fn trailer(self) -> u64 {
        if self == Compression::Gzip { 0 } else { 4 }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Lzo => "lzo",
        })
    }
}

/// The most memory that a payload may ask its decompressor for, in bytes: twice what Linux compresses with.
const WINDOW_MAX: u32 = 256 << 20;

/// What is in `packed`; `None` if only the guest can tell.
pub(super) fn unpack<'a>(
    compression: Compression,
    packed: impl BufRead + 'a,
) -> Option<io::Result<Box<dyn Read + 'a>>> {
    unpack_box(compression, Box::new(packed))
}

/// Decompressors are large: there is one of each.
fn unpack_box<'a>(compression: Compression, packed: Box<dyn BufRead + 'a>) -> Option<io::Result<Box<dyn Read + 'a>>> {
    Some(Ok(match compression {
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(packed)),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(packed, false, WINDOW_MAX >> 10)),
        Compression::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, WINDOW_MAX.into());
            return Some(match decoder {
                Ok(decoder) => Ok(Box::new(decoder)),
                Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
            });
        }
        Compression::Lz4 => Box::new(Lz4::new(packed)),
        Compression::Bzip2 => Box::new(bzip2::read::BzDecoder::new(packed)),
        Compression::Lzma | Compression::Lzo => return None,
    }))
}

/// The magic number of a legacy frame, little-endian.
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// The most data of one block of a legacy frame, in bytes.
const LZ4_BLOCK: usize = 8 << 20;

/// Legacy frames of LZ4, as `lz4 -l` and the kernel's build make them (LZ4 Frame Format Description, "Legacy frame"): the
/// magic number, then blocks, each after its size. There may be several frames, and there is no end mark.
struct Lz4<R> {
    packed: R,
    block: Vec<u8>,
    unpacked: Vec<u8>,
    /// What of `unpacked` is still to be read.
    left: Range<usize>,
}

impl<R: Read> Lz4<R> {
    fn new(packed: R) -> Self {
        Self { packed, block: vec![], unpacked: vec![], left: 0..0 }
    }

    /// Unpacks the next block; false if there is none.
    fn next_block(&mut self) -> io::Result<bool> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        let mut size = LZ4_MAGIC;
        while size == LZ4_MAGIC {
            if (&mut self.packed).take(1).read(&mut size[..1])? == 0 {
                return Ok(false);
            }
            self.packed.read_exact(&mut size[1..])?;
        }
        let size = u32::from_le_bytes(size) as usize;
        if size > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) {
            return Err(invalid(format!("a block of LZ4 is {size} bytes long")));
        }
        self.block.resize(size, 0);
        self.packed.read_exact(&mut self.block)?;
        self.unpacked.resize(LZ4_BLOCK, 0);
        let unpacked = lz4_flex::block::decompress_into(&self.block, &mut self.unpacked);
        self.left = 0..unpacked.map_err(|error| invalid(error.to_string()))?;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() && !buf.is_empty() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let size = self.left.len().min(buf.len());
        buf[..size].copy_from_slice(&self.unpacked[self.left.start..][..size]);
        self.left.start += size;
        Ok(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// What the program makes of `data`.
    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut child =
            Command::new("lz4").args(["-l", "-c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(data).unwrap());
            child.wait_with_output().unwrap().stdout
        })
    }

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut found = vec![];
        Lz4::new(packed).read_to_end(&mut found).map(|_| found)
    }

    #[test]
    fn frames_of_several_blocks_follow_one_another() {
        let number = |i: usize| (i.wrapping_mul(i) >> 7).to_le_bytes()[0];
        let data: Vec<u8> = (0..LZ4_BLOCK + 5000).map(number).collect();
        let packed = [lz4(&data), lz4(b"more")].concat();
        assert!(unpacked(&packed).unwrap() == [&data[..], b"more"].concat());
        assert!(unpacked(&packed[..packed.len() - 1]).is_err(), "cut off");
        assert_eq!(unpacked(&[&LZ4_MAGIC[..], &[0xff; 4]].concat()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn a_changed_frame_is_an_error_or_other_data(at in 4usize..60, value: u8) {
            let mut packed = [&LZ4_MAGIC[..], &lz4_flex::block::compress(b"some data, some data, and some more")].concat();
            let size = u32::try_from(packed.len() - 4).unwrap();
            packed.splice(4..4, size.to_le_bytes());
            let at = at % packed.len();
            packed[at] = value;
            if let Ok(data) = unpacked(&packed) {
                prop_assert!(data.len() <= LZ4_BLOCK);
            }
        }
    }
}
