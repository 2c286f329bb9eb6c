//! The file that keeps what a command changes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Size;

/// A file that keeps what a command changes in its root file system: `[path=]FILE[,size=SIZE][,base=TEXT]`.
///
/// ```
/// use bantam::config::{Overlay, Size, kv};
/// let overlay: Overlay = kv::from_str("changes.img,size=2G")?;
/// assert_eq!(overlay.size(), Size::gib(2));
/// # Ok::<(), kv::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Overlay {
    /// The file; made if it is not there.
    pub path: PathBuf,
    /// How large it is made, if it is not there; of one that is there this has to be the size. 10 GiB if it is not said,
    /// of which only what is used takes room.
    #[serde(default)]
    pub size: Option<Size>,
    /// What the root file system is told by: the changes are those of one, and make no sense with another. If it is not
    /// said, the identifier that the root's file system has.
    #[serde(default)]
    pub base: Option<String>,
}

impl Overlay {
    /// The size of one that does not say.
    pub const SIZE: Size = Size::gib(10);
    /// The least that a file system with a journal fits into.
    pub const MIN: Size = Size::mib(64);

    /// One at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), size: None, base: None }
    }

    /// The size that it is made with.
    pub fn size(&self) -> Size {
        self.size.unwrap_or(Self::SIZE)
    }
}
