//! SHA-256 digests, and readers that check them.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use super::archive::invalid;
use crate::text::serde_as_text;

/// A SHA-256 digest, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Text that is no [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no digest: it is not sha256: and 64 hexadecimal digits in lower case")]
pub struct BadDigest(String);

impl Digest {
    /// The digest of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest of all that a reader gives.
    pub(super) fn of_reader(input: &mut impl Read) -> io::Result<Self> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 256 << 10];
        loop {
            match input.read(&mut buffer)? {
                0 => return Ok(Self(hash.finalize().into())),
                read => hash.update(&buffer[..read]),
            }
        }
    }

    /// The 64 digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The first bytes, to name something.
    pub(crate) fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.0[..16]);
        uuid
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let bad = || BadDigest(text.chars().take(100).collect());
        let hex = text.strip_prefix("sha256:").filter(|hex| hex.len() == 64).ok_or_else(bad)?;
        // Upper case is another name for the same bytes, which the OCI specification forbids.
        if !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

serde_as_text!(Digest);

/// What bytes have to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub digest: Option<Digest>,
    pub size: Option<u64>,
}

/// A reader that hashes and counts what goes through it.
pub(super) struct Checked<R> {
    input: R,
    hash: Option<Sha256>,
    size: u64,
    expected: Expected,
    /// Ends it with an error, however much is expected.
    limit: u64,
}

impl<R: Read> Checked<R> {
    /// Reads `input`, of which at most `limit` bytes may come.
    pub fn new(input: R, expected: Expected, limit: u64) -> Self {
        let hash = expected.digest.map(|_| Sha256::new());
        Self { input, hash, size: 0, expected, limit: limit.min(expected.size.unwrap_or(u64::MAX)) }
    }

    /// Reads what is left, and checks size and digest.
    pub fn finish(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink())?;
        if let Some(size) = self.expected.size
            && size != self.size
        {
            return Err(invalid(format!("it has {} bytes, and not {size}", self.size)));
        }
        if let (Some(expected), Some(hash)) = (self.expected.digest, self.hash.take()) {
            let found = Digest(hash.finalize().into());
            if found != expected {
                return Err(invalid(format!("its digest is {found}, and not {expected}")));
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buf)?;
        self.size += read as u64;
        if self.size > self.limit {
            return Err(invalid(match self.expected.size {
                Some(size) if size == self.limit => format!("it has more than {size} bytes"),
                _ => format!("it unpacks to more than {} MiB", self.limit >> 20),
            }));
        }
        if let Some(hash) = &mut self.hash {
            hash.update(&buf[..read]);
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_is_its_text() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(EMPTY.parse(), Ok(Digest::of(b"")));
        for bad in ["", "sha256:", &EMPTY[..70], &EMPTY.to_uppercase(), &EMPTY.replace("sha256", "sha512"), "sha256:é"]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn size_and_digest_are_checked() {
        let check = |data: &[u8], digest, size, limit| {
            Checked::new(data, Expected { digest, size }, limit).finish().map_err(|error| error.to_string())
        };
        let digest = Some(Digest::of(b"abc"));
        assert_eq!(check(b"abc", digest, Some(3), 100), Ok(()));
        assert!(check(b"abd", digest, Some(3), 100).unwrap_err().contains("its digest is"));
        assert!(check(b"abcd", digest, Some(3), 100).unwrap_err().contains("more than 3 bytes"));
        assert!(check(b"ab", digest, Some(3), 100).unwrap_err().contains("has 2 bytes"));
        assert!(check(b"abc", None, None, 2).unwrap_err().contains("unpacks to more"));
    }
}
