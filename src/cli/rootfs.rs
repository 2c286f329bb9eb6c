//! ROOTFS that is not a disk: a directory, an archive or an image, which is made into a disk in the cache, and says itself
//! how it wants to be run.

use std::io;
use std::path::{Path, PathBuf};

use bantam::command;
use bantam::config::Config;
use bantam::image::{self, Cache, Image, Options, Source};

use super::progress::ProgressLine;

/// Why ROOTFS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, or nobody may look.
    #[error(
        "cannot open root file system {} (ROOTFS is a directory, a disk image, an archive, oci:DIRECTORY[:TAG] or \
         docker://NAME{})", .path.display(), value_hint(.path)
    )]
    Missing {
        /// What was given.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There is no image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// There is nothing to run.
    #[error("cannot run {}: it names no command, and none is given (bantam run ROOTFS -- COMMAND)", .0.display())]
    NoCommand(PathBuf),
    /// It is to be written to.
    #[error(
        "cannot write to {}: --rw is for disk images and directories, and this becomes a read-only image (--overlay FILE \
         keeps changes)", .0.display()
    )]
    Writable(PathBuf),
}

/// What to do about a ROOTFS that was meant for the option before it.
fn value_hint(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_jail = ["uid=", "gid=", "cgroup="].iter().any(|key| text.starts_with(key));
    if is_jail { format!("; --jail takes what is behind an equals sign: --jail={text}") } else { String::new() }
}

/// Opens the root file system of `config` if it is no disk, and completes `config` by what it says. It is in use as long
/// as what is returned.
pub fn open(config: &mut Config) -> Result<Option<Image>, Error> {
    let Some(path) = config.rootfs.clone() else { return Ok(None) };
    let text = path.to_string_lossy();
    let is_reference = text.starts_with("docker://") || text.starts_with("oci:");
    if !is_reference && let Err(source) = path.metadata() {
        return Err(Error::Missing { path, source });
    }
    let source: Source = text.parse()?;
    if matches!(source, Source::Disk(_)) {
        return Ok(None);
    }
    let asked = config.command.clone().unwrap_or_default();
    match &source {
        Source::Directory(_) if asked.rw && asked.arguments.is_empty() => return Err(Error::NoCommand(path)),
        // It is shared as it is.
        Source::Directory(_) if asked.rw => return Ok(None),
        _ if asked.rw => return Err(Error::Writable(path)),
        _ => {}
    }
    let line = ProgressLine::default();
    let options = Options { progress: Some(&line), ..Options::default() };
    let image = image::open(&source, &Cache::of_user()?, &options)?;
    let command = complete(asked, image.config());
    if command.arguments.is_empty() {
        return Err(Error::NoCommand(path));
    }
    if let (Source::Directory(path), Some(overlay)) = (&source, &mut config.overlay) {
        // Its image is another one whenever a file has changed.
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        overlay.base.get_or_insert_with(|| format!("directory:{}", real.display()));
    }
    *config = std::mem::take(config).rootfs(image.path()).command(command);
    Ok(Some(image))
}

/// The command as it was asked for, and for the rest as the image says.
fn complete(asked: command::Spec, image: &image::Config) -> command::Spec {
    let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    command::Spec {
        arguments: image.command(&asked.arguments),
        // What was asked for comes later, and wins.
        env: [image.env.clone(), asked.env].concat(),
        workdir: asked.workdir.or_else(|| given(&image.working_dir)),
        user: asked.user.or_else(|| given(&image.user)),
        ..asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_asked_for_is_as_the_image_says() {
        let image = image::Config {
            entrypoint: vec!["env".into()],
            cmd: vec!["sh".into()],
            env: vec!["A=1".into(), "B=2".into()],
            working_dir: "/app".into(),
            user: String::new(),
        };
        let expected =
            command::Spec { env: image.env.clone(), workdir: Some("/app".into()), ..command::Spec::new(["env", "sh"]) };
        assert_eq!(complete(command::Spec::default(), &image), expected);
        let asked = command::Spec {
            env: vec!["A=3".into()],
            workdir: Some("/".into()),
            user: Some("me".into()),
            ..command::Spec::new(["ls"])
        };
        let completed = complete(asked.clone(), &image);
        let expected = command::Spec {
            arguments: vec!["env".into(), "ls".into()],
            env: vec!["A=1".into(), "B=2".into(), "A=3".into()],
            ..asked
        };
        assert_eq!(completed, expected);
    }
}
