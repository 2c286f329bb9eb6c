//! What a run writes must not be what it reads: a console in place of a disk's data is not what anybody wanted.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bantam::config::Config;
use bantam::devices::console;

/// A file that is written and read.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the {output} to {}: it is the machine's {input}", .path.display())]
pub struct Error {
    output: &'static str,
    path: PathBuf,
    input: &'static str,
}

/// Refuses to write the serial console, or one of the `others`, to a file that the machine is made of.
pub fn check(config: &Config, others: [(&'static str, Option<&Path>); 3]) -> Result<(), Error> {
    let serial = match &config.serial {
        console::Spec::File(path) => Some(path.as_path()),
        _ => None,
    };
    let outputs = others.into_iter().chain([("serial console", serial)]);
    let mut outputs = outputs.filter_map(|(output, path)| Some((output, path?))).peekable();
    if outputs.peek().is_none() {
        return Ok(());
    }
    let overlay = config.overlay.iter().map(|overlay| overlay.path.clone());
    let disks: Vec<_> = config.all_disks().map(|disk| disk.path).chain(overlay).collect();
    let kernel = [("kernel", config.kernel.as_deref()), ("initrd", config.initrd.as_deref())];
    let inputs = kernel.into_iter().chain(disks.iter().map(|path| ("disk", Some(path.as_path()))));
    let inputs: Vec<_> = inputs.filter_map(|(input, path)| Some((input, identity(path?)?))).collect();
    for (output, path) in outputs {
        let same = identity(path).and_then(|file| inputs.iter().find(|(_, input)| *input == file));
        if let Some((input, _)) = same {
            return Err(Error { output, path: path.to_owned(), input });
        }
    }
    Ok(())
}

/// What tells a file or a block device from others, whatever its path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    let kind = metadata.file_type();
    match (kind.is_file(), kind.is_block_device()) {
        (true, _) => Some((metadata.dev(), metadata.ino())),
        (_, true) => Some((u64::MAX, metadata.rdev())),
        _ => None,
    }
}
