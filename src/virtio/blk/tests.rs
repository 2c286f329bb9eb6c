use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use proptest::prelude::*;
use tempfile::NamedTempFile;

use vm_memory::Bytes;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::testing::{BUFFERS, Buffer, Driver, END};

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const TABLE: u64 = BUFFERS + 0x1000;
const DATA: u64 = BUFFERS + 0x1_0000;
const SECTORS: u64 = 2048;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// The engine of this module's disks.
fn engine() -> Engine {
    let has_ring = || {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let Err(error) = Blk::open(&Spec { engine: Engine::IoUring, ..Spec::new(file.path()) }) else { return true };
        eprintln!("skipped with io_uring: {error}: {:?}", std::error::Error::source(&error));
        false
    };
    if module_path!().ends_with("ring") && has_ring() { Engine::IoUring } else { Engine::Sync }
}

fn spec(file: &NamedTempFile) -> Spec {
    Spec { engine: engine(), ..Spec::new(file.path()) }
}

/// A driver with a disk whose every sector begins with its number.
struct Disk {
    file: NamedTempFile,
    driver: Driver,
    metrics: Arc<dyn Metrics>,
}

impl Disk {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Spec)) -> Self {
        // Not in memory, where there may be no direct I/O.
        let file = NamedTempFile::new_in("/var/tmp").unwrap();
        let data: Vec<u8> = (0..SECTORS).flat_map(sector).collect();
        file.as_file().write_all_at(&data, 0).unwrap();
        let mut spec = spec(&file);
        change(&mut spec);
        let mut driver = Driver::new(Box::new(Blk::open(&spec).unwrap()));
        driver.start();
        let metrics = driver.mmio.metrics();
        Self { file, driver, metrics }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.put(HEADER, &kind.to_le_bytes());
        self.driver.put(HEADER + 4, &[0xee; 4]);
        self.driver.put(HEADER + 8, &sector.to_le_bytes());
        self.driver.put(STATUS, &[0xaa]);
    }

    /// Makes a request of header, `data` and status; the status and how many bytes were used.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.header(kind, sector);
        let buffers = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.chain(&buffers)
    }

    fn chain(&mut self, buffers: &[Buffer]) -> (u8, u32) {
        let head = self.driver.rings[0].add(buffers);
        self.finish(head)
    }

    fn finish(&mut self, head: u16) -> (u8, u32) {
        let used = self.driver.finish(0, 1);
        assert_eq!((used.len(), used[0].0), (1, head));
        (self.driver.get(STATUS, 1)[0], used[0].1)
    }

    fn host(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.as_file().read_exact_at(&mut data, offset).unwrap();
        data
    }

    fn count(&self, what: &str) -> u64 {
        self.metrics.to_json()[what].as_u64().unwrap()
    }

    fn segments(&self, segments: &[(u64, u32, u32)]) -> Buffer {
        let mut data = Vec::new();
        for (sector, count, flags) in segments {
            data.extend(sector.to_le_bytes());
            data.extend(count.to_le_bytes());
            data.extend(flags.to_le_bytes());
        }
        self.driver.put(DATA, &data);
        (DATA, u32::try_from(data.len()).unwrap(), false)
    }
}

fn sector(number: u64) -> [u8; 512] {
    let mut data = [0x5a; 512];
    data[..8].copy_from_slice(&number.to_le_bytes());
    data
}

#[test]
fn a_disk_that_is_polled_misses_no_request() {
    for poll in [1, 30, 10_000] {
        let mut disk = Disk::with(|spec| spec.poll_us = poll);
        for number in 0..500 {
            disk.header(VIRTIO_BLK_T_IN, number);
            let before = disk.driver.rings[0].available;
            disk.driver.rings[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
            fence(Ordering::SeqCst);
            // A driver that notifies only if it has to.
            let event = disk.driver.rings[0].device() + 4 + 8 * u64::from(QUEUE_SIZE);
            if disk.driver.ram.load::<u16>(GuestAddress(event), Ordering::Relaxed).unwrap() == before {
                disk.driver.notify(0);
            }
            while disk.driver.rings[0].used().is_empty() {
                disk.driver.wait();
            }
            assert_eq!(disk.driver.get(DATA, 512), sector(number));
        }
    }
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(512).unwrap();
    let long = Spec { poll_us: 10_001, ..Spec::new(file.path()) };
    assert!(Blk::open(&long).err().unwrap().to_string().contains("poll-us=10001: it must be at most 10000"));
}

#[test]
fn the_driver_learns_what_the_disk_can_do() {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(3 << 40).unwrap();
    let mut spec = Spec::new(disk.path());
    let blk = Blk::open(&spec).unwrap();
    assert_eq!(little_endian(&blk.config()[..8]), 3 << 31);
    assert_eq!(little_endian(&blk.config()[12..16]), 254);
    assert_eq!(blk.features() >> 13 & 3, 3);
    drop(blk);
    spec.readonly = true;
    let blk = Blk::open(&spec).unwrap();
    assert_eq!((blk.features() >> 13 & 3, blk.features() >> 5 & 1), (0, 1));
}

#[test]
fn a_spec_is_its_options() {
    let spec: Spec = serde_json::from_str(r#"{"path": "a"}"#).unwrap();
    assert_eq!(spec, Spec::new("a"));
    let text = r#"{"path":"a","readonly":true,"id":"x","cache":"unsafe","direct":true,"engine":"io_uring","queues":4,"errors":"stop"}"#;
    let spec: Spec = serde_json::from_str(text).unwrap();
    assert_eq!((spec.readonly, spec.id.as_deref(), spec.cache), (true, Some("x"), Cache::Unsafe));
    assert_eq!((spec.direct, spec.engine, spec.queues, spec.errors), (true, Engine::IoUring, 4, Errors::Stop));
    assert_eq!(serde_json::to_string(&spec).unwrap(), text);
    assert!(serde_json::from_str::<Spec>(r#"{"path":"a","ro":true}"#).is_err());
    assert!(serde_json::from_str::<Spec>(r#"{"path":"a","cache":"none"}"#).is_err());
}

#[test]
fn sectors_are_read_and_written_in_place() {
    let mut disk = Disk::new();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 5, &[(DATA, 1024, true)]), (OK, 1025));
    assert_eq!(disk.driver.get(DATA, 1024), [sector(5), sector(6)].concat());
    disk.driver.put(DATA, &[1; 512]);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, SECTORS - 1, &[(DATA, 512, false)]), (OK, 1));
    assert_eq!(disk.host((SECTORS - 2) * 512, 1024), [sector(SECTORS - 2), [1; 512]].concat());
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(
        disk.metrics.to_json(),
        serde_json::json!({
            "reads": 1, "read-bytes": 1024, "writes": 1, "written-bytes": 512,
            "flushes": 1, "discards": 0, "write-zeroes": 0, "errors": 0, "throttled": 0, "interrupts": 3
        })
    );
}

#[test]
fn a_queue_full_of_requests_is_done_once_each() {
    let mut disk = Disk::new();
    disk.header(VIRTIO_BLK_T_IN, 0);
    for round in 0..3 {
        for i in 0..85 {
            disk.driver.rings[0].add(&[(HEADER, 16, false), (DATA + 512 * i, 512, true), (STATUS, 1, true)]);
        }
        let used = disk.driver.finish(0, 85);
        assert_eq!(used.len(), 85);
        assert!(used.iter().all(|(_, len)| *len == 513));
        assert_eq!(disk.count("reads"), 85 * (round + 1));
    }
}

#[test]
fn without_event_idx_it_works_too() {
    let mut disk = Disk::new();
    disk.driver.start_with(1 << 32);
    for i in 0..3 {
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, i, &[(DATA, 512, true)]), (OK, 513));
        assert_eq!(disk.driver.get(DATA, 512), sector(i));
    }
    // A driver that did not hear of it cannot ask for it.
    let segments = disk.segments(&[(0, 8, 0)]);
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[segments]), (UNSUPP, 1));
}

#[test]
fn indirect_descriptors_reach_the_longest_request() {
    let mut disk = Disk::new();
    disk.header(VIRTIO_BLK_T_IN, 100);
    let mut buffers = vec![(HEADER, 16, false)];
    // Backwards in memory, so that no two are one.
    buffers.extend((0..254).rev().map(|i| (DATA + 512 * i, 512, true)));
    buffers.push((STATUS, 1, true));
    let head = disk.driver.rings[0].add_indirect(TABLE, &buffers);
    assert_eq!(disk.finish(head), (OK, 254 * 512 + 1));
    for i in 0..254 {
        assert_eq!(disk.driver.get(DATA + 512 * i, 512), sector(100 + 253 - i));
    }
    // One more than the queue has is none.
    buffers.insert(1, (DATA, 512, true));
    let head = disk.driver.rings[0].add_indirect(TABLE, &buffers);
    disk.header(VIRTIO_BLK_T_IN, 100);
    assert_eq!(disk.finish(head), (0xaa, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Header, data and status are told by the order of their bytes, wherever the driver cuts them (2.7.4.1).
    #[test]
    fn framing_does_not_matter(cuts in proptest::collection::btree_set(1u64..1552, 0..20), zero in any::<bool>()) {
        let mut disk = Disk::new();
        // 16 readable bytes, then 1537 writable ones, across the meeting of two regions of guest memory.
        let start = END / 2 - 800;
        let read_end = start + 16;
        let mut edges: Vec<u64> = [0, 16, 1553].into_iter().chain(cuts).collect();
        edges.sort_unstable();
        edges.dedup();
        let mut buffers: Vec<Buffer> = edges
            .windows(2)
            .map(|edge| (start + edge[0], u32::try_from(edge[1] - edge[0]).unwrap(), edge[0] >= 16))
            .collect();
        if zero {
            buffers.push((0, 0, true));
        }
        disk.driver.put(start, &0u32.to_le_bytes());
        disk.driver.put(start + 8, &7u64.to_le_bytes());
        let head = disk.driver.rings[0].add(&buffers);
        prop_assert_eq!(disk.driver.finish(0, 1), [(head, 1537)]);
        prop_assert_eq!(disk.driver.get(read_end, 1536), [sector(7), sector(8), sector(9)].concat());
        prop_assert_eq!(disk.driver.get(read_end + 1536, 1), [OK]);
    }
}

#[test]
fn past_the_page_cache_every_request_is_done() {
    let file = NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().set_len(512).unwrap();
    match Blk::open(&Spec { direct: true, ..Spec::new(file.path()) }).map(drop) {
        Err(error @ Error::NoDirect { .. }) => return eprintln!("skipped: {error}"),
        result => result.unwrap(),
    }
    let mut disk = Disk::with(|spec| spec.direct = true);
    // Aligned for any host, for some, and for none.
    for (first, at) in [(64u64, DATA), (129, DATA + 512), (200, DATA + 3), (321, DATA + 5000)] {
        disk.driver.put(at, &[first.to_le_bytes()[0]; 4096]);
        assert_eq!(disk.request(VIRTIO_BLK_T_OUT, first, &[(at, 4096, false)]), (OK, 1));
        assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        disk.driver.put(at, &[0; 4096]);
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, first - 1, &[(at, 512, true), (at + 512, 4608, true)]), (OK, 5121));
        let expected = [&sector(first - 1)[..], &[first.to_le_bytes()[0]; 4096], &sector(first + 8)].concat();
        assert_eq!(disk.driver.get(at, 5120), expected, "{first}");
        assert_eq!(disk.host((first - 1) * 512, 5120), expected, "{first}");
    }
    // In pieces of which only some are aligned, over data that the page cache still has.
    disk.driver.put(DATA, &[7; 8192]);
    let pieces = [(DATA, 4096, false), (DATA + 4100, 12, false), (DATA + 4112, 500, false), (DATA, 3584, false)];
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 200, &pieces), (OK, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 200, &[(DATA + 0x4000, 8192, true)]), (OK, 8193));
    assert_eq!(disk.driver.get(DATA + 0x4000, 8192), [7; 8192]);
    let segments = disk.segments(&[(1000, 8, 1)]);
    assert_eq!(disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[segments]), (OK, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1000, &[(DATA, 4096, true)]), (OK, 4097));
    assert_eq!(disk.driver.get(DATA, 4096), [0; 4096]);
    // A file that ends early.
    disk.file.as_file().set_len(100 * 512 + 100).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 96, &[(DATA, 4096, true)]), (IOERR, 2148));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 200, &[(DATA, 4096, true)]), (IOERR, 0));
}

#[test]
fn the_id_is_given_or_the_files_own() {
    let mut disk = Disk::with(|spec| spec.id = Some("root-of-all".into()));
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(disk.driver.get(DATA, 21), b"root-of-all\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 4, true)]), (OK, 5));
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 4000, true)]), (OK, 20));
    let mut disk = Disk::new();
    disk.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]);
    let inode = format!("-{:x}", disk.file.as_file().metadata().unwrap().ino());
    let id = String::from_utf8(disk.driver.get(DATA, 20)).unwrap();
    assert!(id.trim_end_matches('\0').ends_with(&inode), "{id}");
    let spec = Spec { id: Some("x".repeat(21)), readonly: true, ..Spec::new(disk.file.path()) };
    drop(disk.driver);
    assert!(matches!(Blk::open(&spec), Err(Error::Id { .. })));
}

#[test]
fn discarded_blocks_go_back_to_the_host() {
    let mut disk = Disk::new();
    disk.file.as_file().sync_all().unwrap();
    let before = disk.file.as_file().metadata().unwrap().blocks();
    let segments = disk.segments(&[(0, 512, 0), (1024, 1024, 0), (8, 0, 0)]);
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[segments]), (OK, 1));
    let after = disk.file.as_file().metadata().unwrap();
    assert_eq!(before - after.blocks(), 1536);
    assert_eq!(after.len(), SECTORS * 512);
    assert_eq!(disk.host(512 * 512, 512), sector(512));
    assert_eq!(disk.count("discards"), 1);
}

#[test]
fn zeroes_are_written_with_and_without_their_blocks() {
    let mut disk = Disk::new();
    for (flags, first) in [(0, 64), (1, 1024)] {
        let segments = disk.segments(&[(first, 512, flags)]);
        assert_eq!(disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[segments]), (OK, 1));
        assert_eq!(disk.host(first * 512, 512 * 512), vec![0; 512 * 512]);
        assert_eq!(disk.host((first + 512) * 512, 512), sector(first + 512));
    }
    assert_eq!(disk.count("write-zeroes"), 2);
}

#[test]
fn bad_segments_change_nothing() {
    let mut disk = Disk::new();
    let before = disk.host(0, 512 * 64);
    for (kind, segments, status) in [
        (VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (8, 8, 1)][..], UNSUPP),
        (VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (SECTORS, 1, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (u64::MAX, 1, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (0, u32::MAX, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, &[(0, 8, 0); 17], IOERR),
        // Not even of those that do nothing.
        (VIRTIO_BLK_T_DISCARD, &[(0, 0, 0); 17], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)], UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0), (8, 8, 0)], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[(SECTORS - 1, 2, 0)], IOERR),
    ] {
        let buffer = disk.segments(segments);
        assert_eq!(disk.request(kind, 0, &[buffer]), (status, 1), "{segments:?}");
    }
    // Half a segment.
    let (addr, ..) = disk.segments(&[(0, 8, 0), (8, 8, 0)]);
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[(addr, 24, false)]), (IOERR, 1));
    assert_eq!(disk.host(0, 512 * 64), before);
    assert_eq!(disk.count("errors"), 10);
}

#[test]
fn a_readonly_disk_is_not_written() {
    let mut disk = Disk::with(|spec| spec.readonly = true);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    let segments = disk.segments(&[(0, 8, 0)]);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(disk.request(kind, 0, &[segments]), (UNSUPP, 1));
    }
    assert_eq!(disk.host(0, 512), sector(0));
}

#[test]
fn nothing_is_called_safe_that_is_not_on_the_disk() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let all = u64::MAX;
    let flush = 1 << VIRTIO_BLK_F_FLUSH;
    // What a write and a flush say on a disk that cannot keep anything: a driver without FLUSH relies on the write.
    for (cache, features, expected) in [
        (Cache::Writeback, all, [OK, IOERR]),
        (Cache::Writeback, !flush, [IOERR, IOERR]),
        (Cache::Unsafe, all, [OK, OK]),
        (Cache::Unsafe, !flush, [OK, OK]),
    ] {
        let mut blk = Blk::open(&Spec { cache, ..spec(&file) }).unwrap();
        blk.image.fail_flushes();
        let metrics = blk.metrics();
        let mut driver = Driver::new(Box::new(blk));
        let offered = driver.offered();
        driver.start_with(offered & features);
        let mut disk = Disk { file: NamedTempFile::new().unwrap(), driver, metrics };
        let write = disk.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]);
        let flush = disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!([write.0, flush.0], expected, "{cache:?} {features:#x}");
    }
}

#[test]
fn a_saved_machine_remembers_that_a_flush_failed() {
    use crate::bus::BusDevice as _;

    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let driver = || Driver::new(Box::new(Blk::open(&Spec { readonly: true, ..Spec::new(file.path()) }).unwrap()));
    let mut healthy = driver();
    let state = healthy.mmio.save();
    assert!(state.get("lost-data").is_none(), "{state}");
    let mut blk = Blk::open(&Spec { readonly: true, ..Spec::new(file.path()) }).unwrap();
    blk.image.fail_flushes();
    let state = Driver::new(Box::new(blk)).mmio.save();
    assert_eq!(state["lost-data"], true);
    healthy.mmio.restore(&state).unwrap();
    assert_eq!(healthy.mmio.save()["lost-data"], true);
}

#[test]
fn a_file_that_shrinks_fails_reads_beyond_its_end() {
    let mut disk = Disk::new();
    disk.file.as_file().set_len(10 * 512 + 100).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 9, &[(DATA, 512, true)]), (OK, 513));
    // What was read counts as written to the guest, the status after the gap does not.
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 9, &[(DATA, 1024, true)]), (IOERR, 612));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 20, &[(DATA, 512, true)]), (IOERR, 0));
    assert_eq!(disk.count("errors"), 2);
}

#[test]
fn sectors_beyond_the_end_are_refused() {
    let mut disk = Disk::new();
    for (first, count) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX / 512, 1), (1 << 55, 1)] {
        let data = (DATA, 512 * count, true);
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, first, &[data]), (IOERR, 0), "{first}");
        let data = (DATA, 512 * count, false);
        assert_eq!(disk.request(VIRTIO_BLK_T_OUT, first, &[data]), (IOERR, 1), "{first}");
    }
    assert_eq!(disk.file.as_file().metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn requests_that_are_none_fail_and_the_next_works() {
    let mut disk = Disk::new();
    let (header, status) = ((HEADER, 16, false), (STATUS, 1, true));
    for (kind, buffers, expected) in [
        // No status byte.
        (VIRTIO_BLK_T_IN, &[header][..], (0xaa, 0)),
        (VIRTIO_BLK_T_OUT, &[header, (DATA, 512, false)], (0xaa, 0)),
        (VIRTIO_BLK_T_FLUSH, &[header, (STATUS, 0, true)], (0xaa, 0)),
        (VIRTIO_BLK_T_FLUSH, &[header, (END, 1, true)], (0xaa, 0)),
        (VIRTIO_BLK_T_FLUSH, &[header, (u64::MAX, 2, true)], (0xaa, 0)),
        // No header.
        (VIRTIO_BLK_T_FLUSH, &[status], (IOERR, 1)),
        (VIRTIO_BLK_T_FLUSH, &[(HEADER, 15, false), status], (IOERR, 1)),
        (VIRTIO_BLK_T_FLUSH, &[(END - 8, 16, false), status], (IOERR, 1)),
        (VIRTIO_BLK_T_FLUSH, &[(HEADER, 0, false), status], (IOERR, 1)),
        // Readable and writable confused.
        (VIRTIO_BLK_T_FLUSH, &[status, header], (0xaa, 0)),
        (VIRTIO_BLK_T_IN, &[header, (DATA, 512, false), status], (IOERR, 1)),
        (VIRTIO_BLK_T_OUT, &[header, (DATA, 512, true), status], (IOERR, 0)),
        // No sectors.
        (VIRTIO_BLK_T_IN, &[header, (DATA, 511, true), status], (IOERR, 0)),
        (VIRTIO_BLK_T_OUT, &[header, (DATA, 513, false), status], (IOERR, 1)),
        (VIRTIO_BLK_T_IN, &[header, status], (OK, 1)),
        // No memory.
        (VIRTIO_BLK_T_IN, &[header, (END, 512, true), status], (IOERR, 0)),
        (VIRTIO_BLK_T_OUT, &[header, (END - 256, 512, false), status], (IOERR, 1)),
        (VIRTIO_BLK_T_OUT, &[header, (u64::MAX - 255, 512, false), status], (IOERR, 1)),
        // Far too much.
        (VIRTIO_BLK_T_IN, &[header, (DATA, u32::MAX - 511, true), status], (IOERR, 0)),
        (VIRTIO_BLK_T_IN, &[header, (DATA, u32::MAX, true), (DATA, u32::MAX, true), status], (0xaa, 0)),
        // No such thing.
        (2, &[header, status], (UNSUPP, 1)),
        (u32::MAX, &[header, (DATA, 512, true), status], (UNSUPP, 0)),
    ] {
        disk.header(kind, 0);
        assert_eq!(disk.chain(buffers), expected, "{kind}: {buffers:?}");
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
    }
    assert_eq!(disk.host(0, 512), sector(0));
}

#[test]
fn chains_that_loop_or_lead_nowhere_are_none() {
    let mut disk = Disk::new();
    let (table, next, write, indirect) = (disk.driver.rings[0].descriptors(), 1, 2, 4);
    type Chain = [((u64, u32), u32, u16); 3];
    let chains: [Chain; 6] = [
        // To itself, to the first, beyond the table.
        [((HEADER, 16), next, 1), ((STATUS, 1), next | write, 1), ((0, 0), 0, 0)],
        [((HEADER, 16), next, 1), ((STATUS, 1), next | write, 0), ((0, 0), 0, 0)],
        [((HEADER, 16), next, 1), ((STATUS, 1), next | write, 256), ((0, 0), 0, 0)],
        // Tables that are not memory, of no length, within a table.
        [((END, 32), indirect, 0), ((0, 0), 0, 0), ((0, 0), 0, 0)],
        [((TABLE, 0), indirect, 0), ((0, 0), 0, 0), ((0, 0), 0, 0)],
        [((table, 48), indirect, 0), ((0, 0), 0, 0), ((0, 0), 0, 0)],
    ];
    for (i, chain) in chains.iter().enumerate() {
        disk.header(VIRTIO_BLK_T_FLUSH, 0);
        for (index, (buffer, flags, next)) in (0..).zip(chain) {
            disk.driver.rings[0].write_descriptor(table, index, *buffer, *flags, *next);
        }
        disk.driver.rings[0].publish(0);
        assert_eq!(disk.finish(0), (0xaa, 0), "chain {i}");
    }
    assert_eq!(disk.count("errors"), 6);
    assert_eq!(disk.count("flushes"), 0);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn an_available_index_that_jumps_needs_a_reset() {
    let mut disk = Disk::new();
    for jump in [257, 0x8000, 0xffff] {
        let ring = &disk.driver.rings[0];
        ring.set_available(ring.available.wrapping_add(jump));
        disk.driver.notify(0);
        disk.driver.wait_for_needs_reset();
        disk.driver.start();
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
    }
}

#[test]
fn a_request_may_lie_over_its_own_ring() {
    let mut disk = Disk::new();
    let used = disk.driver.rings[0].device();
    // The disk is read over the used ring that is about to be written: whatever comes of it, the device lives.
    disk.header(VIRTIO_BLK_T_IN, 0);
    disk.driver.rings[0].add(&[(HEADER, 16, false), (used, 0x1000, true), (STATUS, 1, true)]);
    disk.driver.notify(0);
    disk.driver.start();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_limit_has_requests_wait_and_none_is_lost() {
    // The first one owes more than the bucket holds.
    let mut disk = Disk::with(|spec| spec.bw = Some("900K".parse().unwrap()));
    let all = [(DATA, 1 << 20, true)];
    let start = Instant::now();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &all), (OK, (1 << 20) + 1));
    assert_eq!(disk.count("throttled"), 0);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!((disk.count("throttled"), disk.driver.get(DATA, 512)), (1, sector(1).to_vec()));
    assert!(start.elapsed() >= std::time::Duration::from_millis(100));

    let mut disk = Disk::with(|spec| spec.iops = Some("20".parse().unwrap()));
    let start = Instant::now();
    for number in 0..24 {
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, number, &[(DATA, 512, true)]), (OK, 513));
    }
    assert!(disk.count("throttled") > 0 && disk.count("reads") == 24);
    assert!(start.elapsed() >= std::time::Duration::from_millis(150));
    // A reset in the middle of waiting.
    disk.driver.rings[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    disk.driver.notify(0);
    disk.driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    disk.driver.start();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn another_image_takes_the_place_of_the_first() {
    let mut disk = Disk::new();
    let other = NamedTempFile::new().unwrap();
    other.as_file().write_all_at(&[9; 4096], 0).unwrap();
    let capacity = |disk: &mut Disk| [0, 4].map(|at| disk.driver.read(0x100 + at));
    let change = |disk: &mut Disk, path: &Path| {
        let opened = Opened::open(path, false)?;
        disk.driver.mmio.change(Change::Disk(opened)).recv().unwrap()
    };
    change(&mut disk, other.path()).unwrap();
    assert_eq!(disk.driver.wait(), 2, "a configuration change interrupt");
    assert_eq!(capacity(&mut disk), [8, 0]);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 7, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(disk.driver.get(DATA, 512), [9; 512]);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 8, &[(DATA, 512, true)]).0, IOERR);

    // The first one is free, this one is not; and what cannot be used changes nothing.
    drop(Image::open(disk.file.path(), false).unwrap());
    assert!(Image::open(other.path(), false).is_err());
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path(), &folder.path().join("missing"), Path::new("/dev/null")] {
        let error = change(&mut disk, path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    assert_eq!(capacity(&mut disk), [8, 0]);

    // The same one, which has grown, by another name, also for a driver that starts over.
    other.as_file().set_len(8192).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(other.path(), &link).unwrap();
    disk.driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    change(&mut disk, &link).unwrap();
    disk.driver.start();
    assert_eq!(capacity(&mut disk), [16, 0]);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 15, &[(DATA, 512, false)]), (OK, 1));
    assert!(Image::open(other.path(), false).is_err(), "it is still locked");
}

#[test]
fn a_request_that_stopped_the_machine_is_done_when_it_goes_on() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    let (sender, stops) = std::sync::mpsc::channel();
    let blk = Blk::open(&spec(&file)).unwrap().stop_at_errors(move |why| sender.send(why).unwrap());
    let mut driver = Driver::new(Box::new(blk));
    driver.start();
    let metrics = driver.mmio.metrics();
    let mut disk = Disk { file, driver, metrics };
    disk.file.as_file().set_len(512).unwrap();
    disk.header(VIRTIO_BLK_T_IN, 7);
    let head = disk.driver.rings[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    disk.driver.notify(0);
    let stops = || stops.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    assert!(stops().starts_with("cannot read disk image "));
    for _ in 0..2 {
        // Nothing is done before that.
        disk.driver.notify(0);
        disk.driver.mmio.pause();
        assert_eq!((disk.driver.rings[0].used(), disk.driver.get(STATUS, 1)), (vec![], vec![0xaa]));
        disk.driver.mmio.resume();
        stops();
    }
    assert_eq!(disk.count("errors"), 3);
    disk.driver.mmio.pause();
    disk.file.as_file().set_len(SECTORS * 512).unwrap();
    disk.file.as_file().write_all_at(&sector(7), 7 * 512).unwrap();
    disk.driver.mmio.resume();
    assert_eq!(disk.finish(head), (OK, 513));
    assert_eq!(disk.driver.get(DATA, 512), sector(7));
    // What the driver does wrong is told to it.
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, SECTORS, &[(DATA, 512, true)]), (IOERR, 0));
    // One that starts over is as new.
    disk.file.as_file().set_len(512).unwrap();
    disk.header(VIRTIO_BLK_T_IN, 7);
    disk.driver.rings[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    disk.driver.notify(0);
    stops();
    disk.file.as_file().set_len(SECTORS * 512).unwrap();
    disk.driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    disk.driver.start();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_limit_that_is_taken_away_lets_what_waits_go_on() {
    // Otherwise it would take a minute.
    let mut disk = Disk::with(|spec| spec.iops = Some("1".parse().unwrap()));
    disk.header(VIRTIO_BLK_T_IN, 0);
    for _ in 0..60 {
        disk.driver.rings[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    }
    let mut used = disk.driver.finish(0, 1).len();
    let rates = Rates { bytes: Some("64M".parse().unwrap()), operations: None };
    disk.driver.mmio.change(Change::Rates(rates)).recv().unwrap().unwrap();
    while used < 60 {
        disk.driver.wait();
        used += disk.driver.rings[0].used().len();
    }
    assert!(disk.count("throttled") > 0);
    disk.driver.mmio.change(Change::Rates(Rates::default())).recv().unwrap().unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
}

/// Where request `number` has its header and its status, and its data.
fn places(number: usize) -> [u64; 3] {
    let at = u64::try_from(number).unwrap();
    [HEADER + 0x100 * at, HEADER + 0x100 * at + 0x80, DATA + 0x1000 * at]
}

impl Disk {
    /// Makes request `number` available in a queue: one sector is read or written.
    fn add(&mut self, queue: usize, number: usize, kind: u32, sector: u64) -> u16 {
        let [header, status, data] = places(number);
        self.driver.put(header, &[kind.to_le_bytes(), [0; 4]].concat());
        self.driver.put(header + 8, &sector.to_le_bytes());
        self.driver.put(status, &[0xaa]);
        let data = (data, 512, kind == VIRTIO_BLK_T_IN);
        self.driver.rings[queue].add(&[(header, 16, false), data, (status, 1, true)])
    }

    /// The status of request `number`, and the number that its sector begins with.
    fn answer(&self, number: usize) -> (u8, u64) {
        let [_, status, data] = places(number);
        (self.driver.get(status, 1)[0], little_endian(&self.driver.get(data, 8)))
    }
}

#[test]
fn every_queue_does_what_comes_by_it() {
    let mut disk = Disk::with(|spec| spec.queues = 4);
    let num_queues = |disk: &mut Disk| disk.driver.read(0x100 + 32) >> 16;
    assert_eq!((disk.driver.rings.len(), num_queues(&mut disk)), (4, 4));
    assert_ne!(disk.driver.offered() & 1 << VIRTIO_BLK_F_MQ, 0);
    for round in 0..3 {
        let heads: Vec<_> = (0..8).map(|number| disk.add(number % 4, number, VIRTIO_BLK_T_IN, number as u64)).collect();
        for queue in 0..4 {
            let mut used = disk.driver.finish(queue, 2);
            used.sort_unstable();
            assert_eq!(used, [(heads[queue], 513), (heads[queue + 4], 513)], "queue {queue}");
        }
        for number in 0..8 {
            assert_eq!(disk.answer(number), (OK, number as u64));
        }
        assert_eq!(disk.count("reads"), 8 * (round + 1));
    }
    // What one wrote another flushes.
    disk.add(3, 0, VIRTIO_BLK_T_OUT, 9);
    disk.driver.finish(3, 1);
    disk.add(1, 1, VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(disk.driver.finish(1, 1).len(), 1);
    assert_eq!(disk.count("flushes"), 1);
    // Another image is that of all of them, and as many.
    let other = NamedTempFile::new().unwrap();
    other.as_file().write_all_at(&[7; 4096], 0).unwrap();
    let opened = Opened::open(other.path(), false).unwrap();
    disk.driver.mmio.change(Change::Disk(opened)).recv().unwrap().unwrap();
    assert_eq!(num_queues(&mut disk), 4);
    for queue in 0..4 {
        disk.add(queue, queue, VIRTIO_BLK_T_IN, 7);
        disk.driver.finish(queue, 1);
        assert_eq!(disk.answer(queue), (OK, 0x0707_0707_0707_0707));
    }
    // A driver of old knows one queue only.
    let offered = disk.driver.offered();
    disk.driver.start_with(offered & !(1 << VIRTIO_BLK_F_MQ));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 7, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_disk_has_one_queue_unless_it_is_said() {
    let mut disk = Disk::new();
    assert_eq!((disk.driver.rings.len(), disk.driver.offered() & 1 << VIRTIO_BLK_F_MQ), (1, 0));
    assert_eq!(disk.driver.read(0x100 + 32), 0);
    for queues in [0, QUEUES_MAX + 1, u16::MAX] {
        let error = Blk::open(&Spec { queues, ..Spec::new("any") }).err().unwrap().to_string();
        assert_eq!(error, format!("cannot give disk image any queues={queues}: it must be 1 to 16"));
    }
}

#[test]
fn a_queue_that_is_not_set_up_is_left_out() {
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS};

    let mut disk = Disk::with(|spec| (spec.queues, spec.iops) = (4, Some("1000".parse().unwrap())));
    let features = disk.driver.offered();
    disk.driver.negotiate(features);
    disk.driver.set_up_queues();
    for queue in [0, 1, 3] {
        disk.driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        disk.driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
    }
    disk.driver.write(VIRTIO_MMIO_STATUS, 0xf);
    for round in 0..3u64 {
        disk.add(0, 0, VIRTIO_BLK_T_IN, 1);
        disk.driver.notify(0);
        disk.add(2, 2, VIRTIO_BLK_T_IN, round);
        disk.driver.finish(2, 1);
        assert_eq!((disk.answer(2), disk.answer(0).0), ((OK, round), 0xaa));
        disk.driver.mmio.pause();
        let state = disk.driver.mmio.save();
        let position = round + 1;
        assert_eq!(state["positions"], serde_json::json!([null, null, [position, position], null]));
        disk.driver.mmio.resume();
    }
}

#[test]
fn a_pause_leaves_nothing_under_way_in_any_queue() {
    let mut disk = Disk::with(|spec| spec.queues = 3);
    for round in 1..20u64 {
        for number in 0..6 {
            disk.add(number % 3, number, VIRTIO_BLK_T_IN, round);
        }
        (0..3).for_each(|queue| disk.driver.notify(queue));
        disk.driver.mmio.pause();
        let state = disk.driver.mmio.save();
        let mut used = [0, 1, 2].map(|queue| disk.driver.rings[queue].used().len());
        for (queue, used) in used.iter().enumerate() {
            let position = 2 * (round - 1) + *used as u64;
            assert_eq!(state["positions"][queue], serde_json::json!([position, position]), "queue {queue}");
        }
        disk.driver.mmio.resume();
        for (queue, used) in used.iter_mut().enumerate() {
            *used += disk.driver.finish(queue, 2 - *used).len();
        }
        assert_eq!(used, [2; 3]);
        (0..6).for_each(|number| assert_eq!(disk.answer(number), (OK, round)));
    }
}

#[test]
fn a_busy_queue_leaves_others_their_turn() {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    /// Also when the test fails.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let mut disk = Disk::with(|spec| spec.queues = 2);
    let busy_head = disk.add(0, 0, VIRTIO_BLK_T_IN, 0);
    let kick = disk.driver.mmio.kicks().next().unwrap().1.try_clone().unwrap();
    let mut busy = disk.driver.rings.remove(0);
    let (is_over, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _end = End(&is_over);
        scope.spawn(|| {
            let (mut asked, mut used) = (1, 0);
            while !is_over.load(Ordering::Relaxed) {
                used += busy.used().len() as u64;
                done.store(used, Ordering::Relaxed);
                while asked < used + 200 {
                    busy.publish(busy_head);
                    asked += 1;
                }
                kick.write(1).unwrap();
            }
        });
        let mut round = 0;
        while round < 20 || done.load(Ordering::Relaxed) < 1000 {
            round += 1;
            disk.add(0, 1, VIRTIO_BLK_T_IN, round % SECTORS);
            disk.driver.notify(1);
            while disk.driver.rings[0].used().is_empty() {
                disk.driver.wait();
            }
            assert_eq!(disk.answer(1), (OK, round % SECTORS));
        }
    });
}

#[test]
fn queues_have_their_share_of_a_limit() {
    // After the first, one in a second: the other queue has its turn long before the 60th.
    let mut disk = Disk::with(|spec| (spec.queues, spec.iops) = (2, Some("1".parse().unwrap())));
    disk.add(1, 61, VIRTIO_BLK_T_IN, 5);
    for number in 0..60 {
        disk.driver.put(places(number)[2], &(1000 + number as u64).to_le_bytes());
        disk.add(0, number, VIRTIO_BLK_T_OUT, 5);
    }
    disk.driver.notify(0);
    while disk.driver.rings[1].used().is_empty() {
        disk.driver.wait();
    }
    let (status, last) = disk.answer(61);
    assert!(status == OK && last < 1059, "all of the first queue's came before: {last}");
    assert!(disk.count("throttled") > 0);
    disk.driver.mmio.change(Change::Rates(Rates::default())).recv().unwrap().unwrap();
    let mut left = 60;
    while left > 0 {
        left -= disk.driver.rings[0].used().len();
        if left > 0 {
            disk.driver.wait();
        }
    }
    assert_eq!((disk.count("writes"), disk.count("reads")), (60, 1));
}

#[test]
fn what_stopped_the_machine_is_done_by_its_own_queue() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    let (sender, stops) = std::sync::mpsc::channel();
    let blk =
        Blk::open(&Spec { queues: 3, ..spec(&file) }).unwrap().stop_at_errors(move |why| sender.send(why).unwrap());
    let mut driver = Driver::new(Box::new(blk));
    driver.start();
    let metrics = driver.mmio.metrics();
    let mut disk = Disk { file, driver, metrics };
    disk.file.as_file().set_len(512).unwrap();
    let heads: Vec<_> =
        (0..9).map(|number| disk.add(number % 3, number, VIRTIO_BLK_T_IN, 10 + number as u64)).collect();
    for _ in 0..3 {
        (0..3).for_each(|queue| disk.driver.notify(queue));
        stops.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        disk.driver.mmio.pause();
        assert_eq!(disk.driver.mmio.save()["positions"], serde_json::json!([[0, 0], [0, 0], [0, 0]]));
        disk.driver.mmio.resume();
    }
    disk.driver.mmio.pause();
    for number in 10..19u64 {
        disk.file.as_file().write_all_at(&sector(number), number * 512).unwrap();
    }
    disk.driver.mmio.resume();
    for queue in 0..3 {
        let mut used: Vec<_> = disk.driver.finish(queue, 3).into_iter().map(|(head, _)| head).collect();
        used.sort_unstable();
        assert_eq!(used, [heads[queue], heads[queue + 3], heads[queue + 6]]);
    }
    (0..9).for_each(|number| assert_eq!(disk.answer(number), (OK, 10 + number as u64)));
}
