//! Unpacking a kernel's payload on the host, which takes less time and memory than the guest doing it.

use std::fmt;
use std::io::{self, BufRead, Read};

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
        Compression::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(packed)),
        Compression::Bzip2 => Box::new(bzip2::read::BzDecoder::new(packed)),
        Compression::Lzma | Compression::Lzo => return None,
    }))
}
