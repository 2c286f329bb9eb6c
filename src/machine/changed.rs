//! What was changed of a machine while it runs, in its configuration: a snapshot is of the machine as it is.

use crate::config::{Config, Directions};
use crate::virtio::blk;
use crate::virtio::change::{Change, Rates};

/// Has `config` say what became of the device called `name`, which is that in the report.
pub fn apply(config: &mut Config, name: &str, change: Change) {
    let number = |prefix: &str| name.strip_prefix(prefix)?.parse::<usize>().ok();
    match change {
        Change::Disk(opened) => match number("blk").and_then(|index| disk(config, index)) {
            Some(disk) => disk.path = opened.path().into(),
            None => config.rootfs = Some(opened.path().into()),
        },
        Change::Rates(rates) => {
            // The root has no limits of its own in a configuration.
            if let Some(disk) = number("blk").and_then(|index| disk(config, index)) {
                (disk.bw, disk.iops) = (rates.bytes, rates.operations);
            } else if name == "rng" {
                (config.rng_bw, config.rng_iops) = (rates.bytes, rates.operations);
            }
        }
        Change::NetRates { rx, tx } => {
            if let Some(net) = number("net").and_then(|index| config.nets.get_mut(index)) {
                let limits = |of: Option<Directions>| of.map_or((None, None), |limits| (limits.rx, limits.tx));
                let ((rx_bytes, tx_bytes), (rx_frames, tx_frames)) = (limits(net.bw), limits(net.pps));
                let rx = rx.unwrap_or(Rates { bytes: rx_bytes, operations: rx_frames });
                let tx = tx.unwrap_or(Rates { bytes: tx_bytes, operations: tx_frames });
                net.bw = Directions::new(rx.bytes, tx.bytes);
                net.pps = Directions::new(rx.operations, tx.operations);
            }
        }
        Change::Balloon(size) => {
            // None is written as no size.
            let size = Some(size).filter(|size| size.get() > 0);
            config.balloon.iter_mut().for_each(|balloon| balloon.size = size);
        }
        Change::StatisticsInterval(time) => config.balloon.iter_mut().for_each(|balloon| balloon.stats = Some(time)),
    }
}

/// The disk of that number, if it is not the root, which comes first.
fn disk(config: &mut Config, index: usize) -> Option<&mut blk::Spec> {
    let first = config.all_disks().count() - config.disks.len();
    config.disks.get_mut(index.checked_sub(first)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::size::Size;
    use crate::virtio::balloon;

    #[test]
    fn what_a_device_became_is_in_its_place() {
        let balloon = balloon::Spec { stats: Some(Duration::from_secs(1)), ..Default::default() };
        let net = serde_json::from_str(r#"{"tap": "tap0", "bw": "1M"}"#).unwrap();
        let mut config = Config::new().rootfs("/root").disk(blk::Spec::new("/disk")).net(net).balloon(balloon);
        let (bytes, operations) = (Some("3M".parse().unwrap()), Some("7".parse().unwrap()));
        let rates = Rates { bytes, operations };
        let [root, disk] = ["root", "disk"].map(|_| tempfile::NamedTempFile::new().unwrap());
        let open = |file: &tempfile::NamedTempFile| Change::Disk(blk::Opened::open(file.path(), true).unwrap());
        for (name, change) in [
            ("blk0", open(&root)),
            ("blk1", open(&disk)),
            ("blk0", Change::Rates(rates)),
            ("blk1", Change::Rates(rates)),
            ("rng", Change::Rates(rates)),
            ("net0", Change::NetRates { rx: Some(rates), tx: None }),
            ("balloon", Change::Balloon(Size::mib(5))),
            ("balloon", Change::StatisticsInterval(Duration::from_secs(9))),
        ] {
            apply(&mut config, name, change);
        }
        assert_eq!(config.rootfs.as_deref(), Some(root.path()));
        assert_eq!(config.disks, [blk::Spec { bw: bytes, iops: operations, ..blk::Spec::new(disk.path()) }]);
        assert_eq!((config.rng_bw, config.rng_iops), (bytes, operations));
        let limits = [config.nets[0].bw, config.nets[0].pps].map(|limits| limits.unwrap().to_string());
        assert_eq!(limits, ["3M:1M", "7:"]);
        let balloon = config.balloon.clone().unwrap();
        assert_eq!((balloon.size, balloon.stats), (Some(Size::mib(5)), Some(Duration::from_secs(9))));
        apply(&mut config, "balloon", Change::Balloon(Size::bytes(0)));
        assert_eq!(config.balloon.unwrap().size, None);
    }
}
