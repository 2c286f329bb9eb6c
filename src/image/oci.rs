//! Reading images as the OCI image specification and Docker describe them: indexes, manifests, configurations.

use std::io::{self, Read};

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;

use super::config::Config;
use super::digest::{Checked, Digest, Expected};
use super::{Error, archive};

/// The most that an index, manifest or configuration may have, in bytes: what registries allow.
pub(super) const JSON_MAX: u64 = 4 << 20;
/// How deep indexes may be in each other.
const INDEXES_MAX: usize = 4;
/// The most layers of an image.
const LAYERS_MAX: usize = 1024;

/// Where blobs come from.
pub(super) trait Blobs {
    /// Opens a blob. Whoever reads it checks it.
    fn open(&self, name: &str, size: Option<u64>) -> io::Result<Box<dyn Read + '_>>;

    /// Opens an index or a manifest.
    fn open_manifest(&self, name: &str) -> io::Result<Box<dyn Read + '_>> {
        self.open(name, None)
    }
}

/// One layer, and what has to come of it.
#[derive(Debug)]
pub(super) struct Layer {
    /// By which [`Blobs`] know it.
    pub name: String,
    pub stored: Expected,
    pub unpacked: Expected,
}

/// An image to be unpacked.
#[derive(Debug)]
pub(super) struct Found {
    pub layers: Vec<Layer>,
    pub config: Config,
}

fn unusable(what: &str, why: impl Into<String>) -> Error {
    Error::Unusable { what: what.to_owned(), why: why.into() }
}

/// Reads a small blob and checks it.
pub(super) fn read_json(
    blobs: &dyn Blobs,
    what: &str,
    name: &str,
    expected: Expected,
    manifest: bool,
) -> Result<Vec<u8>, Error> {
    let read = || {
        let input = if manifest { blobs.open_manifest(name)? } else { blobs.open(name, expected.size)? };
        let mut input = Checked::new(input, expected, JSON_MAX);
        let mut bytes = vec![];
        input.read_to_end(&mut bytes)?;
        input.finish()?;
        Ok(bytes)
    };
    read().map_err(|source| Error::Read { what: what.to_owned(), source })
}

fn parse<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::Read { what: what.to_owned(), source: error.into() })
}

/// What SHA-256 digest and size a descriptor tells.
fn expected(descriptor: &Descriptor) -> Result<(Digest, Expected), Error> {
    let text = descriptor.digest().to_string();
    let digest = text.parse().map_err(|_| unusable(&text, "only SHA-256 digests are known"))?;
    Ok((digest, Expected { digest: Some(digest), size: Some(descriptor.size()) }))
}

/// Whether these are bytes of an index, and not of a manifest.
fn is_index(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Either {
        manifests: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_slice(bytes).is_ok_and(|either: Either| either.manifests.is_some())
}

/// Which of the images of an index is for this machine.
fn choose<'a>(what: &str, index: &'a ImageIndex, tag: Option<&str>) -> Result<&'a Descriptor, Error> {
    let named = |descriptor: &&Descriptor| {
        let Some(tag) = tag else { return true };
        let Some(annotations) = descriptor.annotations() else { return false };
        let name = annotations.get("org.opencontainers.image.ref.name");
        // Docker puts the whole name into an annotation of containerd's.
        let whole = annotations.get("io.containerd.image.name");
        name.is_some_and(|name| name == tag)
            || whole.is_some_and(|name| name == tag || name.ends_with(&format!(":{tag}")))
    };
    let arch = if cfg!(target_arch = "aarch64") { Arch::ARM64 } else { Arch::Amd64 };
    let fits = |descriptor: &&Descriptor| match descriptor.platform() {
        Some(platform) => *platform.os() == Os::Linux && *platform.architecture() == arch,
        None => true,
    };
    let tagged: Vec<_> = index.manifests().iter().filter(named).collect();
    let fitting: Vec<_> = tagged.iter().copied().filter(fits).collect();
    match fitting.as_slice() {
        [one] => Ok(one),
        [first, ..] if fitting.iter().all(|other| other.digest() == first.digest()) => Ok(first),
        // Of several for one platform the first is the best (OCI image specification, "Image Index").
        [first, ..] if first.platform().is_some() => Ok(first),
        [_, ..] => {
            let names = fitting.iter().filter_map(|descriptor| descriptor.annotations().as_ref());
            let names = names.filter_map(|all| all.get("org.opencontainers.image.ref.name")).cloned();
            let names = names.collect::<Vec<_>>().join(", ");
            Err(unusable(what, format!("it has several images, say which: {what}:TAG (there are: {names})")))
        }
        [] if tagged.is_empty() && tag.is_some() => {
            Err(unusable(what, format!("it has no image with the tag `{}`", tag.unwrap_or_default())))
        }
        [] => Err(unusable(what, format!("it has no image for linux/{arch}"))),
    }
}

/// The digest of the manifest that an index leads to, and of each index on the way the bytes are read.
pub(super) fn select(
    blobs: &dyn Blobs,
    what: &str,
    index: &[u8],
    tag: Option<&str>,
) -> Result<(Digest, Expected), Error> {
    let mut bytes = index.to_vec();
    let mut tag = tag;
    for _ in 0..INDEXES_MAX {
        let index: ImageIndex = parse(&format!("the index of {what}"), &bytes)?;
        let descriptor = choose(what, &index, tag)?;
        let (digest, expected) = expected(descriptor)?;
        if !descriptor.media_type().to_string().contains("index")
            && !descriptor.media_type().to_string().contains("list")
        {
            return Ok((digest, expected));
        }
        bytes = read_json(blobs, &format!("index {digest} of {what}"), &digest.to_string(), expected, true)?;
        tag = None;
    }
    Err(unusable(what, format!("more than {INDEXES_MAX} indexes are in each other")))
}

/// The manifest for this machine that a reference of a registry leads to: its digest, and its bytes if they are read.
pub(super) fn resolve(
    blobs: &dyn Blobs,
    what: &str,
    version: &str,
    digest: Option<Digest>,
) -> Result<(Digest, Expected), Error> {
    let bytes = read_json(blobs, &format!("the manifest of {what}"), version, Expected { digest, size: None }, true)?;
    if is_index(&bytes) {
        return select(blobs, what, &bytes, None);
    }
    let digest = Digest::of(&bytes);
    Ok((digest, Expected { digest: Some(digest), size: Some(bytes.len() as u64) }))
}

/// Reads a manifest and the configuration that it names.
pub(super) fn read(blobs: &dyn Blobs, manifest: Expected) -> Result<Found, Error> {
    let name = manifest.digest.map(|digest| digest.to_string()).unwrap_or_default();
    let bytes = read_json(blobs, &format!("manifest {name}"), &name, manifest, true)?;
    let manifest: ImageManifest = parse(&format!("manifest {name}"), &bytes)?;
    let kind = manifest.config().media_type().to_string();
    if !matches!(
        kind.as_str(),
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    ) {
        return Err(unusable(&name, format!("it is no container image: its configuration has the media type {kind}")));
    }
    let (digest, config_expected) = expected(manifest.config())?;
    let what = format!("configuration {digest}");
    let bytes = read_json(blobs, &what, &digest.to_string(), config_expected, false)?;
    let (config, diff_ids) = read_config(&digest.to_string(), &bytes)?;
    check_count(&name, manifest.layers().len(), diff_ids.len())?;
    let mut layers = vec![];
    for (layer, diff_id) in manifest.layers().iter().zip(diff_ids) {
        let (digest, stored) = expected(layer)?;
        let kind = layer.media_type().to_string();
        let known = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
        if !known.iter().any(|known| kind.starts_with(known)) || kind.contains("encrypted") {
            return Err(unusable(&format!("layer {digest}"), format!("its media type {kind} is not known")));
        }
        let unpacked = Expected { digest: Some(diff_id), size: None };
        layers.push(Layer { name: digest.to_string(), stored, unpacked });
    }
    Ok(Found { layers, config })
}

fn check_count(what: &str, layers: usize, diff_ids: usize) -> Result<(), Error> {
    if layers != diff_ids {
        return Err(unusable(what, format!("it has {layers} layers, and its configuration {diff_ids}")));
    }
    if layers > LAYERS_MAX {
        return Err(unusable(what, format!("it has {layers} layers, more than {LAYERS_MAX}")));
    }
    Ok(())
}

/// What a configuration says, and the digests of the unpacked layers.
fn read_config(name: &str, bytes: &[u8]) -> Result<(Config, Vec<Digest>), Error> {
    let image: ImageConfiguration = parse(&format!("configuration {name}"), bytes)?;
    if *image.os() != Os::Linux {
        return Err(unusable(name, format!("it is an image for {}, not Linux", image.os())));
    }
    let diff_ids = image.rootfs().diff_ids().iter().map(|text| text.parse());
    let diff_ids = diff_ids.collect::<Result<_, _>>().map_err(|_| unusable(name, "only SHA-256 digests are known"))?;
    Ok((Config::from(&image), diff_ids))
}

/// An image in the `manifest.json` of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The digest of the configuration of the one image that `docker save` has written, which is the image's id for Docker.
pub(super) fn saved(blobs: &dyn Blobs, what: &str, manifest: &[u8]) -> Result<(Digest, Found), Error> {
    let images: Vec<Saved> = parse(&format!("manifest.json of {what}"), manifest)?;
    let [image] = images.as_slice() else {
        let tags: Vec<_> = images.iter().flat_map(|image| image.repo_tags.iter().flatten()).cloned().collect();
        return Err(unusable(
            what,
            format!("it has {} images, and only one is possible: {}", images.len(), tags.join(", ")),
        ));
    };
    let what_config = format!("configuration {}", image.config);
    let bytes = read_json(blobs, &what_config, &image.config, Expected::default(), false)?;
    let id = Digest::of(&bytes);
    let claimed = image.config.trim_end_matches(".json").rsplit('/').next().unwrap_or_default();
    if claimed.len() == 64 && claimed != id.hex() {
        return Err(Error::Read { what: what_config, source: archive::invalid(format!("its digest is {id}")) });
    }
    let (config, diff_ids) = read_config(&image.config, &bytes)?;
    check_count(what, image.layers.len(), diff_ids.len())?;
    let layers = image.layers.iter().zip(diff_ids).map(|(name, diff_id)| Layer {
        name: name.clone(),
        stored: Expected::default(),
        unpacked: Expected { digest: Some(diff_id), size: None },
    });
    Ok((id, Found { layers: layers.collect(), config }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::HashMap;

    #[derive(Default)]
    struct Memory(HashMap<String, Vec<u8>>);

    impl Memory {
        /// Adds a blob, and gives a descriptor of it.
        fn add(&mut self, kind: &str, value: &Value) -> Value {
            let bytes = value.to_string().into_bytes();
            let digest = Digest::of(&bytes).to_string();
            let size = bytes.len();
            self.0.insert(digest.clone(), bytes);
            json!({"mediaType": kind, "digest": digest, "size": size})
        }
    }

    impl Blobs for Memory {
        fn open(&self, name: &str, _size: Option<u64>) -> io::Result<Box<dyn Read + '_>> {
            let blob = self.0.get(name).ok_or(io::ErrorKind::NotFound)?;
            Ok(Box::new(blob.as_slice()))
        }
    }

    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

    fn with(mut descriptor: Value, key: &str, value: Value) -> Value {
        descriptor[key] = value;
        descriptor
    }

    fn platform(descriptor: &Value, os: &str, architecture: &str) -> Value {
        with(descriptor.clone(), "platform", json!({"os": os, "architecture": architecture}))
    }

    fn index(manifests: &[Value]) -> Value {
        json!({"schemaVersion": 2, "manifests": manifests})
    }

    fn select_of(blobs: &Memory, index: &Value, tag: Option<&str>) -> Result<String, Error> {
        select(blobs, "it", index.to_string().as_bytes(), tag).map(|(digest, _)| digest.to_string())
    }

    #[test]
    fn the_image_for_this_machine_is_chosen() {
        let mut blobs = Memory::default();
        let [own, other] = ["own", "other"].map(|name| blobs.add(MANIFEST, &json!({"name": name})));
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        // As buildx makes it: with an attestation, which is for no platform.
        let inner = index(&[
            platform(&other, "linux", "s390x"),
            platform(&other, "windows", arch),
            platform(&own, "linux", arch),
            platform(&other, "unknown", "unknown"),
        ]);
        assert_eq!(select_of(&blobs, &inner, None).unwrap(), own["digest"]);
        let inner = blobs.add(INDEX, &inner);
        let outer = index(&[with(inner, "annotations", json!({"org.opencontainers.image.ref.name": "v1"}))]);
        assert_eq!(select_of(&blobs, &outer, Some("v1")).unwrap(), own["digest"]);
        assert!(select_of(&blobs, &outer, Some("v2")).unwrap_err().to_string().contains("no image with the tag"));
        let foreign = index(&[platform(&other, "linux", "s390x")]);
        assert!(select_of(&blobs, &foreign, None).unwrap_err().to_string().contains("no image for linux/"));
    }

    #[test]
    fn of_several_images_one_has_to_be_named() {
        let mut blobs = Memory::default();
        let images = ["a", "b"].map(|tag| {
            let image = blobs.add(MANIFEST, &json!({"name": tag}));
            with(image, "annotations", json!({"org.opencontainers.image.ref.name": tag}))
        });
        let said = select_of(&blobs, &index(&images), None).unwrap_err().to_string();
        assert!(said.contains("a, b"), "{said}");
        assert_eq!(select_of(&blobs, &index(&images), Some("b")).unwrap(), images[1]["digest"]);
    }

    #[test]
    fn indexes_in_each_other_have_an_end() {
        let mut blobs = Memory::default();
        let mut descriptor = blobs.add(MANIFEST, &json!({}));
        for _ in 0..INDEXES_MAX {
            descriptor = blobs.add(INDEX, &index(&[descriptor]));
        }
        assert!(select_of(&blobs, &index(&[descriptor]), None).is_err());
    }
}
