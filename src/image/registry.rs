//! Pulling from registries, as the OCI distribution specification says.
//!
//! Blobs are read as they come and are not kept: what is unpacked of them is. A connection that ends early is made anew
//! where it ended. Registries on this machine are spoken to without TLS, all others with it. The program `curl` does that:
//! the OCI client crates have an asynchronous stack that is larger than all of bantam.

use std::io::{self, Read};
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::archive::invalid;
use super::curl::{self, Answer};
use super::oci::Blobs;
use super::reference::Reference;

/// How often a connection is made anew without anything having come.
const TRIES: u32 = 4;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A repository of a registry.
pub(super) struct Registry {
    reference: Reference,
    /// What the registry wants to see in `Authorization`.
    authorization: Mutex<Option<String>>,
}

/// What a server gives to who asks for a token.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Registry {
    pub fn new(reference: &Reference) -> Self {
        Self { reference: reference.clone(), authorization: Mutex::new(None) }
    }

    /// Asks `server` for `uri`.
    fn ask(&self, server: &str, uri: &str, headers: &[(&str, String)]) -> io::Result<Answer> {
        curl::get(uri, headers, self.reference.is_local()).map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => no_program(&self.reference),
            kind => io::Error::new(kind, format!("cannot ask {server}: {error}")),
        })
    }

    /// Asks for `path` of the repository, from byte `from` on.
    fn get(&self, path: &str, from: u64) -> io::Result<Answer> {
        let Reference { host, name, .. } = &self.reference;
        let scheme = if self.reference.is_local() { "http" } else { "https" };
        let server = if host == "docker.io" { "registry-1.docker.io" } else { host };
        let uri = format!("{scheme}://{server}/v2/{name}/{path}");
        for last in [false, true] {
            let mut headers = vec![("accept", MANIFESTS.to_owned())];
            let authorization =
                self.authorization.lock().map_err(|_| io::Error::other("another thread failed"))?.clone();
            headers.extend(authorization.map(|authorization| ("authorization", authorization)));
            if from > 0 {
                headers.push(("range", format!("bytes={from}-")));
            }
            let answer = self.ask(server, &uri, &headers)?;
            match answer.status {
                200 | 206 => return Ok(answer),
                401 if !last => {
                    let authorization = self.authorize(&answer.challenge)?;
                    *self.authorization.lock().map_err(|_| io::Error::other("another thread failed"))? =
                        Some(authorization);
                }
                401 | 403 => {
                    return Err(io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        format!(
                            "{host} does not give {name} to whoever asks: log in first (docker login, skopeo login)"
                        ),
                    ));
                }
                404 => {
                    return Err(io::Error::new(io::ErrorKind::NotFound, format!("{host} has no such image or blob")));
                }
                429 => return Err(io::Error::other(format!("{host} answers no more requests for now (429)"))),
                status => return Err(io::Error::other(format!("{host} answers {status} to GET {path}"))),
            }
        }
        unreachable!("the last answer is an error or a response")
    }

    /// What a challenge asks for: a token from the server that it names, or the user's name and password.
    fn authorize(&self, challenge: &str) -> io::Result<String> {
        let basic = super::credentials::find(&self.reference.host)
            .map(|pair| format!("Basic {}", BASE64_STANDARD.encode(pair)));
        let (scheme, rest) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            let none = || {
                format!(
                    "{} wants a name and a password: log in first (docker login, skopeo login)",
                    self.reference.host
                )
            };
            return basic.ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, none()));
        }
        let realm = parameter(rest, "realm").filter(|_| scheme.eq_ignore_ascii_case("bearer"));
        let realm = realm.ok_or_else(|| invalid(format!("the registry asks for authorization by {challenge:?}")))?;
        let mut uri = format!("{realm}{}scope=", if realm.contains('?') { '&' } else { '?' });
        uri += &percent_encoded(&format!("repository:{}:pull", self.reference.name));
        if let Some(service) = parameter(rest, "service") {
            uri += &format!("&service={}", percent_encoded(service));
        }
        let headers: Vec<_> = basic.map(|basic| ("authorization", basic)).into_iter().collect();
        let answer = self.ask(realm, &uri, &headers)?;
        if answer.status != 200 {
            let text = format!("{realm} gives no token: it answers {}", answer.status);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let mut body = vec![];
        answer.body.take(super::oci::JSON_MAX).read_to_end(&mut body)?;
        let token: Token = serde_json::from_slice(&body)?;
        let token = token.token.or(token.access_token).ok_or_else(|| invalid(format!("{realm} gives no token")))?;
        Ok(format!("Bearer {token}"))
    }
}

/// That the program is missing.
fn no_program(reference: &Reference) -> io::Error {
    let name = reference.name.rsplit('/').next().unwrap_or_default();
    let layout = format!("oci:{name}:{}", reference.tag.as_deref().unwrap_or("latest"));
    let text = format!(
        "there is no program curl, which bantam asks registries by: install it, or run `skopeo copy {reference} {layout}` and \
         give {layout} in its place"
    );
    io::Error::new(io::ErrorKind::Unsupported, text)
}

/// `text` as it may stand in a query (RFC 3986, section 2.3).
fn percent_encoded(text: &str) -> String {
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let encode = |byte: u8| if unreserved(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}

/// The value of `name="value"` in a challenge.
fn parameter<'a>(challenge: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = challenge;
    loop {
        let (key, after) = rest.split_once('=')?;
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_at(after.find(',').unwrap_or(after.len())),
        };
        if key.trim_matches([' ', ',']).eq_ignore_ascii_case(name) {
            return Some(value);
        }
        rest = after;
    }
}

impl Blobs for Registry {
    fn open(&self, name: &str, size: Option<u64>) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Blob { registry: self, path: format!("blobs/{name}"), body: None, at: 0, size, tries: 0 }))
    }

    fn open_manifest(&self, name: &str) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(self.get(&format!("manifests/{name}"), 0)?.body))
    }
}

/// A blob as it comes.
struct Blob<'a> {
    registry: &'a Registry,
    path: String,
    body: Option<curl::Body>,
    at: u64,
    size: Option<u64>,
    /// Connections since something has come.
    tries: u32,
}

impl Blob<'_> {
    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let body = match &mut self.body {
            Some(body) => body,
            None => {
                let Answer { status, mut body, .. } = self.registry.get(&self.path, self.at)?;
                if status == 200 {
                    // It does not know ranges.
                    io::copy(&mut body.by_ref().take(self.at), &mut io::sink())?;
                }
                self.body.insert(body)
            }
        };
        let read = body.read(buf)?;
        if read == 0 && !buf.is_empty() && self.size.is_some_and(|size| self.at < size) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended too early"));
        }
        Ok(read)
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_read(buf) {
                Ok(read) => {
                    self.at += read as u64;
                    if read > 0 {
                        self.tries = 0;
                    }
                    return Ok(read);
                }
                Err(error) => {
                    self.body = None;
                    self.tries += 1;
                    use io::ErrorKind::{NotFound, PermissionDenied, Unsupported};
                    let answered = matches!(error.kind(), NotFound | PermissionDenied | Unsupported);
                    if answered || self.tries == TRIES {
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(100 << self.tries));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn challenges_are_read() {
        let challenge = r#"realm="https://auth.docker.io/token",service="registry.docker.io",scope="a,b""#;
        assert_eq!(parameter(challenge, "realm"), Some("https://auth.docker.io/token"));
        assert_eq!(parameter(challenge, "service"), Some("registry.docker.io"));
        assert_eq!(parameter(challenge, "error"), None);
        assert_eq!(percent_encoded("repository:a/b-c_d:pull"), "repository%3Aa%2Fb-c_d%3Apull");
    }

    /// A registry that gives what `answer` makes of each request's path, range and authorization.
    fn serve(answer: impl Fn(&str, usize, Option<String>) -> Vec<u8> + Send + 'static) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(request) = lines.next() else { continue };
                let (mut from, mut authorization) = (0, None);
                for line in lines.take_while(|line| !line.is_empty()) {
                    let line = line.to_lowercase();
                    if let Some(range) = line.strip_prefix("range: bytes=") {
                        from = range.trim_end_matches('-').parse().unwrap();
                    }
                    authorization = line.strip_prefix("authorization: ").map(String::from).or(authorization);
                }
                let path = request.split(' ').nth(1).unwrap().replace("ADDRESS", "");
                let answer = answer(&path, from, authorization);
                let answer = String::from_utf8(answer).unwrap().replace("ADDRESS", &address.to_string());
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Registry::new(&format!("{address}/a").parse().unwrap())
    }

    #[test]
    fn a_blob_goes_on_where_the_connection_ended() {
        // Each connection gives four bytes more.
        let registry = serve(|path, from, _| {
            assert_eq!(path, "/v2/a/blobs/b");
            let data = "0123456789";
            let end = data.len().min(from + 4);
            let status = if from == 0 { "200 OK" } else { "206 Partial Content" };
            let length = data.len() - from;
            format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{}", &data[from..end])
                .into()
        });
        let mut found = String::new();
        registry.open("b", Some(10)).unwrap().read_to_string(&mut found).unwrap();
        assert_eq!(found, "0123456789");
    }

    #[test]
    fn a_token_is_fetched_when_it_is_asked_for() {
        let registry = serve(|path, _, authorization| {
            let head = "Connection: close\r\n";
            let body = |text: &str| format!("HTTP/1.1 200 OK\r\n{head}Content-Length: {}\r\n\r\n{text}", text.len());
            if path.starts_with("/token?") {
                assert!(path.contains("service=s") && path.contains("repository"), "{path}");
                return body(r#"{"token":"t"}"#).into();
            }
            match authorization.as_deref() {
                Some("bearer t") => body("{}").into(),
                _ => format!(
                    "HTTP/1.1 401 Unauthorized\r\n{head}Content-Length: 0\r\n\
                     WWW-Authenticate: Bearer realm=\"http://ADDRESS/token\",service=\"s\"\r\n\r\n"
                )
                .into(),
            }
        });
        let mut found = String::new();
        registry.open_manifest("latest").unwrap().read_to_string(&mut found).unwrap();
        assert_eq!(found, "{}");
    }

    #[test]
    fn what_is_not_there_is_said_so() {
        let registry =
            serve(|_, _, _| b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".to_vec());
        let error = registry.open_manifest("latest").err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
