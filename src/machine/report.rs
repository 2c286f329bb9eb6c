//! What a machine did, in figures.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::outcome::Outcome;

/// How a machine's life ended, how long its stages took and what its devices counted. Durations are in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// How it ended; absent if it has not, or could not be run.
    #[serde(flatten)]
    pub outcome: Option<Outcome>,
    /// The outcome in words.
    pub cause: String,
    /// The kernel's line about the last process that it ended because memory ran out, if it did.
    pub out_of_memory: Option<String>,
    /// What enforces the limits that were asked for.
    pub limits: Limits,
    /// From the start of the process to certain moments.
    pub durations: Durations,
    /// Counters of each device and vCPU, by name.
    pub statistics: BTreeMap<String, serde_json::Value>,
}

/// What enforces a limit, in words; absent for one that was not asked for.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Limits {
    /// That of CPU time.
    pub cpu_quota: Option<String>,
    /// That of the command's processes; it is known when the command starts.
    pub pids: Option<String>,
}

/// Milliseconds from the start; absent for what was not reached.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Durations {
    /// To when the kernel was in the guest's memory, and all else that it starts with.
    #[serde(serialize_with = "milliseconds")]
    pub kernel_loaded: Option<Duration>,
    /// To the first time that a vCPU entered the guest.
    #[serde(serialize_with = "milliseconds")]
    pub first_kvm_run: Option<Duration>,
    /// To the first byte on the console.
    #[serde(serialize_with = "milliseconds")]
    pub first_console_byte: Option<Duration>,
    /// To the first sign of user space on the console.
    #[serde(serialize_with = "milliseconds")]
    pub user_space: Option<Duration>,
    /// To the start of the command.
    #[serde(serialize_with = "milliseconds")]
    pub command: Option<Duration>,
    /// To the end.
    #[serde(serialize_with = "milliseconds")]
    pub end: Option<Duration>,
}

fn milliseconds<S: serde::Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64() * 1000.0).serialize(serializer)
}
