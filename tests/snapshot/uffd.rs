//! Memory from another process, by userfaultfd: a handler that serves it from the file, in Firecracker's protocol.

#![expect(unsafe_code, reason = "the ioctls of userfaultfd")]

use std::env;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Output};

use bantam::virtio::balloon;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

use super::*;

const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
/// What is served at once.
const BLOCK: u64 = 64 << 10;
const SOCKET: &str = "UFFD_SOCKET";
const MEMORY: &str = "UFFD_MEMORY";
/// Has the handler end when the first page is wanted.
const ENDS: &str = "UFFD_ENDS";

struct Region {
    start: u64,
    size: u64,
    offset: u64,
}

#[test]
#[ignore = "the process that other tests start"]
fn handler() {
    let (Ok(socket), Ok(memory)) = (env::var(SOCKET), env::var(MEMORY)) else { return };
    let (listener, memory) = (UnixListener::bind(socket).unwrap(), fs::File::open(memory).unwrap());
    println!("listening");
    let (stream, _) = listener.accept().unwrap();
    let (mut text, mut space) = ([0; 4096], [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(&stream, &mut [std::io::IoSliceMut::new(&mut text)], &mut control, RecvFlags::empty()).unwrap();
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let regions: Vec<serde_json::Value> = serde_json::from_slice(&text[..got.bytes]).unwrap();
    let number = |region: &serde_json::Value, key: &str| region[key].as_u64().unwrap();
    let regions = regions.iter().map(|region| {
        assert_eq!((number(region, "page_size"), number(region, "page_size_kib")), (4096, 4096));
        Region {
            start: number(region, "base_host_virt_addr"),
            size: number(region, "size"),
            offset: number(region, "offset"),
        }
    });
    serve(&fds.unwrap(), &stream, &regions.collect::<Vec<_>>(), &memory);
}

/// Gives pages until the machine has ended.
fn serve(uffd: &OwnedFd, stream: &std::os::unix::net::UnixStream, regions: &[Region], memory: &fs::File) {
    let mut removed: Vec<std::ops::Range<u64>> = vec![];
    let (mut message, mut block) = ([0; 32], vec![0; 64 << 10]);
    loop {
        let mut fds = [PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN), PollFd::new(stream, PollFlags::RDHUP)];
        poll(&mut fds, None).unwrap();
        if !fds[1].revents().is_empty() {
            return;
        }
        let Ok(32) = rustix::io::read(uffd, &mut message) else { continue };
        let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
        if message[0] == EVENT_REMOVE {
            removed.push(word(8)..word(16));
            continue;
        }
        assert_eq!(message[0], EVENT_PAGEFAULT);
        if env::var_os(ENDS).is_some() {
            return;
        }
        let page = word(16) & !4095;
        if removed.iter().any(|range| range.contains(&page)) {
            let mut zero = [page, 4096, 0, 0];
            // SAFETY: a `struct uffdio_zeropage` is four u64.
            unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) };
            continue;
        }
        let region = regions.iter().find(|region| (region.start..region.start + region.size).contains(&page)).unwrap();
        let mut copy = |start: u64, size: u64| {
            let part = &mut block[..usize::try_from(size).unwrap()];
            memory.read_exact_at(part, region.offset + (start - region.start)).unwrap();
            let mut copy = [start, part.as_ptr() as u64, size, 0, 0];
            // SAFETY: a `struct uffdio_copy` is five u64.
            unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) == 0 }
        };
        // What the guest has given back must not come back with its neighbours.
        let start = page / BLOCK * BLOCK;
        let is_whole = start >= region.start && start + BLOCK <= region.start + region.size;
        if !removed.is_empty() || !is_whole || !copy(start, BLOCK) {
            copy(page, 4096);
        }
    }
}

/// A handler that runs, and is killed in the end.
struct Handler(Child);

impl Handler {
    fn start(socket: &Path, saved: &Path) -> Self {
        Self::spawn(socket, saved, false)
    }

    fn spawn(socket: &Path, saved: &Path, ends: bool) -> Self {
        let _ = fs::remove_file(socket);
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "uffd::handler", "--ignored", "--nocapture"]);
        command.env(SOCKET, socket).env(MEMORY, saved.join("memory")).stdout(Stdio::piped());
        command.envs(ends.then_some((ENDS, "1")));
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("listening")));
        // Nobody reads any more of it, and it says no more.
        Self(child)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn restore(saved: &Path, socket: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
    command.arg("restore").arg(saved).arg("--uffd").arg(socket);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn another_process_gives_the_memory() {
    let mut lab = Lab::new(Kernel::Tiny, COUNTER.replace("exec 9>/dev/vda", "exec 9>/count").as_str());
    lab.config = lab.config.balloon(balloon::Spec::default());
    let (saved, again, diff) = (lab.path("saved"), lab.path("again"), lab.path("diff"));
    let machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_until(|seen| !counts(seen).is_empty());
    machine.handle.pause().unwrap();
    machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
    let mut printed = machine.stop();

    let socket = lab.path("handler");
    let handler = Handler::start(&socket, &saved);
    let machine = Running::start(Builder::restore(Snapshot::open_served(&saved, &socket).unwrap()));
    machine.screen.wait_until(|seen| values(seen, "noise").len() > 1);
    // What the guest gives back, and uses again, is zeros.
    machine.handle.balloon(Size::mib(32)).unwrap();
    let more = counts(&machine.screen.text()).len() + 12;
    machine.screen.wait_until(|seen| counts(seen).len() > more);
    machine.handle.balloon(Size::mib(0)).unwrap();
    machine.screen.wait_until(|seen| counts(seen).len() > more + 12);
    // All of it can be saved, and what is other than in the file.
    machine.handle.pause().unwrap();
    machine.handle.snapshot(Destination::Diff(diff.clone())).unwrap();
    machine.handle.snapshot(Destination::Folder(again.clone())).unwrap();
    printed += &machine.stop();
    drop(handler);
    for folder in [again, diff] {
        let machine = Running::restore(&folder);
        machine.screen.wait_until(|seen| values(seen, "noise").len() > 1);
        let all = format!("{printed}{}", machine.stop());
        assert!(counts(&all).windows(2).all(|two| two[1] == two[0] + 1), "{all}");
        assert!(values(&all, "noise").windows(2).all(|two| two[1] == two[0]), "{all}");
    }

    // One that ends ends the machine.
    let handler = Handler::start(&socket, &saved);
    let mut child = restore(&saved, &socket);
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    drop(handler);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(stderr(&output).contains("without the process that gave memory: it has ended"), "{}", stderr(&output));

    // Nor is there a machine if it ends while that is built, which takes a page of memory.
    let handler = Handler::spawn(&socket, &saved, true);
    let output = restore(&saved, &socket).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(output.stdout.is_empty(), "the guest has not run");
    assert!(stderr(&output).contains("without the process that gave memory: it has ended"), "{}", stderr(&output));
    drop(handler);

    // With one that stands still a signal does.
    let handler = Handler::start(&socket, &saved);
    let mut child = restore(&saved, &socket);
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    kill_process(Pid::from_child(&handler.0), Signal::STOP).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code().or(output.status.signal()), Some(143), "{}", stderr(&output));
    drop(handler);

    let output = restore(&saved, &lab.path("nobody")).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let told = stderr(&output);
    assert!(told.contains("cannot have memory from a process that listens at") && told.contains("nobody"), "{told}");
    who_may_not_is_told(&lab, &saved);
    the_api_has_its_memory_so(&lab, &saved, &printed);
}

/// Restores as a user without privileges.
fn who_may_not_is_told(lab: &Lab, saved: &Path) {
    const NOBODY: u32 = 65534;
    let unprivileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    if !rustix::process::geteuid().is_root() || unprivileged.trim() == "1" {
        return eprintln!("SKIPPED: whom userfaultfd is refused: this takes root, where others may not use it");
    }
    // What that user may read, run and connect to.
    let program = lab.path("bantam");
    fs::copy(env!("CARGO_BIN_EXE_bantam"), &program).unwrap();
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    open(lab.folder.path(), 0o755);
    open(saved, 0o755);
    open(&saved.join("state"), 0o644);
    let socket = lab.path("anybody");
    let _listener = UnixListener::bind(&socket).unwrap();
    open(&socket, 0o777);
    let mut command = Command::new(program);
    command.arg("restore").arg(saved).arg("--uffd").arg(socket).uid(NOBODY).gid(NOBODY);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    let told = stderr(&output);
    assert!(
        told.contains("cannot have memory from another process: userfaultfd") && told.contains("CAP_SYS_PTRACE"),
        "{told}"
    );
    assert!(told.contains("Operation not permitted"), "{told}");
}

/// The API restores a machine whose memory the handler gives; what that machine did is whole.
fn the_api_has_its_memory_so(lab: &Lab, saved: &Path, printed: &str) {
    let socket = lab.path("api-handler");
    let handler = Handler::start(&socket, saved);
    let mut api = Api::start(&[]);
    let load = |backend: &str, path: &Path, more: serde_json::Value| {
        let memory = serde_json::json!({"backend_type": backend, "backend_path": path});
        let mut body = serde_json::json!({"snapshot_path": saved.join("state"), "mem_backend": memory});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let (status, answer) =
        api.request("PUT", "/snapshot/load", &load("Uffd", &lab.path("nobody"), serde_json::json!({})));
    let why = answer["fault_message"].as_str().unwrap_or_default();
    assert!(status == 400 && why.contains("cannot have memory from a process that listens at"), "{status} {answer}");
    api.done("PUT", "/snapshot/load", &load("Uffd", &socket, serde_json::json!({"resume_vm": true})));
    assert_eq!(api.done("GET", "/", "")["state"], "Running");
    api.done("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let (state, memory) = (lab.path("api-state"), lab.path("api-memory"));
    let body = serde_json::json!({"snapshot_path": state, "mem_file_path": memory});
    api.done("PUT", "/snapshot/create", &body.to_string());
    let machine = Running::start(Builder::restore(Snapshot::open_files(&state, &memory).unwrap()));
    let seen = machine.screen.wait_until(|seen| values(seen, "noise").len() > 1);
    machine.stop();
    // It goes on to count.
    assert!(counts(&seen)[0] > 1, "{seen}");
    assert!(values(&seen, "noise").iter().all(|noise| *noise == values(printed, "noise")[0]), "{seen}");
    // The end of the handler is its end.
    api.done("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    drop(handler);
    assert_eq!(api.wait(), Some(125));

    // That is so while the memory is saved, of which a page is waited for.
    let handler = Handler::start(&socket, saved);
    let mut api = Api::start(&[]);
    api.done("PUT", "/snapshot/load", &load("Uffd", &socket, serde_json::json!({})));
    kill_process(Pid::from_child(&handler.0), Signal::STOP).unwrap();
    let (mut stream, body) = (api.connect(), body.to_string());
    let length = body.len();
    write!(stream, "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    // It has begun to be written.
    while !fs::read_dir(lab.folder.path())
        .unwrap()
        .any(|entry| entry.unwrap().file_name().to_string_lossy().contains(".saving-"))
    {
        thread::yield_now();
    }
    drop(handler);
    assert_eq!(api.wait(), Some(125));
}
