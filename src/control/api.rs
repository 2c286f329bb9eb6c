//! Firecracker's API: what each request means, before the machine has started and afterwards.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value as Json, json};

use super::http::{Request, Response};
use super::running::Running;
use super::snapshot::{Create, Load};
use crate::config::firecracker::{
    self, Balloon, BootSource, Drive, Logger, Machine, Metrics, NetworkInterface, Serial, Settings, devices,
};
use crate::config::json;
use crate::config::tree::{Error, Node, Table};
use crate::machine::firecracker::Counts;
use crate::machine::{self, Handle, Lines, Snapshot};
use crate::signal::SignalFd;

/// The version of Firecracker's API that this is, of its OpenAPI document, for clients that ask.
pub const VERSION: &str = "1.17.0";

const NOT_BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const NOT_AFTER: &str = "The requested operation is not supported after starting the microVM.";

/// Requests that are counted, by the first part of their path: what they are called in the sections for `GET`, `PUT` and
/// `PATCH`.
const COUNTED: &[(&str, &str)] = &[
    ("", "instance_info"),
    ("version", "vmm_version"),
    ("machine-config", "machine_cfg"),
    ("mmds", "mmds"),
    ("actions", "actions"),
    ("boot-source", "boot_source"),
    ("cpu-config", "cpu_cfg"),
    ("drives", "drive"),
    ("logger", "logger"),
    ("metrics", "metrics"),
    ("network-interfaces", "network"),
    ("vsock", "vsock"),
];

/// What the API needs of the program that it is part of.
pub trait Program {
    /// Logs as it is told to.
    ///
    /// # Errors
    /// Why it does not.
    fn log(&mut self, logger: &Logger) -> Result<(), String>;

    /// Makes the machine, which runs from now on: the program runs it when the server returns.
    ///
    /// # Errors
    /// Why there is none.
    fn start(&mut self, settings: &Settings) -> Result<Handle, String>;

    /// Makes the machine of a snapshot, in the same way; `paused` until it is resumed.
    ///
    /// # Errors
    /// Why there is none.
    fn restore(&mut self, snapshot: Snapshot, paused: bool) -> Result<Handle, String>;

    /// The signals that end the program.
    fn signals(&self) -> Option<&SignalFd>;
}

/// The state that requests change.
pub struct Api {
    id: String,
    settings: Settings,
    /// Where metrics go, until there is a machine that writes them.
    metrics: Option<Lines>,
    startup: [u64; 2],
    counts: Arc<Counts>,
    running: Option<Running>,
}

/// What a request becomes, or why it is refused.
type Answer = Result<Response, String>;

fn done() -> Answer {
    Ok(Response::done())
}

impl Api {
    /// The API of a machine of this name, with what is known of it already.
    pub fn new(id: impl Into<String>, settings: Settings) -> Self {
        Self { id: id.into(), settings, metrics: None, startup: [0; 2], counts: Arc::default(), running: None }
    }

    /// What is told with the machine's metrics.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// How long the process took until it was ready, in microseconds: by the clock, and of CPU time. Metrics tell.
    pub fn set_startup(&mut self, times: [u64; 2]) {
        self.startup = times;
    }

    /// The machine runs.
    pub fn started(&mut self, handle: Handle) {
        self.run(Running::new(handle));
    }

    fn run(&mut self, running: Running) {
        if let (Some(lines), Some(metrics)) = (self.metrics.take(), &self.settings.metrics) {
            let mut more = Map::new();
            if metrics.emit_id {
                more.insert("id".into(), self.id.clone().into());
            }
            if !metrics.properties.is_empty() {
                let properties = metrics.properties.iter().map(|(key, value)| (key.clone(), json!(value)));
                more.insert("properties".into(), properties.collect());
            }
            let drives = self.settings.drives_in_order().map(|drive| &drive.drive_id).enumerate();
            let cards = self.settings.interfaces.iter().map(|card| &card.iface_id).enumerate();
            let drives = drives.map(|(index, id)| (format!("blk{index}"), id.clone()));
            let ids = drives.chain(cards.map(|(index, id)| (format!("net{index}"), id.clone()))).collect();
            let metrics = machine::firecracker::Metrics::new(ids).more(more).startup(self.startup);
            let metrics = metrics.counts(self.counts());
            running.tell_metrics(lines, metrics);
        }
        self.running = Some(running);
    }

    /// A machine of these settings runs.
    ///
    /// # Errors
    /// When the metrics cannot be written where they say.
    pub fn started_with(&mut self, settings: Settings, handle: Handle) -> Result<(), String> {
        let metrics = self.settings.metrics.take();
        self.settings = settings;
        match (metrics, self.settings.metrics.take()) {
            (Some(metrics), _) => self.settings.metrics = Some(metrics),
            (None, Some(metrics)) => self.set_metrics(metrics)?,
            (None, None) => {}
        }
        self.started(handle);
        Ok(())
    }

    /// Writes metrics to the end of a file, or to a pipe: at the start, each minute, whenever a client says so, and at the
    /// end.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn set_metrics(&mut self, metrics: Metrics) -> Result<(), String> {
        self.metrics = Some(self.open_metrics(&metrics.metrics_path)?);
        self.settings.metrics = Some(metrics);
        Ok(())
    }

    /// Whether the machine runs, or is paused.
    pub fn has_started(&self) -> bool {
        self.running.is_some()
    }

    /// Does what a request asks for. Only with a `program` can a machine be started.
    pub fn respond(&mut self, request: &Request, program: Option<&mut dyn Program>) -> Response {
        let begin = Instant::now();
        let answer = self.route(request, program, begin);
        self.count(request, answer.is_err());
        let response = answer.unwrap_or_else(Response::refused);
        log::debug!("{} {}: {}", request.method, request.target, response.status);
        response
    }

    fn count(&self, request: &Request, failed: bool) {
        let first = path(&request.target).split('/').nth(1).unwrap_or_default();
        let Some((_, name)) = COUNTED.iter().find(|(path, _)| *path == first) else { return };
        let section = format!("{}_api_requests", request.method.to_lowercase());
        if failed {
            self.counts.count(&*section, format!("{name}_fails"));
        }
        self.counts.count(section, format!("{name}_count"));
    }

    /// What a request that began then asked for was done, which began a little later.
    fn took(&self, what: &str, request: Instant, began: Instant) {
        self.counts.took(what, request.elapsed());
        self.counts.took(format!("vmm_{what}"), began.elapsed());
    }

    fn route(&mut self, request: &Request, program: Option<&mut dyn Program>, begin: Instant) -> Answer {
        let method = request.method.as_str();
        let path = path(&request.target);
        let segments: Vec<_> = path.split('/').skip(1).collect();
        let invalid = || Err(format!("Invalid request method and/or path: {method} {path}."));
        if !is_known(method, &segments) {
            return invalid();
        }
        if method == "GET" && !request.body.is_empty() {
            return Err("GET request cannot have a body.".into());
        }
        let is_optional = segments.starts_with(&["balloon", "hinting"]);
        let body = match (method, request.body.is_empty()) {
            ("GET", _) => None,
            (_, true) if is_optional => None,
            (_, true) => return Err(format!("Empty {method} request.")),
            _ => Some(parse(&request.body)?),
        };
        let node = body.as_ref().unwrap_or(&Node { at: 0, value: crate::config::tree::Value::Null });
        match (method, &segments[..]) {
            ("GET", [""]) => Ok(Response::found(&self.instance())),
            ("GET", ["version"]) => Ok(Response::found(&json!({"firecracker_version": VERSION}))),
            ("GET", ["vm", "config"]) => Ok(Response::found(&self.settings.to_json())),
            ("GET", ["machine-config"]) => Ok(Response::found(&self.settings.machine.to_json())),
            ("GET", ["mmds"]) => Err(firecracker::NO_MMDS.into()),
            ("GET", ["hotplug", "memory"]) => Err(firecracker::NO_HOTPLUG.into()),
            ("PUT", ["actions"]) => self.action(node, program),
            ("PATCH", ["vm"]) => self.set_state(node, begin),
            ("GET" | "PUT" | "PATCH", ["balloon", rest @ ..]) => self.balloon(method, rest, node),
            ("PATCH", ["drives", id]) => self.patch_drive(id, node),
            ("PATCH", ["network-interfaces", id]) => self.patch_interface(id, node),
            ("PUT", ["snapshot", "create"]) => self.create_snapshot(node, begin),
            ("PUT", ["snapshot", "load"]) => self.load_snapshot(node, program, begin),
            ("PUT" | "PATCH", _) => self.set_up(method, &segments, node, program),
            _ => invalid(),
        }
    }

    /// What is said of a machine before it starts.
    fn set_up(&mut self, method: &str, segments: &[&str], node: &Node, program: Option<&mut dyn Program>) -> Answer {
        let settings = &mut self.settings;
        // Read first: a mistake in the body is told at any time.
        let mut next = settings.clone();
        match (method, segments) {
            ("PUT", ["boot-source"]) => {
                let boot = text(BootSource::read(node))?;
                must_open("kernel", Some(&boot.kernel_image_path))?;
                must_open("initrd", boot.initrd_path.as_deref())?;
                next.boot_source = Some(boot);
            }
            ("PUT" | "PATCH", ["machine-config"]) => {
                let put = || Machine::read(node);
                next.machine = text(if method == "PUT" { put() } else { settings.machine.update(node) })?;
                next.check_balloon(next.machine.mem_size_mib)?;
            }
            ("PUT", ["drives", id]) => {
                let drive = text(Drive::read(node))?;
                same_id(id, &drive.drive_id)?;
                must_open("drive's", Some(&drive.path_on_host))?;
                text(next.put_drive(drive, node.at))?;
            }
            ("PUT", ["network-interfaces", id]) => {
                let card = text(NetworkInterface::read(node))?;
                same_id(id, &card.iface_id)?;
                text(next.put_interface(card, node.at))?;
            }
            ("PUT", ["vsock"]) => next.vsock = Some(text(devices::read_vsock(node))?),
            ("PUT", ["entropy"]) => next.entropy = Some(text(devices::read_entropy(node))?),
            ("PUT", ["serial"]) => next.serial = Some(text(Serial::read(node))?),
            ("PUT", ["cpu-config"]) => next.cpu_config = text(firecracker::cpu::read(node))?,
            ("PUT", ["logger"]) => next.logger = Some(text(Logger::read(node))?),
            ("PUT", ["metrics"]) => next.metrics = Some(text(Metrics::read(node))?),
            (_, ["mmds", ..]) => return Err(firecracker::NO_MMDS.into()),
            (_, ["pmem", _]) => return Err(firecracker::NO_PMEM.into()),
            _ => return Err(firecracker::NO_HOTPLUG.into()),
        }
        if self.running.is_some() {
            return Err(NOT_AFTER.into());
        }
        if let (["logger"], Some(program), Some(logger)) = (segments, program, &next.logger) {
            program.log(logger)?;
        }
        if let (["metrics"], Some(metrics)) = (segments, &next.metrics) {
            self.metrics = Some(self.open_metrics(&metrics.metrics_path)?);
        }
        self.settings = next;
        done()
    }

    fn instance(&self) -> Json {
        let state = match &self.running {
            None => "Not started",
            Some(running) if running.is_paused() => "Paused",
            Some(_) => "Running",
        };
        json!({"id": self.id, "state": state, "vmm_version": VERSION, "app_name": "Firecracker"})
    }

    fn running(&mut self) -> Result<&mut Running, String> {
        self.running.as_mut().ok_or(NOT_BEFORE.into())
    }

    fn action(&mut self, node: &Node, program: Option<&mut dyn Program>) -> Answer {
        const ACTIONS: &[&str] = &["InstanceStart", "SendCtrlAltDel", "FlushMetrics"];
        let table = text(node.table(&["action_type"]))?;
        match text(table.choice("action_type", ACTIONS).and_then(|it| it.ok_or_else(|| table.missing("action_type"))))?
        {
            0 => self.start(program),
            1 => self.running()?.ctrl_alt_del(),
            _ => self.flush_metrics(),
        }
    }

    fn start(&mut self, program: Option<&mut dyn Program>) -> Answer {
        let Some(program) = program.filter(|_| self.running.is_none()) else { return Err(NOT_AFTER.into()) };
        if self.settings.boot_source.is_none() {
            return Err("Cannot start microvm without kernel configuration.".into());
        }
        let handle = program.start(&self.settings)?;
        self.started(handle);
        done()
    }

    fn set_state(&mut self, node: &Node, begin: Instant) -> Answer {
        const STATES: &[&str] = &["Paused", "Resumed"];
        let table = text(node.table(&["state"]))?;
        let state = text(table.choice("state", STATES).and_then(|it| it.ok_or_else(|| table.missing("state"))))?;
        let began = Instant::now();
        let answer = self.running()?.set_paused(state == 0)?;
        self.took(if state == 0 { "pause_vm" } else { "resume_vm" }, begin, began);
        Ok(answer)
    }

    fn create_snapshot(&mut self, node: &Node, begin: Instant) -> Answer {
        let began = Instant::now();
        let create = text(Create::read(node))?;
        let what = if create.diff { "diff_create_snapshot" } else { "full_create_snapshot" };
        let answer = self.running()?.snapshot(create)?;
        self.took(what, begin, began);
        Ok(answer)
    }

    fn balloon(&mut self, method: &str, rest: &[&str], node: &Node) -> Answer {
        const NONE: &str = "No balloon device found.";
        let Self { settings, running, .. } = self;
        if (method, rest) == ("PUT", &[]) {
            let balloon = text(Balloon::read(node))?;
            if running.is_some() {
                return Err(NOT_AFTER.into());
            }
            let next = Settings { balloon: Some(balloon), ..settings.clone() };
            next.check_balloon(next.machine.mem_size_mib)
                .map_err(|_| "The balloon device target size is larger than the memory size (MiB).".to_owned())?;
            *settings = next;
            return done();
        }
        let update = match (method, rest) {
            ("PATCH", []) => Some(("amount_mib", u64::from(u32::MAX))),
            ("PATCH", ["statistics"]) => Some(("stats_polling_interval_s", u64::from(u16::MAX))),
            _ => None,
        };
        let value = update.map(|(key, max)| number(node, key, max)).transpose()?;
        match (method, rest) {
            ("GET", []) => settings.balloon.as_ref().map(|it| Response::found(&it.to_json())).ok_or(NONE.into()),
            (_, ["hinting", ..]) => {
                Err("bantam's balloon has no free page hinting: it has free page reporting.".into())
            }
            _ => {
                let running = running.as_mut().ok_or(NOT_BEFORE)?;
                let balloon = settings.balloon.as_mut().ok_or(NONE)?;
                running.balloon(balloon, value, rest.is_empty())
            }
        }
    }

    fn patch_drive(&mut self, id: &str, node: &Node) -> Answer {
        const KEYS: &[&str] = &["drive_id", "path_on_host", "rate_limiter"];
        let table = text(node.table(KEYS))?;
        same_id(id, named(&table, "drive_id")?)?;
        let path = text(table.text("path_on_host"))?;
        let limiter = text(table.read("rate_limiter", firecracker::Limiter::read))?;
        let running = self.running.as_mut().ok_or(NOT_BEFORE)?;
        let index = self.settings.drives_in_order().position(|drive| drive.drive_id == id);
        let drive = self.settings.drives.iter_mut().find(|drive| drive.drive_id == id);
        let (Some(index), Some(drive)) = (index, drive) else { return Err(format!("There is no drive `{id}`.")) };
        running.change_drive(index, drive, path, limiter)
    }

    fn patch_interface(&mut self, id: &str, node: &Node) -> Answer {
        const KEYS: &[&str] = &["iface_id", "rx_rate_limiter", "tx_rate_limiter"];
        let table = text(node.table(KEYS))?;
        same_id(id, named(&table, "iface_id")?)?;
        let limiter = |key| text(table.read(key, firecracker::Limiter::read));
        let limiters = [limiter("rx_rate_limiter")?, limiter("tx_rate_limiter")?];
        let running = self.running.as_mut().ok_or(NOT_BEFORE)?;
        let card = self.settings.interfaces.iter_mut().enumerate().find(|(_, card)| card.iface_id == id);
        let Some((index, card)) = card else { return Err(format!("There is no network interface `{id}`.")) };
        running.change_interface(index, card, limiters)
    }

    fn load_snapshot(&mut self, node: &Node, program: Option<&mut dyn Program>, begin: Instant) -> Answer {
        let load = text(Load::read(node))?;
        let Some(program) = program.filter(|_| self.running.is_none()) else { return Err(NOT_AFTER.into()) };
        let is_fresh = Settings { logger: None, metrics: None, ..self.settings.clone() } == Settings::default();
        if !is_fresh {
            return Err("Loading a microVM snapshot not allowed after configuring boot-specific resources.".into());
        }
        let began = Instant::now();
        let snapshot = load.open()?;
        let settings = Settings::of(&snapshot.config);
        let handle = program.restore(snapshot, !load.resume)?;
        self.settings =
            Settings { logger: self.settings.logger.take(), metrics: self.settings.metrics.take(), ..settings };
        self.took("load_snapshot", begin, began);
        self.run(Running::new(handle));
        done()
    }

    fn open_metrics(&self, path: &str) -> Result<Lines, String> {
        if self.metrics.is_some() {
            return Err("The metrics system has been initialized already.".into());
        }
        let opened = Lines::open(Path::new(path));
        opened.map_err(|error| format!("The metrics file {path} cannot be opened: {error}"))
    }

    fn flush_metrics(&mut self) -> Answer {
        let is_told = self.settings.metrics.is_some();
        let running = self.running()?;
        if is_told { running.flush_metrics() } else { done() }
    }
}

/// The path that a request is for: its target without what may be around it.
fn path(target: &str) -> &str {
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    target.split(['?', '#']).next().unwrap_or_default()
}

/// Whether there is such a request.
fn is_known(method: &str, segments: &[&str]) -> bool {
    let methods: &[&str] = match segments {
        [""] | ["version"] | ["vm", "config"] | ["balloon", "hinting", "status"] => &["GET"],
        ["machine-config"] | ["balloon"] | ["mmds"] | ["hotplug", "memory"] => &["GET", "PUT", "PATCH"],
        ["balloon", "statistics"] => &["GET", "PATCH"],
        ["balloon", "hinting", "start" | "stop"] | ["vm"] => &["PATCH"],
        ["drives" | "network-interfaces" | "pmem", _] => &["PUT", "PATCH"],
        ["actions" | "boot-source" | "cpu-config" | "entropy" | "logger" | "metrics" | "serial" | "vsock"]
        | ["mmds", "config"]
        | ["snapshot", "create" | "load"] => &["PUT"],
        _ => &[],
    };
    methods.contains(&method)
}

fn parse(body: &[u8]) -> Result<Node, String> {
    let wrong = |what: String| format!("An error occurred when deserializing the json body of a request: {what}.");
    let body = std::str::from_utf8(body).map_err(|error| wrong(error.to_string()))?;
    json::parse(body).map_err(|error| wrong(error.to_string()))
}

/// The words of an error in the body.
fn text<T>(result: Result<T, Error>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

fn number(node: &Node, key: &'static str, max: u64) -> Result<u64, String> {
    let keys: &'static [&'static str] =
        if key == "amount_mib" { &["amount_mib"] } else { &["stats_polling_interval_s"] };
    let table = text(node.table(keys))?;
    text(table.number(key, 0, max).and_then(|it| it.ok_or_else(|| table.missing(key))))
}

fn named<'a>(table: &Table<'a>, key: &str) -> Result<&'a str, String> {
    text(table.text(key).and_then(|it| it.ok_or_else(|| table.missing(key))))
}

fn same_id(path: &str, body: &str) -> Result<(), String> {
    match path == body {
        true => Ok(()),
        false => Err(format!("The id from the path [{path}] does not match the id from the body!")),
    }
}

/// Checks that a file can be opened, as far as it is there.
fn must_open(what: &str, path: Option<&str>) -> Result<(), String> {
    let opened = path.map(|path| (path, rustix::fs::access(path, rustix::fs::Access::READ_OK)));
    match opened {
        Some((path, Err(error))) => Err(format!("The {what} file {path} cannot be opened: {error}.")),
        _ => Ok(()),
    }
}

/// An error and its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        words = format!("{words}: {cause}");
        next = cause.source();
    }
    words
}
