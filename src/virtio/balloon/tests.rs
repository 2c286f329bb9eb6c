//! The balloon with a driver that does as it should, and one that does not.

use super::*;
use crate::bus::BusDevice;
use crate::virtio::testing::{BUFFERS, Driver, END};

const MEMORY: Size = Size::bytes(END);
/// Pages that nothing else is in.
const FREE: u64 = 0x10_0000;

fn spec() -> Spec {
    Spec { stats: Some(Duration::from_millis(1)), free_page_reporting: true, ..Default::default() }
}

/// A driver, and what is known of its balloon.
fn driver(spec: &Spec) -> (Driver, Arc<Shared>) {
    let balloon = Balloon::new(spec, MEMORY).unwrap();
    let shared = balloon.shared();
    (Driver::new(Box::new(balloon)), shared)
}

fn config(driver: &mut Driver, at: u64) -> u32 {
    let mut word = [0; 4];
    driver.mmio.read(0x100 + at, &mut word);
    u32::from_le_bytes(word)
}

/// Names the pages in one request to `queue`.
fn request(driver: &mut Driver, queue: usize, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.put(BUFFERS, &bytes);
    let head = driver.rings[queue].add(&[(BUFFERS, u32::try_from(bytes.len()).unwrap(), false)]);
    assert_eq!(driver.finish(queue, 1), [(head, 0)]);
}

fn page(address: u64) -> u32 {
    u32::try_from(address / PAGE).unwrap()
}

#[test]
fn pages_in_the_balloon_are_the_hosts_and_others_the_guests() {
    let (mut driver, shared) = driver(&Spec { size: Some(Size::mib(1)), ..Default::default() });
    driver.start();
    assert_eq!(config(&mut driver, 0), 256);
    driver.put(FREE, &[7; 5 * PAGE_BYTES]);
    let [first, second, third] = [FREE, FREE + PAGE, FREE + 3 * PAGE].map(page);
    // As Linux names them: the last first.
    request(&mut driver, 0, &[third, second, first]);
    for (at, byte) in [(0, 0), (1, 0), (2, 7), (3, 0), (4, 7)] {
        assert_eq!(driver.get(FREE + at * PAGE, PAGE_BYTES), [byte; PAGE_BYTES], "page {at}");
    }
    driver.mmio.write(0x104, &3u32.to_le_bytes());
    assert_eq!(config(&mut driver, 4), 3);
    request(&mut driver, 1, &[first, second]);
    let statistics = shared.statistics();
    assert_eq!((statistics.target, statistics.actual), (Size::mib(1), Size::bytes(3 * PAGE)));
    let counts = driver.mmio.metrics().to_json();
    assert_eq!((&counts["inflated"], &counts["deflated"], &counts["errors"]), (&3.into(), &2.into(), &0.into()));
    // The driver may write nothing else, and nothing of another size.
    driver.mmio.write(0x100, &9u32.to_le_bytes());
    driver.mmio.write(0x104, &[9]);
    assert_eq!((config(&mut driver, 0), config(&mut driver, 4)), (256, 3));
}

#[test]
fn pages_that_are_none_are_counted_and_leave_all_as_it_is() {
    let (mut driver, _) = driver(&spec());
    driver.start();
    driver.put(FREE, &[7; PAGE_BYTES]);
    request(&mut driver, 0, &[page(END), u32::MAX, u32::MAX - 1, 0x8000_0000]);
    // Half a page number, one from what is not memory, and more than any driver names at once.
    let large = u32::try_from(4 * REQUEST_PAGES + 4).unwrap();
    for buffer in [(BUFFERS, 3, false), (END - 4, 8, false), (BUFFERS, large, false), (u64::MAX - 7, 8, false)] {
        let head = driver.rings[0].add(&[buffer]);
        assert_eq!(driver.finish(0, 1), [(head, 0)]);
    }
    for buffer in [(END - PAGE, 0x2000, true), (u64::MAX - 5, u32::MAX, true), (FREE + 1, 0x1000, true)] {
        let head = driver.rings[3].add(&[buffer]);
        assert_eq!(driver.finish(3, 1), [(head, 0)]);
    }
    assert_eq!(driver.get(FREE, PAGE_BYTES), [7; PAGE_BYTES]);
    let counts = driver.mmio.metrics().to_json();
    assert_eq!((&counts["errors"], &counts["inflated"], &counts["reported-bytes"]), (&11.into(), &0.into(), &0.into()));
}

#[test]
fn reported_pages_are_given_back() {
    let (mut driver, _) = driver(&spec());
    driver.start();
    driver.put(FREE, &[7; 4 * PAGE_BYTES]);
    let head = driver.rings[3].add(&[(FREE, 0x1000, true), (FREE + 2 * PAGE, 0x2000, true)]);
    assert_eq!(driver.finish(3, 1), [(head, 0)]);
    for (at, byte) in [(0, 0), (1, 7), (2, 0), (3, 0)] {
        assert_eq!(driver.get(FREE + at * PAGE, 1), [byte], "page {at}");
    }
    assert_eq!(driver.mmio.metrics().to_json()["reported-bytes"], 0x3000);
}

#[test]
fn a_driver_without_statistics_has_no_gap_between_its_queues() {
    let (mut driver, _) = driver(&spec());
    let features = driver.offered();
    driver.start_with(features & !F_STATS_VQ);
    driver.put(FREE, &[7; PAGE_BYTES]);
    let head = driver.rings[2].add(&[(FREE, 0x1000, true)]);
    assert_eq!(driver.finish(2, 1), [(head, 0)]);
    assert_eq!(driver.get(FREE, 1), [0]);
}

#[test]
fn statistics_are_asked_for_over_and_over() {
    let (mut driver, shared) = driver(&spec());
    driver.start();
    for round in 1..4u64 {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1000 * round), (5, 2000), (15, 7), (99, 1)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        driver.put(BUFFERS, &bytes);
        let head = driver.rings[2].add(&[(BUFFERS, u32::try_from(bytes.len()).unwrap(), false)]);
        // The device keeps it until its timer runs out.
        assert_eq!(driver.finish(2, 1), [(head, 0)]);
        let guest = shared.statistics().guest.unwrap();
        assert_eq!((guest.free_memory, guest.total_memory), (Some(1000 * round), Some(2000)));
        assert_eq!((guest.direct_reclaim, guest.swap_in), (Some(7), None));
    }
}

#[test]
fn the_balloon_is_changed_whoever_has_it() {
    let (mut driver, shared) = driver(&Spec::default());
    let change = |driver: &mut Driver, change| driver.mmio.change(change).recv().unwrap();
    change(&mut driver, Change::Balloon(Size::bytes(2 * PAGE))).unwrap();
    assert_eq!(config(&mut driver, 0), 2);
    driver.start();
    let generation = driver.read(0xfc);
    change(&mut driver, Change::Balloon(Size::bytes(3 * PAGE))).unwrap();
    assert_eq!(driver.wait(), 2, "a configuration change interrupt");
    assert_eq!(config(&mut driver, 0), 3);
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(shared.statistics().target, Size::bytes(3 * PAGE));

    let refused = |driver: &mut Driver, asked| change(driver, asked).unwrap_err().to_string();
    let size = |bytes| Change::Balloon(Size::bytes(bytes));
    assert!(refused(&mut driver, size(END + PAGE)).contains("must not be larger"));
    assert!(refused(&mut driver, size(4097)).contains("not a multiple of 4096"));
    assert!(refused(&mut driver, Change::StatisticsInterval(Duration::from_secs(1))).contains("made without"));
    let rates = Change::Rates(crate::virtio::change::Rates::default());
    assert!(refused(&mut driver, rates).contains("rate limits of requests: a device of this type has none"));
    assert_eq!(config(&mut driver, 0), 3);
    // A device that gave up is changed as well.
    driver.rings[0].set_available(1000);
    driver.notify(0);
    driver.wait_for_needs_reset();
    change(&mut driver, Change::Balloon(Size::bytes(0))).unwrap();
    assert_eq!(config(&mut driver, 0), 0);
}

#[test]
fn the_interval_of_statistics_is_changed() {
    let (mut driver, _) = driver(&Spec { stats: Some(Duration::from_secs(3600)), ..Default::default() });
    driver.start();
    driver.put(BUFFERS, &[0; 10]);
    let head = driver.rings[2].add(&[(BUFFERS, 10, false)]);
    driver.notify(2);
    driver.mmio.change(Change::StatisticsInterval(Duration::from_millis(1))).recv().unwrap().unwrap();
    assert_eq!(driver.finish(2, 1), [(head, 0)]);
}
