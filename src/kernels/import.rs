//! Finding a kernel and its modules in what they are imported from, and copying what is needed of both.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::{About, Error, cache_error, package};
use crate::boot::inspect::inspect;
use crate::boot::kernel::{self, Format};
use crate::boot::modules::{self, Modules};
use crate::check::config_beside;
use crate::command::MODULES;

/// Where kernels are in a folder, the first that is there; of those with a `*` at the end there must be one.
const PLACES: [&str; 6] = ["arch/x86/boot/bzImage", "vmlinux", "vmlinuz", "bzImage", "boot/vmlinuz-*", "vmlinuz-*"];

/// Imports a kernel into the folder `new` of `to`, which is empty.
pub(super) fn import(source: &Path, modules: Option<&Path>, to: &Path) -> Result<About, Error> {
    let unpacked = to.join("package");
    let root = if package::is_package(source) {
        package::unpack(source, &unpacked)?;
        unpacked.as_path()
    } else {
        source
    };
    let kernel = if root.is_dir() { find(root, source)? } else { root.to_owned() };
    let found = inspect(&kernel)?;
    let version = found.version.as_deref().and_then(modules::release);
    let modules = match (modules, version) {
        (Some(given), None) => return Err(Error::NoVersion(given.into())),
        (Some(given), Some(version)) if package::is_package(given) => {
            let unpacked = to.join("modules");
            package::unpack(given, &unpacked)?;
            Some(Modules::open(&unpacked, version)?)
        }
        (Some(given), Some(version)) => Some(Modules::open(given, version)?),
        (None, Some(version)) => match Modules::open(root, version) {
            Err(modules::Error::None { .. }) => Modules::find(&kernel, version)?,
            found => Some(found?),
        },
        (None, None) => None,
    };

    let new = to.join("new");
    fs::create_dir(&new).map_err(cache_error("write to", &new))?;
    let file = copy_kernel(&kernel, &new)?;
    let copied = match (&modules, version) {
        (Some(modules), Some(version)) => Some(modules.copy(MODULES, &new.join("lib/modules").join(version))?),
        _ => None,
    };
    let version = version.unwrap_or_default();
    if let Some(config) = config_beside(&kernel, found.version.as_deref()).filter(|_| found.config.is_none()) {
        let path = new.join(format!("config-{version}"));
        fs::write(&path, config).map_err(cache_error("write", &path))?;
    }
    Ok(About { file, version: version.into(), modules: copied, source: source.display().to_string() })
}

/// The kernel in `root`; `source` is what the user calls it.
fn find(root: &Path, source: &Path) -> Result<PathBuf, Error> {
    for place in PLACES {
        let Some(prefix) = place.strip_suffix('*') else {
            let path = root.join(place);
            if path.is_file() {
                return Ok(path);
            }
            continue;
        };
        let (folder, prefix) = prefix.rsplit_once('/').unwrap_or(("", prefix));
        let entries = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
        names.sort_unstable();
        match names.as_slice() {
            [] => {}
            [name] => return Ok(root.join(folder).join(name)),
            _ => return Err(Error::Ambiguous { folder: source.into(), found: names }),
        }
    }
    Err(Error::NoKernel(source.into()))
}

/// Copies the kernel, unpacked if that can be done here; its name.
fn copy_kernel(kernel: &Path, new: &Path) -> Result<String, Error> {
    let partial = new.join("partial");
    let mut file = File::create_new(&partial).map_err(cache_error("write", &partial))?;
    let name = match kernel::extract(kernel, &mut file)? {
        Format::Elf => "vmlinux",
        Format::BzImage => "bzImage",
    };
    let named = file.sync_all().and_then(|()| fs::rename(&partial, new.join(name)));
    named.map_err(cache_error("write", &partial))?;
    Ok(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_found_where_kernels_are() {
        let root = tempfile::tempdir().unwrap();
        let source = Path::new("x");
        assert!(matches!(find(root.path(), source), Err(Error::NoKernel(_))));
        fs::create_dir(root.path().join("boot")).unwrap();
        let write = |name: &str| fs::write(root.path().join(name), "").unwrap();
        write("vmlinuz-1");
        write("vmlinuz-2");
        let message = find(root.path(), source).unwrap_err().to_string();
        assert_eq!(message, "cannot tell which kernel of x is meant: it has vmlinuz-1, vmlinuz-2");
        write("boot/vmlinuz-3");
        assert_eq!(find(root.path(), source).unwrap(), root.path().join("boot/vmlinuz-3"));
        write("bzImage");
        assert_eq!(find(root.path(), source).unwrap(), root.path().join("bzImage"));
    }
}
