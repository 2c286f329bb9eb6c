//! Values out of a fuzzer's bytes, with those before others that are known to be at the edge of something.

pub use arbitrary::{Result, Unstructured};

use crate::memory;

/// A guest-physical address: near the ends of memory, in it, or anywhere.
pub fn address(u: &mut Unstructured) -> Result<u64> {
    const EDGES: [u64; 10] = [
        0,
        memory::RINGS_END,
        memory::MEET,
        memory::HOLE,
        memory::HIGH,
        memory::END,
        1 << 32,
        1 << 63,
        u64::MAX,
        0xd000_0000,
    ];
    Ok(match u.int_in_range(0..=3)? {
        0 => u.choose(&EDGES)?.wrapping_add_signed(u.int_in_range(-16..=16)?),
        1 => u.int_in_range(0..=memory::END)?,
        2 => u.int_in_range(0..=memory::END / 16)? * 16,
        _ => u.arbitrary()?,
    })
}

/// The length of a buffer: of something in the field, short, or any.
pub fn length(u: &mut Unstructured) -> Result<u32> {
    const USUAL: [u32; 12] = [0, 1, 12, 16, 40, 44, 512, 513, 1024, 4096, 0x8000, u32::MAX];
    Ok(match u.int_in_range(0..=5)? {
        0..=2 => *u.choose(&USUAL)?,
        3 | 4 => u.int_in_range(0..=0x1000)?,
        _ => u.arbitrary()?,
    })
}

/// A number that is small more often than not.
pub fn number(u: &mut Unstructured) -> Result<u64> {
    Ok(match u.int_in_range(0..=3)? {
        0 | 1 => u.int_in_range(0..=16)?,
        2 => u.int_in_range(0..=0xffff)?,
        _ => u.arbitrary()?,
    })
}

/// At most `max` bytes.
pub fn bytes(u: &mut Unstructured, max: usize) -> Result<Vec<u8>> {
    let len = u.int_in_range(0..=max)?.min(u.len());
    u.bytes(len).map(<[u8]>::to_vec)
}
