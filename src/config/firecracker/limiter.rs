//! Rate limiters: token buckets for bytes and operations.

use std::num::NonZeroU64;
use std::time::Duration;

use serde_json::{Value, json};

use crate::config::Limit;
use crate::config::tree::{Error, Node};
use crate::virtio::change::Rates;

/// A token bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// How many tokens it holds.
    pub size: u64,
    /// How many more there are at first.
    pub one_time_burst: Option<u64>,
    /// How long it takes to fill, in milliseconds.
    pub refill_time: u64,
}

impl Bucket {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&["size", "one_time_burst", "refill_time"])?;
        let number = |key| table.number(key, 0, u64::MAX);
        Ok(Self {
            size: number("size")?.ok_or_else(|| table.missing("size"))?,
            one_time_burst: number("one_time_burst")?,
            refill_time: number("refill_time")?.ok_or_else(|| table.missing("refill_time"))?,
        })
    }

    /// The limit that it is; there is none if it holds nothing or needs no time.
    pub fn limit(&self) -> Option<Limit> {
        let size = NonZeroU64::new(self.size).filter(|_| self.refill_time > 0)?;
        Some(Limit { size, refill: Duration::from_millis(self.refill_time), burst: self.one_time_burst.unwrap_or(0) })
    }

    /// The view of a limit that was described otherwise.
    pub fn of(limit: Limit) -> Self {
        Self {
            size: limit.size.get(),
            one_time_burst: Some(limit.burst).filter(|burst| *burst > 0),
            refill_time: u64::try_from(limit.refill.as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn to_json(&self) -> Value {
        let mut bucket = json!({"size": self.size, "refill_time": self.refill_time});
        if let Some(burst) = self.one_time_burst {
            bucket["one_time_burst"] = burst.into();
        }
        bucket
    }
}

/// A rate limiter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limiter {
    /// Of bytes.
    pub bandwidth: Option<Bucket>,
    /// Of operations.
    pub ops: Option<Bucket>,
}

impl Limiter {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&["bandwidth", "ops"])?;
        Ok(Self { bandwidth: table.read("bandwidth", Bucket::read)?, ops: table.read("ops", Bucket::read)? })
    }

    /// The view of limits that were described otherwise; `None` if there are none.
    pub fn of(bytes: Option<Limit>, operations: Option<Limit>) -> Option<Self> {
        let limiter = Self { bandwidth: bytes.map(Bucket::of), ops: operations.map(Bucket::of) };
        Some(limiter).filter(|limiter| *limiter != Self::default())
    }

    /// The limits that they are.
    pub fn rates(&self) -> Rates {
        let [bytes, operations] = [&self.bandwidth, &self.ops].map(|bucket| bucket.as_ref().and_then(Bucket::limit));
        Rates { bytes, operations }
    }

    /// The limiter with what `update` says in place of its own.
    pub fn update(&mut self, update: Self) {
        self.bandwidth = update.bandwidth.or(self.bandwidth.take());
        self.ops = update.ops.or(self.ops.take());
    }

    /// As it is read.
    pub fn to_json(&self) -> Value {
        let buckets = [("bandwidth", &self.bandwidth), ("ops", &self.ops)];
        let buckets =
            buckets.into_iter().filter_map(|(name, bucket)| Some((name.to_owned(), bucket.as_ref()?.to_json())));
        Value::Object(buckets.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json;

    #[test]
    fn a_bucket_is_a_limit() {
        let read = |text| Limiter::read(&json::parse(text).unwrap());
        let limiter = read(
            r#"{"bandwidth": {"size": 1000, "refill_time": 100}, "ops": {"size": 5, "one_time_burst": 9, "refill_time": 2000}}"#,
        )
        .unwrap();
        let rates = limiter.rates();
        let text = |limit: Option<Limit>| limit.unwrap().to_string();
        assert_eq!((text(rates.bytes), text(rates.operations)), ("1000/100ms".to_owned(), "5/2s+9".to_owned()));
        assert_eq!(limiter.to_json()["ops"], serde_json::json!({"size": 5, "one_time_burst": 9, "refill_time": 2000}));
        assert_eq!(Limiter::of(rates.bytes, rates.operations), Some(limiter));
        let off =
            read(r#"{"bandwidth": {"size": 0, "refill_time": 100}, "ops": {"size": 5, "refill_time": 0}}"#).unwrap();
        assert_eq!(off.rates(), Rates::default());
        for wrong in [r#"{"ops": {"size": 1}}"#, r#"{"ops": {"size": -1, "refill_time": 1}}"#, r#"{"oops": {}}"#, "[]"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
