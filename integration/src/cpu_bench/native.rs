//! The loops on the bare processor, called in this process.
#![allow(unsafe_code, reason = "maps the image at its own addresses and calls it")]

use super::Run;
use super::clock::ProcessorClock;
use super::image::{BASE, Image};
use super::loops::{DATA, DATA_LEN, Loop};
use anyhow::{Context, bail};

/// A mapping at a fixed address, gone with the value.
struct Fixed {
    address: u64,
    len: usize,
}

impl Fixed {
    fn new(address: u64, len: usize, protection: libc::c_int) -> anyhow::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: NOREPLACE never disturbs another mapping.
        let got = unsafe { libc::mmap(address as *mut _, len, protection, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(error).with_context(|| format!("cannot map {len:#x} bytes at {address:#x}"));
        }
        let fixed = Self { address: got as u64, len };
        if fixed.address != address {
            bail!("cannot map {len:#x} bytes at {address:#x}: this kernel knows no MAP_FIXED_NOREPLACE");
        }
        Ok(fixed)
    }
}

impl Drop for Fixed {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the loops have returned.
        unsafe { libc::munmap(self.address as *mut _, self.len) };
    }
}

/// Runs a loop here.
pub fn run(which: Loop, image: &Image) -> anyhow::Result<Run> {
    let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let code = Fixed::new(BASE, image.bytes.len(), all)?;
    let _data = Fixed::new(DATA, DATA_LEN as usize, libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: the image was assembled for these addresses; its entries follow the C convention, use only the mapped
    // data and preserve callee-saved registers.
    unsafe {
        (code.address as *mut u8).copy_from_nonoverlapping(image.bytes.as_ptr(), image.bytes.len());
        let prepare = std::mem::transmute::<usize, extern "sysv64" fn()>(image.prepare as usize);
        let run = std::mem::transmute::<usize, extern "sysv64" fn(u64) -> u64>(image.run as usize);
        prepare();
        let begun = ProcessorClock::THREAD.seconds();
        let checksum = run(which.count());
        Ok(Run { checksum, seconds: ProcessorClock::THREAD.seconds() - begun })
    }
}
