//! The entropy device.
#![no_main]

use bantam::virtio::change::{Change, Rates};
use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use bantam::virtio::rng::Rng;
use bantam_fuzz::device::{Device, run};
use bantam_fuzz::input::{self, Result, Unstructured};
use bantam_fuzz::memory::Memory;

struct Entropy {
    limited: bool,
}

impl Entropy {
    fn limit(&mut self, mmio: &mut Mmio, limited: bool) {
        self.limited = limited;
        let bytes = limited.then(|| "100/1h+1000".parse().expect("a limit"));
        let changed = mmio.change(Change::Rates(Rates { bytes, operations: None }));
        changed.recv().expect("an answer").expect("a timer");
    }
}

impl Device for Entropy {
    fn new(_: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)> {
        Ok((Self { limited: false }, Box::new(Rng::new())))
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        self.limited = false;
        Some(Box::new(Rng::new()))
    }

    fn request(&self, _: u16, u: &mut Unstructured) -> Result<Vec<u8>> {
        // It reads nothing; drivers may send something all the same.
        if u.ratio(1, 8)? { input::bytes(u, 16) } else { Ok(vec![]) }
    }

    fn host(&mut self, mmio: &mut Mmio, u: &mut Unstructured) -> Result<()> {
        self.limit(mmio, u.arbitrary()?);
        Ok(())
    }

    fn serves_all(&self, _: u16) -> bool {
        !self.limited
    }

    fn probe(&self) -> (u16, Vec<u8>, u32) {
        (0, vec![], 32)
    }

    fn probed(&self, answer: &[u8]) {
        assert_eq!(answer.len(), 32);
    }

    fn end(&mut self, mmio: &mut Mmio, _: &Memory) {
        self.limit(mmio, false);
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run::<Entropy>(data));
