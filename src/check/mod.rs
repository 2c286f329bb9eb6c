//! `bantam check`: what this host, and a kernel, have of what bantam needs.

mod host;
mod kernel;
mod syscall;

use std::fmt;

use serde::Serialize;

pub use host::{hardware_virtualization, host, kvm_advice};
pub(crate) use kernel::config_beside;
pub use kernel::kernel;

/// What was found of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It is there.
    Ok,
    /// It is not there, and nothing works without it.
    Missing,
    /// It is not there, and something is lost without it.
    Absent,
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// What was looked for.
    pub name: String,
    /// What was found.
    pub status: Status,
    /// The particulars: which one it is, or what is lost without it and what helps. May be empty.
    pub detail: String,
}

impl Row {
    fn ok(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Ok, detail: detail.into() }
    }
    fn missing(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Missing, detail: detail.into() }
    }
    fn absent(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Absent, detail: detail.into() }
    }
}

/// What was found of a number of things. Its text is a table, a thing a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Table(pub Vec<Row>);

impl Table {
    /// Whether nothing that is required is missing.
    pub fn is_ready(&self) -> bool {
        self.0.iter().all(|row| row.status != Status::Missing)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for row in &self.0 {
            let status = match row.status {
                Status::Ok => "ok",
                Status::Missing => "MISSING",
                Status::Absent => "absent",
            };
            let line = format!("  {:width$}  {status:7}  {}", row.name, row.detail);
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// An error's text without the number at its end, which says nothing that the words before it do not.
fn without_number(text: &str) -> String {
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_required_fails_a_table() {
        let mut table = Table(vec![Row::ok("a", ""), Row::absent("bb", "no sound")]);
        assert!(table.is_ready());
        table.0.push(Row::missing("c", "get one"));
        assert!(!table.is_ready());
        assert_eq!(table.to_string(), "  a   ok\n  bb  absent   no sound\n  c   MISSING  get one\n");
    }

    #[test]
    fn json_is_a_list_of_rows() {
        let json = serde_json::to_string(&Table(vec![Row::absent("a", "b")])).unwrap();
        assert_eq!(json, r#"[{"name":"a","status":"absent","detail":"b"}]"#);
    }
}
