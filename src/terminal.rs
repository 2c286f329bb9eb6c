//! The user's terminal: raw while a guest has it, and as it was before on every way out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};
use vmm_sys_util::signal::{block_signal, unblock_signal};

/// What standard input's terminal was like and what it is now, while it is raw.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

struct Saved {
    before: Termios,
    raw: Termios,
}

/// Makes standard input's terminal what it was before [`Raw::enter`]. For a panic hook; else [`Raw`]'s drop does it.
pub fn restore() {
    if let Some(saved) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = set(&saved.before);
    }
}

/// The same for a signal handler: it waits for nobody who has the settings.
pub fn restore_if_free() {
    if let Ok(Some(saved)) = SAVED.try_lock().as_deref() {
        let _ = set(&saved.before);
    }
}

/// Makes standard input's terminal raw once more, if it was to be. For a process that was stopped and goes on: a shell has
/// used the terminal meanwhile.
pub fn resume() {
    if let Some(saved) = &*SAVED.lock().unwrap_or_else(PoisonError::into_inner)
        && in_foreground()
    {
        let _ = set(&saved.raw);
    }
}

fn set(settings: &Termios) -> io::Result<()> {
    // A process that is in the background by now would be stopped for it, unless it blocks the signal.
    let blocked = block_signal(libc::SIGTTOU).is_ok();
    // TCSANOW: waiting for output to drain could wait for ever.
    let result = tcsetattr(stdin(), OptionalActions::Now, settings);
    if blocked {
        let _ = unblock_signal(libc::SIGTTOU);
    }
    Ok(result?)
}

/// Standard input's terminal in raw mode; dropping it restores the terminal.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Switches standard input to raw mode, if it is a terminal, this process is in its foreground, and nobody else in
    /// the process has it. Lines that are written to it still start at the left.
    pub fn enter() -> io::Result<Option<Self>> {
        // Our own lines, and those of a guest that sends no carriage returns.
        Self::enter_with(OutputModes::OPOST)
    }

    /// The same, and what is written to the terminal reaches it as it is.
    pub fn enter_whole() -> io::Result<Option<Self>> {
        Self::enter_with(OutputModes::empty())
    }

    fn enter_with(output_modes: OutputModes) -> io::Result<Option<Self>> {
        if !isatty(stdin()) || !in_foreground() {
            return Ok(None);
        }
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        if saved.is_some() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= output_modes;
        *saved = Some(Saved { before, raw: raw.clone() });
        drop(saved);
        let raw_guard = Raw(());
        set(&raw)?;
        Ok(Some(raw_guard))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// `/proc/self/stat` of a process that does not see the groups of processes that it and its terminal belong to.
static STAT: OnceLock<File> = OnceLock::new();

/// Has `/proc/self/stat`, opened outside of the PID namespace of this process, tell what group of processes is in the
/// foreground: in a namespace all groups outside have the same number.
pub fn look_from_outside(stat: File) {
    let _ = STAT.set(stat);
}

/// The group of the process and that in the foreground of its terminal, in `stat` (proc_pid_stat(5)).
fn groups(stat: &str) -> Option<(&str, &str)> {
    // The name in parentheses may have spaces. Behind it are the state, the parent, the group, the session, the terminal.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(2);
    Some((fields.next()?, fields.nth(2)?))
}

/// Whether reading from, and setting, the terminal would not stop the process (SIGTTIN, SIGTTOU).
pub fn in_foreground() -> bool {
    match tcgetpgrp(stdin()) {
        Ok(_) if STAT.get().is_some() => {
            let mut bytes = [0; 1024];
            let read = STAT.get().and_then(|stat| stat.read_at(&mut bytes, 0).ok()).unwrap_or(0);
            let stat = String::from_utf8_lossy(&bytes[..read]);
            groups(&stat).is_some_and(|(own, foreground)| own == foreground)
        }
        Ok(group) => group == getpgrp(),
        // Of a terminal that does not control this process there is no background.
        Err(error) => error == Errno::NOTTY,
    }
}

/// What the user asked of bantam, rather than of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// End the machine (Ctrl-A x).
    Quit,
    /// List the keys (Ctrl-A h).
    Help,
}

/// The keys that the terminal keeps for bantam.
pub const HELP: &str =
    "\r\nCtrl-A h    this help\r\nCtrl-A x    end the machine\r\nCtrl-A Ctrl-A    send Ctrl-A to the guest\r\n";

/// Takes the escape sequences out of what is typed. They start with Ctrl-A, as in QEMU.
#[derive(Debug, Default)]
pub struct Escapes {
    pending: bool,
}

const CTRL_A: u8 = 1;

impl Escapes {
    /// Moves what is for the guest to the front of `bytes`; returns how much that is, and the request if there was one.
    /// What is typed after a request is dropped.
    pub fn filter(&mut self, bytes: &mut [u8]) -> (usize, Option<Request>) {
        let mut kept = 0;
        for i in 0..bytes.len() {
            let byte = bytes[i];
            let for_guest = match (std::mem::take(&mut self.pending), byte) {
                (true, b'x' | b'X') => return (kept, Some(Request::Quit)),
                (true, b'h' | b'H' | b'?') => return (kept, Some(Request::Help)),
                (true, CTRL_A) => true,
                (true, _) => false,
                (false, CTRL_A) => {
                    self.pending = true;
                    false
                }
                (false, _) => true,
            };
            if for_guest {
                bytes[kept] = byte;
                kept += 1;
            }
        }
        (kept, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(escapes: &mut Escapes, typed: &[u8]) -> (Vec<u8>, Option<Request>) {
        let mut bytes = typed.to_vec();
        let (kept, request) = escapes.filter(&mut bytes);
        bytes.truncate(kept);
        (bytes, request)
    }

    #[test]
    fn groups_are_found_behind_a_strange_name() {
        assert_eq!(groups("7 (a) b (c) S 1 22 33 34816 44 4194560 9"), Some(("22", "44")));
        assert_eq!(groups("7 (a) S 1"), None);
    }

    #[test]
    fn escapes_are_found_across_reads() {
        let mut escapes = Escapes::default();
        assert_eq!(filter(&mut escapes, b"ls\r\x01"), (b"ls\r".to_vec(), None));
        assert_eq!(filter(&mut escapes, b"x"), (Vec::new(), Some(Request::Quit)));
        assert_eq!(filter(&mut escapes, b"\x01hq"), (Vec::new(), Some(Request::Help)));
        assert_eq!(filter(&mut escapes, b"a\x01\x01b\x01zc"), (b"a\x01bc".to_vec(), None));
    }
}
