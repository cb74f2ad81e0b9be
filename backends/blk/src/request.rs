//! The requests of one queue: read as hostile input, carried out by the storage's engine, answered exactly once.
//!
//! A request is a 16-byte header, data, and a status byte that is the last writable byte; how they are spread over
//! descriptors is the guest's choice. A request without a status byte is given back with nothing written.
//!
//! Requests that wait for an operation live in a slot per head. A slot keeps everything that the operation points
//! to until it has ended. Data goes straight between the file and guest memory, except where direct I/O demands an
//! alignment that the guest's buffers lack: then it goes through a buffer of ours, in parts of [`BOUNCE_BYTES`].

mod mapped;

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::jail::Profile;
use atoll_kit::limit::Cost;
use atoll_kit::memory::{Direction, Segment, Segments, Transfer};
use atoll_kit::stats::Figures;
use atoll_kit::step::{
    Sabotage, Step, fails, postpone, step, strikes, swap_sectors, sync_begins, sync_ended, wrote_through,
};
use atoll_kit::{Progress, QueueHandler};
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{GuestAddress, GuestMemory};

use crate::bounce::Bounce;
use crate::disk::{RANGE_SECTORS_MAX, RANGES_MAX, Shared};
use crate::storage::{Engine, IOV_MAX, SECTOR_BYTES, unsupported};

/// Bytes of a bounce buffer. One request never holds more, whatever its length.
pub const BOUNCE_BYTES: u64 = 64 << 10;
/// Bytes of zeroes that one operation writes where the file system cannot make them.
const ZERO_BYTES: u64 = 1 << 20;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// How a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Ok = VIRTIO_BLK_S_OK as isize,
    IoError = VIRTIO_BLK_S_IOERR as isize,
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

/// A checked stretch of the disk, in bytes.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
    how: Clear,
}

/// How a stretch is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clear {
    /// Contents do not matter any longer.
    Discard,
    /// Zeroes; the space may be freed.
    Unmap,
    /// Zeroes; the space stays.
    Zero,
    /// Zeroes, written one by one.
    Write,
}

impl Clear {
    fn mode(self) -> FallocateFlags {
        match self {
            Self::Discard | Self::Unmap => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Self::Zero | Self::Write => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        }
    }
}

#[derive(Debug, Default)]
enum Work {
    #[default]
    None,
    /// Data between file and guest memory.
    Plain { write: bool },
    /// Data through a buffer of ours.
    Bounced { write: bool, bounce: Bounce, data: Vec<Segment>, skip: u64 },
    /// fdatasync.
    Flush,
    /// Ranges still to be cleared; the first is under way.
    Clear(VecDeque<Range>),
    /// From piece to piece of an image with tables.
    Mapped(Box<mapped::Journey>),
}

/// What a request that succeeds is counted as.
#[derive(Debug, Clone, Copy, Default)]
enum Moved {
    #[default]
    Nothing,
    Read(u64),
    Write(u64),
    /// The class's counter of this number.
    Class(usize),
}

impl Moved {
    fn of(header: Header, chain: &Chain) -> Self {
        match header.kind {
            VIRTIO_BLK_T_IN => Self::Read(chain.writable().bytes().saturating_sub(1)),
            VIRTIO_BLK_T_OUT => Self::Write(chain.readable().bytes().saturating_sub(HEADER_BYTES)),
            VIRTIO_BLK_T_FLUSH => Self::Class(0),
            VIRTIO_BLK_T_DISCARD => Self::Class(1),
            VIRTIO_BLK_T_WRITE_ZEROES => Self::Class(2),
            _ => Self::Nothing,
        }
    }

    fn count(self, figures: Figures<'_>) {
        match self {
            Self::Nothing => {}
            Self::Read(bytes) => figures.read(bytes),
            Self::Write(bytes) => figures.written(bytes),
            Self::Class(number) => figures.class(number, 1),
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    work: Work,
    moved: Moved,
    transfer: Transfer,
    /// Next byte of the disk.
    offset: u64,
    /// Bytes still to move.
    left: u64,
    status: GuestAddress,
    /// Bytes for the used ring when all goes well.
    written: u32,
}

/// The handler of one queue.
#[derive(Debug)]
pub struct BlkQueue {
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    scratch: Transfer,
}

impl BlkQueue {
    /// A queue of the disk `shared`.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, slots: Vec::new(), scratch: Transfer::default() }
    }
}

/// A request as its header and lengths describe it.
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: u32,
    sector: u64,
}

impl QueueHandler for BlkQueue {
    fn opcodes(&self) -> &'static [u8] {
        Profile::BLK.opcodes
    }

    fn started(&mut self, size: u16) {
        self.slots = (0..size).map(|_| Slot::default()).collect();
    }

    fn stopped(&mut self) {
        self.slots = Vec::new();
    }

    fn cost(&self, chain: &Chain) -> Cost {
        // Without header and status byte.
        let bytes = chain.readable().bytes().saturating_sub(HEADER_BYTES) + chain.writable().bytes().saturating_sub(1);
        Cost { bytes, operations: 1 }
    }

    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        let writable = chain.writable();
        let Some(status) = writable.last_byte() else { return Progress::Done { written: 0 } };
        let (moved, begun) = match header(mem, chain) {
            Ok(header) => (Moved::of(header, chain), self.begin(io, mem, chain, header, status)),
            Err(bad) => (Moved::Nothing, Err(bad)),
        };
        match begun {
            Ok(None) => {
                if let Some(slot) = self.slots.get_mut(usize::from(chain.head())) {
                    slot.moved = moved;
                }
                Progress::Pending
            }
            Ok(Some(written)) => {
                moved.count(io.figures());
                finish(mem, status, Status::Ok, written)
            }
            Err(bad) => {
                io.figures().failed();
                finish(mem, status, bad, 1)
            }
        }
    }

    fn completion<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, head: u16, result: i32) -> Progress {
        let result = fails().map_or(result, |errno| -errno);
        let ended = self.go_on(io, mem, head, result);
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return Progress::Done { written: 0 } };
        match ended {
            Ok(false) => Progress::Pending,
            Ok(true) => {
                slot.transfer.landed(mem);
                slot.work = Work::None;
                slot.moved.count(io.figures());
                finish(mem, slot.status, Status::Ok, slot.written)
            }
            Err(bad) => {
                slot.transfer.landed(mem);
                slot.work = Work::None;
                io.figures().failed();
                finish(mem, slot.status, bad, 1)
            }
        }
    }
}

fn finish<M: GuestMemory>(mem: &M, status: GuestAddress, value: Status, written: u32) -> Progress {
    let byte = [Segment { addr: status, len: 1 }];
    let told = Segments(&byte).write_at(mem, 0, &[value as u8]);
    step(Step::Status);
    match told {
        Ok(()) => Progress::Done { written },
        // The status byte lies outside guest memory: nobody to tell.
        Err(_) => Progress::Done { written: 0 },
    }
}

impl BlkQueue {
    /// Checks and starts a request; gives the bytes written when it is finished already.
    fn begin<M: GuestMemory>(
        &mut self,
        io: &mut Io<'_>,
        mem: &M,
        chain: &Chain,
        header: Header,
        status: GuestAddress,
    ) -> Result<Option<u32>, Status> {
        let (readable, writable) = (chain.readable(), chain.writable());
        let room = writable.bytes() - 1;
        match header.kind {
            VIRTIO_BLK_T_IN => {
                let written = u32::try_from(room + 1).map_err(|_| Status::IoError)?;
                self.data(io, mem, chain, header, Direction::IntoGuest, room, status, written)
            }
            VIRTIO_BLK_T_OUT => {
                let len = readable.bytes() - HEADER_BYTES;
                self.writable_disk()?;
                self.data(io, mem, chain, header, Direction::FromGuest, len, status, 1)
            }
            VIRTIO_BLK_T_FLUSH => self.flush(io, chain.head(), status),
            VIRTIO_BLK_T_GET_ID => {
                let id = self.shared.serial;
                let len = usize::try_from(room).unwrap_or(usize::MAX).min(id.len());
                let part = id.get(..len).unwrap_or(&id);
                writable.write_at(mem, 0, part).map_err(|_| Status::IoError)?;
                Ok(Some(len as u32 + 1))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.writable_disk()?;
                let ranges = self.ranges(mem, readable, header.kind == VIRTIO_BLK_T_DISCARD)?;
                if matches!(self.shared.storage.engine(), Engine::Mapped { .. }) {
                    return self.mapped_clear(io, mem, chain.head(), ranges, status);
                }
                self.clear(io, chain.head(), ranges, status)
            }
            _ => Err(Status::Unsupported),
        }
    }

    fn writable_disk(&self) -> Result<(), Status> {
        if self.shared.storage.read_only() { Err(Status::IoError) } else { Ok(()) }
    }

    /// The stretch of the disk from `sector`, if it lies within it.
    fn stretch(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if !len.is_multiple_of(SECTOR_BYTES) || end > self.shared.storage.bytes() {
            return Err(Status::IoError);
        }
        Ok(offset)
    }

    #[allow(clippy::too_many_arguments, reason = "one request, taken apart")]
    fn data<M: GuestMemory>(
        &mut self,
        io: &mut Io<'_>,
        mem: &M,
        chain: &Chain,
        header: Header,
        direction: Direction,
        len: u64,
        status: GuestAddress,
        written: u32,
    ) -> Result<Option<u32>, Status> {
        let offset = self.stretch(header.sector, len)?;
        let write = direction == Direction::FromGuest;
        let (segments, skip) = if write { (chain.readable(), HEADER_BYTES) } else { (chain.writable(), 0) };
        let storage = &self.shared.storage;
        if matches!(storage.engine(), Engine::Mapped { .. }) {
            return self.mapped_data(io, mem, chain, direction, (offset, len), status, written);
        }
        if storage.engine() != Engine::Ring {
            let image = storage.file().map(|file| file.as_raw_fd());
            if let Some(image) = image.filter(|_| write && strikes(Sabotage::AcknowledgeFirst)) {
                let mut data = vec![0; len as usize];
                segments.read_at(mem, skip, &mut data).map_err(|_| Status::IoError)?;
                postpone(image, offset, data);
                return Ok(Some(written));
            }
            let transfer = &mut self.scratch;
            transfer.set(mem, segments, skip, len, direction).map_err(|_| Status::IoError)?;
            let moved = match (storage.engine(), write) {
                (Engine::Inline, false) => storage.read_inline(transfer, offset),
                (Engine::Inline, true) => storage.write_inline(transfer, offset, self.shared.write_through()),
                _ => Ok(()),
            };
            let moved = fails().map_or(moved, |errno| Err(std::io::Error::from_raw_os_error(errno)));
            transfer.landed(mem);
            if let Some(image) = image.filter(|_| write) {
                if self.shared.write_through() {
                    wrote_through(image, offset, len);
                }
                if len >= 2 * SECTOR_BYTES && strikes(Sabotage::SwapSectors) {
                    swap_sectors(image, offset);
                }
            }
            return moved.map(|()| Some(written)).map_err(|e| io_error(storage.name(), &e));
        }
        let slot = self.slots.get_mut(usize::from(chain.head())).ok_or(Status::IoError)?;
        slot.transfer.set(mem, segments, skip, len, direction).map_err(|_| Status::IoError)?;
        if len == 0 {
            return Ok(Some(written));
        }
        (slot.offset, slot.left, slot.status, slot.written) = (offset, len, status, written);
        slot.work = Work::Plain { write };
        if let Some(align) = storage.direct() {
            if (offset | len) & (align.offset - 1) != 0 {
                // The guest was told the block size; a request for a part of a block cannot be carried out.
                return Err(Status::IoError);
            }
            if !slot.transfer.aligned(align.memory) {
                let bounce = Bounce::new(len.min(BOUNCE_BYTES) as usize, align.memory);
                slot.work = Work::Bounced { write, bounce, data: segments.0.to_vec(), skip };
            }
        }
        self.push_data(io, mem, chain.head())?;
        Ok(None)
    }

    /// Starts the next operation of a read or write.
    fn push_data<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, head: u16) -> Result<(), Status> {
        let fd = types::Fd(self.shared.storage.raw_fd());
        let flags = if self.shared.write_through() { libc::RWF_DSYNC } else { 0 };
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        let (write, iov, n) = match &mut slot.work {
            Work::Bounced { write, bounce, data, skip } => {
                let len = slot.left.min(BOUNCE_BYTES);
                let part = bounce.part(len as usize);
                if *write {
                    Segments(data).read_at(mem, *skip, part).map_err(|_| Status::IoError)?;
                }
                let (iov, n) = bounce.iovec(len as usize);
                (*write, iov, n)
            }
            Work::Plain { write } => {
                let (iov, n) = slot.transfer.iovec();
                (*write, iov, n.min(IOV_MAX))
            }
            _ => return Err(Status::IoError),
        };
        let entry = if write {
            opcode::Writev::new(fd, iov, n).offset(slot.offset).rw_flags(flags).build()
        } else {
            opcode::Readv::new(fd, iov, n).offset(slot.offset).build()
        };
        push(io, entry, head)
    }

    fn flush(&mut self, io: &mut Io<'_>, head: u16, status: GuestAddress) -> Result<Option<u32>, Status> {
        let storage = &self.shared.storage;
        if strikes(Sabotage::LoseFlush) {
            return Ok(Some(1));
        }
        step(Step::Flush);
        if let Some(file) = storage.file().filter(|_| !matches!(storage.engine(), Engine::Mapped { .. })) {
            sync_begins(file.as_raw_fd());
        }
        match storage.engine() {
            Engine::Null => Ok(Some(1)),
            Engine::Inline => {
                let flushed = fails()
                    .map_or_else(|| storage.flush_inline(), |errno| Err(std::io::Error::from_raw_os_error(errno)));
                flushed.map_err(|e| io_error(storage.name(), &e))?;
                sync_ended();
                step(Step::Flush);
                Ok(Some(1))
            }
            Engine::Mapped { .. } => self.mapped_flush(io, head, status),
            Engine::Ring => {
                let entry = opcode::Fsync::new(types::Fd(storage.raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
                let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
                *slot = Slot { work: Work::Flush, status, written: 1, ..Slot::default() };
                push(io, entry, head)?;
                Ok(None)
            }
        }
    }

    /// Reads and checks the ranges of a discard or write-zeroes request.
    fn ranges<M: GuestMemory>(
        &self,
        mem: &M,
        readable: Segments<'_>,
        discard: bool,
    ) -> Result<VecDeque<Range>, Status> {
        let len = readable.bytes() - HEADER_BYTES;
        if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len / RANGE_BYTES > u64::from(RANGES_MAX) {
            return Err(Status::IoError);
        }
        let mut ranges = VecDeque::new();
        for at in (0..len).step_by(RANGE_BYTES as usize) {
            let mut raw = [0; RANGE_BYTES as usize];
            readable.read_at(mem, HEADER_BYTES + at, &mut raw).map_err(|_| Status::IoError)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let how = match (discard, u32::from_le_bytes([f0, f1, f2, f3])) {
                (true, 0) => Clear::Discard,
                (false, 0) => Clear::Zero,
                (false, 1) => Clear::Unmap,
                _ => return Err(Status::Unsupported),
            };
            if sectors > RANGE_SECTORS_MAX {
                return Err(Status::IoError);
            }
            let len = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.stretch(sector, len)?;
            if len > 0 {
                ranges.push_back(Range { offset, len, how });
            }
        }
        Ok(ranges)
    }

    fn clear(
        &mut self,
        io: &mut Io<'_>,
        head: u16,
        ranges: VecDeque<Range>,
        status: GuestAddress,
    ) -> Result<Option<u32>, Status> {
        let storage = &self.shared.storage;
        match storage.engine() {
            Engine::Null | Engine::Mapped { .. } => Ok(Some(1)),
            Engine::Inline => {
                for range in ranges {
                    let done = storage.fallocate_inline(range.how.mode(), range.offset, range.len);
                    match done {
                        Err(e) if unsupported(&e) && range.how == Clear::Discard => {}
                        Err(e) if unsupported(&e) => {
                            storage.zero_inline(range.offset, range.len).map_err(|e| io_error(storage.name(), &e))?;
                        }
                        done => done.map_err(|e| io_error(storage.name(), &e))?,
                    }
                }
                if self.shared.write_through() {
                    storage.flush_inline().map_err(|e| io_error(storage.name(), &e))?;
                }
                Ok(Some(1))
            }
            Engine::Ring => {
                if ranges.is_empty() {
                    return Ok(Some(1));
                }
                let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
                *slot = Slot { work: Work::Clear(ranges), status, written: 1, ..Slot::default() };
                self.push_clear(io, head)?;
                Ok(None)
            }
        }
    }

    /// Starts clearing the first range of a slot.
    fn push_clear(&mut self, io: &mut Io<'_>, head: u16) -> Result<(), Status> {
        let fd = types::Fd(self.shared.storage.raw_fd());
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        let Work::Clear(ranges) = &slot.work else { return Err(Status::IoError) };
        let range = ranges.front().ok_or(Status::IoError)?;
        let entry = if range.how == Clear::Write {
            let (zeroes, n) = crate::bounce::zeroes(range.len.min(ZERO_BYTES) as usize);
            opcode::Writev::new(fd, zeroes, n).offset(range.offset).build()
        } else {
            opcode::Fallocate::new(fd, range.len)
                .offset(range.offset)
                .mode(range.how.mode().bits().cast_signed())
                .build()
        };
        push(io, entry, head)
    }

    /// An operation has ended: true when the request is finished.
    fn go_on<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, head: u16, result: i32) -> Result<bool, Status> {
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        let retry = matches!(-result, libc::EAGAIN | libc::EINTR);
        let failed = (result < 0 && !retry).then(|| std::io::Error::from_raw_os_error(-result));
        let moved = u64::try_from(result).unwrap_or(0);
        match &mut slot.work {
            Work::None => Err(Status::IoError),
            Work::Mapped(_) => self.mapped_go_on(io, mem, head, result),
            Work::Flush if retry => self.flush(io, head, self.slot_status(head)).map(|_| false),
            Work::Flush => match failed {
                Some(e) => Err(io_error(self.shared.storage.name(), &e)),
                None => {
                    sync_ended();
                    step(Step::Flush);
                    Ok(true)
                }
            },
            Work::Plain { .. } | Work::Bounced { .. } => {
                if let Some(e) = failed {
                    return Err(io_error(self.shared.storage.name(), &e));
                }
                if result == 0 {
                    // The file has become shorter than it was.
                    return Err(Status::IoError);
                }
                if let Work::Bounced { write, bounce, data, skip } = &mut slot.work {
                    if !*write {
                        let part = bounce.part(moved as usize);
                        Segments(data).write_at(mem, *skip, part).map_err(|_| Status::IoError)?;
                    }
                    *skip += moved;
                } else {
                    slot.transfer.advance(moved as usize);
                }
                slot.offset += moved;
                slot.left = slot.left.saturating_sub(moved);
                if slot.left == 0 {
                    return Ok(true);
                }
                self.push_data(io, mem, head)?;
                Ok(false)
            }
            Work::Clear(ranges) => {
                let Some(range) = ranges.front_mut() else { return Ok(true) };
                match failed {
                    Some(e) if unsupported(&e) && range.how == Clear::Discard => {
                        ranges.pop_front();
                    }
                    Some(e) if unsupported(&e) && range.how != Clear::Write => range.how = Clear::Write,
                    Some(e) => return Err(io_error(self.shared.storage.name(), &e)),
                    None if retry => {}
                    None if range.how == Clear::Write => {
                        if moved == 0 {
                            return Err(Status::IoError);
                        }
                        range.offset += moved;
                        range.len = range.len.saturating_sub(moved);
                        if range.len == 0 {
                            ranges.pop_front();
                        }
                    }
                    None => {
                        ranges.pop_front();
                    }
                }
                if !ranges.is_empty() {
                    self.push_clear(io, head)?;
                    return Ok(false);
                }
                if self.shared.write_through() {
                    return self.flush(io, head, self.slot_status(head)).map(|done| done.is_some());
                }
                Ok(true)
            }
        }
    }

    fn slot_status(&self, head: u16) -> GuestAddress {
        self.slots.get(usize::from(head)).map_or(GuestAddress(0), |slot| slot.status)
    }
}

#[allow(unsafe_code, reason = "an entry carries raw pointers")]
fn push(io: &mut Io<'_>, entry: squeue::Entry, head: u16) -> Result<(), Status> {
    // SAFETY: the iovec and the bounce buffer live in the slot of `head`, which is not touched before the completion;
    // zeroes are static; guest memory stays mapped while anything is in flight.
    unsafe { io.push(entry, head) }.map_err(|e| {
        tracing::error!(error = %e, "an operation could not be queued");
        Status::IoError
    })
}

fn header<M: GuestMemory>(mem: &M, chain: &Chain) -> Result<Header, Status> {
    let mut raw = [0; HEADER_BYTES as usize];
    chain.readable().read_at(mem, 0, &mut raw).map_err(|_| Status::IoError)?;
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = raw;
    Ok(Header {
        kind: u32::from_le_bytes([k0, k1, k2, k3]),
        sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
    })
}

/// An error of the storage: the guest sees IOERR, the log sees why, at each power of two.
fn io_error(name: &str, error: &std::io::Error) -> Status {
    use std::sync::atomic::{AtomicU64, Ordering};
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let count = SEEN.fetch_add(1, Ordering::Relaxed) + 1;
    if count.is_power_of_two() {
        tracing::warn!(image = name, count, error = %error, "a request failed");
    }
    Status::IoError
}
