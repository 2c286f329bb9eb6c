//! The `bantam` command as a user meets it: what it prints, and what it says to mistakes.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "support/payload.rs"]
mod payload;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use payload::{ELF_PARTS, HALT, HANG, IDLE, REBOOT, elf};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const BANTAM: &str = env!("CARGO_BIN_EXE_bantam");

/// How long bantam may take for anything here.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs a command to its end. If that does not come in time the command is killed, and the test fails.
#[track_caller]
fn output(command: &mut Command) -> Output {
    let child = command.spawn().unwrap();
    let pid = Pid::from_child(&child);
    within_limit(move || child.wait_with_output()).unwrap_or_else(|| {
        let _ = kill_process(pid, Signal::KILL);
        panic!("{command:?} did not end")
    })
}

/// What `wait` returns, if it does so in time.
fn within_limit<T: Send + 'static>(wait: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(wait()));
    Some(receiver.recv_timeout(LIMIT).ok()?.unwrap())
}

/// A folder with a kernel, an initrd and a disk in it, where bantam runs.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("kernel", &elf(REBOOT));
        folder.write("disk", &[0; 4096]);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// A file of `len` bytes that takes no room.
    fn sparse(&self, name: &str, len: u64) {
        fs::File::create(self.path(name)).unwrap().set_len(len).unwrap();
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn command(&self, program: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(flags).current_dir(&self.0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs bantam with these flags.
    fn bantam(&self, flags: &[&str]) -> Output {
        output(&mut self.command(BANTAM, flags))
    }

    /// Runs a machine with the kernel of the folder, and with no console unless `flags` have one.
    fn run(&self, flags: &[&str]) -> Output {
        let console: &[_] = if flags.contains(&"--serial") { &[] } else { &["--serial", "none"] };
        self.bantam(&[&["run", "--kernel", "kernel"], console, flags].concat())
    }

    /// What is in the folder: each name, with its bytes if those are few.
    fn contents(&self) -> Vec<(PathBuf, Option<Vec<u8>>)> {
        let paths = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        let few = |path: &PathBuf| path.metadata().unwrap().len() < 1 << 20;
        let mut all: Vec<_> = paths.map(|path| (few(&path).then(|| fs::read(&path).ok()).flatten(), path)).collect();
        all.sort();
        all.into_iter().map(|(bytes, path)| (path, bytes)).collect()
    }

    /// Checks that these flags are refused: with 125, words that have each of `words`, nothing on standard output, and
    /// nothing changed in the folder.
    #[track_caller]
    fn refuses(&self, flags: &[&str], words: &[&str]) {
        let before = self.contents();
        let output = self.run(flags);
        refused(&output, words);
        assert_eq!(self.contents(), before, "{flags:?} changed files");
    }
}

/// Checks that bantam refused: see [`Folder::refuses`].
#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    assert_eq!(text(&output.stdout), "");
    assert!(error.starts_with("bantam: "), "{error}");
    assert!(!error.contains("internal error"), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Puts `bytes` at `at`.
fn with(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

/// A machine that runs until it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs bantam without root's privileges, in a folder of the user's own or of root's.
fn unprivileged(folder: &Folder, flags: &[&str]) -> Output {
    let mut command = folder.command(BANTAM, &[&["run", "--kernel", "kernel", "--serial", "none"], flags].concat());
    if rustix::process::geteuid().is_root() {
        folder.mode("", 0o755);
        command.uid(65534).gid(65534);
    }
    output(&mut command)
}

// What bantam prints.

#[test]
fn help_has_the_groups_and_examples() {
    let folder = Folder::new();
    let output = folder.bantam(&["run", "--help"]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for heading in ["Boot:", "Machine:", "Devices:", "Console:", "Limits:", "Output:", "Examples:", "Exit status:"] {
        assert!(help.lines().any(|line| line == heading), "{heading} is not in {help}");
    }
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let folder = Folder::new();
    for flags in [&["run", "--help"][..], &["completions", "bash"], &["man"], &["check"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = output(folder.command(BANTAM, flags).stdout(writer));
        assert_ne!(output.status.code(), Some(125), "{flags:?}");
        assert_eq!(text(&output.stderr), "", "{flags:?}");
    }
}

#[test]
fn a_full_disk_is_a_failure() {
    let folder = Folder::new();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = output(folder.command(BANTAM, &["man"]).stdout(full));
    refused(&output, &["cannot write to standard output: No space left"]);
}

#[test]
fn completions_and_manual_pages_render() {
    let folder = Folder::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = folder.bantam(&["completions", shell]);
        assert!(script.status.success() && text(&script.stdout).contains("print-config"), "{shell}");
    }
    for (flags, words) in [
        (&["man"][..], ".TH BANTAM 1"),
        (&["man", "run"], "boot\\-timeout"),
        (&["man", "image", "ls"], ".TH BANTAM-IMAGE-LS 1"),
    ] {
        let page = folder.bantam(flags);
        assert!(page.status.success());
        assert!(text(&page.stdout).contains(words), "{flags:?} lacks {words}");
    }
    refused(&folder.bantam(&["man", "nonsense"]), &["`nonsense`"]);
}

#[test]
fn the_config_is_printed_whole() {
    let folder = Folder::new();
    let flags = "--initrd i --cpus 2 --memory 1G --disk d,readonly=on --net tap0,mac=02:00:00:00:00:01 --no-rng \
                 --share src:/src:ro --vsock cid=3,socket=s --boot-timeout 500ms --print-config root.img";
    let output = folder.run(&flags.split_whitespace().collect::<Vec<_>>());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), include_str!("cli/config.json"));
}

#[test]
fn the_config_that_is_printed_is_read() {
    let folder = Folder::new();
    let printed = include_str!("cli/config.json");
    folder.write("printed", printed.as_bytes());
    let run = |flags: &[&str]| folder.bantam(&[&["run", "--print-config"], flags].concat());
    for name in ["printed", "-"] {
        let mut command = folder.command(BANTAM, &["run", "--print-config", "--config", name]);
        let again = output(command.stdin(fs::File::open(folder.path("printed")).unwrap()));
        assert_eq!(text(&again.stdout), printed, "{}", text(&again.stderr));
    }
    // What says how the run is told is printed as well, if there is something.
    let told = ["--report", "r", "--junit", "j", "--github", "--retry", "2", "-vv", "--log-file", "l"];
    let first = run(&[&["--kernel", "k"], &told[..]].concat());
    folder.write("told.json", &first.stdout);
    let keys: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(
        (keys["report"].as_str(), keys["retry"].as_u64(), keys["verbose"].as_u64()),
        (Some("r"), Some(2), Some(2))
    );
    assert_eq!(text(&run(&["--config", "told.json"]).stdout), text(&first.stdout));
    let other = run(&["--config", "told.json", "--report", "other", "--memory", "1G"]);
    let other: serde_json::Value = serde_json::from_slice(&other.stdout).unwrap();
    assert_eq!((other["report"].as_str(), other["memory"].as_str()), (Some("other"), Some("1G")));
}

#[test]
fn a_machine_runs_from_its_file() {
    let folder = Folder::new();
    folder.write("vm.toml", b"kernel = 'kernel'\nserial = 'none'\nreport = 'report'\n");
    let output = folder.bantam(&["run", "--config", "vm.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(fs::read_to_string(folder.path("report")).unwrap().contains("rebooted"));
    // Firecracker's, as it is.
    let file = r#"{"boot-source": {"kernel_image_path": "kernel", "boot_args": "console=ttyS0"},
                   "drives": [{"drive_id": "root", "path_on_host": "disk", "is_root_device": true, "is_read_only": false}],
                   "machine-config": {"vcpu_count": 1, "mem_size_mib": 64}}"#;
    folder.write("vm_config.json", file.as_bytes());
    let output = folder.bantam(&["run", "--config", "vm_config.json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn a_file_that_is_no_machine_is_refused() {
    let folder = Folder::new();
    for (name, content, words) in [
        ("a.toml", "cpus = 2\n\nmemry = '1G'\n", &["a.toml, line 3: unknown key `memry`: did you mean `memory`?"][..]),
        ("a.json", "{\"cpus\": 2,\n\"cpus\": 3}", &["a.json, line 2", "`cpus` is given twice"]),
        ("a", "[[disks]]\npath = 'disk'\nreadonly = 'yes'", &["line 3: `disks[0].readonly`: expected true or false"]),
        ("a", "{\"boot-source\": {\"kernel\": 1}}", &["line 1: `boot-source`: unknown key `kernel`"]),
        ("a", "cpus = 2\nsandbox = true", &["line 2: `sandbox`: expected \"on\", \"log\" or \"off\", and not true"]),
        ("a", "cpus = 0", &["0 cpus"]),
    ] {
        folder.write(name, content.as_bytes());
        folder.refuses(&["--config", name], words);
    }
    folder.refuses(&["--config", "nothing"], &["cannot read the configuration nothing", "No such file"]);
    folder.refuses(&["--config", "."], &["cannot read the configuration ."]);
    folder.write("tty.toml", b"retry = 1\nrootfs = 'disk'\n[command]\narguments = ['ls']\ntty = true");
    folder.refuses(&["--config", "tty.toml"], &["cannot try again (--retry) with a command that has a terminal"]);
}

#[test]
fn check_tells_as_text_and_as_json() {
    let folder = Folder::new();
    let output = folder.bantam(&["check"]);
    assert!(text(&output.stdout).contains("/dev/kvm"));
    let json = folder.bantam(&["check", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let ready = report["ready"].as_bool().unwrap();
    assert!(report["host"].as_array().unwrap().iter().any(|row| row["name"] == "io_uring"));
    for output in [output, json] {
        assert_eq!(output.status.code(), Some(i32::from(!ready)));
    }
}

#[test]
fn check_looks_into_a_kernel() {
    let folder = Folder::new();
    let output = folder.bantam(&["check", "--json", "--kernel", "kernel"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let format = report["kernel"].as_array().unwrap().iter().find(|row| row["name"] == "format").unwrap();
    assert_eq!(format["detail"], "ELF, entered by its PVH note at 0x100000");
}

#[test]
fn check_tells_of_a_file_that_is_no_kernel() {
    let folder = Folder::new();
    for (file, words) in [("disk", "cannot load kernel disk: "), ("./missing", "missing: No such file or directory")] {
        let table = folder.bantam(&["check", "--kernel", file]);
        let lines = text(&table.stdout);
        assert!(lines.starts_with("Host:\n"), "{lines}");
        let row = lines.lines().skip_while(|line| *line != "Kernel:").nth(1).unwrap();
        assert!(row.starts_with("  format  MISSING  ") && row.contains(words), "{row}");
        let json = folder.bantam(&["check", "--json", "--kernel", file]);
        let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!((&report["ready"], &report["kernel"][0]["status"]), (&false.into(), &"missing".into()));
        for output in [table, json] {
            assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), String::new()));
        }
    }
}

// Mistakes in the flags.

#[test]
fn a_mistaken_flag_is_refused() {
    let folder = Folder::new();
    refused(&folder.bantam(&[]), &["Usage"]);
    refused(&folder.bantam(&["walk"]), &["walk"]);
    folder.refuses(&["--nonsense"], &["--nonsense"]);
    folder.refuses(&["--timeout", "0s"], &["--timeout", "`0s`"]);
    folder.refuses(&["--boot-timeout", "soon"], &["--boot-timeout", "`soon`"]);
    folder.refuses(&["--serial", "tty"], &["--serial", "file=PATH"]);
    folder.refuses(&["--sandbox", "yes"], &["--sandbox", "expected on, log or off"]);
    folder.refuses(&["--jail=me"], &["--jail", "uid=me"]);
    folder.refuses(&["--jail=uid=0,name=x"], &["--jail", "`name` is not known here: expected uid, gid, cgroup"]);
    folder.refuses(&["--jail=cgroup=maybe"], &["--jail", "`cgroup=maybe` cannot be used", "on or off"]);
    folder.refuses(&["--jail", "--retry", "1"], &["cannot have other attempts (--retry) in a jail (--jail)"]);
    for quota in ["50", "0%", "0.5", "all"] {
        folder.refuses(&["--cpu-quota", quota], &["--cpu-quota", &format!("'{quota}'"), "such as 50% or 150%"]);
    }
    folder.refuses(&["--pids", "many"], &["--pids", "'many'"]);
    folder.refuses(&["--pids", "0", "disk", "--", "true"], &["cannot run a command in 0 processes"]);
    let two = ["--pids", "5", "-e", "A=1"];
    folder.refuses(&two, &["cannot use --env, --pids without a command: name one behind `--`"]);
    folder.refuses(&["-t"], &["cannot use --tty without a command"]);
}

#[test]
fn a_command_that_takes_another_says_so() {
    let folder = Folder::new();
    for words in [&[][..], &["kernel"], &["image"], &["warm"]] {
        let output = folder.bantam(words);
        refused(&output, &["bantam: what to do is missing: expected one of the commands below", "\nUsage: bantam"]);
    }
}

#[test]
fn a_memory_that_boots_nothing_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["--memory", "0"], &["--memory", "`0`", "zero"]);
    folder.refuses(&["--memory", "-1"], &["--memory", "`-1`", "512M"]);
    folder.refuses(&["--memory", "12X"], &["--memory", "`12X`", "512M"]);
    folder.refuses(&["--memory", "99999999999T"], &["--memory", "too large"]);
    folder.refuses(&["--memory", "1M"], &["1M of memory", "8M"]);
    folder.refuses(&["--memory", "134217729"], &["134217729", "4096"]);
    folder.refuses(&["--memory", "100T"], &["100T of memory", "the host has", "MiB"]);
}

#[test]
fn a_number_of_cpus_that_cannot_be_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["--cpus", "0"], &["0 cpus"]);
    for text in ["-1", "two", "1.5"] {
        folder.refuses(&["--cpus", text], &["--cpus", &format!("'{text}'"), "expected a whole number"]);
    }
    folder.refuses(&["--cpus", "1000000"], &["1000000", "at most"]);
}

#[test]
fn mistaken_device_options_are_refused() {
    let folder = Folder::new();
    folder.refuses(&["--disk", ""], &["--disk"]);
    folder.refuses(&["--events", "/nowhere/events"], &["cannot write the events to /nowhere/events: No such file"]);
    folder.refuses(&["--metrics", "/"], &["cannot write the metrics to /: Is a directory"]);
    folder.refuses(
        &["--events", "out", "--metrics", "out"],
        &["cannot write the metrics to out: it is where the events goes"],
    );
    folder.refuses(&["--balloon", "257M"], &["balloon of 257M in a machine with 256M of memory", "larger"]);
    folder.refuses(&["--balloon", "4097"], &["balloon of 4097: it is not a multiple of 4096"]);
    folder.refuses(&["--balloon", "big"], &["--balloon", "size=big", "512M"]);
    folder.refuses(&["--balloon", "64M,stats=often"], &["--balloon", "stats=often", "60s"]);
    folder.refuses(&["--balloon", "64M,deflate-on-oom=perhaps"], &["deflate-on-oom=perhaps", "on or off"]);
    folder.refuses(
        &["--balloon", "64M,free-page-hinting=on"],
        &["`free-page-hinting` is not known", "free-page-reporting"],
    );
    folder.refuses(&["--disk", "disk,readonly=on,readonly=off"], &["--disk", "`readonly` is given twice"]);
    folder.refuses(&["--disk", "disk,path=disk"], &["--disk", "`path` is given twice"]);
    folder.refuses(&["--disk", "disk,speed=9"], &["--disk", "`speed` is not known", "readonly"]);
    folder.refuses(&["--disk", "disk,readonly=maybe"], &["readonly=maybe", "on or off"]);
    folder.refuses(&["--disk", "disk,engine=async"], &["engine=async", "sync or io_uring"]);
    folder.refuses(&["--disk", "disk,direct=maybe"], &["direct=maybe", "on or off"]);
    folder.refuses(&["--disk", "disk,cache=none"], &["cache=none", "writeback or unsafe"]);
    folder.refuses(&["--disk", "disk,errors=none"], &["errors=none", "report or stop"]);
    folder.refuses(&["--disk", "disk,errors=stop"], &["cannot stop the machine", "disk disk (errors=stop)", "--name"]);
    folder.refuses(&["--disk", "disk,id="], &["`id` has no value"]);
    folder.refuses(&["--net", "tap0,tap=tap1"], &["--net", "`tap` is given twice"]);
    folder.refuses(&["--net", "tap0,speed=9"], &["--net", "`speed` is not known", "mac"]);
    folder.refuses(&["--net", "tap0,mac=nonsense"], &["--net", "mac=nonsense"]);
    folder.refuses(&["--net", "tap0,mac=01:00:00:00:00:00"], &["--net", "mac=01:00:00:00:00:00"]);
    folder.refuses(&["--net", "tap0", "--net", "tap=tap0,mtu=1500"], &["tap0", "twice"]);
    folder.refuses(&["--share", "."], &["--share", "no folder of the guest"]);
    folder.refuses(&["--share", ".:relative"], &["--share", "not an absolute path"]);
    folder.refuses(&["--share", "missing:/src"], &["folder missing", "No such file"]);
    folder.refuses(&["--share", "kernel:/src"], &["folder kernel", "Not a directory"]);
    folder.refuses(&["--vsock", "cid=3"], &["--vsock", "socket"]);
    folder.refuses(&["--vsock", "cid=x,socket=s"], &["--vsock", "cid=x"]);
    folder.refuses(&["--vsock", "cid=3,socket=s,port=1"], &["--vsock", "`port` is not known", "cid"]);
    folder.refuses(&["--vsock", "cid=3,socket=s", "--vsock", "cid=4,socket=t"], &["--vsock", "multiple times"]);
    folder.refuses(&["--vsock", "cid=2,socket=s"], &["context ID 2"]);
    folder.write("taken", b"");
    folder.refuses(&["--vsock", "cid=3,socket=taken"], &["socket taken", "in use"]);
    folder.refuses(&["--vsock", "cid=3,socket=missing/s"], &["socket missing/s", "No such file"]);
}

// Files that cannot be used.

#[test]
fn a_log_file_that_is_a_pipe_without_a_reader_is_refused() {
    let folder = Folder::new();
    let pipe = folder.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    refused(&folder.run(&["--log-file", "pipe"]), &["log file pipe"]);
}

#[test]
fn what_the_machine_is_made_of_is_not_written_over() {
    let folder = Folder::new();
    folder.write("disk", &[0; 512]);
    std::os::unix::fs::symlink("disk", folder.path("link")).unwrap();
    for flags in [
        &["--disk", "disk", "--serial", "file=link"][..],
        &["--disk", "link", "--report", "disk"],
        &["disk", "--log-file", "disk"],
        &["--initrd", "disk", "--report", "link"],
        &["--report", "kernel"],
    ] {
        folder.refuses(flags, &["cannot write the", "it is the machine's"]);
    }
    for flags in [
        &["--report", "new", "--junit", "./new"][..],
        &["--report", "new", "--log-file", "new"],
        &["--serial", "file=new", "--junit", "new"],
    ] {
        folder.refuses(flags, &["cannot write the", "it is where the", "goes"]);
    }
    let overlay = ["disk", "--overlay", "new", "--report", "new", "--", "true"];
    folder.refuses(&overlay, &["cannot write the report to new: it is the machine's disk"]);
    assert!(!folder.path("new").exists());
}

#[test]
fn a_report_that_cannot_be_written_does_not_hide_how_it_ended() {
    let folder = Folder::new();
    folder.write("kernel", &elf(HALT));
    let output = folder.run(&["--cpus", "2", "--boot-timeout", "1s", "--report", "/dev/full"]);
    refused(&output, &["did not reach user space", "cannot write the report /dev/full: No space left"]);
}

#[test]
fn a_kernel_that_is_no_file_is_refused() {
    let folder = Folder::new();
    fs::create_dir(folder.path("folder")).unwrap();
    folder.write("empty", b"");
    for (kernel, word) in [("missing", "No such file"), ("folder", "directory"), ("empty", "empty")] {
        let output = folder.bantam(&["run", "--serial", "none", "--kernel", kernel]);
        refused(&output, &[kernel, word]);
    }
}

#[test]
fn a_kernel_that_is_whole_runs() {
    let folder = Folder::new();
    let output = folder.run(&[]);
    assert_eq!((text(&output.stderr), output.status.code()), (String::new(), Some(0)));
}

#[test]
fn a_kernel_that_halts_without_a_word_has_ended() {
    let folder = Folder::new();
    folder.write("kernel", &elf(HALT));
    let output = folder.run(&["--cpus", "2", "--report", "-"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["outcome"], output.status.code()), (&"halted".into(), Some(0)));
    assert!(text(&output.stderr).contains("no sign of user space"), "{}", text(&output.stderr));
    // A limit for user space says more.
    let output = folder.run(&["--boot-timeout", "3s"]);
    assert_eq!(output.status.code(), Some(123), "{}", text(&output.stderr));
}

#[test]
fn a_kernel_that_is_idle_has_not_halted() {
    let folder = Folder::new();
    folder.write("kernel", &elf(IDLE));
    let output = folder.run(&["--timeout", "5s"]);
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
}

#[test]
fn a_kernel_cut_short_is_refused() {
    let folder = Folder::new();
    let whole = elf(REBOOT);
    let parts = ELF_PARTS.iter().flat_map(|part| [part - 1, *part, part + 1]);
    for len in parts.chain([1, 3, 4, 5, 16, 63, whole.len() - 1]) {
        folder.write("kernel", &whole[..len]);
        folder.refuses(&[], &["kernel"]);
    }
}

#[test]
fn a_bzimage_cut_short_is_refused() {
    let folder = Folder::new();
    // The setup header of the boot protocol: one more setup sector, the magic numbers, version 2.15, a 64-bit entry.
    let mut whole = vec![0; 0x400 + 0x1000];
    whole = with(whole, 0x1f1, &[1]);
    whole = with(whole, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    whole = with(whole, 0x202, b"HdrS\x0f\x02");
    whole = with(whole, 0x211, &[1]);
    whole = with(whole, 0x236, &[3, 0]);
    for len in [0x1f0, 0x1f1, 0x1fe, 0x200, 0x201, 0x202, 0x206, 0x208, 0x211, 0x238, 0x264, 0x268, 0x3ff, 0x400] {
        folder.write("kernel", &whole[..len]);
        folder.refuses(&[], &["kernel"]);
    }
}

#[test]
fn a_file_that_is_no_kernel_for_this_machine_is_refused() {
    let folder = Folder::new();
    for (what, image) in [
        ("text", b"#!/bin/sh\necho this is no kernel\n".repeat(100)),
        ("zeroes", vec![0; 1 << 16]),
        ("aarch64", with(elf(REBOOT), 18, &[0xb7, 0])),
        ("big endian", with(elf(REBOOT), 5, &[2])),
        ("no segments", with(elf(REBOOT), 56, &[0, 0])),
        ("a segment outside of the file", with(elf(REBOOT), 64 + 56 + 8, &[0xff; 8])),
        ("an endless segment", with(elf(REBOOT), 64 + 56 + 32, &[0xff; 16])),
        ("a segment at the end of the address space", with(elf(REBOOT), 64 + 56 + 24, &[0xff; 8])),
    ] {
        folder.write("kernel", &image);
        let output = folder.run(&[]);
        assert_eq!(output.status.code(), Some(125), "{what}: {}", text(&output.stderr));
        refused(&output, &["kernel"]);
    }
}

#[test]
fn a_kernel_that_does_not_fit_memory_is_refused() {
    let folder = Folder::new();
    // A segment of 1 GiB, in memory only.
    folder.write("kernel", &with(elf(REBOOT), 64 + 56 + 40, &u64::to_le_bytes(1 << 30)));
    folder.refuses(&["--memory", "64M"], &["kernel"]);
}

#[test]
fn a_kernel_whose_segments_overlap_is_refused() {
    let folder = Folder::new();
    // The note's header becomes a second segment, at the same place.
    let mut kernel = elf(REBOOT);
    kernel.copy_within(64 + 56..64 + 112, 64);
    folder.write("kernel", &kernel);
    folder.refuses(&[], &["kernel", "overlap"]);
}

#[test]
fn an_initrd_that_cannot_be_loaded_is_refused() {
    let folder = Folder::new();
    folder.sparse("large", 1 << 30);
    folder.refuses(&["--initrd", "missing"], &["missing", "No such file"]);
    folder.refuses(&["--initrd", "."], &["initrd", "directory"]);
    folder.refuses(&["--initrd", "large", "--memory", "128M"], &["large"]);
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["--cmdline", &"x".repeat(100_000)], &["command line"]);
}

#[test]
fn a_disk_that_cannot_be_used_is_refused() {
    let folder = Folder::new();
    fs::create_dir(folder.path("folder")).unwrap();
    folder.write("odd", &[0; 513]);
    folder.refuses(&["--disk", "missing"], &["missing", "No such file"]);
    folder.refuses(&["missing"], &["missing", "No such file"]);
    folder.refuses(&["--disk", "folder"], &["folder"]);
    folder.refuses(&["--disk", "odd"], &["odd", "513", "512"]);
    folder.refuses(&["--disk", "disk", "--disk", "disk"], &["cannot lock disk image disk"]);
    // What sysfs has are files of 4096 bytes, so they say.
    let direct = ["--disk", "/sys/kernel/uevent_seqnum,readonly=on,direct=on"];
    folder.refuses(&direct, &["disk image /sys/kernel/uevent_seqnum with direct=on", "no direct I/O", "direct=off"]);
}

#[test]
fn a_disk_without_permission_is_refused() {
    let folder = Folder::new();
    folder.write("unreadable", &[0; 512]);
    folder.write("readonly", &[0; 512]);
    folder.mode("unreadable", 0o000);
    folder.mode("readonly", 0o444);
    for disk in ["unreadable", "readonly"] {
        refused(&unprivileged(&folder, &["--disk", disk]), &[disk, "Permission denied"]);
    }
    // The same user may read it, though perhaps not open /dev/kvm.
    let output = unprivileged(&folder, &["--disk", "readonly,readonly=on"]);
    assert!(!text(&output.stderr).contains("disk"), "{}", text(&output.stderr));
}

#[test]
fn a_disk_that_another_machine_writes_is_refused() {
    let folder = Folder::new();
    folder.write("hang", &elf(HANG));
    let flags = ["run", "--kernel", "hang", "--serial", "none", "--disk", "disk", "-v"];
    let mut running = Running(folder.command(BANTAM, &flags).spawn().unwrap());
    // It holds the disk once it says that it runs.
    let mut lines = BufReader::new(running.0.stderr.take().unwrap()).lines();
    let line = within_limit(move || lines.next().unwrap()).expect("bantam says that it runs");
    assert!(line.starts_with("bantam: running "), "{line}");
    folder.refuses(&["--disk", "disk"], &["cannot lock disk image disk"]);
    folder.refuses(&["--disk", "disk,readonly=on"], &["cannot lock disk image disk"]);
}

#[test]
fn a_user_network_that_cannot_be_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["--net", "user,tap=tap0"], &["tap=NAME, fd=N or user"]);
    folder.refuses(&["--net", "user=off"], &["tap=NAME, fd=N or user"]);
    folder.refuses(&["--net", "user,mtu=65521"], &["mtu=65521", "68 to 65520"]);
    folder.refuses(&["--net", "user", "--net", "user"], &["two network cards", "same addresses"]);
    folder.refuses(&["--net", "none", "--net", "user"], &["--net none"]);
    folder.refuses(&["-p", "80:80"], &["cannot publish port 80:80", "--net user"]);
    folder.refuses(&["--net", "none", "-p", "80:80"], &["cannot publish port 80:80", "--net user"]);
    folder.refuses(&["--net", "tap0,publish=80:80"], &["cannot publish port 80:80", "user network"]);
    folder
        .refuses(&["--net", "user", "-p", "80"], &["`80`", "no port of the guest", "[ADDR:]HOSTPORT:GUESTPORT[/udp]"]);
    folder.refuses(&["--net", "user,publish=0:80"], &["publish=0:80", "1 to 65535"]);
}

#[test]
fn bash_completes_names_of_machines() {
    let script = r#"
        source <("$0" completions bash)
        bantam() { [[ "$*" == "ps -q" ]] && printf '%s\n' one other two; }
        complete() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _bantam_named bantam "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[*]}"; }
        complete bantam stop one o
        complete bantam metrics ''
        complete bantam console one ''
        complete bantam stop --ti
        complete bantam resu
    "#;
    let output = Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_bantam")]).output().unwrap();
    assert_eq!(
        text(&output.stdout),
        "one other\none other two\n-h -V --help --version\n--time\nresume\n",
        "{output:?}"
    );
}

#[test]
fn limits_that_are_none_are_refused() {
    let folder = Folder::new();
    folder.refuses(&["--disk", "disk,bw=0"], &["bw=0", "zero"]);
    folder.refuses(&["--disk", "disk,bw=fast"], &["bw=fast", "no limit", "50M"]);
    folder.refuses(&["--disk", "disk,iops=0"], &["iops=0", "zero"]);
    folder.refuses(&["--disk", "disk,pps=9"], &["`pps` is not known", "iops"]);
    folder.refuses(&["--net", "tap0,pps=0"], &["pps=0", "zero"]);
    folder.refuses(&["--net", "user,bw=1Mbit"], &["bw=1Mbit", "no limit"]);
    folder.refuses(&["--disk", "disk,bw=1M/0s"], &["bw=1M/0s", "no limit", "1M/100ms"]);
    folder.refuses(&["--disk", "disk,bw=1M+"], &["bw=1M+", "no limit"]);
    folder.refuses(&["--net", "tap0,bw=:"], &["bw=:", "no limit"]);
    folder.write("rng.json", br#"{"rng-bw": "much"}"#);
    folder.refuses(&["--config", "rng.json"], &["rng.json, line 1: `rng-bw`: `much` is no limit"]);
}

#[test]
fn passt_that_does_not_do_what_it_should_is_said() {
    let folder = Folder::new();
    let run = |path: &Path, flags: &[&str]| {
        let flags = [&["run", "--kernel", "kernel", "--serial", "none", "--net", "user"], flags].concat();
        output(folder.command(BANTAM, &flags).env("PATH", path))
    };
    let bin = folder.path("bin");
    fs::create_dir(&bin).unwrap();
    refused(&run(&bin, &[]), &["cannot start passt", "no such program in PATH", "sudo apt install passt"]);
    folder.write("bin/passt", b"#!/bin/sh\necho no network for you >&2\nexit 3\n");
    folder.mode("bin/passt", 0o755);
    refused(&run(&bin, &[]), &["cannot start passt", "exit status: 3", ": no network for you"]);
    folder.mode("bin/passt", 0o644);
    refused(&run(&bin, &[]), &["cannot start passt", "Permission denied"]);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let path = std::env::var_os("PATH").unwrap();
    let publish = format!("127.0.0.1:{port}:80");
    refused(&run(path.as_ref(), &["-p", &publish]), &["cannot publish the host's port", &publish, "in use"]);
    let publish = "192.0.2.77:8080:80/udp";
    refused(&run(path.as_ref(), &["-p", publish]), &["cannot publish the host's port", publish, "requested address"]);
}

#[test]
fn a_tap_that_cannot_be_used_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["--net", "a-name-that-is-too-long"], &["a-name-that-is-too-long"]);
    // Where anyone may open /dev/net/tun, it is the tap that cannot be created.
    let output = unprivileged(&folder, &["--net", "bantam-none"]);
    refused(&output, &[]);
    let error = text(&output.stderr);
    assert!(error.contains("bantam-none") || error.contains("cannot open /dev/net/tun"), "{error}");
    folder.refuses(&["--net", "fd=1000"], &["1000"]);
}

#[test]
fn vhost_where_it_cannot_be_is_refused() {
    let folder = Folder::new();
    folder.refuses(&["--net", "tap0,vhost=maybe"], &["--net", "vhost", "maybe"]);
    folder.refuses(&["--net", "user,vhost=on"], &["cannot use vhost-net with a user network"]);
    for limit in ["bw=1M", "pps=100"] {
        let card = format!("tap0,vhost=on,{limit}");
        folder.refuses(&["--net", &card], &["cannot use vhost-net with limits", "bw, pps"]);
    }
    // Where anyone may open it, it is the tap that cannot be created.
    let output = unprivileged(&folder, &["--net", "bantam-none,vhost=on"]);
    refused(&output, &[]);
    let error = text(&output.stderr);
    assert!(error.contains("cannot open /dev/vhost-net, for vhost=on") || error.contains("bantam-none"), "{error}");
}

#[test]
fn a_place_for_output_that_cannot_be_is_refused() {
    let folder = Folder::new();
    folder.write("taken", b"");
    folder.refuses(&["--log-file", "none/log"], &["log file", "none/log", "No such file"]);
    folder.refuses(&["--report", "none/report"], &["report", "none/report", "No such file"]);
    folder.refuses(&["--report", "."], &["report"]);
    folder.refuses(&["--serial", "file=none/console"], &["none/console", "No such file"]);
    folder.refuses(&["--serial", "socket=none/console"], &["none/console"]);
    folder.refuses(&["--serial", "socket=taken"], &["taken", "in use"]);
}

#[test]
fn a_report_tells_how_it_ended() {
    let folder = Folder::new();
    let output = folder.run(&["--report", "report.json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(folder.path("report.json")).unwrap()).unwrap();
    assert_eq!(report["outcome"], "rebooted", "{report:#}");
}

#[test]
fn a_report_may_go_to_standard_output() {
    let folder = Folder::new();
    let output = folder.run(&["--report", "-"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["outcome"], output.status.code()), (&"rebooted".into(), Some(0)));
    assert!(!folder.path("-").exists());

    let (mut reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = folder.command(BANTAM, &["run", "--kernel", "missing", "--report", "-"]);
    let status = command.stdout(std::os::fd::OwnedFd::from(writer)).status().unwrap();
    drop(command);
    let report: serde_json::Value = serde_json::from_reader(&mut reader).unwrap();
    assert_eq!((&report["outcome"], status.code()), (&"failed".into(), Some(125)));
}

#[test]
fn a_report_tells_why_nothing_ran() {
    let folder = Folder::new();
    for (flags, cause) in [
        (&["--initrd", "missing"][..], "cannot load initrd missing: No such file or directory"),
        (&["--cpus", "0"], "cannot build a machine with 0 cpus: it needs at least 1"),
        (&["--log-file", "none/log"], "cannot open the log file none/log: No such file or directory"),
    ] {
        let output = folder.run(&[flags, &["--report", "report.json"]].concat());
        refused(&output, &[cause]);
        let report: serde_json::Value = serde_json::from_slice(&fs::read(folder.path("report.json")).unwrap()).unwrap();
        assert_eq!((&report["outcome"], &report["cause"]), (&"failed".into(), &cause.into()));
        assert!(report["durations"]["end"].is_number() && report["durations"]["first-kvm-run"].is_null());
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let folder = Folder::new();
    folder.write("taken", b"as it was");
    // A name that no tap can have stands for the tap: it is refused when it is to be created.
    let flags = ["--net", "a-name-that-is-too-long", "--log-file", "log", "--serial", "file=taken", "-vvv"];
    let with = |other: &[&'static str]| [&flags, other].concat();
    folder.refuses(&with(&["--initrd", "missing"]), &["cannot load initrd missing"]);
    folder.refuses(&with(&["--disk", "missing"]), &["cannot open disk image missing"]);
    folder.refuses(
        &with(&["missing", "--", "ls"]),
        &["cannot open root file system missing", "No such file", "ROOTFS is"],
    );
    folder.refuses(&with(&["--jail", "uid=1000"]), &["cannot open root file system", "--jail=uid=1000"]);
    folder.refuses(&with(&["--cpus", "1000000"]), &["1000000"]);
    folder.refuses(&with(&[]), &["a-name-that-is-too-long"]);
    folder.write("kernel", b"no kernel");
    folder.refuses(&with(&[]), &["cannot load kernel"]);
}

#[test]
fn a_log_file_has_what_was_logged_from_the_start() {
    let folder = Folder::new();
    folder.write("log", b"before\n");
    folder.write("disk", &[&b"QFI\xfb"[..], &[0; 508]].concat());
    let output = folder.run(&["--log-file", "log", "-v", "--disk", "disk"]);
    assert_eq!((text(&output.stderr), output.status.code()), (String::new(), Some(0)));
    let log = fs::read_to_string(folder.path("log")).unwrap();
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines[0], "before", "{log}");
    assert!(lines[1].contains("qcow2") && lines[2].starts_with("bantam: running "), "{log}");
}

#[test]
fn a_descriptor_that_bantam_opened_itself_is_no_tap() {
    let folder = Folder::new();
    for fd in 3..30 {
        let card = format!("fd={fd}");
        folder.refuses(&["--net", "bantam-none", "--net", &card], &[&format!("{card} is not ")]);
    }
}

// KVM that cannot be used.

/// Runs a shell script, with bantam as its `$0`, in a mount namespace of its own. `None`, and loud, where that is not
/// permitted; in CI it is.
fn in_mount_namespace(folder: &Folder, script: &str) -> Option<Output> {
    if !folder.command("unshare", &["-m", "true"]).status().is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("CI").is_none(), "unshare -m does not work");
        eprintln!("SKIPPED: this takes root, to hide or close /dev/kvm in a mount namespace");
        return None;
    }
    Some(output(&mut folder.command("unshare", &["-m", "sh", "-ec", script, BANTAM])))
}

#[test]
fn a_host_without_kvm_is_told() {
    let script = "mount -t tmpfs none /dev; exec \"$0\" run --kernel kernel --serial none";
    if let Some(output) = in_mount_namespace(&Folder::new(), script) {
        refused(&output, &["/dev/kvm", "No such file"]);
    }
}

#[test]
fn a_host_whose_kvm_is_closed_is_told_how_to_open_it() {
    let script = "mount -t tmpfs none /mnt; mknod -m 660 /mnt/kvm c 10 232; mount --bind /mnt/kvm /dev/kvm; chmod 755 .
        exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" run --kernel kernel --serial none";
    if let Some(output) = in_mount_namespace(&Folder::new(), script) {
        refused(&output, &["/dev/kvm: Permission denied", "sudo ", "$USER"]);
    }
}

#[test]
fn the_running_kernel_is_the_default() {
    let folder = Folder::new();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let path = Path::new("/boot").join(format!("vmlinuz-{release}"));
    let output = output(folder.command(BANTAM, &["run", "--print-config"]).env("XDG_CACHE_HOME", folder.0.path()));
    if path.exists() {
        assert!(text(&output.stdout).contains(path.to_str().unwrap()));
    } else {
        refused(&output, &[path.to_str().unwrap(), "--kernel"]);
    }
}

#[test]
fn a_warm_start_that_no_other_run_could_use_is_refused() {
    let folder = Folder::new();
    let path = |name: &str| folder.0.path().join(name);
    fs::write(path("kernel"), "").unwrap();
    fs::write(path("root"), "").unwrap();
    let refuses = |flags: &str, words: &[&str]| {
        let flags: Vec<_> = ["run", "--kernel", "kernel", "--warm"].into_iter().chain(flags.split(' ')).collect();
        let output = output(folder.command(BANTAM, &flags).env("XDG_CACHE_HOME", path("cache")));
        refused(&output, words);
    };
    refuses("key root", &["cannot start warm without a command", "-- COMMAND"]);
    refuses("key --rw root -- x", &["cannot start warm with --rw"]);
    refuses("key --overlay changes root -- x", &["cannot start warm with --overlay"]);
    refuses("key --share /:/host root -- x", &["cannot start warm with shared folders"]);
    refuses("key --disk root root -- x", &["with the disk root, which is not readonly=on"]);
    refuses("key --net fd=99 root -- x", &["with the network card fd=99"]);
    refuses("key --net tap%d root -- x", &["on the first free tap `tap%d`"]);
    refuses("../key root -- x", &["`../key` is no key for a warm snapshot"]);
    assert!(!path("cache").exists());
    let warm = |arguments: &[&str]| {
        let flags = [&["warm"], arguments].concat();
        output(folder.command(BANTAM, &flags).env("XDG_CACHE_HOME", path("cache")))
    };
    refused(&warm(&["rm", "key"]), &["there is no warm snapshot `key`", "bantam warm ls"]);
    refused(&warm(&["rm", "."]), &["`.` is no key"]);
    assert_eq!(text(&warm(&["ls"]).stdout), "KEY  SIZE      ROOTFS\n");
    assert_eq!(text(&warm(&["ls", "--json"]).stdout), "[]\n");
    let homeless = output(folder.command(BANTAM, &["warm", "ls"]).env_remove("XDG_CACHE_HOME").env_remove("HOME"));
    refused(&homeless, &["neither XDG_CACHE_HOME nor HOME is set"]);
}
