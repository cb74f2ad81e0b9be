//! A bounded code buffer that is never writable and executable through the same address: one memfd, mapped once
//! read-write for the emitter and once read-execute for the CPU.
#![allow(unsafe_code, reason = "maps memory and copies machine code into it")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// The double mapping. Pages are only backed once code lies in them.
pub(super) struct Arena {
    write: NonNull<u8>,
    execute: NonNull<u8>,
    capacity: usize,
    used: usize,
}

// SAFETY: both mappings belong to this value alone; nothing in it depends on the thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps a buffer of `capacity` bytes, a multiple of the page size.
    pub(super) fn new(capacity: usize) -> io::Result<Self> {
        const MFD_EXEC: libc::c_uint = 0x10;
        let name = c"atoll-thunks";
        // SAFETY: memfd_create takes a C string and flags; the result is checked.
        let mut raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | MFD_EXEC) };
        if raw < 0 {
            // Kernels before 6.3 refuse the flag and make every memfd executable.
            // SAFETY: as above.
            raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        }
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` is a descriptor that was just made and belongs to nobody else.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: plain call on an owned descriptor.
        if unsafe { libc::ftruncate(file.as_raw_fd(), capacity as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let write = map(&file, capacity, libc::PROT_READ | libc::PROT_WRITE)?;
        let execute = match map(&file, capacity, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(execute) => execute,
            Err(error) => {
                // SAFETY: the mapping was made above with this length and nothing refers to it.
                unsafe { libc::munmap(write.as_ptr().cast(), capacity) };
                return Err(error);
            }
        };
        Ok(Self { write, execute, capacity, used: 0 })
    }

    /// Address at which the next code will run.
    pub(super) fn next_address(&self) -> u64 {
        self.execute.as_ptr() as u64 + self.used as u64
    }

    /// Copies `code`, assembled for [`Arena::next_address`], and returns its executable address; `None` when it does
    /// not fit any more.
    pub(super) fn push(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let aligned = code.len().checked_next_multiple_of(16)?;
        if aligned > self.capacity - self.used {
            return None;
        }
        // SAFETY: `used + code.len() <= capacity`, so source and target are valid; the emitter is the only writer.
        unsafe {
            self.write.as_ptr().add(self.used).copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        // SAFETY: `used <= capacity`, the result lies in the executable mapping.
        let entry = unsafe { self.execute.add(self.used) };
        self.used += aligned;
        Some(entry)
    }

    /// Forgets all code.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        // The same addresses will hold other code, written through another linear address: the SDM (vol. 3, 8.1.3)
        // asks for a serialising instruction before it runs.
        std::arch::x86_64::__cpuid(0);
    }

    /// Bytes of code in the buffer.
    pub(super) fn used(&self) -> usize {
        self.used
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new` with this length; no thunk may be called once its owner is gone
        // (contract of `ThunkRef::call`).
        unsafe {
            libc::munmap(self.write.as_ptr().cast(), self.capacity);
            libc::munmap(self.execute.as_ptr().cast(), self.capacity);
        }
    }
}

fn map(file: &OwnedFd, len: usize, protection: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh shared mapping at an address of the kernel's choice; the result is checked.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap returned address zero"))
}
