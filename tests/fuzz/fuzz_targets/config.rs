//! Configurations: JSON, TOML, Firecracker's file, `key=value,key=value`, and the texts in them.
#![no_main]

use std::fmt::{Debug, Display};
use std::path::Path;
use std::str::FromStr;

use bantam::config::file::{self, Document};
use bantam::config::{Config, Directions, Limit, Overlay, Quota, Share, Size, duration, firecracker, json, kv};
use bantam::virtio::{balloon, blk, net, vsock};
use serde_json::Value;

/// What is read is written, and read as the same.
fn again(config: &Config) {
    let text = serde_json::to_string(config).expect("a configuration is JSON");
    let Document { config: again, .. } =
        file::parse(Path::new("a.json"), &text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(again, *config, "{text}");
    // Where it is refused, the reason is told.
    if let Err(error) = config.validate() {
        assert!(!error.to_string().is_empty());
    }
}

fn firecrackers(text: &str) {
    let Ok(node) = json::parse(text) else { return };
    let Ok(settings) = firecracker::Settings::read(&node) else { return };
    let text = settings.to_json().to_string();
    let node = json::parse(&text).expect("it is JSON");
    let again = firecracker::Settings::read(&node).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(again.to_json().to_string(), text);
    let (mut one, mut other) = (settings.config(), again.config());
    // The file does not tell of these.
    for config in [&mut one, &mut other] {
        (config.serial, config.serial_bw) = Default::default();
    }
    assert_eq!(one, other, "{text}");
    self::again(&settings.config());
}

fn text<T: FromStr + Display + PartialEq + Debug>(text: &str)
where
    T::Err: Display + Debug,
{
    match text.parse::<T>() {
        Ok(value) => assert_eq!(value.to_string().parse::<T>().expect("it is its own text"), value, "{text:?}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn keys_and_values(text: &str) {
    let of = |read: Result<Value, kv::Error>| drop(read.map_err(|error| error.to_string()));
    let to = |value: Result<Value, serde_json::Error>| value.expect("it is JSON");
    of(kv::from_str::<blk::Spec>(text).map(|spec| to(serde_json::to_value(spec))));
    of(kv::from_str::<vsock::Spec>(text).map(|spec| to(serde_json::to_value(spec))));
    of(kv::from_str::<balloon::Spec>(text).map(|spec| to(serde_json::to_value(spec))));
    of(kv::from_str::<Share>(text).map(|spec| to(serde_json::to_value(spec))));
    of(kv::from_str::<Overlay>(text).map(|spec| to(serde_json::to_value(spec))));
    if let Ok(spec) = kv::from_str::<net::Spec>(text) {
        let _ = spec.validate();
        let written = serde_json::to_string(&spec).expect("it is JSON");
        assert_eq!(serde_json::from_str::<net::Spec>(&written).expect("it is its own text"), spec);
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let Ok(input) = std::str::from_utf8(data) else { return };
    match kind % 4 {
        0 | 1 => {
            let name = if kind % 4 == 0 { "a.json" } else { "a.toml" };
            match file::parse(Path::new(name), input) {
                Ok(document) => again(&document.config),
                Err(error) => assert!(error.to_string().contains(", line "), "{error}"),
            }
        }
        2 => firecrackers(input),
        _ => {
            keys_and_values(input);
            text::<Size>(input);
            text::<Limit>(input);
            text::<Directions>(input);
            text::<Quota>(input);
            text::<net::MacAddr>(input);
            text::<net::Publish>(input);
            let _ = duration::parse(input);
        }
    }
});
