//! A folder of the host that the guest sees.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A shared folder: `HOST:GUEST[:ro]`.
///
/// ```
/// use bantam::config::Share;
/// let share: Share = "src:/mnt/src:ro".parse()?;
/// assert!(share.readonly);
/// # Ok::<(), bantam::config::BadShare>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Share {
    /// The folder on the host.
    pub path: PathBuf,
    /// Where the guest has it.
    pub guest: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub readonly: bool,
}

/// Text that is no [`Share`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot share `{text}`: {why}; expected HOST:GUEST, HOST:GUEST:ro or HOST:GUEST:rw")]
pub struct BadShare {
    text: String,
    why: &'static str,
}

impl FromStr for Share {
    type Err = BadShare;

    fn from_str(text: &str) -> Result<Self, BadShare> {
        let bad = |why| BadShare { text: text.to_owned(), why };
        let (folders, readonly) = match text.rsplit_once(':') {
            Some((folders, "ro")) => (folders, true),
            Some((folders, "rw")) => (folders, false),
            _ => (text, false),
        };
        let (path, guest) = folders.rsplit_once(':').ok_or(bad("it names no folder of the guest"))?;
        if path.is_empty() {
            return Err(bad("it names no folder of the host"));
        }
        if !guest.starts_with('/') {
            return Err(bad("the guest's folder is not an absolute path"));
        }
        Ok(Self { path: path.into(), guest: guest.into(), readonly })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.readonly { ":ro" } else { "" };
        write!(f, "{}:{}{mode}", self.path.display(), self.guest.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_folders_are_named() {
        for (text, path, guest, readonly) in [
            (".:/src", ".", "/src", false),
            ("a:b:/c", "a:b", "/c", false),
            ("/a:/b:ro", "/a", "/b", true),
            ("/a:/b:rw", "/a", "/b", false),
            ("a:/ro", "a", "/ro", false),
        ] {
            let share: Share = text.parse().unwrap();
            assert_eq!(share, Share { path: path.into(), guest: guest.into(), readonly });
            assert_eq!(share.to_string().parse::<Share>().unwrap(), share);
        }
        for (text, why) in [
            ("a", "names no folder of the guest"),
            (":/b", "of the host"),
            ("a:b", "absolute"),
            ("a:ro", "of the guest"),
        ] {
            let error = text.parse::<Share>().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
