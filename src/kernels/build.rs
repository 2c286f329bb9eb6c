//! Building a kernel for guests from the distribution's source: the script and the configuration are in this program.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Error, Kernels, Listed, cache_error};

const SCRIPT: &str = include_str!("../../resources/guest-kernel/linux.sh");
const CONFIG: &str = include_str!("../../resources/guest-kernel/bantam.config");

impl Kernels {
    /// Compiles a kernel with all that bantam's guests need built in, and imports it. `source` is an archive of a kernel's
    /// source; without one it is that of the package `linux-source`. It takes minutes, and says so on standard error; what
    /// was built before is not built again.
    ///
    /// # Errors
    /// When it cannot be compiled, which the script has said more of on standard error, or be imported.
    pub fn build(&self, name: &str, source: Option<&Path>) -> Result<Listed, Error> {
        if !super::is_name(name) {
            return Err(Error::Name(name.into()));
        }
        let folder = self.folder.join(".linux");
        let (script, config) = (folder.join("linux.sh"), folder.join("bantam.config"));
        fs::create_dir_all(&folder).map_err(cache_error("make", &folder))?;
        for (path, text) in [(&script, SCRIPT), (&config, CONFIG)] {
            // A shell may be reading it now.
            let temporary = path.with_extension(std::process::id().to_string());
            let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path));
            written.map_err(cache_error("write", path))?;
        }
        // Where no other build puts its own; it goes with this.
        let output = self.begin(name).map_err(cache_error("write to", &self.folder))?;
        let kernel = output.path.join("vmlinux");
        let arguments = [script.as_os_str(), config.as_os_str(), folder.as_os_str()];
        let source = source.map(Path::as_os_str);
        let mut sh = Command::new(OsStr::new("sh"));
        sh.args(arguments).args(source).env("OUTPUT", &kernel).stdin(Stdio::null()).stdout(Stdio::null());
        let status = sh.status().map_err(cache_error("start", Path::new("sh")))?;
        if !status.success() {
            return Err(Error::Build(status));
        }
        self.import_from(name, &kernel, None, "bantam kernel build")
    }
}
