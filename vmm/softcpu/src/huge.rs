//! Memory in huge pages for what the processor touches with every instruction: decoded code, the translation cache, the
//! jump cache.
//!
//! Cold guest code is limited by the host's memory, and there by translations as much as by data: decoded code of a kernel
//! is 20 MiB, five thousand small pages, and under a hypervisor each miss walks two sets of tables. One stretch of
//! address space is reserved, of which a page is backed once something lies in it.
#![allow(unsafe_code, reason = "maps memory and hands out places in it")]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A huge page.
const HUGE: usize = 2 << 20;
/// What the kernel counts in.
const SMALL: usize = 4096;
/// Every place is a multiple of it: a line of the host's caches.
const ALIGN: usize = 64;

/// The stretch. Places are handed out one behind the other and never taken back.
pub(crate) struct HugePages {
    base: NonNull<u8>,
    len: usize,
    top: AtomicUsize,
}

// SAFETY: the mapping belongs to this value; places are handed out by an atomic, none twice.
unsafe impl Send for HugePages {}
// SAFETY: as above.
unsafe impl Sync for HugePages {}

impl HugePages {
    /// Reserves `len` bytes; none if the host does not give them, and then nothing fits.
    pub(crate) fn reserve(len: usize) -> Self {
        let none = Self { base: NonNull::dangling(), len: 0, top: AtomicUsize::new(0) };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let Some(whole) = len.checked_add(HUGE) else { return none };
        // SAFETY: a fresh private mapping at an address of the kernel's choice; the result is checked.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), whole, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return none;
        }
        let address = address.cast::<u8>();
        let before = address.align_offset(HUGE).min(HUGE);
        // SAFETY: `before` and what lies behind `len` are ends of the mapping just made, page-aligned, used by nobody.
        unsafe {
            if before > 0 {
                libc::munmap(address.cast(), before);
            }
            if HUGE > before {
                libc::munmap(address.add(before + len).cast(), HUGE - before);
            }
            // Refused where the kernel knows no huge pages: small ones do as well.
            libc::madvise(address.add(before).cast(), len, libc::MADV_HUGEPAGE);
        }
        // SAFETY: `before` lies within the mapping.
        match NonNull::new(unsafe { address.add(before) }) {
            Some(base) => Self { base, len, top: AtomicUsize::new(0) },
            None => none,
        }
    }

    /// A place for `bytes`, zeroed, aligned to a line of the host's caches; `None` when there is no room.
    pub(crate) fn take(&self, bytes: usize) -> Option<NonNull<u8>> {
        let bytes = bytes.checked_next_multiple_of(ALIGN)?;
        let fits = |top: usize| top.checked_add(bytes).filter(|end| *end <= self.len);
        let at = self.top.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        // SAFETY: `at + bytes` lies within the mapping.
        Some(unsafe { self.base.add(at) })
    }

    /// Memory behind what was handed out, as the kernel tells: huge pages are there as a whole, small ones once they are
    /// touched.
    pub(crate) fn bytes(&self) -> usize {
        let reach = self.top.load(Ordering::Relaxed).next_multiple_of(HUGE).min(self.len);
        let mut present = vec![0_u8; reach / SMALL];
        // SAFETY: the stretch is mapped; the answer has a byte for each of its small pages.
        let told = unsafe { libc::mincore(self.base.as_ptr().cast(), reach, present.as_mut_ptr()) };
        if told != 0 { reach } else { present.iter().filter(|page| **page & 1 != 0).count() * SMALL }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping was made by `reserve`; whoever has a place in it keeps this value alive.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// A value in huge pages, or on the heap where there are none.
pub(crate) struct Placed<T: Copy> {
    value: NonNull<T>,
    /// Where it lies; `None` on the heap.
    pages: Option<Arc<HugePages>>,
}

// SAFETY: owns its value, as a box does.
unsafe impl<T: Copy + Send> Send for Placed<T> {}

impl<T: Copy> Placed<T> {
    /// Moves a value there.
    pub(crate) fn new(pages: &Arc<HugePages>, value: Box<T>) -> Self {
        const { assert!(align_of::<T>() <= ALIGN) };
        match pages.take(size_of::<T>()) {
            Some(place) => {
                let place = place.cast::<T>();
                // SAFETY: the place is fresh, large enough and aligned; the value needs no drop.
                unsafe { place.as_ptr().copy_from_nonoverlapping(&raw const *value, 1) };
                Self { value: place, pages: Some(Arc::clone(pages)) }
            }
            None => Self { value: NonNull::from(Box::leak(value)), pages: None },
        }
    }

    /// Memory that nobody else counts.
    pub(crate) fn heap_bytes(&self) -> usize {
        if self.pages.is_some() { 0 } else { size_of::<T>() }
    }
}

impl<T: Copy> Deref for Placed<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: owned, initialised, and alive as long as this value.
        unsafe { self.value.as_ref() }
    }
}

impl<T: Copy> DerefMut for Placed<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; the borrow of this value is unique.
        unsafe { self.value.as_mut() }
    }
}

impl<T: Copy> Drop for Placed<T> {
    fn drop(&mut self) {
        if self.pages.is_none() {
            // SAFETY: `new` leaked this box.
            drop(unsafe { Box::from_raw(self.value.as_ptr()) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_zeroed_apart_and_within() {
        let pages = Arc::new(HugePages::reserve(HUGE));
        let first = pages.take(100).unwrap();
        let second = pages.take(HUGE - 128).unwrap();
        assert_eq!(second.addr().get() - first.addr().get(), 128);
        assert_eq!(first.addr().get() % HUGE, 0);
        // SAFETY: the place has that many bytes.
        assert!(unsafe { std::slice::from_raw_parts(second.as_ptr(), HUGE - 128) }.iter().all(|byte| *byte == 0));
        assert!(pages.take(1).is_none(), "full");
        assert!((1..=HUGE).contains(&pages.bytes()));
        assert_eq!(HugePages::reserve(0).bytes(), 0);
    }

    #[test]
    fn a_value_is_the_same_in_huge_pages_and_on_the_heap() {
        for len in [HUGE, 0] {
            let pages = Arc::new(HugePages::reserve(len));
            let mut value = Placed::new(&pages, Box::new([7_u64; 100]));
            value[3] = 9;
            drop(pages);
            assert_eq!((value[2], value[3], value[99]), (7, 9, 7));
            assert_eq!(value.heap_bytes() == 0, len > 0);
        }
    }
}
