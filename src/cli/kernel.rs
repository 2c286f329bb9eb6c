//! `bantam kernel`, and what `--kernel` names.

use std::io;
use std::path::{Path, PathBuf};

use bantam::kernels::{self, Kernels, Listed};
use clap::Subcommand;
use rustix::fs::Access;

/// The kernel in the cache that is taken without `--kernel`, if there is one of this name.
const DEFAULT: &str = "default";

pub const EXAMPLES: &str = "\
Examples:
  Debian's kernel for virtual machines, with the modules that bantam loads:
    apt download linux-image-6.1.0-42-cloud-amd64
    bantam kernel import debian linux-image-*.deb
    bantam run --kernel debian ./rootfs -- uname -r

  One that has everything built in and starts sooner, for all machines without --kernel:
    sudo apt install linux-source
    bantam kernel build";

/// The kernels in the cache.
#[derive(Debug, Subcommand)]
pub enum Kernel {
    /// List the kernels in the cache.
    Ls {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Take a kernel into the cache, with the modules that bantam loads.
    Import {
        /// The name for --kernel. What has it is replaced. `default` is taken where no --kernel is given.
        #[arg(value_name = "NAME")]
        name: String,
        /// A vmlinux, a bzImage, a folder with one of them, or a Debian package: linux-image-*.deb.
        #[arg(value_name = "SOURCE")]
        source: PathBuf,
        /// Take its modules from here: lib/modules/VERSION, a folder with that, or a package.
        ///
        /// Else they are those in SOURCE, beside it, or in /.
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
    },
    /// Compile a small kernel with everything built in, which takes minutes, and take it into the cache.
    Build {
        /// The name for --kernel.
        #[arg(value_name = "NAME", default_value = DEFAULT)]
        name: String,
        /// The kernel's source, a tar archive [default: the newest linux-source-* in /usr/src].
        #[arg(long, value_name = "FILE")]
        source: Option<PathBuf>,
    },
    /// Remove kernels from the cache.
    Rm {
        /// Their names.
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

/// Why there is no kernel to boot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot find a kernel: no --kernel is given, none is named `{DEFAULT}` (`bantam kernel import {DEFAULT} FILE` names \
         one), and {path} cannot be read"
    )]
    None {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot load kernel {name}: No such file or directory, and {source}")]
    Unknown { name: String, source: kernels::Error },
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
}

impl Kernel {
    /// Does what is asked for, and adds to `told` what to print, also of what was done before a failure.
    pub fn run(&self, told: &mut String) -> Result<(), kernels::Error> {
        let kernels = Kernels::of_user()?;
        match self {
            Self::Ls { json: true } => *told += &format!("{:#}\n", serde_json::json!(kernels.list()?)),
            Self::Ls { json: false } => *told += &table(&kernels.list()?),
            Self::Import { name, source, modules } => {
                *told += &line(&kernels.import(name, source, modules.as_deref())?);
            }
            Self::Build { name, source } => *told += &line(&kernels.build(name, source.as_deref())?),
            Self::Rm { names } => {
                for name in names {
                    *told += &line(&kernels.remove(name)?);
                }
            }
        }
        Ok(())
    }
}

fn table(list: &[Listed]) -> String {
    let width = |text: fn(&Listed) -> &str| list.iter().map(|it| text(it).len()).max().unwrap_or(0).max(7);
    let (names, versions) = (width(|it| &it.name), width(|it| &it.version));
    let row = |name: &str, version: &str, modules: &str, size: &str, source: &str| {
        format!("{name:names$}  {version:versions$}  {modules:7}  {size:5}  {source}\n")
    };
    let rows = list.iter().map(|it| {
        let modules = it.modules.map_or("none".into(), |count| count.to_string());
        row(&it.name, &it.version, &modules, &megabytes(it.size), &it.source)
    });
    [row("NAME", "VERSION", "MODULES", "SIZE", "SOURCE")].into_iter().chain(rows).collect()
}

/// A kernel in one line.
fn line(it: &Listed) -> String {
    let modules = match it.modules {
        Some(count) => format!("{count} modules"),
        None => "no modules".into(),
    };
    format!("{}: Linux {}, {modules}, {}\n", it.name, it.version, megabytes(it.size))
}

fn megabytes(bytes: u64) -> String {
    format!("{}M", bytes.div_ceil(1 << 20))
}

/// Finds the kernel: `asked` is a path, or the name of one in the cache if it has no slash and nothing is there. Without
/// one it is that of the name `default`, or the one that this host runs. One in the cache stays as it is for as long as
/// what is returned.
pub fn find(asked: Option<&Path>) -> Result<(PathBuf, Option<kernels::Kernel>), Error> {
    let found = |kernel: kernels::Kernel| (kernel.path().to_owned(), Some(kernel));
    let Some(path) = asked else {
        return match Kernels::of_user().and_then(|kernels| kernels.find(DEFAULT)) {
            Ok(Some(kernel)) => Ok(found(kernel)),
            Ok(None) | Err(kernels::Error::NoHome) => Ok((running_kernel()?, None)),
            Err(error) => Err(error.into()),
        };
    };
    let name = path.as_os_str().to_str().filter(|name| !name.contains('/') && !path.exists());
    let Some(name) = name else { return Ok((path.to_owned(), None)) };
    match Kernels::of_user()?.open(name) {
        Err(source @ kernels::Error::Unknown { .. }) => Err(Error::Unknown { name: name.into(), source }),
        opened => Ok(found(opened?)),
    }
}

/// The kernel that this host runs, where distributions put it.
fn running_kernel() -> Result<PathBuf, Error> {
    let path = format!("/boot/vmlinuz-{}", rustix::system::uname().release().to_string_lossy());
    match rustix::fs::access(&path, Access::READ_OK) {
        Ok(()) => Ok(path.into()),
        Err(source) => Err(Error::None { path, source: source.into() }),
    }
}
