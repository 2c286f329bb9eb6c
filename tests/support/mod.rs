//! Runs bantam with real guests: a kernel and an initramfs from target/guest, and a script for the guest.
//!
//! ```ignore
//! let ended = Guest::new(Kernel::Tiny).cpus(2).disk("disk.img").script("sha256sum /dev/vda").run();
//! assert!(ended.succeeded().stdout.contains(&hash));
//! ```
#![allow(dead_code, reason = "no test program uses all of it")]
#![allow(clippy::unwrap_used, reason = "it is for tests")]

mod cpio;
pub mod payload;
mod running;
pub mod screen;

use std::ffi::OsStr;
use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use tempfile::TempDir;

pub use running::{Ended, Running};

/// How long a guest may take. An emulated host boots one in 5 to 10 seconds when it is not busy.
const LIMIT: Duration = Duration::from_secs(300);

/// What a guest prints after its script, if all of the script's commands succeeded.
const SUCCEEDED: &str = "test.sh: status 0";

/// What comes before a guest's script.
const PROLOGUE: &str = r#"
trap 'echo "test.sh: status $?"' EXIT
set -e
program() { name=$1; shift; /ld-linux-x86-64.so.2 --library-path / "/$name" "$@"; }
"#;

/// The kernels that resources/setup.sh prepares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's, with virtio drivers as modules, and ACPI.
    Debian61,
    /// Debian 13's.
    Debian612,
    /// A small one with all drivers built in, and no ACPI.
    Tiny,
}

impl Kernel {
    /// One of the files that come with it: `vmlinux`, `initramfs.cpio`, ...
    pub fn file(self, name: &str) -> PathBuf {
        let folder = match self {
            Self::Debian61 => "debian-6.1",
            Self::Debian612 => "debian-6.12",
            Self::Tiny => "tiny",
        };
        file(&format!("{folder}/{name}"))
    }

    /// The ELF kernel.
    pub fn vmlinux(self) -> PathBuf {
        self.file("vmlinux")
    }

    /// The compressed kernel.
    pub fn bzimage(self) -> PathBuf {
        self.file(if self == Self::Tiny { "bzImage" } else { "vmlinuz" })
    }
}

/// A file that resources/setup.sh prepares in target/guest.
pub fn file(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(name);
    assert!(path.exists(), "{} is missing: run resources/test.sh, which makes it", path.display());
    path
}

/// A `bantam run` to be, with a report and a time limit, and files in a folder of its own that goes when it ends.
pub struct Guest {
    command: Command,
    cmdline: String,
    folder: TempDir,
    limit: Duration,
    /// The root file system's image, and the command to run in it.
    root: Option<PathBuf>,
    words: Vec<String>,
}

impl Guest {
    /// A guest with bantam's default machine, and the ELF kernel of `kernel`. Its script does nothing.
    pub fn new(kernel: Kernel) -> Self {
        Self::with_image(kernel, kernel.vmlinux())
    }

    /// A guest with a kernel from a file, and the initramfs of `kernel`.
    pub fn with_image(kernel: Kernel, image: impl AsRef<OsStr>) -> Self {
        Self::bare(image).initramfs_root(kernel).script("")
    }

    /// A guest with a kernel from a file, and nothing but a command to run: it needs a root.
    pub fn running(image: impl AsRef<OsStr>, words: &[&str]) -> Self {
        Self { words: words.iter().map(|word| word.to_string()).collect(), ..Self::bare(image) }
    }

    fn bare(image: impl AsRef<OsStr>) -> Self {
        let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
        assert!(opened.is_ok(), "cannot open /dev/kvm: run resources/test.sh, which finds a host that has it");
        let folder = TempDir::new().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command.arg("run").arg("--kernel").arg(image);
        command.arg("--report").arg(folder.path().join("report.json"));
        capture(&mut command);
        Self { command, cmdline: "quiet".into(), folder, limit: LIMIT, root: None, words: vec![] }
    }

    /// Has the initramfs of `kernel` for its root.
    pub fn initramfs_root(mut self, kernel: Kernel) -> Self {
        let initramfs = self.folder.path().join("initramfs.cpio");
        fs::copy(kernel.file("initramfs.cpio"), &initramfs).unwrap();
        self.command.arg("--initrd").arg(initramfs);
        self
    }

    /// Has an image with a root file system.
    pub fn root(mut self, image: &Path) -> Self {
        self.root = Some(image.into());
        self
    }

    /// Adds a flag and its value.
    pub fn option(mut self, flag: &str, value: impl Display) -> Self {
        self.command.arg(flag).arg(value.to_string());
        self
    }

    /// Adds a flag without a value.
    pub fn flag(mut self, flag: &str) -> Self {
        self.command.arg(flag);
        self
    }

    /// `--cpus`.
    pub fn cpus(self, count: u32) -> Self {
        self.option("--cpus", count)
    }

    /// `--memory`.
    pub fn memory(self, size: &str) -> Self {
        self.option("--memory", size)
    }

    /// `--disk`.
    pub fn disk(self, spec: impl Display) -> Self {
        self.option("--disk", spec)
    }

    /// `--net`.
    pub fn net(self, spec: impl Display) -> Self {
        self.option("--net", spec)
    }

    /// Adds text to the kernel's command line, which is `quiet` and what bantam itself puts there.
    pub fn cmdline(mut self, text: &str) -> Self {
        self.cmdline += &format!(" {text}");
        self
    }

    /// The guest runs this in its shell, to the first command that fails, and powers off.
    pub fn script(self, script: &str) -> Self {
        let script = format!("{PROLOGUE}\n{script}\n");
        // Archives that follow one another are unpacked in this order: the last test.sh stays.
        self.file("test.sh", script.as_bytes())
    }

    /// The guest has this file in its root folder.
    pub fn file(self, name: &str, content: &[u8]) -> Self {
        let initramfs = self.folder.path().join("initramfs.cpio");
        let mut initramfs = fs::OpenOptions::new().append(true).open(initramfs).unwrap();
        initramfs.write_all(&cpio::archive(name, content)).unwrap();
        self
    }

    /// The guest has this program of the host's `PATH`, with its libraries: `program NAME ARGUMENT...` runs it.
    pub fn program(self, name: &str) -> Self {
        let output = |program: &str, argument: &str| {
            let output = Command::new(program).arg(argument).output().unwrap();
            assert!(output.status.success(), "{program} {argument}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let path = output("which", name).trim().to_owned();
        let libraries = output("ldd", &path);
        let files = libraries.split_whitespace().filter(|word| word.starts_with('/'));
        files.chain([&*path]).fold(self, |guest, file| {
            guest.file(Path::new(file).file_name().unwrap().to_str().unwrap(), &fs::read(file).unwrap())
        })
    }

    /// Runs bantam in a network namespace that `ip netns` knows by this name. What [`Guest::command`] changed before is
    /// lost.
    pub fn inside(mut self, namespace: &str) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(self.command.get_program()).args(self.command.get_args());
        capture(&mut command);
        self.command = command;
        self
    }

    /// The time it may take, in place of two minutes.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The command as it is now, to change its streams, environment or working folder.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// A folder that lasts as long as this guest.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs it to its end, without input.
    pub fn run(self) -> Ended {
        self.start().wait()
    }

    /// Starts it with input from [`Running::write`].
    pub fn spawn(mut self) -> Running {
        self.command.stdin(Stdio::piped());
        self.start()
    }

    /// Starts it with its command's streams as they are: no input, output to be looked at.
    pub fn start(mut self) -> Running {
        self.command.arg("--cmdline").arg(&self.cmdline).args(&self.root);
        if !self.words.is_empty() {
            self.command.arg("--").args(&self.words);
        }
        Running::start(&mut self.command, self.folder, self.limit)
    }
}

/// No input, and output to be looked at.
fn capture(command: &mut Command) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
}

/// Bytes that no two pages of are the same, and that compress badly.
pub fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = vec![0; size];
    for word in bytes.chunks_mut(8) {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()[..word.len()]);
    }
    bytes
}

/// A hash as sha256sum prints it.
pub fn sha256(bytes: &[u8]) -> String {
    let mut sha256sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    sha256sum.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = sha256sum.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}
