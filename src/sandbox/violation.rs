//! A system call that is on no list: it is told in one line, and the process ends, or goes on.

#![expect(unsafe_code, reason = "a signal handler, which reads what the kernel tells of the call")]

use std::fmt::{self, Write};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::names;
use crate::terminal;

/// What the process exits with: bantam failed.
const STATUS: i32 = 125;
/// After so many lines nothing more is told: a loop would fill the disk.
const LINES_MAX: u32 = 100;
/// How far callers are looked for on the stack, in words.
const STACK_WORDS: usize = 512;

static GOES_ON: AtomicBool = AtomicBool::new(false);
static LINES: AtomicU32 = AtomicU32::new(0);

/// Has a system call that a thread may not make be told on standard error, with its arguments, the thread, and the place in
/// the program. The process then ends with status 125; or the call is made, and it goes on, if that is what it was
/// [told](super::Mode::Log). This is a handler of SIGSYS, for the whole process, and for one that is a program by itself.
///
/// # Errors
/// When the handler cannot be installed.
pub fn name_violations(goes_on: bool) -> io::Result<()> {
    GOES_ON.store(goes_on, Ordering::Relaxed);
    // SAFETY: a struct of integers and pointers, for which zeros are values.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigsys as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler does only what is async-signal-safe, but for the terminal, which it does not wait for.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The part of `siginfo_t` that tells of a system call, behind the first 16 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Call {
    address: u64,
    number: i32,
    _architecture: u32,
}

extern "C" fn on_sigsys(_signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const SYS_SECCOMP: i32 = 1;
    // SAFETY: the kernel gives the handler a siginfo_t.
    let code = unsafe { (*info).si_code };
    if code != SYS_SECCOMP {
        return;
    }
    // SAFETY: with this code it has these fields at this offset, within its 128 bytes.
    let call = unsafe { info.wrapping_byte_add(16).cast::<Call>().read() };
    // SAFETY: the kernel gives a handler of this kind the context, which nobody else has.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let register = |index: i32| registers[usize::try_from(index).unwrap_or_default()].cast_unsigned();
    let arguments =
        [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9].map(register);
    let number = u64::from(call.number.cast_unsigned());
    if LINES.fetch_add(1, Ordering::Relaxed) < LINES_MAX {
        tell(number, &arguments, call.address, register(libc::REG_RSP));
    }
    if GOES_ON.load(Ordering::Relaxed) {
        let result = passed_on(number, &arguments);
        registers[usize::try_from(libc::REG_RAX).unwrap_or_default()] = result;
        return;
    }
    terminal::restore_if_free();
    // SAFETY: ends the process, and runs nobody's code.
    unsafe { libc::_exit(STATUS) };
}

/// Makes the call from the one instruction that filters let do all when it goes on.
fn passed_on(number: u64, arguments: &[u64; 6]) -> i64 {
    let [rdi, rsi, rdx, r10, r8, r9] = *arguments;
    let result;
    // SAFETY: the program makes this call, with these arguments, and would have made it itself.
    unsafe {
        std::arch::asm!(
            "call {passage}", passage = sym passage,
            inlateout("rax") number => result,
            in("rdi") rdi, in("rsi") rsi, in("rdx") rdx, in("r10") r10, in("r8") r8, in("r9") r9,
            out("rcx") _, out("r11") _,
        );
    }
    result
}

/// A `syscall` instruction and nothing else.
#[unsafe(naked)]
extern "C" fn passage() {
    std::arch::naked_asm!("syscall", "ret")
}

/// The address behind that instruction, which is what a filter sees.
pub(super) fn passage_end() -> u64 {
    const LENGTH: u64 = 2;
    (passage as *const () as usize as u64) + LENGTH
}

/// Makes a system call that is on no list.
#[cfg(debug_assertions)]
pub(super) fn violate() {
    // SAFETY: it fails, as there is nothing at this address.
    unsafe { libc::syscall(libc::SYS_swapoff, 0) };
}

/// Reads nothing from a descriptor.
#[cfg(debug_assertions)]
pub(super) fn read(fd: u32) {
    // SAFETY: it writes to no memory.
    unsafe { libc::syscall(libc::SYS_read, fd, 0, 0) };
}

fn tell(number: u64, arguments: &[u64; 6], address: u64, stack: u64) {
    let mut line = Line { bytes: [0; 512], len: 0 };
    let mut thread = [0u8; 16];
    // SAFETY: it writes at most 16 bytes, with a zero at the end.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread = thread.split(|byte| *byte == 0).next().unwrap_or_default();
    let thread = std::str::from_utf8(thread).unwrap_or("?");
    let name = names::name(number).unwrap_or("?");
    // What does not fit is left out.
    let _ = write!(line, "bantam: sandbox: thread {thread} made the system call {name} ({number}) with");
    let _ = arguments.iter().try_for_each(|argument| write!(line, " {argument:#x}"));
    let _ = write!(line, " at {}", Place(address));
    if let Some(caller) = caller(stack).filter(|_| !is_in_program(address)) {
        let _ = write!(line, ", called at {}", Place(caller));
    }
    let _ = match GOES_ON.load(Ordering::Relaxed) {
        true => writeln!(line, "; it goes on (--sandbox log)"),
        false => writeln!(line, ", which it may not: please report it; --sandbox off is without this protection"),
    };
    // SAFETY: writes bytes that are there.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
}

/// An address as a debugger finds it in the file of the program, if it is there.
struct Place(u64);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match is_in_program(self.0) {
            true => write!(f, "bantam+{:#x}", self.0 - program().start),
            false => write!(f, "{:#x}", self.0),
        }
    }
}

/// Where the program's code is.
fn program() -> std::ops::Range<u64> {
    // SAFETY: the linker defines both, around the parts of the program that are never written.
    unsafe extern "C" {
        safe static __executable_start: u8;
        safe static etext: u8;
    }
    let address = |place: *const u8| place.addr() as u64;
    address(&raw const __executable_start)..address(&raw const etext)
}

fn is_in_program(address: u64) -> bool {
    program().contains(&address)
}

/// The first address on the stack that is in the program's code: where a function of a library was called, most likely.
fn caller(stack: u64) -> Option<u64> {
    let words = usize::try_from(stack).ok().map(std::ptr::with_exposed_provenance::<u64>)?;
    let page_end = (stack | 0xfff) + 1;
    let left = usize::try_from((page_end - stack) / 8).unwrap_or_default();
    (0..left.min(STACK_WORDS)).find_map(|index| {
        // SAFETY: the stack of the thread that made the call is mapped to the end of the page that it is in, and this
        // thread is the one.
        let word = unsafe { words.wrapping_add(index).read_volatile() };
        Some(word).filter(|word| is_in_program(*word))
    })
}

/// Text of limited length, without an allocation.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.len..self.len + text.len()).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}
