//! The states of snapshots: of a machine, and of each device that has one.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bantam::bus::BusDevice;
use bantam::config::Size;
use bantam::interrupt::Interrupt;
use bantam::machine::Snapshot;
use bantam::snapshot;
use bantam::virtio::balloon::{self, Balloon};
use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use bantam::virtio::rng::Rng;
use bantam::virtio::vsock::Vsock;
use bantam_fuzz::memory::Memory;
use serde_json::Value;

struct Line(AtomicUsize);

impl Interrupt for Line {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether there is a number that is no integer, of which the last bits may change. No part of a state has one.
fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(list) => list.iter().any(has_fraction),
        Value::Object(map) => map.values().any(has_fraction),
        _ => false,
    }
}

fn virtio(kind: u8) -> Box<dyn VirtioDevice> {
    let balloon = balloon::Spec { stats: Some(std::time::Duration::from_secs(3600)), ..balloon::Spec::default() };
    match kind % 3 {
        0 => Box::new(Rng::new()),
        1 => Box::new(Vsock::with_ends(Default::default())),
        _ => Box::new(Balloon::new(&balloon, Size::mib(1)).expect("a balloon")),
    }
}

/// A device that goes on from whatever state it takes saves the same, and does no harm when it runs.
fn device(kind: u8, state: &Value) {
    let memory = Memory::new();
    let line = Arc::new(Line(AtomicUsize::new(0)));
    let mut mmio = Mmio::new(memory.ram.clone(), virtio(kind), line, "fuzzed").expect("eventfds");
    if mmio.restore(state).is_err() {
        return;
    }
    let saved = mmio.save();
    for key in ["status", "accepted", "queues", "queue-sel"] {
        assert_eq!(saved[key], state[key], "{key}");
    }
    mmio.resume();
    for _ in 0..100 {
        if !mmio.poll() {
            break;
        }
    }
    let _ = mmio.save();
    mmio.write(0x70, &[0; 4]);
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 4 {
        0 => {
            // As it is in the file; nearly all fails by its checksum.
            let _ = snapshot::version(data);
            let _ = snapshot::decode::<Value>(data);
        }
        1 => {
            let Ok(state) = serde_json::from_slice::<Value>(data) else { return };
            let file = snapshot::encode(&state).expect("it is short");
            let again = snapshot::decode::<Value>(&file).expect("it was encoded");
            assert!(again == state || has_fraction(&state), "{again}");
            Snapshot::try_state(&file);
        }
        _ => {
            if let Ok(state) = serde_json::from_slice(data) {
                device(kind / 4, &state);
            }
        }
    }
});
