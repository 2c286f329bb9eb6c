//! The guest's random numbers.

use crate::sys;

const RNDADDENTROPY: usize = 0x4008_5203;
const RNDRESEEDCRNG: usize = 0x5207;

/// What fits into [`PoolInfo`].
const SEED: usize = 32;

/// `struct rand_pool_info`.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    bytes: i32,
    buffer: [u8; SEED],
}

/// Has the kernel make its random numbers anew, of `seed` and what it had: machines of one snapshot have had the same, and not
/// every kernel can be told that they are others.
pub fn mix(seed: &[u8]) -> sys::Result<()> {
    let mut info = PoolInfo { entropy_bits: 8 * SEED as i32, bytes: SEED as i32, buffer: [0; SEED] };
    let count = seed.len().min(SEED);
    info.buffer[..count].copy_from_slice(&seed[..count]);
    let device = sys::open(c"/dev/urandom", sys::WRITE_ONLY)?;
    let added = sys::ioctl(device, RNDADDENTROPY, &raw const info as usize);
    // Kernels that have used none yet refuse that: they begin with the seed.
    let _ = sys::ioctl(device, RNDRESEEDCRNG, 0);
    sys::close(device);
    added.map(drop)
}
