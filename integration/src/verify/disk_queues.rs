//! How operations of a [`Player`](super::player::Player) reach a disk and come back: rings of virtio, or what else a disk
//! has for queues.

use std::time::Duration;

use anyhow::Result;
use atoll_kit::driver::disk::{self, Kind as Request};
use atoll_kit::driver::queue::Woken;
use atoll_kit::driver::{Driver, Guest};

/// Bytes of guest memory, from zero on, that the queue of one index may take for itself.
pub use atoll_kit::driver::queue::QUEUE_BYTES;

/// Sectors of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
}

/// A driver's half of a disk's queues, and the memory that they lie in.
pub trait DiskQueues {
    /// Guest memory.
    fn guest(&self) -> &Guest;
    /// Puts a request into queue `index`: its number there, or none when there is no room. `parts` are its data in guest
    /// memory, one after the other; of a discard and of zeroes the range as virtio describes it, which may be written anew.
    fn add(&mut self, index: usize, request: Request, range: Range, parts: &[(u64, u32)]) -> Result<Option<u16>>;
    /// Shows the device what was put there.
    fn publish(&mut self, index: usize) -> Result<()>;
    /// Takes one that is completed: its number and its status, 0 for success; none where nobody has written one.
    fn take(&mut self, index: usize) -> Result<Option<(u16, Option<u8>)>>;
    /// Waits for an interrupt, at most for `tick`; longer for one that is due.
    fn wait(&mut self, index: usize, tick: Duration) -> Result<Woken>;
    /// Requests that were published and requests that the device has completed, as guest memory says.
    fn counts(&mut self, index: usize) -> Result<(u16, u16)>;
    /// Requests that are in flight as the device's own records say, after the end. `ask`: it answers.
    fn left(&mut self, _ask: bool) -> Result<u32> {
        Ok(0)
    }
}

impl DiskQueues for Driver {
    fn guest(&self) -> &Guest {
        Self::guest(self)
    }
    fn add(&mut self, index: usize, request: Request, range: Range, parts: &[(u64, u32)]) -> Result<Option<u16>> {
        let sector = if matches!(request, Request::In | Request::Out) { range.sector } else { 0 };
        let (queue, guest) = self.queue(index)?;
        Ok(disk::add(queue, guest, request, sector, parts))
    }
    fn publish(&mut self, index: usize) -> Result<()> {
        let (queue, guest) = self.queue(index)?;
        queue.publish(guest)
    }
    fn take(&mut self, index: usize) -> Result<Option<(u16, Option<u8>)>> {
        let (queue, guest) = self.queue(index)?;
        let Some((head, _)) = queue.take(guest) else { return Ok(None) };
        let status = if head < queue.size() { disk::status(queue, guest, head) } else { 0xff };
        Ok(Some((head, (status != 0xff).then_some(status))))
    }
    fn wait(&mut self, index: usize, tick: Duration) -> Result<Woken> {
        let (queue, guest) = self.queue(index)?;
        queue.wait_for_call(guest, tick)
    }
    fn counts(&mut self, index: usize) -> Result<(u16, u16)> {
        let (queue, guest) = self.queue(index)?;
        Ok((u16::from_le(guest.load(queue.avail + 2)), queue.used_index(guest)))
    }
    fn left(&mut self, ask: bool) -> Result<u32> {
        let mut left = 0;
        for index in (0..self.queues()).filter(|_| ask) {
            let (queue, guest) = self.queue(index)?;
            let used = queue.used_index(guest);
            left += self.stop(index)?.abs_diff(u32::from(used));
        }
        if let Some((region, file)) = self.inflight() {
            let (queues, size) = (u64::from(region.num_queues), u64::from(region.queue_size));
            for entry in (0..queues).flat_map(|queue| (0..size).map(move |entry| (queue, entry))) {
                let at = region.mmap_offset + entry.0 * (region.mmap_size / queues) + 16 + 16 * entry.1;
                let mut flag = [0];
                rustix::io::pread(file, &mut flag, at)?;
                left += u32::from(flag[0]);
            }
        }
        Ok(left)
    }
}

impl DiskQueues for Box<dyn DiskQueues> {
    fn guest(&self) -> &Guest {
        (**self).guest()
    }
    fn add(&mut self, index: usize, request: Request, range: Range, parts: &[(u64, u32)]) -> Result<Option<u16>> {
        (**self).add(index, request, range, parts)
    }
    fn publish(&mut self, index: usize) -> Result<()> {
        (**self).publish(index)
    }
    fn take(&mut self, index: usize) -> Result<Option<(u16, Option<u8>)>> {
        (**self).take(index)
    }
    fn wait(&mut self, index: usize, tick: Duration) -> Result<Woken> {
        (**self).wait(index, tick)
    }
    fn counts(&mut self, index: usize) -> Result<(u16, u16)> {
        (**self).counts(index)
    }
    fn left(&mut self, ask: bool) -> Result<u32> {
        (**self).left(ask)
    }
}
