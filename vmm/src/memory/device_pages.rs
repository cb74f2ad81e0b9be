//! Registers of a device of the host, mapped so that a guest can be shown them.
#![allow(unsafe_code, reason = "maps and unmaps pages of a device's file")]

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Pages of a device's file. This process never reads or writes them: they are the guest's.
#[derive(Debug)]
pub struct DevicePages {
    start: *mut c_void,
    len: usize,
}

// SAFETY: the address is only handed on to the kernel; nobody here dereferences it.
unsafe impl Send for DevicePages {}
// SAFETY: as above.
unsafe impl Sync for DevicePages {}

impl DevicePages {
    /// Maps `len` bytes at `offset` of a file, both multiples of the page size.
    ///
    /// # Errors
    /// When the file cannot be mapped there.
    pub fn map(file: impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: a new mapping wherever the kernel likes replaces nothing.
        let start = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, offset)
        }?;
        Ok(Self { start, len })
    }
    /// Where they are in this process.
    pub fn host(&self) -> u64 {
        self.start as u64
    }
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }
    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for DevicePages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whoever was given its address held this value.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            tracing::error!(%error, "pages of a device stay mapped");
        }
    }
}
