//! Root file systems of guests: container images, archives and directories, unpacked without privileges into one
//! read-only file system, made once and cached by digest.
//!
//! ```text
//! Source --> digest --> in the cache? ------------------------------------> Image
//!                            | no                                             ^
//!                            v                                                | rename
//!            layers --> decompress, check --> archive --> tree --> erofs, in a locked folder
//!                                                    \--> contents ----^
//! ```
//!
//! Layers are merged in memory, as a tree of what files there are; the data of files goes straight to its place in the
//! image. Owners, modes and devices are only written down there, so nothing needs root, and nothing of an archive is made
//! on the host as a file. The image is EROFS without compression: distribution kernels have it, the host's page cache is
//! one copy for all guests, and writing it takes little code.
//!
//! ```no_run
//! use bantam::image::{self, Cache, Options, Source};
//!
//! let source: Source = "docker://127.0.0.1:5000/app:1".parse()?;
//! let image = image::open(&source, &Cache::of_user()?, &Options::default())?;
//! println!("{} runs {:?}", image.path().display(), image.config().command(&[]));
//! # Ok::<(), image::Error>(())
//! ```

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

pub(crate) mod archive;
pub(crate) mod cache;
pub(crate) mod compression;
mod config;
mod contents;
mod credentials;
mod curl;
pub(crate) mod digest;
mod directory;
mod erofs;
mod layer;
mod members;
mod oci;
mod reference;
mod registry;
mod source;
mod tree;

use cache::Stamp;
pub use cache::{Cache, Listed};
use compression::Compression;
pub use config::Config;
use contents::Contents;
pub use digest::{BadDigest, Digest};
use digest::{Checked, Expected};
use layer::Refused;
use members::{Layout, Members};
use oci::{Blobs, Found};
pub use reference::{BadReference, Reference};
use registry::Registry;
pub use source::Source;
use tree::Tree;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be told what to make it of.
    #[error("cannot use {text} as a root file system: {why}")]
    Source {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file, blob or answer cannot be read, or is not what it has to be.
    #[error("cannot read {what}")]
    Read {
        /// What was read.
        what: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It is whole, but of no use.
    #[error("cannot use {what}: {why}")]
    Unusable {
        /// What cannot be used.
        what: String,
        /// Why.
        why: String,
    },
    /// A layer or an archive cannot be unpacked.
    #[error("cannot unpack {layer}{}", .entry.as_ref().map(|entry| format!(", entry {entry}")).unwrap_or_default())]
    Unpack {
        /// The layer or archive.
        layer: String,
        /// The entry, if it is known.
        entry: Option<String>,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// The cache cannot be used.
    #[error("cannot {what} the image cache {}", .path.display())]
    Cache {
        /// What was attempted.
        what: &'static str,
        /// The cache.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// There is nowhere to keep images.
    #[error("cannot find the image cache: neither XDG_CACHE_HOME nor HOME is set")]
    NoHome,
    /// An image was removed right after it was made.
    #[error("cannot use image {0}: it was removed as soon as it was made")]
    Vanished(Digest),
    /// There is no such image in the cache.
    #[error("cannot find an image `{0}` in the cache (`bantam image ls` lists them)")]
    NoImage(String),
    /// Several images are meant.
    #[error("cannot tell which image `{0}` is: give more of its digest")]
    Ambiguous(String),
    /// A machine uses the image.
    #[error("cannot remove image `{0}`: it is in use")]
    InUse(String),
}

/// When to ask a registry for what a tag leads to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pull {
    /// When the tag has not been pulled before.
    #[default]
    Missing,
    /// Each time.
    Always,
    /// Never: what is not in the cache is not there.
    Never,
}

/// Hears how far a long task is. Every call may come from any thread.
pub trait Progress: Send + Sync {
    /// A part of the task begins: what it is, and how many bytes it has, if that is known.
    fn begin(&self, what: &str, bytes: Option<u64>);
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);
    /// The part is done, or has failed.
    fn end(&self);
}

/// How far an image may go. What is more is refused: it would fill the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files together, holes included; also of each archive, unpacked.
    pub bytes: u64,
    /// Files of all types.
    pub files: usize,
    /// Bytes of names, link targets and extended attributes, which are held in memory.
    pub text: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, files: 2 << 20, text: 256 << 20 }
    }
}

/// How to open an image.
#[derive(Default)]
pub struct Options<'a> {
    /// When to ask registries.
    pub pull: Pull,
    /// What images may have.
    pub limits: Limits,
    /// Who hears how far it is.
    pub progress: Option<&'a dyn Progress>,
}

/// What a root file system is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A disk of the user's, with what file system there is.
    Disk,
    /// A read-only EROFS image, which starts at the file's start. Its size is a multiple of 2 MiB.
    Erofs,
}

/// An image that can be used. It stays in the cache as long as this exists.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    format: Format,
    config: Config,
    digest: Option<Digest>,
    /// Holds the lock.
    #[expect(dead_code, reason = "it is held, not read")]
    lock: Option<File>,
}

impl Image {
    /// The file with the root file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in the file.
    pub fn format(&self) -> Format {
        self.format
    }

    /// How the image wants to be run.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The image's digest: of its manifest, of its configuration if it is of `docker save`, else of the archive; for
    /// directories of the files' names and times. A disk has none.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }
}

/// Opens a root file system: finds it in the cache, or makes it there.
///
/// # Errors
///
/// What is not an image, is hostile or broken, or cannot be had. Nothing of it stays in the cache.
pub fn open(source: &Source, cache: &Cache, options: &Options) -> Result<Image, Error> {
    let opening = Opening { source: source.to_string(), cache, options };
    match source {
        Source::Disk(path) => {
            Ok(Image { path: path.clone(), format: Format::Disk, config: Config::default(), digest: None, lock: None })
        }
        Source::Directory(path) => opening.directory(path),
        Source::Layout(path, tag) => opening.layout(path, tag.as_deref()),
        Source::Archive(path) => opening.archive(path),
        Source::Registry(reference) => opening.registry(reference),
    }
}

/// Unpacks layers that no digest tells of, the first the lowest, into the empty `image`; `scratch` is empty too.
#[cfg(fuzzing)]
pub fn unpack_layers(layers: &[&[u8]], limits: Limits, image: File, scratch: File) -> io::Result<File> {
    let mut tree = Tree::new(tree::Limits { nodes: limits.files, text: limits.text });
    let mut contents = Contents::new(image, scratch, limits.bytes);
    for layer in layers {
        let unpacked = compression::unpack(*layer)?;
        let mut unpacked = unpacked.take(limits.bytes);
        layer::unpack(&mut unpacked, true, &mut tree, &mut contents).map_err(|refused| refused.source)?;
    }
    erofs::finish(&tree, contents, [0; 16])
}

struct Opening<'a> {
    source: String,
    cache: &'a Cache,
    options: &'a Options<'a>,
}

impl Opening<'_> {
    fn read_error(&self) -> impl Fn(io::Error) -> Error + use<> {
        let what = self.source.clone();
        move |source| Error::Read { what: what.clone(), source }
    }

    fn directory(&self, path: &Path) -> Result<Image, Error> {
        let refused = |refused| unpack_error(&self.source, refused);
        let digest = directory::fingerprint(path).map_err(refused)?;
        self.build(&digest, |tree, contents| {
            directory::unpack(path, tree, contents).map_err(refused)?;
            Ok(Config::default())
        })
    }

    fn layout(&self, path: &Path, tag: Option<&str>) -> Result<Image, Error> {
        let blobs = Layout(path.to_owned());
        let mut index = vec![];
        File::open(path.join("index.json"))
            .and_then(|file| file.take(oci::JSON_MAX).read_to_end(&mut index))
            .map_err(self.read_error())?;
        let (digest, manifest) = oci::select(&blobs, &format!("oci:{}", path.display()), &index, tag)?;
        self.image(&digest, &blobs, || oci::read(&blobs, manifest))
    }

    fn registry(&self, reference: &Reference) -> Result<Image, Error> {
        // What a digest leads to never changes; it may be an index, which has another digest than the image.
        let known = match self.options.pull {
            Pull::Always if reference.digest.is_none() => None,
            _ => self.cache.name(&self.source).map(|name| name.digest).or(reference.digest),
        };
        if let Some(digest) = known
            && let Some(image) = self.cache.find(&digest)?
        {
            return Ok(image);
        }
        if self.options.pull == Pull::Never {
            return Err(Error::NoImage(self.source.clone()));
        }
        let registry = Registry::new(reference);
        let (digest, manifest) = oci::resolve(&registry, &self.source, &reference.version(), reference.digest)?;
        let image = self.image(&digest, &registry, || oci::read(&registry, manifest))?;
        self.cache.set_name(&self.source, digest, None)?;
        Ok(image)
    }

    /// An archive, which is looked into only if it has changed since the last time.
    fn archive(&self, path: &Path) -> Result<Image, Error> {
        let file = File::open(path).map_err(self.read_error())?;
        let stamp = Stamp::of(&file).map_err(self.read_error())?;
        let real = path.canonicalize().map_err(self.read_error())?;
        let name = real.to_string_lossy();
        if let Some(known) = self.cache.name(&name).filter(|known| stamp.is_some() && known.stamp == stamp)
            && let Some(image) = self.cache.find(&known.digest)?
        {
            return Ok(image);
        }
        let image = self.changed_archive(file)?;
        if let Some(digest) = image.digest {
            self.cache.set_name(&name, digest, stamp)?;
        }
        Ok(image)
    }

    fn changed_archive(&self, mut file: File) -> Result<Image, Error> {
        let mut start = vec![];
        file.by_ref().take(8).read_to_end(&mut start).map_err(self.read_error())?;
        file.seek(SeekFrom::Start(0)).map_err(self.read_error())?;
        let file = match Compression::detect(&start) {
            None => file,
            Some(_) => self.decompress(file)?,
        };
        let again = |file: &File| {
            let mut file = file.try_clone()?;
            file.seek(SeekFrom::Start(0)).map(|_| file)
        };
        let members = again(&file).and_then(Members::read);
        let members = members.map_err(|source| unpack_error(&self.source, source.into()))?;
        if let Some(members) = members {
            return self.saved(&members);
        }
        // A root file system itself.
        let mut file = again(&file).map_err(self.read_error())?;
        let digest = Digest::of_reader(&mut file).map_err(self.read_error())?;
        self.build(&digest, |tree, contents| {
            let refused = |refused| unpack_error(&self.source, refused);
            let file = again(&file).map_err(self.read_error())?;
            layer::unpack(&mut BufReader::with_capacity(256 << 10, file), false, tree, contents).map_err(refused)?;
            Ok(Config::default())
        })
    }

    /// An archive of `docker save` or of an OCI image layout; newer ones of the former are both.
    fn saved(&self, members: &Members) -> Result<Image, Error> {
        let read = |name| {
            let mut bytes = vec![];
            let member = members.member(name);
            member.and_then(|member| member.take(oci::JSON_MAX).read_to_end(&mut bytes)).map_err(self.read_error())?;
            Ok::<_, Error>(bytes)
        };
        if members.has("oci-layout") && members.has("index.json") {
            let (digest, manifest) = oci::select(members, &self.source, &read("index.json")?, None)?;
            return self.image(&digest, members, || oci::read(members, manifest));
        }
        let (digest, found) = oci::saved(members, &self.source, &read("manifest.json")?)?;
        self.image(&digest, members, || Ok(found))
    }

    /// What is in a compressed archive, in a file without a name: members are looked for by their offset.
    fn decompress(&self, file: File) -> Result<File, Error> {
        let mut unpacked = self.cache.scratch()?;
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        let packed = Watched::new(file, &self.source, Some(size), self.options.progress);
        let input = compression::unpack(BufReader::with_capacity(64 << 10, packed)).map_err(self.read_error())?;
        let mut input = Checked::new(input, Expected::default(), self.options.limits.bytes);
        io::copy(&mut input, &mut unpacked).map_err(self.read_error())?;
        Ok(unpacked)
    }

    /// An image with layers.
    fn image(
        &self,
        digest: &Digest,
        blobs: &dyn Blobs,
        found: impl FnOnce() -> Result<Found, Error>,
    ) -> Result<Image, Error> {
        self.build(digest, |tree, contents| {
            let found = found()?;
            for layer in &found.layers {
                let name = format!("layer {}", layer.name);
                self.layer(&name, layer, blobs, tree, contents).map_err(|refused| unpack_error(&name, refused))?;
            }
            Ok(found.config)
        })
    }

    fn layer(
        &self,
        name: &str,
        layer: &oci::Layer,
        blobs: &dyn Blobs,
        tree: &mut Tree,
        contents: &mut Contents,
    ) -> Result<(), Refused> {
        let limit = self.options.limits.bytes;
        let packed = blobs.open(&layer.name, layer.stored.size)?;
        let packed = Watched::new(packed, name, layer.stored.size, self.options.progress);
        let mut packed = BufReader::with_capacity(64 << 10, Checked::new(packed, layer.stored, limit));
        let unpacked = compression::unpack(&mut packed)?;
        let mut unpacked = BufReader::with_capacity(256 << 10, Checked::new(unpacked, layer.unpacked, limit));
        layer::unpack(&mut unpacked, true, tree, contents)?;
        unpacked.get_mut().finish()?;
        drop(unpacked);
        packed.get_mut().finish().map_err(Refused::from)
    }

    /// Finds the image, or makes it of what `fill` puts into the tree.
    fn build(
        &self,
        digest: &Digest,
        fill: impl FnOnce(&mut Tree, &mut Contents) -> Result<Config, Error>,
    ) -> Result<Image, Error> {
        self.cache.find_or_build(digest, &self.source, |building| {
            let Limits { bytes, files, text } = self.options.limits;
            let cache_error = |source| Error::Cache { what: "write to", path: self.cache.folder().to_owned(), source };
            let image = building.image().map_err(cache_error)?;
            let scratch = building.scratch().map_err(cache_error)?;
            let mut tree = Tree::new(tree::Limits { nodes: files, text });
            let mut contents = Contents::new(image, scratch, bytes);
            let config = fill(&mut tree, &mut contents)?;
            erofs::finish(&tree, contents, digest.uuid()).map_err(cache_error)?;
            Ok(config)
        })
    }
}

fn unpack_error(layer: &str, refused: Refused) -> Error {
    let entry = refused.entry.as_deref().map(layer::show);
    Error::Unpack { layer: layer.to_owned(), entry, source: refused.source }
}

/// A reader whose progress is told.
struct Watched<'a, R> {
    input: R,
    progress: Option<&'a dyn Progress>,
}

impl<'a, R> Watched<'a, R> {
    fn new(input: R, what: &str, size: Option<u64>, progress: Option<&'a dyn Progress>) -> Self {
        if let Some(progress) = progress {
            progress.begin(what, size);
        }
        Self { input, progress }
    }
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buf)?;
        if let Some(progress) = self.progress {
            progress.advance(read as u64);
        }
        Ok(read)
    }
}

impl<R> Drop for Watched<'_, R> {
    fn drop(&mut self) {
        if let Some(progress) = self.progress {
            progress.end();
        }
    }
}
