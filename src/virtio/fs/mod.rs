//! The file system device: virtio 1.2, section 5.11, with a folder of the host behind it.
//!
//! The guest's FUSE client sends requests; `server` answers them from the `tree` of files. File data moves between
//! the guest's buffers and the host's page cache without a copy in between.

mod detached;
mod server;
#[cfg(test)]
mod tests;
mod tree;
mod wire;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use self::server::Server;
use self::tree::Tree;
use super::device::{Error as DeviceError, Io, VirtioDevice};
use super::iovec::Iovecs;
use super::queue::Chain;
use crate::metrics::{Counter, Metrics};

/// The queue for urgent requests, and one for the others (5.11.2).
const QUEUE_SIZES: [u16; 2] = [64, 256];
/// Length in bytes of the tag (5.11.4).
const TAG: usize = 36;
/// A guest's page.
const PAGE: u32 = 4096;
/// The most data of one request, in bytes.
const MAX_WRITE: u32 = 1 << 20;

/// A shared folder.
///
/// ```
/// use bantam::virtio::fs::Spec;
/// let spec: Spec = serde_json::from_str(r#"{"path": "src", "tag": "src", "readonly": true}"#)?;
/// assert!(spec.readonly);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The folder.
    pub path: PathBuf,
    /// The name by which the guest mounts it: `mount -t virtiofs TAG FOLDER`. 1 to 36 bytes.
    pub tag: String,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
}

/// Why a folder is not shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tag that no guest could mount.
    #[error("cannot share a folder as `{0}`: a tag has 1 to {TAG} bytes, none of them NUL")]
    Tag(String),
    /// The folder cannot be opened.
    #[error("cannot share the folder {}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl Spec {
    /// Checks what can be checked without opening anything.
    pub fn validate(&self) -> Result<(), Error> {
        let fits = (1..=TAG).contains(&self.tag.len()) && !self.tag.contains('\0');
        if fits { Ok(()) } else { Err(Error::Tag(self.tag.clone())) }
    }

    /// Opens the folder and makes the device.
    pub fn open(&self) -> Result<Fs, Error> {
        self.open_as(false)
    }

    /// The same, of a folder that has nothing above it any more
    /// ([`Builder::detach_folders`](crate::machine::Builder::detach_folders)).
    pub fn open_detached(&self) -> Result<Fs, Error> {
        self.open_as(true)
    }

    fn open_as(&self, detached: bool) -> Result<Fs, Error> {
        self.validate()?;
        let error = |source| Error::Open { path: self.path.clone(), source };
        let tree = Tree::open(&self.path, self.readonly, detached).map_err(error)?;
        // struct virtio_fs_config: tag, num_request_queues.
        let mut config = [0; TAG + 4];
        config[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        config[TAG] = 1;
        Ok(Fs { config, server: Server::new(tree), buffers: None, counts: Arc::default() })
    }
}

/// What the device has done.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counts {
    requests: Counter,
    /// Requests that were none.
    errors: Counter,
}

/// A shared folder as a device.
pub struct Fs {
    config: [u8; TAG + 4],
    server: Server,
    /// The request at hand and its answer; there once the device was started.
    buffers: Option<(Iovecs, Iovecs)>,
    counts: Arc<Counts>,
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.counts.clone()
    }

    fn start(&mut self, _features: u64, io: &mut Io) -> Result<(), DeviceError> {
        self.buffers = Some((Iovecs::new(&io.ram), Iovecs::new(&io.ram)));
        Ok(())
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        let Self { server, counts, buffers: Some((request, reply)), .. } = self else { return Ok(()) };
        let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
        let size = queue.size();
        queue.serve(ram, |chain| {
            counts.requests.inc();
            if split(chain, size, request, reply).is_none() {
                counts.errors.inc();
                return 0;
            }
            server.serve(request, reply)
        })?;
        Ok(())
    }

    fn stop(&mut self, _io: &mut Io) {
        self.server.reset();
    }
}

/// The buffers of `chain`: those to read, and those to write, which come after. `None` if the driver broke a rule.
fn split(chain: Chain<'_>, queue_size: u16, request: &mut Iovecs, reply: &mut Iovecs) -> Option<()> {
    request.clear();
    reply.clear();
    let mut whole = false;
    for (count, descriptor) in chain.enumerate() {
        if count >= usize::from(queue_size) || (!descriptor.is_write_only() && !reply.is_empty()) {
            return None;
        }
        let list = if descriptor.is_write_only() { &mut *reply } else { &mut *request };
        list.push(descriptor.addr(), descriptor.len()).ok()?;
        whole = !descriptor.has_next();
    }
    whole.then_some(())
}
