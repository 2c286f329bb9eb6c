//! Images of containers, in a layout's folder or in an archive: indexes, manifests, configurations and layers that tell of one
//! another as they should, or nearly.
#![no_main]

use std::fs;
use std::path::Path;

use bantam::image::{self, Cache, Digest, Image, Limits, Options, Source};
use bantam_fuzz::input::{self, Result, Unstructured};
use serde_json::{Value, json};

const LIMITS: Limits = Limits { bytes: 1 << 20, files: 1000, text: 64 << 10 };
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const KINDS: [&str; 9] = [
    INDEX,
    MANIFEST,
    CONFIG,
    LAYER,
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.container.image.v1+json",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.oci.image.layer.v1.tar+encrypted",
    "",
];
const TAG: &str = "org.opencontainers.image.ref.name";
const NAMES: [&str; 8] = ["f", "g", "d/f", "d/g", ".wh.f", "d/.wh.g", "e/.wh..wh..opq", "e/h"];

/// An image that is being made.
struct Made {
    /// By their paths in the layout or archive.
    files: Vec<(String, Vec<u8>)>,
    /// Nothing of it is otherwise than it should be.
    is_right: bool,
}

/// Whether to do something wrong.
fn wrong(u: &mut Unstructured) -> Result<bool> {
    Ok(!u.ratio(31, 32)?)
}

/// A file in an archive.
fn member(name: &str, data: &[u8], archive: &mut Vec<u8>) {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.extend(header);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

fn layer(u: &mut Unstructured) -> Result<Vec<u8>> {
    let mut archive = vec![];
    for _ in 0..u.int_in_range(0..=4)? {
        let name = *u.choose(&NAMES)?;
        let data = if name.contains(".wh.") { vec![] } else { vec![u.arbitrary()?; u.int_in_range(0..=5000)?] };
        member(name, &data, &mut archive);
    }
    archive.resize(archive.len() + 1024, 0);
    Ok(archive)
}

impl Made {
    /// Spoils bytes now and then.
    fn spoil(&mut self, u: &mut Unstructured, bytes: &mut Vec<u8>) -> Result<()> {
        if wrong(u)? {
            self.is_right = false;
            match u.int_in_range(0..=3)? {
                0 => bytes.truncate(u.int_in_range(0..=bytes.len())?),
                1 => bytes.extend(input::bytes(u, 40)?),
                2 if !bytes.is_empty() => {
                    let at = u.choose_index(bytes.len())?;
                    bytes[at] = u.arbitrary()?;
                }
                _ => *bytes = input::bytes(u, 400)?,
            }
        }
        Ok(())
    }

    /// Adds a blob at a path that its digest gives, and tells of it.
    fn blob(&mut self, u: &mut Unstructured, kind: &str, bytes: &[u8]) -> Result<Value> {
        let digest = Digest::of(bytes);
        let mut told = json!({"mediaType": kind, "digest": digest, "size": bytes.len()});
        if wrong(u)? {
            self.is_right = false;
            let name = digest.to_string();
            let other = self.files.last().map_or(String::new(), |(path, _)| path.replace("blobs/sha256/", "sha256:"));
            match u.int_in_range(0..=4)? {
                0 => {
                    let digests = [
                        &name.to_uppercase(),
                        "sha512:00",
                        "",
                        "sha256:../../../secret",
                        "sha256:",
                        &other,
                        &name[..70],
                    ];
                    told["digest"] = (*u.choose(&digests)?).into();
                }
                1 => told["size"] = input::number(u)?.into(),
                2 => told["mediaType"] = (*u.choose(&KINDS)?).into(),
                3 => drop(told.as_object_mut().expect("it is one").remove(*u.choose(&[
                    "digest",
                    "size",
                    "mediaType",
                ])?)),
                _ => told["size"] = (-1).into(),
            }
        }
        let mut stored = bytes.to_vec();
        self.spoil(u, &mut stored)?;
        self.files.push((format!("blobs/sha256/{}", digest.hex()), stored));
        Ok(told)
    }

    /// Spoils what a text of JSON is made of now and then.
    fn json(&mut self, u: &mut Unstructured, mut value: Value) -> Result<Vec<u8>> {
        if wrong(u)? {
            self.is_right = false;
            let keys: Vec<_> = value.as_object().iter().flat_map(|object| object.keys().cloned()).collect();
            if !keys.is_empty() {
                let key = u.choose(&keys)?;
                let values =
                    [Value::Null, json!([]), json!({}), json!(""), json!(-1), json!([{}]), json!("a".repeat(300))];
                value[key.as_str()] = u.choose(&values)?.clone();
            }
        }
        let mut bytes = value.to_string().into_bytes();
        self.spoil(u, &mut bytes)?;
        Ok(bytes)
    }
}

/// A platform that is not this machine's.
fn foreign(u: &mut Unstructured) -> Result<Value> {
    Ok(
        json!({"os": *u.choose(&["linux", "windows", "unknown"])?, "architecture": *u.choose(&["s390x", "unknown", ""])?}),
    )
}

fn make(u: &mut Unstructured, is_saved: bool, tag: Option<&str>) -> Result<Made> {
    let mut made = Made { files: vec![], is_right: true };
    let layers: Vec<_> = (0..u.int_in_range(0..=3)?).map(|_| layer(u)).collect::<Result<_>>()?;
    let mut diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    if wrong(u)? {
        made.is_right = false;
        let others = ["sha256:0".to_owned(), Digest::of(b"").to_string()];
        match diff_ids.first_mut() {
            Some(first) if u.arbitrary()? => first.clone_from(u.choose(&others)?),
            _ => diff_ids.push(u.choose(&others)?.clone()),
        }
    }
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let settings = json!({"Env": ["A=1"], "Cmd": [input::number(u)?.to_string()], "User": "u", "WorkingDir": "/w"});
    let config = json!({
        "architecture": arch, "os": "linux", "config": settings, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = made.json(u, config)?;
    if is_saved {
        let id = Digest::of(&config);
        let mut names = vec![];
        for (number, mut layer) in layers.into_iter().enumerate() {
            made.spoil(u, &mut layer)?;
            made.files.push((format!("{number}/layer.tar"), layer));
            names.push(format!("{}{number}/layer.tar", u.choose(&["", "./", "a/../", "/"])?));
        }
        let mut stored = config.clone();
        made.spoil(u, &mut stored)?;
        made.files.push((format!("{}.json", id.hex()), stored));
        let image = json!({"Config": format!("{}.json", id.hex()), "RepoTags": ["a:1"], "Layers": names});
        let all = if wrong(u)? { [image.clone(), image].to_vec() } else { vec![image] };
        made.is_right &= all.len() == 1;
        let mut manifest = Value::from(all).to_string().into_bytes();
        made.spoil(u, &mut manifest)?;
        made.files.push(("manifest.json".into(), manifest));
        return Ok(made);
    }
    let layers: Vec<_> = layers.iter().map(|layer| made.blob(u, LAYER, layer)).collect::<Result<_>>()?;
    let config = made.blob(u, CONFIG, &config)?;
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let manifest = made.json(u, manifest)?;
    let mut top = made.blob(u, MANIFEST, &manifest)?;
    let depth = u.int_in_range(1..=5)?;
    made.is_right &= depth <= 4;
    for level in (0..depth).rev() {
        if u.arbitrary()? {
            top["platform"] = json!({"os": "linux", "architecture": arch});
        }
        if let Some(tag) = tag.filter(|_| level == 0) {
            top["annotations"] = json!({TAG: tag});
        }
        let mut others = vec![];
        for _ in 0..u.int_in_range(0..=2)? {
            let platform = foreign(u)?;
            others
                .push(json!({"mediaType": MANIFEST, "digest": Digest::of(b"other"), "size": 5, "platform": platform}));
        }
        others.insert(u.int_in_range(0..=others.len())?, top.clone());
        let index = made.json(u, json!({"schemaVersion": 2, "manifests": others}))?;
        if level > 0 {
            top = made.blob(u, INDEX, &index)?;
        } else {
            made.files.push(("index.json".into(), index));
        }
    }
    made.files.push(("oci-layout".into(), b"{\"imageLayoutVersion\": \"1.0.0\"}".to_vec()));
    Ok(made)
}

/// The bytes of a file of the image whose digest this is.
fn whole<'a>(made: &'a Made, digest: &Value) -> &'a [u8] {
    let found = made.files.iter().find(|(_, bytes)| Digest::of(bytes).to_string() == *digest);
    &found.unwrap_or_else(|| panic!("no file has the digest {digest}")).1
}

/// Checks that all of the image that was opened is what it tells of.
fn check(made: &Made, image: &Image, is_saved: bool) {
    let disk = fs::read(image.path()).expect("the image");
    assert!(disk.len() % (2 << 20) == 0 && disk.len() <= 16 << 20, "an image of {} bytes", disk.len());
    assert_eq!(disk[1024..1028], 0xe0f5_e1e2u32.to_le_bytes());
    let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("it was taken for JSON");
    let first = json(whole(made, &image.digest().expect("it has one").to_string().into()));
    let config = if is_saved {
        first
    } else {
        let config = whole(made, &first["config"]["digest"]);
        assert_eq!(first["config"]["size"], config.len());
        let (config, layers) = (json(config), first["layers"].as_array().expect("layers"));
        let diff_ids = config["rootfs"]["diff_ids"].as_array().expect("digests");
        assert_eq!(layers.len(), diff_ids.len());
        assert!(layers.iter().all(|layer| layer["size"] == whole(made, &layer["digest"]).len()), "{layers:?}");
        config
    };
    for id in config["rootfs"]["diff_ids"].as_array().expect("digests") {
        whole(made, id);
    }
    let words = |key: &str| serde_json::from_value::<Vec<String>>(config["config"][key].clone()).unwrap_or_default();
    assert_eq!((image.config().cmd.clone(), image.config().env.clone()), (words("Cmd"), words("Env")));
}

fn open(made: &Made, is_saved: bool, in_archive: bool, tag: Option<&str>, folder: &Path) {
    let source = if in_archive {
        let mut archive = vec![];
        made.files.iter().for_each(|(path, bytes)| member(path, bytes, &mut archive));
        archive.resize(archive.len() + 1024, 0);
        fs::write(folder.join("image.tar"), archive).expect("an archive");
        Source::Archive(folder.join("image.tar"))
    } else {
        fs::create_dir_all(folder.join("layout/blobs/sha256")).expect("a folder");
        made.files.iter().for_each(|(path, bytes)| fs::write(folder.join("layout").join(path), bytes).expect("a file"));
        Source::Layout(folder.join("layout"), tag.map(Into::into))
    };
    let cache = Cache::new(folder.join("cache"));
    let options = Options { limits: LIMITS, ..Options::default() };
    match image::open(&source, &cache, &options) {
        // An archive without what tells of an image is a root file system itself.
        Ok(_) if in_archive && !made.files.iter().any(|(path, _)| path == "manifest.json" || path == "oci-layout") => {}
        Ok(image) => {
            check(made, &image, is_saved);
            let again = image::open(&source, &cache, &options).expect("it is in the cache");
            assert_eq!((again.digest(), again.config()), (image.digest(), image.config()));
        }
        Err(error) => {
            assert!(!made.is_right, "a whole image is refused: {error}: {:?}", std::error::Error::source(&error));
            assert_eq!(cache.list().expect("the cache").len(), 0, "something stays of what was refused: {error}");
        }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let Ok((is_saved, in_archive, has_tag)) = u.arbitrary::<(bool, bool, bool)>() else { return };
    // docker save writes archives, and nothing can be asked of one by a tag.
    let in_archive = in_archive || is_saved;
    let tag = has_tag.then_some("v1").filter(|_| !in_archive);
    let Ok(made) = make(&mut u, is_saved, tag) else { return };
    let folder = bantam_fuzz::folder().join("image");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).expect("a folder");
    open(&made, is_saved, in_archive, tag, &folder);
    let mut names: Vec<_> =
        fs::read_dir(&folder).expect("it").map(|entry| entry.expect("a name").file_name()).collect();
    names.retain(|name| !["cache", "image.tar", "layout"].iter().any(|known| name == known));
    assert!(names.is_empty(), "{names:?}");
});
