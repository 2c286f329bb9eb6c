//! A seccomp filter: BPF that looks a system call up among those that are allowed, by halves (Documentation/userspace-api/
//! seccomp_filter.rst). It is made of sorted lists in no time worth measuring, without a crate that does more.

#![expect(unsafe_code, reason = "seccomp has no safe wrapper here")]

use std::io;

use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// `AUDIT_ARCH_X86_64`: 64 bits, little-endian.
const ARCH: u32 = 0xc000_003e;

// struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const INSTRUCTION: u32 = 8;
const ARGUMENTS: u32 = 16;

/// The first system call that is newer than this program (Linux 6.10): a C library that tries it goes on without.
const NEWER: u32 = 462;
/// Numbers from here on are of the x32 ABI.
const X32: u32 = 0x4000_0000;

/// When a system call is allowed. Of arguments the low 32 bits are looked at, which is all that the kernel takes of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Always.
    Any,
    /// If the argument with this index is one of these.
    Is(u8, &'static [u32]),
    /// If none of these bits of the argument with this index is set.
    Clear(u8, u32),
    /// If the argument with this index is this process' ID.
    Own(u8),
    /// Never, and the caller gets this error.
    Fails(i32),
}

/// System calls, each with when it is allowed.
pub(super) type List = [(i64, When)];

fn op(code: u32, k: u32, jt: usize, jf: usize) -> sock_filter {
    let short = |jump: usize| u8::try_from(jump).expect("lists are short enough for jumps of a byte");
    sock_filter { code: u16::try_from(code).expect("codes have 16 bits"), jt: short(jt), jf: short(jf), k }
}

fn load(offset: u32) -> sock_filter {
    op(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

fn equal(value: u32, jt: usize, jf: usize) -> sock_filter {
    op(BPF_JMP | BPF_JEQ | BPF_K, value, jt, jf)
}

fn jump_if_at_least(value: u32, jt: usize, jf: usize) -> sock_filter {
    op(BPF_JMP | BPF_JGE | BPF_K, value, jt, jf)
}

fn ret(action: u32) -> sock_filter {
    op(BPF_RET | BPF_K, action, 0, 0)
}

/// The filter that allows what is on any of the `lists`, has what is [newer](NEWER) fail as on a kernel without it, and
/// makes all else a SIGSYS; but not from the instruction before `but_at`, if there is one. What is done with one of the
/// descriptors `others` is not allowed.
pub(super) fn compile(lists: &[&List], others: &[u32], but_at: Option<u64>) -> Vec<sock_filter> {
    let number = |number: i64| u32::try_from(number).expect("system calls have small numbers");
    let mut rules: Vec<(u32, When)> = lists.iter().copied().flatten().map(|rule| (number(rule.0), rule.1)).collect();
    rules.sort_unstable_by_key(|rule| rule.0);
    let mut program = vec![load(ARCHITECTURE), equal(ARCH, 1, 0), ret(libc::SECCOMP_RET_KILL_PROCESS)];
    if let Some(address) = but_at {
        let (low, high) = (address & 0xffff_ffff, address >> 32);
        let half = |half: u64| u32::try_from(half).expect("half of it");
        program.extend([load(INSTRUCTION), equal(half(low), 0, 3), load(INSTRUCTION + 4), equal(half(high), 0, 1)]);
        program.push(ret(libc::SECCOMP_RET_ALLOW));
    }
    program.extend([load(NUMBER), jump_if_at_least(NEWER, 0, 2), jump_if_at_least(X32, 1, 0)]);
    program.push(ret(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()));
    search(&segments(&rules, !others.is_empty()), others, &mut program);
    program
}

/// System calls from a number to that of the next segment.
type Segment<'a> = (u32, Verdict<'a>);

/// What becomes of a system call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict<'a> {
    Trap,
    Allow,
    /// That is for its arguments to say.
    Look(&'a [(u32, When)]),
}

/// All numbers in few segments: what is always allowed is often next to its like, unless it matters `on_which` descriptor
/// it is done.
fn segments(rules: &[(u32, When)], on_which: bool) -> Vec<Segment<'_>> {
    let mut segments: Vec<Segment> = Vec::with_capacity(2 * rules.len() + 1);
    let mut add = |from, verdict| {
        segments.pop_if(|last| last.0 == from);
        if segments.last().is_none_or(|last| last.1 != verdict) {
            segments.push((from, verdict));
        }
    };
    add(0, Verdict::Trap);
    for rule in rules.chunk_by(|one, other| one.0 == other.0) {
        let number = rule[0].0;
        let always =
            rule.iter().any(|(_, when)| *when == When::Any) && !(on_which && on_descriptor(number).count() > 0);
        add(number, if always { Verdict::Allow } else { Verdict::Look(rule) });
        add(number + 1, Verdict::Trap);
    }
    segments
}

/// Looks for the segment that the number is in.
fn search(segments: &[Segment], others: &[u32], program: &mut Vec<sock_filter>) {
    if let [(number, verdict)] = segments {
        match verdict {
            Verdict::Allow => program.push(ret(libc::SECCOMP_RET_ALLOW)),
            Verdict::Look(rule) => {
                program.extend(deny(*number, others));
                program.extend(rule.iter().flat_map(|(_, when)| allow(*when)));
            }
            Verdict::Trap => {}
        }
        if *verdict != Verdict::Allow {
            program.push(ret(libc::SECCOMP_RET_TRAP));
        }
        return;
    }
    let (low, high) = segments.split_at(segments.len() / 2);
    let at = program.len();
    program.push(jump_if_at_least(high[0].0, 0, 0));
    search(low, others, program);
    let over = program.len() - at - 1;
    if let Ok(over) = u8::try_from(over) {
        program[at].jt = over;
    } else {
        // A jump of a condition is a byte, that of BPF_JA is not.
        program[at].jf = 1;
        let over = u32::try_from(over).expect("a short program");
        program.insert(at + 1, op(BPF_JMP | libc::BPF_JA, over, 0, 0));
    }
    search(high, others, program);
}

/// By which arguments a system call names descriptors.
fn on_descriptor(number: u32) -> impl Iterator<Item = u8> {
    let on = super::calls::ON_DESCRIPTORS.iter();
    on.filter(move |(call, _)| u32::try_from(*call) == Ok(number)).map(|(_, index)| *index)
}

/// What returns for a system call with one of the descriptors `others`, and else goes on behind it.
fn deny(number: u32, others: &[u32]) -> impl Iterator<Item = sock_filter> {
    let named = on_descriptor(number).filter(|_| !others.is_empty());
    named.flat_map(|index| {
        let tests = others.iter().enumerate().map(|(at, fd)| {
            let left = others.len() - at - 1;
            equal(*fd, left, usize::from(left == 0))
        });
        [load(ARGUMENTS + 8 * u32::from(index))].into_iter().chain(tests).chain([ret(libc::SECCOMP_RET_TRAP)])
    })
}

/// What returns for a system call that is allowed, and else goes on behind it.
fn allow(when: When) -> Vec<sock_filter> {
    let argument = |index: u8| load(ARGUMENTS + 8 * u32::from(index));
    let allow = ret(libc::SECCOMP_RET_ALLOW);
    match when {
        When::Any => vec![allow],
        When::Is(index, values) => {
            let tests = values.iter().enumerate().map(|(at, value)| {
                let left = values.len() - at - 1;
                equal(*value, left, usize::from(left == 0))
            });
            [argument(index)].into_iter().chain(tests).chain([allow]).collect()
        }
        When::Clear(index, bits) => vec![argument(index), op(BPF_JMP | BPF_JSET | BPF_K, bits, 1, 0), allow],
        When::Own(index) => vec![argument(index), equal(std::process::id(), 0, 1), allow],
        When::Fails(errno) => vec![ret(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs())],
    }
}

/// Has the filter judge the system calls of this thread, and of those that it starts from now on. The thread has to have
/// given up new privileges (`PR_SET_NO_NEW_PRIVS`).
pub(super) fn install(program: &[sock_filter]) -> io::Result<()> {
    let len = libc::c_ushort::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions from `filter`, which are there for the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's machine makes of a call.
    fn judge(program: &[sock_filter], number: u32, arguments: [u32; 6], arch: u32, at: u64) -> u32 {
        let (mut accumulator, mut pc) = (0, 0);
        let word = |offset: u32| match offset {
            NUMBER => number,
            ARCHITECTURE => arch,
            INSTRUCTION => u32::try_from(at & 0xffff_ffff).unwrap(),
            12 => u32::try_from(at >> 32).unwrap(),
            _ => arguments[(offset as usize - 16) / 8],
        };
        loop {
            let op = program[pc];
            let code = u32::from(op.code);
            let mut jump = |taken: bool| pc += usize::from(if taken { op.jt } else { op.jf });
            match code & 0x07 {
                BPF_LD => accumulator = word(op.k),
                BPF_RET => return op.k,
                _ => match code & 0xf0 {
                    libc::BPF_JA => pc += op.k as usize,
                    BPF_JEQ => jump(accumulator == op.k),
                    BPF_JGE => jump(accumulator >= op.k),
                    BPF_JSET => jump(accumulator & op.k != 0),
                    other => panic!("{other:#x}"),
                },
            }
            pc += 1;
        }
    }

    const LISTS: [&List; 2] = [
        &[(1, When::Any), (300, When::Is(1, &[7, 9])), (9, When::Clear(2, 4)), (435, When::Fails(38))],
        &[(300, When::Is(0, &[5])), (3, When::Own(0))],
    ];

    #[test]
    fn a_filter_allows_what_is_listed_and_nothing_else() {
        let program = compile(&LISTS, &[], None);
        let call = |number, arguments: [u32; 6]| judge(&program, number, arguments, ARCH, 0);
        let (allow, trap) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRAP);
        for number in (0..500).chain([u32::MAX, 0x4000_0001]) {
            let expected = match number {
                1 | 9 => allow,
                435 | 462..500 => libc::SECCOMP_RET_ERRNO | 38,
                _ => trap,
            };
            assert_eq!(call(number, [0; 6]), expected, "{number}");
        }
        assert_eq!([7, 9, 8].map(|value| call(300, [0, value, 0, 0, 0, 0])), [allow, allow, trap]);
        assert_eq!(call(300, [5, 0, 0, 0, 0, 0]), allow, "one condition is enough");
        assert_eq!([3, 4, 12].map(|value| call(9, [0, 0, value, 0, 0, 0])), [allow, trap, trap]);
        assert_eq!(call(3, [std::process::id(), 0, 0, 0, 0, 0]), allow);
        assert_eq!(judge(&program, 1, [0; 6], 0x4000_0003, 0), libc::SECCOMP_RET_KILL_PROCESS, "32-bit calls");
    }

    /// The kernel checks, translates and compiles each of them when the filter is installed.
    #[test]
    fn neighbours_share_instructions() {
        let one: &List = &[(1, When::Any)];
        let many: &List = &[(1, When::Any), (2, When::Any), (3, When::Any), (4, When::Any)];
        let of = |list, others: &[u32]| compile(&[list], others, None).len();
        assert_eq!(of(one, &[]), of(many, &[]));
        assert!(of(one, &[7]) < of(many, &[7]), "pread64 and others are for some descriptors");
    }

    #[test]
    fn some_descriptors_are_for_others() {
        let own: &List = &[
            (libc::SYS_pread64, When::Any),
            (libc::SYS_mmap, When::Clear(2, 4)),
            (libc::SYS_copy_file_range, When::Any),
        ];
        let lists = [own, &LISTS[0][..1]];
        let program = compile(&lists, &[5, 6], None);
        let call = |number: i64, arguments| judge(&program, number.try_into().unwrap(), arguments, ARCH, 0);
        let (allow, trap) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRAP);
        for (fd, expected) in [(4, allow), (5, trap), (6, trap), (7, allow)] {
            for number in [libc::SYS_pread64, libc::SYS_write] {
                assert_eq!(call(number, [fd, 5, 6, 0, 0, 0]), expected, "{number} {fd}");
            }
            assert_eq!(call(libc::SYS_mmap, [5, 0, 0, 0, fd, 0]), expected, "{fd}");
            for copied in [[fd, 0, 4, 0, 9, 0], [4, 0, fd, 0, 9, 0]] {
                assert_eq!(call(libc::SYS_copy_file_range, copied), expected, "{copied:?}");
            }
        }
        assert_eq!(call(libc::SYS_mmap, [0, 0, 4, 0, 4, 0]), trap);
    }

    #[test]
    fn one_instruction_may_do_all() {
        let address = 0x7fff_1234_5678;
        let program = compile(&LISTS, &[], Some(address));
        let at = |at| judge(&program, 100, [0; 6], ARCH, at);
        let (allow, trap) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRAP);
        assert_eq!([address, address + 1, address & 0xffff_ffff].map(at), [allow, trap, trap]);
        assert_eq!(judge(&program, 1, [0; 6], ARCH, 0), allow);
    }
}
