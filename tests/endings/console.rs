//! The serial console on whatever is standard input and output, and elsewhere.

use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal};
use serde_json::json;

use crate::support::{Guest, Kernel};
use crate::{eventually, started_by};

/// More than fits into the smallest pipe and all that bantam keeps for it.
const COUNT: &str = "echo begin; seq 1 8000; echo end";

fn tiny(script: &str) -> Guest {
    Guest::new(Kernel::Tiny).script(script)
}

/// A guest with a pipe as its standard output, as small as a pipe can be, and the end to read.
fn with_pipe(script: &str) -> (Guest, PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut guest = tiny(script);
    guest.command().stdout(writer);
    (guest, reader)
}

fn read_until(reader: &mut impl Read, end: &str) -> String {
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while !seen.windows(end.len()).any(|window| window == end.as_bytes()) {
        let count = reader.read(&mut buffer);
        let count =
            count.unwrap_or_else(|error| panic!("{error}, and no `{end}` in {}", String::from_utf8_lossy(&seen)));
        assert!(count > 0, "no `{end}` in {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8(seen).unwrap()
}

/// A thread of bantam, in /proc.
fn task(bantam: Pid, name: &str) -> PathBuf {
    let mut tasks = fs::read_dir(format!("/proc/{bantam}/task")).unwrap().map(|task| task.unwrap().path());
    tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)).unwrap_or_default()
}

/// Whether the vCPU is neither in the guest nor serving it: it waits for room in the console.
fn vcpu_waits(bantam: Pid) -> bool {
    let call = fs::read_to_string(task(bantam, "bantam-vcpu0").join("syscall"));
    call.is_ok_and(|call| call.starts_with(&format!("{} ", libc::SYS_futex)))
}

#[test]
fn input_from_a_pipe_that_ends() {
    let mut running = tiny("sh").spawn();
    running.write("uname -a\necho sum=$((40 + 2))\n");
    drop(running.stdin().take());
    running.wait_for("sum=42");
    let text = running.stdout();
    assert!(text.contains("Linux (none) 6."), "{text}");
    // The guest does not learn of the end of the input: on a serial line there is none.
    running.signal(Signal::TERM);
    assert_eq!(running.wait().status, 143);
}

#[test]
fn input_closed_and_output_to_a_file() {
    let guest = tiny("echo to a file");
    let output = guest.folder().join("output").display().to_string();
    let running = started_by(guest, "sh", &["-c", "exec \"$@\" <&- >\"$0\"", &output]).start();
    let folder = running.folder().to_owned();
    // Before the folder goes.
    eventually(|| folder.join("report.json").exists());
    assert!(fs::read_to_string(output).unwrap().contains("to a file"));
    assert_eq!(running.wait().status, 0);
}

#[test]
fn everything_closed() {
    let ended = started_by(tiny("echo to nobody"), "sh", &["-c", "exec \"$@\" <&- >&- 2>&-", "sh"]).run();
    ended.require(ended.status == 0 && ended.report["outcome"] == "halted", "expected a clean end");
    assert!(ended.report["durations"]["first-console-byte"].is_number());
}

#[test]
fn output_to_dev_null() {
    let ended = started_by(tiny("echo to nobody"), "sh", &["-c", "exec \"$@\" >/dev/null", "sh"]).run();
    ended.require(ended.status == 0 && ended.report["outcome"] == "halted", "expected a clean end");
}

#[test]
fn output_to_a_file_that_may_not_grow_on() {
    let guest = tiny(COUNT);
    let output = guest.folder().join("output").display().to_string();
    let guest = guest.option("--serial", format_args!("file={output}"));
    let running = started_by(guest, "sh", &["-c", "ulimit -f 16; exec \"$@\"", "sh"]).start();
    let folder = running.folder().to_owned();
    eventually(|| folder.join("report.json").exists());
    assert!((1..=16 << 10).contains(&fs::metadata(output).unwrap().len()));
    let ended = running.wait();
    ended.require(ended.status == 0 && ended.report["outcome"] == "halted", "expected the guest to go on");
}

#[test]
fn words_for_nobody_do_not_keep_the_end_away() {
    let (reader, mut writer) = io::pipe().unwrap();
    let size = fcntl_setpipe_size(&writer, 4096).unwrap();
    writer.write_all(&vec![b'x'; size]).unwrap();
    let mut guest = tiny("echo to the end").flag("-vv");
    guest.command().stderr(writer);
    let ended = guest.run();
    ended.require(ended.status == 0 && ended.stdout.contains("to the end"), "expected a clean end");
    drop(reader);
}

#[test]
fn a_report_that_is_a_mount_of_its_own() {
    let guest = tiny("echo done");
    let report = guest.folder().join("report.json").display().to_string();
    let mounted = ["--mount", "sh", "-c", "touch \"$0\"; mount --bind \"$0\" \"$0\"; exec \"$@\"", &report];
    let ended = started_by(guest, "unshare", &mounted).run();
    ended.require(ended.status == 0 && ended.report["outcome"] == "halted", "expected a report in place");
}

#[test]
fn a_reader_that_leaves_early() {
    let (guest, mut reader) = with_pipe(&format!("echo ready; {COUNT}; reboot -f"));
    let running = guest.start();
    read_until(&mut reader, "ready");
    drop(reader);
    let ended = running.wait();
    ended.require(ended.status == 0 && ended.report["outcome"] == "rebooted", "expected the guest to go on");
}

#[test]
fn a_reader_that_pauses_gets_all_in_few_writes() {
    // 26 KB, a little more than there is room for: what comes while it is read may be written byte by byte.
    let lines = 4600;
    let (guest, mut reader) = with_pipe(&format!("echo begin; seq 1 {lines}; echo end; read go"));
    let mut running = guest.spawn();
    eventually(|| vcpu_waits(running.pid()));
    let text = read_until(&mut reader, "end\r\n");
    let numbers: String = (1..=lines).map(|number| format!("{number}\r\n")).collect();
    assert!(text.ends_with(&format!("begin\r\n{numbers}end\r\n")), "{} bytes", text.len());

    let counts = fs::read_to_string(task(running.pid(), "bantam-console").join("io")).unwrap();
    let writes = counts.lines().find_map(|line| line.strip_prefix("syscw: ")).unwrap();
    assert!(writes.parse::<usize>().unwrap() < text.len() / 2, "{writes} writes of {} bytes", text.len());
    running.write("\n");
    read_until(&mut reader, "test.sh: status 0");
    drop(reader);
    assert_eq!(running.wait().status, 0);
}

#[test]
fn a_reader_that_never_reads_does_not_keep_a_signal_away() {
    let (guest, reader) = with_pipe("while :; do cat /proc/kallsyms; done");
    let mut running = guest.spawn();
    eventually(|| vcpu_waits(running.pid()));
    running.write("input for the serial port, which the vCPU has while it waits\n");
    running.signal(Signal::TERM);
    let ended = running.wait();
    ended.require(ended.status == 143 && ended.report["outcome"] == "signaled", "expected the signal");
    drop(reader);
}

#[test]
fn a_reader_that_never_reads_does_not_keep_the_time_limit_away() {
    let (guest, reader) = with_pipe("while :; do cat /proc/kallsyms; done");
    let mut running = guest.option("--timeout", "10s").spawn();
    running.write("input\n");
    let ended = running.wait();
    ended.require(ended.status == 124 && ended.report["outcome"] == "timed-out", "expected the time limit");
    drop(reader);
}

#[test]
fn none() {
    let ended = tiny("echo to nobody").option("--serial", "none").run();
    ended.require(ended.status == 0 && ended.stdout.is_empty(), "expected silence");
    assert!(ended.report["durations"]["first-console-byte"].is_number());
}

#[test]
fn a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let ended = tiny("echo to a file").option("--serial", format_args!("file={}", path.display())).run();
    ended.require(ended.status == 0 && ended.stdout.is_empty(), "expected silence");
    assert!(fs::read_to_string(path).unwrap().contains("to a file\r\ntest.sh: status 0"));
}

#[test]
fn a_socket_with_one_client_after_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let running = tiny("sh").option("--serial", format_args!("socket={}", path.display())).start();
    // A path is there before a client is listened to.
    eventually(|| UnixStream::connect(&path).is_ok());
    for number in [1, 2] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        client.write_all(format!("echo client=$(({number} + 40))\n").as_bytes()).unwrap();
        read_until(&mut client, &format!("client={}", number + 40));
    }
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"reboot -f\n").unwrap();
    let ended = running.wait();
    ended.require(ended.status == 0 && ended.report["outcome"] == json!("rebooted"), "expected a reboot");
    assert!(!path.exists());
}
