//! bantam: a small virtual machine monitor for KVM, as a library. The `bantam` command is a thin layer above it and
//! uses nothing that is not public here.
//!
//! A machine is built from a [`Config`](config::Config) and run until it ends, on the thread that calls
//! [`Machine::run`](machine::Machine::run); a [`Handle`](machine::Handle) reaches it from the others. How the guest
//! fared is the [`Outcome`](outcome::Outcome), an answer; errors are what the host or the caller did wrong. There may be
//! many machines in a process: bantam installs no signal handler but the one that makes a vCPU leave the guest (the
//! first real-time signal), and takes standard input and output only for a console that is told to.
//!
//! ```no_run
//! use bantam::config::{Config, Size};
//! use bantam::devices::console::Console;
//! use bantam::machine::Builder;
//! use bantam::outcome::Outcome;
//! use std::{fs::File, thread, time::Duration};
//!
//! let config = Config::new()
//!     .kernel("vmlinux")
//!     .initrd("initramfs.cpio")
//!     .cpus(2)
//!     .memory(Size::mib(512))
//!     .timeout(Duration::from_secs(60));
//! // The console may be anything that implements `Write`.
//! let console = Console::to(File::create("console.log")?);
//! let mut machine = Builder::new(config).console(console).build()?;
//!
//! let handle = machine.handle();
//! let running = thread::spawn(move || machine.run());
//! handle.input("uname -a\n");
//! // From any thread, at any time.
//! handle.stop();
//! match running.join().expect("run does not panic")? {
//!     Outcome::Stopped => println!("it was still running"),
//!     Outcome::Panicked(panic) => println!("its kernel panicked: {}", panic.message),
//!     outcome => println!("{outcome}"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The house, floor by floor
//!
//! No module uses one of a floor above its own.
//!
//! | floor | modules |
//! | --- | --- |
//! | 6, around it | [`control`]: Firecracker's API on a socket; [`check`]: is the host ready, is a kernel; [`kernels`]: kernels by name, in a cache; [`named`]: machines by name; [`warm`]: snapshots for commands, by key |
//! | 5, the machine | [`machine`]: the builder, the board, the run loop with its one inbox |
//! | 4, what is asked for | [`config`]: one struct for flags, JSON and programs |
//! | 3, what runs | [`boot`]: kernel, initrd, command line; [`vcpu`]: the thread of a vCPU; [`command`]: one command in the guest |
//! | 2, what it runs on | [`kvm`]: all of KVM's ioctls; [`devices`]: serial port, clock, power; [`virtio`]: disks, network, randomness |
//! | 1, the architecture as data | [`arch`]: addresses, registers, tables |
//! | 0, the vocabulary | [`outcome`], [`memory`], [`bus`], [`cgroup`], [`duration`], [`interrupt`], [`metrics`], [`sandbox`], [`signal`], [`size`], [`terminal`] |
//! | beside them | [`image`]: root file systems of images, archives and directories |

// For the parts of the guest's init, which has no `std`, that are tested here.
#[cfg(test)]
extern crate alloc;

pub mod arch;
pub mod boot;
pub mod bus;
pub mod cgroup;
pub mod check;
pub mod command;
pub mod config;
pub mod control;
pub mod devices;
pub mod duration;
pub mod file;
pub mod image;
pub mod interrupt;
pub mod kernels;
pub mod kvm;
pub mod limit;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod named;
pub mod outcome;
pub mod sandbox;
pub mod signal;
pub mod size;
pub mod snapshot;
pub mod socket;
pub mod terminal;
mod text;
pub mod threads;
pub mod vcpu;
pub mod virtio;
pub mod warm;
