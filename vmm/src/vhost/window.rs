//! Guest memory as a device may reach it: by guest-physical addresses, or by the map of the IOMMU that it is behind.
//!
//! For those parts of the front end that touch buffers themselves. Nothing is remembered from one access to the next, so a
//! change of the map holds for all that begins after it. An access that the map refuses is noted for the guest and the
//! operator ([`Window::refused`]).

use std::sync::{Arc, Mutex, PoisonError};

use atoll_devices::iommu::{Access, Fault};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::guest_ring::Reach;
use super::iotlb::Behind;

/// Refused accesses that are kept until somebody asks; what a guest provokes beyond that it need not be told.
const REFUSED_MAX: usize = 64;

/// The memory of one device.
pub(super) struct Window {
    memory: Arc<GuestMemoryMmap>,
    behind: Option<Behind>,
    refused: Mutex<Vec<Fault>>,
}

impl Window {
    /// All of `memory`, or what the IOMMU leaves of it.
    pub(super) fn new(memory: &Arc<GuestMemoryMmap>, behind: Option<Behind>) -> Self {
        Self { memory: Arc::clone(memory), behind, refused: Mutex::default() }
    }

    /// Accesses that the IOMMU has refused since one asked last.
    pub(super) fn refused(&self) -> Vec<Fault> {
        std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there are any.
    pub(super) fn has_refused(&self) -> bool {
        !self.refused.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Copies `len` bytes at `address` to the beginning of `target`; whether they are all there.
    pub(super) fn copy_in(&self, address: u64, len: usize, target: &VolatileSlice) -> bool {
        self.walk(address, len, Access::Read, &mut |piece, at| {
            target.subslice(at, piece.len()).map(|target| piece.copy_to_volatile_slice(target)).is_ok()
        })
    }

    /// Copies the first `len` bytes of `source` to `address`; whether there is room for all of them.
    pub(super) fn copy_out(&self, address: u64, len: usize, source: &VolatileSlice) -> bool {
        self.walk(address, len, Access::Write, &mut |piece, at| {
            source.subslice(at, piece.len()).map(|source| source.copy_to_volatile_slice(*piece)).is_ok()
        })
    }

    /// Goes through the pieces of RAM that `len` bytes at `address` are in, each with its distance from the first byte, as
    /// long as `each` says so.
    fn walk(
        &self,
        address: u64,
        len: usize,
        access: Access,
        each: &mut dyn FnMut(&VolatileSlice, usize) -> bool,
    ) -> bool {
        let mut done = 0;
        while done < len {
            let Some(next) = address.checked_add(done as u64) else { return false };
            let Some((gpa, reach)) = self.translate(next, access) else { return false };
            let here = usize::try_from(reach).unwrap_or(usize::MAX).min(len - done);
            for piece in self.memory.get_slices(GuestAddress(gpa), here) {
                let Ok(piece) = piece else { return false };
                if !each(&piece, done) {
                    return false;
                }
                done += piece.len();
            }
        }
        true
    }

    /// Where `address` leads, and how many bytes lie there in one piece at least.
    fn translate(&self, address: u64, access: Access) -> Option<(u64, u64)> {
        let Some(Behind { unit, endpoint }) = &self.behind else {
            return Some((address, u64::MAX));
        };
        match unit.find(*endpoint, address, access) {
            Ok(mapping) => Some((mapping.translate(address)?, (mapping.iova().last() - address).saturating_add(1))),
            Err(fault) => {
                let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                if refused.len() < REFUSED_MAX {
                    refused.push(fault);
                }
                None
            }
        }
    }
}

impl Reach for Window {
    fn fetch(&self, address: u64, bytes: &mut [u8]) -> bool {
        let target = VolatileSlice::from(bytes);
        self.copy_in(address, target.len(), &target)
    }
    fn put(&self, address: u64, bytes: &[u8]) -> bool {
        let mut done = 0;
        self.walk(address, bytes.len(), Access::Write, &mut |piece, at| {
            let rest = bytes.get(at..).unwrap_or_default();
            piece.copy_from(rest.get(..piece.len()).unwrap_or_default());
            done = at + piece.len();
            true
        }) && done == bytes.len()
    }
}
