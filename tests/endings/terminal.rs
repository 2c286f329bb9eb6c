//! bantam on a terminal: the keys, and that the terminal is as it was before, whatever the ending.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use serde_json::json;

use crate::support::{Ended, Guest, Kernel, Running};
use crate::{eventually, started_by};

/// The user's side of a terminal.
pub struct Terminal {
    user: File,
    before: String,
}

impl Terminal {
    /// Starts bantam in a session of its own, with a new terminal that controls it, by `setsid` and these arguments.
    pub fn start(guest: Guest, arguments: &[&str]) -> (Self, Running) {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let programs =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name.to_str().unwrap());
        let programs = programs.unwrap();
        let terminal = Terminal { before: settings(&programs), user: user.into() };

        let mut guest = started_by(guest, "setsid", &[&["--ctty"], arguments].concat());
        guest.command().stdin(programs.try_clone().unwrap()).stdout(programs);
        let mut running = guest.start();
        running.read_from(terminal.user.try_clone().unwrap());
        (terminal, running)
    }

    fn write(&mut self, keys: &str) {
        self.user.write_all(keys.as_bytes()).unwrap();
    }

    fn is_as_before(&self) -> bool {
        settings(&self.user) == self.before
    }

    /// Waits until bantam has ended, and checks the terminal.
    #[track_caller]
    pub fn end(self, running: Running, status: i32) -> Ended {
        let ended = running.wait();
        ended.require(ended.status == status, &format!("expected status {status}"));
        assert!(self.is_as_before(), "{} before, {} after", self.before, settings(&self.user));
        ended
    }
}

fn settings(terminal: &File) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

fn tiny(script: &str) -> Guest {
    Guest::new(Kernel::Tiny).script(script)
}

#[test]
fn keys_reach_the_guest_except_those_for_bantam() {
    let (mut terminal, running) = Terminal::start(tiny("setsid cttyhack sh"), &[]);
    // What is typed is seen, too: the quotes tell it from what is printed.
    // A shell that is about to start a program may keep a signal that comes then to itself.
    terminal.write("sh -c 'echo slee\"\"ping; exec sleep 1000'\r");
    running.wait_for("sleeping");
    assert!(!terminal.is_as_before(), "raw");
    terminal.write("\x03");
    terminal.write("echo st''atus $?\r");
    running.wait_for("status 130");

    terminal.write("\x01h");
    eventually(|| running.stderr().contains("Ctrl-A x"));
    terminal.write("echo lis''tening; read -r x; echo $(echo $x | od -An -tx1)\r");
    running.wait_for("listening");
    terminal.write("\x01\x01A\r");
    running.wait_for("01 41 0a");
    terminal.write("exit 0\r");
    terminal.end(running, 0).succeeded();
}

/// A shell with a terminal, by `-t`.
fn shell_with_terminal() -> Guest {
    Guest::running(Kernel::Tiny.vmlinux(), &["sh"]).initramfs_root(Kernel::Tiny).flag("-t")
}

#[test]
fn it_is_as_before_when_kvm_fails() {
    // From later on than any ioctl of the first thread: those of a vCPU, of which one is KVM_RUN. Its number is changed, which no filter
    // lets pass.
    let inject = "inject=ioctl:error=EIO:when=400+";
    let strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=ioctl", "-e", inject];
    let guest = tiny("while true; do echo more; done").option("--sandbox", "off");
    let (terminal, running) = Terminal::start(guest, &strace);
    let ended = terminal.end(running, 125);
    ended.require(ended.stderr.contains("KVM_RUN"), "expected words of KVM_RUN");
}

#[test]
fn a_command_has_a_terminal_of_its_own_and_the_size_of_this_one() {
    let (mut terminal, running) = Terminal::start(shell_with_terminal(), &[]);
    running.wait_for("# ");
    let size = Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal.user, size).unwrap();
    terminal.write("until [ \"$(stty size)\" = '33 77' ]; do sleep 0.1; done; echo si''zed\r");
    running.wait_for("sized");
    terminal.write("sh -c 'tty; sleep 1000'\r");
    running.wait_for("/dev/pts/0");
    // A key like others: the guest's terminal makes a signal of it.
    terminal.write("\x03");
    terminal.write("echo en''ded\r");
    running.wait_for("ended");
    terminal.write("exit 6\r");
    let ended = terminal.end(running, 6);
    assert_eq!(ended.report["outcome"], "exited");
}

#[test]
fn ctrl_a_x_ends_a_command_and_is_no_success() {
    let (mut terminal, running) = Terminal::start(shell_with_terminal(), &[]);
    running.wait_for("# ");
    terminal.write("\x01x");
    let ended = terminal.end(running, 125);
    assert_eq!(ended.report["outcome"], "stopped");
}

#[test]
fn ctrl_a_x_ends_it() {
    let (mut terminal, running) = Terminal::start(tiny("echo ready; sleep 1000"), &[]);
    running.wait_for("ready");
    terminal.write("\x01x");
    let ended = terminal.end(running, 0);
    assert_eq!((&ended.report["outcome"], ended.stderr.as_str()), (&json!("stopped"), ""));
}

#[test]
fn it_is_raw_again_after_a_stop() {
    let (mut terminal, running) = Terminal::start(tiny("echo ready; sleep 1000"), &[]);
    running.wait_for("ready");
    let raw = settings(&terminal.user);
    running.signal(Signal::STOP);
    // A shell has what it had, and its own settings.
    let mut shell = tcgetattr(&terminal.user).unwrap();
    shell.local_modes |= LocalModes::ICANON | LocalModes::ECHO;
    tcsetattr(&terminal.user, OptionalActions::Now, &shell).unwrap();
    running.signal(Signal::CONT);
    eventually(|| settings(&terminal.user) == raw);
    terminal.write("\x01x");
    terminal.end(running, 0);
}

#[test]
fn signals_end_it() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (terminal, running) = Terminal::start(tiny("echo ready; sleep 1000"), &[]);
        running.wait_for("ready");
        assert!(!terminal.is_as_before(), "raw");
        running.signal(signal);
        let number = signal.as_raw();
        let ended = terminal.end(running, 128 + number);
        assert_eq!(ended.stderr, format!("bantam: the machine was ended by signal {number}\n"));
        assert_eq!((&ended.report["outcome"], &ended.report["signal"]), (&json!("signaled"), &json!(number)));
    }
}

#[test]
fn its_time_ends() {
    let (terminal, running) = Terminal::start(tiny("sleep 1000").option("--timeout", "4s"), &[]);
    let ended = terminal.end(running, 124);
    assert_eq!(ended.stderr, "bantam: the guest was still running after 4s\n");
    assert_eq!((&ended.report["outcome"], &ended.report["limit-seconds"]), (&json!("timed-out"), &json!(4.0)));
}

#[test]
fn its_kernel_panics() {
    let (terminal, running) = Terminal::start(tiny("echo c > /proc/sysrq-trigger"), &[]);
    let ended = terminal.end(running, 121);
    ended.require(ended.stderr.contains("sysrq triggered crash"), "expected the panic");
}

#[test]
fn the_console_of_a_panic_is_not_repeated_below_itself() {
    let arguments = ["sh", "-c", "exec \"$@\" 2>&1", "sh"];
    let (terminal, running) = Terminal::start(tiny("echo c > /proc/sysrq-trigger"), &arguments);
    let ended = terminal.end(running, 121);
    let words = "\nbantam: the guest kernel panicked: Kernel panic - not syncing: sysrq triggered crash\r\n";
    ended.require(ended.stdout.ends_with(words), "expected the panic once more, and nothing after it");
}

#[test]
fn it_cannot_start() {
    let (terminal, running) = Terminal::start(Guest::with_image(Kernel::Tiny, Path::new("/dev/null")), &[]);
    terminal.end(running, 125);
}

#[test]
fn in_the_background_it_runs_without_input() {
    // With job control (-m) bash starts it in a process group that is not the terminal's.
    let (terminal, running) =
        Terminal::start(tiny("echo from the guest"), &["bash", "-mc", "\"$@\" & wait $!", "bash"]);
    let ended = terminal.end(running, 0);
    ended.require(ended.stdout.contains("from the guest"), "expected the guest's words");
}
