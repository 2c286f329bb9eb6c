//! Debian's `docker-registry` on the loopback interface, with an image that skopeo has pushed.

use std::fs;

use super::docker_registry::Registry;
use super::layers::layered;
use super::{Place, assert_same};

#[test]
fn a_missing_curl_is_told_with_what_helps() {
    let place = Place::new();
    for (reference, copied) in [
        (
            "docker://alpine:3",
            "`skopeo copy docker://docker.io/library/alpine:3 oci:alpine:3` and give oci:alpine:3 in",
        ),
        ("docker://example.org/team/app", "`skopeo copy docker://example.org/team/app:latest oci:app:latest` and give"),
    ] {
        let output = place.command(&["pull", reference]).env("PATH", "/nowhere").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{said}");
        for words in ["there is no program curl", copied] {
            assert!(said.contains(words), "`{words}` is not in: {said}");
        }
    }
}

#[test]
fn an_image_is_pulled_by_tls() {
    let place = Place::new();
    layered(&place);
    let expected = place.files(&place.pull("oci:layout:v1"));
    place.bantam(&["prune"]);
    let certificate = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=registry.localhost \
                       -addext subjectAltName=DNS:registry.localhost";
    place.run("openssl", &certificate.split_ascii_whitespace().collect::<Vec<_>>());
    let registry = Registry::start_with_tls(&place.path("."));
    let pushed = format!("docker://{}/team/app:1", registry.address);
    place.run("skopeo", &["copy", "-q", "--insecure-policy", "--dest-tls-verify=false", "oci:layout:v1", &pushed]);
    // curl knows that this name is of this machine.
    let reference = pushed.replace("127.0.0.1", "registry.localhost");
    let said = place.refused(&reference);
    assert!(said.contains("cannot ask registry.localhost") && said.contains("certificate"), "{said}");

    let pull =
        |reference: &str| place.command(&["pull", reference]).env("CURL_CA_BUNDLE", place.path("cert.pem")).output();
    let missing = pull(&reference.replace(":1", ":2")).unwrap();
    assert_eq!(missing.status.code(), Some(125));
    let pulled = pull(&reference).unwrap();
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
    let image = String::from_utf8(pulled.stdout).unwrap();
    assert_same(&place.files(image.trim_end().as_ref()), &expected);
}

#[test]
fn an_image_is_pulled_and_kept() {
    let place = Place::new();
    layered(&place);
    let expected = place.files(&place.pull("oci:layout:v1"));
    place.bantam(&["prune"]);
    let registry = Registry::start(&place.path("."));
    let reference = format!("docker://{}/team/app:1", registry.address);
    place.run("skopeo", &["copy", "-q", "--insecure-policy", "--dest-tls-verify=false", "oci:layout:v1", &reference]);
    let image = place.pull(&reference);
    assert_same(&place.files(&image), &expected);
    let listed = String::from_utf8(place.bantam(&["ls"]).stdout).unwrap();
    assert!(listed.contains(&reference), "{listed}");

    let digest = image.parent().unwrap().file_name().unwrap().to_str().unwrap().replace('-', ":");
    let by_digest = format!("docker://{}/team/app@{digest}", registry.address);
    let missing = format!("docker://{}/team/app:2", registry.address);
    let said = String::from_utf8(place.bantam(&["pull", &missing]).stderr).unwrap();
    assert!(said.contains(&missing) && said.contains("no such image"), "{said}");
    let wrong = format!("docker://{}/team/app@sha256:{}", registry.address, "0".repeat(64));
    assert_eq!(place.bantam(&["pull", &wrong]).status.code(), Some(125));

    // A blob that the registry has wrong is refused, and leaves nothing.
    place.bantam(&["prune"]);
    let blobs = place.run("find", &["registry", "-path", "*blobs*", "-name", "data", "-size", "+20k"]);
    let blob = place.path(blobs.lines().next().unwrap());
    let whole = fs::read(&blob).unwrap();
    let mut wrong = whole.clone();
    *wrong.last_mut().unwrap() ^= 1;
    fs::write(&blob, &wrong).unwrap();
    place.refused(&reference);
    fs::write(&blob, &whole).unwrap();
    assert_eq!(place.pull(&by_digest), image);
    drop(registry);
    // What is there by its digest needs no registry.
    assert_eq!(place.pull(&by_digest), image);
}
