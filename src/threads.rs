//! The threads that bantam makes.

use std::thread::Builder;

/// The size of their stacks, in bytes: less than a huge page, so that the host makes none of one. With Rust's 2 MiB a stack that happens to lie
/// where a huge page can be takes 2 MiB of memory for some KiB.
const STACK: usize = (2 << 20) - (64 << 10);

/// A thread of this `name`, of which the host shows 15 bytes.
///
/// ```
/// let thread = bantam::threads::named("example".into()).spawn(|| 7)?;
/// assert_eq!(thread.join().ok(), Some(7));
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn named(name: String) -> Builder {
    Builder::new().name(name).stack_size(STACK)
}
