//! The entropy device: random bytes from the host's own generator. Virtio 1.2, section 5.4.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Address, Bytes};

use super::change::{self, Change, Rates};
use super::device::{Error, Io, VirtioDevice};
use super::queue::Chain;
use super::rate_limiter::RateLimiter;
use crate::memory::GuestRam;
use crate::metrics::{Counter, Metrics};

const QUEUE_SIZES: [u16; 1] = [64];
/// The most that one request gets; the driver asks again for more.
const REQUEST_MAX: u32 = 64 << 10;
/// What the rate limit's timer is watched as.
const LIMIT: u32 = 0;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    counts: Arc<Counts>,
    limit: Option<RateLimiter>,
}

/// What the device has done.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counts {
    requests: Counter,
    bytes: Counter,
    errors: Counter,
    /// How often requests waited for the rate limit.
    throttled: Counter,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that keeps to these rates.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn limited(rates: Rates) -> io::Result<Self> {
        Ok(Self { limit: RateLimiter::new(rates)?, ..Self::default() })
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

    fn start(&mut self, _features: u64, io: &mut Io) -> Result<(), Error> {
        self.limit.as_ref().map_or(Ok(()), |limit| limit.watch(LIMIT, io))
    }

    fn change(&mut self, change: &Change, mut io: Option<&mut Io>) -> Result<(), change::Error> {
        let Change::Rates(rates) = change else { return Err(change.unsupported()) };
        let changed = RateLimiter::change(&mut self.limit, *rates, LIMIT, io.as_deref_mut());
        changed.map_err(change::Error::Timer)?;
        // What waited for the last limit.
        if let Some((_, queue)) = io.and_then(|io| io.queue(0)) {
            queue.kick_again();
        }
        Ok(())
    }

    fn host_ready(&mut self, _token: u32, io: &mut Io) -> Result<(), Error> {
        self.limit.iter_mut().for_each(RateLimiter::woken);
        self.queue_ready(0, io)
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), Error> {
        let Self { counts, limit } = self;
        if limit.as_ref().is_some_and(RateLimiter::is_waiting) {
            return Ok(());
        }
        let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
        queue.serve_some(ram, |chain| {
            if limit.as_mut().is_some_and(|limit| !limit.allows(Instant::now())) {
                counts.throttled.inc();
                return None;
            }
            counts.requests.inc();
            let filled = fill(ram, chain);
            if filled == 0 {
                counts.errors.inc();
            }
            counts.bytes.add(filled.into());
            limit.iter_mut().for_each(|limit| limit.take(filled.into(), Instant::now()));
            Some(filled)
        })?;
        Ok(())
    }

    fn stop(&mut self, io: &mut Io) {
        self.limit.iter().for_each(|limit| limit.unwatch(io));
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
            serde_json::json!({"requests": 1, "bytes": 10_016, "errors": 0, "throttled": 0, "interrupts": 1})
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

    #[test]
    fn what_is_over_the_limit_waits() {
        let rates = Rates { bytes: Some("64/1h+64".parse().unwrap()), operations: None };
        let mut driver = Driver::new(Box::new(Rng::limited(rates).unwrap()));
        driver.start();
        let metrics = driver.mmio.metrics();
        // The second one takes all there is and more, as it may when it begins.
        for _ in 0..3 {
            driver.rings[0].add(&[(BUFFERS, 96, true)]);
        }
        assert_eq!(driver.finish(0, 2).len(), 2);
        while metrics.to_json()["throttled"] == 0 {
            std::thread::yield_now();
        }
        driver.mmio.change(Change::Rates(Rates::default())).recv().unwrap().unwrap();
        while driver.rings[0].used().is_empty() {
            driver.wait();
        }
        assert_eq!(metrics.to_json()["bytes"], 3 * 96);
    }
}
