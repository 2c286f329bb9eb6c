//! Images with layers, and root file systems of other kinds.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::{Place, add_file, add_link, assert_same, header};

/// An OCI image layout `layout`, tag `v1`, whose layers umoci has made of changes of a root file system: files replaced
/// by directories and the other way round, removed, and a directory emptied and filled again.
pub(super) fn layered(place: &Place) {
    let root = |steps: &str| place.run("sh", &["-euc", &format!("cd bundle/rootfs; {steps}")]);
    place.run("umoci", &["init", "--layout", "layout"]);
    place.run("umoci", &["new", "--image", "layout:v1"]);
    place.run("umoci", &["unpack", "--rootless", "--image", "layout:v1", "bundle"]);
    root("mkdir -p etc usr/bin usr/lib many gone/below opaque/old; ln -s usr/bin bin; ln -s usr/lib lib
        cp /bin/dash usr/bin/sh; chmod 4755 usr/bin/sh; cp /bin/cat usr/bin/cat; ln usr/bin/cat usr/bin/tac
        for i in $(seq 300); do echo $i >many/file-with-a-rather-long-name-$i; done
        echo file >becomes-directory; mkdir becomes-file; echo x >becomes-file/x; echo 1 >gone/below/1; echo old >opaque/old/1
        echo one >replaced; ln replaced replaced-link; chmod 700 gone; mkfifo pipe
        touch -h -d '2001-02-03 04:05:06' replaced bin; head -c 100000 /dev/urandom >large");
    place.run("umoci", &["repack", "--image", "layout:v1", "bundle"]);
    fs::remove_dir_all(place.path("bundle")).unwrap();
    place.run("umoci", &["unpack", "--rootless", "--image", "layout:v1", "bundle"]);
    root("rm -r becomes-directory becomes-file gone opaque; mkdir becomes-directory opaque; echo y >becomes-directory/y
        echo now >becomes-file; echo new >opaque/new; rm many/file-with-a-rather-long-name-7; rm replaced; echo two >replaced
        chmod 1777 many; touch -d '2002-03-04 05:06:07' many/file-with-a-rather-long-name-8");
    place.run("umoci", &["repack", "--image", "layout:v1", "bundle"]);
    let config = ["--config.entrypoint=/bin/sh", "--config.cmd=-c", "--config.env=A=b", "--config.user=1000:100"];
    place.run("umoci", &[&["config", "--image", "layout:v1", "--config.workingdir=/etc"], config.as_slice()].concat());
    fs::remove_dir_all(place.path("bundle")).unwrap();
}

/// The files as umoci unpacks them, without what fsck.erofs loses.
fn unpacked(place: &Place) -> Vec<String> {
    place.run("umoci", &["unpack", "--rootless", "--image", "layout:v1", "bundle"]);
    if rustix::process::geteuid().is_root() {
        let shell = place.path("bundle/rootfs/usr/bin/sh");
        fs::set_permissions(shell, fs::Permissions::from_mode(0o755)).unwrap();
    }
    place.listing("bundle/rootfs")
}

#[test]
fn an_oci_layout_is_what_umoci_unpacks() {
    let place = Place::new();
    layered(&place);
    let image = place.pull("oci:layout:v1");
    assert_same(&place.files(&image), &unpacked(&place));
    // Only where it does not change owners does fsck.erofs keep the set-user-id bit.
    let arguments = ["-d0", "--extract=modes", "--preserve-perms", "--no-preserve-owner", image.to_str().unwrap()];
    place.run("fsck.erofs", &arguments);
    assert_eq!(fs::metadata(place.path("modes/usr/bin/sh")).unwrap().permissions().mode() & 0o7777, 0o4755);
    assert!(place.dump(&image, "/usr/bin/cat").contains("Links: 2"));
    let about = fs::read_to_string(image.with_file_name("image.json")).unwrap();
    let about: serde_json::Value = serde_json::from_str(&about).unwrap();
    let expected = serde_json::json!({
        "entrypoint": ["/bin/sh"], "cmd": ["-c"], "env": about["config"]["env"], "working_dir": "/etc", "user": "1000:100"
    });
    assert_eq!(about["config"], expected);
    assert!(about["config"]["env"].as_array().unwrap().contains(&"A=b".into()));
    // The directory is known for what it is, and has one image.
    assert_eq!(place.pull("layout"), image);
    assert!(place.refused_beside("oci:layout:v2").contains("no image with the tag `v2`"));
}

impl Place {
    /// What bantam says of a source that it refuses, where there are other images.
    fn refused_beside(&self, source: &str) -> String {
        let before = self.cached();
        let output = self.bantam(&["pull", source]);
        assert_eq!((output.status.code(), self.cached()), (Some(125), before));
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn archives_of_an_image_are_the_image() {
    let place = Place::new();
    layered(&place);
    let expected = unpacked(&place);
    place.run("skopeo", &["copy", "-q", "--insecure-policy", "oci:layout:v1", "docker-archive:saved.tar:app:1"]);
    place.run("skopeo", &["copy", "-q", "--insecure-policy", "oci:layout:v1", "oci-archive:oci.tar:v1"]);
    place.run(
        "sh",
        &["-c", "gzip <saved.tar >saved.tar.gz; xz -0 <saved.tar >saved.tar.xz; zstd -q <oci.tar >oci.tar.zst"],
    );
    let saved = place.pull("saved.tar");
    assert_same(&place.files(&saved), &expected);
    for packed in ["saved.tar.gz", "saved.tar.xz"] {
        assert_eq!(place.pull(packed), saved, "{packed}");
    }
    let oci = place.pull("oci.tar");
    assert_same(&place.files(&oci), &expected);
    assert_eq!(place.pull("oci.tar.zst"), oci);
}

#[test]
fn a_plain_archive_keeps_everything() {
    let place = Place::new();
    let source = place.archive("root.tar", |builder| {
        add_file(builder, "f", &[1; 5000]);
        add_file(builder, ".wh.f", b"no whiteout: this is no layer");
        add_file(builder, &format!("{}long", "directory/".repeat(25)), b"long");
        add_link(builder, tar::EntryType::Link, "hard", "f");
        add_link(builder, tar::EntryType::Symlink, "soft", "/etc/passwd");
        add_file(builder, "twice", b"first");
        add_file(builder, "twice", b"the last wins");
        let mut owned = header(tar::EntryType::Directory, 0o1777, 0);
        owned.set_uid(70_000);
        builder
            .append_pax_extensions([
                ("SCHILY.xattr.user.note", b"a\nb".as_slice()),
                ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".as_slice()),
                ("mtime", b"1000000000.125".as_slice()),
            ])
            .unwrap();
        builder.append_data(&mut owned, "owned", &b""[..]).unwrap();
    });
    let image = place.pull(&source);
    let with_device = place.archive("device.tar", |builder| {
        let mut device = header(tar::EntryType::Block, 0o660, 0);
        device.set_device_major(259).unwrap();
        device.set_device_minor(70_000).unwrap();
        builder.append_data(&mut device, "device", &b""[..]).unwrap();
    });
    let device = place.dump(&place.pull(&with_device), "/device");
    assert!(device.contains("block dev") && device.contains("0660"), "{device}");
    let files = place.files(&image).join("\n");
    let line =
        |start: &str| files.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {files}"));
    assert!(line("f f 644").contains(" 5000 1000000000.0"));
    assert!(line(".wh.f f").contains(" 29 "));
    assert!(line("soft l").ends_with(" /etc/passwd"));
    assert!(line("twice f").contains(" 13 "));
    assert!(line("owned d").starts_with("owned d 1777 "));
    assert!(files.contains("directory/long f"));
    let owned = place.dump(&image, "/owned");
    // The header of 12 bytes, and 4 bytes before each name and value.
    let expected = 12 + (4 + 4 + 3_usize).next_multiple_of(4) + (4 + 10 + 20_usize).next_multiple_of(4);
    assert!(owned.contains(&format!("Xattr size: {expected}")), "{owned}");
    assert!(owned.contains("Uid: 70000"), "{owned}");
    assert!(owned.contains("2001-09-09") && owned.contains(".125000000"), "{owned}");
    assert!(place.dump(&image, "/hard").contains("Links: 2"));
}

#[test]
fn a_directory_is_copied_and_looked_at_again() {
    let place = Place::new();
    fs::create_dir_all(place.path("root/etc")).unwrap();
    fs::write(place.path("root/etc/motd"), "hello").unwrap();
    fs::hard_link(place.path("root/etc/motd"), place.path("root/link")).unwrap();
    std::os::unix::fs::symlink("etc", place.path("root/symlink")).unwrap();
    let image = place.pull("root");
    assert_same(&place.files(&image), &place.listing("root"));
    assert!(place.dump(&image, "/link").contains("Links: 2"));
    assert_eq!(place.pull("root"), image);
    fs::write(place.path("root/etc/motd"), "changed").unwrap();
    let changed = place.pull("root");
    assert_ne!(changed, image);
    assert_same(&place.files(&changed), &place.listing("root"));
}

#[test]
fn images_are_listed_and_removed() {
    let place = Place::new();
    let text = |arguments: &[&str]| String::from_utf8(place.bantam(arguments).stdout).unwrap();
    assert_eq!(text(&["ls", "--json"]), "[]\n");
    let sources = ["a.tar", "b.tar"].map(|name| place.archive(name, |builder| add_file(builder, name, b"x")));
    let images = sources.map(|source| place.pull(&source));
    let list: serde_json::Value = serde_json::from_str(&text(&["ls", "--json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    let found =
        list.as_array().unwrap().iter().find(|one| one["names"][0].as_str().unwrap().ends_with("a.tar")).unwrap();
    let digest = found["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    assert!(images[0].to_str().unwrap().contains(digest));
    assert!(text(&["ls"]).contains(&digest[..12]));
    assert!(text(&["rm", &digest[..10]]).contains(digest));
    assert!(!images[0].exists() && images[1].exists());
    let missing = place.bantam(&["rm", "nothing"]);
    assert!(String::from_utf8(missing.stderr).unwrap().contains("cannot find an image `nothing`"));
    assert_eq!(text(&["prune", "--unused-for", "1h"]), "");
    assert!(text(&["prune"]).contains("sha256:"));
    assert_eq!(place.cached(), Vec::<String>::new());
}
