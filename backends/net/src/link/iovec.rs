//! Ranges of guest memory with something of ours before or behind them, for one system call.

#![allow(unsafe_code, reason = "pointers into guest memory for a system call")]

use atoll_kit::memory::Transfer;

/// A list of ranges, whose memory is used again. It is good for one call: filled before and forgotten after it.
#[derive(Debug, Default)]
pub struct Iovecs(Vec<libc::iovec>);

// SAFETY: the pointers are used only in the call for which they were put in, on the thread that put them in.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// Forgets what was in it.
    pub fn clear(&mut self) -> &mut Self {
        self.0.clear();
        self
    }

    /// Adds memory of ours.
    pub fn add(&mut self, bytes: &mut [u8]) -> &mut Self {
        self.0.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        self
    }

    /// Adds the first `entries_max` ranges of a transfer; the bytes of those.
    pub fn add_guest(&mut self, transfer: &Transfer, entries_max: u32) -> usize {
        let (iovec, entries) = transfer.iovec();
        // SAFETY: the transfer lends as many entries as it says.
        let lent = unsafe { std::slice::from_raw_parts(iovec, entries.min(entries_max) as usize) };
        self.0.extend_from_slice(lent);
        lent.iter().map(|entry| entry.iov_len).sum()
    }

    /// The list as the kernel wants it.
    pub fn list(&self) -> &[libc::iovec] {
        &self.0
    }
}
