//! The `state` file of a snapshot: one line that says what follows and how to check it, then JSON.
//!
//! ```text
//! bantam-state FORMAT BANTAM LENGTH SHA256\n
//! { ... }
//! ```
//!
//! `docs/snapshot-format.md` describes all of it.

use std::fmt::{self, Write as _};

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Version of the format that this program writes, and the only one that it reads.
pub const FORMAT: u32 = 2;
/// Version of this program.
pub const BANTAM: &str = env!("CARGO_PKG_VERSION");

/// The most bytes that a state has: of a machine with 1024 vCPUs they are 50 MiB.
pub const MAX: u64 = 64 << 20;

const MAGIC: &str = "bantam-state";
/// The longest first line, in bytes.
const MAX_LINE: usize = 160;

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No state at all.
    #[error("it is no state of a bantam machine: it does not begin with `{MAGIC}`")]
    Magic,
    /// The first line is not what it has to be.
    #[error("its first line is damaged")]
    Line,
    /// Another version of the format.
    #[error(
        "it has version {found} of the format, and this bantam {BANTAM} knows only version {FORMAT}: make it again"
    )]
    Format {
        /// The version it has.
        found: String,
    },
    /// Another version of bantam.
    #[error("it was made by bantam {found}, and this is bantam {BANTAM}: make it again, or restore it with that one")]
    Bantam {
        /// The version that made it.
        found: String,
    },
    /// Cut short, or with something after it.
    #[error("it is damaged: it has {found} bytes after the first line, and not {expected}")]
    Length {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// More than anybody would read.
    #[error("it would have {found} bytes, and must not have more than {MAX}")]
    TooLong {
        /// How many there are.
        found: usize,
    },
    /// Changed.
    #[error("it is damaged: its SHA-256 is another than the one in its first line")]
    Checksum,
    /// Checked, and all the same not what this program writes.
    #[error("what it says is no machine's state")]
    Json(#[source] serde_json::Error),
    /// A part of it does not fit the machine.
    #[error("cannot restore {what}: {why}")]
    Part {
        /// Which part.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// A part that does not fit.
    pub fn part(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::Part { what: what.into(), why: why.to_string() }
    }
}

/// The content of a state file.
pub fn encode(state: &impl Serialize) -> Result<Vec<u8>, Error> {
    let body = serde_json::to_vec(state).map_err(Error::Json)?;
    let mut file = format!("{MAGIC} {FORMAT} {BANTAM} {} {}\n", body.len(), digest(&body));
    file.reserve(body.len());
    let mut file = file.into_bytes();
    file.extend(body);
    if file.len() as u64 > MAX {
        return Err(Error::TooLong { found: file.len() });
    }
    Ok(file)
}

/// The most bytes that [`version`] looks at.
pub const VERSION_BYTES: u64 = 256;

/// The version of the format that a state file has, by its first bytes; it may be one that this program does not know.
pub fn version(file: &[u8]) -> Result<u32, Error> {
    let (words, _) = split(file)?;
    words[0].parse().map_err(|_| Error::Line)
}

/// The words of the first line, of which the first is the version of the format, and what follows.
fn split(file: &[u8]) -> Result<(Vec<&str>, &[u8]), Error> {
    let rest = file.strip_prefix(MAGIC.as_bytes()).and_then(|rest| rest.strip_prefix(b" ")).ok_or(Error::Magic)?;
    let end = rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n').ok_or(Error::Line)?;
    let line = std::str::from_utf8(&rest[..end]).map_err(|_| Error::Line)?;
    Ok((line.split(' ').collect(), &rest[end + 1..]))
}

/// What a state file says, if all of it is as it was written.
pub fn decode<T: DeserializeOwned>(file: &[u8]) -> Result<T, Error> {
    let (words, body) = split(file)?;
    // Of other versions no more need be as here than the first word.
    if words[0] != FORMAT.to_string() {
        let known = words[0].bytes().all(|byte| byte.is_ascii_digit()) && !words[0].is_empty();
        return Err(if known { Error::Format { found: words[0].escape_debug().to_string() } } else { Error::Line });
    }
    let [_, bantam, length, sum] = words[..] else { return Err(Error::Line) };
    if bantam != BANTAM {
        return Err(Error::Bantam { found: bantam.into() });
    }
    if length != body.len().to_string() {
        return Err(Error::Length { found: body.len(), expected: length.parse().map_err(|_| Error::Line)? });
    }
    if sum != digest(body).to_string() {
        return Err(Error::Checksum);
    }
    serde_json::from_slice(body).map_err(Error::Json)
}

/// The SHA-256 of a file's content.
pub fn digest(file: &[u8]) -> Hex {
    Hex(Sha256::digest(file).to_vec())
}

/// Bytes, which are written in hexadecimal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        for byte in &self.0 {
            f.write_char(DIGITS[usize::from(byte >> 4)].into())?;
            f.write_char(DIGITS[usize::from(byte & 0xf)].into())?;
        }
        Ok(())
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string())
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let byte = |pair: &[u8]| match pair {
            [high, low] => u8::try_from(digit(*high)? << 4 | digit(*low)?).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.map(Hex).ok_or_else(|| D::Error::custom("expected bytes in hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn state() -> Value {
        json!({"vcpus": [{"regs": Hex(vec![0, 0xa5, 0xff]), "msrs": [[16, u64::MAX]]}], "text": "ä"})
    }

    #[test]
    fn what_is_written_is_read() {
        let file = encode(&state()).unwrap();
        assert_eq!(decode::<Value>(&file).unwrap(), state());
        assert_eq!(state()["vcpus"][0]["regs"], "00a5ff");
    }

    #[test]
    fn every_byte_and_every_length_counts() {
        let file = encode(&state()).unwrap();
        for at in 0..file.len() {
            assert!(decode::<Value>(&file[..at]).is_err(), "cut at {at}");
            for bits in [0x01, 0x20, 0x80, 0xff] {
                let mut damaged = file.clone();
                damaged[at] ^= bits;
                assert!(decode::<Value>(&damaged).is_err(), "{bits:#x} in {at}");
            }
        }
        assert!(matches!(decode::<Value>(&[&file[..], b"\n"].concat()), Err(Error::Length { .. })));
        assert!(decode::<Value>(&[&file[..], &file[..]].concat()).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let file = String::from_utf8(encode(&state()).unwrap()).unwrap();
        let change = |from: &str, to: &str| decode::<Value>(file.replacen(from, to, 1).as_bytes()).unwrap_err();
        let error = change(&format!("{MAGIC} {FORMAT} "), &format!("{MAGIC} 7 "));
        assert!(error.to_string().contains("version 7 "), "{error}");
        let error = change(BANTAM, "99.1.2");
        assert!(error.to_string().contains("99.1.2") && error.to_string().contains(BANTAM), "{error}");
        assert!(matches!(change(MAGIC, "ELF"), Error::Magic));
        assert!(matches!(decode::<Value>(b"bantam-state 1\n"), Err(Error::Format { .. })));
    }

    #[test]
    fn bytes_are_pairs_of_digits() {
        for text in ["0", "0g", "000", "ä0", "+1"] {
            assert!(serde_json::from_value::<Hex>(json!(text)).is_err(), "{text}");
        }
        assert_eq!(serde_json::from_value::<Hex>(json!("")).unwrap(), Hex(vec![]));
    }
}
