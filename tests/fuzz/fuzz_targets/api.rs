//! The API: bytes of clients, in pieces.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bantam::config::firecracker::{Logger, Settings};
use bantam::control::{Api, Connection, Program, Request};
use bantam::machine::{Handle, Snapshot};
use bantam::signal::SignalFd;

/// The most bytes in a request's body.
const MAX: usize = 2048;

/// Has no machine.
struct NoMachine;

impl Program for NoMachine {
    fn log(&mut self, _: &Logger) -> Result<(), String> {
        Ok(())
    }
    fn start(&mut self, _: &Settings) -> Result<Handle, String> {
        Err("there is no KVM here".into())
    }
    fn restore(&mut self, _: Snapshot, _: bool) -> Result<Handle, String> {
        Err("there is no KVM here".into())
    }
    fn signals(&self) -> Option<&SignalFd> {
        None
    }
}

/// Whether a request would have files of the host opened or made.
fn opens_files(request: &Request) -> bool {
    ["/metrics", "/snapshot"].iter().any(|start| request.target.starts_with(start))
}

/// Takes answers apart, which have to be whole.
fn check(mut answers: &[u8], methods: &[String]) {
    let mut methods = methods.iter();
    while !answers.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut head = httparse::Response::new(&mut headers);
        let parsed = head.parse(answers).expect("an answer is HTTP");
        let httparse::Status::Complete(length) = parsed else { panic!("half an answer") };
        let of = |name: &str| head.headers.iter().find(|header| header.name == name);
        let body = of("Content-Length").map_or(0, |header| {
            std::str::from_utf8(header.value).ok().and_then(|text| text.parse().ok()).expect("a number")
        });
        answers = &answers[length..];
        if head.code == Some(100) {
            continue;
        }
        if methods.next().is_some_and(|method| method == "HEAD") {
            continue;
        }
        let (body, rest) = answers.split_at_checked(body).expect("all of the body");
        assert!(body.is_empty() || serde_json::from_slice::<serde_json::Value>(body).is_ok(), "a body is JSON");
        answers = rest;
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((piece, data)) = data.split_first() else { return };
    let (mut client, server) = UnixStream::pair().expect("sockets");
    client.set_nonblocking(true).expect("a socket");
    let mut connection = Connection::new(server).expect("a socket");
    let mut api = Api::new("fuzzed", Settings::default());
    let (mut answers, mut methods) = (vec![], vec![]);
    for piece in data.chunks(usize::from(*piece) + 1) {
        if client.write_all(piece).is_err() {
            break;
        }
        connection.read(MAX);
        while let Some(request) = connection.request(MAX) {
            assert!(request.body.len() <= MAX);
            if opens_files(&request) {
                return;
            }
            methods.push(request.method.clone());
            let response = api.respond(&request, Some(&mut NoMachine));
            assert!([200, 204, 400].contains(&response.status), "{response:?}");
            assert!(response.status != 204 || response.body.is_empty());
            connection.answer(&request.method, &response);
        }
        let mut some = vec![0; 1 << 16];
        while let Ok(1..) = client.read(&mut some).inspect(|read| answers.extend_from_slice(&some[..*read])) {}
        if connection.is_over() {
            break;
        }
    }
    check(&answers, &methods);
});
