//! What the host has.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use rustix::process::{getegid, geteuid, getgroups};

use crate::arch::x86_64::cpuid::has_virtualization;
use crate::cgroup::Group;
use crate::sandbox::landlock_version;

use super::{Row, Table, syscall, without_number};

const KVM: &str = "/dev/kvm";

/// What bantam asks of KVM, by the names of the kernel's documentation.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Looks at all that bantam needs of the host. Nothing is changed.
pub fn host() -> Table {
    let mut rows = vec![virtualization()];
    match OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(_) => {
            rows.push(Row::ok(KVM, ""));
            rows.extend(kvm());
        }
        Err(error) => {
            let advice = kvm_advice().unwrap_or_default();
            rows.push(Row::missing(KVM, format!("cannot be opened: {}. {advice}", reason(&error))));
        }
    }
    rows.extend([tun(), io_uring(), userfaultfd(), seccomp(), landlock(), user_namespaces(), control_group(), passt()]);
    Table(rows)
}

/// Whether the host's CPU runs guests by itself: VT-x or SVM. Asks the CPU, which is done in no time.
pub fn hardware_virtualization() -> bool {
    has_virtualization()
}

/// The name of the CPU's virtualisation, if it has one that Linux may use: firmware can have turned it off.
fn cpu_virtualization() -> Option<&'static str> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some("VT-x"),
        "svm" => Some("SVM"),
        _ => None,
    })
}

fn virtualization() -> Row {
    let name = "VT-x or SVM";
    match cpu_virtualization() {
        Some(which) => Row::ok(name, which),
        None if Path::new(KVM).exists() => Row::missing(
            name,
            "the CPU has neither: KVM is software here, and gives up on instructions that any kernel uses. Use a \
             machine with nested virtualisation, or turn virtualisation on in the firmware",
        ),
        None => Row::missing(
            name,
            "the CPU has neither. Turn virtualisation on in the firmware, or use a machine with nested virtualisation",
        ),
    }
}

/// What to do about `/dev/kvm`, if it cannot be opened for a reason that has a cure.
pub fn kvm_advice() -> Option<String> {
    let error = OpenOptions::new().read(true).write(true).open(KVM).err()?;
    match error.kind() {
        ErrorKind::NotFound => Some(match cpu_virtualization() {
            Some("VT-x") => "Load KVM: sudo modprobe kvm_intel".to_owned(),
            Some(_) => "Load KVM: sudo modprobe kvm_amd".to_owned(),
            None => "This machine has no VT-x or SVM for KVM: turn it on in the firmware, or use a machine with \
                     nested virtualisation"
                .to_owned(),
        }),
        ErrorKind::PermissionDenied => {
            let device = std::fs::metadata(KVM).ok()?;
            let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
            let opens = |gid: u32| {
                getegid().as_raw() == gid || getgroups().is_ok_and(|all| all.iter().any(|group| group.as_raw() == gid))
            };
            let device = Device { uid: device.uid(), gid: device.gid(), mode: device.mode() };
            Some(permission_advice(&device, &groups, geteuid().as_raw(), opens(device.gid)))
        }
        _ => None,
    }
}

/// Whose `/dev/kvm` is.
struct Device {
    uid: u32,
    gid: u32,
    mode: u32,
}

/// The command that lets this user open `/dev/kvm`. `groups` is the text of /etc/group.
fn permission_advice(device: &Device, groups: &str, user: u32, member: bool) -> String {
    let group = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(device.gid)).then_some(name)
    });
    let group_opens = device.mode & 0o060 == 0o060;
    match group {
        _ if user == device.uid || member && group_opens => {
            "This user may open it: a sandbox or a container keeps bantam from it".to_owned()
        }
        Some(group) if group_opens && device.gid != 0 => {
            format!("Let this user open it: sudo usermod -aG {group} $USER, then log in again")
        }
        _ => "Let this user open it: sudo setfacl -m u:$USER:rw /dev/kvm".to_owned(),
    }
}

fn kvm() -> Vec<Row> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return vec![Row::missing("KVM", format!("cannot be opened: {error}"))],
    };
    let mut rows = vec![match kvm.get_api_version() {
        12 => Row::ok("KVM API", "version 12"),
        other => Row::missing("KVM API", format!("version {other}, and bantam speaks 12")),
    }];
    rows.extend(REQUIRED.map(|(capability, name)| {
        if kvm.check_extension(capability) { Row::ok(name, "") } else { Row::missing(name, "a newer kernel has it") }
    }));
    rows.push(if kvm.check_extension(Cap::TscDeadlineTimer) {
        Row::ok("KVM_CAP_TSC_DEADLINE_TIMER", "")
    } else {
        Row::absent("KVM_CAP_TSC_DEADLINE_TIMER", "the guest's timers cost more")
    });
    rows.push(Row::ok("vCPUs", format!("up to {}", kvm.get_max_vcpus())));
    rows
}

fn tun() -> Row {
    const CAP_NET_ADMIN: u32 = 12;
    let name = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(name) {
        Ok(_) if has_capability(CAP_NET_ADMIN) => Row::ok(name, "taps can be created"),
        Ok(_) => Row::ok(name, "taps that this user owns can be used; creating one needs CAP_NET_ADMIN"),
        Err(error) => Row::absent(name, format!("no --net tap=NAME: it cannot be opened: {}", reason(&error))),
    }
}

/// Whether this process has the capability with this number in effect.
fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set >> number & 1 == 1)
}

fn io_uring() -> Row {
    let name = "io_uring";
    match syscall::io_uring() {
        Ok(()) => Row::ok(name, ""),
        Err(error) => {
            let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            let cure = if matches!(sysctl.trim(), "1" | "2") { ": sudo sysctl kernel.io_uring_disabled=0" } else { "" };
            Row::absent(name, format!("not needed yet: {}{cure}", reason(&error)))
        }
    }
}

fn userfaultfd() -> Row {
    let name = "userfaultfd";
    let result = syscall::userfaultfd().or_else(|error| File::open("/dev/userfaultfd").map(drop).map_err(|_| error));
    match result {
        Ok(()) => Row::ok(name, ""),
        Err(error) => Row::absent(name, format!("not needed yet: {}", reason(&error))),
    }
}

/// What `--sandbox` is made of.
fn seccomp() -> Row {
    let name = "seccomp";
    match std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.split_whitespace().any(|action| action == "trap") => {
            Row::ok(name, "each thread of a machine makes the system calls of its role (--sandbox)")
        }
        _ => Row::absent(
            name,
            "a machine's threads may make any system call (--sandbox): the kernel has no filters (CONFIG_SECCOMP_FILTER)",
        ),
    }
}

fn landlock() -> Row {
    let name = "Landlock";
    match landlock_version() {
        Ok(version) => {
            let network = if version >= 4 { ", and no TCP" } else { "" };
            let old = if version < 2 {
                "; with a shared folder that is written to, all (Linux 5.19 has what that takes)"
            } else {
                ""
            };
            Row::ok(name, format!("version {version}: the files of the machine{network} (--sandbox){old}"))
        }
        Err(error) => {
            let reason = reason(&error);
            Row::absent(
                name,
                format!(
                    "all of the user's files stay open to bantam (--sandbox): {reason}. Put lsm=landlock,... on the kernel's command line"
                ),
            )
        }
    }
}

/// The program that `--net user` starts.
fn passt() -> Row {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&folders).map(|folder| folder.join("passt")).find(|path| path.is_file()) {
        Some(path) => Row::ok("passt", format!("--net user, by {}", path.display())),
        None => Row::absent("passt", "no --net user: it is not in PATH: sudo apt install passt"),
    }
}

fn user_namespaces() -> Row {
    let name = "user namespaces";
    let sysctl = |path: &str| std::fs::read_to_string(Path::new("/proc/sys").join(path)).ok();
    let is = |path, value: &str| sysctl(path).is_some_and(|text| text.trim() == value);
    let cure = match () {
        () if !Path::new("/proc/self/ns/user").exists() => "the kernel has none",
        () if is("user/max_user_namespaces", "0") => "sysctl user.max_user_namespaces is 0",
        () if is("kernel/unprivileged_userns_clone", "0") => {
            "only for root: sysctl kernel.unprivileged_userns_clone is 0"
        }
        () if is("kernel/apparmor_restrict_unprivileged_userns", "1") => {
            "only for root: sysctl kernel.apparmor_restrict_unprivileged_userns is 1"
        }
        () => return Row::ok(name, "--jail without root, and passt"),
    };
    Row::absent(name, format!("--jail takes root, and so does --net user: {cure}"))
}

fn control_group() -> Row {
    let name = "control groups";
    match Group::place_for_limits() {
        Some(path) => Row::ok(name, format!("--jail limits memory and processes, below {}", path.display())),
        None => Row::absent(
            name,
            "--jail limits neither memory nor processes: this user may make no group of version 2 with these controllers. As \
             root, or by systemd-run --user --scope bantam run --jail ...",
        ),
    }
}

/// An error's text without the number.
fn reason(error: &io::Error) -> String {
    without_number(&error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "root:x:0:\nkvm:x:105:someone\n";

    #[test]
    fn a_closed_kvm_gets_the_command_that_opens_it() {
        let advice = |gid, mode, member| permission_advice(&Device { uid: 0, gid, mode }, GROUPS, 1000, member);
        assert!(advice(105, 0o660, false).contains("sudo usermod -aG kvm $USER, then log in again"));
        assert!(advice(105, 0o600, true).contains("sudo setfacl -m u:$USER:rw /dev/kvm"), "the group is no help");
        assert!(advice(0, 0o660, false).contains("sudo setfacl"), "nobody is told to join group root");
        assert!(advice(7, 0o660, false).contains("sudo setfacl"), "the group has no name");
        assert!(advice(105, 0o660, true).contains("sandbox"));
    }

    #[test]
    fn every_thing_has_one_row() {
        let table = host();
        for name in [
            "VT-x or SVM",
            "/dev/kvm",
            "/dev/net/tun",
            "io_uring",
            "userfaultfd",
            "seccomp",
            "Landlock",
            "user namespaces",
            "control groups",
        ] {
            assert_eq!(table.0.iter().filter(|row| row.name == name).count(), 1, "{name}");
        }
    }
}
