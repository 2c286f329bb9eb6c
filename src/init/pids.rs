//! How many processes and threads the command may have.

use alloc::format;
use alloc::string::String;
use core::ffi::CStr;

use crate::file::{self, make_folder, path};
use crate::protocol;
use crate::sys;

/// The control group that the command is in.
const GROUP: &CStr = c"/sys/fs/cgroup/command";
/// What the kernel may start for itself.
const SPARE: u32 = 16;
/// The least that it takes.
const THREADS_MIN: u32 = 20;

/// Limits them, by a control group if the kernel has that for processes, else by the number of all threads; which it is, for
/// the host to be told.
pub fn limit(count: u32) -> Result<u32, String> {
    let group = || -> sys::Result<()> {
        file::write(c"/sys/fs/cgroup/cgroup.subtree_control", b"+pids")?;
        make_folder(GROUP, 0o755)?;
        file::write(c"/sys/fs/cgroup/command/pids.max", format!("{count}").as_bytes())
    };
    if group().is_ok() {
        return Ok(protocol::PIDS_BY_GROUP);
    }
    let _ = sys::rmdir(GROUP);
    let all = file::read(c"/proc/loadavg").ok().and_then(|text| threads(&text)).unwrap_or(THREADS_MIN);
    let max = all.saturating_add(SPARE).saturating_add(count).max(THREADS_MIN);
    file::write(&path("/proc/sys/kernel/threads-max"), format!("{max}").as_bytes())
        .map_err(|error| format!("cannot limit the number of processes: {error}"))?;
    Ok(protocol::PIDS_BY_THREADS)
}

/// Puts this process into the group, if there is one.
pub fn enter() -> sys::Result<()> {
    match file::write(c"/sys/fs/cgroup/command/cgroup.procs", b"0") {
        Err(sys::ENOENT) => Ok(()),
        entered => entered,
    }
}

/// How many threads there are: of "0.20 0.18 0.12 1/80 11206".
fn threads(loadavg: &[u8]) -> Option<u32> {
    let field = loadavg.split(|byte| *byte == b' ').nth(3)?;
    let total = field.split(|byte| *byte == b'/').nth(1)?;
    core::str::from_utf8(total).ok()?.parse().ok()
}
