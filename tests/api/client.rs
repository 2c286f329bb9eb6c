//! `bantam api` and a client of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A `bantam api` that listens, called by the name of Firecracker. It is killed when this is dropped.
pub struct Api {
    pub child: Child,
    pub folder: TempDir,
}

impl Api {
    pub fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command.arg0("firecracker").args(["--api-sock", "api.sock"]).args(flags).current_dir(&folder);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self { child, folder }
    }

    /// One called by its own name, whose machine is found in `runtime` by what it is called.
    pub fn named(runtime: &Path, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command.args(["api", "--api-sock", "api.sock"]).args(flags).current_dir(&folder);
        command.env("XDG_RUNTIME_DIR", runtime).stdin(Stdio::null()).stdout(Stdio::null());
        Self { child: command.spawn().unwrap(), folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// A connection, as soon as there is one to be had.
    pub fn connect(&self) -> UnixStream {
        let begin = Instant::now();
        loop {
            match UnixStream::connect(self.path("api.sock")) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(LIMIT)).unwrap();
                    return stream;
                }
                Err(error) => assert!(begin.elapsed() < LIMIT, "cannot connect: {error}"),
            }
            thread::yield_now();
        }
    }

    /// The answer to a request: its status, and its body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = self.connect();
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        answer(&mut BufReader::new(stream))
    }

    /// Checks that a request is done, and what its answer is.
    #[track_caller]
    pub fn done(&self, method: &str, path: &str, body: &str) -> Value {
        let (status, answer) = self.request(method, path, body);
        assert!(matches!(status, 200 | 204), "{method} {path} {body}: {status} {answer}");
        answer
    }

    /// Waits for its end: its exit status.
    pub fn wait(&mut self) -> Option<i32> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begin.elapsed() < LIMIT, "it does not end");
            thread::yield_now();
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The next answer of a connection.
pub fn answer(stream: &mut impl BufRead) -> (u16, Value) {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        if name == "Content-Length" {
            length = value.parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() })
}

/// Whether the other side has closed the connection.
pub fn is_closed(mut stream: UnixStream) -> bool {
    let _ = stream.shutdown(Shutdown::Write);
    let mut rest = vec![];
    stream.read_to_end(&mut rest).is_ok()
}

/// A kernel that does nothing until it is stopped, for where there is only the API to look at.
pub fn idle_kernel(path: &Path) {
    // mov al, 0xff; out 0x21, al; out 0xa1, al; sti; hlt; jmp -3
    std::fs::write(path, elf(&[0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1, 0xfb, 0xf4, 0xeb, 0xfd])).unwrap();
}

/// An ELF kernel of these instructions at 1 MiB.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..4].copy_from_slice(b"\x7fELF");
    (image[4], image[5], image[6]) = (2, 1, 1);
    let mut put =
        |at: usize, value: u64, size: usize| image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    put(16, 2, 2);
    put(18, 62, 2);
    put(20, 1, 4);
    put(24, 0x10_0000, 8);
    put(32, 64, 8);
    put(52, 64, 2);
    put(54, 56, 2);
    put(56, 1, 2);
    put(64, 1, 4);
    put(68, 5, 4);
    put(72, 0x1000, 8);
    put(80, 0x10_0000, 8);
    put(88, 0x10_0000, 8);
    put(96, code.len() as u64, 8);
    put(104, code.len() as u64, 8);
    put(112, 0x1000, 8);
    image.extend_from_slice(code);
    image
}
