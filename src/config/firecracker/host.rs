//! `balloon`, `logger` and `metrics`.

use std::time::Duration;

use serde_json::{Value, json};

use crate::config::Size;
use crate::config::tree::{Error, Node};
use crate::virtio::balloon;

/// A balloon device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balloon {
    /// How much of the guest's memory it takes, in MiB.
    pub amount_mib: u32,
    /// Whether it gives it back when the guest has no more.
    pub deflate_on_oom: bool,
    /// Seconds between statistics; there are none if it is 0.
    pub stats_polling_interval_s: u16,
    /// Whether the guest tells of free pages when it is asked.
    pub free_page_hinting: bool,
    /// Whether the guest tells of free pages by itself.
    pub free_page_reporting: bool,
}

impl Balloon {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&[
            "amount_mib",
            "deflate_on_oom",
            "stats_polling_interval_s",
            "free_page_hinting",
            "free_page_reporting",
        ])?;
        let amount = table.number("amount_mib", 0, u32::MAX.into())?.ok_or_else(|| table.missing("amount_mib"))?;
        let interval = table.number("stats_polling_interval_s", 0, u16::MAX.into())?;
        Ok(Self {
            amount_mib: u32::try_from(amount).unwrap_or(u32::MAX),
            deflate_on_oom: table.boolean("deflate_on_oom")?.ok_or_else(|| table.missing("deflate_on_oom"))?,
            stats_polling_interval_s: interval.and_then(|seconds| u16::try_from(seconds).ok()).unwrap_or(0),
            free_page_hinting: table.boolean("free_page_hinting")?.unwrap_or(false),
            free_page_reporting: table.boolean("free_page_reporting")?.unwrap_or(false),
        })
    }

    /// The view of one that was described otherwise.
    pub fn of(spec: &balloon::Spec) -> Self {
        let whole = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let interval = spec.stats.map_or(0, |interval| interval.as_secs().max(1));
        Self {
            amount_mib: whole(spec.size.map_or(0, |size| size.get() >> 20)),
            deflate_on_oom: spec.deflate_on_oom,
            stats_polling_interval_s: u16::try_from(interval).unwrap_or(u16::MAX),
            free_page_hinting: false,
            free_page_reporting: spec.free_page_reporting,
        }
    }

    /// As bantam has it.
    pub fn spec(&self) -> balloon::Spec {
        balloon::Spec {
            size: Some(Size::mib(self.amount_mib.into())),
            deflate_on_oom: self.deflate_on_oom,
            stats: (self.stats_polling_interval_s > 0)
                .then(|| Duration::from_secs(self.stats_polling_interval_s.into())),
            free_page_reporting: self.free_page_reporting,
        }
    }

    /// As it is read.
    pub fn to_json(&self) -> Value {
        json!({
            "amount_mib": self.amount_mib,
            "deflate_on_oom": self.deflate_on_oom,
            "stats_polling_interval_s": self.stats_polling_interval_s,
            "free_page_hinting": self.free_page_hinting,
            "free_page_reporting": self.free_page_reporting,
        })
    }
}

/// The levels of a log, from that on which nothing is logged, as they are written in full.
const LEVELS: [&str; 6] = ["Off", "Error", "Warning", "Info", "Debug", "Trace"];

/// What is logged, and where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Logger {
    /// The file or pipe.
    pub log_path: Option<String>,
    /// What is logged.
    pub level: Option<log::LevelFilter>,
    /// Whether lines have their level.
    pub show_level: Option<bool>,
    /// Whether lines have the place in the program that they come from.
    pub show_log_origin: Option<bool>,
    /// The module whose lines alone are logged.
    pub module: Option<String>,
}

impl Logger {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&["log_path", "level", "show_level", "show_log_origin", "module"])?;
        let level = table.text("level")?.map(level).transpose().map_err(|what| table.wrong("level", &what))?;
        Ok(Self {
            log_path: table.text("log_path")?.map(str::to_owned),
            level,
            show_level: table.boolean("show_level")?,
            show_log_origin: table.boolean("show_log_origin")?,
            module: table.text("module")?.map(str::to_owned),
        })
    }
}

/// The level of this name, in any case.
///
/// # Errors
/// Says which there are.
pub fn level(name: &str) -> Result<log::LevelFilter, String> {
    let name = if name.eq_ignore_ascii_case("warn") { "Warning" } else { name };
    let index = LEVELS.iter().position(|level| level.eq_ignore_ascii_case(name));
    let level = index.and_then(|index| log::LevelFilter::iter().nth(index));
    level.ok_or_else(|| format!("unknown level `{name}`: expected {}", LEVELS.join(", ")))
}

/// Where metrics are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// The file or pipe.
    pub metrics_path: String,
    /// Whether each line has the machine's name.
    pub emit_id: bool,
    /// What else each line has.
    pub properties: Vec<(String, String)>,
}

impl Metrics {
    /// Reads it.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&["metrics_path", "emit_id", "properties"])?;
        let properties = table.read("properties", |node| {
            let crate::config::tree::Value::Table(pairs) = &node.value else { return Err(node.unexpected("a table")) };
            let text = |(key, node): &(crate::config::tree::Key, Node)| match &node.value {
                crate::config::tree::Value::Text(text) => Ok((key.name.clone(), text.clone())),
                _ => Err(node.unexpected("a text").within(&key.name, node.at)),
            };
            pairs.iter().map(text).collect::<Result<Vec<_>, _>>()
        })?;
        Ok(Self {
            metrics_path: table.text("metrics_path")?.ok_or_else(|| table.missing("metrics_path"))?.to_owned(),
            emit_id: table.boolean("emit_id")?.unwrap_or(false),
            properties: properties.unwrap_or_default(),
        })
    }
}
