//! Snapshots whose checksums are right and whose content is not: each ends in an error that says what is wrong, or is a
//! machine that its limit ends.

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bantam::config::Size;
use bantam::devices::console::Console;
use bantam::machine::{self, Builder, Destination, Snapshot};
use bantam::snapshot;
use bantam::virtio::{balloon, blk, vsock};
use serde_json::{Value, json};

use crate::support::Kernel;
use crate::{Lab, Running};

/// Of each list the first and the last members stand for all.
const MEMBERS: usize = 2;
/// How long a machine that can be restored runs.
const LIMIT: Duration = Duration::from_millis(10);

/// The places of all values in `value`, as JSON pointers.
fn places(value: &Value, place: String, all: &mut Vec<String>) {
    match value {
        Value::Array(members) => {
            for (index, member) in members.iter().enumerate() {
                if index < MEMBERS || index + MEMBERS >= members.len() {
                    places(member, format!("{place}/{index}"), all);
                }
            }
        }
        Value::Object(members) => {
            for (name, member) in members {
                places(member, format!("{place}/{name}"), all);
            }
        }
        _ => {}
    }
    all.push(place);
}

/// What is put in place of a value.
fn extremes(value: &Value) -> Vec<Value> {
    let mut extremes =
        vec![json!(0), json!(-1), json!(u64::MAX), json!(""), json!([]), json!("f".repeat(100_000)), Value::Null];
    match value {
        // Bytes as many as there were.
        Value::String(text) => {
            let shorter = text.get(..text.len().saturating_sub(2)).unwrap_or_default();
            extremes.extend([json!("f".repeat(text.len())), json!("0".repeat(text.len())), json!(shorter)]);
        }
        Value::Number(number) => extremes.extend(number.as_u64().map(|number| json!(number ^ 0xff))),
        Value::Array(members) => {
            extremes.push(json!([&members[..], &members[..]].concat()));
            extremes.push(json!(&members[..members.len().saturating_sub(1)]));
        }
        Value::Bool(is_so) => extremes.push(json!(!is_so)),
        _ => {}
    }
    extremes.retain(|extreme| extreme != value);
    extremes
}

/// A snapshot's files, of which the state is changed.
struct Saved {
    folder: PathBuf,
    state: Value,
}

impl Saved {
    fn read(folder: &Path) -> Self {
        let bytes = fs::read(folder.join("state")).unwrap();
        Self { folder: folder.into(), state: snapshot::decode(&bytes).unwrap() }
    }

    /// Opens it with another value at a place.
    fn open_with(&self, place: &str, value: &Value) -> Result<Snapshot, machine::snapshot::Error> {
        let mut state = self.state.clone();
        *state.pointer_mut(place).unwrap() = value.clone();
        fs::write(self.folder.join("state"), snapshot::encode(&state).unwrap()).unwrap();
        Snapshot::open(&self.folder)
    }

    /// Runs the machine with another value at a place.
    fn run_with(&self, place: &str, value: &Value) -> Result<(), machine::Error> {
        let mut snapshot = self.open_with(place, value)?;
        snapshot.config.timeout = Some(LIMIT);
        let mut machine = Builder::restore(snapshot).console(Console::to(std::io::sink())).build()?;
        machine.run().map(drop)
    }
}

/// What an error and its causes say.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text += &format!(": {source}");
        cause = source.source();
    }
    text
}

#[test]
fn any_value_may_be_anything() {
    restore_with_other_values(8);
}

#[test]
#[ignore = "takes minutes in an emulated host"]
fn all_values_may_be_anything() {
    restore_with_other_values(1);
}

/// Restores a machine with each value of its state replaced by others: with one in so many of these.
fn restore_with_other_values(step: usize) {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        // A device's thread that panics takes nobody else along.
        PANICS.fetch_add(1, Ordering::SeqCst);
        before(info);
    }));
    let mut lab = Lab::new(Kernel::Tiny, "echo ready; read line");
    let disk = lab.disk("disk");
    let vsock = vsock::Spec { cid: 3, socket: lab.path("vsock") };
    let balloon = balloon::Spec { stats: Some(Duration::from_secs(1)), ..Default::default() };
    lab.config = lab.config.memory(Size::mib(64)).disk(blk::Spec::new(&disk)).vsock(vsock).balloon(balloon);
    let folder = lab.path("saved");
    let machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_for("ready");
    machine.handle.snapshot(Destination::Folder(folder.clone())).unwrap();
    machine.stop();

    let saved = Saved::read(&folder);
    let mut all = vec![];
    places(&saved.state, String::new(), &mut all);
    let (mut unread, mut refused, mut ran) = (0, 0, 0);
    let values = all
        .iter()
        .flat_map(|place| extremes(saved.state.pointer(place).unwrap()).into_iter().map(move |value| (place, value)));
    for (place, value) in values.step_by(step) {
        match saved.run_with(place, &value) {
            Err(machine::Error::Snapshot(error @ machine::snapshot::Error::State { .. })) => {
                assert!(chain(&error).contains("what it says is no machine's state"), "{place} {value}: {error:?}");
                unread += 1;
            }
            Err(error) => {
                let (error, shown) = (chain(&error), value.to_string());
                eprintln!("{place} {shown:.40}: {error:.200}");
                refused += 1;
            }
            Ok(()) => ran += 1,
        }
    }
    eprintln!("{} places: {unread} not read, {refused} refused, {ran} ran", all.len());
    assert!(unread > 400 / step && refused > 500 / step && ran > 100 / step);
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}
