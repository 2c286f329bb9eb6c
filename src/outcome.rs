//! How a machine's life ended.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// How a machine ended. Everything here is an answer, not an error: the guest ran, and this is what became of it.
///
/// As JSON it is an object with the kind under `outcome`, and what is known about it beside that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// The command in the guest ended by itself.
    #[serde(serialize_with = "status")]
    Exited(u8),
    /// A signal with this number ended the command in the guest.
    #[serde(serialize_with = "signal")]
    Killed(i32),
    /// The guest powered itself off.
    PoweredOff,
    /// The guest asked for a reset.
    Rebooted,
    /// Every vCPU halted for good.
    Halted,
    /// The guest kernel panicked.
    Panicked(Panic),
    /// The guest did something that a vCPU cannot go on from.
    Crashed(Crash),
    /// The guest did not come up in the time it was given.
    BootTimedOut {
        /// The time it was given.
        #[serde(rename = "limit-seconds", serialize_with = "seconds")]
        limit: Duration,
        /// Whether anything was seen on its console.
        #[serde(rename = "seen-console")]
        seen_console: bool,
    },
    /// The guest was still running when its time was over.
    TimedOut {
        /// The time it was given.
        #[serde(rename = "limit-seconds", serialize_with = "seconds")]
        limit: Duration,
    },
    /// The machine was stopped by the one who runs it.
    Stopped,
    /// A signal with this number ended the machine.
    #[serde(serialize_with = "signal")]
    Signaled(i32),
}

/// A guest kernel's panic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Panic {
    /// What the kernel said; empty if the panic was only signalled by pvpanic.
    pub message: String,
    /// The last lines of the console, oldest first.
    pub console_tail: Vec<String>,
}

/// What a vCPU could not go on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Crash {
    /// The vCPU's number.
    pub vcpu: u32,
    /// What happened.
    pub kind: CrashKind,
    /// The instruction pointer.
    pub rip: u64,
    /// The privilege level: 0 is the kernel, 3 user space.
    pub cpl: u8,
    /// The bytes at `rip`, as far as they are known; as JSON, hexadecimal text.
    #[serde(serialize_with = "hex")]
    pub instruction: Vec<u8>,
    /// What else KVM told, in words; may be empty.
    pub details: String,
}

/// The kinds of [`Crash`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CrashKind {
    /// A fault while the double fault handler was called: the CPU shut down.
    TripleFault,
    /// KVM had to emulate an instruction and does not know how to.
    EmulationFailure,
    /// The host CPU refused to enter the guest with the state it has.
    FailEntry,
    /// KVM met an error of its own.
    InternalError,
    /// KVM returned for a reason that bantam does not handle.
    Unhandled,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "the command exited with status {status}"),
            Self::Killed(number) => write!(f, "the command was killed by signal {number}"),
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Rebooted => f.write_str("the guest rebooted"),
            Self::Halted => f.write_str("the guest halted all its vCPUs"),
            Self::Panicked(panic) => panic.fmt(f),
            Self::Crashed(crash) => crash.fmt(f),
            Self::BootTimedOut { limit, seen_console: true } => {
                write!(f, "the guest did not reach user space within {limit:?}")
            }
            Self::BootTimedOut { limit, seen_console: false } => {
                write!(f, "the guest did not reach user space within {limit:?}: nothing was seen on its console")
            }
            Self::TimedOut { limit } => write!(f, "the guest was still running after {limit:?}"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Signaled(number) => write!(f, "the machine was ended by signal {number}"),
        }
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the guest kernel panicked")?;
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            CrashKind::TripleFault => "the guest crashed with a triple fault",
            CrashKind::EmulationFailure => "KVM cannot emulate an instruction of the guest",
            CrashKind::FailEntry => "the host CPU refused to run the guest",
            CrashKind::InternalError => "KVM failed with an internal error",
            CrashKind::Unhandled => "KVM stopped the guest for a reason bantam does not know",
        };
        let mode = match self.cpl {
            0 => "kernel mode",
            3 => "user mode",
            _ => "an inner ring",
        };
        write!(f, "{what} on vCPU {} at {:#x} in {mode}", self.vcpu, self.rip)?;
        if !self.instruction.is_empty() {
            write!(f, ", instruction bytes {}", Hex(&self.instruction))?;
        }
        if self.details.is_empty() { Ok(()) } else { write!(f, " ({})", self.details) }
    }
}

/// Bytes as `0f 01 d0`.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

fn hex<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Hex(bytes))
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

fn status<S: Serializer>(status: &u8, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Status {
        status: u8,
    }
    Status { status: *status }.serialize(serializer)
}

fn signal<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Signal {
        signal: i32,
    }
    Signal { signal: *number }.serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn crash() -> Crash {
        Crash {
            vcpu: 1,
            kind: CrashKind::EmulationFailure,
            rip: 0xffff_ffff_8100_0000,
            cpl: 0,
            instruction: vec![0x0f, 0x01, 0xd0],
            details: String::new(),
        }
    }

    #[test]
    fn every_outcome_is_an_object_with_its_kind() {
        let limit = Duration::from_millis(1500);
        let panic = Panic { message: "no init".into(), console_tail: vec!["bye".into()] };
        for (outcome, expected) in [
            (Outcome::Exited(7), json!({"outcome": "exited", "status": 7})),
            (Outcome::Killed(9), json!({"outcome": "killed", "signal": 9})),
            (Outcome::PoweredOff, json!({"outcome": "powered-off"})),
            (Outcome::Panicked(panic), json!({"outcome": "panicked", "message": "no init", "console-tail": ["bye"]})),
            (
                Outcome::Crashed(crash()),
                json!({"outcome": "crashed", "vcpu": 1, "kind": "emulation-failure", "rip": 0xffff_ffff_8100_0000u64,
                       "cpl": 0, "instruction": "0f 01 d0", "details": ""}),
            ),
            (
                Outcome::BootTimedOut { limit, seen_console: false },
                json!({"outcome": "boot-timed-out", "limit-seconds": 1.5, "seen-console": false}),
            ),
            (Outcome::Signaled(15), json!({"outcome": "signaled", "signal": 15})),
        ] {
            assert_eq!(serde_json::to_value(outcome).unwrap(), expected);
        }
    }

    #[test]
    fn a_crash_says_what_and_where() {
        assert_eq!(
            Outcome::Crashed(crash()).to_string(),
            "KVM cannot emulate an instruction of the guest on vCPU 1 at 0xffffffff81000000 in kernel mode, \
             instruction bytes 0f 01 d0"
        );
    }
}
