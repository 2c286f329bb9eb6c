//! Layers and archives may be compressed, as their first bytes tell.

use std::io::{self, BufRead, Read};

use super::archive::invalid;

/// The most memory that a stream may ask its decompressor for, in bytes: what `zstd -22 --long` and `xz -9` want.
const WINDOW_MAX: u32 = 128 << 20;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    /// The compression that the first bytes tell; `None` if it is not known.
    pub fn detect(start: &[u8]) -> Option<Self> {
        let magic: [(&[u8], _); 3] =
            [(&[0x1f, 0x8b], Self::Gzip), (b"\xfd7zXZ\0", Self::Xz), (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd)];
        magic.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, compression)| compression)
    }
}

/// What is in `packed`, which may not be compressed at all. Streams may be several, one after the other.
pub(crate) fn unpack<'a>(packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    unpack_box(Box::new(packed))
}

/// Decompressors are large: there is one of each.
fn unpack_box<'a>(mut packed: Box<dyn BufRead + 'a>) -> io::Result<Box<dyn Read + 'a>> {
    let start = packed.fill_buf()?;
    Ok(match Compression::detect(start) {
        None => packed,
        Some(Compression::Gzip) => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
        Some(Compression::Xz) => Box::new(lzma_rust2::XzReader::new_mem_limit(packed, true, WINDOW_MAX >> 10)),
        Some(Compression::Zstd) => Box::new(Zstd { packed: Some(packed), frame: None }),
    })
}

type Frame<R> = ruzstd::decoding::StreamingDecoder<R, ruzstd::decoding::FrameDecoder>;

/// Frames of Zstandard, one after the other.
struct Zstd<R: Read> {
    packed: Option<R>,
    frame: Option<Frame<R>>,
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.frame {
                let read = frame.read(buf)?;
                if read > 0 || buf.is_empty() {
                    return Ok(read);
                }
                self.packed = self.frame.take().map(Frame::into_inner);
            }
            let Some(mut packed) = self.packed.take() else { return Ok(0) };
            skip_frames(&mut packed)?;
            if packed.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let frame = Frame::new_with_max_window_size(packed, WINDOW_MAX.into());
            self.frame = Some(frame.map_err(|error| invalid(error.to_string()))?);
        }
    }
}

/// Goes past frames that hold no data (RFC 8878, "Skippable Frames").
fn skip_frames(packed: &mut impl BufRead) -> io::Result<()> {
    while let [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] = packed.fill_buf()? {
        let mut header = [0; 8];
        packed.read_exact(&mut header)?;
        let size = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if io::copy(&mut packed.by_ref().take(size.into()), &mut io::sink())? < size.into() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// What a program makes of `data`.
    fn packed(program: &str, data: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut child =
            Command::new(program).args(["-c", "-q"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(data).unwrap();
        child.wait_with_output().unwrap().stdout
    }

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut found = vec![];
        unpack(packed)?.read_to_end(&mut found).map(|_| found)
    }

    #[test]
    fn streams_one_after_the_other_are_one() {
        for program in ["gzip", "xz", "zstd"] {
            let bytes = [packed(program, b"hello, "), packed(program, b"world")].concat();
            assert_eq!(unpacked(&bytes).unwrap(), b"hello, world", "{program}");
        }
        assert_eq!(unpacked(b"plain").unwrap(), b"plain");
        assert_eq!(unpacked(b"").unwrap(), b"");
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let data: Vec<u8> = (0..5000u32).map(|i| ((i * i) >> 3).to_le_bytes()[0]).collect();
        for program in ["gzip", "xz", "zstd"] {
            let bytes = packed(program, &data);
            for end in [bytes.len() / 2, bytes.len() - 1, 12] {
                assert!(unpacked(&bytes[..end]).is_err(), "{program} cut at {end}");
            }
        }
    }

    #[test]
    fn a_frame_without_data_is_gone_past() {
        let bytes = [b"\x51\x2a\x4d\x18\x03\0\0\0abc".to_vec(), packed("zstd", b"data")].concat();
        // It is known by the frame before it.
        let bytes = [packed("zstd", b"more "), bytes].concat();
        assert_eq!(unpacked(&bytes).unwrap(), b"more data");
    }
}
