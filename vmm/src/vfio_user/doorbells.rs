//! Registers that are written past the conversation: a value in memory that server and VMM share, and a signal.
//!
//! The memory is a file of the server's, or, where the server is ours, the record. It stays mapped here until there is
//! another server's, so that what the guest rings while there is none is there for the next one.

#![allow(unsafe_code, reason = "values in memory that another process shares")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use atoll_protocol::vfio_user::reply::{IoFd, IoFdKind};
use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// Most of a file that is mapped.
const MAP_MAX: usize = 16 << 20;

/// A file that another process shares, mapped.
#[derive(Debug)]
pub(super) struct Mapping {
    at: *mut u8,
    len: usize,
}

// SAFETY: it is only reached by atomic accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nothing borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.at.cast(), self.len) };
    }
}

impl Mapping {
    /// Maps a file that nobody can cut, up to 16 MiB of it.
    pub(super) fn new(file: &OwnedFd) -> Option<Self> {
        // One that can be cut under the mapping would end the VMM at the guest's next write.
        let sealed = rustix::fs::fcntl_get_seals(file).ok()?.contains(SealFlags::SHRINK);
        let len = usize::try_from(rustix::fs::fstat(file.as_fd()).ok()?.st_size).ok()?.min(MAP_MAX);
        if !sealed || len == 0 {
            return None;
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh shared mapping of a file that is long enough and stays so.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) };
        Some(Self { at: at.ok()?.cast(), len })
    }

    /// The word at `offset`, a multiple of four.
    pub(super) fn word(&self, offset: usize) -> Option<&AtomicU32> {
        let fits = offset.is_multiple_of(4) && offset.checked_add(4)? <= self.len;
        // SAFETY: aligned, within the mapping, and shared memory is only reached by atomics.
        fits.then(|| unsafe { AtomicU32::from_ptr(self.at.wrapping_add(offset).cast()) })
    }

    /// The two words at `offset`, a multiple of eight.
    pub(super) fn long(&self, offset: usize) -> Option<&AtomicU64> {
        let fits = offset.is_multiple_of(8) && offset.checked_add(8)? <= self.len;
        // SAFETY: as above.
        fits.then(|| unsafe { AtomicU64::from_ptr(self.at.wrapping_add(offset).cast()) })
    }
}

#[derive(Debug)]
struct Bell {
    bar: u8,
    offset: u64,
    size: u64,
    event: Arc<OwnedFd>,
    value: Option<u64>,
    shadow: Option<(Arc<Mapping>, usize)>,
}

/// All of one server's.
#[derive(Debug, Default)]
pub(super) struct Doorbells {
    bells: Vec<Bell>,
}

impl Doorbells {
    /// Takes what a server says of a BAR; what does not fit together is left out, and goes by the conversation.
    pub(super) fn add(&mut self, bar: u8, ways: &[IoFd], files: Vec<OwnedFd>) {
        let files: Vec<Arc<OwnedFd>> = files.into_iter().map(Arc::new).collect();
        let mut mappings: Vec<Option<Option<Arc<Mapping>>>> = vec![None; files.len()];
        for way in ways {
            let Some(event) = files.get(way.event as usize) else { continue };
            let (value, shadow) = match way.how {
                // Without memory only one value can be meant.
                IoFdKind::Event(Some(value)) => (Some(value), None),
                IoFdKind::Event(None) | IoFdKind::Other(_) => continue,
                IoFdKind::Shadow { memory, offset } => {
                    let Some(file) = files.get(memory as usize) else { continue };
                    let Some(known) = mappings.get_mut(memory as usize) else { continue };
                    let mapping = known.get_or_insert_with(|| Mapping::new(file).map(Arc::new));
                    let (Some(mapping), Ok(offset)) = (mapping, usize::try_from(offset)) else { continue };
                    if way.size != 4 || mapping.word(offset).is_none() {
                        continue;
                    }
                    (None, Some((Arc::clone(mapping), offset)))
                }
            };
            // A guest's write waits for nobody.
            let flags = rustix::fs::fcntl_getfl(event).map(|flags| flags | rustix::fs::OFlags::NONBLOCK);
            if flags.and_then(|flags| rustix::fs::fcntl_setfl(event, flags)).is_err() {
                continue;
            }
            let event = Arc::clone(event);
            self.bells.push(Bell { bar, offset: way.offset, size: way.size, event, value, shadow });
        }
        self.bells.sort_by_key(|bell| (bell.bar, bell.offset));
    }

    /// Whether a write is one of these; then it is done.
    pub(super) fn ring(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        let from = self.bells.partition_point(|bell| (bell.bar, bell.offset) < (bar, offset));
        let same = self.bells.iter().skip(from).take_while(|bell| (bell.bar, bell.offset) == (bar, offset));
        let mut word = [0; 8];
        for (to, byte) in word.iter_mut().zip(data) {
            *to = *byte;
        }
        let value = u64::from_le_bytes(word);
        for bell in same {
            let wide = bell.size == 0 || bell.size == data.len() as u64;
            if !wide || bell.value.is_some_and(|only| only != value) {
                continue;
            }
            if let Some((memory, at)) = &bell.shadow
                && let Some(word) = memory.word(*at)
            {
                word.store((value as u32).to_le(), Ordering::Release);
            }
            signal(&bell.event);
            return true;
        }
        false
    }

    /// Signals all of them once: a value may have been put there before this server looked.
    pub(super) fn ring_all(&self) {
        let mut before: Option<&Arc<OwnedFd>> = None;
        for bell in self.bells.iter().filter(|bell| bell.shadow.is_some()) {
            if !before.is_some_and(|before| Arc::ptr_eq(before, &bell.event)) {
                signal(&bell.event);
            }
            before = Some(&bell.event);
        }
    }
}

fn signal(event: &OwnedFd) {
    // One that is full is signalled already; one that is none is its server's own affair.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}
