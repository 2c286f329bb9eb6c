//! Programs that embed bantam, on a terminal: it is theirs again, whatever becomes of them. The programs are ignored
//! tests of this one, which the others start.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use bantam::config::Config;
use bantam::devices::console::{Console, Spec};
use bantam::machine::Builder;
use bantam::terminal::{self, Raw, in_foreground};
use rustix::process::Pid;
use rustix::stdio::stdin;
use rustix::termios::{LocalModes, tcgetattr, tcsetpgrp};

use crate::support::{Ended, Guest, Kernel};
use crate::terminal::Terminal;

/// Runs one of the programs on a terminal of its own, and checks the terminal afterwards.
fn run(program: &str, status: i32) -> Ended {
    let this = std::env::current_exe().unwrap();
    let script = format!("exec \"$0\" --exact --ignored --nocapture embedded::{program}");
    let arguments = ["sh", "-c", &script, this.to_str().unwrap()];
    let (terminal, running) = Terminal::start(Guest::new(Kernel::Tiny), &arguments);
    terminal.end(running, status)
}

fn is_raw() -> bool {
    !tcgetattr(stdin()).unwrap().local_modes.contains(LocalModes::ICANON)
}

/// The end of a guest's console that breaks at its first word.
struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        panic!("raw: {}", is_raw())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a guest, on the terminal, whose console breaks.
fn run_with_broken_console() {
    let mut console = Console::open(&Spec::Stdio).unwrap();
    console.output = Box::new(Broken);
    let config = Config::new().kernel(Kernel::Tiny.vmlinux()).serial(Spec::None);
    let mut machine = Builder::new(config).console(console).build().unwrap();
    machine.run().unwrap();
    assert!(!is_raw(), "raw when the machine had ended");
}

#[test]
fn a_panic_of_a_thread_leaves_the_terminal_to_the_machine() {
    let ended = run("program_that_goes_on_after_a_panic", 0);
    ended.require(ended.stderr.contains("raw: true"), "expected a panic");
}

#[test]
#[ignore = "a program for the test above"]
fn program_that_goes_on_after_a_panic() {
    run_with_broken_console();
}

#[test]
fn a_panic_that_ends_the_process_restores_the_terminal() {
    let ended = run("program_that_ends_by_a_panic", 125);
    ended.require(ended.stderr.contains("raw: true"), "expected a panic");
}

#[test]
#[ignore = "a program for the test above"]
fn program_that_ends_by_a_panic() {
    // As the `bantam` command does.
    std::panic::set_hook(Box::new(|panic| {
        terminal::restore();
        eprintln!("{panic}");
        std::process::exit(125);
    }));
    run_with_broken_console();
}

#[test]
fn the_terminal_is_restored_from_the_background() {
    run("program_that_moves_to_the_background", 0);
}

#[test]
#[ignore = "a program for the test above"]
fn program_that_moves_to_the_background() {
    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let raw = Raw::enter().unwrap().unwrap();
    let other = Killed(Command::new("sleep").arg("1000").process_group(0).spawn().unwrap());
    tcsetpgrp(stdin(), Pid::from_child(&other.0)).unwrap();
    assert!(is_raw() && !in_foreground());
    drop(raw);
}
