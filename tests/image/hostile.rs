//! Archives and layouts that want what they must not have. Each is refused, with words that say where, and nothing of it
//! stays.

use std::fs;
use std::io::Write;

use bantam::image::Digest;

use super::{Place, add_file, add_link, header};

/// Sets the path of an entry without what the crate checks.
fn add_raw(builder: &mut tar::Builder<fs::File>, kind: tar::EntryType, path: &str, target: &str, data: &[u8]) {
    let mut header = header(kind, 0o644, data.len());
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_cksum();
    builder.append(&header, data).unwrap();
}

/// What bantam says of an archive with one file, and what `write` adds.
fn refused(write: impl FnOnce(&mut tar::Builder<fs::File>)) -> String {
    let place = Place::new();
    fs::write(place.path("outside"), "untouched").unwrap();
    let source = place.archive("hostile.tar", |builder| {
        add_file(builder, "fine", b"x");
        write(builder);
    });
    let said = place.refused(&source);
    assert_eq!(fs::read_to_string(place.path("outside")).unwrap(), "untouched");
    said
}

#[test]
fn paths_that_lead_out() {
    for path in ["../outside", "a/../../outside", "/etc/outside", "..", "a/.."] {
        let said = refused(|builder| add_raw(builder, tar::EntryType::Regular, path, "", b"x"));
        assert!(said.contains("hostile.tar") && said.contains(path), "{said}");
    }
}

#[test]
fn links_that_lead_out() {
    for target in ["/tmp", "..", "../../../..", "a/../.."] {
        let said = refused(|builder| {
            add_link(builder, tar::EntryType::Symlink, "link", target);
            add_file(builder, "link/outside", b"x");
        });
        assert!(said.contains("\"link/outside\"") && said.contains("symlink"), "{said}");
    }
    for target in ["../outside", "/etc/passwd", "missing", "."] {
        let said = refused(|builder| add_raw(builder, tar::EntryType::Link, "link", target, b""));
        assert!(said.contains("\"link\""), "{said}");
    }
}

#[test]
fn sizes_that_are_not_there() {
    let said = refused(|builder| {
        let mut header = header(tar::EntryType::Regular, 0o644, 0);
        header.set_path("huge").unwrap();
        header.set_size(1 << 50);
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
    });
    assert!(said.contains("cut off") || said.contains("huge"), "{said}");
    // A sparse file of a pebibyte, with nothing in it.
    let said = refused(|builder| {
        let mut header = header(tar::EntryType::GNUSparse, 0o644, 0);
        header.set_path("sparse").unwrap();
        header.as_gnu_mut().unwrap().set_real_size(1 << 50);
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
    });
    assert!(said.contains("\"sparse\"") && said.contains("MiB"), "{said}");
}

#[test]
fn types_and_numbers_that_are_not_known() {
    let said = refused(|builder| add_raw(builder, tar::EntryType::new(b'Z'), "what", "", b""));
    assert!(said.contains("type 'Z'"), "{said}");
    let said = refused(|builder| {
        let mut header = header(tar::EntryType::Char, 0o644, 0);
        header.set_path("device").unwrap();
        header.set_device_major(5000).unwrap();
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
    });
    assert!(said.contains("device number"), "{said}");
}

#[test]
fn an_archive_that_is_cut() {
    let place = Place::new();
    let source = place.archive("whole.tar", |builder| {
        add_file(builder, "a", &[1; 2000]);
        add_file(builder, "b", b"x");
    });
    let whole = fs::read(place.path(&source)).unwrap();
    // The end-of-archive mark is the last 1024 bytes.
    for end in (0..whole.len() - 1024).step_by(256) {
        fs::write(place.path("cut.tar"), &whole[..end]).unwrap();
        assert!(place.refused("cut.tar").contains("cut off"), "cut at {end}");
    }
    place.run("gzip", &["whole.tar"]);
    let packed = fs::read(place.path("whole.tar.gz")).unwrap();
    for end in [5, packed.len() / 2, packed.len() - 1] {
        fs::write(place.path("cut.tar.gz"), &packed[..end]).unwrap();
        place.refused("cut.tar.gz");
    }
}

/// An OCI image layout with one layer, as it should be.
struct Layout {
    layer: Vec<u8>,
    layer_type: &'static str,
    config_type: &'static str,
    diff_id: Option<Digest>,
    layer_size: Option<usize>,
}

impl Layout {
    fn new(layer: &[u8]) -> Self {
        Self {
            layer: layer.to_vec(),
            layer_type: "application/vnd.oci.image.layer.v1.tar",
            config_type: "application/vnd.oci.image.config.v1+json",
            diff_id: None,
            layer_size: None,
        }
    }

    fn write(&self, place: &Place) -> Digest {
        let blob = |bytes: &[u8]| {
            let digest = Digest::of(bytes);
            fs::create_dir_all(place.path("layout/blobs/sha256")).unwrap();
            fs::write(place.path(&format!("layout/blobs/sha256/{}", digest.hex())), bytes).unwrap();
            digest
        };
        let layer = blob(&self.layer);
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [self.diff_id.unwrap_or(layer)]},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": self.config_type, "digest": blob(&config), "size": config.len()},
            "layers": [{
                "mediaType": self.layer_type, "digest": layer, "size": self.layer_size.unwrap_or(self.layer.len()),
            }],
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": blob(&manifest), "size": manifest.len(),
        }]});
        fs::write(place.path("layout/index.json"), index.to_string()).unwrap();
        fs::write(place.path("layout/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        layer
    }
}

/// A layer with one file.
fn layer() -> Vec<u8> {
    let mut builder = tar::Builder::new(vec![]);
    builder.append_data(&mut header(tar::EntryType::Regular, 0o644, 4), "file", &b"data"[..]).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn blobs_that_are_not_what_they_should_be() {
    let place = Place::new();
    let digest = Layout::new(&layer()).write(&place);
    let path = place.path(&format!("layout/blobs/sha256/{}", digest.hex()));
    let whole = fs::read(&path).unwrap();
    let mut wrong = whole.clone();
    wrong[512] ^= 1;
    fs::write(&path, &wrong).unwrap();
    let said = place.refused("layout");
    assert!(said.contains(&digest.to_string()) && said.contains("its digest is"), "{said}");
    fs::write(&path, &whole[..whole.len() - 10]).unwrap();
    assert!(place.refused("layout").contains(&digest.to_string()));
    fs::write(&path, [whole.as_slice(), &[0; 512]].concat()).unwrap();
    assert!(place.refused("layout").contains("more than"));
    fs::remove_file(&path).unwrap();
    assert!(place.refused("layout").contains("No such file"));
    fs::write(&path, &whole).unwrap();
    place.pull("layout");
}

#[test]
fn manifests_that_are_not_what_they_should_be() {
    let wrong = |change: &dyn Fn(&mut Layout)| {
        let place = Place::new();
        let mut layout = Layout::new(&layer());
        change(&mut layout);
        layout.write(&place);
        place.refused("layout")
    };
    let said = wrong(&|layout| layout.layer_type = "application/x-unknown");
    assert!(said.contains("application/x-unknown"), "{said}");
    let said = wrong(&|layout| layout.config_type = "application/vnd.cncf.helm.config.v1+json");
    assert!(said.contains("no container image"), "{said}");
    let said = wrong(&|layout| layout.diff_id = Some(Digest::of(b"other")));
    assert!(said.contains("its digest is"), "{said}");
    let said = wrong(&|layout| layout.layer_size = Some(3));
    assert!(said.contains("3 bytes"), "{said}");
    let said = wrong(&|layout| layout.layer = b"\x1f\x8b\x08garbage".to_vec());
    assert!(said.contains("cannot unpack layer sha256:"), "{said}");
}

#[test]
fn a_layer_that_unpacks_to_too_much() {
    use bantam::image::{self, Cache, Limits, Options, Source};
    let place = Place::new();
    let mut child = std::process::Command::new("gzip")
        .stdin(std::process::Stdio::piped())
        .stdout(fs::File::create(place.path("bomb.tar.gz")).unwrap())
        .spawn()
        .unwrap();
    let mut header = header(tar::EntryType::Regular, 0o644, 64 << 20);
    header.set_path("zeros").unwrap();
    header.set_cksum();
    let mut input = child.stdin.take().unwrap();
    input.write_all(header.as_bytes()).unwrap();
    input.write_all(&vec![0; (64 << 20) + 1024]).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
    let cache = Cache::new(place.path("cache/bantam/images"));
    let source: Source = place.path("bomb.tar.gz").to_str().unwrap().parse().unwrap();
    let open = |bytes| {
        let limits = Limits { bytes, ..Limits::default() };
        image::open(&source, &cache, &Options { limits, ..Options::default() })
    };
    let error = open(16 << 20).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("unpacks to more than 16 MiB"), "{error}: {cause}");
    assert_eq!(place.cached(), Vec::<String>::new());
    open(128 << 20).unwrap();
}
