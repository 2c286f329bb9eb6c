//! What a guest of each architecture expects to find: plain data, no descriptors, no ioctls.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
