//! The block device, on a disk in memory.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use bantam::virtio::blk::{Blk, Cache, Engine, Spec};
use bantam::virtio::change::{Change, Rates};
use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use bantam_fuzz::device::{Device, run};
use bantam_fuzz::input::{self, Result, Unstructured};
use bantam_fuzz::memory::Memory;
use rustix::fs::{MemfdFlags, memfd_create};

const SECTORS: u64 = 64;

struct Disk {
    file: File,
    readonly: bool,
    cache: Cache,
    limited: bool,
    engine: Engine,
    queues: u16,
}

/// A disk whose every sector begins with its number.
fn disk(content: &[u8]) -> File {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all_at(content, 0).expect("memory");
    file
}

fn content() -> Vec<u8> {
    let sector = |number: u64| {
        let mut sector = [0xd1; 512];
        sector[..8].copy_from_slice(&number.to_le_bytes());
        sector
    };
    (0..SECTORS).flat_map(sector).collect()
}

/// Whether the host has io_uring. Where it has not, disks are without.
fn has_rings() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let file = disk(&content());
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let opened = Blk::open(&Spec { engine: Engine::IoUring, ..Spec::new(path) });
        opened.inspect_err(|error| eprintln!("SKIPPED: {error}")).is_ok()
    })
}

impl Disk {
    fn limit(&mut self, mmio: &mut Mmio, limited: bool) {
        self.limited = limited;
        let operations = limited.then(|| "1/1h+3".parse().expect("a limit"));
        let changed = mmio.change(Change::Rates(Rates { operations, bytes: None }));
        changed.recv().expect("an answer").expect("a timer");
    }

    fn open(&self) -> Box<dyn VirtioDevice> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let (readonly, cache, engine, queues) = (self.readonly, self.cache, self.engine, self.queues);
        let spec = Spec { readonly, cache, engine, queues, id: Some("fuzzed".into()), ..Spec::new(path) };
        Box::new(Blk::open(&spec).expect("a disk"))
    }

    fn now(&self) -> Vec<u8> {
        let mut now = vec![0; SECTORS as usize * 512];
        self.file.read_exact_at(&mut now, 0).expect("the disk is as long as it was");
        assert_eq!(self.file.metadata().expect("its size").len(), now.len() as u64, "the disk's size");
        now
    }
}

impl Device for Disk {
    const STATUS_LAST: bool = true;

    fn new(u: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)> {
        let kind: u8 = u.arbitrary()?;
        let cache = if kind & 2 == 0 { Cache::Unsafe } else { Cache::Writeback };
        let engine = if kind & 0xc == 0xc && has_rings() { Engine::IoUring } else { Engine::Sync };
        let (file, readonly, queues) = (disk(&content()), kind & 1 == 1, 1 + u16::from(kind >> 4 & 3));
        let disk = Self { file, readonly, cache, limited: false, engine, queues };
        let device = disk.open();
        Ok((disk, device))
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        // The other one has locked its own.
        self.file = disk(&self.now());
        self.limited = false;
        Some(self.open())
    }

    fn request(&self, _: u16, u: &mut Unstructured) -> Result<Vec<u8>> {
        let kind = if u.ratio(7, 8)? { *u.choose(&[0, 1, 4, 8, 11, 13])? } else { u.arbitrary()? };
        let sector = if u.ratio(3, 4)? { u.int_in_range(0..=SECTORS)? } else { input::number(u)? };
        let mut request = [u32::to_le_bytes(kind), [0; 4]].concat();
        request.extend(sector.to_le_bytes());
        match kind {
            // Data is of whole sectors, if the driver is any good.
            1 if u.ratio(7, 8)? => request.extend(vec![u.arbitrary::<u8>()?; 512 * u.int_in_range(0..=8)?]),
            11 | 13 => {
                for _ in 0..u.int_in_range(1..=3)? {
                    let sectors = if u.ratio(3, 4)? { u.int_in_range(0..=SECTORS)? } else { input::number(u)? };
                    request.extend(u.int_in_range(0..=SECTORS)?.to_le_bytes());
                    request.extend((sectors as u32).to_le_bytes());
                    request.extend(u32::from(u.arbitrary::<bool>()?).to_le_bytes());
                }
            }
            _ => request.extend(input::bytes(u, 20)?),
        }
        if u.ratio(1, 16)? {
            request.truncate(u.choose_index(request.len())?);
        }
        Ok(request)
    }

    fn answer(&self, request: &[u8], u: &mut Unstructured) -> Result<Option<Vec<u32>>> {
        // Data, and the status.
        Ok(Some(match request.first() {
            Some(0) => vec![512 * u.int_in_range(0..=8)?, 1],
            Some(8) => vec![20, 1],
            _ => vec![1],
        }))
    }

    fn host(&mut self, mmio: &mut Mmio, u: &mut Unstructured) -> Result<()> {
        self.limit(mmio, u.arbitrary()?);
        Ok(())
    }

    fn uses_in_any_order(&self) -> bool {
        self.engine == Engine::IoUring
    }

    fn serves_all(&self, _: u16) -> bool {
        !self.limited
    }

    fn probe(&self) -> (u16, Vec<u8>, u32) {
        // A read of the first sector.
        (0, vec![0; 16], 513)
    }

    fn probed(&self, answer: &[u8]) {
        assert_eq!((answer.len(), answer[512]), (513, 0), "a sector and its status");
        assert_eq!(answer[..512], self.now()[..512]);
    }

    fn end(&mut self, mmio: &mut Mmio, _: &Memory) {
        self.limit(mmio, false);
        let now = self.now();
        assert!(!self.readonly || now == content(), "a disk that is only read has changed");
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run::<Disk>(data));
