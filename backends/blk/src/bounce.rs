//! Buffers of our own: aligned ones for direct I/O on misaligned guest buffers, and zeroes.

#![allow(unsafe_code, reason = "iovecs that point into our own buffers move between threads")]

use std::sync::LazyLock;

/// A buffer that starts at a multiple of its alignment, and the iovec that points to it.
#[derive(Debug)]
pub struct Bounce {
    bytes: Vec<u8>,
    start: usize,
    iov: Box<libc::iovec>,
}

// SAFETY: the iovec points into `bytes`, which moves along; it is used while the bounce is borrowed.
unsafe impl Send for Bounce {}

impl Bounce {
    /// `len` bytes, aligned to `align` (a power of two).
    pub fn new(len: usize, align: usize) -> Self {
        let bytes = vec![0; len + align];
        let start = bytes.as_ptr().align_offset(align.next_power_of_two()).min(align);
        let iov = Box::new(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
        Self { bytes, start, iov }
    }

    /// The first `len` bytes.
    pub fn part(&mut self, len: usize) -> &mut [u8] {
        let end = (self.start + len).min(self.bytes.len());
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }

    /// An iovec of the first `len` bytes; valid until the bounce is touched again or dropped.
    pub fn iovec(&mut self, len: usize) -> (*const libc::iovec, u32) {
        let part = self.part(len);
        let (iov_base, iov_len) = (part.as_mut_ptr().cast(), part.len());
        *self.iov = libc::iovec { iov_base, iov_len };
        (&raw const *self.iov, 1)
    }
}

const ZERO_PAGE_BYTES: usize = 64 << 10;
const ZERO_ENTRIES: usize = 16;

#[repr(align(4096))]
struct ZeroPage([u8; ZERO_PAGE_BYTES]);

struct ZeroVec([libc::iovec; ZERO_ENTRIES]);

// SAFETY: the entries point to constant memory that is only read.
unsafe impl Send for ZeroVec {}
// SAFETY: as above.
unsafe impl Sync for ZeroVec {}

static ZERO_PAGE: ZeroPage = ZeroPage([0; ZERO_PAGE_BYTES]);
static ZERO_VEC: LazyLock<ZeroVec> = LazyLock::new(|| {
    let iov_base = ZERO_PAGE.0.as_ptr().cast_mut().cast();
    ZeroVec([libc::iovec { iov_base, iov_len: ZERO_PAGE_BYTES }; ZERO_ENTRIES])
});
static ZERO_SMALL: LazyLock<Vec<ZeroVec>> = LazyLock::new(|| {
    let iov_base: *mut libc::c_void = ZERO_PAGE.0.as_ptr().cast_mut().cast();
    (0..ZERO_PAGE_BYTES / 512)
        .map(|sectors| {
            let mut vec = [libc::iovec { iov_base, iov_len: 0 }; ZERO_ENTRIES];
            vec[0].iov_len = sectors * 512;
            ZeroVec(vec)
        })
        .collect()
});

/// An iovec of at most `len` zero bytes, static: whole pages of it while they last, then the rest in sectors.
pub fn zeroes(len: usize) -> (*const libc::iovec, u32) {
    let pages = (len / ZERO_PAGE_BYTES).min(ZERO_ENTRIES);
    if pages > 0 {
        return (ZERO_VEC.0.as_ptr(), pages as u32);
    }
    match ZERO_SMALL.get(len / 512) {
        Some(vec) => (vec.0.as_ptr(), 1),
        None => (ZERO_VEC.0.as_ptr(), 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounce_is_aligned_and_of_its_length() {
        for align in [1, 512, 4096] {
            let mut bounce = Bounce::new(8192, align);
            assert_eq!(bounce.part(8192).len(), 8192);
            assert_eq!(bounce.part(8192).as_ptr() as usize % align, 0);
        }
    }
}
