//! The entropy device: random bytes from the host's own generator. Virtio 1.2, section 5.4.

use std::sync::Arc;

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Address, Bytes};

use super::device::{Error, Io, VirtioDevice};
use super::queue::Chain;
use crate::memory::GuestRam;
use crate::metrics::{Counter, Metrics};

const QUEUE_SIZES: [u16; 1] = [64];
/// The most that one request gets; the driver asks again for more.
const REQUEST_MAX: u32 = 64 << 10;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    counts: Arc<Counts>,
}

/// What the device has done.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counts {
    requests: Counter,
    bytes: Counter,
    errors: Counter,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.counts.clone()
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), Error> {
        let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
        let counts = &self.counts;
        queue.serve(ram, |chain| {
            counts.requests.inc();
            let filled = fill(ram, chain);
            if filled == 0 {
                counts.errors.inc();
            }
            counts.bytes.add(filled.into());
            filled
        })?;
        Ok(())
    }
}

/// Fills the buffers of a request, up to [`REQUEST_MAX`] bytes and to the first that is not in guest memory; how many
/// bytes it filled.
fn fill(ram: &GuestRam, chain: Chain<'_>) -> u32 {
    let mut filled = 0;
    let mut random = [0; 4096];
    for buffer in chain.writable() {
        let (mut at, mut left) = (buffer.addr(), buffer.len().min(REQUEST_MAX - filled));
        while left > 0 {
            let some = random.len().min(left as usize);
            // The host's generator was ready long before a guest could run; if it fails the driver asks again.
            let Ok(got) = retry_on_intr(|| getrandom(&mut random[..some], GetRandomFlags::empty())) else {
                return filled;
            };
            if ram.write_slice(&random[..got], at).is_err() {
                return filled;
            }
            let got = u32::try_from(got).expect("at most 4096");
            (filled, left) = (filled + got, left - got);
            match at.checked_add(got.into()) {
                Some(next) => at = next,
                None => return filled,
            }
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{BUFFERS, Driver, END};

    fn driver() -> (Driver, Arc<dyn Metrics>) {
        let mut driver = Driver::new(Box::new(Rng::new()));
        driver.start();
        let metrics = driver.mmio.metrics();
        (driver, metrics)
    }

    #[test]
    fn buffers_are_filled_with_what_differs() {
        let (mut driver, metrics) = driver();
        // The second crosses from one region of guest memory to the next.
        let buffers = [(BUFFERS, 16, true), (END / 2 - 5000, 10_000, true)];
        let head = driver.rings[0].add(&buffers);
        assert_eq!(driver.finish(0, 1), [(head, 10_016)]);
        for (addr, len, _) in buffers {
            let tail = driver.get(addr + u64::from(len) - 16, 16);
            assert!(tail.iter().any(|byte| *byte != 0));
        }
        assert_eq!(driver.get(END / 2 + 5000, 8), [0; 8]);
        assert_eq!(
            metrics.to_json(),
            serde_json::json!({"requests": 1, "bytes": 10_016, "errors": 0, "interrupts": 1})
        );
    }

    #[test]
    fn a_request_is_bounded() {
        let (mut driver, _) = driver();
        let head = driver.rings[0].add(&[(BUFFERS, 0x1_0000, true), (BUFFERS, 0x1_0000, true)]);
        assert_eq!(driver.finish(0, 1), [(head, REQUEST_MAX)]);
    }

    #[test]
    fn what_cannot_be_written_is_left_out() {
        let (mut driver, metrics) = driver();
        for buffers in [
            [(BUFFERS, 16, false), (BUFFERS, 0, true)],
            [(END, 16, true), (BUFFERS, 16, true)],
            [(u64::MAX - 3, u32::MAX, true), (BUFFERS, 16, true)],
        ] {
            let head = driver.rings[0].add(&buffers);
            assert_eq!(driver.finish(0, 1), [(head, 0)]);
        }
        let head = driver.rings[0].add(&[(BUFFERS, 16, true), (END, 16, true)]);
        assert_eq!(driver.finish(0, 1), [(head, 16)]);
        assert_eq!(metrics.to_json()["errors"], 3);
    }
}
