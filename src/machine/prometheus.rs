//! A machine's counters in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Report;

impl Report {
    /// The counters and the durations as Prometheus reads them (text format 0.0.4): `bantam_blk_reads_total{device="blk0"}`.
    pub fn to_prometheus(&self) -> String {
        let mut families = BTreeMap::<String, Vec<(&str, u64)>>::new();
        for (device, counters) in &self.statistics {
            let kind = device.trim_end_matches(|c: char| c.is_ascii_digit());
            for (counter, count) in counters.as_object().into_iter().flatten() {
                let Some(count) = count.as_u64() else { continue };
                let name = format!("bantam_{kind}_{}_total", counter.replace('-', "_"));
                families.entry(name).or_default().push((device, count));
            }
        }
        let mut text = String::new();
        for (name, samples) in families {
            let _ = writeln!(text, "# TYPE {name} counter");
            for (device, count) in samples {
                let _ = writeln!(text, "{name}{{device=\"{device}\"}} {count}");
            }
        }
        let reached = [
            ("kernel-loaded", self.durations.kernel_loaded),
            ("first-kvm-run", self.durations.first_kvm_run),
            ("first-console-byte", self.durations.first_console_byte),
            ("user-space", self.durations.user_space),
            ("command", self.durations.command),
        ];
        text.push_str("# TYPE bantam_reached_seconds gauge\n");
        for (stage, duration) in reached.into_iter().filter_map(|(stage, duration)| Some((stage, duration?))) {
            let _ = writeln!(text, "bantam_reached_seconds{{stage=\"{stage}\"}} {}", duration.as_secs_f64());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::machine::Durations;

    #[test]
    fn counters_of_one_name_are_together() {
        let statistics = serde_json::json!({
            "blk0": {"read-bytes": 512, "reads": 1},
            "blk1": {"read-bytes": 1024, "reads": 2},
            "vcpu0": {"port-reads": 3},
        });
        let durations = Durations { user_space: Some(Duration::from_millis(1500)), ..Default::default() };
        let statistics = serde_json::from_value(statistics).unwrap();
        let text = Report { statistics, durations, ..Default::default() }.to_prometheus();
        let expected = "\
# TYPE bantam_blk_read_bytes_total counter
bantam_blk_read_bytes_total{device=\"blk0\"} 512
bantam_blk_read_bytes_total{device=\"blk1\"} 1024
# TYPE bantam_blk_reads_total counter
bantam_blk_reads_total{device=\"blk0\"} 1
bantam_blk_reads_total{device=\"blk1\"} 2
# TYPE bantam_vcpu_port_reads_total counter
bantam_vcpu_port_reads_total{device=\"vcpu0\"} 3
# TYPE bantam_reached_seconds gauge
bantam_reached_seconds{stage=\"user-space\"} 1.5
";
        assert_eq!(text, expected);
    }
}
