//! Requests to an image whose disk does not lie in one piece: each goes on from piece to piece, where the image says
//! that its bytes are. Pieces in files go the same way as requests to a raw image; a piece that must be allocated first
//! is written on the spot. A request that changed tables, or went where somebody else's change is not in the file yet,
//! waits for one empty turn of the ring: by then all requests of its batch have been begun, and the first of them carries
//! out the changes of all.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;

use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::memory::{Direction, Segment, Segments};
use atoll_kit::step::{Sabotage, Step, step, strikes, swap_sectors, sync_begins, sync_ended};
use imago::StorageExt;
use io_uring::{opcode, types};
use vm_memory::{GuestAddress, GuestMemory};

use super::{BOUNCE_BYTES, BlkQueue, Clear, Range, Slot, Status, Work, io_error, push};
use crate::bounce::Bounce;
use crate::qcow2::image::{self, Change, Image, Place};
use crate::storage::{Engine, IOV_MAX, Storage, read_to_end, write_to};

/// Most bytes that are decompressed, or copied to be aligned, at a time.
const PART_BYTES: u64 = 1 << 20;

/// What a request is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A piece of its data.
    Data,
    /// Its turn to carry out changes of tables.
    Settle,
    /// Everything being durable.
    Sync,
}

/// A request on its way through an image.
#[derive(Debug)]
pub(super) struct Journey {
    stage: Stage,
    /// Data goes from the guest to the disk.
    write: bool,
    /// It is complete only when it is durable.
    durable: bool,
    data: Vec<Segment>,
    /// Bytes of `data` that lie behind us.
    skip: u64,
    /// Bytes of the piece under way.
    part: u64,
    bounce: Option<Bounce>,
    change: Change,
}

impl Journey {
    fn new(stage: Stage, write: bool, durable: bool) -> Box<Self> {
        let (data, change) = (Vec::new(), Change::default());
        Box::new(Self { stage, write, durable, data, skip: 0, part: 0, bounce: None, change })
    }
}

fn writes(slot: &Slot) -> bool {
    matches!(&slot.work, Work::Mapped(journey) if journey.write)
}

fn image(storage: &Storage) -> Result<&Image, Status> {
    storage.image().ok_or(Status::IoError)
}

/// The end of what `BlkQueue::flush` has begun.
fn synced() {
    sync_ended();
    step(Step::Flush);
}

fn rings(storage: &Storage) -> bool {
    storage.engine() == Engine::Mapped { ring: true }
}

/// Writes `len` zeroes into a chain from `skip` on.
fn fill_zeroes<M: GuestMemory>(mem: &M, data: &[Segment], mut skip: u64, mut len: u64) -> Result<(), Status> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    while len > 0 {
        let part = len.min(ZEROES.len() as u64);
        let zeroes = ZEROES.get(..part as usize).unwrap_or(&ZEROES);
        Segments(data).write_at(mem, skip, zeroes).map_err(|_| Status::IoError)?;
        (skip, len) = (skip + part, len - part);
    }
    Ok(())
}

impl BlkQueue {
    /// Begins a read or write whose place and length have been checked.
    #[allow(clippy::too_many_arguments, reason = "one request, taken apart")]
    pub(super) fn mapped_data<M: GuestMemory>(
        &mut self,
        io: &mut Io<'_>,
        mem: &M,
        chain: &Chain,
        direction: Direction,
        (offset, len): (u64, u64),
        status: GuestAddress,
        written: u32,
    ) -> Result<Option<u32>, Status> {
        let write = direction == Direction::FromGuest;
        if let Some(align) = self.shared.storage.direct()
            && (offset | len) & (align.offset - 1) != 0
        {
            return Err(Status::IoError);
        }
        let durable = write && self.shared.write_through();
        let (segments, skip) = if write { (chain.readable(), super::HEADER_BYTES) } else { (chain.writable(), 0) };
        let slot = self.slots.get_mut(usize::from(chain.head())).ok_or(Status::IoError)?;
        let mut journey = Journey::new(Stage::Data, write, durable);
        (journey.data, journey.skip) = (segments.0.to_vec(), skip);
        (slot.offset, slot.left, slot.status, slot.written) = (offset, len, status, written);
        slot.work = Work::Mapped(journey);
        let finished = self.travel(io, mem, chain.head())?;
        Ok(finished.then_some(written))
    }

    /// Begins a flush.
    pub(super) fn mapped_flush(
        &mut self,
        io: &mut Io<'_>,
        head: u16,
        status: GuestAddress,
    ) -> Result<Option<u32>, Status> {
        let storage = &self.shared.storage;
        image(storage)?.settle_made().map_err(|e| io_error(storage.name(), &e))?;
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        *slot =
            Slot { work: Work::Mapped(Journey::new(Stage::Sync, false, true)), status, written: 1, ..Slot::default() };
        Ok(self.sync(io, head)?.then_some(1))
    }

    /// Begins, and mostly finishes, a discard or write-zeroes request.
    pub(super) fn mapped_clear<M: GuestMemory>(
        &mut self,
        io: &mut Io<'_>,
        mem: &M,
        head: u16,
        ranges: VecDeque<Range>,
        status: GuestAddress,
    ) -> Result<Option<u32>, Status> {
        let storage = &self.shared.storage;
        let image = image(storage)?;
        let failed = |e: std::io::Error| io_error(storage.name(), &e);
        let mut journey = Journey::new(Stage::Data, true, self.shared.write_through());
        for range in ranges {
            let how = match range.how {
                Clear::Discard => image::Clear::Discard,
                Clear::Unmap => image::Clear::Unmap,
                Clear::Zero | Clear::Write => image::Clear::Zero,
            };
            let (change, rest) = image.clear(range.offset, range.len, how).map_err(failed)?;
            journey.change = journey.change.max(change);
            for part in rest {
                let change = image.write_zeroes(part).map_err(failed)?;
                journey.change = journey.change.max(change);
            }
        }
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        *slot = Slot { work: Work::Mapped(journey), status, written: 1, ..Slot::default() };
        Ok(self.travel(io, mem, head)?.then_some(1))
    }

    /// Goes on until an operation is under way, or all is done (true).
    fn travel<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, head: u16) -> Result<bool, Status> {
        let storage = &self.shared.storage;
        let image = image(storage)?;
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        while slot.left > 0 {
            let (place, len) =
                image.place(slot.offset, slot.left, writes(slot)).map_err(|e| io_error(storage.name(), &e))?;
            let len = len.min(slot.left);
            if let Work::Mapped(journey) = &mut slot.work {
                journey.change = journey.change.max(image.last_change(slot.offset, len));
            }
            if piece(io, mem, head, storage, image, slot, (&place, len))? {
                return Ok(false);
            }
        }
        let Work::Mapped(journey) = &mut slot.work else { return Err(Status::IoError) };
        let unsettled = journey.change > Change::default() && !image.is_settled(journey.change);
        if unsettled && !strikes(Sabotage::AcknowledgeFirst) {
            journey.stage = Stage::Settle;
            push(io, opcode::Nop::new().build(), head)?;
            return Ok(false);
        }
        if journey.durable {
            journey.stage = Stage::Sync;
            return self.sync(io, head);
        }
        Ok(true)
    }

    /// Makes everything durable: true when that is done already.
    fn sync(&mut self, io: &mut Io<'_>, head: u16) -> Result<bool, Status> {
        let storage = &self.shared.storage;
        let image = image(storage)?;
        let failed = |e: std::io::Error| io_error(storage.name(), &e);
        if let Some(file) = image.written().first() {
            sync_begins(file.as_raw_fd());
        }
        match image.written() {
            [file] if rings(storage) => {
                let fd = types::Fd(file.as_raw_fd());
                push(io, opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(), head)?;
                Ok(false)
            }
            _ => {
                image.sync().map_err(failed)?;
                synced();
                Ok(true)
            }
        }
    }

    /// An operation of a request has ended: true when the request has, too.
    pub(super) fn mapped_go_on<M: GuestMemory>(
        &mut self,
        io: &mut Io<'_>,
        mem: &M,
        head: u16,
        result: i32,
    ) -> Result<bool, Status> {
        let storage = &self.shared.storage;
        let failed = |e: std::io::Error| io_error(storage.name(), &e);
        let slot = self.slots.get_mut(usize::from(head)).ok_or(Status::IoError)?;
        let Work::Mapped(journey) = &mut slot.work else { return Err(Status::IoError) };
        let retry = matches!(-result, libc::EAGAIN | libc::EINTR);
        if result < 0 && !retry {
            return Err(failed(std::io::Error::from_raw_os_error(-result)));
        }
        match journey.stage {
            Stage::Sync if retry => return self.sync(io, head),
            Stage::Sync => {
                synced();
                return Ok(true);
            }
            Stage::Settle => image(storage)?.settle(journey.change).map_err(failed)?,
            Stage::Data if retry => {}
            Stage::Data => {
                slot.transfer.landed(mem);
                let mut moved = u64::from(result.unsigned_abs()).min(journey.part);
                if let (Some(bounce), false) = (&mut journey.bounce, journey.write) {
                    let part = bounce.part(moved as usize);
                    Segments(&journey.data).write_at(mem, journey.skip, part).map_err(|_| Status::IoError)?;
                }
                if moved == 0 {
                    if journey.write {
                        return Err(Status::IoError);
                    }
                    // Behind the end of the file there are zeroes.
                    moved = journey.part;
                    fill_zeroes(mem, &journey.data, journey.skip, moved)?;
                }
                journey.skip += moved;
                slot.offset += moved;
                slot.left = slot.left.saturating_sub(moved);
            }
        }
        self.travel(io, mem, head)
    }
}

/// Moves one piece, or begins to (true).
fn piece<M: GuestMemory>(
    io: &mut Io<'_>,
    mem: &M,
    head: u16,
    storage: &Storage,
    image: &Image,
    slot: &mut Slot,
    (place, len): (&Place, u64),
) -> Result<bool, Status> {
    let failed = |e: std::io::Error| io_error(storage.name(), &e);
    let Work::Mapped(journey) = &mut slot.work else { return Err(Status::IoError) };
    let done = match (journey.write, place) {
        (true, Place::File { file, offset, writable: true }) | (false, Place::File { file, offset, .. }) => {
            let direction = if journey.write { Direction::FromGuest } else { Direction::IntoGuest };
            let data = Segments(&journey.data);
            slot.transfer.set(mem, data, journey.skip, len, direction).map_err(|_| Status::IoError)?;
            if rings(storage) {
                push_piece(io, mem, head, storage, slot, (file.as_raw_fd(), *offset, len))?;
                return Ok(true);
            }
            if journey.write {
                write_to(file, &mut slot.transfer, *offset).map_err(failed)?;
                if len >= 1024 && strikes(Sabotage::SwapSectors) {
                    swap_sectors(file.as_raw_fd(), *offset);
                }
            } else {
                let read = read_to_end(file, &mut slot.transfer, *offset);
                slot.transfer.landed(mem);
                let read = read.map_err(failed)?;
                fill_zeroes(mem, &journey.data, journey.skip + read, len.saturating_sub(read))?;
            }
            len
        }
        (true, _) => {
            let len = if storage.direct().is_some() { len.min(PART_BYTES) } else { len };
            let (transfer, data, skip) = (&mut slot.transfer, &journey.data, journey.skip);
            let direct = storage.direct().is_some();
            let written = image.allocate(slot.offset, len, |file, host, len| {
                if direct {
                    let mut copy = vec![0; len as usize];
                    Segments(data).read_at(mem, skip, &mut copy).map_err(std::io::Error::other)?;
                    return file.write(copy.as_slice(), host);
                }
                transfer.set(mem, Segments(data), skip, len, Direction::FromGuest).map_err(std::io::Error::other)?;
                write_to(file.file(), transfer, host)
            });
            let (len, change) = written.map_err(failed)?;
            journey.change = journey.change.max(change);
            len
        }
        (false, Place::Zero) => {
            fill_zeroes(mem, &journey.data, journey.skip, len)?;
            len
        }
        (false, Place::Compressed) => {
            let len = len.min(image.cluster() - slot.offset % image.cluster()).min(PART_BYTES);
            let mut plain = vec![0; len as usize];
            image.read(&mut plain, slot.offset).map_err(failed)?;
            Segments(&journey.data).write_at(mem, journey.skip, &plain).map_err(|_| Status::IoError)?;
            len
        }
    };
    journey.skip += done;
    slot.offset += done;
    slot.left = slot.left.saturating_sub(done);
    Ok(false)
}

/// Starts the operation of a piece that lies in a file, to which the slot's transfer points.
fn push_piece<M: GuestMemory>(
    io: &mut Io<'_>,
    mem: &M,
    head: u16,
    storage: &Storage,
    slot: &mut Slot,
    (fd, offset, len): (i32, u64, u64),
) -> Result<(), Status> {
    let Work::Mapped(journey) = &mut slot.work else { return Err(Status::IoError) };
    journey.part = len;
    let misaligned = storage.direct().filter(|align| !slot.transfer.aligned(align.memory));
    let (iov, n) = match misaligned {
        Some(align) => {
            journey.part = len.min(BOUNCE_BYTES);
            let bounce = journey.bounce.get_or_insert_with(|| Bounce::new(BOUNCE_BYTES as usize, align.memory));
            let part = bounce.part(journey.part as usize);
            if journey.write {
                Segments(&journey.data).read_at(mem, journey.skip, part).map_err(|_| Status::IoError)?;
            }
            bounce.iovec(journey.part as usize)
        }
        None => {
            journey.bounce = None;
            slot.transfer.iovec()
        }
    };
    let (fd, n) = (types::Fd(fd), n.min(IOV_MAX));
    let entry = if journey.write {
        opcode::Writev::new(fd, iov, n).offset(offset).build()
    } else {
        opcode::Readv::new(fd, iov, n).offset(offset).build()
    };
    push(io, entry, head)
}
