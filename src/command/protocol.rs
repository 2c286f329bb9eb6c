//! What bantam and the init in the guest say to each other. The init is compiled by itself and includes this file.
//!
//! The init connects to the ports below of the host (CID 2). The streams carry bytes and nothing else. On the control
//! connection there are messages of two little-endian words of 32 bits, what it is and its value; the text of a failure
//! follows its message.

/// The connection for control.
pub const CONTROL: u32 = 0x3fff_ff00;
/// The command's standard input; with a terminal both ways.
pub const STDIN: u32 = CONTROL + 1;
/// The command's standard output.
pub const STDOUT: u32 = CONTROL + 2;
/// The command's standard error.
pub const STDERR: u32 = CONTROL + 3;

/// Bytes of a message.
pub const MESSAGE: usize = 8;

/// To the host: the guest is ready, the command is about to be started; the value is what limits its processes, or 0.
pub const STARTED: u32 = 1;
/// A control group limits them.
pub const PIDS_BY_GROUP: u32 = 1;
/// The kernel's limit of all threads does.
pub const PIDS_BY_THREADS: u32 = 2;
/// To the host: the command has ended; the value is its wait status, as `wait(2)` has it. All output was sent.
pub const ENDED: u32 = 2;
/// To the host: the command could not be started; the value is how many bytes of text follow.
pub const FAILED: u32 = 3;

/// To the host: the guest waits for its command; the value is 0. It says so on each connection for control, of which there is
/// another one where the machine is restored.
pub const READY: u32 = 4;

/// To the guest: send the command a signal; the value is its number.
pub const SIGNAL: u32 = 16;
/// To the guest: the terminal's size; the value is rows << 16 | columns.
pub const WINDOW: u32 = 17;

/// To the guest that waits for it: the command; the value is how many bytes follow, of the form of the init's file.
pub const COMMAND: u32 = 18;

/// The folder in the initramfs with all that is ours.
pub const FOLDER: &str = "/.bantam";

/// A message's bytes.
pub fn message(what: u32, value: u32) -> [u8; MESSAGE] {
    (u64::from(value) << 32 | u64::from(what)).to_le_bytes()
}

/// What a message says, and its value.
pub fn parse(message: [u8; MESSAGE]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = message;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}
