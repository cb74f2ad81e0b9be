//! The record of requests in flight, from the front end's side (vhost-user, "Inflight I/O tracking").
//!
//! A backend writes down in it which requests it has taken and not completed; its successor resubmits those. The front
//! end owns it: it asks a backend only how large the region must be, makes a memfd of that size that nobody can resize,
//! gives the same one to every incarnation, and clears it whenever the driver resets the device. What a dead process wrote
//! is input for its successor, hostile like any other; the front end itself reads it only when a stand-in takes over.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vhost::vhost_user::message::VhostUserInflight;

use super::error::{ConversationError, Step};
use super::standin;

/// Bytes before a queue's descriptors' states, and of each of these (split virtqueues).
const HEADER: u64 = 16;
const ENTRY: u64 = 16;
/// What a backend may add per queue for alignment.
const SLACK: u64 = 4096;

/// A region for all queues of a device.
#[derive(Debug)]
pub(super) struct InflightRegion {
    file: File,
    shape: Shape,
}

/// How large a region is; frozen once the first backend has said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Bytes.
    pub(super) size: u64,
    /// Queues.
    pub(super) queues: u16,
    /// Most descriptors of a queue.
    pub(super) queue_size: u16,
}

impl Shape {
    /// Checks a backend's answer to GET_INFLIGHT_FD.
    pub(super) fn from_answer(answer: &VhostUserInflight, asked: (u16, u16)) -> Result<Self, ConversationError> {
        let (queues, queue_size) = asked;
        let absurd = |what: String| ConversationError::Absurd { step: Step::GetInflightFd, what };
        if (answer.num_queues, answer.queue_size) != asked {
            return Err(absurd(format!(
                "{} queues of {} instead of {queues} of {queue_size}",
                answer.num_queues, answer.queue_size
            )));
        }
        let least = u64::from(queues) * (HEADER + ENTRY * u64::from(queue_size));
        let most = least + u64::from(queues) * SLACK;
        if !(least..=most).contains(&answer.mmap_size) {
            return Err(absurd(format!("a region of {} bytes, where {least} are needed", answer.mmap_size)));
        }
        Ok(Self { size: answer.mmap_size, queues, queue_size })
    }
}

impl InflightRegion {
    /// Makes an empty region.
    pub(super) fn new(shape: Shape) -> io::Result<Self> {
        let memfd = rustix::fs::memfd_create("atoll-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, shape.size)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { file: File::from(memfd), shape })
    }
    /// Forgets every request: the driver has reset the device. No backend may be using it.
    ///
    /// # Errors
    /// If the kernel cannot.
    pub(super) fn clear(&self) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, 0, self.shape.size)?)
    }
    /// Reads the part of queue `index`, a ring of `size` entries whose used index is `used`: the heads that a dead backend
    /// has taken and not completed, in the order in which it took them.
    ///
    /// # Errors
    /// When the record cannot be right, or not be read.
    pub(super) fn unfinished(&self, index: u16, size: u16, used: u16) -> io::Result<Vec<u16>> {
        let (bytes, _) = self.part(index)?;
        standin::unfinished(&bytes, size, used).map_err(io::Error::other)
    }
    /// Writes down that nothing is in flight in queue `index`, whose used index is `used`. No backend may be using it.
    ///
    /// # Errors
    /// If the kernel cannot.
    pub(super) fn settle(&self, index: u16, used: u16) -> io::Result<()> {
        let (mut bytes, at) = self.part(index)?;
        standin::settle_record(&mut bytes, used);
        self.file.write_all_at(&bytes, at)
    }
    /// One queue's part, and where it begins: all parts are equally long.
    fn part(&self, index: u16) -> io::Result<(Vec<u8>, u64)> {
        let queues = u64::from(self.shape.queues);
        let len = self.shape.size.checked_div(queues).filter(|len| len * queues == self.shape.size);
        let len = len.filter(|_| index < self.shape.queues);
        let len = len.ok_or_else(|| io::Error::other("the record of requests in flight has no part for the queue"))?;
        let at = len * u64::from(index);
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok((bytes, at))
    }
    pub(super) fn message(&self) -> (VhostUserInflight, RawFd) {
        let Shape { size, queues, queue_size } = self.shape;
        (VhostUserInflight::new(size, 0, queues, queue_size), self.file.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_regions_are_refused() {
        let answer = |size, queues, queue_size| {
            Shape::from_answer(&VhostUserInflight::new(size, 0, queues, queue_size), (2, 128))
        };
        assert!(answer(2 * (16 + 16 * 128) + 64, 2, 128).is_ok());
        for (size, queues, queue_size) in [(4000, 2, 128), (u64::MAX, 2, 128), (4128, 1, 128), (4128, 2, 64)] {
            let error = answer(size, queues, queue_size).unwrap_err();
            assert!(matches!(error, ConversationError::Absurd { step: Step::GetInflightFd, .. }), "{error}");
        }
    }

    /// Before a reset was told to the region, a guest that rebooted met the requests of its earlier life again.
    #[test]
    fn cleared_region_is_zero_and_cannot_be_resized() {
        let region = InflightRegion::new(Shape { size: 8192, queues: 1, queue_size: 128 }).unwrap();
        rustix::io::pwrite(&region.file, b"left over", 4000).unwrap();
        region.clear().unwrap();
        let mut bytes = vec![1; 8192];
        assert_eq!(rustix::io::pread(&region.file, &mut bytes, 0).unwrap(), 8192);
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert!(region.file.set_len(0).is_err());
    }
}
