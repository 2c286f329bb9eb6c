//! Images: `bantam image` on real ones, made by umoci, skopeo and `docker-registry`, and on hostile archives. What is
//! unpacked is compared with what umoci makes of the same image, through `fsck.erofs`. No guest is started.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/registry.rs"]
mod docker_registry;
mod hostile;
mod layers;
mod parallel;
mod registry;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const BANTAM: &str = env!("CARGO_BIN_EXE_bantam");

/// A folder with a cache of its own.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(BANTAM);
        command.arg("image").args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("XDG_CACHE_HOME", self.path("cache")).env_remove("HOME").env_remove("DOCKER_CONFIG");
        command
    }

    fn bantam(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Where the image is that `source` makes.
    fn pull(&self, source: &str) -> PathBuf {
        let output = self.bantam(&["pull", source]);
        assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().into()
    }

    /// What bantam says of a source that it refuses. It leaves nothing in the cache.
    fn refused(&self, source: &str) -> String {
        let output = self.bantam(&["pull", source]);
        assert_eq!(output.status.code(), Some(125), "{source}: {output:?}");
        assert_eq!(self.cached(), Vec::<String>::new(), "{source}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// What is in the cache, but for names.
    fn cached(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("cache/bantam/images")).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "names").collect()
    }

    /// Runs a program that has to succeed.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output =
            Command::new(program).args(arguments).current_dir(self.folder.path()).stdin(Stdio::null()).output();
        let output = output.unwrap_or_else(|error| panic!("{program} (resources/setup.sh test installs it): {error}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// All files of an image: what `fsck.erofs` takes out of it, after it has checked it.
    fn files(&self, image: &Path) -> Vec<String> {
        let folder = format!("extracted-{}", self.folder.path().read_dir().unwrap().count());
        // Only root can give files away; the others' files are their own everywhere.
        let owners = if rustix::process::geteuid().is_root() { "--preserve-owner" } else { "--no-preserve-owner" };
        let extract = format!("--extract={folder}");
        self.run("fsck.erofs", &["-d0", &extract, "--preserve-perms", owners, image.to_str().unwrap()]);
        self.listing(&folder)
    }

    /// Type, permissions, owner, size, time, link target and digest of every file below a folder. The sizes and times of
    /// directories are the host's, and fsck.erofs takes set-user-id bits away: those are looked at elsewhere.
    fn listing(&self, folder: &str) -> Vec<String> {
        let script =
            "cd \"$0\" && find . ! -type d -printf '%P %y %m %U %G %s %T@ %l\\n' -o -printf '%P %y %m %U %G\\n' &&
            find . -type f -exec sha256sum {} +";
        let mut lines: Vec<_> = self.run("sh", &["-c", script, folder]).lines().map(String::from).collect();
        lines.sort();
        lines
    }

    /// What `dump.erofs` tells of a file.
    fn dump(&self, image: &Path, path: &str) -> String {
        self.run("dump.erofs", &[&format!("--path={path}"), image.to_str().unwrap()])
    }

    /// Writes an archive.
    fn archive(&self, name: &str, write: impl FnOnce(&mut tar::Builder<fs::File>)) -> String {
        let mut builder = tar::Builder::new(fs::File::create(self.path(name)).unwrap());
        write(&mut builder);
        builder.finish().unwrap();
        name.to_owned()
    }
}

/// Two listings are the same; where not, only the difference is shown.
fn assert_same(found: &[String], expected: &[String]) {
    let without = |all: &[String], others: &[String]| -> Vec<_> {
        all.iter().filter(|line| !others.contains(line)).cloned().collect()
    };
    assert_eq!(without(found, expected), without(expected, found));
}

/// A header of an entry with these permissions.
fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header
}

fn add_file(builder: &mut tar::Builder<fs::File>, path: &str, data: &[u8]) {
    builder.append_data(&mut header(tar::EntryType::Regular, 0o644, data.len()), path, data).unwrap();
}

fn add_link(builder: &mut tar::Builder<fs::File>, kind: tar::EntryType, path: &str, target: &str) {
    builder.append_link(&mut header(kind, 0o777, 0), path, target).unwrap();
}
