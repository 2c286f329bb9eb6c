//! What a kernel has.

use std::error::Error;
use std::path::Path;

use super::{Row, Table, without_number};
use crate::boot::inspect::{self, Inspection};
use crate::boot::modules::release;

/// The options of a kernel's configuration that bantam's devices need, and what does not work without.
const OPTIONS: [(&str, &str); 10] = [
    ("SERIAL_8250_CONSOLE", "nothing is seen on the serial console"),
    ("BLK_DEV_INITRD", "no --initrd"),
    ("VIRTIO_MMIO", "no virtio devices"),
    ("VIRTIO_BLK", "no --disk"),
    ("VIRTIO_NET", "no --net"),
    ("HW_RANDOM_VIRTIO", "no randomness from the host"),
    ("VIRTIO_VSOCKETS", "no COMMAND, no --vsock"),
    ("OVERLAY_FS", "no COMMAND whose root can be written to, but by --rw"),
    ("EROFS_FS", "no COMMAND in a directory, an archive or a container image"),
    ("VIRTIO_FS", "no --share"),
];

/// Looks into the kernel at `path`, without booting it. If it has no configuration in it, `config-VERSION` beside it is
/// taken. Of a file that is no kernel that could be booted the one row says why.
pub fn kernel(path: &Path) -> Table {
    let found = match inspect::inspect(path) {
        Ok(found) => found,
        Err(error) => return Table(vec![Row::missing("format", reason(&error))]),
    };
    let config = found.config.clone().or_else(|| config_beside(path, found.version.as_deref()));
    Table(rows(&found, config.as_deref()))
}

/// An error with its causes.
fn reason(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let texts: Vec<_> = causes.map(|error| without_number(&error.to_string())).collect();
    texts.join(": ")
}

fn rows(found: &Inspection, config: Option<&str>) -> Vec<Row> {
    let format = if found.format == crate::boot::kernel::Format::Elf { "ELF" } else { "bzImage" };
    let entry = if found.pvh { "its PVH note" } else { "the 64-bit boot protocol" };
    let mut rows = vec![Row::ok("format", format!("{format}, entered by {entry} at {:#x}", found.entry))];
    rows.extend(found.version.as_deref().and_then(release).map(|release| Row::ok("version", release)));
    rows.extend(match (found.compression, found.packed) {
        (Some(compression), false) => Some(Row::ok("compression", format!("{compression}, unpacked by bantam"))),
        (Some(compression), true) => {
            Some(Row::absent("compression", format!("{compression}: the guest unpacks it, which takes time")))
        }
        (None, true) => {
            Some(Row::absent("compression", "not one that bantam reads: the guest unpacks it, which takes time"))
        }
        (None, false) => None,
    });
    rows.push(if found.acpi {
        Row::ok("ACPI", "")
    } else {
        Row::absent("ACPI", "it finds its devices by the MP table and virtio_mmio.device= instead")
    });
    match config {
        Some(config) => rows.extend(OPTIONS.map(|(name, loss)| option(config, name, loss))),
        None => rows.push(Row::absent(
            "configuration",
            "it has none in it (CONFIG_IKCONFIG), and there is no config-VERSION beside it: its drivers are not known",
        )),
    }
    rows
}

/// What a configuration says of an option.
fn option(config: &str, name: &str, loss: &str) -> Row {
    let setting = config.lines().find_map(|line| line.strip_prefix("CONFIG_")?.strip_prefix(name)?.strip_prefix('='));
    let row_name = format!("CONFIG_{name}");
    match setting {
        Some("y") => Row::ok(row_name, ""),
        Some("m") => Row::ok(row_name, "module: load it in the initrd (for a COMMAND bantam does)"),
        _ if name == "SERIAL_8250_CONSOLE" => Row::missing(row_name, loss),
        _ => Row::absent(row_name, loss),
    }
}

/// The configuration in the same folder: `config-VERSION`, the version as the kernel tells it, or as its name does:
/// `vmlinuz-VERSION`.
pub(crate) fn config_beside(path: &Path, version: Option<&str>) -> Option<String> {
    let told = version.and_then(release);
    let named = path.file_name()?.to_str()?.split_once('-').map(|(_, version)| version);
    let mut candidates = [told, named].into_iter().flatten().map(|v| path.with_file_name(format!("config-{v}")));
    candidates.find_map(|config| std::fs::read_to_string(config).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    const CONFIG: &str = "CONFIG_VIRTIO_BLK=m\n# CONFIG_VIRTIO_NET is not set\nCONFIG_VIRTIO_MMIO=y\n\
                          CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n";

    #[test]
    fn what_is_no_kernel_is_missing_one() {
        let folder = tempfile::tempdir().unwrap();
        let table = kernel(&folder.path().join("none"));
        assert!(!table.is_ready());
        let detail = format!("cannot load kernel {}/none: No such file or directory", folder.path().display());
        assert_eq!(table, Table(vec![Row::missing("format", detail)]));
    }

    #[test]
    fn options_are_told() {
        let status = |name| option(CONFIG, name, "loss").status;
        assert_eq!(status("VIRTIO_MMIO"), Status::Ok);
        assert_eq!(status("VIRTIO_NET"), Status::Absent);
        assert_eq!(status("VIRTIO"), Status::Absent, "a longer name is another option");
        assert_eq!(status("SERIAL_8250_CONSOLE"), Status::Missing);
        let module = option(CONFIG, "VIRTIO_BLK", "loss");
        assert_eq!(
            (module.status, module.detail.as_str()),
            (Status::Ok, "module: load it in the initrd (for a COMMAND bantam does)")
        );
    }

    #[test]
    fn a_configuration_lies_beside_its_kernel() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config-6.1.0-42-amd64"), CONFIG).unwrap();
        let beside = |name: &str, version| config_beside(&folder.path().join(name), version);
        assert_eq!(beside("vmlinuz-6.1.0-42-amd64", None).as_deref(), Some(CONFIG));
        assert_eq!(beside("vmlinuz", Some("6.1.0-42-amd64 (builder) #1")).as_deref(), Some(CONFIG));
        assert_eq!(beside("vmlinuz-6.1", Some("6.1")), None);
    }
}
