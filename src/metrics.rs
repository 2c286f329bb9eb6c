//! Counters that devices keep and reports read, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Serialize, Serializer};

/// A count that only grows. Any thread may add; a reader sees a recent value.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }
    /// Adds one, where nobody else adds: without the price of an atomic addition.
    pub fn inc_alone(&self) {
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

/// A set of counters that a report can read: any struct of [`Counter`]s that derives `Serialize`.
pub trait Metrics: Send + Sync {
    /// The counts as a JSON object.
    fn to_json(&self) -> serde_json::Value;
}

impl<T: Serialize + Send + Sync> Metrics for T {
    fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default, Serialize)]
    struct Disk {
        reads: Counter,
    }

    #[test]
    fn counters_serialize_as_numbers() {
        let disk = Disk::default();
        disk.reads.add(2);
        disk.reads.inc();
        disk.reads.inc_alone();
        assert_eq!(disk.to_json(), serde_json::json!({"reads": 4}));
    }
}
