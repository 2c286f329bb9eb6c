//! What is written about a machine while it runs.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use serde_json::Value;

use crate::support::{Guest, Kernel};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn events_and_metrics_are_written_and_a_pipe_that_nobody_reads_stops_nothing() {
    let guest = Guest::new(Kernel::Tiny).script("dd if=/dev/hwrng of=/bytes bs=64 count=1");
    let [events, metrics] = ["events", "metrics"].map(|name| guest.folder().join(name));
    assert!(Command::new("mkfifo").arg(&metrics).status().unwrap().success());
    // Held open, so that what is written stays there; it is read when all is over.
    let pipe = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&metrics).unwrap();
    let guest = guest.option("--events", events.display()).option("--metrics", metrics.display());
    let mut running = guest.spawn();
    drop(running.stdin().take());
    let folder = running.folder().to_owned();
    running.wait_for("test.sh: status 0");
    let text = || fs::read_to_string(folder.join("events")).unwrap();
    crate::eventually(|| text().contains("\"ended\""));
    let told = lines(&text());
    let ended = running.wait().succeeded();
    let names: Vec<_> = told.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["started", "booted", "ended"]);
    assert_eq!((&told[2]["outcome"], &told[2]["cause"]), (&ended.report["outcome"], &ended.report["cause"]));
    assert!(told.is_sorted_by_key(|line| line["elapsed-ms"].as_f64().unwrap().to_bits()));
    let counted = |counter| ended.counted("vcpu0", counter);
    let accesses = ["port-reads", "port-writes", "mmio-reads", "mmio-writes"].map(counted);
    assert_eq!(accesses.iter().sum::<u64>(), counted("device-accesses"));

    let text = std::io::read_to_string(crate::Nonblocking(pipe)).unwrap();
    let told = lines(&text);
    assert_eq!(told.len(), 2, "at the start and at the end");
    let writes = told.iter().map(|line| line["vcpu"]["exit_io_out"].as_u64().unwrap());
    assert_eq!(writes.sum::<u64>(), counted("port-writes"));
    assert!(told[1]["entropy"]["entropy_bytes"].as_u64() >= Some(64));
}
