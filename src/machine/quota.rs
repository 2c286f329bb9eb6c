//! What keeps a machine within its CPU time.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::cgroup::Group;
use crate::config;
use crate::vcpu::Budget;

/// The period of the quota, in microseconds: the kernel's own default.
const PERIOD: u64 = 100_000;

/// A limit of CPU time.
pub(super) enum Quota {
    /// A control group, with the threads of vCPUs and devices.
    Group(Group),
    /// The vCPUs count for themselves.
    Budget(Arc<Budget>),
}

impl Quota {
    /// The limit, by a control group if this process, known as `pid`, may make one.
    pub fn new(quota: config::Quota, pid: u32) -> Self {
        let percent = quota.percent();
        let limit = match Group::with_cpu_quota(PERIOD / 100 * u64::from(percent), PERIOD, pid) {
            Ok(group) => Self::Group(group),
            Err(error) => {
                log::info!("no control group for the CPU quota: {}", chain(&error));
                Self::Budget(Arc::new(Budget::new(percent)))
            }
        };
        log::info!("CPU time is limited to {quota} by {limit}");
        limit
    }

    /// The folder that the control group is in, if there is one.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Group(group) => group.path().parent(),
            Self::Budget(_) => None,
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(group) => write!(f, "the control group {}", group.path().display()),
            Self::Budget(_) => f.write_str("pausing vCPUs, as no control group could be made"),
        }
    }
}
