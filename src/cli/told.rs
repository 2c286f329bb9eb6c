//! Who is told of a machine while it runs.

use std::path::Path;

use bantam::machine::firecracker::Metrics;
use bantam::machine::{Builder, Lines};
use bantam::named::Server;

/// Has the machine tell what happens, and what it counts.
pub fn telling(mut builder: Builder, events: Option<&Path>, metrics: Option<&Path>) -> Result<Builder, String> {
    let lines = |what, path: &Path| {
        Lines::open(path).map_err(|error| format!("cannot write the {what} to {}: {error}", path.display()))
    };
    if let Some(path) = events {
        builder = builder.events(lines("events", path)?);
    }
    if let Some(path) = metrics {
        builder = builder.metrics(lines("metrics", path)?, Metrics::default());
    }
    Ok(builder)
}

/// Shows the console of a machine with a name to those who watch it.
pub fn named_console(builder: Builder, named: &Option<Server>) -> Builder {
    let Some(watchers) = named.as_ref().map(Server::watchers) else { return builder };
    builder.tee_console(move |output| watchers.tee(output))
}
