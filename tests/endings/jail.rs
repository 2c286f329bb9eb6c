//! What the process of a machine in a jail sees of the host, and that it ends as any other.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{Guest, Kernel, Running};
use crate::{eventually, started_by};
use rustix::process::{Pid, Signal, kill_process};

/// The process in the jail that `launcher` waits for.
fn machine_of(launcher: i32) -> i32 {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut children = processes.filter(|pid: &i32| status(*pid).get("PPid") == Some(&launcher.to_string()));
    children.next().unwrap()
}

/// The fields of a process's status; none if it is gone.
fn status(pid: i32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(field).collect()
}

/// Checks that the process has nothing of this one's but the user namespace if root started it.
fn sees_nothing(pid: i32, uid: u32) {
    sees_folders(pid, uid, "0000000000000000");
}

/// The same, of one that has shared folders, and these of root's capabilities for them: nothing is above those.
fn sees_folders(pid: i32, uid: u32, kept: &str) {
    let namespace = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(&pid.to_string(), name), namespace("self", name), "{name}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0, "an empty root");
    let status = status(pid);
    let is = |field: &str, value: &str| assert_eq!(status[field], value, "{field}");
    is("Uid", &vec![uid.to_string(); 4].join("\t"));
    is("CapPrm", kept);
    is("CapEff", kept);
    is("CapBnd", "0000000000000000");
    is("NoNewPrivs", "1");
    is("Seccomp", "2");
    assert!(status["NSpid"].ends_with("\t1"), "{}", status["NSpid"]);
}

/// Checks that the process can go up no further than to `folder`, or to its descriptors, from any folder that it has open.
fn goes_no_further_up(pid: i32, folder: &Path) {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).unwrap();
    let descriptors = PathBuf::from(format!("/proc/{pid}/fd"));
    let mut tops = BTreeSet::new();
    for entry in fs::read_dir(&descriptors).unwrap() {
        let mut path = entry.unwrap().path().join(".");
        if path.is_dir() {
            while identity(&path.join("..")) != identity(&path) {
                path.push("..");
            }
            tops.insert(identity(&path));
        }
    }
    assert_eq!(tops, BTreeSet::from([identity(folder), identity(&descriptors)]));
}

/// The control group of a machine's process in a jail, which is a group of its own with limits for a guest of [`MEMORY`], and for
/// `disk` if that is in memory, too.
fn limited(pid: i32, disk: &Path) -> PathBuf {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let is_in_memory = rustix::fs::statfs(disk).unwrap().f_type == TMPFS_MAGIC;
    let disk = if is_in_memory { fs::metadata(disk).unwrap().len() } else { 0 };
    let named = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = named.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    let group = Path::new("/sys/fs/cgroup").join(group);
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_else(|error| panic!("{group:?}: {error}"));
    // With vsock.
    let memory = (MEMORY << 20) + (MEMORY << 14) + (768 << 20) + disk;
    assert_eq!(read("memory.max"), format!("{memory}\n"), "{group:?}");
    assert_eq!(read("pids.max"), "513\n");
    assert!(read("cgroup.procs").lines().any(|line| line == pid.to_string()));
    let launcher = fs::read_to_string("/proc/self/cgroup").unwrap();
    assert_ne!(named, launcher, "only the machine is in it");
    group
}

/// MiB of memory that the guest has.
const MEMORY: u64 = 192;

/// A guest that copies what it is sent by vsock to its disk, and answers.
fn guest(folder: &Path, disk: &Path, jail: &str) -> Guest {
    let vsock = format!("cid=3,socket={}", folder.join("vsock").display());
    let script = "head -c 9 /dev/vda; ip link set eth0 up && echo; read -r line && echo \"got $line\" && dd if=/dev/zero \
                  of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && echo written; read -r line && poweroff -f";
    let guest = Guest::new(Kernel::Tiny).script(script).disk(disk.display()).option("--vsock", vsock);
    guest.memory(&format!("{MEMORY}M")).flag(jail)
}

/// Talks to the guest by its console's socket.
fn talk(running: &Running, console: &Path, pid: impl Fn(i32)) {
    let client = || UnixStream::connect(console);
    eventually(|| client().is_ok());
    let mut client = client().unwrap();
    let mut heard = String::new();
    let mut hear = |client: &mut UnixStream, word: &str| {
        while !heard.contains(word) {
            let mut part = [0; 256];
            let count = client.read(&mut part).unwrap();
            assert!(count > 0, "the guest went away: {heard}");
            heard += &String::from_utf8_lossy(&part[..count]);
        }
    };
    client.write_all(b"hello\n").unwrap();
    hear(&mut client, "got hello");
    hear(&mut client, "written");
    pid(machine_of(running.pid().as_raw_pid()));
    client.write_all(b"bye\n").unwrap();
}

#[test]
fn root_is_nobody_in_a_jail() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, console) = (folder.path().join("disk"), folder.path().join("console"));
    fs::write(&disk, vec![b'x'; 1 << 20]).unwrap();
    let tap = "bantamjail0";
    let guest = guest(folder.path(), &disk, "--jail").net(format_args!("tap={tap}"));
    let running = guest.option("--serial", format_args!("socket={}", console.display())).start();
    let launcher = running.pid().as_raw_pid();
    let group = Cell::new(None);
    talk(&running, &console, |pid| {
        sees_nothing(pid, 0x7000_0000 | launcher.cast_unsigned() & 0x00ff_ffff);
        assert!(Path::new("/sys/class/net").join(tap).exists(), "the tap is where it was made");
        group.set(Some(limited(pid, &disk)));
    });
    let ended = running.wait();
    assert!(!group.take().unwrap().exists(), "its group is removed");
    assert_eq!(ended.status, 0, "{}", ended.stderr);
    assert_eq!(ended.report["outcome"], "halted");
    assert!(fs::read(&disk).unwrap()[..4096].iter().all(|byte| *byte == 0), "what was flushed is there");
    assert!(!console.exists() && !folder.path().join("vsock").exists(), "sockets are removed");
}

/// A guest that changes a folder, and says so.
fn sharing(folder: &Path) -> Guest {
    let script = "
        mount -t virtiofs share0 /mnt
        cd /mnt
        cat theirs
        [ ! -d below ] || cat below/file
        echo mine >mine
        chmod 640 mine
        mkfifo pipe
        ln mine linked
        ln -s /etc out
        mv pipe moved
        echo more >>theirs
        echo changed
        read -r line
    ";
    Guest::new(Kernel::Tiny).script(script).option("--share", format!("{}:/mnt", folder.display())).flag("--jail")
}

fn has_changed(folder: &Path) {
    assert_eq!(fs::read_to_string(folder.join("theirs")).unwrap(), "of the host\nmore\n");
    let mine = fs::metadata(folder.join("linked")).unwrap();
    assert_eq!((mine.mode() & 0o7777, mine.nlink(), mine.len()), (0o640, 2, 5));
    assert!(fs::symlink_metadata(folder.join("moved")).unwrap().file_type().is_fifo());
    assert_eq!(fs::read_link(folder.join("out")).unwrap(), Path::new("/etc"));
}

#[test]
fn root_has_folders_in_a_jail_and_nothing_above_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("theirs"), "of the host\n").unwrap();
    fs::set_permissions(folder.path().join("theirs"), PermissionsExt::from_mode(0o600)).unwrap();
    chown(folder.path().join("theirs"), Some(4321), Some(4321)).unwrap();
    let below = folder.path().join("below");
    fs::create_dir(&below).unwrap();
    let call = |program: &str, arguments: &[&str]| {
        assert!(Command::new(program).args(arguments).arg(&below).status().unwrap().success());
    };
    call("mount", &["-t", "tmpfs", "tmpfs"]);
    fs::write(below.join("file"), "mounted below\n").unwrap();
    let mut running = sharing(folder.path()).spawn();
    running.wait_for("changed");
    let launcher = running.pid().as_raw_pid();
    let pid = machine_of(launcher);
    // CAP_CHOWN, _DAC_OVERRIDE, _FOWNER and _FSETID.
    sees_folders(pid, 0x7000_0000 | launcher.cast_unsigned() & 0x00ff_ffff, "000000000000001b");
    goes_no_further_up(pid, folder.path());
    running.write("\n");
    let ended = running.wait().succeeded();
    call("umount", &[]);
    assert!(ended.stdout.contains("mounted below"), "{}", ended.stdout);
    has_changed(folder.path());
    let owner = |name: &str| fs::metadata(folder.path().join(name)).unwrap().uid();
    assert_eq!((owner("theirs"), owner("mine")), (4321, 0));
}

#[test]
fn a_user_has_folders_in_a_jail_and_nothing_above_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("theirs"), "of the host\n").unwrap();
    for path in [folder.path().to_owned(), folder.path().join("theirs")] {
        chown(path, Some(1000), Some(1000)).unwrap();
    }
    let guest = sharing(folder.path());
    fs::set_permissions(guest.folder(), PermissionsExt::from_mode(0o777)).unwrap();
    let mut running = started_by(guest, "setpriv", &AS_USER).spawn();
    running.wait_for("changed");
    let pid = machine_of(running.pid().as_raw_pid());
    sees_nothing(pid, 1000);
    goes_no_further_up(pid, folder.path());
    running.write("\n");
    running.wait().succeeded();
    has_changed(folder.path());
    assert_eq!(fs::metadata(folder.path().join("mine")).unwrap().uid(), 1000);
}

#[test]
fn a_folder_is_shared_with_a_jail_by_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(Kernel::Tiny).option("--share", "/dev/fd/0:/mnt").flag("--jail");
    guest.command().stdin(fs::File::open(folder.path()).unwrap());
    let ended = guest.start().wait();
    assert_eq!(ended.status, 125, "{}", ended.stderr);
    assert!(ended.stderr.contains("name it by its path"), "{}", ended.stderr);
}

/// A folder that others may use, with a disk.
fn others_folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![b'x'; 1 << 20]).unwrap();
    fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
    fs::set_permissions(&disk, PermissionsExt::from_mode(0o666)).unwrap();
    (folder, disk)
}

const AS_USER: [&str; 6] = ["--reuid", "1000", "--regid", "1000", "--clear-groups", "--"];

#[test]
fn a_user_has_a_jail_by_a_user_namespace() {
    let (folder, disk) = others_folder();
    let console = folder.path().join("console");
    let guest = guest(folder.path(), &disk, "--jail")
        .net("user")
        .option("--cpu-quota", "150%")
        .option("--serial", format_args!("socket={}", console.display()));
    fs::set_permissions(guest.folder(), PermissionsExt::from_mode(0o777)).unwrap();
    let running = started_by(guest, "setpriv", &AS_USER).start();
    talk(&running, &console, |pid| sees_nothing(pid, 1000));
    let ended = running.wait();
    assert_eq!(ended.status, 0, "{}", ended.stderr);
    assert_eq!(ended.report["outcome"], "halted");
    // No group is this user's.
    let unlimited =
        "memory and processes of the jail have no limit (--jail=cgroup=off says nothing of it): cannot make";
    assert!(ended.stderr.contains(unlimited), "{}", ended.stderr);
}

#[test]
fn a_user_may_have_a_control_group_for_a_jail() {
    // As systemd does it for a user's session: one for its processes, beside which others may be.
    let script = "cd /sys/fs/cgroup; echo +memory +pids +cpu >cgroup.subtree_control; mkdir jails; cd jails
        echo +memory +pids +cpu >cgroup.subtree_control; mkdir session; echo $$ >session/cgroup.procs
        chown 1000 . cgroup.procs cgroup.subtree_control; exec setpriv --reuid 1000 --regid 1000 --clear-groups -- \"$@\"";
    let (folder, disk) = others_folder();
    let console = folder.path().join("console");
    let guest = guest(folder.path(), &disk, "--jail=cgroup=on")
        .option("--cpu-quota", "150%")
        .option("--serial", format_args!("socket={}", console.display()));
    fs::set_permissions(guest.folder(), PermissionsExt::from_mode(0o777)).unwrap();
    let running = started_by(guest, "sh", &["-ec", script, "sh"]).start();
    let group = Cell::new(None);
    talk(&running, &console, |pid| {
        sees_nothing(pid, 1000);
        group.set(Some(limited(pid, &disk)));
    });
    let ended = running.wait();
    assert_eq!(ended.status, 0, "{}", ended.stderr);
    let told = ended.report["limits"]["cpu-quota"].as_str().unwrap_or_default();
    let group = group.take().unwrap();
    assert!(told.starts_with(&format!("the control group {}/bantam-", group.display())), "{told}");
    assert_eq!(group.parent(), Some(Path::new("/sys/fs/cgroup/jails")));
    // There is nothing in them any more.
    for folder in ["/sys/fs/cgroup/jails/session", "/sys/fs/cgroup/jails"] {
        fs::remove_dir(folder).unwrap();
    }
}

#[test]
fn a_jail_that_wants_more_memory_is_ended() {
    let running = Guest::new(Kernel::Tiny).script("echo up; sleep 1000").flag("--jail=cgroup=on").spawn();
    running.wait_for("up");
    let machine = machine_of(running.pid().as_raw_pid());
    let named = fs::read_to_string(format!("/proc/{machine}/cgroup")).unwrap();
    let group = Path::new("/sys/fs/cgroup").join(named.trim().strip_prefix("0::/").unwrap());
    fs::write(group.join("memory.max"), "1M").unwrap();
    let ended = running.wait();
    assert_eq!(ended.status, 128 + Signal::KILL.as_raw(), "{}", ended.stderr);
    let said = format!("its process wanted more than memory.max of {}", group.display());
    assert!(ended.stderr.contains(&said) && !group.exists(), "{}", ended.stderr);
}

#[test]
fn a_jail_that_must_have_a_control_group_is_refused_without() {
    let (folder, disk) = others_folder();
    let guest = Guest::new(Kernel::Tiny).disk(disk.display()).flag("--jail=cgroup=on");
    fs::set_permissions(guest.folder(), PermissionsExt::from_mode(0o777)).unwrap();
    let ended = started_by(guest, "setpriv", &AS_USER).run();
    assert_eq!(ended.status, 125, "{}", ended.stderr);
    let said = "cannot limit the memory of a jail (--jail=cgroup=on): that takes a control group of version 2";
    assert!(ended.stderr.contains(said) && ended.stderr.contains("Permission denied"), "{}", ended.stderr);
    drop(folder);
}

#[test]
fn signals_and_limits_end_a_jail_as_any_other() {
    let guest = || {
        let guest = Guest::new(Kernel::Tiny).script("echo up; sleep 1000").flag("--jail");
        guest.option("--cpu-quota", "150%")
    };
    for signal in [Signal::TERM, Signal::INT] {
        let running = guest().spawn();
        running.wait_for("up");
        running.signal(signal);
        let ended = running.wait();
        assert_eq!(ended.status, 128 + signal.as_raw(), "{}", ended.stderr);
        assert_eq!(ended.report["outcome"], "signaled");
    }
    let running = guest().spawn();
    running.wait_for("up");
    let machine = machine_of(running.pid().as_raw_pid());
    running.signal(Signal::KILL);
    running.wait();
    eventually(|| status(machine).get("State").is_none_or(|state| state.starts_with('Z')));
    let running = guest().spawn();
    running.wait_for("up");
    let machine = Pid::from_raw(machine_of(running.pid().as_raw_pid())).unwrap();
    kill_process(machine, Signal::KILL).unwrap();
    assert!(running.wait().status >= 128, "it ends as the machine's process does");
    let running = guest().spawn();
    running.wait_for("up");
    let machine = Pid::from_raw(machine_of(running.pid().as_raw_pid())).unwrap();
    // As its own `abort` does. A signal that nobody handles does not reach the first process of a namespace.
    kill_process(machine, Signal::ABORT).unwrap();
    let ended = running.wait();
    assert_eq!(ended.status, 128 + Signal::ABORT.as_raw(), "{}", ended.stderr);
    let ended = guest().option("--timeout", "1s").flag("-v").run();
    assert_eq!((ended.status, &ended.report["outcome"]), (124, &"timed-out".into()), "{}", ended.stderr);
    assert!(!ended.stderr.contains("cannot remove"), "{}", ended.stderr);
}

#[test]
fn a_jail_stops_and_goes_on_with_its_launcher() {
    let mut running =
        Guest::new(Kernel::Tiny).script("echo up; read -r line; echo \"got $line\"").flag("--jail").spawn();
    running.wait_for("up");
    let launcher = running.pid().as_raw_pid();
    let both = [launcher, machine_of(launcher)];
    let are_stopped = |stopped: bool| {
        let state = |pid: &i32| status(*pid).get("State").is_some_and(|state| state.starts_with('T') == stopped);
        eventually(|| both.iter().all(state));
    };
    running.signal(Signal::TSTP);
    are_stopped(true);
    running.write("hello\n");
    running.signal(Signal::CONT);
    are_stopped(false);
    running.wait_for("got hello");
    running.wait().succeeded();
}

#[test]
fn a_saved_machine_goes_on_in_a_jail() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved");
    let name = format!("jail{}", std::process::id());
    let script = "echo up; read -r line; echo \"got $line\"; sleep 1000";
    let running = Guest::new(Kernel::Tiny).script(script).option("--name", &name).spawn();
    running.wait_for("up");
    let bantam = || Command::new(env!("CARGO_BIN_EXE_bantam"));
    let made = bantam().arg("snapshot").arg(&name).arg(&saved).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    running.signal(Signal::KILL);
    running.wait();

    let report = folder.path().join("report.json");
    let mut command = bantam();
    command.arg("restore").arg(&saved).arg("--jail").arg("--report").arg(&report);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(&mut command, folder, Duration::from_secs(300));
    running.write("again\n");
    running.wait_for("got again");
    let launcher = running.pid().as_raw_pid();
    sees_nothing(machine_of(launcher), 0x7000_0000 | launcher.cast_unsigned() & 0x00ff_ffff);
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.status, 128 + Signal::TERM.as_raw(), "{}", ended.stderr);
    assert_eq!(ended.report["outcome"], "signaled");
}

#[test]
fn where_there_are_no_namespaces_there_is_no_jail() {
    let limit = Path::new("/proc/self/ns/user");
    assert!(limit.exists());
    let (folder, disk) = others_folder();
    // None in the namespace that it is started from: a namespace in which none more may be made.
    let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --reuid 0 --bounding-set -sys_admin \
                  --inh-caps -sys_admin -- \"$0\" \"$@\"";
    let guest = guest(folder.path(), &disk, "--jail");
    let ended = started_by(guest, "unshare", &["--user", "--map-root-user", "sh", "-c", script]).run();
    assert_eq!(ended.status, 125, "{}", ended.stderr);
    assert!(ended.stderr.contains("cannot make namespaces for a jail (--jail)"), "{}", ended.stderr);
}
