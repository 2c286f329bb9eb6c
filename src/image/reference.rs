//! References to images in registries: `docker://HOST/NAME[:TAG][@DIGEST]`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::digest::Digest;

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The registry: a name or address, and perhaps a port.
    pub host: String,
    /// The repository.
    pub name: String,
    /// The tag; `latest` if there is neither tag nor digest.
    pub tag: Option<String>,
    /// The digest, which goes before the tag.
    pub digest: Option<Digest>,
}

/// Text that is no [`Reference`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no reference to an image: {why}; write it like docker://HOST/NAME:TAG")]
pub struct BadReference {
    text: String,
    why: &'static str,
}

impl Reference {
    /// Whether the registry is on this machine, which is spoken to without TLS.
    pub fn is_local(&self) -> bool {
        let host = match self.host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => self.host.split(':').next().unwrap_or_default(),
        };
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// The tag or digest to ask for.
    pub fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.digest.is_some() { '@' } else { ':' };
        write!(f, "docker://{}/{}{separator}{}", self.host, self.name, self.version())
    }
}

impl FromStr for Reference {
    type Err = BadReference;

    /// Reads `[docker://][HOST/]NAME[:TAG][@DIGEST]`. As for Docker, a first part without dot and port is no host.
    fn from_str(text: &str) -> Result<Self, BadReference> {
        let bad = |why| BadReference { text: text.to_owned(), why };
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        let (rest, digest) = match rest.split_once('@') {
            None => (rest, None),
            Some((rest, digest)) => {
                (rest, Some(digest.parse().map_err(|_| bad("what is behind @ is no SHA-256 digest"))?))
            }
        };
        let (host, rest) = match rest.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
            _ => ("docker.io", rest),
        };
        let (name, tag) = match rest.split_once(':') {
            None => (rest, None),
            Some((name, tag)) => (name, Some(tag)),
        };
        let valid_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
        if !host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[') || !host.chars().all(valid_host) {
            return Err(bad("its host is none"));
        }
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
        let part = |part: &str| part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(valid);
        if name.len() > 255 || !name.split('/').all(part) {
            return Err(bad("its name is not of lower case letters, digits and . _ - /"));
        }
        let valid_tag = |tag: &str| {
            let mut chars = tag.chars();
            let first = chars.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
            first && tag.len() <= 128 && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        };
        if !tag.is_none_or(valid_tag) {
            return Err(bad("its tag is not of letters, digits and . _ -"));
        }
        // Docker's own registry has a folder for what has none.
        let library = host == "docker.io" && !name.contains('/');
        let name = if library { format!("library/{name}") } else { name.to_owned() };
        Ok(Self { host: host.to_owned(), name, tag: tag.map(String::from), digest })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn references_are_read() {
        let shown = |text: &str| text.parse::<Reference>().unwrap().to_string();
        assert_eq!(shown("docker://127.0.0.1:5000/app:1"), "docker://127.0.0.1:5000/app:1");
        assert_eq!(shown("docker://localhost/a/b_c"), "docker://localhost/a/b_c:latest");
        assert_eq!(shown("alpine"), "docker://docker.io/library/alpine:latest");
        assert_eq!(shown("docker://user/app"), "docker://docker.io/user/app:latest");
        let digest = Digest::of(b"").to_string();
        assert_eq!(shown(&format!("docker://ghcr.io/a/b:1@{digest}")), format!("docker://ghcr.io/a/b@{digest}"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "docker://",
            "docker://h.io/",
            "h.io/UPPER",
            "h.io/a:",
            "h.io/a:t/../x",
            "h.io/../x",
            "h.io/a@x",
            "h io.x/a",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_this_machine_is_local() {
        let local = |text: &str| text.parse::<Reference>().unwrap().is_local();
        assert!(local("127.0.0.1:5000/a") && local("localhost/a") && local("localhost:1/a") && local("[::1]:5000/a"));
        assert!(!local("127.0.0.1.example.org/a") && !local("localhost.example.org/a") && !local("10.0.0.1:5000/a"));
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "(docker://)?([a-z.:0-9]{0,9}/)?[a-zA-Z./:@_-]{0,24}|\\PC{0,24}") {
            if let Ok(reference) = text.parse::<Reference>() {
                // What is asked of a registry by it leads nowhere else.
                let path = format!("{}/{}", reference.name, reference.version());
                prop_assert!(path.split('/').all(|part| !matches!(part, "" | "." | "..")), "{}", path);
                prop_assert!(!path.contains(['?', '#', '%', ' ', '\\']) && !reference.host.contains(['/', '@', '?']));
                // A digest goes before the tag, which is not shown then.
                let shown = reference.to_string();
                prop_assert_eq!(shown.parse::<Reference>().map(|again| again.to_string()), Ok(shown));
            }
        }
    }
}
