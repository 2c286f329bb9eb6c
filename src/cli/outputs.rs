//! What a run writes must not be what it reads: a console in place of a disk's data is not what anybody wanted.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bantam::config::Config;
use bantam::devices::console;

/// A file that is written, and something else as well.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the {output} to {}: it is {is}", .path.display())]
pub struct Error {
    output: &'static str,
    path: PathBuf,
    is: String,
}

/// Refuses to write the serial console, or one of the `others`, to a file that the machine is made of, or where another is
/// written.
pub fn check(config: &Config, others: &[(&'static str, Option<&Path>)]) -> Result<(), Error> {
    let serial = match &config.serial {
        console::Spec::File(path) => Some(path.as_path()),
        _ => None,
    };
    let outputs = others.iter().copied().chain([("serial console", serial)]);
    let mut outputs = outputs.filter_map(|(output, path)| Some((output, path?))).peekable();
    if outputs.peek().is_none() {
        return Ok(());
    }
    let overlay = config.overlay.iter().map(|overlay| overlay.path.clone());
    let disks: Vec<_> = config.all_disks().map(|disk| disk.path).chain(overlay).collect();
    let kernel = [("kernel", config.kernel.as_deref()), ("initrd", config.initrd.as_deref())];
    let inputs = kernel.into_iter().chain(disks.iter().map(|path| ("disk", Some(path.as_path()))));
    let inputs = inputs.filter_map(|(input, path)| Some((format!("the machine's {input}"), identity(path?)?)));
    let mut taken: Vec<_> = inputs.collect();
    for (output, path) in outputs {
        let Some(file) = identity(path) else { continue };
        if let Some((is, _)) = taken.iter().find(|(_, taken)| *taken == file) {
            return Err(Error { output, path: path.to_owned(), is: is.clone() });
        }
        taken.push((format!("where the {output} goes"), file));
    }
    Ok(())
}

/// What tells a file or a block device from others, whatever its path.
#[derive(PartialEq)]
enum Identity {
    /// Device and inode.
    File(u64, u64),
    Disk(u64),
    /// One that is still to be made: its folder, and its name there.
    New(PathBuf, OsString),
}

fn identity(path: &Path) -> Option<Identity> {
    let Ok(metadata) = fs::metadata(path) else {
        return Some(Identity::New(super::folder(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    };
    let kind = metadata.file_type();
    match (kind.is_file(), kind.is_block_device()) {
        (true, _) => Some(Identity::File(metadata.dev(), metadata.ino())),
        (_, true) => Some(Identity::Disk(metadata.rdev())),
        _ => None,
    }
}
