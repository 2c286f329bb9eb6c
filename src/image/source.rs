//! What a root file system comes from, told apart by what it is.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::Error;
use super::archive;
use super::compression::Compression;
use super::reference::Reference;

/// What a root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A raw disk image or a block device.
    Disk(PathBuf),
    /// A directory.
    Directory(PathBuf),
    /// An OCI image layout: a directory with `oci-layout`, and the tag of one of its images.
    Layout(PathBuf, Option<String>),
    /// A tar archive, perhaps compressed: of `docker save`, of an OCI image layout, or of the files themselves. Which of
    /// them is known only when it is read.
    Archive(PathBuf),
    /// An image in a registry.
    Registry(Reference),
}

/// The names that archives have.
const ENDINGS: [&str; 7] = [".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst", ".tzst"];

impl Source {
    fn tell(text: &str) -> Result<Self, Error> {
        let wrong = |why: String| Error::Source { text: text.to_owned(), why };
        if text.starts_with("docker://") {
            return text.parse().map(Source::Registry).map_err(|error: super::BadReference| wrong(error.to_string()));
        }
        if let Some(layout) = text.strip_prefix("oci:") {
            // A path may have a colon, a tag no slash.
            let (path, tag) = match layout.rsplit_once(':') {
                Some((path, tag)) if !tag.contains('/') && !Path::new(layout).exists() => (path, Some(tag.to_owned())),
                _ => (layout, None),
            };
            let path = PathBuf::from(path);
            if !path.join("oci-layout").exists() {
                return Err(wrong(format!("{} is no OCI image layout: it has no file oci-layout", path.display())));
            }
            return Ok(Source::Layout(path, tag));
        }
        let path = PathBuf::from(text);
        let metadata = fs::metadata(&path).map_err(|source| Error::Read { what: text.to_owned(), source })?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            let layout = path.join("oci-layout").is_file() && path.join("index.json").is_file();
            return Ok(if layout { Source::Layout(path, None) } else { Source::Directory(path) });
        }
        if kind.is_block_device() {
            return Ok(Source::Disk(path));
        }
        if !kind.is_file() {
            return Err(wrong("it is neither a file nor a directory".into()));
        }
        let mut start = vec![];
        File::open(&path)
            .and_then(|file| file.take(archive::BLOCK as u64).read_to_end(&mut start))
            .map_err(|source| Error::Read { what: text.to_owned(), source })?;
        let by_name = ENDINGS.iter().any(|ending| text.ends_with(ending));
        if by_name || archive::is_archive(&start) || Compression::detect(&start).is_some() {
            return Ok(Source::Archive(path));
        }
        Ok(Source::Disk(path))
    }
}

impl FromStr for Source {
    type Err = Error;

    /// Looks at what `text` names.
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::tell(text)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Disk(path) | Source::Directory(path) | Source::Archive(path) => path.display().fmt(f),
            Source::Layout(path, None) => write!(f, "oci:{}", path.display()),
            Source::Layout(path, Some(tag)) => write!(f, "oci:{}:{tag}", path.display()),
            Source::Registry(reference) => reference.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let tell = |name: &str| Source::tell(&path(name)).unwrap();
        fs::write(path("disk"), [0; 4096]).unwrap();
        assert_eq!(tell("disk"), Source::Disk(path("disk").into()));
        let mut header = tar::Header::new_gnu();
        header.set_path("f").unwrap();
        header.set_cksum();
        fs::write(path("archive"), header.as_bytes()).unwrap();
        assert_eq!(tell("archive"), Source::Archive(path("archive").into()));
        fs::write(path("packed"), [0x1f, 0x8b, 8]).unwrap();
        assert_eq!(tell("packed"), Source::Archive(path("packed").into()));
        fs::write(path("empty.tar"), [0; 1024]).unwrap();
        assert_eq!(tell("empty.tar"), Source::Archive(path("empty.tar").into()));
        fs::create_dir(path("root")).unwrap();
        assert_eq!(tell("root"), Source::Directory(path("root").into()));
        assert!(
            Source::tell(&format!("oci:{}", path("root"))).unwrap_err().to_string().contains("no OCI image layout")
        );
        fs::create_dir(path("layout")).unwrap();
        fs::write(path("layout/oci-layout"), "{}").unwrap();
        fs::write(path("layout/index.json"), "{}").unwrap();
        assert_eq!(tell("layout"), Source::Layout(path("layout").into(), None));
        let tagged = Source::tell(&format!("oci:{}:v1", path("layout"))).unwrap();
        assert_eq!(tagged, Source::Layout(path("layout").into(), Some("v1".into())));
        assert!(matches!(Source::tell("docker://localhost:5000/a").unwrap(), Source::Registry(_)));
        for bad in [path("missing"), "docker://A".into(), "/dev/null".into()] {
            assert!(Source::tell(&bad).is_err(), "{bad}");
        }
    }
}
