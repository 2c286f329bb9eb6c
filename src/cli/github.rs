//! GitHub's workflow commands: lines of output that its runner folds, or shows beside a change.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use super::ending::Ending;

/// What a guest prints, in a group. The runner takes no orders from it: without that a guest could set what
/// later steps of the job work with.
pub struct Group {
    /// What ends this; not to be guessed.
    token: String,
}

impl Group {
    /// Begins a group on standard output.
    pub fn begin(title: &str) -> Self {
        let mut random = [0; 16];
        // Without it the group is as safe as other output of the job.
        let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
        let mut token = String::from("bantam-");
        random.iter().for_each(|byte| token += &format!("{byte:02x}"));
        print(&format!("::group::{}\n::stop-commands::{token}\n", data(title)));
        Self { token }
    }

    /// Ends it, with a line of its own.
    pub fn end(self) {
        print(&format!("\n::{}::\n::endgroup::\n", self.token));
    }
}

/// Whether bantam's own words are made inert.
static INERT: AtomicBool = AtomicBool::new(false);

/// Has all that bantam says from now on be no order to the runner: causes have words of the guest's.
pub fn guard_words() {
    INERT.store(true, Ordering::Relaxed);
}

/// What bantam says, as it may be said.
pub fn guarded(text: &str) -> Cow<'_, str> {
    if INERT.load(Ordering::Relaxed) { inert(text).into() } else { text.into() }
}

/// Text in which the runner finds no command: neither `::command::` at the start of a line, nor `##[command]` anywhere.
pub fn inert(text: &str) -> String {
    // Twice, as three in a row are still two once.
    text.replace("::", ": :").replace("::", ": :").replace("##[", "# #[")
}

/// Tells of a failure.
pub fn error(title: &str, ending: &Ending) {
    print(&annotation("error", title, &ending.text()));
}

/// Tells of attempts that failed before one that did not.
pub fn warning(title: &str, text: &str) {
    print(&annotation("warning", title, text));
}

fn annotation(level: &str, title: &str, text: &str) -> String {
    format!("::{level} title={}::{}\n", property(title), data(text.trim_end()))
}

/// A reader that goes away has seen enough.
fn print(text: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// As the text of a command.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// As the value of a command's property.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_guest_are_no_command() {
        let text = inert("panic:\n  ::stop-commands::x\n:::::y\n###[add-mask]e ##[group]");
        assert!(!text.contains("::") && !text.contains("##["), "{text}");
    }

    #[test]
    fn a_command_is_one_line_and_its_text_stays_text() {
        let line = annotation("error", "a,b: 100%", "50%: x, y\r\n::set-env name=X::y\n");
        assert_eq!(line, "::error title=a%2Cb%3A 100%25::50%25: x, y%0D%0A::set-env name=X::y\n");
    }
}
