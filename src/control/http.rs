//! HTTP/1.1 as far as the API needs it: requests with a body of known length in, JSON out.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

/// The most bytes before a request's body.
const HEAD_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// What is read at once.
const CHUNK: usize = 8 << 10;

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `PUT`, ...
    pub method: String,
    /// The path, and what follows it.
    pub target: String,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the connection is kept.
    keep: bool,
}

/// An answer: its status, and its body if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status.
    pub status: u16,
    /// The body, JSON.
    pub body: String,
}

impl Response {
    /// Done, and nothing to say.
    pub fn done() -> Self {
        Self { status: 204, body: String::new() }
    }

    /// What was asked for.
    pub fn found(body: &Value) -> Self {
        Self { status: 200, body: body.to_string() }
    }

    /// A request that is refused.
    pub fn refused(why: impl Into<String>) -> Self {
        Self::fault(400, why)
    }

    fn fault(status: u16, why: impl Into<String>) -> Self {
        Self { status, body: json!({"fault_message": why.into()}).to_string() }
    }

    fn write(&self, head_only: bool, keep: bool, to: &mut Vec<u8>) {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            413 => "Payload Too Large",
            431 => "Request Header Fields Too Large",
            _ => "Bad Request",
        };
        let connection = if keep { "keep-alive" } else { "close" };
        let head =
            format!("HTTP/1.1 {} {reason}\r\nServer: Firecracker API\r\nConnection: {connection}\r\n", self.status);
        to.extend_from_slice(head.as_bytes());
        if self.status != 204 {
            let length = self.body.len();
            to.extend_from_slice(format!("Content-Type: application/json\r\nContent-Length: {length}\r\n").as_bytes());
        }
        to.extend_from_slice(b"\r\n");
        if !head_only {
            to.extend_from_slice(self.body.as_bytes());
        }
    }
}

/// What the input so far is.
#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    /// There is more to come; `continue` when the client waits to be told to go on.
    Partial { expects: bool },
    /// A request, of so many bytes.
    Whole(Request, usize),
    /// No request.
    Wrong(Response),
}

/// Reads the first request of `input`, whose body may have `max` bytes.
fn parse(input: &[u8], max: usize) -> Parsed {
    let wrong = |why: String| Parsed::Wrong(Response::refused(why));
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(input) {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_MAX => length,
        Ok(httparse::Status::Partial) if input.len() < HEAD_MAX => return Parsed::Partial { expects: false },
        Ok(_) => {
            return Parsed::Wrong(Response::fault(431, format!("The request's head has more than {HEAD_MAX} bytes.")));
        }
        Err(error) => return wrong(format!("Invalid HTTP request: {error}.")),
    };
    let mut body = None;
    let (mut expects, mut keep) = (false, head.version == Some(1));
    for header in head.headers.iter() {
        let name = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if name("content-length") {
            let Ok(length) = value.parse::<u64>() else { return wrong(format!("Invalid Content-Length: {value}.")) };
            if body.replace(length).is_some_and(|other| other != length) {
                return wrong("Two values of Content-Length.".into());
            }
        } else if name("transfer-encoding") {
            return wrong(format!("The transfer encoding {value} is not supported: send Content-Length."));
        } else if name("expect") {
            expects = value.eq_ignore_ascii_case("100-continue");
        } else if name("connection") {
            let has = |word: &str| value.split(',').any(|it| it.trim().eq_ignore_ascii_case(word));
            keep = (keep || has("keep-alive")) && !has("close");
        }
    }
    let body = body.unwrap_or(0);
    let Some(body) = usize::try_from(body).ok().filter(|body| *body <= max) else {
        let why = format!("Request payload with size {body} is larger than the limit of {max} allowed by server.");
        return Parsed::Wrong(Response::fault(413, why));
    };
    let Some(body) = input.get(length..length.saturating_add(body)) else { return Parsed::Partial { expects } };
    let request = Request {
        method: head.method.unwrap_or_default().to_owned(),
        target: head.path.unwrap_or_default().to_owned(),
        body: body.to_owned(),
        keep,
    };
    Parsed::Whole(request, length + body.len())
}

/// A client. Nothing waits for it: what it has sent is taken, and what it does not read is kept, and then nothing more of
/// it is read.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// It was told to go on with its body.
    continued: bool,
    /// It has sent all that it will.
    ended: bool,
    /// It is closed when the output is written.
    closing: bool,
}

impl Connection {
    /// A client that has connected.
    ///
    /// # Errors
    /// When it cannot be kept from being waited for.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (input, output) = (vec![], vec![]);
        Ok(Self { stream, input, output, continued: false, ended: false, closing: false })
    }

    /// Its socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether there is something to write, and it is read only afterwards.
    pub fn is_writing(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether there is no more to do with it.
    pub fn is_over(&self) -> bool {
        self.output.is_empty() && (self.closing || self.ended)
    }

    /// Takes what it has sent, as far as it may be part of a request with a body of `max` bytes.
    pub fn read(&mut self, max: usize) {
        let mut chunk = [0; CHUNK];
        while !self.ended && self.input.len() <= max.saturating_add(HEAD_MAX) {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => (self.ended, self.closing, self.output) = (true, true, vec![]),
            }
        }
    }

    /// The next request that it has sent whole. What is none is answered here.
    pub fn request(&mut self, max: usize) -> Option<Request> {
        if self.closing || self.input.is_empty() {
            return None;
        }
        match parse(&self.input, max) {
            Parsed::Whole(request, length) => {
                self.input.drain(..length);
                (self.continued, self.closing) = (false, !request.keep);
                return Some(request);
            }
            Parsed::Wrong(response) => {
                self.closing = true;
                self.input = vec![];
                response.write(false, false, &mut self.output);
                self.write();
            }
            Parsed::Partial { expects } if expects && !self.continued => {
                self.continued = true;
                self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                self.write();
            }
            Parsed::Partial { .. } => {}
        }
        None
    }

    /// Answers the last request.
    pub fn answer(&mut self, method: &str, response: &Response) {
        response.write(method == "HEAD", !self.closing, &mut self.output);
        self.write();
    }

    /// Writes as much as it takes.
    pub fn write(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) if count > 0 => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                _ => (self.ended, self.closing, self.output) = (true, true, vec![]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(text: &str) -> (Request, usize) {
        match parse(text.as_bytes(), 50) {
            Parsed::Whole(request, length) => (request, length),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn requests_are_read_whole() {
        let text = "PUT /actions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}GET / HTTP";
        let (request, length) = whole(text);
        assert_eq!(
            (request.method.as_str(), request.target.as_str(), request.body.as_slice()),
            ("PUT", "/actions", &b"{}"[..])
        );
        assert!(request.keep && text[length..].starts_with("GET"));
        assert!(!whole("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n").0.keep);
        assert!(!whole("GET / HTTP/1.0\r\n\r\n").0.keep);
        for part in ["", "GE", "GET / HTTP/1.1\r\n", "PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}"] {
            assert_eq!(parse(part.as_bytes(), 50), Parsed::Partial { expects: false }, "{part}");
        }
        let endless = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n{{}}", usize::MAX);
        assert_eq!(parse(endless.as_bytes(), usize::MAX), Parsed::Partial { expects: false });
        let waits = "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(parse(waits.as_bytes(), 50), Parsed::Partial { expects: true });
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(HEAD_MAX));
        for (text, status) in [
            ("nonsense\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 51\r\n\r\n", 413),
            ("PUT / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n", 413),
            (&long, 431),
            (&long[..HEAD_MAX], 431),
        ] {
            match parse(text.as_bytes(), 50) {
                Parsed::Wrong(response) => assert_eq!(response.status, status, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_answer_has_its_length() {
        let mut text = vec![];
        Response::refused("no").write(false, true, &mut text);
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{text}");
        assert!(text.ends_with("\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}"), "{text}");
        let mut text = vec![];
        Response::done().write(false, false, &mut text);
        assert!(!String::from_utf8(text).unwrap().contains("Content-"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes, 50);
            let _ = parse(&[b"PUT / HTTP/1.1\r\n", &bytes[..], b"\r\n\r\n"].concat(), 50);
        }
    }
}
