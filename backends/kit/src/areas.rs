//! The three areas of a split virtqueue (descriptor table, avail ring, used ring) in guest memory.
//!
//! A request touches them half a dozen times, and looking an address up in the memory table each time would cost more than
//! all the rest of a short request. So each area is looked up once, when the ring starts and when the memory table changes:
//! it must lie in one region, with all its bytes, at an address that is aligned for its atomics. From then on it is reached
//! by a pointer; what a guest writes chooses a slot below the ring's size, never a pointer.
//!
//! The memory that the pointers lead into is held here and exchanged together with them, so that none of them outlives its
//! mapping. An area that does not lie in one region, and memory behind an IOMMU, whose mappings may change under a running
//! ring, are looked up at each access as before.
//!
//! Writes are marked in the memory's bitmap after they happened, as `vm-memory` does it.

#![allow(unsafe_code, reason = "rings are read and written by pointers that are checked once")]

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::bitmap::Bitmap;
use vm_memory::{AtomicAccess, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion};

use crate::course::Shared;
use crate::memory::OutOfRange;

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_BYTES: u64 = 16;

type Region<M> = <<M as GuestMemory>::PhysicalMemory as GuestMemoryBackend>::R;

/// Where a ring lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) size: u16,
    pub(crate) desc: GuestAddress,
    pub(crate) avail: GuestAddress,
    pub(crate) used: GuestAddress,
}

/// One area.
struct Place<M: GuestMemory> {
    addr: GuestAddress,
    bytes: usize,
    host: Option<Host<M>>,
}

/// Where an area lies in this process.
struct Host<M: GuestMemory> {
    base: NonNull<u8>,
    /// For its bitmap.
    region: NonNull<Region<M>>,
    /// Of the area, in its region.
    offset: usize,
}

impl<M: GuestMemory> Host<M> {
    /// Looks an area up; none when it has to be looked up at each access.
    fn find(mem: &M, addr: GuestAddress, bytes: usize) -> Option<Self> {
        let (region, at) = mem.physical_memory()?.to_region_addr(addr)?;
        let slice = region.get_slice(at, bytes).ok()?;
        let base = NonNull::new(slice.ptr_guard_mut().as_ptr())?;
        // A region may begin anywhere; the descriptors' alignment is enough for all three areas.
        let is_aligned = base.addr().get().is_multiple_of(align_of::<AtomicU64>());
        let offset = usize::try_from(at.0).ok()?;
        is_aligned.then_some(Self { base, region: NonNull::from(region), offset })
    }
}

impl<M: GuestMemory> Place<M> {
    fn find(mem: &M, addr: GuestAddress, bytes: usize) -> Self {
        Self { addr, bytes, host: Host::find(mem, addr, bytes) }
    }

    /// The integer at `at` of the area.
    #[inline]
    fn cell<T>(&self, host: &Host<M>, at: usize) -> Result<&T, OutOfRange> {
        if at.checked_add(size_of::<T>()).is_none_or(|end| end > self.bytes) || !at.is_multiple_of(align_of::<T>()) {
            return Err(OutOfRange);
        }
        // SAFETY: `T` is one of the atomics below, for which every bit pattern is a value and which others may write at any
        // time. `base` leads to `bytes` mapped bytes (`Host::find`) of the memory that `Areas` holds; `at` lies with all of
        // `T` in them and is aligned, as is `base`.
        Ok(unsafe { host.base.add(at).cast::<T>().as_ref() })
    }

    #[inline]
    fn load_u16(&self, mem: &M, at: usize, order: Ordering) -> Result<u16, OutOfRange> {
        let value = match &self.host {
            Some(host) => self.cell::<AtomicU16>(host, at)?.load(order),
            None => mem.load(self.at(at)?, order).map_err(|_| OutOfRange)?,
        };
        Ok(u16::from_le(value))
    }

    #[inline]
    fn load_u64(&self, mem: &M, at: usize) -> Result<u64, OutOfRange> {
        match &self.host {
            Some(host) => Ok(u64::from_le(self.cell::<AtomicU64>(host, at)?.load(Ordering::Relaxed))),
            None => {
                // Where no pointer leads, nothing need be aligned.
                let mut bytes = [0; size_of::<u64>()];
                mem.read_slice(&mut bytes, self.at(at)?).map_err(|_| OutOfRange)?;
                Ok(u64::from_le_bytes(bytes))
            }
        }
    }

    #[inline]
    fn store_u16(&self, mem: &M, at: usize, value: u16, order: Ordering) -> Result<(), OutOfRange> {
        match &self.host {
            Some(host) => {
                self.cell::<AtomicU16>(host, at)?.store(value.to_le(), order);
                mark(host, at, size_of::<u16>());
                Ok(())
            }
            None => self.store_slowly(mem, at, value.to_le(), order),
        }
    }

    #[cold]
    fn store_slowly<T: AtomicAccess>(&self, mem: &M, at: usize, value: T, order: Ordering) -> Result<(), OutOfRange> {
        mem.store(value, self.at(at)?, order).map_err(|_| OutOfRange)
    }

    fn at(&self, at: usize) -> Result<GuestAddress, OutOfRange> {
        self.addr.0.checked_add(at as u64).map(GuestAddress).ok_or(OutOfRange)
    }
}

/// Marks what was written to an area.
#[inline]
fn mark<M: GuestMemory>(host: &Host<M>, at: usize, bytes: usize) {
    // SAFETY: the region was lent by the memory that `Areas` holds, which nobody can change while it is shared.
    unsafe { host.region.as_ref() }.bitmap().mark_dirty(host.offset + at, bytes);
}

/// The areas of one ring, and the memory in which they lie.
pub(crate) struct Areas<M: GuestMemory> {
    mem: Arc<M>,
    size: u16,
    desc: Place<M>,
    avail: Place<M>,
    used: Place<M>,
}

// SAFETY: the pointers lead into memory that `mem` keeps mapped, wherever the areas go, and what is behind them is accessed
// by atomics only. The region is what any thread that has `&M` may get from it by `find_region`, and `M: Sync` lets all
// threads have one.
unsafe impl<M: GuestMemory + Send + Sync> Send for Areas<M> {}

impl<M: GuestMemory> fmt::Debug for Areas<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Areas").field("addresses", &self.addresses()).finish_non_exhaustive()
    }
}

impl<M: GuestMemory> Areas<M> {
    /// Looks the areas up in `mem`. Whether they lie in it was checked by the caller, or will be at each access.
    pub(crate) fn find(mem: Arc<M>, addresses: Addresses) -> Self {
        let Addresses { size, desc, avail, used } = addresses;
        let entries = usize::from(size);
        Self {
            size,
            desc: Place::find(&mem, desc, DESCRIPTOR_BYTES as usize * entries),
            avail: Place::find(&mem, avail, 6 + 2 * entries),
            used: Place::find(&mem, used, 6 + 8 * entries),
            mem,
        }
    }

    /// The memory.
    #[inline]
    pub(crate) fn memory(&self) -> &Arc<M> {
        &self.mem
    }

    /// Entries of the ring: at least one.
    #[inline]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    fn addresses(&self) -> Addresses {
        Addresses { size: self.size, desc: self.desc.addr, avail: self.avail.addr, used: self.used.addr }
    }

    /// Looks the areas up in other memory.
    pub(crate) fn exchange(&mut self, mem: Arc<M>) {
        *self = Self::find(mem, self.addresses());
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        // The size is a power of two (`Ring::start`).
        usize::from(index & self.size.wrapping_sub(1))
    }

    /// Descriptor `index` of the table, in its two words; read once.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Result<[u64; 2], OutOfRange> {
        let at = usize::from(index) * DESCRIPTOR_BYTES as usize;
        Ok([self.desc.load_u64(&self.mem, at)?, self.desc.load_u64(&self.mem, at + 8)?])
    }

    /// Guest address of the descriptor table.
    pub(crate) fn table(&self) -> GuestAddress {
        self.desc.addr
    }

    /// The used index.
    pub(crate) fn used_index(&self) -> Result<u16, OutOfRange> {
        self.used.load_u16(&self.mem, 2, Ordering::Acquire)
    }

    #[cold]
    fn set_used_slowly(&self, first: u16, done: &[(u16, u32)]) -> Result<(), OutOfRange> {
        for (number, (head, written)) in (0..).map(|n: u16| first.wrapping_add(n)).zip(done) {
            let bytes = (u64::from(*head) | u64::from(*written) << 32).to_le_bytes();
            self.mem.write_slice(&bytes, self.used.at(4 + 8 * self.slot(number))?).map_err(|_| OutOfRange)?;
        }
        Ok(())
    }
}

impl<M: GuestMemory> Shared for Areas<M> {
    #[inline]
    fn avail_index(&self) -> Result<u16, OutOfRange> {
        self.avail.load_u16(&self.mem, 2, Ordering::Acquire)
    }

    fn avail_flags(&self) -> Result<u16, OutOfRange> {
        self.avail.load_u16(&self.mem, 0, Ordering::Relaxed)
    }

    #[inline]
    fn avail_head(&self, index: u16) -> Result<u16, OutOfRange> {
        self.avail.load_u16(&self.mem, 4 + 2 * self.slot(index), Ordering::Relaxed)
    }

    fn used_event(&self) -> Result<u16, OutOfRange> {
        self.avail.load_u16(&self.mem, 4 + 2 * usize::from(self.size), Ordering::Relaxed)
    }

    #[inline]
    fn set_used_index(&mut self, index: u16) -> Result<(), OutOfRange> {
        self.used.store_u16(&self.mem, 2, index, Ordering::Release)
    }

    fn set_used_flags(&mut self, flags: u16) -> Result<(), OutOfRange> {
        self.used.store_u16(&self.mem, 0, flags, Ordering::Relaxed)
    }

    fn set_avail_event(&mut self, index: u16) -> Result<(), OutOfRange> {
        self.used.store_u16(&self.mem, 4 + 8 * usize::from(self.size), index, Ordering::Relaxed)
    }

    #[inline]
    fn set_used(&mut self, first: u16, done: &[(u16, u32)]) -> Result<(), OutOfRange> {
        let Some(host) = &self.used.host else { return self.set_used_slowly(first, done) };
        let mut number = first;
        for (head, written) in done {
            let at = 4 + 8 * self.slot(number);
            number = number.wrapping_add(1);
            self.used.cell::<AtomicU32>(host, at)?.store(u32::from(*head).to_le(), Ordering::Relaxed);
            self.used.cell::<AtomicU32>(host, at + 4)?.store(written.to_le(), Ordering::Relaxed);
        }
        // Those before the end of the ring, and those that went on at its beginning.
        let start = self.slot(first);
        let before = done.len().min(usize::from(self.size) - start);
        mark(host, 4 + 8 * start, 8 * before);
        if done.len() > before {
            mark(host, 4, 8 * (done.len() - before));
        }
        Ok(())
    }
}
