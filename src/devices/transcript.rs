//! Reads along with the console: keeps its last lines, and recognises what a Linux kernel says of its own fate.

use std::collections::VecDeque;

/// Lines kept.
const LINES: usize = 20;
/// Bytes kept of a line: the end of a longer one, where the kernel's last words may be.
const LINE_BYTES: usize = 512;

/// How the first line of a kernel begins, after its time stamp if it has one.
const FIRST_LINE: &str = "Linux version ";

/// Something the console showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sight {
    /// The first byte of all.
    FirstByte,
    /// User space runs: the kernel said that it starts init, or something was written that is no kernel message.
    UserSpace,
    /// The kernel panicked, saying this.
    Panic(String),
    /// The kernel has said all there is about its panic, and will do nothing more.
    PanicEnd,
    /// Something was written after that: it was no kernel's.
    Alive,
    /// The kernel shuts down in good order, whatever looked like a panic before.
    ShutDown,
    /// The kernel is about to halt every CPU.
    Halted,
    /// The kernel ended a process to have its memory, saying this.
    OutOfMemory(String),
}

/// The console's last lines, and what has been recognised.
#[derive(Debug, Default)]
pub struct Transcript {
    lines: VecDeque<String>,
    line: Vec<u8>,
    /// What comes next overwrites the line, unless it ends it.
    returned: bool,
    any: bool,
    /// Whether the kernel puts the time before its messages, once that is known.
    stamps: Option<bool>,
    user_space: bool,
    panic_ended: bool,
}

impl Transcript {
    /// Reads `bytes`; tells `on_sight` what they show.
    pub fn feed(&mut self, bytes: &[u8], on_sight: &impl Fn(Sight)) {
        if !self.any && !bytes.is_empty() {
            self.any = true;
            on_sight(Sight::FirstByte);
        }
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(on_sight),
                b'\r' => self.returned = true,
                _ => self.push(*byte),
            }
        }
        // A prompt does not end its line.
        if self.panic_ended && !self.line.is_empty() {
            self.panic_ended = false;
            on_sight(Sight::Alive);
        }
        let kernel = self.line.starts_with(b"[") || FIRST_LINE.as_bytes().iter().zip(&self.line).all(|(a, b)| a == b);
        if !kernel {
            self.see_user_line(on_sight);
        }
    }

    fn push(&mut self, byte: u8) {
        if std::mem::take(&mut self.returned) {
            self.line.clear();
        }
        if self.line.len() == LINE_BYTES {
            self.line.drain(..LINE_BYTES / 2);
        }
        self.line.push(byte);
    }

    /// The last lines, oldest first; the unfinished one too.
    pub fn tail(&self) -> Vec<String> {
        let mut lines: Vec<_> = self.lines.iter().cloned().collect();
        if !self.line.is_empty() {
            lines.push(String::from_utf8_lossy(&self.line).into_owned());
        }
        lines.drain(..lines.len().saturating_sub(LINES));
        lines
    }

    fn end_line(&mut self, on_sight: &impl Fn(Sight)) {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        self.returned = false;
        if std::mem::take(&mut self.panic_ended) {
            on_sight(Sight::Alive);
        }
        if self.stamps.is_none() && line.starts_with(FIRST_LINE) {
            self.stamps = Some(false);
        }
        self.stamps = self.stamps.or(after_stamps(&line).map(|_| true));
        let message = kernel_message(&line, self.stamps);
        match message {
            Some(text) if text.starts_with("Kernel panic - not syncing") => on_sight(Sight::Panic(text.to_owned())),
            Some(text) if text.starts_with("---[ end Kernel panic") => {
                self.panic_ended = true;
                on_sight(Sight::PanicEnd);
            }
            Some(text) if ran_out_of_memory(text) => on_sight(Sight::OutOfMemory(text.to_owned())),
            Some("reboot: System halted") => on_sight(Sight::Halted),
            Some(text) if text.starts_with("reboot: ") => on_sight(Sight::ShutDown),
            Some(text) if init_started(text) => self.start_user_space(on_sight),
            None if !line.is_empty() => self.see_user_line(on_sight),
            _ => {}
        }
        if message == Some(NO_PCI) {
            return;
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Something that is no kernel message, if the kernel's can be told.
    fn see_user_line(&mut self, on_sight: &impl Fn(Sight)) {
        if self.stamps != Some(false) {
            self.start_user_space(on_sight);
        }
    }

    fn start_user_space(&mut self, on_sight: &impl Fn(Sight)) {
        if !std::mem::replace(&mut self.user_space, true) {
            on_sight(Sight::UserSpace);
        }
    }
}

/// What distribution kernels say of a machine without PCI. It is harmless, and would look like the reason of every failure.
const NO_PCI: &str = "PCI: Fatal: No config space access function found";

/// The text of a kernel message: all of a line after its time stamp. Of what says how the kernel ends, also in the
/// middle of a line that a user's program left unfinished; and without a stamp, unless the kernel is known to stamp.
fn kernel_message(line: &str, stamps: Option<bool>) -> Option<&str> {
    let ends = |text: &str| {
        ["Kernel panic - not syncing", "---[ end Kernel panic", "reboot: "].iter().any(|start| text.starts_with(start))
            || ran_out_of_memory(text)
    };
    if stamps != Some(true) && (ends(line) || init_started(line)) {
        return Some(line);
    }
    let mut stamped = line.match_indices('[').filter_map(|(at, _)| Some((at, after_stamps(&line[at..])?)));
    stamped.find(|(at, text)| *at == 0 || ends(text)).map(|(_, text)| text)
}

fn init_started(text: &str) -> bool {
    text.starts_with("Run ") && text.ends_with(" as init process")
}

/// Also of a memory control group's own limit.
fn ran_out_of_memory(text: &str) -> bool {
    let rest = text.strip_prefix("Memory cgroup out of memory: ").or(text.strip_prefix("Out of memory: "));
    rest.is_some_and(|rest| rest.starts_with("Killed process "))
}

/// What follows `[    1.234567] `, and `[    T1] ` where the kernel tells the caller too.
fn after_stamps(text: &str) -> Option<&str> {
    let mut rest = text;
    while let Some((stamp, after)) = rest.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        let stamp = stamp.trim_start();
        let number = stamp.strip_prefix(['T', 'C']).unwrap_or(stamp);
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            break;
        }
        rest = after;
    }
    (rest.len() != text.len()).then(|| rest.strip_prefix(' ').unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    fn sights(text: &str) -> Vec<Sight> {
        let seen = RefCell::new(Vec::new());
        let mut transcript = Transcript::default();
        // In small pieces, as a console brings it.
        for piece in text.as_bytes().chunks(7) {
            transcript.feed(piece, &|sight| seen.borrow_mut().push(sight));
        }
        seen.into_inner()
    }

    #[test]
    fn that_there_is_no_pci_is_not_among_the_last_lines() {
        let mut transcript = Transcript::default();
        let log =
            "[    1.0] one\r\n[    2.704701] PCI: Fatal: No config space access function found\r\n[    3.0] two\r\n";
        transcript.feed(log.as_bytes(), &|_| {});
        assert_eq!(transcript.tail(), ["[    1.0] one", "[    3.0] two"]);
    }

    #[test]
    fn a_boot_a_panic_and_its_end() {
        let log = "[    0.000000] Linux version 6.1\r\n[    1.5] Run /init as init process\r\n\
                   [    2.000000][    T1] Kernel panic - not syncing: sysrq triggered crash\r\n\
                   [    2.1] CPU: 0\r\n[    2.2] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n";
        let panic = "Kernel panic - not syncing: sysrq triggered crash".to_owned();
        assert_eq!(sights(log), [Sight::FirstByte, Sight::UserSpace, Sight::Panic(panic), Sight::PanicEnd]);
    }

    #[test]
    fn what_goes_on_after_a_panic_was_none() {
        let seen = sights("[    1.0] ---[ end Kernel panic - not syncing: x ]---\r\n$ ");
        assert_eq!(seen, [Sight::FirstByte, Sight::PanicEnd, Sight::Alive, Sight::UserSpace]);
    }

    #[test]
    fn a_prompt_is_user_space_and_kernel_messages_are_not() {
        assert_eq!(sights("[    0.1] a\r\n[    0.2] b\r\n"), [Sight::FirstByte]);
        assert_eq!(sights("[    0.1] a\r\n~ # "), [Sight::FirstByte, Sight::UserSpace]);
    }

    #[test]
    fn a_panic_after_an_unfinished_line_or_a_long_one() {
        let panic = "Kernel panic - not syncing: Attempted to kill init!";
        for before in ["~ # ".to_owned(), "50%\r60%".to_owned(), ".".repeat(10_000)] {
            let seen = sights(&format!("[    0.1] Linux version 6.1\r\n{before}[   12.3] {panic}\r\n"));
            assert_eq!(seen, [Sight::FirstByte, Sight::UserSpace, Sight::Panic(panic.into())], "{before:.9}");
        }
    }

    #[test]
    fn a_program_may_print_what_a_kernel_without_time_stamps_would() {
        let panic = "Kernel panic - not syncing: x";
        let log = |first| sights(&format!("{first}Linux version 6.1\r\n{panic}\r\n"));
        assert_eq!(log("[    0.1] "), [Sight::FirstByte, Sight::UserSpace]);
        assert_eq!(log(""), [Sight::FirstByte, Sight::Panic(panic.into())]);
    }

    #[test]
    fn user_space_of_a_kernel_without_time_stamps_is_where_init_starts() {
        let log = "Linux version 6.1\r\nMemory: 1\r\n";
        assert_eq!(sights(log), [Sight::FirstByte]);
        assert_eq!(sights(&format!("{log}Run /init as init process\r\n")), [Sight::FirstByte, Sight::UserSpace]);
    }

    #[test]
    fn what_is_overwritten_is_not_kept() {
        let mut transcript = Transcript::default();
        transcript.feed(b"10%\r20%\r100%\r\n", &|_| ());
        assert_eq!(transcript.tail(), ["100%"]);
    }

    #[test]
    fn halting_and_restarting_are_recognised() {
        assert!(sights("[   3.25] reboot: Restarting system\r\n").contains(&Sight::ShutDown));
        assert!(sights("[   3.25] reboot: System halted\n").contains(&Sight::Halted));
        assert!(sights("reboot: System halted\n").contains(&Sight::Halted));
    }

    #[test]
    fn a_process_that_was_killed_for_its_memory_is_seen() {
        for killed in
            ["Out of memory: Killed process 61 (tail) total-vm:9kB", "Memory cgroup out of memory: Killed process 1"]
        {
            let log = format!("[    0.1] Linux version 6.1\r\nunfinished[    9.2] {killed}\r\n");
            assert!(sights(&log).contains(&Sight::OutOfMemory(killed.into())), "{killed}");
            let printed = format!("[    0.1] Linux version 6.1\r\n{killed}\r\n");
            assert_eq!(sights(&printed), [Sight::FirstByte, Sight::UserSpace], "a program may print it");
        }
        assert_eq!(sights("[    0.1] Out of memory: nothing to kill\r\n"), [Sight::FirstByte]);
    }

    #[test]
    fn the_last_twenty_lines_are_kept() {
        let mut transcript = Transcript::default();
        for i in 0..30 {
            transcript.feed(format!("line {i}\r\n").as_bytes(), &|_| ());
        }
        transcript.feed(b"prompt", &|_| ());
        let tail = transcript.tail();
        assert_eq!((tail.len(), tail[0].as_str(), tail[19].as_str()), (20, "line 11", "prompt"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_bounded(bytes: Vec<u8>) {
            let mut transcript = Transcript::default();
            for _ in 0..50 {
                transcript.feed(&bytes, &|_| ());
            }
            prop_assert!(transcript.tail().len() <= LINES);
            prop_assert!(transcript.line.len() <= LINE_BYTES);
        }
    }
}
