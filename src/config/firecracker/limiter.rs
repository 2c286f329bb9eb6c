//! Rate limiters: token buckets for bytes and operations.

use std::num::NonZeroU32;

use serde_json::{Value, json};

use crate::config::Size;
use crate::config::tree::{Error, Node};

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

    /// Tokens in a second; without a limit if it holds none or needs no time.
    fn rate(&self) -> Option<u64> {
        let rate = u128::from(self.size) * 1000 / u128::from(self.refill_time).max(1);
        (self.size != 0 && self.refill_time != 0).then(|| u64::try_from(rate).unwrap_or(u64::MAX).max(1))
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

    /// One of bytes and operations in a second; `None` if neither is limited.
    pub fn of(bytes: Option<Size>, operations: Option<NonZeroU32>) -> Option<Self> {
        let bucket = |size: u64| Bucket { size, one_time_burst: None, refill_time: 1000 };
        let limiter = Self {
            bandwidth: bytes.map(|size| bucket(size.get())),
            ops: operations.map(|operations| bucket(operations.get().into())),
        };
        Some(limiter).filter(|limiter| *limiter != Self::default())
    }

    /// Bytes in a second.
    pub fn bytes(&self) -> Option<Size> {
        self.bandwidth.as_ref().and_then(Bucket::rate).map(Size::bytes)
    }

    /// Operations in a second.
    pub fn operations(&self) -> Option<NonZeroU32> {
        let rate = self.ops.as_ref().and_then(Bucket::rate)?;
        NonZeroU32::new(u32::try_from(rate).unwrap_or(u32::MAX))
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
    fn a_bucket_is_a_rate() {
        let read = |text| Limiter::read(&json::parse(text).unwrap());
        let limiter = read(
            r#"{"bandwidth": {"size": 1000, "refill_time": 100}, "ops": {"size": 5, "one_time_burst": 9, "refill_time": 2000}}"#,
        )
        .unwrap();
        assert_eq!((limiter.bytes(), limiter.operations().unwrap().get()), (Some(Size::bytes(10_000)), 2));
        assert_eq!(limiter.to_json()["ops"], serde_json::json!({"size": 5, "one_time_burst": 9, "refill_time": 2000}));
        let off =
            read(r#"{"bandwidth": {"size": 0, "refill_time": 100}, "ops": {"size": 5, "refill_time": 0}}"#).unwrap();
        assert_eq!((off.bytes(), off.operations()), (None, None));
        let most = read(r#"{"ops": {"size": 18446744073709551615, "refill_time": 1}}"#).unwrap();
        assert_eq!(most.operations().unwrap().get(), u32::MAX);
        for wrong in [r#"{"ops": {"size": 1}}"#, r#"{"ops": {"size": -1, "refill_time": 1}}"#, r#"{"oops": {}}"#, "[]"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
