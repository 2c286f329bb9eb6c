//! Kernels by name: `bantam kernel` with Debian's packages, what it refuses, processes in parallel and killed, and the
//! script that builds a kernel, with a compiler that only pretends. No guest is started.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod build;
mod parallel;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const BANTAM: &str = env!("CARGO_BIN_EXE_bantam");

/// A file that resources/setup.sh puts into target/guest.
fn guest(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(name);
    assert!(path.exists(), "{} is missing: run resources/test.sh, which makes it", path.display());
    path.to_str().unwrap().to_owned()
}

/// A folder with a cache of its own.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(BANTAM);
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    /// What bantam prints.
    #[track_caller]
    fn bantam(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Checks that bantam refuses, with these words.
    #[track_caller]
    fn refuses(&self, arguments: &[&str], words: &[&str]) {
        refused(&self.command(arguments).output().unwrap(), words);
    }

    /// What `kernel ls --json` lists.
    fn list(&self) -> Vec<serde_json::Value> {
        serde_json::from_str(&self.bantam(&["kernel", "ls", "--json"])).unwrap()
    }

    /// What is where kernels are kept.
    fn cached(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("cache/bantam/kernels")).into_iter().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(125), String::new()), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn packages_are_imported_with_the_modules_that_are_loaded() {
    let place = Place::new();
    for (name, version) in [("debian-6.1", "6.1."), ("debian-6.12", "6.12.")] {
        let package = guest(&format!("{name}/package.deb"));
        let said = place.bantam(&["kernel", "import", name, &package]);
        assert!(said.starts_with(&format!("{name}: Linux {version}")), "{said}");
        let listed = place.list().into_iter().find(|listed| listed["name"] == name).unwrap();
        assert!(listed["version"].as_str().unwrap().starts_with(version), "{listed}");
        assert!((10..100).contains(&listed["modules"].as_u64().unwrap()), "{listed}");
        assert_eq!(listed["source"], *package);
        // Both are unpacked.
        let path = Path::new(listed["path"].as_str().unwrap());
        assert!(fs::read(path).unwrap().starts_with(b"\x7fELF"));
        let modules = path.with_file_name("lib/modules").join(listed["version"].as_str().unwrap());
        for module in ["virtio_mmio.ko", "overlay.ko", "vmw_vsock_virtio_transport.ko", "erofs.ko"] {
            assert!(fs::read(modules.join(module)).unwrap().starts_with(b"\x7fELF"), "{module}");
        }
        // Its configuration came with it.
        // The host may not be ready.
        let check = text(&place.command(&["check", "--kernel", name]).output().unwrap().stdout);
        assert!(check.contains("CONFIG_VIRTIO_BLK") && check.contains(version), "{check}");
        let config = place.bantam(&["run", "--kernel", name, "--print-config"]);
        assert!(config.contains(path.to_str().unwrap()), "{config}");
    }
    let table = place.bantam(&["kernel", "ls"]);
    assert!(table.starts_with("NAME         VERSION ") && table.lines().count() == 3, "{table}");
    place.refuses(
        &["run", "--kernel", "debian"],
        &["cannot load kernel debian: No such file", "those that have been imported are debian-6.1, debian-6.12"],
    );
    let removed = place.bantam(&["kernel", "rm", "debian-6.1", "debian-6.12"]);
    assert!(removed.starts_with("debian-6.1: ") && removed.contains("\ndebian-6.12: "), "{removed}");
    assert_eq!(place.cached(), Vec::<String>::new());
}

#[test]
fn what_was_removed_before_a_failure_is_told() {
    let place = Place::new();
    place.bantam(&["kernel", "import", "one", &guest("tiny/vmlinux")]);
    let output = place.command(&["kernel", "rm", "one", "two"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stdout).starts_with("one: Linux 6.1."), "{}", text(&output.stdout));
    assert!(text(&output.stderr).starts_with("bantam: cannot find the kernel `two`"), "{}", text(&output.stderr));
    assert_eq!(place.cached(), Vec::<String>::new());
}

#[test]
fn files_and_folders_are_imported_and_replaced() {
    let place = Place::new();
    let import = |source: &str| place.bantam(&["kernel", "import", "k", source]);
    assert!(import(&guest("tiny/vmlinux")).contains("no modules"));
    let whole = fs::read(guest("tiny/vmlinux")).unwrap();
    let path = PathBuf::from(place.list()[0]["path"].as_str().unwrap());
    assert_eq!((fs::read(&path).unwrap() == whole, path.file_name().unwrap().to_str()), (true, Some("vmlinux")));
    // What is in a bzImage is the same; a folder has its kernel by its name.
    import(&guest("tiny/bzImage"));
    assert!(fs::read(&path).unwrap() == whole);
    import(&guest("tiny"));
    assert!(fs::read(&path).unwrap() == whole);
    // What is no kernel, as a cleaner of caches may leave it, is replaced as well.
    fs::remove_file(path.with_file_name("kernel.json")).unwrap();
    import(&guest("tiny/vmlinux"));
    assert_eq!(place.list().len(), 1);
    // Modules beside it, and given.
    assert!(!import(&guest("debian-6.1/vmlinuz")).contains("no modules"));
    fs::copy(guest("debian-6.1/vmlinuz"), place.path("vmlinuz")).unwrap();
    let said = place.bantam(&["kernel", "import", "k", "vmlinuz", "--modules", &guest("debian-6.1/package.deb")]);
    assert!(!said.contains("no modules"), "{said}");
    assert_eq!((place.list().len(), place.cached()), (1, vec!["k".to_owned()]));
}

#[test]
fn the_kernel_named_default_is_the_default() {
    let place = Place::new();
    place.bantam(&["kernel", "import", "default", &guest("tiny/vmlinux")]);
    let config = place.bantam(&["run", "--print-config"]);
    assert!(config.contains("/kernels/default/vmlinux"), "{config}");
    // A file is taken before a name.
    place.write("default", "");
    let config = place.bantam(&["run", "--kernel", "default", "--print-config"]);
    assert!(config.contains("\"kernel\": \"default\""), "{config}");
}

#[test]
fn without_any_kernel_it_is_told_how_to_name_one() {
    let release = Command::new("uname").arg("-r").output().unwrap().stdout;
    let running = format!("/boot/vmlinuz-{}", text(&release).trim());
    // The host's own would be taken.
    if fs::File::open(&running).is_err() {
        let words = ["cannot find a kernel: no --kernel is given", "`bantam kernel import default FILE`", &running];
        Place::new().refuses(&["run", "--print-config"], &words);
    }
}

#[test]
fn what_is_no_kernel_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let import = |source: &str, words: &[&str]| place.refuses(&["kernel", "import", "k", source], words);
    import("missing", &["cannot load kernel missing: No such file"]);
    import(&place.write("text", "#!/bin/sh\n"), &["text: it is neither an ELF file nor a bzImage"]);
    fs::create_dir_all(place.path("folder/boot")).unwrap();
    import("folder", &["cannot find a kernel in folder: it has no vmlinux"]);
    place.write("folder/boot/vmlinuz-1", "");
    place.write("folder/boot/vmlinuz-2", "");
    import("folder", &["cannot tell which kernel of folder is meant: it has vmlinuz-1, vmlinuz-2"]);

    let package = fs::read(guest("debian-6.1/package.deb")).unwrap();
    import(&place.write("cut.deb", &package[..package.len() / 2]), &["cannot read the package", "cut.deb: "]);
    import(&place.write("empty.deb", &package[..8]), &["empty.deb: it has no data.tar, or is cut off"]);
    // Modules only.
    let busybox = guest("busybox/package.deb");
    import(&busybox, &["cannot find a kernel in", "busybox/package.deb"]);

    let kernel = guest("debian-6.1/vmlinuz");
    let words = ["cannot find kernel modules in folder: it has no modules, nor lib/modules/6.1."];
    place.refuses(&["kernel", "import", "k", &kernel, "--modules", "folder"], &words);
    for name in ["", "../k", ".k", "a/b", "a b"] {
        place.refuses(&["kernel", "import", name, &kernel], &["cannot name a kernel", name]);
        place.refuses(&["kernel", "build", name], &["cannot name a kernel", name]);
    }
    for name in ["k", "..", ""] {
        place.refuses(&["kernel", "rm", name], &["cannot find the kernel", name, "none has been imported"]);
    }
    assert_eq!(place.cached(), Vec::<String>::new());
    let words = ["neither XDG_CACHE_HOME nor HOME is set"];
    let mut homeless = place.command(&["kernel", "ls"]);
    refused(&homeless.env_remove("XDG_CACHE_HOME").env_remove("HOME").output().unwrap(), &words);
}
