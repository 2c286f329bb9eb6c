//! `boot-source` and `machine-config`.

use serde_json::{Value, json};

use crate::config::Size;
use crate::config::tree::{Error, Node, Table};

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootSource {
    /// The kernel's path.
    pub kernel_image_path: String,
    /// The initial RAM disk's path.
    pub initrd_path: Option<String>,
    /// The kernel's command line.
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&["kernel_image_path", "initrd_path", "boot_args"])?;
        let kernel = table.text("kernel_image_path")?.ok_or_else(|| table.missing("kernel_image_path"))?;
        let initrd = table.text("initrd_path")?;
        let text = |text: Option<&str>| text.map(str::to_owned);
        Ok(Self {
            kernel_image_path: kernel.into(),
            initrd_path: text(initrd),
            boot_args: text(table.text("boot_args")?),
        })
    }

    /// As it is read.
    pub fn to_json(&self) -> Value {
        let mut json = json!({"kernel_image_path": self.kernel_image_path});
        for (key, value) in [("initrd_path", &self.initrd_path), ("boot_args", &self.boot_args)] {
            if let Some(value) = value {
                json[key] = value.as_str().into();
            }
        }
        json
    }
}

const MACHINE: &[&str] = &["vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"];
const TEMPLATES: &[&str] = &["None", "C3", "T2", "T2S", "T2CL", "T2A", "V1N1"];
const HUGE_PAGES: &[&str] = &["None", "Transparent", "2M"];
/// Index of explicit huge pages.
const EXPLICIT: usize = 2;
/// The most vCPUs.
const MAX_VCPUS: u64 = 32;

/// The vCPUs and the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// vCPUs.
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Whether pages are marked that the guest writes, for snapshots of what changed.
    pub track_dirty_pages: bool,
    /// Index of what is asked for in the way of huge pages: of transparent ones the kernel decides.
    huge_pages: usize,
}

impl Default for Machine {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128, track_dirty_pages: false, huge_pages: 0 }
    }
}

impl Machine {
    /// One of so many vCPUs and so much memory, which may be in reserved huge pages.
    pub fn of(cpus: u32, memory: Size, hugepages: bool) -> Self {
        let huge_pages = if hugepages { EXPLICIT } else { 0 };
        Self { vcpu_count: cpus, mem_size_mib: memory.get() >> 20, huge_pages, ..Self::default() }
    }

    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(MACHINE)?;
        let mut machine = Self::default();
        for key in ["vcpu_count", "mem_size_mib"] {
            table.get(key).ok_or_else(|| table.missing(key))?;
        }
        machine.apply(table)?;
        Ok(machine)
    }

    /// The machine with some keys changed.
    pub fn update(&self, node: &Node) -> Result<Self, Error> {
        let table = node.table(MACHINE)?;
        if table.pairs().is_empty() {
            return Err(Error::new(node.at, "Empty PATCH request."));
        }
        let mut machine = self.clone();
        machine.apply(table)?;
        Ok(machine)
    }

    fn apply(&mut self, table: Table<'_>) -> Result<(), Error> {
        if let Some(count) = table.number("vcpu_count", 1, MAX_VCPUS)? {
            self.vcpu_count = u32::try_from(count).unwrap_or(u32::MAX);
        }
        // No address has more than 52 bits.
        self.mem_size_mib = table.number("mem_size_mib", 1, 1 << 32)?.unwrap_or(self.mem_size_mib);
        self.track_dirty_pages = table.boolean("track_dirty_pages")?.unwrap_or(self.track_dirty_pages);
        self.huge_pages = table.choice("huge_pages", HUGE_PAGES)?.unwrap_or(self.huge_pages);
        if table.boolean("smt")? == Some(true) {
            return Err(table.wrong("smt", "bantam has no SMT: each vCPU is a core of its own"));
        }
        if table.choice("cpu_template", TEMPLATES)?.is_some_and(|template| template != 0) {
            return Err(table.wrong(
                "cpu_template",
                "bantam has no CPU templates of its own: tell what is to be otherwise by `cpu-config`",
            ));
        }
        Ok(())
    }

    /// Whether the memory is to be in reserved huge pages.
    pub fn hugepages(&self) -> bool {
        self.huge_pages == EXPLICIT
    }

    /// As it is read.
    pub fn to_json(&self) -> Value {
        json!({
            "vcpu_count": self.vcpu_count,
            "mem_size_mib": self.mem_size_mib,
            "smt": false,
            "track_dirty_pages": self.track_dirty_pages,
            "huge_pages": HUGE_PAGES[self.huge_pages],
        })
    }
}
