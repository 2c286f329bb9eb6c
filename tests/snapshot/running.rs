//! Machines that are saved while they run.

use bantam::virtio::net::vhost;

use super::*;

#[test]
fn a_guest_goes_on_while_it_is_saved_as_it_was() {
    let lab = Lab::new(Kernel::Tiny, COUNTER.replace("exec 9>/dev/vda", "exec 9>/count").as_str());
    let (full, diff) = (lab.path("full"), lab.path("diff"));
    let first = Running::start(Builder::new(lab.config.clone()));
    let mut noise = None;
    let mut goes_on = |machine: Running, destination: Destination, folder: &Path| {
        let before = machine.screen.wait_until(|seen| counts(seen).len() > 2);
        let noise = noise.get_or_insert_with(|| values(&before, "noise")[0].to_owned());
        machine.handle.snapshot(destination).unwrap();
        let after = machine.screen.wait_until(|seen| counts(seen).len() > counts(&before).len() + 12);
        assert!(counts(&after).windows(2).all(|two| two[1] == two[0] + 1), "{after}");
        machine.stop();
        // What is restored goes on from where it was saved, not from where it went after that.
        let again = Running::restore(folder);
        let text = again.screen.wait_until(|seen| values(seen, "noise").len() > 1);
        let (from, to) = (*counts(&before).last().unwrap(), *counts(&after).last().unwrap());
        assert!((from..to).contains(&(counts(&text)[0] - 1)), "{before} {text}");
        assert!(counts(&text).windows(2).all(|two| two[1] == two[0] + 1), "{text}");
        assert!(values(&text, "noise").iter().all(|seen| seen == noise), "{text}");
        again
    };
    let again = goes_on(first, Destination::Folder(full.clone()), &full);
    goes_on(again, Destination::Diff(diff.clone()), &diff).stop();
}

/// Each CPU counts in a sector of its own, by the queue of its own, and flushes each count.
const TWO_QUEUES: &str = r#"
count() {
    i=0
    while :; do
        i=$((i + 1))
        printf %512s "$i" | taskset -c $1 dd of=/dev/vda seek=$1 oflag=direct conv=notrunc,fsync status=none
        echo "cpu$1=$i end"
    done
}
count 0 &
count 1
"#;

#[test]
fn all_queues_of_a_disk_go_on() {
    let mut lab = Lab::new(Kernel::Tiny, TWO_QUEUES);
    let (disk, saved) = (lab.disk("disk"), lab.path("saved"));
    let spec = blk::Spec { queues: 2, engine: blk::Engine::IoUring, ..blk::Spec::new(&disk) };
    lab.config = lab.config.cpus(2).disk(spec);
    let cpu = |text: &str, cpu: u64| -> Vec<u64> {
        values(text, &format!("cpu{cpu}")).iter().map(|count| count.parse().unwrap()).collect()
    };
    let mut printed = String::new();
    let mut machine = Running::start(Builder::new(lab.config.clone()));
    for _ in 0..3 {
        machine.screen.wait_until(|seen| [0, 1].iter().all(|number| cpu(seen, *number).len() >= 2));
        machine.handle.pause().unwrap();
        machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
        printed += &machine.stop();
        let state: serde_json::Value = snapshot::decode(&fs::read(saved.join("state")).unwrap()).unwrap();
        let positions = &state["devices"]["memory 0xd0000000"]["positions"];
        let positions: Vec<(u16, u16)> = serde_json::from_value(positions.clone()).unwrap();
        assert!(
            positions.len() == 2 && positions.iter().all(|(next, used)| next == used && *next >= 2),
            "{positions:?}"
        );
        machine = Running::restore(&saved);
    }
    machine.screen.wait_until(|seen| [0, 1].iter().all(|number| cpu(seen, *number).len() >= 2));
    printed += &machine.stop();
    let disk = fs::read(&disk).unwrap();
    for number in 0..2 {
        let all = cpu(&printed, number);
        assert!(all[0] == 1 && all.windows(2).all(|two| two[1] == two[0] + 1), "{printed}");
        let sector = &disk[512 * usize::try_from(number).unwrap()..][..512];
        let count: u64 = std::str::from_utf8(sector).unwrap().trim().parse().unwrap();
        let last = *all.last().unwrap();
        assert!((last..=last + 1).contains(&count), "{count} is on the disk, and {last} was said");
    }
    let mut snapshot = Snapshot::open(&saved).unwrap();
    snapshot.config.disks[0].queues = 1;
    let error = Builder::restore(snapshot).console(Console::to(std::io::sink())).build().err().unwrap();
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("its queues are other than here: it had 2, and here it has 1"), "{error}: {cause}");
}

#[test]
fn all_queues_of_a_network_card_go_on() {
    let network = Namespace::new();
    network.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap", "multi_queue"]);
    network.ip(&["address", "add", "10.0.0.1/24", "dev", "tap0"]);
    network.ip(&["link", "set", "tap0", "up"]);
    // Each CPU sends by a queue of its own.
    let script = "
        ip address add 10.0.0.2/24 dev eth0
        ip link set eth0 up
        i=0
        while :; do
            i=$((i + 1))
            for cpu in 0 1; do taskset -c $cpu ping -c 1 -w 60 10.0.0.1 >/dev/null; echo \"cpu$cpu=$i end\"; done
        done
    ";
    let mut lab = Lab::new(Kernel::Debian61, script);
    let saved = lab.path("saved");
    let card = net::Spec { tap: Some("tap0".into()), queues: Some(3), ..Default::default() };
    lab.config = lab.config.memory(Size::mib(256)).cpus(2).net(card);
    let answered = |machine: &Running| {
        machine.screen.wait_until(|seen| ["cpu0", "cpu1"].iter().all(|cpu| values(seen, cpu).len() > 3));
    };
    let mut machine = network.inside(|| Running::start(Builder::new(lab.config.clone())));
    let mut sent = (0, 0);
    for vhost in [vhost::Mode::Auto, vhost::Mode::Off] {
        answered(&machine);
        machine.handle.pause().unwrap();
        machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
        machine.stop();
        let state: serde_json::Value = snapshot::decode(&fs::read(saved.join("state")).unwrap()).unwrap();
        let card = &state["devices"]["memory 0xd0000000"];
        assert_eq!(card["queue-pairs"], 2, "Linux uses as many as it has CPUs");
        let next = |queue: usize| card["positions"][queue][0].as_u64().unwrap();
        let now = (next(1), next(3));
        assert!(now.0 > sent.0 && now.1 > sent.1, "{sent:?} {now:?}");
        sent = now;
        let mut snapshot = Snapshot::open(&saved).unwrap();
        snapshot.config.nets[0].vhost = Some(vhost);
        machine = network.inside(|| Running::start(Builder::restore(snapshot)));
    }
    answered(&machine);
    machine.stop();
}
