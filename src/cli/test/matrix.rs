//! Which kernels, root file systems and commands make the cases, and the flags that each is run with.

use std::collections::BTreeMap;

/// What holds for cases, as flags of `bantam run`.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Flags without dashes, and their values; what is more special replaces them.
    pub single: BTreeMap<&'static str, String>,
    /// Flags that add up.
    pub several: Vec<String>,
}

impl Settings {
    /// Adds what is more special.
    pub fn add(&mut self, other: &Self) {
        self.single.extend(other.single.clone());
        self.several.extend_from_slice(&other.several);
    }
}

/// A kernel, a root file system or a command.
#[derive(Debug, Clone, Default)]
pub struct Entry {
    pub name: String,
    pub settings: Settings,
    /// Its own flags.
    pub flags: Vec<String>,
    /// Of a kernel: text for its command line.
    pub cmdline: Option<String>,
    /// Of a root file system.
    pub rootfs: Option<String>,
    /// Of a command.
    pub words: Vec<String>,
}

/// Names of kernels, root file systems and commands; none of a kind stands for all.
#[derive(Debug, Default)]
pub struct Pattern(pub [Vec<String>; 3]);

impl Pattern {
    fn matches(&self, entries: &[&Entry; 3]) -> bool {
        self.0.iter().zip(entries).all(|(names, entry)| names.is_empty() || names.contains(&entry.name))
    }
}

/// What a test file says.
#[derive(Debug)]
pub struct Matrix {
    pub defaults: Settings,
    /// Kernels, root file systems, commands.
    pub axes: [Vec<Entry>; 3],
    pub excluded: Vec<Pattern>,
    /// Exceptions to what is excluded.
    pub included: Vec<Pattern>,
}

/// One machine to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The names of its kernel, root file system and command, as far as it has them.
    pub names: Vec<String>,
    /// Words after `bantam run`, before ROOTFS.
    pub flags: Vec<String>,
    /// Text for the kernel's command line.
    pub cmdline: String,
    pub has_command: bool,
    /// ROOTFS, and `--` and the command, as far as it has them.
    pub operands: Vec<String>,
}

impl Case {
    /// All its names.
    pub fn name(&self) -> String {
        self.names.join("/")
    }
}

impl Matrix {
    /// The cases, in the order of the file: all commands of the first root file system come first.
    pub fn cases(&self) -> Vec<Case> {
        let nothing = [Entry::default()];
        let axis = |index: usize| if self.axes[index].is_empty() { &nothing[..] } else { &self.axes[index] };
        let mut cases = vec![];
        for kernel in axis(0) {
            for root in axis(1) {
                for command in axis(2) {
                    let entries = [kernel, root, command];
                    let excluded = self.excluded.iter().any(|pattern| pattern.matches(&entries));
                    if !excluded || self.included.iter().any(|pattern| pattern.matches(&entries)) {
                        cases.push(self.case(entries));
                    }
                }
            }
        }
        cases
    }

    fn case(&self, entries: [&Entry; 3]) -> Case {
        let mut settings = self.defaults.clone();
        entries.iter().for_each(|entry| settings.add(&entry.settings));
        let mut flags: Vec<_> = settings.single.iter().map(|(flag, value)| format!("--{flag}={value}")).collect();
        flags.extend(settings.several);
        flags.extend(entries.iter().flat_map(|entry| entry.flags.clone()));
        let mut operands: Vec<_> = entries.iter().filter_map(|entry| entry.rootfs.clone()).collect();
        let words: Vec<_> = entries.iter().flat_map(|entry| entry.words.clone()).collect();
        let has_command = !words.is_empty();
        let mut cmdline: String = entries.iter().filter_map(|entry| entry.cmdline.as_deref()).collect();
        if has_command {
            // As without a file that its messages are kept in, which takes time for each byte.
            cmdline = format!("quiet {cmdline}").trim_end().to_owned();
            operands.push("--".into());
            operands.extend(words);
        }
        let names = entries.iter().map(|entry| entry.name.clone()).filter(|name| !name.is_empty()).collect();
        Case { names, flags, cmdline, has_command, operands }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, memory: &str, env: &str) -> Entry {
        let settings = Settings { single: [("memory", memory.to_owned())].into(), several: vec![env.to_owned()] };
        Entry { name: name.into(), settings, ..Entry::default() }
    }

    fn matrix() -> Matrix {
        let kernels = vec![Entry { flags: vec!["--kernel=k".into()], ..entry("k", "1M", "--env=A=1") }];
        let roots = vec![Entry { rootfs: Some("r.img".into()), ..entry("r", "2M", "--env=A=2") }];
        let words = vec!["true".into()];
        let commands = vec![Entry { words, name: "x".into(), ..Entry::default() }, entry("y", "3M", "--env=A=3")];
        let defaults = Settings { single: [("timeout", "10m".to_owned())].into(), several: vec![] };
        Matrix { defaults, axes: [kernels, roots, commands], excluded: vec![], included: vec![] }
    }

    #[test]
    fn what_is_more_special_counts_or_comes_last() {
        let cases = matrix().cases();
        assert_eq!(cases[0].name(), "k/r/x");
        assert_eq!(cases[0].flags, ["--memory=2M", "--timeout=10m", "--env=A=1", "--env=A=2", "--kernel=k"]);
        assert_eq!((&*cases[0].operands.concat(), &*cases[0].cmdline), ("r.img--true", "quiet"));
        assert!(cases[1].flags.contains(&"--memory=3M".into()) && !cases[1].has_command, "{:?}", cases[1]);
    }

    #[test]
    fn an_exclusion_has_exceptions() {
        let pattern = |root: &[&str], command: &[&str]| {
            Pattern([
                vec![],
                root.iter().map(|it| it.to_string()).collect(),
                command.iter().map(|it| it.to_string()).collect(),
            ])
        };
        let names = |matrix: Matrix| matrix.cases().iter().map(Case::name).collect::<Vec<_>>();
        assert_eq!(names(Matrix { excluded: vec![pattern(&["r"], &["x"])], ..matrix() }), ["k/r/y"]);
        let included = vec![pattern(&[], &["x"])];
        assert_eq!(names(Matrix { excluded: vec![pattern(&["r"], &[])], included, ..matrix() }), ["k/r/x"]);
    }
}
