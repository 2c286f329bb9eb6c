//! A console that keeps what is written to it, for who waits for it.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A guest that is still silent then has failed.
const LIMIT: Duration = Duration::from_secs(120);

/// What a machine in this process has printed.
#[derive(Clone, Default)]
pub struct Screen(Arc<(Mutex<String>, Condvar)>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().push_str(&String::from_utf8_lossy(bytes));
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    /// Waits until `text` was printed.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_until(|seen| seen.contains(text));
    }

    /// Waits until what was printed is as `wanted`; what it is.
    #[track_caller]
    pub fn wait_until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let seen = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), LIMIT, |seen| !wanted(seen)).unwrap();
        assert!(!seen.1.timed_out(), "{}", seen.0);
        seen.0.clone()
    }

    pub fn text(&self) -> String {
        self.0.0.lock().unwrap().clone()
    }
}
