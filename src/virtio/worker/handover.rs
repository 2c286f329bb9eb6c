//! A device goes from thread to thread while it is notified without end: no request is left, and none done twice.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

use crate::bus::BusDevice;
use crate::virtio::blk::{Blk, Spec};
use crate::virtio::testing::{BUFFERS, Driver};

const SECTORS: u64 = 64;
const DATA: u64 = BUFFERS + 0x1_0000;

/// Where request `index` has its header and its status, and what is read.
fn places(index: u64) -> [u64; 3] {
    [BUFFERS + 0x100 * index, BUFFERS + 0x100 * index + 0x80, DATA + 512 * index]
}

#[test]
fn a_device_changes_hands_while_it_is_notified() {
    for poll_us in [0, 50] {
        changes_hands(poll_us);
    }
}

fn changes_hands(poll_us: u16) {
    let file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.as_file().write_all_at(&[u8::try_from(sector).unwrap(); 512], 512 * sector).unwrap();
    }
    let mut driver = Driver::new(Box::new(Blk::open(&Spec { poll_us, ..Spec::new(file.path()) }).unwrap()));
    driver.start();
    let kick = Arc::new(driver.mmio.kicks().next().unwrap().1.try_clone().unwrap());
    let is_over = Arc::new(AtomicBool::new(false));
    let storm = |_| {
        let (kick, is_over) = (kick.clone(), is_over.clone());
        thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                kick.write(1).unwrap();
                thread::yield_now();
            }
        })
    };
    let storms = [0, 1].map(storm);

    let mut state = 1u64;
    let mut below = |most: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % most
    };
    for _ in 0..200 {
        let count = 1 + below(8);
        let mut asked = vec![];
        for index in 0..count {
            let (sector, [header, status, data]) = (below(SECTORS), places(index));
            driver.put(header, &[&[0; 8][..], &sector.to_le_bytes()].concat());
            driver.put(status, &[0xaa]);
            asked.push((driver.rings[0].add(&[(header, 16, false), (data, 512, true), (status, 1, true)]), sector));
        }
        for _ in 0..below(4) {
            driver.mmio.pause();
            if below(2) == 0 {
                driver.mmio.save();
            }
            driver.mmio.resume();
        }
        if below(4) == 0 {
            driver.write(VIRTIO_MMIO_STATUS, 0);
            driver.start();
            continue;
        }
        let used = driver.finish(0, asked.len());
        let heads: Vec<_> = asked.iter().map(|(head, _)| (*head, 513)).collect();
        assert_eq!(used, heads);
        for (index, (_, sector)) in (0..).zip(&asked) {
            let [_, status, data] = places(index);
            assert_eq!(driver.get(status, 1), [0]);
            assert_eq!(driver.get(data, 512), [u8::try_from(*sector).unwrap(); 512]);
        }
        assert_eq!(driver.rings[0].used(), []);
    }
    is_over.store(true, Ordering::Relaxed);
    storms.into_iter().for_each(|storm| storm.join().unwrap());
}
