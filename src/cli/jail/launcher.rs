//! The process that waits for one in a jail.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use bantam::cgroup::{self, Group};
use bantam::config::Config;
use bantam::devices::console;
use bantam::signal::{self, SignalFd};
use bantam::socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr, write};
use rustix::process::{Signal, WaitId, WaitIdOptions, getpid, kill_process, pidfd_send_signal, waitid};

use crate::cli::message::say;
use crate::cli::output_file;
use crate::process::ExitCode;

/// The most bytes that the machine's process has written to files: far more than a report and its JUnit file have.
const FILES_MAX: usize = 64 << 20;

/// The signals that the launcher passes on, and the one of a terminal's Ctrl-Z.
pub fn signals() -> io::Result<SignalFd> {
    SignalFd::new(&[&signal::ENDING[..], &[libc::SIGCONT, libc::SIGWINCH, libc::SIGTSTP]].concat())
}

/// Ends this process if the launcher has, to which this pipe leads.
pub fn must_live(launcher: &impl AsFd) {
    let mut pipe = [PollFd::new(launcher, PollFlags::empty())];
    if poll(&mut pipe, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) {
        std::process::exit(1);
    }
}

/// The process that waits.
pub struct Launcher {
    child: OwnedFd,
    signals: SignalFd,
    to_machine: Option<OwnedFd>,
    /// Where it tells what is to be written; none when it is at its end, or says too much.
    from_machine: Option<File>,
    /// The signal that the machine's process was killed for, as nobody there took it.
    untaken: Option<i32>,
    /// What limits the machine's process.
    group: Option<Group>,
}

impl Launcher {
    pub(super) fn new(
        child: OwnedFd,
        signals: SignalFd,
        to_machine: OwnedFd,
        from_machine: OwnedFd,
        group: Option<Group>,
    ) -> Self {
        let (to_machine, from_machine) = (Some(to_machine), Some(from_machine.into()));
        Self { child, signals, to_machine, from_machine, untaken: None, group }
    }

    /// Waits until the machine that `config` makes has ended, and writes and removes what its process cannot: files by their
    /// numbers. What that one exited with.
    ///
    /// # Errors
    /// When it cannot be waited for, or a file not be written.
    pub fn finish(
        mut self,
        config: &Config,
        write: impl Fn(u8, &[u8]) -> Result<(), output_file::Error>,
    ) -> Result<ExitCode, Box<dyn Error>> {
        let group = self.group.take();
        let ended = self.wait().map_err(|error| format!("cannot wait for the machine in a jail: {error}"));
        let vsock = config.vsock.iter().map(|vsock| &vsock.socket);
        let console = if let console::Spec::Socket(path) = &config.serial { Some(path) } else { None };
        // A process that is killed leaves them.
        vsock.chain(console).filter(|path| socket::is_stale(path)).for_each(|path| drop(std::fs::remove_file(path)));
        cgroup::clear();
        if let Some(group) = group.filter(|group| group.out_of_memory() > 0) {
            let path = group.path().display();
            say(&format!("the machine was ended by the kernel: its process wanted more than memory.max of {path}"));
        }
        let (end, told) = ended?;
        split(&told).into_iter().try_for_each(|(number, content)| write(number, content))?;
        Ok(match end {
            End::Exited(status) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
            // This process is killed, too.
            End::Killed(number) => {
                Signal::from_named_raw(number).map(|signal| kill_process(getpid(), signal));
                ExitCode::from(u8::try_from(128 + number).unwrap_or(u8::MAX))
            }
        })
    }

    /// Waits until the machine's process has ended, which gets the signals that this one gets: its end, and what it told.
    fn wait(mut self) -> io::Result<(End, Vec<u8>)> {
        let mut told = vec![];
        loop {
            let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.child, PollFlags::IN)];
            fds.extend(self.from_machine.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            retry_on_intr(|| poll(&mut fds, None))?;
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            let [signaled, ended, tells] = [0, 1, 2].map(ready);
            if tells {
                self.read(&mut told)?;
            }
            if signaled {
                self.pass_on();
            }
            if ended {
                break;
            }
        }
        // The other end is closed.
        while self.from_machine.is_some() {
            self.read(&mut told)?;
        }
        Ok((self.end()?, told))
    }

    /// Reads a part of what the machine's process tells. One that tells too much finds nobody who listens.
    fn read(&mut self, told: &mut Vec<u8>) -> io::Result<()> {
        let Some(pipe) = &mut self.from_machine else { return Ok(()) };
        let mut part = [0; 4096];
        let count = pipe.read(&mut part)?;
        told.extend_from_slice(&part[..count]);
        if count == 0 || told.len() > FILES_MAX {
            self.from_machine = None;
        }
        Ok(())
    }

    /// Passes a signal on.
    fn pass_on(&mut self) {
        let Some((number, record)) = self.signals.take_record() else { return };
        match number {
            libc::SIGTSTP => {
                // The first process of a namespace is stopped by nothing else.
                let _ = pidfd_send_signal(&self.child, Signal::STOP);
                let _ = kill_process(getpid(), Signal::STOP);
                return;
            }
            libc::SIGCONT => drop(pidfd_send_signal(&self.child, Signal::CONT)),
            _ => {}
        }
        let sent = self.to_machine.as_ref().map_or(Err(Errno::PIPE), |pipe| write(pipe, &record));
        // It does not listen any more, and is ended as it would end by itself.
        if sent.is_err() && signal::ENDING.contains(&number) {
            (self.to_machine, self.untaken) = (None, Some(number));
            let _ = pidfd_send_signal(&self.child, Signal::KILL);
        }
    }

    /// How the machine's process has ended.
    fn end(&self) -> io::Result<End> {
        let ended = retry_on_intr(|| waitid(WaitId::PidFd(self.child.as_fd()), WaitIdOptions::EXITED))?;
        let status = ended.as_ref().and_then(|ended| ended.exit_status());
        match (status, ended.and_then(|ended| ended.terminating_signal())) {
            (Some(status), _) => Ok(End::Exited(status)),
            (_, Some(number)) => Ok(End::Killed(self.untaken.unwrap_or(number))),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// How a process has ended: with a status, or by a signal.
enum End {
    Exited(i32),
    Killed(i32),
}

/// The files in what was told: each is a number, the length in 8 bytes, and the content.
fn split(mut told: &[u8]) -> Vec<(u8, &[u8])> {
    let mut files = vec![];
    while let Some(((number, length), rest)) = told.split_first().and_then(|(number, rest)| {
        let (length, rest) = rest.split_first_chunk()?;
        Some(((*number, u64::from_le_bytes(*length)), rest))
    }) {
        let Some((content, rest)) = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length))
        else {
            break;
        };
        files.push((number, content));
        told = rest;
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_one_after_another() {
        let told = [&[0][..], &3u64.to_le_bytes(), b"abc", &[1], &0u64.to_le_bytes()].concat();
        assert_eq!(split(&told), [(0, &b"abc"[..]), (1, &[])]);
        assert_eq!(split(&told[..told.len() - 1]), [(0, &b"abc"[..])]);
        assert!(split(&[7, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]).is_empty());
    }
}
