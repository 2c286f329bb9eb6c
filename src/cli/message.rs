//! What is said to the user on standard error.

use std::error::Error;
use std::io::{self, Write};

use super::github::guarded;

/// Says something on standard error. If that is closed there is nobody to tell.
pub fn say(text: &str) {
    let text = format!("bantam: {}\n", text.trim_end());
    let _ = io::stderr().write_all(guarded(&text).as_bytes());
}

/// An error and its causes, each once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    // The number says nothing that the words before it do not.
    match text.rsplit_once(" (os error ") {
        Some((words, number)) if number.ends_with(')') => words.to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open {path}")]
    struct Open {
        path: &'static str,
        #[source]
        source: io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error(transparent)]
    struct Outer(#[from] Open);

    #[test]
    fn an_error_is_told_with_its_causes() {
        let source = io::Error::from_raw_os_error(2);
        let error = Outer(Open { path: "/x", source });
        assert_eq!(chain(&error), "cannot open /x: No such file or directory");
    }
}
