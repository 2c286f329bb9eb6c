//! A machine's counters under Firecracker's names, and in its structure, for the programs that read those.
//!
//! What bantam does not count is 0. As there, a line has what came since the line before it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::Report;

/// The sections that are always there, and what is in them; an `_agg` is an object of its own.
const SECTIONS: &[(&str, &str)] = &[
    (
        "api_server",
        "process_startup_time_us process_startup_time_cpu_us sync_response_fails sync_vmm_send_timeout_count",
    ),
    (
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails \
         free_page_report_count free_page_report_freed",
    ),
    ("block", BLOCK),
    ("deprecated_api", "deprecated_http_api_calls deprecated_cmd_line_api_calls"),
    (
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
         entropy_rate_limiter_throttled rate_limiter_event_count",
    ),
    ("get_api_requests", "instance_info_count machine_cfg_count mmds_count vmm_version_count"),
    ("i8042", "error_count missed_read_count missed_write_count read_count write_count reset_count"),
    (
        "latencies_us",
        "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm vmm_full_create_snapshot \
         vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
    ),
    ("logger", "missed_metrics_count metrics_fails missed_log_count log_fails"),
    (
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token rx_count tx_bytes \
         tx_count tx_errors tx_frames connections_created connections_destroyed",
    ),
    ("net", NET),
    (
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails mmds_count mmds_fails",
    ),
    (
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails logger_count \
         logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails metrics_count metrics_fails \
         network_count network_fails mmds_count mmds_fails vsock_count vsock_fails",
    ),
    ("seccomp", "num_faults"),
    ("signals", "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill"),
    (
        "uart",
        "error_count flush_count missed_read_count missed_write_count read_count write_count \
         rate_limiter_dropped_bytes",
    ),
    (
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures exit_io_in_agg exit_io_out_agg \
         exit_mmio_read_agg exit_mmio_write_agg",
    ),
    ("vmm", "device_events panic_count"),
    (
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails muxer_event_fails \
         conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count \
         tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails \
         rx_read_fails",
    ),
];

const BLOCK: &str = "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count \
                     queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes \
                     read_count write_count read_agg write_agg rate_limiter_throttled_events \
                     io_engine_throttled_events remaining_reqs_count";

const NET: &str = "activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer event_fails \
                   rx_queue_event_count rx_event_rate_limiter_count rx_partial_writes rx_rate_limiter_throttled \
                   rx_tap_event_count rx_bytes_count rx_packets_count rx_fails rx_count tap_read_fails tap_write_fails \
                   tap_write_agg tx_bytes_count tx_malformed_frames tx_fails tx_count tx_packets_count tx_partial_reads \
                   tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled tx_spoofed_mac_count \
                   tx_remaining_reqs_count";

/// A counter of the report, and what it is there: `DEVICE.COUNTER SECTION NAME`.
const NAMES: &[(&str, &str, &str, &str)] = &[
    ("blk", "reads", "block", "read_count"),
    ("blk", "read-bytes", "block", "read_bytes"),
    ("blk", "writes", "block", "write_count"),
    ("blk", "written-bytes", "block", "write_bytes"),
    ("blk", "flushes", "block", "flush_count"),
    ("blk", "errors", "block", "execute_fails"),
    ("blk", "throttled", "block", "rate_limiter_throttled_events"),
    ("net", "rx-packets", "net", "rx_packets_count"),
    ("net", "rx-packets", "net", "rx_count"),
    ("net", "rx-bytes", "net", "rx_bytes_count"),
    ("net", "rx-drops", "net", "rx_fails"),
    ("net", "rx-errors", "net", "tap_read_fails"),
    ("net", "rx-stops", "net", "no_rx_avail_buffer"),
    ("net", "rx-throttled", "net", "rx_rate_limiter_throttled"),
    ("net", "tx-packets", "net", "tx_packets_count"),
    ("net", "tx-packets", "net", "tx_count"),
    ("net", "tx-bytes", "net", "tx_bytes_count"),
    ("net", "tx-drops", "net", "tap_write_fails"),
    ("net", "tx-errors", "net", "tx_malformed_frames"),
    ("net", "tx-throttled", "net", "tx_rate_limiter_throttled"),
    ("balloon", "inflated", "balloon", "inflate_count"),
    ("balloon", "deflated", "balloon", "deflate_count"),
    ("balloon", "statistics", "balloon", "stats_updates_count"),
    ("balloon", "reported-bytes", "balloon", "free_page_report_freed"),
    ("balloon", "errors", "balloon", "event_fails"),
    ("rng", "requests", "entropy", "entropy_event_count"),
    ("rng", "bytes", "entropy", "entropy_bytes"),
    ("rng", "errors", "entropy", "host_rng_fails"),
    ("rng", "throttled", "entropy", "entropy_rate_limiter_throttled"),
    ("vsock", "rx-packets", "vsock", "rx_packets_count"),
    ("vsock", "rx-bytes", "vsock", "rx_bytes_count"),
    ("vsock", "tx-packets", "vsock", "tx_packets_count"),
    ("vsock", "tx-bytes", "vsock", "tx_bytes_count"),
    ("vsock", "connections-from-guest", "vsock", "conns_added"),
    ("vsock", "connections-to-guest", "vsock", "conns_added"),
    ("vsock", "resets", "vsock", "conns_killed"),
    ("serial", "read-bytes", "uart", "read_count"),
    ("serial", "written-bytes", "uart", "write_count"),
    ("serial", "dropped-bytes", "uart", "rate_limiter_dropped_bytes"),
    ("serial", "errors", "uart", "error_count"),
    ("keyboard", "reads", "i8042", "read_count"),
    ("keyboard", "writes", "i8042", "write_count"),
    ("keyboard", "resets", "i8042", "reset_count"),
    ("vcpu", "port-reads", "vcpu", "exit_io_in"),
    ("vcpu", "port-writes", "vcpu", "exit_io_out"),
    ("vcpu", "mmio-reads", "vcpu", "exit_mmio_read"),
    ("vcpu", "mmio-writes", "vcpu", "exit_mmio_write"),
    ("vcpu", "failures", "vcpu", "failures"),
];

/// From one line to the next, unless somebody says otherwise.
const INTERVAL: Duration = Duration::from_secs(60);

/// What happens outside of the machine, and is told with its counters: requests, and how long they took.
#[derive(Debug, Default)]
pub struct Counts(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    /// What came since the last line, by section and name.
    events: BTreeMap<(String, String), u64>,
    /// The last latencies, in microseconds.
    latencies: BTreeMap<String, u64>,
}

impl Counts {
    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened. What has no name in the section is not told.
    pub fn count(&self, section: impl Into<String>, name: impl Into<String>) {
        *self.counted().events.entry((section.into(), name.into())).or_default() += 1;
    }

    /// Something took so long.
    pub fn took(&self, what: impl Into<String>, time: Duration) {
        self.counted().latencies.insert(what.into(), u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Puts them into a line.
    fn tell(&self, line: &mut Map<String, Value>) {
        let mut counted = self.counted();
        let events = std::mem::take(&mut counted.events).into_iter();
        let latencies = counted.latencies.iter().map(|(what, time)| (("latencies_us".into(), what.clone()), *time));
        for ((section, name), number) in events.chain(latencies) {
            if let Some(place) = line.get_mut(&section).and_then(|section| section.get_mut(&name)) {
                *place = number.into();
            }
        }
    }
}

/// Makes lines of reports.
#[derive(Debug)]
pub struct Metrics {
    /// From one line to the next.
    interval: Duration,
    /// What happens outside of the machine.
    counts: Arc<Counts>,
    /// What devices are called there, by their names in the report.
    ids: BTreeMap<String, String>,
    /// What each line has beside the counters.
    more: Map<String, Value>,
    /// How long the process took until it was ready, in microseconds: by the clock, and of CPU time.
    startup: [u64; 2],
    /// The counters of the last line.
    before: BTreeMap<String, Value>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            interval: INTERVAL,
            counts: Arc::default(),
            ids: BTreeMap::new(),
            more: Map::new(),
            startup: [0; 2],
            before: BTreeMap::new(),
        }
    }
}

impl Metrics {
    /// For a machine whose devices have these ids, by their names in the report; others keep those.
    pub fn new(ids: BTreeMap<String, String>) -> Self {
        Self { ids, ..Self::default() }
    }

    /// Has lines come this often, in place of each minute.
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// From one line to the next.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Has each line tell what happens outside of the machine.
    pub fn counts(mut self, counts: Arc<Counts>) -> Self {
        self.counts = counts;
        self
    }

    /// Has each line say more than counters, under these names.
    pub fn more(mut self, more: Map<String, Value>) -> Self {
        self.more = more;
        self
    }

    /// Has each line say how long the process took until it was ready, in microseconds: by the clock, and of CPU time.
    pub fn startup(mut self, [time, cpu_time]: [u64; 2]) -> Self {
        self.startup = [time, cpu_time];
        self
    }

    /// The next line; so many of those before it found no room.
    pub fn line(&mut self, report: &Report, missed: u64) -> Value {
        let mut line = self.more.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.insert("utc_timestamp_ms".into(), u64::try_from(now.as_millis()).unwrap_or(u64::MAX).into());
        for (section, names) in SECTIONS {
            line.insert((*section).into(), zeros(names));
        }
        for (name, time) in ["process_startup_time_us", "process_startup_time_cpu_us"].iter().zip(self.startup) {
            line["api_server"][name] = time.into();
        }
        for (device, counters) in &report.statistics {
            let id = self.ids.get(device).unwrap_or(device);
            let kind = device.trim_end_matches(|c: char| c.is_ascii_digit());
            // Disks and network cards have a section of their own beside that of all.
            let own = match kind {
                "blk" => Some((format!("block_{id}"), BLOCK)),
                "net" => Some((format!("net_{id}"), NET)),
                _ => None,
            };
            if let Some((section, names)) = &own {
                line.insert(section.clone(), zeros(names));
            }
            let before = self.before.get(device);
            for (_, counter, section, name) in NAMES.iter().filter(|name| name.0 == kind) {
                let count = |counters: &Value| counters[counter].as_u64().unwrap_or(0);
                let since = count(counters).saturating_sub(before.map_or(0, count));
                for section in [Some(*section), own.as_ref().map(|own| &*own.0)].into_iter().flatten() {
                    let sum = line[section][name].as_u64().unwrap_or(0) + since;
                    line[section][name] = sum.into();
                }
            }
        }
        self.counts.tell(&mut line);
        line["logger"]["missed_metrics_count"] = missed.into();
        self.before.clone_from(&report.statistics);
        Value::Object(line)
    }
}

fn zeros(names: &str) -> Value {
    let zero =
        |name: &str| if name.ends_with("_agg") { json!({"min_us": 0, "max_us": 0, "sum_us": 0}) } else { 0.into() };
    names.split_whitespace().map(|name| (name.to_owned(), zero(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(reads: u64) -> Report {
        let statistics = json!({
            "blk0": {"reads": reads, "interrupts": 9},
            "blk1": {"reads": 5},
            "vcpu0": {"port-writes": 2},
            "vcpu1": {"port-writes": 3},
        });
        Report { statistics: serde_json::from_value(statistics).unwrap(), ..Default::default() }
    }

    #[test]
    fn lines_have_what_came_since_the_last_one() {
        let more = Map::from_iter([("id".to_owned(), "one".into())]);
        let mut metrics = Metrics::new([("blk0".into(), "rootfs".into())].into()).more(more).startup([9, 5]);
        let first = metrics.line(&report(7), 0);
        assert_eq!((&first["block"]["read_count"], &first["block_rootfs"]["read_count"]), (&12.into(), &7.into()));
        assert_eq!((&first["block_blk1"]["read_count"], &first["vcpu"]["exit_io_out"]), (&5.into(), &5.into()));
        let second = metrics.line(&report(10), 2);
        assert_eq!((&second["block"]["read_count"], &second["block_rootfs"]["read_count"]), (&3.into(), &3.into()));
        assert_eq!(second["block"]["write_agg"]["sum_us"], 0);
        // No counters: they are said each time.
        let startup =
            ["process_startup_time_us", "process_startup_time_cpu_us"].map(|name| &second["api_server"][name]);
        assert_eq!((&second["id"], startup), (&"one".into(), [&9.into(), &5.into()]));
        assert!(second["utc_timestamp_ms"].as_u64() > Some(1 << 40));
        assert_eq!((&first["logger"]["missed_metrics_count"], metrics.interval()), (&0.into(), INTERVAL));
        assert_eq!(second["logger"]["missed_metrics_count"], 2);
    }

    #[test]
    fn what_happens_outside_is_told_once_and_latencies_stay() {
        let counts = Arc::new(Counts::default());
        let mut metrics = Metrics::default().counts(counts.clone());
        counts.count("put_api_requests", "drive_count");
        counts.count("put_api_requests", "drive_count");
        counts.count("get_api_requests", "drive_count");
        counts.took("pause_vm", Duration::from_millis(3));
        let [first, second] = [(); 2].map(|()| metrics.line(&report(0), 0));
        assert_eq!(
            (&first["put_api_requests"]["drive_count"], &second["put_api_requests"]["drive_count"]),
            (&2.into(), &0.into())
        );
        assert!(first["get_api_requests"].get("drive_count").is_none());
        assert_eq!(
            (&first["latencies_us"]["pause_vm"], &second["latencies_us"]["pause_vm"]),
            (&3000.into(), &3000.into())
        );
    }

    #[test]
    fn every_name_is_in_its_section() {
        for (_, _, section, name) in NAMES {
            let (_, names) = SECTIONS.iter().find(|(it, _)| it == section).unwrap();
            assert!(names.split_whitespace().any(|it| it == *name), "{section}.{name}");
        }
    }
}
