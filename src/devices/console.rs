//! The host's end of the serial console.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where the serial console is on the host: `stdio`, `none`, `file=PATH` or `socket=PATH`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Spec {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Nowhere: what the guest writes is dropped, and it reads nothing.
    None,
    /// Output to this file, no input.
    File(PathBuf),
    /// Both ways on a Unix socket that is created at this path.
    Socket(PathBuf),
}

/// Text that is no [`Spec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use `{0}` as a serial console: expected stdio, none, file=PATH or socket=PATH")]
pub struct BadSpec(String);

impl FromStr for Spec {
    type Err = BadSpec;

    fn from_str(text: &str) -> Result<Self, BadSpec> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(BadSpec(text.to_owned())),
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::None => f.write_str("none"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

impl TryFrom<String> for Spec {
    type Error = BadSpec;
    fn try_from(text: String) -> Result<Self, BadSpec> {
        text.parse()
    }
}

impl From<Spec> for String {
    fn from(spec: Spec) -> Self {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_round_trip() {
        for text in ["stdio", "none", "file=/tmp/a=b", "socket=x"] {
            assert_eq!(text.parse::<Spec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "file", "file=", "socket=", "tty", "stdio=x", "none="] {
            assert_eq!(text.parse::<Spec>(), Err(BadSpec(text.to_owned())), "{text}");
        }
    }
}
