//! Debian's `docker-registry` on the loopback interface, with an image that skopeo has pushed.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::layers::layered;
use super::{Place, assert_same};

struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(place: &Place) -> Self {
        // A port that was free just now.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: '{address}'}}\n",
            place.path("registry").display()
        );
        fs::write(place.path("registry.yml"), config).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", "registry.yml"])
            .current_dir(place.path("."))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is there (resources/setup.sh test installs it)");
        let limit = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < limit, "the registry does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { child, address }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_is_pulled_and_kept() {
    let place = Place::new();
    layered(&place);
    let expected = place.files(&place.pull("oci:layout:v1"));
    place.bantam(&["prune"]);
    let registry = Registry::start(&place);
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
