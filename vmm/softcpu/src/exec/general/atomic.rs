//! Host atomics on guest memory of any alignment.
//!
//! Rust's atomics demand alignment; the architecture does not. These are the bare locked instructions.
#![allow(unsafe_code, reason = "locked instructions on guest memory, which may be unaligned")]

use std::arch::asm;

/// Compares `size` bytes at `host` with `old` and writes `new` if equal; returns what was there.
///
/// # Safety
/// `host` points at `size` (1, 2, 4, 8) bytes of mapped guest memory.
unsafe fn compare_exchange(host: *mut u8, size: u32, old: u64, new: u64) -> u64 {
    let mut seen = old;
    // SAFETY: by contract; `lock cmpxchg` has no alignment demand.
    unsafe {
        match size {
            1 => {
                asm!("lock cmpxchg [{p}], {n}", p = in(reg) host, n = in(reg_byte) new as u8, inout("rax") seen, options(nostack));
            }
            2 => {
                asm!("lock cmpxchg [{p}], {n:x}", p = in(reg) host, n = in(reg) new, inout("rax") seen, options(nostack));
            }
            4 => {
                asm!("lock cmpxchg [{p}], {n:e}", p = in(reg) host, n = in(reg) new, inout("rax") seen, options(nostack));
            }
            _ => {
                asm!("lock cmpxchg [{p}], {n}", p = in(reg) host, n = in(reg) new, inout("rax") seen, options(nostack));
            }
        }
    }
    seen & super::arith::mask(size)
}

/// Replaces the value at `host` by what `change` makes of it, as one atomic step.
pub(super) fn update(host: *mut u8, size: u32, change: &mut dyn FnMut(u64) -> Option<u64>) {
    let mut old = read(host, size);
    loop {
        // A refused change still is a locked access: write back what was there.
        let new = change(old).unwrap_or(old);
        // SAFETY: `host` comes from the memory unit and is valid for `size` bytes.
        let seen = unsafe { compare_exchange(host, size, old, new) };
        if seen == old {
            return;
        }
        old = seen;
    }
}
/// The same without atomicity.
pub(super) fn update_plain(host: *mut u8, size: u32, change: &mut dyn FnMut(u64) -> Option<u64>) {
    if let Some(new) = change(read(host, size)) {
        write(host, size, new);
    }
}
/// Reads `size` bytes at a pointer from the memory unit.
pub(super) fn read(host: *const u8, size: u32) -> u64 {
    // SAFETY: the memory unit hands out pointers that are valid for the access.
    unsafe {
        match size {
            1 => u64::from(host.read()),
            2 => u64::from(host.cast::<u16>().read_unaligned()),
            4 => u64::from(host.cast::<u32>().read_unaligned()),
            _ => host.cast::<u64>().read_unaligned(),
        }
    }
}
/// Writes `size` bytes at a pointer from the memory unit.
pub(super) fn write(host: *mut u8, size: u32, value: u64) {
    // SAFETY: as for `read`.
    unsafe {
        match size {
            1 => host.write(value as u8),
            2 => host.cast::<u16>().write_unaligned(value as u16),
            4 => host.cast::<u32>().write_unaligned(value as u32),
            _ => host.cast::<u64>().write_unaligned(value),
        }
    }
}
/// CMPXCHG16B at a pointer that is 16-byte aligned: whether it was equal, and the value seen.
pub(super) fn compare_exchange_16(host: *mut u8, old: u128, new: u128) -> (bool, u128) {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    let equal: u8;
    // SAFETY: the memory unit's pointer is valid for 16 bytes and the caller has checked its alignment. RBX is saved by
    // hand because the compiler reserves it.
    unsafe {
        asm!(
            "xchg rbx, {new_low}",
            "lock cmpxchg16b [{p}]",
            "sete {equal}",
            "mov rbx, {new_low}",
            p = in(reg) host,
            new_low = inout(reg) new as u64 => _,
            equal = out(reg_byte) equal,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    (equal != 0, u128::from(low) | (u128::from(high) << 64))
}
