//! What clients do to a server, well and badly.

use std::io::{BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::client::{Api, answer, idle_kernel, is_closed};

#[test]
fn a_connection_carries_many_requests() {
    let api = Api::start(&[]);
    let mut stream = api.connect();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    for _ in 0..3 {
        write!(stream, "GET /version HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(answer(&mut reader).0, 200);
    }
    // Two at once, in pieces.
    for piece in [
        "GET / HT",
        "TP/1.1\r\n\r\nPUT /machine-config HTTP/1.1\r\nContent-Length: 37\r\n\r\n{\"vcpu_count\":",
        " 1, \"mem_size_mib\": 64}",
    ] {
        stream.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!([answer(&mut reader).0, answer(&mut reader).0], [200, 204]);
    // A client that waits to be told to go on.
    write!(stream, "PUT /entropy HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").unwrap();
    assert_eq!(answer(&mut reader).0, 100);
    write!(stream, "{{}}").unwrap();
    assert_eq!(answer(&mut reader).0, 204);
    write!(stream, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    assert_eq!(answer(&mut reader).0, 200);
    assert!(is_closed(stream));
}

#[test]
fn clients_that_stall_hold_up_nobody() {
    let api = Api::start(&["--http-api-max-payload-size", "100"]);
    let mut stalled: Vec<_> = (0..80).map(|_| api.connect()).collect();
    for (index, stream) in stalled.iter_mut().enumerate() {
        // More than there may be: the first are closed, which a write may see.
        let _ = match index % 3 {
            0 => write!(stream, "GET / HT"),
            1 => write!(stream, "PUT / HTTP/1.1\r\nContent-Length: 50\r\n\r\n{{"),
            _ => Ok(()),
        };
        assert_eq!(api.request("GET", "/", "").0, 200);
    }
    // One that asks and does not listen.
    let mut deaf = api.connect();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write(b"GET /vm/config HTTP/1.1\r\n\r\n").is_ok() {}
    assert_eq!(api.request("GET", "/", "").0, 200);
    // What is too much, or no request at all.
    assert_eq!(api.request("PUT", "/logger", &" ".repeat(101)).0, 413);
    let mut stream = api.connect();
    let _ = stream.write_all(&[b'x'; 1 << 16]);
    assert!(matches!(answer(&mut BufReader::new(stream.try_clone().unwrap())).0, 400 | 431));
    let mut stream = api.connect();
    write!(stream, "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").unwrap();
    assert_eq!(answer(&mut BufReader::new(stream)).0, 400);
    assert_eq!(api.request("GET", "/", "").0, 200);
}

fn firecracker(api: &Api, flags: &[&str]) -> (Option<i32>, String, String) {
    let link = api.path("firecracker");
    let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_bantam"), &link);
    let mut command = Command::new(link);
    let output = command.args(flags).current_dir(&api.folder).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_link_takes_the_flags_of_firecracker() {
    let api = Api::start(&[]);
    api.connect();
    let (status, stdout, _) = firecracker(&api, &["--version"]);
    assert!(status == Some(0) && stdout.starts_with("Firecracker v1.17.0\n"), "{stdout}");
    // Of a snapshot only the beginning is looked at.
    api.write("state", b"bantam-state 7 0.0.1 2 damaged\n");
    for (flags, version) in [(&["--snapshot-version"][..], "v2.0.0\n"), (&["--describe-snapshot", "state"], "v7.0.0\n")]
    {
        let (status, stdout, stderr) = firecracker(&api, flags);
        assert_eq!((status, &*stdout), (Some(0), version), "{flags:?}: {stderr}");
    }
    for (flags, words) in [
        (&["--describe-snapshot", "none"][..], "cannot read none of a snapshot: No such file"),
        (&["--describe-snapshot", "wrong.json"], "cannot use the snapshot's state wrong.json: it is no state"),
        (&["--describe-snapshot", "cut"], "cannot use the snapshot's state cut: its first line is damaged"),
        (&["--api-sock", "api.sock"], "api.sock, which is there already"),
        (&["--api-sock", "no/where"], "cannot listen on the API's socket no/where"),
        (&["--no-api"], "--config-file"),
        (&["--id", "a b"], "letters, digits and dashes"),
        (&["--enable-pci"], "cannot follow --enable-pci"),
        (&["--seccomp-filter", "f"], "cannot follow --seccomp-filter"),
        (&["--level", "loud"], "unknown level `loud`"),
        (&["--no-api", "--config-file", "none"], "cannot read the configuration none"),
        (&["--no-api", "--config-file", "empty.json"], "it has no `boot-source`"),
        (
            &["--no-api", "--config-file", "wrong.json"],
            "wrong.json, line 1: unknown key `drive`: did you mean `drives`?",
        ),
    ] {
        api.write("empty.json", b"{}");
        api.write("cut", b"bantam-state 1 0.");
        api.write("wrong.json", b"{\"drive\": []}");
        let (status, stdout, stderr) = firecracker(&api, flags);
        assert!(status == Some(125) && stdout.is_empty() && stderr.contains(words), "{flags:?}: {stderr}");
    }
    // The one that was there goes on.
    assert_eq!(api.request("GET", "/", "").0, 200);
}

/// What the machine of an API is called, and what happens to it.
#[test]
fn a_machine_of_the_api_has_a_name_and_tells_what_happens() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let run = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command.args(words).env("XDG_RUNTIME_DIR", folder.path()).stdin(Stdio::null());
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (kernel, events) = (path("kernel"), path("events"));
    idle_kernel(kernel.as_ref());
    let mut api = Api::named(folder.path(), &["--name", "one", "--events", &events]);
    // There is no machine before it starts.
    api.done("GET", "/", "");
    assert_eq!(run(&["ps", "-q"]), (Some(0), String::new()));
    api.done("PUT", "/boot-source", &format!(r#"{{"kernel_image_path": "{kernel}"}}"#));
    api.done("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert_eq!(run(&["ps", "-q"]), (Some(0), "one\n".into()));
    // The name is taken.
    let (status, told) = run(&["run", "--name", "one", "--kernel", "/dev/null"]);
    assert!(status == Some(125) && told.contains("a machine of that name runs"), "{told}");
    assert_eq!(run(&["pause", "one"]).0, Some(0));
    assert_eq!(api.done("GET", "/", "")["state"], "Paused");
    api.done("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    assert!(run(&["ps"]).1.contains("running"));
    assert_eq!(run(&["stop", "one"]).0, Some(0));
    assert_eq!(api.wait(), Some(0));
    assert_eq!(run(&["ps", "-q"]), (Some(0), String::new()));
    let told = std::fs::read_to_string(&events).unwrap();
    let told: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["started", "paused", "resumed", "ended"], "{told:?}");

    // What cannot be is told: a name at once, a file when the machine is to be started.
    let socket = path("refused.sock");
    let (status, told) = run(&["api", "--api-sock", &socket, "--name", "a/b"]);
    assert!(status == Some(125) && told.contains("--name"), "{told}");
    let api = Api::named(folder.path(), &["--name", "two", "--events", "/no/where"]);
    api.done("PUT", "/boot-source", &format!(r#"{{"kernel_image_path": "{kernel}"}}"#));
    let (status, told) = api.request("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let why = told["fault_message"].as_str().unwrap_or_default();
    assert!(status == 400 && why.contains("cannot write the events to /no/where"), "{status} {told}");
}

#[test]
fn a_machine_starts_from_its_file() {
    let folder = tempfile::tempdir().unwrap();
    idle_kernel(&folder.path().join("kernel"));
    let kernel = folder.path().join("kernel");
    let file = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{}"}}, "machine-config": {{"vcpu_count": 2, "mem_size_mib": 64}},
            "drives": [], "balloon_device": null}}"#,
        kernel.display()
    );
    let path = folder.path().join("vm.json");
    std::fs::write(&path, file).unwrap();
    let flags = [
        "--config-file",
        path.to_str().unwrap(),
        "--no-seccomp",
        "--start-time-us",
        "1",
        "--level",
        "info",
        "--boot-timer",
    ];
    let api = Api::start(&flags);
    assert_eq!(api.done("GET", "/", "")["state"], "Running");
    assert_eq!(api.done("GET", "/machine-config", "")["vcpu_count"], 2);
}
