//! What the fuzz targets share: a guest's driver that is up to anything, and what has to hold whatever it does.

pub mod device;
mod given;
pub mod input;
pub mod memory;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A folder of this process, with nothing in it at first, in `TMPDIR`: fast if that is in memory.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("bantam-fuzz-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).expect("a folder");
        folder
    })
}
