//! fctools, a client that others wrote, has bantam as its Firecracker.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fctools::extension::metrics::Metrics;
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::Vm;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, CreateSnapshot, Drive, EntropyDevice, MachineConfiguration, MetricsSystem, SnapshotType,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::snapshot::PrepareVmFromSnapshotOptions;
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{MovedResourceType, ResourceType};

use crate::support::Kernel;
use rustix::fs::{SeekFrom, seek};

const LIMIT: Duration = Duration::from_secs(120);

type Client = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

/// bantam by the names of Firecracker's programs.
fn installation(folder: &Path) -> VmmInstallation {
    let link = |name: &str| {
        let path = folder.join(name);
        symlink(env!("CARGO_BIN_EXE_bantam"), &path).unwrap();
        path
    };
    VmmInstallation::new(link("firecracker"), link("jailer"), link("snapshot-editor"))
}

fn executor(socket: &Path) -> UnrestrictedVmmExecutor {
    UnrestrictedVmmExecutor::new(VmmArguments::new(VmmApiSocket::Enabled(socket.into())))
}

async fn prepare(folder: &Path, method: InitMethod) -> Client {
    let mut resources = ResourceSystem::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let mut file = |path: &Path| {
        let kind = ResourceType::Moved(MovedResourceType::HardLinkedOrCopied);
        resources.create_resource(path, kind).unwrap()
    };
    let disk = file(&folder.join("disk"));
    let kernel = file(&Kernel::Debian61.vmlinux());
    let initrd = file(&folder.join("initramfs.cpio"));
    let metrics = resources.create_resource(folder.join("metrics"), ResourceType::Produced).unwrap();
    let data = VmConfigurationData {
        boot_source: BootSource {
            kernel_image: kernel,
            boot_args: Some("console=ttyS0 reboot=k panic=-1 quiet".into()),
            initrd: Some(initrd),
        },
        drives: vec![Drive {
            drive_id: "data".into(),
            is_root_device: false,
            cache_type: None,
            partuuid: None,
            is_read_only: Some(false),
            block: Some(disk),
            rate_limiter: None,
            io_engine: None,
            socket: None,
        }],
        machine_configuration: MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 256,
            smt: None,
            track_dirty_pages: None,
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: vec![],
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        // Its file has other keys for these than Firecracker's.
        metrics_system: (method == InitMethod::ViaApiCalls).then_some(MetricsSystem { metrics }),
        mmds_configuration: None,
        entropy_device: (method == InitMethod::ViaApiCalls).then_some(EntropyDevice { rate_limiter: None }),
    };
    let executor = executor(&folder.join("api.sock"));
    let configuration = VmConfiguration::New { init_method: method, data };
    Vm::prepare(executor, resources, installation(folder), configuration).await.unwrap()
}

/// Waits until the guest has written `text` to its console.
async fn wait_for(output: &mut (impl futures_util::AsyncRead + Unpin), text: &str) {
    use futures_util::AsyncReadExt;
    let mut seen = String::new();
    let read = async {
        while !seen.contains(text) {
            let mut chunk = [0; 1024];
            let count = output.read(&mut chunk).await.unwrap();
            assert!(count > 0, "it has ended without `{text}`: {seen}");
            seen.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    };
    tokio::time::timeout(LIMIT, read).await.unwrap_or_else(|_| panic!("`{text}` was not written"));
}

/// Every line of metrics, as this client reads them, if they are what a guest that ran leaves.
#[track_caller]
fn metrics(folder: &Path) -> Vec<Metrics> {
    let text = std::fs::read_to_string(folder.join("metrics")).unwrap();
    let lines: Vec<Metrics> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sum = |count: fn(&Metrics) -> u64| lines.iter().map(count).sum::<u64>();
    assert!(sum(|line| line.block.read_count) > 0 && sum(|line| line.block.read_bytes) > 0, "{text}");
    assert!(sum(|line| line.vcpu.exit_io_out) > 0 && sum(|line| line.vcpu.exit_mmio_write) > 0, "{text}");
    for line in &lines {
        let started = &line.api_server;
        assert!(started.process_startup_time_us > 0 && started.process_startup_time_cpu_us > 0, "{text}");
        assert!(line.utc_timestamp_ms > 1 << 40, "{text}");
    }
    // One for each drive, by its name.
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(last["block_data"]["read_count"].is_u64(), "{text}");
    lines
}

/// A folder with what the guest needs: a shell on its console.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(Kernel::Debian61.file("initramfs.cpio"), folder.path().join("initramfs.cpio")).unwrap();
    std::fs::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
    folder
}

/// Runs it to its end on a thread of its own: a client that waits for a socket which never comes never yields.
fn block_on(life: impl Future<Output = ()> + Send + 'static) {
    let (sender, ended) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        // Also when it panics.
        let _sender = sender;
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(life);
    });
    assert_ne!(ended.recv_timeout(2 * LIMIT), Err(mpsc::RecvTimeoutError::Timeout), "it does not end");
    thread.join().unwrap();
}

#[test]
fn fctools_runs_a_whole_life() {
    block_on(async {
        use futures_util::AsyncWriteExt;
        let folder = folder();
        let mut vm = prepare(folder.path(), InitMethod::ViaApiCalls).await;
        installation_is_what_it_expects(folder.path()).await;
        vm.start(LIMIT).await.unwrap();
        let info = vm.get_info().await.unwrap();
        assert_eq!((info.is_paused, info.app_name.as_str()), (false, "Firecracker"));
        assert_eq!(vm.get_firecracker_version().await.unwrap(), "1.17.0");
        assert_eq!(vm.get_machine_configuration().await.unwrap().mem_size_mib, 256);
        let mut pipes = vm.take_pipes().unwrap();
        wait_for(&mut pipes.stdout, "powers the guest off").await;
        vm.pause().await.unwrap();
        assert!(vm.get_info().await.unwrap().is_paused);
        vm.resume().await.unwrap();
        pipes.stdin.write_all(b"echo still $((40 + 2)); cat /sys/block/vda/size\n").await.unwrap();
        wait_for(&mut pipes.stdout, "still 42").await;
        wait_for(&mut pipes.stdout, "2048").await;
        vm.flush_metrics().await.unwrap();
        let before = metrics(folder.path()).len();
        vm.flush_metrics().await.unwrap();
        assert!(metrics(folder.path()).len() > before);
        // It goes on in another process.
        vm.pause().await.unwrap();
        let mut file = |name: &str| {
            let resources = vm.get_resource_system_mut();
            resources.create_resource(folder.path().join(name), ResourceType::Produced).unwrap()
        };
        let create = CreateSnapshot {
            snapshot_type: Some(SnapshotType::Full),
            snapshot: file("state"),
            mem_file: file("memory"),
        };
        vm.create_snapshot(create).await.unwrap();
        vm.resume().await.unwrap();
        pipes.stdin.write_all(b"echo further $((40 + 2))\n").await.unwrap();
        wait_for(&mut pipes.stdout, "further 42").await;
        vm.pause().await.unwrap();
        let mut file = |name: &str| {
            let resources = vm.get_resource_system_mut();
            resources.create_resource(folder.path().join(name), ResourceType::Produced).unwrap()
        };
        let create = CreateSnapshot {
            snapshot_type: Some(SnapshotType::Diff),
            snapshot: file("later-state"),
            mem_file: file("later-memory"),
        };
        let snapshot = vm.create_snapshot(create).await.unwrap();
        merge(&folder.path().join("later-memory"), &folder.path().join("memory"));
        let kill = VmShutdownAction { method: VmShutdownMethod::Kill, timeout: Some(LIMIT), graceful: false };
        vm.shutdown([kill]).await.unwrap();
        let options = PrepareVmFromSnapshotOptions {
            executor: executor(&folder.path().join("other.sock")),
            process_spawner: DirectProcessSpawner,
            runtime: TokioRuntime,
            moved_resource_type: MovedResourceType::HardLinkedOrCopied,
            ownership_model: VmmOwnershipModel::Shared,
            enable_diff_snapshots: None,
            resume_vm: Some(true),
        };
        let mut vm = snapshot.prepare_vm(&mut vm, options).await.unwrap();
        vm.start(LIMIT).await.unwrap();
        assert!(!vm.get_info().await.unwrap().is_paused);
        let mut pipes = vm.take_pipes().unwrap();
        pipes.stdin.write_all(b"echo again $((40 + 2))\n").await.unwrap();
        wait_for(&mut pipes.stdout, "again 42").await;

        // Linux restarts, as nobody has told it to do something else.
        let action = VmShutdownAction { method: VmShutdownMethod::CtrlAltDel, timeout: Some(LIMIT), graceful: true };
        let outcome = vm.shutdown([action]).await.unwrap();
        assert!(outcome.is_fully_graceful(), "{outcome:?}");
        vm.cleanup().await.unwrap();
        assert!(!folder.path().join("other.sock").exists());
    });
}

/// Fills the holes of a diff's memory with what is in an earlier one.
fn merge(diff: &Path, base: &Path) {
    let (later, memory) = (File::open(diff).unwrap(), File::options().write(true).open(base).unwrap());
    let mut end = 0;
    while let Ok(start) = seek(&later, SeekFrom::Data(end)) {
        end = seek(&later, SeekFrom::Hole(start)).unwrap();
        let mut data = vec![0; usize::try_from(end - start).unwrap()];
        later.read_exact_at(&mut data, start).unwrap();
        memory.write_all_at(&data, start).unwrap();
    }
    assert!(end > 0, "something was used");
    fs::copy(base, diff).unwrap();
}

async fn installation_is_what_it_expects(folder: &Path) {
    let output = tokio::process::Command::new(folder.join("firecracker")).arg("--version").output().await.unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("Firecracker v1.17.0\n"));
}

#[test]
fn fctools_starts_from_a_file_and_kills() {
    block_on(async {
        let folder = folder();
        let method = InitMethod::ViaJsonConfiguration(folder.path().join("vm.json"));
        let mut vm = prepare(folder.path(), method).await;
        vm.start(LIMIT).await.unwrap();
        let action =
            VmShutdownAction { method: VmShutdownMethod::PauseThenKill, timeout: Some(LIMIT), graceful: false };
        vm.shutdown([action]).await.unwrap();
    });
}
