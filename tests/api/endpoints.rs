//! Every endpoint before and after the start: its status, and the shape of its answer.

use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::{Api, idle_kernel};

/// What an answer is like.
#[derive(Debug, Clone, Copy)]
enum Expected {
    /// Done, without a word.
    Done,
    /// 200, with these keys and no others than those of the document.
    Found(&'static [&'static str]),
    /// 400, with a `fault_message` that has these words.
    Refused(&'static str),
}
use Expected::{Done, Found, Refused};

const NOT_BEFORE: Expected = Refused("not supported before starting the microVM");
const NOT_AFTER: Expected = Refused("not supported after starting the microVM");
const MMDS: Expected = Refused("bantam has no metadata service");
const PMEM: Expected = Refused("bantam has no pmem devices");
const HOTPLUG: Expected = Refused("bantam has no hotpluggable memory");

const MACHINE: Expected = Found(&["vcpu_count", "mem_size_mib", "smt", "track_dirty_pages", "huge_pages"]);
const INSTANCE: Expected = Found(&["id", "state", "vmm_version", "app_name"]);
const CONFIG: Expected = Found(&["drives", "machine-config", "network-interfaces"]);

const DRIVE: &str = r#"{"drive_id": "data", "path_on_host": "disk", "is_root_device": false, "is_read_only": false}"#;
const SERIAL: &str =
    r#"{"serial_out_path": "console", "rate_limiter": {"size": 1000, "one_time_burst": 9, "refill_time": 100}}"#;
const LIMITER: &str =
    r#"{"bandwidth": {"size": 1000000, "refill_time": 100}, "ops": {"size": 10, "refill_time": 100}}"#;

const CPU: &str = r#"{
    "kvm_capabilities": ["!121"],
    "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
                         "modifiers": [{"register": "ecx", "bitmap": "0bx0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]}],
    "msr_modifiers": [{"addr": "0x8b", "bitmap": "0b1"}]
}"#;

const CARD: &str = r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01",
    "tx_rate_limiter": {"bandwidth": {"size": 1000, "one_time_burst": 5, "refill_time": 100}}}"#;

/// Method, path, body, what becomes of it before the start, and after it.
const TABLE: &[(&str, &str, &str, Expected, Expected)] = &[
    ("GET", "/", "", INSTANCE, INSTANCE),
    ("GET", "/version", "", Found(&["firecracker_version"]), Found(&["firecracker_version"])),
    ("GET", "/vm/config", "", CONFIG, CONFIG),
    ("GET", "/machine-config", "", MACHINE, MACHINE),
    ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#, Done, NOT_AFTER),
    ("PATCH", "/machine-config", r#"{"mem_size_mib": 32}"#, Done, NOT_AFTER),
    ("PUT", "/boot-source", r#"{"kernel_image_path": "kernel", "boot_args": ""}"#, Done, NOT_AFTER),
    ("PUT", "/drives/data", DRIVE, Done, NOT_AFTER),
    ("PUT", "/entropy", r#"{"rate_limiter": {"ops": {"size": 10, "refill_time": 100}}}"#, Done, NOT_AFTER),
    ("PUT", "/entropy", "{}", Done, NOT_AFTER),
    ("PUT", "/serial", SERIAL, Done, NOT_AFTER),
    ("PUT", "/cpu-config", CPU, Done, NOT_AFTER),
    ("PUT", "/cpu-config", "{}", Done, NOT_AFTER),
    ("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "vsock"}"#, Done, NOT_AFTER),
    ("PUT", "/logger", r#"{"log_path": "log", "level": "Info"}"#, Done, NOT_AFTER),
    ("PUT", "/metrics", r#"{"metrics_path": "metrics"}"#, Done, NOT_AFTER),
    ("GET", "/balloon", "", Refused("No balloon"), Refused("No balloon")),
    ("GET", "/balloon/statistics", "", NOT_BEFORE, Refused("No balloon")),
    ("PATCH", "/balloon", r#"{"amount_mib": 1}"#, NOT_BEFORE, Refused("No balloon")),
    ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 1}"#, NOT_BEFORE, Refused("No balloon")),
    ("PATCH", "/balloon/hinting/start", "", Refused("hinting"), Refused("hinting")),
    ("PATCH", "/balloon/hinting/stop", "", Refused("hinting"), Refused("hinting")),
    ("GET", "/balloon/hinting/status", "", Refused("hinting"), Refused("hinting")),
    ("PATCH", "/vm", r#"{"state": "Resumed"}"#, NOT_BEFORE, Done),
    ("PATCH", "/drives/nothing", r#"{"drive_id": "nothing"}"#, NOT_BEFORE, Refused("no drive `nothing`")),
    ("PATCH", "/network-interfaces/n", r#"{"iface_id": "n"}"#, NOT_BEFORE, Refused("no network interface `n`")),
    ("PUT", "/snapshot/create", r#"{"snapshot_path": "s", "mem_file_path": "m"}"#, NOT_BEFORE, Refused("not paused")),
    ("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#, NOT_BEFORE, Done),
    ("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#, NOT_BEFORE, Done),
    ("GET", "/mmds", "", MMDS, MMDS),
    ("PUT", "/mmds", "{}", MMDS, MMDS),
    ("PATCH", "/mmds", "{}", MMDS, MMDS),
    ("PUT", "/mmds/config", r#"{"network_interfaces": []}"#, MMDS, MMDS),
    ("PUT", "/pmem/p", r#"{"id": "p", "path_on_host": "disk"}"#, PMEM, PMEM),
    ("PATCH", "/pmem/p", r#"{"id": "p"}"#, PMEM, PMEM),
    ("GET", "/hotplug/memory", "", HOTPLUG, HOTPLUG),
    ("PUT", "/hotplug/memory", "{}", HOTPLUG, HOTPLUG),
    ("PATCH", "/hotplug/memory", "{}", HOTPLUG, HOTPLUG),
    // What is wrong at any time.
    (
        "PUT",
        "/cpu-config",
        r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0, "modifiers": [{"register": "eax", "bitmap": "0b2"}]}]}"#,
        Refused("`cpuid_modifiers[0].modifiers[0].bitmap`: `0b2` is no bitmap"),
        Refused("is no bitmap"),
    ),
    (
        "PUT",
        "/cpu-config",
        r#"{"msr_modifiers": [{"addr": "0x1_0000_0000", "bitmap": "0b1"}]}"#,
        Refused("is no number of 32 bits"),
        Refused("`msr_modifiers[0].addr`"),
    ),
    ("PUT", "/cpu-config", r#"{"reg_modifiers": [{}]}"#, Refused("not aarch64"), Refused("not aarch64")),
    ("GET", "/nothing", "", Refused("Invalid request method and/or path: GET /nothing."), Refused("Invalid request")),
    ("DELETE", "/drives/data", "", Refused("Invalid request"), Refused("Invalid request")),
    ("GET", "/", "{}", Refused("cannot have a body"), Refused("cannot have a body")),
    ("PUT", "/actions", "", Refused("Empty PUT request."), Refused("Empty PUT request.")),
    ("PATCH", "/vm", "", Refused("Empty PATCH request."), Refused("Empty PATCH request.")),
    ("PUT", "/actions", "{", Refused("deserializing the json body"), Refused("deserializing the json body")),
    ("PUT", "/actions", "{}", Refused("`action_type` is missing"), Refused("`action_type` is missing")),
    ("PUT", "/actions", r#"{"action_type": "Dance"}"#, Refused("unknown variant `Dance`"), Refused("InstanceStart")),
    ("PUT", "/vsock", r#"{"guest_cid": 2, "uds_path": "v"}"#, Refused("from 3"), Refused("`guest_cid`")),
    ("PUT", "/drives/other", DRIVE, Refused("does not match the id from the body"), Refused("does not match")),
    ("PUT", "/machine-config", r#"{"vcpu_count": 33, "mem_size_mib": 1}"#, Refused("1 to 32"), Refused("1 to 32")),
    ("PATCH", "/machine-config", "{}", Refused("Empty PATCH request."), Refused("Empty PATCH request.")),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path": "none"}"#,
        Refused("kernel file none cannot be opened"),
        Refused("none"),
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path": "s"}"#,
        Refused("`mem_backend` is missing"),
        Refused("`mem_backend`"),
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
        Refused("not allowed after configuring"),
        NOT_AFTER,
    ),
    (
        "PUT",
        "/drives/v",
        r#"{"drive_id": "v", "is_root_device": false, "socket": "s"}"#,
        Refused("no vhost-user drives"),
        Refused("no vhost-user drives"),
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "T2"}"#,
        Refused("no CPU templates"),
        Refused("no CPU templates"),
    ),
];

#[track_caller]
fn check(api: &Api, (method, path, body): (&str, &str, &str), expected: Expected) {
    let (status, answer) = api.request(method, path, body);
    let what = format!("{method} {path} {body}: {status} {answer}, expected {expected:?}");
    match expected {
        Done => assert_eq!((status, &answer), (204, &Value::Null), "{what}"),
        Found(keys) => {
            assert_eq!(status, 200, "{what}");
            assert!(keys.iter().all(|key| answer.get(key).is_some()), "{what}");
        }
        Refused(words) => {
            let fault = answer["fault_message"].as_str().unwrap_or_default();
            assert!(status == 400 && fault.contains(words), "{what}");
            assert_eq!(answer.as_object().unwrap().len(), 1, "{what}");
        }
    }
}

#[test]
fn every_endpoint_before_and_after_the_start() {
    let mut api = Api::start(&["--id", "one"]);
    api.write("disk", &[0; 1 << 20]);
    api.write("other", &[0; 2 << 20]);
    idle_kernel(&api.path("kernel"));
    check(&api, ("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#), Refused("without kernel configuration"));
    for (method, path, body, before, _) in TABLE {
        check(&api, (method, path, body), *before);
    }
    assert_eq!(api.done("GET", "/", "")["state"], "Not started");
    api.done("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    for (method, path, body, _, after) in TABLE {
        check(&api, (method, path, body), *after);
    }
    check(&api, ("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#), NOT_AFTER);
    check(&api, ("PUT", "/network-interfaces/eth0", CARD), NOT_AFTER);
    let instance = api.done("GET", "/", "");
    assert_eq!(instance, json!({"id": "one", "state": "Running", "vmm_version": "1.17.0", "app_name": "Firecracker"}));

    // Paused, and changed, and resumed.
    api.done("PATCH", "/vm", r#"{"state": "Paused"}"#);
    api.done("PATCH", "/vm", r#"{"state": "Paused"}"#);
    assert_eq!(api.done("GET", "/", "")["state"], "Paused");
    api.done("PATCH", "/drives/data", r#"{"drive_id": "data", "path_on_host": "other"}"#);
    api.done("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    api.done("PATCH", "/drives/data", &format!(r#"{{"drive_id": "data", "rate_limiter": {LIMITER}}}"#));
    let config = api.done("GET", "/vm/config", "");
    assert_eq!(
        (&config["drives"][0]["path_on_host"], &config["machine-config"]["mem_size_mib"]),
        (&json!("other"), &json!(32))
    );
    assert_eq!(config["drives"][0]["rate_limiter"], serde_json::from_str::<Value>(LIMITER).unwrap());
    check(&api, ("PATCH", "/drives/data", r#"{"drive_id": "data", "path_on_host": "none"}"#), Refused("none"));

    // By a signal it ends, and takes its socket with it.
    rustix::process::kill_process(rustix::process::Pid::from_child(&api.child), rustix::process::Signal::TERM).unwrap();
    assert_eq!(api.wait(), Some(128 + 15));
    assert!(!api.path("api.sock").exists());
    assert!(api.path("log").exists());
    // Metrics of the start, of a request, and of the end.
    let metrics = std::fs::read_to_string(api.path("metrics")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 3 && lines.iter().all(|line| line["block_data"].is_object()), "{metrics}");
    let sum = |section: &str, name: &str| lines.iter().map(|line| line[section][name].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("put_api_requests", "vsock_count"), sum("put_api_requests", "vsock_fails")), (4, 3));
    assert!(sum("get_api_requests", "vmm_version_count") == 2 && sum("patch_api_requests", "drive_fails") == 3);
    let last = &lines[lines.len() - 1]["latencies_us"];
    assert!(["pause_vm", "resume_vm"].iter().all(|what| last[what].as_u64() > Some(0)), "{last}");
    assert!(last["vmm_pause_vm"].as_u64() > Some(0) && last["load_snapshot"] == 0, "{last}");
}

/// Has `destination` refused because of these words, as the state and as the memory.
#[track_caller]
fn refuses_to_save(api: &Api, destination: &str, words: &'static str) {
    for (state, memory) in [(destination, "new"), ("new", destination)] {
        let body = json!({"snapshot_path": state, "mem_file_path": memory}).to_string();
        check(api, ("PUT", "/snapshot/create", &body), Refused(words));
    }
}

#[test]
fn a_snapshot_replaces_nothing_of_the_machine() {
    let api = Api::start(&[]);
    api.write("disk", &[7; 1 << 20]);
    idle_kernel(&api.path("kernel"));
    for (path, body) in [
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 8}"#),
        ("/boot-source", r#"{"kernel_image_path": "kernel"}"#),
        ("/drives/data", DRIVE),
        ("/vsock", r#"{"guest_cid": 3, "uds_path": "vsock"}"#),
        ("/logger", r#"{"log_path": "log"}"#),
        ("/metrics", r#"{"metrics_path": "metrics"}"#),
        ("/serial", SERIAL),
        ("/actions", r#"{"action_type": "InstanceStart"}"#),
    ] {
        api.done("PUT", path, body);
    }
    api.done("PATCH", "/vm", r#"{"state": "Paused"}"#);
    symlink("disk", api.path("link")).unwrap();
    for name in ["disk", "./disk", "link", "kernel", "log", "metrics", "console"] {
        refuses_to_save(&api, name, "a file of the machine");
    }
    for name in ["api.sock", "vsock", "."] {
        refuses_to_save(&api, name, "no regular file");
    }
    refuses_to_save(&api, "./new", "take a file each");
    assert!(!api.path("new").exists());
    assert_eq!(std::fs::read(api.path("disk")).unwrap(), [7; 1 << 20]);
}

#[test]
fn a_diff_in_the_place_of_whole_memory_is_whole() {
    let save = |api: &Api, kind: &str, state: &Path, memory: &Path| {
        let body = json!({"snapshot_path": state, "mem_file_path": memory, "snapshot_type": kind}).to_string();
        api.done("PUT", "/snapshot/create", &body);
    };
    let load = |state: &Path, memory: &Path| {
        let api = Api::start(&[]);
        let body = json!({"snapshot_path": state, "mem_backend": {"backend_type": "File", "backend_path": memory}});
        api.done("PUT", "/snapshot/load", &body.to_string());
        api
    };
    let has_kernel = |memory: &Path| std::fs::read(memory).unwrap()[0x10_0000..][..4] == [0xb0, 0xff, 0xe6, 0x21];
    let api = Api::start(&[]);
    idle_kernel(&api.path("kernel"));
    api.done("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 32}"#);
    api.done("PUT", "/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    api.done("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    api.done("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let (state, memory) = (api.path("state"), api.path("memory"));
    save(&api, "Full", &state, &memory);
    assert!(has_kernel(&memory));

    let next = load(&state, &memory);
    let (later, diff, full) = (next.path("later"), next.path("diff"), next.path("full"));
    save(&next, "Diff", &later, &diff);
    save(&next, "Diff", &later, &diff);
    assert!(!has_kernel(&diff), "it has what has changed");
    save(&next, "Full", &later, &full);
    for whole in [&full, &memory] {
        save(&next, "Diff", &later, whole);
        assert!(has_kernel(whole));
        let last = load(&later, whole);
        last.done("PATCH", "/vm", r#"{"state": "Resumed"}"#);
        assert_eq!(last.done("GET", "/", "")["state"], "Running");
    }
}

#[test]
fn a_cpu_that_the_host_cannot_have_is_told_at_the_start() {
    let api = Api::start(&[]);
    idle_kernel(&api.path("kernel"));
    api.done("PUT", "/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    let missing = r#"{"msr_modifiers": [{"addr": "0x12345", "bitmap": "0b1"}]}"#;
    api.done("PUT", "/cpu-config", missing);
    let start = ("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    check(&api, start, Refused("KVM on this host does not have the MSR 0x12345"));
    assert_eq!(api.done("GET", "/vm/config", "")["cpu-config"]["msr_modifiers"][0]["addr"], "0x12345");
    // It may be taken back.
    api.done("PUT", "/cpu-config", CPU);
    check(&api, start, Done);
    let config = api.done("GET", "/vm/config", "");
    assert_eq!(config["cpu-config"]["cpuid_modifiers"][0]["leaf"], "0x1");
}

#[test]
fn network_interfaces_are_described_before_the_start() {
    let api = Api::start(&[]);
    check(&api, ("PUT", "/network-interfaces/eth0", CARD), Done);
    check(&api, ("PUT", "/network-interfaces/eth0", CARD), Done);
    let config = api.done("GET", "/vm/config", "");
    assert_eq!(config["network-interfaces"], json!([serde_json::from_str::<Value>(CARD).unwrap()]));
    let other = CARD.replace("eth0", "eth1");
    check(&api, ("PUT", "/network-interfaces/eth1", &other), Refused("MAC address is already in use"));
    let other = other.replace("02:00", "02:01");
    check(&api, ("PUT", "/network-interfaces/eth1", &other), Refused("tap0 has a network interface already"));
    check(&api, ("PUT", "/network-interfaces/eth1", CARD), Refused("does not match the id from the body"));
}

#[test]
fn a_balloon_may_be_had() {
    let api = Api::start(&[]);
    idle_kernel(&api.path("kernel"));
    let balloon = r#"{"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#;
    api.done("PUT", "/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    check(
        &api,
        ("PUT", "/balloon", r#"{"amount_mib": 999, "deflate_on_oom": true}"#),
        Refused("larger than the memory"),
    );
    api.done("PUT", "/balloon", balloon);
    assert_eq!(api.done("GET", "/balloon", "")["amount_mib"], 8);
    check(
        &api,
        ("PATCH", "/machine-config", r#"{"mem_size_mib": 4}"#),
        Refused("smaller than the previously set balloon"),
    );
    api.done("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    check(&api, ("PUT", "/balloon", balloon), NOT_AFTER);
    api.done("PATCH", "/balloon", r#"{"amount_mib": 16}"#);
    assert_eq!(api.done("GET", "/balloon", "")["amount_mib"], 16);
    let statistics = api.done("GET", "/balloon/statistics", "");
    assert_eq!((&statistics["target_mib"], &statistics["target_pages"]), (&json!(16), &json!(4096)));
    api.done("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 5}"#);
    check(&api, ("PATCH", "/balloon", r#"{"amount_mib": 999}"#), Refused("999M"));
}
