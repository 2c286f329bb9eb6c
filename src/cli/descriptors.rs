//! The limit of open files, which a machine may need more than usual of.

use bantam::config::Config;
use bantam::virtio::vsock;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Of a machine, beside one for each vCPU.
const OTHERS: u64 = 256;

/// The most descriptors of a process whose machine is built, if that is known: the files of shared folders are the guest's
/// choice.
pub fn most(config: &Config) -> Option<u64> {
    let connections = if config.vsock.is_some() { vsock::MAX_CONNECTIONS.into() } else { 0 };
    let most = u64::from(config.cpus) + 2 * OTHERS + connections;
    let now = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    (!config.has_folders() && most < now).then_some(most)
}

/// Raises the soft limit of open files to what the machine needs, as far as the hard one lets it. What is not allowed is
/// told when a descriptor cannot be had.
pub fn allow(config: &Config) {
    /// vCPUs and devices of a machine that needs less than any limit allows.
    const FEW: usize = 8;
    let devices = [config.all_disks().count(), config.nets.len()].iter().sum::<usize>();
    let is_small = usize::try_from(config.cpus).is_ok_and(|cpus| cpus + devices <= FEW);
    if is_small && config.vsock.is_none() && config.command.is_none() && !config.has_folders() {
        return;
    }
    /// Of a shared folder, each file that the guest knows is one. As many as the kernel lets a process have.
    const SHARES: u64 = 1 << 20;
    let limit = getrlimit(Resource::Nofile);
    let shares = !config.shares.is_empty() || config.root_folder().is_some();
    // What root may raise for others it may raise for itself.
    let all = Rlimit { current: Some(SHARES), maximum: Some(SHARES) };
    if shares && limit.maximum.is_some_and(|maximum| maximum < SHARES) && setrlimit(Resource::Nofile, all).is_ok() {
        return;
    }
    let wanted = if shares { SHARES } else { u64::from(config.cpus) + OTHERS };
    let allowed = limit.maximum.map_or(wanted, |maximum| wanted.min(maximum));
    if limit.current.is_some_and(|current| current < allowed) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(allowed), maximum: limit.maximum });
    }
}
