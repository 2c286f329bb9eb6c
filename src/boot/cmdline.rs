//! The kernel command line.

use std::fmt;

use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::layout::{CMDLINE, CMDLINE_MAX};
use crate::memory::GuestRam;

/// What bantam tells every kernel: the console it has; to reboot by the i8042 (a triple fault is then a crash), and to
/// do that at once when it panics; and not to look for PCI, as there is none.
pub const DEFAULT: &str = "console=ttyS0 reboot=k panic=-1 pci=off";

/// A command line that the kernel cannot be given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It would end there.
    #[error("the kernel command line has a NUL character at byte {0}")]
    Nul(usize),
    /// The kernel would cut it off.
    #[error("the kernel command line is {0} bytes long, the kernel takes {max}", max = CMDLINE_MAX - 1)]
    TooLong(usize),
    /// There is no memory where it has to be.
    #[error("there is no guest memory for the kernel command line at {CMDLINE:#x}")]
    NoMemory,
}

/// A command line, put together from the left: what comes later wins with most parameters.
///
/// ```
/// use bantam::boot::cmdline::{Cmdline, DEFAULT};
/// let mut cmdline = Cmdline::default();
/// cmdline.push(DEFAULT)?.push("root=/dev/vda")?.push("quiet acpi=off")?;
/// assert_eq!(cmdline.to_string(), format!("{DEFAULT} root=/dev/vda quiet acpi=off"));
/// assert!(cmdline.acpi_off());
/// # Ok::<(), bantam::boot::cmdline::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cmdline(String);

impl Cmdline {
    /// Appends `text`, separated by a space.
    ///
    /// # Errors
    /// When `text` has a NUL, or makes the command line longer than the kernel takes.
    pub fn push(&mut self, text: &str) -> Result<&mut Self, Error> {
        if let Some(at) = text.bytes().position(|byte| byte == 0) {
            return Err(Error::Nul(at));
        }
        let space = !self.0.is_empty() && !text.is_empty();
        let len = self.0.len() + usize::from(space) + text.len();
        if len >= CMDLINE_MAX {
            return Err(Error::TooLong(len));
        }
        if space {
            self.0.push(' ');
        }
        self.0.push_str(text);
        Ok(self)
    }

    /// Whether the kernel is told to do without ACPI.
    pub fn acpi_off(&self) -> bool {
        let parameters = self.0.split_ascii_whitespace().take_while(|text| *text != "--");
        parameters.filter_map(|text| text.strip_prefix("acpi=")).fold(false, |off, value| match value {
            "off" => true,
            "force" | "on" | "rsdt" | "copy_dsdt" => false,
            _ => off,
        })
    }

    /// Writes it, NUL-terminated, where [`CMDLINE`] is.
    ///
    /// # Errors
    /// When there is no guest memory.
    pub fn write(&self, ram: &GuestRam) -> Result<(), Error> {
        let bytes = [self.0.as_bytes(), &[0]].concat();
        ram.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(|_| Error::NoMemory)
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    #[test]
    fn the_longest_command_line_is_written_with_its_nul() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        let mut cmdline = Cmdline::default();
        cmdline.push("a").unwrap().push(&"b".repeat(CMDLINE_MAX - 3)).unwrap();
        assert_eq!(cmdline.push("c"), Err(Error::TooLong(CMDLINE_MAX + 1)));
        ram.write_slice(&[0xff; CMDLINE_MAX], GuestAddress(CMDLINE)).unwrap();
        cmdline.write(&ram).unwrap();
        let mut written = [0; CMDLINE_MAX];
        ram.read_slice(&mut written, GuestAddress(CMDLINE)).unwrap();
        assert!(written.starts_with(b"a bbb") && written.ends_with(b"b\0"));
    }

    #[test]
    fn nul_is_refused() {
        assert_eq!(Cmdline::default().push("ab\0c"), Err(Error::Nul(2)));
    }

    #[test]
    fn the_last_word_about_acpi_counts() {
        for (text, off) in [
            ("", false),
            ("acpi=off", true),
            ("acpi=off acpi=noirq", true),
            ("acpi=off acpi=force", false),
            ("xacpi=off", false),
            ("quiet -- acpi=off", false),
        ] {
            assert_eq!(Cmdline::default().push(text).unwrap().acpi_off(), off, "{text}");
        }
    }
}
