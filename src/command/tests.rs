//! The parts of the init that need no guest, against what writes for them; and sessions with a guest made by hand.

// The init's own, which are compiled for it alone otherwise.
#[path = "../init/account.rs"]
#[allow(dead_code, unused_imports, reason = "not all of it is used here")]
mod account;
#[path = "../init/spec.rs"]
#[allow(dead_code, reason = "not all of it is used here")]
mod init_spec;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use init_spec::Root as InitRoot;
use proptest::prelude::*;

use super::protocol::{self, message};
use super::*;

/// What the init finds in the archive.
fn told(command: &Spec, devices: Devices<'_>) -> init_spec::Spec {
    let text = super::told(command, 24 << 16 | 80);
    let made = Initramfs::make(command, devices, "none/vmlinux".as_ref(), None, None, &text).unwrap();
    assert!(!made.has_modules);
    let name = b".bantam/spec\0";
    let at = memchr::memmem::find(&made.archive, name).unwrap();
    let size = str::from_utf8(&made.archive[at - 110 + 54..at - 110 + 62]).unwrap();
    let size = usize::from_str_radix(size, 16).unwrap();
    let start = (at + name.len()).next_multiple_of(4);
    init_spec::Spec::parse(&made.archive[start..start + size]).unwrap()
}

#[test]
fn the_init_is_told_everything() {
    let command = Spec {
        env: vec!["A=1".into(), "B=x=y".into(), "A=2".into()],
        workdir: Some("/src".into()),
        user: Some("me:us".into()),
        hostname: Some("box".into()),
        tty: true,
        rw: true,
        ..Spec::new(["sh", "-c", "a\nb"])
    };
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().write_all(b"hsqs").unwrap();
    let user_net = Some("52:54:00:12:34:5a".parse().unwrap());
    let devices = Devices { root: Some(Root::Disk(disk.path())), user_net, ..Devices::default() };
    let spec = told(&command, devices);
    let network = spec.network.as_ref().unwrap();
    assert_eq!((network.card, network.prefix_length), ([0x52, 0x54, 0, 0x12, 0x34, 0x5a], 24));
    let addresses = [[10, 0, 2, 15], [10, 0, 2, 2], [10, 0, 2, 3]];
    assert_eq!([network.address, network.gateway, network.name_server], addresses);
    assert_eq!(spec.root, InitRoot::Writable(c"squashfs".into()));
    assert_eq!(spec.arguments, [c"sh", c"-c", c"a\nb"].map(ToOwned::to_owned));
    assert_eq!((spec.variable("A"), spec.variable("B")), (Some(&b"2"[..]), Some(&b"x=y"[..])));
    assert_eq!((spec.variable("C"), spec.environment.len()), (None, 2));
    assert_eq!(spec.folder.as_deref(), Some(c"/src"));
    assert_eq!((spec.user.as_deref(), spec.host_name.as_deref()), (Some(&b"me:us"[..]), Some(&b"box"[..])));
    assert_eq!(spec.terminal, Some(24 << 16 | 80));

    let spec = told(&Spec::new(["true"]), Devices { user_net: None, ..devices });
    assert_eq!(spec.network, None);
    assert_eq!((spec.root, spec.terminal), (InitRoot::Overlay(c"squashfs".into()), None));
    assert_eq!(spec.upper, None);
    let kept = told(&Spec::new(["true"]), Devices { overlay: Some(2), ..devices });
    assert_eq!((kept.root, kept.upper), (InitRoot::Overlay(c"squashfs".into()), Some(c"/dev/vdc".into())));
    let folder = Devices { root: Some(Root::Folder("root")), ..Devices::default() };
    assert_eq!(told(&command, folder).root, InitRoot::Share(c"root".into()));
    assert_eq!(told(&Spec::new(["true"]), Devices::default()).root, InitRoot::Initramfs);
}

proptest! {
    #[test]
    fn the_init_does_not_trip_over_any_bytes(bytes: Vec<u8>) {
        let _ = init_spec::Spec::parse(&bytes);
        let _ = account::find(&bytes, &bytes, &bytes);
    }

    #[test]
    fn every_argument_arrives(arguments in proptest::collection::vec("[^\0]*", 1..5)) {
        let spec = told(&Spec::new(arguments.clone()), Devices::default());
        let arrived: Vec<_> = spec.arguments.iter().map(|argument| argument.to_str().unwrap()).collect();
        prop_assert_eq!(arrived, arguments);
    }
}

#[test]
fn users_and_groups_are_looked_up() {
    let passwd = b"root:x:0:0:root:/root:/bin/sh\nme:x:1000:100:Me,,,:/home/me:/bin/sh\n\nbroken:x\n";
    let group = b"root:x:0:\nusers:x:100:\nus:x:7:\nwheel:x:10:you,me\naudio:x:29:me\n";
    let find = |wanted: &str| {
        account::find(wanted.as_bytes(), passwd, group)
            .map(|account| (account.user, account.group, account.groups, String::from_utf8(account.home).unwrap()))
    };
    assert_eq!(find("0"), Ok((0, 0, vec![], "/root".into())));
    assert_eq!(find("me"), Ok((1000, 100, vec![10, 29], "/home/me".into())));
    assert_eq!(find("1000"), Ok((1000, 100, vec![10, 29], "/home/me".into())));
    assert_eq!(find("me:us"), Ok((1000, 7, vec![], "/home/me".into())));
    assert_eq!(find("1234:5"), Ok((1234, 5, vec![], "/".into())));
    assert_eq!(find("1234"), Ok((1234, 0, vec![], "/".into())));
    assert_eq!(find("you").unwrap_err(), "there is no user `you` in /etc/passwd");
    assert_eq!(find("me:nobody").unwrap_err(), "there is no group `nobody` in /etc/group");
}

#[test]
fn what_no_process_can_have_is_refused() {
    let refused = |spec: Spec| spec.validate().unwrap_err();
    assert_eq!(refused(Spec::new([""])), BadSpec::Empty);
    let tty = Spec { tty: true, env: vec!["TERM=x".into()], ..Spec::default() };
    assert_eq!(refused(tty.clone()), BadSpec::Options("--tty".into()));
    assert_eq!(
        refused(Spec { rw: true, env: vec!["A=x".into()], ..tty }),
        BadSpec::Options("--env, --tty, --rw".into())
    );
    assert_eq!(refused(Spec::new(["a", "b\0"])), BadSpec::Nul("b\0".into()));
    for variable in ["A", "=b"] {
        let spec = Spec { env: vec![variable.into()], ..Spec::new(["a"]) };
        assert_eq!(refused(spec), BadSpec::Variable(variable.into()));
    }
    let name = "x".repeat(65);
    assert_eq!(refused(Spec { hostname: Some(name.clone()), ..Spec::new(["a"]) }), BadSpec::HostName(name));
}

#[test]
fn every_wait_status_is_told_apart() {
    for code in 0..=255u8 {
        assert_eq!(session::ended(u32::from(code) << 8), Ended::Exited(code));
    }
    for signal in 1..=64u8 {
        // With and without a core dump.
        for status in [u32::from(signal), u32::from(signal) | 0x80] {
            assert_eq!(session::ended(status), Ended::Killed(signal.into()));
        }
    }
}

/// A session whose guest and user are the test.
struct Fixture {
    session: Session,
    reports: Receiver<Report>,
    /// The guest's ends: control, stdin, stdout, stderr.
    guest: Vec<Option<UnixStream>>,
    /// The user's.
    stdin: Option<UnixStream>,
    stdout: UnixStream,
}

impl Fixture {
    fn start() -> Self {
        Self::start_told(Told::AtBoot)
    }

    fn start_told(told: Told) -> Self {
        let pair = || UnixStream::pair().unwrap();
        let ((stdin, its_stdin), (stdout, its_stdout)) = (pair(), pair());
        let streams = Streams {
            stdin: its_stdin.into(),
            stdout: its_stdout.into(),
            stderr: OwnedFd::from(File::open("/dev/null").unwrap()),
        };
        let (mut session, mut ends) = Session::new(&Spec::new(["x"]), told, streams).unwrap();
        let ports = [protocol::CONTROL, protocol::STDIN, protocol::STDOUT, protocol::STDERR];
        let guest = ports.map(|port| ends.remove(&port)).into();
        let (sender, reports) = mpsc::channel();
        session.start(&crate::sandbox::Sandbox::default(), move |report| sender.send(report).unwrap()).unwrap();
        Self { session, reports, guest, stdin: Some(stdin), stdout }
    }

    fn say(&mut self, what: u32, value: u32) {
        self.guest[0].as_ref().unwrap().write_all(&message(what, value)).unwrap();
    }

    /// What it is told of its command.
    fn hear_command(&mut self) -> init_spec::Spec {
        let control = self.guest[0].as_mut().unwrap();
        let mut bytes = [0; protocol::MESSAGE];
        control.read_exact(&mut bytes).unwrap();
        let (what, length) = protocol::parse(bytes);
        assert_eq!(what, protocol::COMMAND);
        let mut text = vec![0; length as usize];
        control.read_exact(&mut text).unwrap();
        let mut spec = init_spec::Spec::parse(WAIT).unwrap();
        assert!(spec.waits && spec.arguments.is_empty());
        spec.add(&text).unwrap();
        spec
    }

    fn report(&self) -> Report {
        self.reports.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

#[test]
fn the_end_is_told_after_all_output() {
    let mut fixture = Fixture::start();
    fixture.say(protocol::STARTED, 0);
    assert!(matches!(fixture.report(), Report::Started(_)));
    fixture.stdin.take().unwrap().write_all(b"in").unwrap();
    let mut text = String::new();
    fixture.guest[1].as_ref().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "in");

    fixture.say(protocol::ENDED, 7 << 8);
    let mut stdout = fixture.guest[2].take().unwrap();
    stdout.write_all(&[1; 1000]).unwrap();
    drop(stdout);
    assert!(fixture.reports.try_recv().is_err(), "stderr is open");
    drop(fixture.guest[3].take());
    assert!(matches!(fixture.report(), Report::Ended(Ended::Exited(7))));
    fixture.stdout.read_exact(&mut [0; 1000]).unwrap();
    fixture.say(protocol::ENDED, 9 | 0x80);
    assert!(matches!(fixture.report(), Report::Ended(Ended::Killed(9))));
}

#[test]
fn a_reader_that_goes_away_is_told_to_the_guest() {
    let mut fixture = Fixture::start();
    fixture.stdout.shutdown(Shutdown::Both).unwrap();
    let mut stdout = fixture.guest[2].take().unwrap();
    // The first bytes find out.
    let failed = (0..1000).any(|_| {
        std::thread::yield_now();
        stdout.write_all(&[0; 4096]).is_err()
    });
    assert!(failed);
}

#[test]
fn a_command_that_reads_no_more_leaves_the_input_alone() {
    let mut fixture = Fixture::start();
    drop(fixture.guest[1].take());
    // The thread lets go of its end.
    let mut stdin = fixture.stdin.take().unwrap();
    assert_eq!(stdin.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_failure_is_told_in_words() {
    let mut fixture = Fixture::start();
    fixture.say(protocol::FAILED, 4);
    fixture.guest[0].as_ref().unwrap().write_all(b"why!").unwrap();
    assert!(matches!(fixture.report(), Report::Failed(why) if why == "why!"));
}

#[test]
fn the_first_signal_is_for_the_command_that_runs() {
    let mut fixture = Fixture::start();
    assert!(!fixture.session.signal(2), "nothing runs yet");
    let mut fixture = Fixture::start();
    fixture.session.started();
    assert!(fixture.session.signal(15));
    let mut bytes = [0; protocol::MESSAGE];
    fixture.guest[0].as_ref().unwrap().read_exact(&mut bytes).unwrap();
    assert_eq!(protocol::parse(bytes), (protocol::SIGNAL, 15));
    assert!(!fixture.session.signal(15));
    fixture.guest.clear();
    fixture.session.finish(Duration::from_secs(20));
}

#[test]
fn a_guest_that_waits_is_given_its_command_when_that_is_said() {
    let mut fixture = Fixture::start_told(Told::WhenGiven);
    fixture.say(protocol::READY, 0);
    assert!(matches!(fixture.report(), Report::Ready));
    let control = fixture.guest[0].as_ref().unwrap();
    control.set_nonblocking(true).unwrap();
    assert!(Read::read(&mut &*control, &mut [0]).is_err(), "it is not said yet");
    control.set_nonblocking(false).unwrap();
    fixture.session.resize();
    fixture.session.give();
    fixture.session.give();
    let spec = fixture.hear_command();
    assert_eq!((spec.arguments, spec.seed.len()), (vec![c"x".to_owned()], 32));
    assert!(init_spec::Spec::parse(b"seed=0\0").is_none());
}

#[test]
fn a_guest_that_was_restored_is_given_its_command_at_once() {
    let mut fixture = Fixture::start_told(Told::AtOnce);
    let spec = fixture.hear_command();
    fixture.say(protocol::READY, 0);
    fixture.say(protocol::STARTED, 0);
    assert!(matches!(fixture.report(), Report::Started(_)), "it is not given twice");
    let other = Fixture::start_told(Told::AtOnce).hear_command();
    assert!(spec.seed != other.seed && spec.arguments == other.arguments);
}
