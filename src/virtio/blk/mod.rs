//! The block device: a disk image or block device of the host as the guest's disk. Virtio 1.2, section 5.2.
//!
//! Requests are done straight between guest memory and the host's page cache, or the disk: on the device's thread one after the
//! other, or several at the same time by io_uring. Its virtqueues are served by turns: whatever one of them asks for, the others go on.

mod direct;
mod image;
mod in_flight;
mod ioctl;
mod uring;

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddress;

use self::image::Image;
pub use self::image::{Error, Opened};
use self::in_flight::InFlight;
use self::uring::{Kind, Request, Uring};
use super::change::{self, Change, Rates};
use super::device::{self, Io, VirtioDevice};
use super::iovec::Iovecs;
use super::layout::Layout;
use super::queue::{Chain, SERVE_FOR};
use super::rate_limiter::RateLimiter;
use crate::limit::Limit;
use crate::memory::{self, GuestRam};
use crate::metrics::{Counter, Metrics};

/// Bytes in a sector, the unit of all that the driver asks for.
const SECTOR: u64 = 512;
/// The most virtqueues that a disk has.
pub const QUEUES_MAX: u16 = 16;
/// Descriptors of each.
const QUEUE_SIZE: u16 = 256;
/// Descriptors in a request: as many as the queue has (2.7.5.3.1), two of which are the header and the status.
const DESCRIPTORS_MAX: usize = QUEUE_SIZE as usize;
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const SIZE_MAX: u32 = 1 << 20;
/// The most data that a driver which keeps to the two can ask for at once. No request takes longer than that much.
const DATA_MAX: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Sectors in one segment of a discard: 4 GiB.
const DISCARD_SECTORS_MAX: u32 = 8 << 20;
/// Sectors in one segment of a write-zeroes: 64 MiB, which does not take long where zeros have to be written.
const WRITE_ZEROES_SECTORS_MAX: u32 = 128 << 10;
/// Segments in one discard.
const DISCARD_SEG_MAX: u32 = 16;
/// Segments in one write-zeroes.
const WRITE_ZEROES_SEG_MAX: u32 = 1;
/// `struct virtio_blk_discard_write_zeroes`.
const SEGMENT_BYTES: usize = 16;
const CONFIG_SIZE: usize = 60;
/// log2 of the sectors in the blocks that file systems and page cache use: smaller writes read first.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// The most bytes in a serial number.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// What the rate limit's timer is watched as.
const LIMIT: u32 = 0;
/// What the ring is watched as.
const RING: u32 = 1;
/// Host errors of one device that are logged as such.
const LOGGED_ERRORS: u64 = 5;

/// What a disk is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Disk"))]
pub struct Spec {
    /// The host's file or block device.
    pub path: PathBuf,
    /// Whether the guest must not write it. Then other machines may read it too.
    #[serde(default)]
    pub readonly: bool,
    /// The serial number the guest sees, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// When what the guest wrote is safe.
    #[serde(default)]
    pub cache: Cache,
    /// Whether it is read and written past the host's page cache.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// How the host is asked for what the guest asks for.
    #[serde(default, skip_serializing_if = "Engine::is_sync")]
    pub engine: Engine,
    /// How many virtqueues it has, 1 to [`QUEUES_MAX`]: Linux uses no more than it has CPUs.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[cfg_attr(test, schemars(range(min = 1, max = QUEUES_MAX)))]
    pub queues: u16,
    /// How many microseconds its thread looks for requests before it waits to be notified: at most 10000.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[cfg_attr(test, schemars(range(max = 10_000)))]
    pub poll_us: u16,
    /// How many bytes may be read and written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw: Option<Limit>,
    /// How many requests may be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<Limit>,
    /// What becomes of a request that the host fails.
    #[serde(default)]
    pub errors: Errors,
}

impl Spec {
    /// A writable disk at `path`, safe when the guest flushes.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let (readonly, direct) = (false, false);
        let (id, poll_us, bw, iops) = (None, 0, None, None);
        let (cache, engine, errors) = (Cache::default(), Engine::default(), Errors::default());
        Self { path: path.into(), readonly, id, cache, direct, engine, queues: 1, poll_us, bw, iops, errors }
    }
}

fn one() -> u16 {
    1
}

fn is_one(queues: &u16) -> bool {
    *queues == 1
}

/// What becomes of a request that the host fails: for want of space, say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Errors {
    /// The guest is told.
    #[default]
    Report,
    /// The machine stands still, and it is done again when somebody has the machine go on.
    Stop,
}

/// When what the guest wrote survives a crash of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Cache {
    /// When the guest has flushed it.
    #[default]
    Writeback,
    /// When the host gets to it: for disks that can be made again.
    Unsafe,
}

/// How the host is asked for what the guest asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Engine {
    /// By system calls, one after the other.
    #[default]
    Sync,
    /// By io_uring(7), all at the same time.
    IoUring,
}

impl Engine {
    fn is_sync(&self) -> bool {
        *self == Self::Sync
    }
}

fn is_zero(number: &u16) -> bool {
    *number == 0
}

/// A block device.
pub struct Blk {
    path: PathBuf,
    /// Does several requests at the same time, if it is there. It goes before the image, which is locked as long as it has any.
    uring: Option<Uring>,
    image: Image,
    readonly: bool,
    cache: Cache,
    id: [u8; ID_BYTES],
    /// Whether that is the image's own.
    default_id: bool,
    config: [u8; CONFIG_SIZE],
    queue_sizes: Box<[u16]>,
    /// The queue that is the first to be served when all are: the one after the last that was.
    turn: usize,
    counts: Arc<Counts>,
    /// What was negotiated.
    features: u64,
    /// The request being done: how it is laid out, its buffers as the host takes them (there once the device was
    /// started), and how many bytes of data it wrote to guest memory.
    layout: Layout,
    iovecs: Option<Iovecs>,
    written: u64,
    current: Request,
    in_flight: InFlight,
    /// Requests that the host failed.
    host_errors: u64,
    limit: Option<RateLimiter>,
    poll: Duration,
    /// How many bytes of data the request had.
    moved: u64,
    /// Is told that the host failed a request, which is not given back then.
    on_error: Option<OnError>,
    /// Nothing is done until the machine has stood still.
    stopped: bool,
}

/// What has a machine stand still, for a reason.
type OnError = Box<dyn Fn(String) + Send>;

/// What the device has done.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counts {
    reads: Counter,
    read_bytes: Counter,
    writes: Counter,
    written_bytes: Counter,
    flushes: Counter,
    discards: Counter,
    write_zeroes: Counter,
    /// Requests that failed, or that were none.
    errors: Counter,
    /// How often requests waited for the rate limit.
    throttled: Counter,
}

/// Why a request was not done.
enum Failure {
    /// The device does not do such a thing.
    Unsupported,
    /// The driver must not ask that.
    Driver(&'static str),
    /// The host failed.
    Host(&'static str, io::Error),
    /// It can be, when nothing else is under way.
    Alone,
}

/// How far a request has come.
enum Progress {
    /// The ring has it.
    Begun,
    Done,
}

/// What becomes of a request.
enum Answer {
    /// It is done, and wrote so many bytes to guest memory, from the first writable one on.
    Used(u32),
    /// The ring has it.
    Begun,
    /// It is to be done later,
    Again,
    /// or when nothing else is under way.
    Alone,
}

impl Blk {
    /// Opens and locks the image.
    pub fn open(spec: &Spec) -> Result<Self, Error> {
        let queues = spec.queues;
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(Error::Queues { path: spec.path.clone(), queues });
        }
        let mut image = Image::open(&spec.path, spec.readonly)?;
        if spec.direct {
            image.pass_page_cache(&spec.path)?;
        }
        let id = match &spec.id {
            Some(text) if text.len() > ID_BYTES => {
                return Err(Error::Id { path: spec.path.clone(), id: text.clone() });
            }
            Some(text) => id_bytes(text),
            None => id_bytes(image.serial()),
        };
        let poll = Duration::from_micros(spec.poll_us.into());
        if poll > SERVE_FOR {
            return Err(Error::Poll { path: spec.path.clone(), poll_us: spec.poll_us });
        }
        let uring = match spec.engine {
            Engine::Sync => None,
            Engine::IoUring => Some(image.ring(&spec.path, QUEUE_SIZE * queues)?),
        };
        Ok(Self {
            path: spec.path.clone(),
            readonly: spec.readonly,
            cache: spec.cache,
            id,
            default_id: spec.id.is_none(),
            config: config(&image, queues),
            queue_sizes: vec![QUEUE_SIZE; queues.into()].into(),
            turn: 0,
            image,
            counts: Arc::default(),
            features: 0,
            layout: Layout::default(),
            iovecs: None,
            written: 0,
            current: Request { queue: 0, head: 0, status_at: GuestAddress(0), room: 0 },
            uring,
            in_flight: InFlight::new(queues),
            host_errors: 0,
            limit: RateLimiter::new(Rates { bytes: spec.bw, operations: spec.iops }).map_err(Error::Timer)?,
            poll,
            moved: 0,
            on_error: None,
            stopped: false,
        })
    }

    /// Has `on_error` be told when the host fails a request, in place of the driver: that one, and all after it, wait until the
    /// device is paused and [resumed](VirtioDevice::resume).
    pub fn stop_at_errors(mut self, on_error: impl Fn(String) + Send + 'static) -> Self {
        self.on_error = Some(Box::new(on_error));
        self
    }

    /// Goes on with another image, from the next request on.
    fn set_image(&mut self, opened: &Opened) -> Result<(), change::Error> {
        self.image.replace(opened, self.uring.as_mut())?;
        if self.default_id {
            self.id = id_bytes(self.image.serial());
        }
        self.config = config(&self.image, self.queues());
        self.path = opened.path().into();
        Ok(())
    }

    fn set_rates(&mut self, rates: Rates, mut io: Option<&mut Io>) -> io::Result<()> {
        RateLimiter::change(&mut self.limit, rates, LIMIT, io.as_deref_mut())?;
        // What waited for the last limit.
        io.iter().for_each(|io| io.kick_all());
        Ok(())
    }

    fn queues(&self) -> u16 {
        u16::try_from(self.queue_sizes.len()).expect("no more than QUEUES_MAX")
    }

    fn is_waiting(&self) -> bool {
        self.limit.as_ref().is_some_and(RateLimiter::is_waiting)
    }

    /// Does what is available in queue `index`, if it may.
    fn serve(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        let may = self.uring.is_some() || !self.stopped && !self.is_waiting();
        let Some((ram, queue)) = io.queue(index).filter(|_| may) else { return Ok(()) };
        let mut iovecs = self.iovecs.take().expect("start made it, and it is put back below");
        let result = if self.uring.is_some() {
            self.serve_ring(io, index, &mut iovecs)
        } else {
            let served = queue.serve_some(ram, |chain| match self.limited_request(ram, index, chain, &mut iovecs) {
                Answer::Used(written) => Some(written),
                Answer::Begun | Answer::Again | Answer::Alone => None,
            });
            served.map_err(device::Error::from)
        };
        self.iovecs = Some(iovecs);
        result
    }

    /// Does one request of queue `index` unless the rate limit, or the host, has it wait.
    fn limited_request(&mut self, ram: &GuestRam, index: usize, chain: Chain<'_>, iovecs: &mut Iovecs) -> Answer {
        if self.limit.as_mut().is_some_and(|limit| !limit.allows(Instant::now())) {
            self.counts.throttled.inc();
            return Answer::Again;
        }
        self.turn = (index + 1) % self.queue_sizes.len();
        self.moved = 0;
        let answer = self.request(ram, index, chain, iovecs);
        if let Some(limit) = self.limit.as_mut().filter(|_| !matches!(answer, Answer::Alone)) {
            limit.take(self.moved, Instant::now());
        }
        answer
    }

    /// Does one request, or begins it.
    fn request(&mut self, ram: &GuestRam, queue: usize, chain: Chain<'_>, iovecs: &mut Iovecs) -> Answer {
        let head = chain.head_index();
        let proper = self.layout.load(chain, DESCRIPTORS_MAX);
        let Some(status_at) = proper.then(|| self.layout.writable.take_last(ram)).flatten() else {
            // There is no place to say so.
            self.counts.errors.inc();
            return Answer::Used(0);
        };
        self.current = Request { queue, head, status_at, room: self.layout.writable.len() };
        self.written = 0;
        let result = match self.execute(ram, iovecs) {
            Ok(Progress::Begun) => return Answer::Begun,
            Err(Failure::Alone) => return Answer::Alone,
            Ok(Progress::Done) => Ok(()),
            Err(failure) => Err(failure),
        };
        self.answer(ram, self.current, self.written, result).map_or(Answer::Again, Answer::Used)
    }

    /// Tells the driver of a request that has `written` so many bytes of data; how many are written with the status. `None` if
    /// it is to be done again.
    fn answer(&mut self, ram: &GuestRam, request: Request, written: u64, result: Result<(), Failure>) -> Option<u32> {
        let status = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(failure) => self.fail(failure)?,
        };
        let status = u8::try_from(status).expect("a status is a byte");
        memory::write_obj(ram, status, request.status_at).expect("take_last found it in guest memory");
        // The status comes last: it counts only if all before it was written (2.7.8.2).
        let written = written + u64::from(written == request.room);
        Some(u32::try_from(written).expect("a chain has less than 4 GiB"))
    }

    /// What the driver is told, if it is.
    fn fail(&mut self, failure: Failure) -> Option<u32> {
        self.counts.errors.inc();
        match failure {
            Failure::Unsupported => return Some(VIRTIO_BLK_S_UNSUPP),
            Failure::Alone => return None,
            Failure::Driver(what) => log::debug!("virtio-blk: the driver asked for {what}"),
            Failure::Host(what, error) => {
                let why = format!("cannot {what} disk image {}: {error}", self.path.display());
                if let Some(on_error) = &self.on_error {
                    // It is asked for again like others, and fails again.
                    let lost =
                        if what == "flush" { " (writes may be lost: no later flush of it succeeds)" } else { "" };
                    // Others that were under way may fail as well.
                    if !std::mem::replace(&mut self.stopped, true) {
                        on_error(why + lost);
                    }
                    return None;
                }
                self.host_errors += 1;
                let level = if self.host_errors > LOGGED_ERRORS { log::Level::Debug } else { log::Level::Warn };
                log::log!(level, "virtio-blk: {why}");
            }
        }
        Some(VIRTIO_BLK_S_IOERR)
    }

    /// Does what the header of the request in `layout` says.
    fn execute(&mut self, ram: &GuestRam, iovecs: &mut Iovecs) -> Result<Progress, Failure> {
        let mut header = [0; 16];
        if !self.layout.readable.take(ram, &mut header) {
            return Err(Failure::Driver("nothing: there is no header"));
        }
        let [kind, sector] = [&header[..4], &header[8..]].map(little_endian);
        match u32::try_from(kind).expect("of 4 bytes") {
            VIRTIO_BLK_T_IN => return self.read(ram, sector, iovecs),
            VIRTIO_BLK_T_OUT => return self.write(ram, sector, iovecs),
            VIRTIO_BLK_T_FLUSH => return self.flush(),
            VIRTIO_BLK_T_DISCARD if self.negotiated(VIRTIO_BLK_F_DISCARD) => self.discard(ram)?,
            VIRTIO_BLK_T_WRITE_ZEROES if self.negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => self.write_zeroes(ram)?,
            VIRTIO_BLK_T_GET_ID => self.get_id(iovecs)?,
            _ => return Err(Failure::Unsupported),
        }
        Ok(Progress::Done)
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    fn read(&mut self, ram: &GuestRam, sector: u64, iovecs: &mut Iovecs) -> Result<Progress, Failure> {
        let len = self.layout.writable.len();
        if self.layout.readable.len() != 0 {
            return Err(Failure::Driver("a read into readable buffers"));
        }
        let offset = self.data_offset(sector, len)?;
        self.layout.writable.list(iovecs).map_err(|_| Failure::Driver("a read into what is not memory"))?;
        let progress = self.begin(ram, Kind::Read, (offset, len), iovecs)?;
        self.counts.reads.inc();
        self.moved = len;
        if matches!(progress, Progress::Begun) {
            return Ok(progress);
        }
        let result = self.image.read(iovecs, offset);
        self.written = len - iovecs.bytes() as u64;
        self.counts.read_bytes.add(self.written);
        result.map_err(|error| Failure::Host("read", error))?;
        Ok(progress)
    }

    fn write(&mut self, ram: &GuestRam, sector: u64, iovecs: &mut Iovecs) -> Result<Progress, Failure> {
        let len = self.layout.readable.len();
        if self.layout.writable.len() != 0 {
            return Err(Failure::Driver("a write from writable buffers"));
        }
        self.check_writable()?;
        let offset = self.data_offset(sector, len)?;
        self.layout.readable.list(iovecs).map_err(|_| Failure::Driver("a write from what is not memory"))?;
        let progress = self.begin(ram, Kind::Write, (offset, len), iovecs)?;
        self.counts.writes.inc();
        self.moved = len;
        if matches!(progress, Progress::Begun) {
            return Ok(progress);
        }
        let result = self.image.write(iovecs, offset);
        self.counts.written_bytes.add(len - iovecs.bytes() as u64);
        result.map_err(|error| Failure::Host("write", error))?;
        self.write_through()?;
        Ok(progress)
    }

    fn flush(&mut self) -> Result<Progress, Failure> {
        self.counts.flushes.inc();
        let progress = self.begin_flush();
        if matches!(progress, Progress::Done) {
            self.sync()?;
        }
        Ok(progress)
    }

    /// A driver that does not flush takes what is written for safe at once (5.2.6.2).
    fn write_through(&mut self) -> Result<(), Failure> {
        if self.negotiated(VIRTIO_BLK_F_FLUSH) { Ok(()) } else { self.sync() }
    }

    /// Whether a flush does anything.
    fn flushes(&self) -> bool {
        self.cache != Cache::Unsafe && !self.readonly
    }

    fn sync(&mut self) -> Result<(), Failure> {
        if !self.flushes() {
            return Ok(());
        }
        self.image.flush().map_err(|error| Failure::Host("flush", error))
    }

    fn discard(&mut self, ram: &GuestRam) -> Result<(), Failure> {
        self.check_alone()?;
        self.counts.discards.inc();
        let mut segments = [Segment::default(); DISCARD_SEG_MAX as usize];
        for segment in self.take_segments(ram, &mut segments, DISCARD_SECTORS_MAX, 0)? {
            let result = self.image.discard(segment.offset, segment.len);
            result.map_err(|error| Failure::Host("discard blocks of", error))?;
        }
        self.write_through()
    }

    fn write_zeroes(&mut self, ram: &GuestRam) -> Result<(), Failure> {
        self.check_alone()?;
        self.counts.write_zeroes.inc();
        let mut segments = [Segment::default(); WRITE_ZEROES_SEG_MAX as usize];
        let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        for segment in self.take_segments(ram, &mut segments, WRITE_ZEROES_SECTORS_MAX, flags)? {
            let result = self.image.write_zeroes(segment.offset, segment.len, segment.flags != 0);
            result.map_err(|error| Failure::Host("write zeros to", error))?;
        }
        self.write_through()
    }

    /// Reads the segments of a discard or write-zeroes request (5.2.6) into `room`, and checks all before any is done.
    /// Empty ones count, but are left out.
    fn take_segments<'a>(
        &mut self,
        ram: &GuestRam,
        room: &'a mut [Segment],
        sectors_max: u32,
        flags_known: u32,
    ) -> Result<&'a [Segment], Failure> {
        self.check_writable()?;
        // Before any is read: a driver could send millions.
        if self.layout.readable.len() > (SEGMENT_BYTES * room.len()) as u64 {
            return Err(Failure::Driver("too many segments"));
        }
        let mut count = 0;
        while self.layout.readable.len() > 0 {
            let mut raw = [0; SEGMENT_BYTES];
            if !self.layout.readable.take(ram, &mut raw) {
                return Err(Failure::Driver("half a segment"));
            }
            let [sector, sectors, flags] = [&raw[..8], &raw[8..12], &raw[12..]].map(little_endian);
            if flags & !u64::from(flags_known) != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > sectors_max.into() {
                return Err(Failure::Driver("too large a segment"));
            }
            let len = sectors * SECTOR;
            let offset = self.offset(sector, len)?;
            if len > 0 {
                room[count] = Segment { offset, len, flags };
                count += 1;
            }
        }
        Ok(&room[..count])
    }

    fn get_id(&mut self, iovecs: &mut Iovecs) -> Result<(), Failure> {
        self.layout.writable.list(iovecs).map_err(|_| Failure::Driver("its id in what is not memory"))?;
        iovecs.write(0, &self.id);
        self.written = iovecs.bytes().min(ID_BYTES) as u64;
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.readonly { Err(Failure::Driver("a write to a read-only disk")) } else { Ok(()) }
    }

    fn data_offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if len > DATA_MAX { Err(Failure::Driver("too much data")) } else { self.offset(sector, len) }
    }

    /// Where `len` bytes from `sector` on begin in the image, if they are sectors of the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Failure::Driver("a part of a sector"));
        }
        match sector.checked_add(len / SECTOR) {
            Some(end) if end <= self.image.sectors() => Ok(sector * SECTOR),
            _ => Err(Failure::Driver("sectors beyond the end")),
        }
    }
}

/// A range of the disk to be discarded or zeroed.
#[derive(Clone, Copy, Default)]
struct Segment {
    offset: u64,
    len: u64,
    flags: u64,
}

fn id_bytes(text: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let len = text.len().min(ID_BYTES);
    id[..len].copy_from_slice(&text.as_bytes()[..len]);
    id
}

/// The number that at most 8 bytes are.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// `struct virtio_blk_config` (5.2.4), up to the last field that a feature offered here needs.
fn config(image: &Image, queues: u16) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    // Only hints say what the host likes best: with another blk_size a partition table would mean something else.
    let unit = (image.unit().unwrap_or_default() / SECTOR).clamp(1 << PHYSICAL_BLOCK_EXP, 1 << 15);
    let unit = u16::try_from(unit).expect("it was clamped");
    let exp = u8::try_from(unit.trailing_zeros()).expect("at most 15");
    set(0, &image.sectors().to_le_bytes());
    set(8, &SIZE_MAX.to_le_bytes());
    set(12, &SEG_MAX.to_le_bytes());
    set(20, &512u32.to_le_bytes()); // blk_size
    set(24, &[exp]); // physical_block_exp
    set(26, &unit.to_le_bytes()); // min_io_size
    if queues > 1 {
        set(34, &queues.to_le_bytes()); // num_queues, which is there with VIRTIO_BLK_F_MQ only
    }
    set(36, &DISCARD_SECTORS_MAX.to_le_bytes());
    set(40, &DISCARD_SEG_MAX.to_le_bytes());
    set(44, &u32::from(unit).to_le_bytes()); // discard_sector_alignment
    set(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
    set(52, &WRITE_ZEROES_SEG_MAX.to_le_bytes());
    set(56, &[1]); // write_zeroes_may_unmap
    config
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn has_lost_data(&self) -> bool {
        self.image.flush_has_failed()
    }

    fn restore_lost_data(&mut self) {
        self.image.fail_flushes();
    }

    fn own_files(&self) -> Vec<RawFd> {
        [self.image.descriptor()].into_iter().chain(self.uring.iter().map(|uring| uring.as_fd().as_raw_fd())).collect()
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        let more: &[u32] =
            if self.readonly { &[VIRTIO_BLK_F_RO] } else { &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] };
        let queues: &[u32] = if self.queues() > 1 { &[VIRTIO_BLK_F_MQ] } else { &[] };
        always.iter().chain(more).chain(queues).fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.counts.clone()
    }

    fn start(&mut self, features: u64, io: &mut Io) -> Result<(), device::Error> {
        self.features = features;
        self.stopped = false;
        self.iovecs.get_or_insert_with(|| Iovecs::new(&io.ram));
        if let Some(uring) = &self.uring {
            let watched = io.watch(RING, uring, EventFlags::IN);
            watched
                .map_err(|source| device::Error::Host { what: "cannot watch the disk's io_uring".into(), source })?;
        }
        self.limit.as_ref().map_or(Ok(()), |limit| limit.watch(LIMIT, io))
    }

    fn change(&mut self, change: &Change, io: Option<&mut Io>) -> Result<(), change::Error> {
        match change {
            // Nothing is under way: the device is paused.
            Change::Disk(opened) => self.set_image(opened),
            Change::Rates(rates) => self.set_rates(*rates, io).map_err(change::Error::Timer),
            other => Err(other.unsupported()),
        }
    }

    fn host_ready(&mut self, token: u32, io: &mut Io) -> Result<(), device::Error> {
        if token == LIMIT {
            self.limit.iter_mut().for_each(RateLimiter::woken);
        }
        let (turn, count) = (self.turn, self.queue_sizes.len());
        for index in (turn..count).chain(0..turn) {
            self.serve(index, io)?;
        }
        self.call_again(io);
        Ok(())
    }

    fn pause(&mut self, io: &mut Io) -> Result<(), device::Error> {
        if self.uring.is_some() { self.come_to_rest(io) } else { Ok(()) }
    }

    fn resume(&mut self) {
        self.stopped = false;
    }

    fn stop(&mut self, io: &mut Io) {
        self.forget();
        self.limit.iter().for_each(|limit| limit.unwatch(io));
        if let Some(Err(error)) = self.uring.as_ref().map(|uring| io.unwatch(uring)) {
            log::error!("cannot stop watching a disk's io_uring: {error}");
        }
    }

    fn poll(&self) -> Duration {
        // What is under way is waited for.
        if self.in_flight.is_empty() { self.poll } else { Duration::ZERO }
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        self.serve(index, io)?;
        self.call_again(io);
        Ok(())
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
#[path = "tests.rs"]
#[expect(clippy::duplicate_mod, reason = "the same tests with the other engine")]
mod tests_with_a_ring;
