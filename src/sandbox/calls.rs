//! The system calls that the threads of a machine make after it has started, by what they do.
//!
//! What is on a list was seen (strace, `--sandbox log`), or does no harm. What is missing ends the machine with a line that
//! names it.

use std::mem::size_of;

use kvm_bindings as kvm;
use libc::*;

use super::filter::List;
use super::filter::When::{Any, Clear, Fails, Is, Own};

const IO: u32 = 0;
const WRITES: u32 = 1;
const READS: u32 = 2;
const BOTH: u32 = 3;

/// The number of an ioctl (include/uapi/asm-generic/ioctl.h).
const fn ioctl<T>(direction: u32, kind: u8, number: u32) -> u32 {
    let size = size_of::<T>();
    assert!(size < 1 << 14);
    #[expect(clippy::cast_possible_truncation, reason = "it is small")]
    let size = size as u32;
    direction << 30 | size << 16 | (kind as u32) << 8 | number
}

const fn kvm<T>(direction: u32, number: u32) -> u32 {
    ioctl::<T>(direction, 0xae, number)
}

/// Memory without code, waiting, time, the thread itself, and descriptors that are there.
pub(super) const BASE: &List = &[
    (SYS_read, Any),
    (SYS_write, Any),
    (SYS_readv, Any),
    (SYS_writev, Any),
    (SYS_close, Any),
    (SYS_poll, Any),
    (SYS_ppoll, Any),
    (SYS_futex, Any),
    (SYS_mmap, Clear(2, PROT_EXEC as u32)),
    (SYS_mprotect, Clear(2, PROT_EXEC as u32)),
    (SYS_munmap, Any),
    (SYS_mremap, Any),
    (SYS_madvise, Any),
    (SYS_brk, Any),
    (SYS_rt_sigreturn, Any),
    (SYS_rt_sigprocmask, Any),
    (SYS_sigaltstack, Any),
    (SYS_restart_syscall, Any),
    (SYS_exit, Any),
    (SYS_exit_group, Any),
    (SYS_gettid, Any),
    (SYS_getpid, Any),
    (SYS_getpgrp, Any),
    (SYS_tgkill, Own(0)),
    (SYS_sched_yield, Any),
    (SYS_sched_getaffinity, Any),
    (SYS_clock_gettime, Any),
    (SYS_clock_getres, Any),
    (SYS_clock_nanosleep, Any),
    (SYS_nanosleep, Any),
    (SYS_gettimeofday, Any),
    (SYS_getrandom, Any),
    (SYS_rseq, Any),
    (SYS_set_robust_list, Any),
    (SYS_membarrier, Any),
    (SYS_prlimit64, Is(0, &[0])),
    (SYS_prctl, Is(0, PRCTL)),
    (SYS_fstat, Any),
    (SYS_lseek, Any),
    (SYS_fcntl, Is(1, FCNTL)),
    (SYS_ioctl, Is(1, TERMINAL)),
];

const PR_GET_AUXV: u32 = 0x4155_5856;
const PRCTL: &[u32] =
    &[PR_SET_NAME as u32, PR_GET_NAME as u32, PR_SET_VMA as u32, PR_SET_NO_NEW_PRIVS as u32, PR_GET_AUXV];

const FCNTL: &[u32] = &[F_GETFD as u32, F_SETFD as u32, F_GETFL as u32, F_SETFL as u32, F_DUPFD_CLOEXEC as u32];

/// What a terminal is asked, and made what it was before: TCGETS to TCSETSF, the same by their later numbers, TIOCGPGRP,
/// TIOCGWINSZ.
const TERMINAL: &[u32] =
    &[0x5401, 0x5402, 0x5403, 0x5404, 0x802c_542a, 0x402c_542b, 0x402c_542c, 0x402c_542d, 0x540f, 0x5413];

/// Sockets that are there, and new ones on this host. Not sendmsg and recvmsg, by which descriptors are passed.
pub(super) const SOCKETS: &List = &[
    (SYS_accept, Any),
    (SYS_accept4, Any),
    (SYS_recvfrom, Any),
    (SYS_sendto, Any),
    (SYS_shutdown, Any),
    (SYS_getsockopt, Any),
    (SYS_setsockopt, Any),
    (SYS_getsockname, Any),
    (SYS_getpeername, Any),
    (SYS_socket, Is(0, &[AF_UNIX as u32])),
    (SYS_socketpair, Is(0, &[AF_UNIX as u32])),
    (SYS_connect, Any),
    (SYS_ioctl, Is(1, &[FIONBIO])),
];

/// A virtio device at work: what it waits for, and interrupts.
pub(super) const EVENTS: &List = &[
    (SYS_epoll_wait, Any),
    (SYS_epoll_pwait, Any),
    (SYS_epoll_ctl, Any),
    (SYS_timerfd_create, Any),
    (SYS_timerfd_settime, Any),
    (SYS_timerfd_gettime, Any),
    (SYS_eventfd2, Any),
    (SYS_ioctl, Is(1, &[KVM_IRQ_LINE])),
];

const KVM_IRQ_LINE: u32 = kvm::<kvm::kvm_irq_level>(WRITES, 0x61);

/// Files that are open, and disks.
pub(super) const STORAGE: &List = &[
    (SYS_pread64, Any),
    (SYS_pwrite64, Any),
    (SYS_preadv, Any),
    (SYS_pwritev, Any),
    (SYS_preadv2, Any),
    (SYS_pwritev2, Any),
    (SYS_fsync, Any),
    (SYS_fdatasync, Any),
    (SYS_fallocate, Any),
    (SYS_ftruncate, Any),
    (SYS_flock, Any),
    (SYS_statx, Any),
    (SYS_newfstatat, Any),
    (SYS_ioctl, Is(1, DISK_IOCTLS)),
];

/// Disks that have a ring of io_uring's, which was restricted before: to reading, writing and flushing the disk's file.
pub(super) const RINGS: &List = &[(SYS_io_uring_enter, Any)];

/// Disks are given other files, under the same number.
pub(super) const OTHER_DISKS: &List = &[(SYS_dup3, Any)];

/// And so are their rings.
pub(super) const RING_FILES: &List = &[(SYS_io_uring_register, Is(1, &[IORING_REGISTER_FILES_UPDATE]))];

const IORING_REGISTER_FILES_UPDATE: u32 = 6;

/// A tap, and vhost-net on it.
pub(super) const TAP: &List = &[(SYS_ioctl, Is(1, TAP_IOCTLS))];

/// The system calls that do something to the file of a descriptor or with it, and by which argument it is named.
pub(super) const ON_DESCRIPTORS: &[(i64, u8)] = &[
    (SYS_read, 0),
    (SYS_write, 0),
    (SYS_readv, 0),
    (SYS_writev, 0),
    (SYS_pread64, 0),
    (SYS_pwrite64, 0),
    (SYS_preadv, 0),
    (SYS_pwritev, 0),
    (SYS_preadv2, 0),
    (SYS_pwritev2, 0),
    (SYS_fsync, 0),
    (SYS_fdatasync, 0),
    (SYS_fallocate, 0),
    (SYS_ftruncate, 0),
    (SYS_flock, 0),
    (SYS_lseek, 0),
    (SYS_fcntl, 0),
    (SYS_ioctl, 0),
    (SYS_fchmod, 0),
    (SYS_fchown, 0),
    (SYS_copy_file_range, 0),
    (SYS_copy_file_range, 2),
    (SYS_dup3, 0),
    (SYS_dup3, 1),
    (SYS_close, 0),
    (SYS_fchownat, 0),
    (SYS_fgetxattr, 0),
    (SYS_flistxattr, 0),
    (SYS_fsetxattr, 0),
    (SYS_fremovexattr, 0),
    (SYS_utimensat, 0),
    (SYS_mmap, 4),
    (SYS_io_uring_enter, 0),
    (SYS_io_uring_register, 0),
];

const FIONBIO: u32 = 0x5421;
const BLKDISCARD: u32 = 0x1277;
const BLKGETSIZE64: u32 = ioctl::<usize>(READS, 0x12, 114);
const BLKROGET: u32 = 0x125e;
const BLKSSZGET: u32 = 0x1268;
const TUNSETOFFLOAD: u32 = ioctl::<u32>(WRITES, b'T', 208);
const TUNSETQUEUE: u32 = ioctl::<u32>(WRITES, b'T', 217);

const TAP_IOCTLS: &[u32] = &[
    TUNSETOFFLOAD,
    TUNSETQUEUE,
    ioctl::<u64>(WRITES, 0xaf, 0x00),      // VHOST_SET_FEATURES
    ioctl::<()>(IO, 0xaf, 0x01),           // VHOST_SET_OWNER
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x03), // VHOST_SET_MEM_TABLE
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x10), // VHOST_SET_VRING_NUM
    ioctl::<[u64; 5]>(WRITES, 0xaf, 0x11), // VHOST_SET_VRING_ADDR
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x12), // VHOST_SET_VRING_BASE
    ioctl::<[u32; 2]>(BOTH, 0xaf, 0x12),   // VHOST_GET_VRING_BASE
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x20), // VHOST_SET_VRING_KICK
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x21), // VHOST_SET_VRING_CALL
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x22), // VHOST_SET_VRING_ERR
    ioctl::<[u32; 2]>(WRITES, 0xaf, 0x30), // VHOST_NET_SET_BACKEND
];

const DISK_IOCTLS: &[u32] = &[BLKDISCARD, BLKGETSIZE64, BLKROGET, BLKSSZGET];

/// Memory that comes from another process, and its end.
pub(super) const MEMORY: &List = &[(SYS_ioctl, Is(1, &[UFFDIO_UNREGISTER]))];

const UFFDIO_UNREGISTER: u32 = ioctl::<[u64; 2]>(READS, 0xaa, 1);

/// Files by their paths, of which Landlock says which.
pub(super) const FILES: &List = &[
    (SYS_open, Any),
    (SYS_openat, Any),
    (SYS_openat2, Any),
    (SYS_access, Any),
    (SYS_faccessat, Any),
    (SYS_faccessat2, Any),
    (SYS_stat, Any),
    (SYS_lstat, Any),
    (SYS_newfstatat, Any),
    (SYS_statx, Any),
    (SYS_statfs, Any),
    (SYS_fstatfs, Any),
    (SYS_getdents64, Any),
    (SYS_readlink, Any),
    (SYS_readlinkat, Any),
    (SYS_mkdir, Any),
    (SYS_mkdirat, Any),
    (SYS_mknodat, Any),
    (SYS_symlinkat, Any),
    (SYS_link, Any),
    (SYS_linkat, Any),
    (SYS_unlink, Any),
    (SYS_unlinkat, Any),
    (SYS_rmdir, Any),
    (SYS_rename, Any),
    (SYS_renameat, Any),
    (SYS_renameat2, Any),
    (SYS_chmod, Any),
    (SYS_fchmod, Any),
    (SYS_fchmodat, Any),
    (SYS_fchownat, Any),
    (SYS_fchown, Any),
    (SYS_utimensat, Any),
    (SYS_fgetxattr, Any),
    (SYS_flistxattr, Any),
    (SYS_fsetxattr, Any),
    (SYS_fremovexattr, Any),
    (SYS_copy_file_range, Any),
    (SYS_getcwd, Any),
    (SYS_geteuid, Any),
    (SYS_getegid, Any),
    (SYS_getuid, Any),
    (SYS_getgid, Any),
    (SYS_umask, Any),
    (SYS_flock, Any),
    (SYS_fsync, Any),
    (SYS_fdatasync, Any),
    (SYS_ftruncate, Any),
];

/// Threads, which give up what they can, and take a filter first thing. Where clone3 is, whose flags a filter does not see, the C library goes on
/// without it.
pub(super) const THREADS: &List = &[
    (SYS_clone, Is(0, &[THREAD, THREAD_OF_MUSL])),
    (SYS_clone3, Fails(ENOSYS)),
    (SYS_seccomp, Is(0, &[SECCOMP_SET_MODE_FILTER])),
    (SYS_landlock_restrict_self, Any),
    (SYS_epoll_create1, Any),
    (SYS_capget, Any),
    (SYS_capset, Any),
];

/// `CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM | SETTLS | PARENT_SETTID | CHILD_CLEARTID`.
const THREAD: u32 = 0x003d_0f00;
/// And `CLONE_DETACHED`.
const THREAD_OF_MUSL: u32 = 0x007d_0f00;

/// A vCPU. The device that its driver starts is its child, and has no more than this.
pub(super) const VCPU: &List = &[
    (SYS_timer_create, Any),
    (SYS_timer_settime, Any),
    (SYS_timer_gettime, Any),
    (SYS_timer_getoverrun, Any),
    (SYS_timer_delete, Any),
    (SYS_ioctl, Is(1, VCPU_IOCTLS)),
];

const VCPU_IOCTLS: &[u32] = &[
    kvm::<()>(IO, 0x80),                               // KVM_RUN
    kvm::<kvm::kvm_regs>(READS, 0x81),                 // KVM_GET_REGS
    kvm::<kvm::kvm_sregs>(READS, 0x83),                // KVM_GET_SREGS
    kvm::<kvm::kvm_mp_state>(READS, 0x98),             // KVM_GET_MP_STATE
    kvm::<()>(IO, 0xad),                               // KVM_KVMCLOCK_CTRL
    kvm::<kvm::kvm_irq_routing>(WRITES, 0x6a),         // KVM_SET_GSI_ROUTING
    kvm::<kvm::kvm_coalesced_mmio_zone>(WRITES, 0x67), // KVM_REGISTER_COALESCED_MMIO
    kvm::<kvm::kvm_coalesced_mmio_zone>(WRITES, 0x68), // KVM_UNREGISTER_COALESCED_MMIO
];

/// The run loop, and what it starts: saving, the end.
pub(super) const MAIN: &List = &[
    (SYS_clone, Is(0, &[FORK, SIGCHLD as u32, CLONE_PIDFD as u32])),
    (SYS_close_range, Any),
    (SYS_prctl, Is(0, &[PR_SET_PDEATHSIG as u32])),
    (SYS_wait4, Any),
    (SYS_waitid, Any),
    (SYS_kill, Any),
    (SYS_pidfd_send_signal, Any),
    (SYS_pipe2, Any),
    (SYS_dup, Any),
    (SYS_dup2, Any),
    (SYS_dup3, Any),
    (SYS_signalfd4, Any),
    (SYS_getppid, Any),
    (SYS_getrusage, Any),
    (SYS_sysinfo, Any),
    (SYS_uname, Any),
    (SYS_sendfile, Any),
    (SYS_sync_file_range, Any),
    (SYS_memfd_create, Any),
    (SYS_setpriority, Is(0, &[PRIO_PROCESS])),
    (SYS_rt_sigaction, Is(0, REAL_TIME)),
    // Asks only: the new action is at no address.
    (SYS_rt_sigaction, Is(1, &[0])),
    (SYS_ioctl, Is(1, MAIN_IOCTLS)),
];

/// The signals that the C library has for itself, and SIGRTMIN, which kicks vCPUs: handlers are there with the first thread.
const REAL_TIME: &[u32] = &[32, 33, 34, 35];

/// `CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD`, which is fork.
const FORK: u32 = 0x0120_0011;

const MAIN_IOCTLS: &[u32] = &[
    kvm::<()>(IO, 0x00),                      // KVM_GET_API_VERSION
    kvm::<kvm::kvm_msr_list>(BOTH, 0x02),     // KVM_GET_MSR_INDEX_LIST
    kvm::<()>(IO, 0x03),                      // KVM_CHECK_EXTENSION
    kvm::<kvm::kvm_cpuid2>(BOTH, 0x05),       // KVM_GET_SUPPORTED_CPUID
    kvm::<kvm::kvm_dirty_log>(WRITES, 0x42),  // KVM_GET_DIRTY_LOG
    kvm::<kvm::kvm_irqchip>(BOTH, 0x62),      // KVM_GET_IRQCHIP
    kvm::<kvm::kvm_clock_data>(READS, 0x7c),  // KVM_GET_CLOCK
    kvm::<kvm::kvm_pit_state2>(READS, 0x9f),  // KVM_GET_PIT2
    kvm::<kvm::kvm_msrs>(BOTH, 0x88),         // KVM_GET_MSRS
    kvm::<kvm::kvm_fpu>(READS, 0x8c),         // KVM_GET_FPU
    kvm::<kvm::kvm_lapic_state>(READS, 0x8e), // KVM_GET_LAPIC
    kvm::<kvm::kvm_cpuid2>(BOTH, 0x91),       // KVM_GET_CPUID2
    kvm::<kvm::kvm_vcpu_events>(READS, 0x9f), // KVM_GET_VCPU_EVENTS
    kvm::<kvm::kvm_debugregs>(READS, 0xa1),   // KVM_GET_DEBUGREGS
    kvm::<()>(IO, 0xa3),                      // KVM_GET_TSC_KHZ
    kvm::<kvm::kvm_xsave>(READS, 0xa4),       // KVM_GET_XSAVE
    kvm::<kvm::kvm_xsave>(READS, 0xcf),       // KVM_GET_XSAVE2
    kvm::<kvm::kvm_xcrs>(READS, 0xa6),        // KVM_GET_XCRS
    kvm::<kvm::kvm_nested_state>(BOTH, 0xbe), // KVM_GET_NESTED_STATE
];
