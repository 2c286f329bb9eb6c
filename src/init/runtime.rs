//! What every Rust program without the standard library has to bring: a start, memory, and an end in a panic.

#![expect(unsafe_code, reason = "the allocator and what the compiler calls")]

use core::alloc::{GlobalAlloc, Layout};
use core::ffi::{c_char, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::sys;

/// Where `_start` goes on, with a stack.
pub extern "C" fn start() -> ! {
    crate::main()
}

/// Memory is taken and never given back: the init allocates while it prepares, and little.
struct Bump;

#[global_allocator]
static ALLOCATOR: Bump = Bump;

/// Where free memory begins and ends.
static NEXT: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
const CHUNK: usize = 1 << 20;

// SAFETY: each piece is handed out once, from a mapping of its own process; there is one thread.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut at = NEXT.load(Ordering::Relaxed).next_multiple_of(layout.align());
        if at + layout.size() > END.load(Ordering::Relaxed) {
            let bytes = (layout.size() + layout.align()).next_multiple_of(CHUNK);
            let Ok(memory) = sys::map(bytes) else { return null_mut() };
            END.store(memory as usize + bytes, Ordering::Relaxed);
            at = (memory as usize).next_multiple_of(layout.align());
        }
        NEXT.store(at + layout.size(), Ordering::Relaxed);
        at as *mut u8
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[panic_handler]
fn panic(panic: &core::panic::PanicInfo<'_>) -> ! {
    crate::say(&alloc::format!("internal error: {panic}"));
    sys::restart()
}

/// The precompiled `alloc` names it, and with `panic=abort` nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Likewise.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    sys::restart()
}

/// As the C library's; the compiler makes calls of it.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const c_void, other: *const c_void, count: usize) -> i32 {
    let (one, other) = (one.cast::<u8>(), other.cast::<u8>());
    for at in 0..count {
        // SAFETY: the caller has `count` bytes there.
        let a = unsafe { one.add(at).read_volatile() };
        // SAFETY: likewise.
        let b = unsafe { other.add(at).read_volatile() };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const c_void, other: *const c_void, count: usize) -> i32 {
    // SAFETY: the caller has `count` bytes at both.
    unsafe { memcmp(one, other, count) }
}

/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const c_char) -> usize {
    let mut len = 0;
    // SAFETY: the caller's text ends with a zero.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
