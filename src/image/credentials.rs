//! Names and passwords for registries, where `docker login` and `skopeo login` put them.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

/// The part of the file that is read. Helper programs, which may keep the passwords instead, are not called.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: HashMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    /// `NAME:PASSWORD` in base 64.
    auth: Option<String>,
}

/// `NAME:PASSWORD` for a registry, if the user has logged in.
pub(super) fn find(host: &str) -> Option<String> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let files = [
        variable("REGISTRY_AUTH_FILE"),
        variable("XDG_RUNTIME_DIR").map(|folder| folder.join("containers/auth.json")),
        variable("DOCKER_CONFIG").map(|folder| folder.join("config.json")),
        variable("HOME").map(|home| home.join(".docker/config.json")),
    ];
    files.into_iter().flatten().find_map(|path| in_file(&fs::read(path).ok()?, host))
}

fn in_file(json: &[u8], host: &str) -> Option<String> {
    let file: File = serde_json::from_slice(json).ok()?;
    // Docker's own registry has an old name there.
    let key = if host == "docker.io" { "https://index.docker.io/v1/" } else { host };
    let auth = file.auths.get(key).or_else(|| file.auths.get(host))?.auth.as_ref()?;
    String::from_utf8(BASE64_STANDARD.decode(auth).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_found_by_host() {
        let json = br#"{"auths": {"127.0.0.1:5000": {"auth": "dTpw"}, "empty": {}}, "credsStore": "x"}"#;
        assert_eq!(in_file(json, "127.0.0.1:5000").as_deref(), Some("u:p"));
        assert_eq!(in_file(json, "empty"), None);
        assert_eq!(in_file(json, "other"), None);
    }
}
