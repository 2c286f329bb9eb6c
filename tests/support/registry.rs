//! Debian's `docker-registry` on the loopback interface.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A registry that keeps its images in the folder `registry`. It ends when this is dropped.
pub struct Registry {
    child: Child,
    /// Host and port.
    pub address: String,
}

impl Registry {
    pub fn start(folder: &Path) -> Self {
        Self::serve(folder, "")
    }

    /// One that is spoken to by TLS, with the certificate and key that are in the folder as `cert.pem` and `key.pem`.
    #[allow(dead_code, reason = "not every test that has this file has need of it")]
    pub fn start_with_tls(folder: &Path) -> Self {
        Self::serve(folder, ", tls: {certificate: cert.pem, key: key.pem}")
    }

    fn serve(folder: &Path, tls: &str) -> Self {
        // A port that was free just now.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: '{address}'{tls}}}\n",
            folder.join("registry").display()
        );
        fs::write(folder.join("registry.yml"), config).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", "registry.yml"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is there (resources/setup.sh test installs it)");
        let limit = Instant::now() + Duration::from_secs(300);
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
