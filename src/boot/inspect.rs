//! Looking into a kernel without booting it: what it is, and what it was configured with.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use super::find;
use super::kernel::{self, Compression, Entry, Format};
use crate::memory::{self, GuestRam, reserve};

/// A kernel could not be looked into.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not load.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// There is no memory to load it to.
    #[error("cannot reserve memory to look into the kernel")]
    Memory(#[from] memory::Error),
}

/// What a kernel is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// The format of its file.
    pub format: Format,
    /// How its payload is compressed, if it is and that is known.
    pub compression: Option<Compression>,
    /// Whether only the guest can unpack it; what is inside then stays unknown.
    pub packed: bool,
    /// Whether it is entered by its PVH note, not by the 64-bit boot protocol.
    pub pvh: bool,
    /// The guest-physical address of its entry point.
    pub entry: u64,
    /// Its version, as `/proc/version` has it after "Linux version".
    pub version: Option<String>,
    /// Whether it has ACPI.
    pub acpi: bool,
    /// The configuration embedded in it (`CONFIG_IKCONFIG`), as in `/proc/config.gz`.
    #[serde(skip)]
    pub config: Option<String>,
}

/// Enough memory for any kernel; only what the kernel fills is taken.
const MEMORY: Range<u64> = 0..1 << 30;
/// More than any configuration, in bytes: Debian's is 280 KiB.
const CONFIG_MAX: u64 = 4 << 20;

/// Loads the kernel at `path` into memory of its own and looks around.
///
/// # Errors
/// As [`kernel::load`].
pub fn inspect(path: &Path) -> Result<Inspection, Error> {
    let ram = reserve(&[MEMORY])?;
    let kernel = kernel::load(&ram, path)?;
    let (pvh, entry) = match kernel.entry {
        Entry::Pvh { entry, .. } => (true, entry),
        Entry::Linux64 { entry, .. } => (false, entry),
    };
    Ok(Inspection {
        format: kernel.format,
        compression: kernel.compression,
        packed: kernel.packed,
        pvh,
        entry,
        version: kernel.version.or_else(|| version(&ram, kernel.range.clone())),
        acpi: kernel.acpi,
        config: config(&ram, kernel.range),
    })
}

/// The version in the banner of a kernel that was loaded to `range`.
pub fn version(ram: &GuestRam, range: Range<u64>) -> Option<String> {
    let prefix = b"Linux version ";
    let start = find(ram, range, prefix)? + prefix.len() as u64;
    let mut text = [0; 256];
    let size = ram.read(&mut text, GuestAddress(start)).ok()?;
    let end = text[..size].iter().position(|byte| matches!(byte, 0 | b'\n'))?;
    Some(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The configuration, which the kernel keeps gzipped between two marks.
fn config(ram: &GuestRam, range: Range<u64>) -> Option<String> {
    let mark = b"IKCFG_ST";
    let start = find(ram, range.clone(), mark)? + mark.len() as u64;
    let end = find(ram, start..range.end.min(start + CONFIG_MAX), b"IKCFG_ED")?;
    let mut packed = vec![0; usize::try_from(end - start).ok()?];
    ram.read_slice(&mut packed, GuestAddress(start)).ok()?;
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed.as_slice()).take(CONFIG_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::fixture::{self, DATA, bzimage, elf, patch, payload};
    use std::io::Write;

    fn inspect_bytes(bytes: &[u8]) -> Inspection {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        inspect(file.path()).unwrap()
    }

    #[test]
    fn an_elf_tells_its_version_and_configuration() {
        let mut config = b"IKCFG_ST".to_vec();
        flate2::read::GzEncoder::new(&b"CONFIG_VIRTIO_MMIO=y\n"[..], flate2::Compression::best())
            .read_to_end(&mut config)
            .unwrap();
        config.extend(b"IKCFG_ED");
        let mut bytes = elf();
        patch(&mut bytes, DATA + 0x80, config);
        assert_eq!(
            inspect_bytes(&bytes),
            Inspection {
                format: Format::Elf,
                compression: None,
                packed: false,
                pvh: true,
                entry: 0x10_0020,
                version: Some("6.1.0-test (me@here) #1".into()),
                acpi: true,
                config: Some("CONFIG_VIRTIO_MMIO=y\n".into()),
            }
        );
    }

    #[test]
    fn a_configuration_without_an_end_or_damaged_is_none() {
        for tail in [&b"IKCFG_ST\x1f\x8b"[..], b"IKCFG_ST\x1f\x8bIKCFG_ED", b"IKCFG_STIKCFG_ED"] {
            let mut bytes = elf();
            patch(&mut bytes, fixture::DATA_END - tail.len(), tail);
            assert_eq!(inspect_bytes(&bytes).config, None);
        }
    }

    #[test]
    fn what_is_packed_stays_unknown() {
        let inspection = inspect_bytes(&bzimage(&payload(Compression::Lzma)));
        assert_eq!((inspection.packed, inspection.pvh, inspection.config), (true, false, None));
        assert_eq!(inspection.version.as_deref(), Some("6.1.0-test (me@here) #1"));
    }
}
