//! The balloon.
#![no_main]

use std::time::Duration;

use bantam::config::Size;
use bantam::virtio::balloon::{Balloon, Spec};
use bantam::virtio::change::Change;
use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use bantam_fuzz::device::{Device, run};
use bantam_fuzz::input::{self, Result, Unstructured};
use bantam_fuzz::memory::END;

const MEMORY: Size = Size::mib(1);
/// Of the pages that the queues' parts of memory are in.
const PAGES: u32 = (END / 4096) as u32;

struct Pages {
    spec: Spec,
}

impl Pages {
    fn make(&self) -> Box<dyn VirtioDevice> {
        Box::new(Balloon::new(&self.spec, MEMORY).expect("a balloon"))
    }
}

impl Device for Pages {
    const EMPTIES_PAGES: bool = true;

    fn new(u: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)> {
        let stats = u.arbitrary::<bool>()?.then_some(Duration::from_secs(3600));
        let spec = Spec { stats, free_page_reporting: u.arbitrary()?, ..Spec::default() };
        let pages = Self { spec };
        let device = pages.make();
        Ok((pages, device))
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        Some(self.make())
    }

    fn request(&self, _: u16, u: &mut Unstructured) -> Result<Vec<u8>> {
        if u.ratio(1, 8)? {
            return input::bytes(u, 64);
        }
        let mut request = vec![];
        let mut page = u.int_in_range(0..=PAGES)?;
        for _ in 0..u.int_in_range(1..=12)? {
            page = match u.int_in_range(0..=3)? {
                0 => page.wrapping_add(1),
                1 => page.wrapping_sub(1),
                2 => u.int_in_range(0..=PAGES)?,
                _ => input::number(u)? as u32,
            };
            request.extend(page.to_le_bytes());
        }
        Ok(request)
    }

    fn host(&mut self, mmio: &mut Mmio, u: &mut Unstructured) -> Result<()> {
        let change = if u.arbitrary()? {
            Change::Balloon(Size::bytes(input::number(u)?))
        } else {
            // At once, or never.
            Change::StatisticsInterval(if u.arbitrary()? { Duration::from_nanos(1) } else { Duration::from_secs(3600) })
        };
        let _ = mmio.change(change).recv().expect("an answer");
        // A timer that goes off each nanosecond would keep the device from resting.
        let _ = mmio.poll();
        let _ = mmio.change(Change::StatisticsInterval(Duration::from_secs(3600))).recv().expect("an answer");
        Ok(())
    }

    fn serves_all(&self, queue: u16) -> bool {
        // The others are what was negotiated: of statistics it keeps one.
        queue < 2
    }

    /// A page that was given back is empty, but for what of the rings is in it and was written since.
    fn explains(&self, page: &[u8], before: &[u8]) -> bool {
        page.iter().zip(before).all(|(byte, before)| *byte == 0 || byte == before)
    }

    fn probe(&self) -> (u16, Vec<u8>, u32) {
        (0, (PAGES - 1).to_le_bytes().to_vec(), 0)
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run::<Pages>(data));
