//! The medium: reads, writes, flushes and holes on a file, by an io_uring, or by system calls where the file system knows
//! nothing else. The same ring waits for doorbells and for the client.

#![allow(unsafe_code, reason = "submission entries carry raw pointers and descriptors")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use atoll_blk::storage::{Engine as Means, IOV_MAX, Storage};
use atoll_kit::jail::Profile;
use atoll_kit::memory::{Direction, GuestRam, Segment, Segments, Transfer};
use atoll_kit::step::{Sabotage, Step as Moment, postpone, step, strikes, swap_sectors};
use atoll_kit::uring::{Completion, Uring, UringError};
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use vm_memory::{Bytes as _, GuestAddress};

use crate::controller::{Failed, Io, IoKind};
use crate::prp::Piece;

/// Entries of the ring: what is more is submitted in between.
const RING_ENTRIES: u32 = 256;
const DOORBELL: u64 = 1 << 32;
const CLIENT: u64 = 1 << 33;
const CLIENT_MASK: u64 = 0xffff_ffff;

/// What is under way.
struct Job {
    kind: IoKind,
    transfer: Transfer,
    /// Bytes that were moved.
    moved: u64,
    /// The range that is being cleared.
    range: usize,
    /// What it has written is being made durable.
    syncing: bool,
}

/// What one look at the ring has found.
#[derive(Debug, Default)]
pub struct Found {
    /// What the medium has done.
    pub done: Vec<(u16, Result<(), Failed>)>,
    /// Somebody is at the client's end.
    pub client: bool,
}

/// Carries out [`Io`]s.
pub struct Engine {
    storage: Arc<Storage>,
    ring: Uring,
    jobs: BTreeMap<u16, Job>,
    /// Done without the ring.
    finished: Vec<(u16, Result<(), Failed>)>,
    clients: u64,
    seen: Vec<Completion>,
}

enum Step {
    Submitted,
    Over(io::Result<()>),
}

impl Engine {
    /// On `storage`; heard of are doorbells. To be called by the thread that drives it.
    ///
    /// # Errors
    /// Without a ring.
    pub fn new(storage: Arc<Storage>, doorbell: BorrowedFd<'_>) -> Result<Self, UringError> {
        let mut ring = Uring::new(RING_ENTRIES, Profile::NVME.opcodes)?;
        ring.watch(doorbell, DOORBELL)?;
        Ok(Self { storage, ring, jobs: BTreeMap::new(), finished: Vec::new(), clients: 0, seen: Vec::new() })
    }

    /// Another client is heard of, and the one before no more.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn attend(&mut self, client: BorrowedFd<'_>) -> Result<(), UringError> {
        if self.clients > 0 {
            self.ring.unwatch(CLIENT | self.clients & CLIENT_MASK, 0)?;
        }
        self.clients += 1;
        self.ring.watch(client, CLIENT | self.clients & CLIENT_MASK)
    }

    /// Begins. `memory` has to stay mapped until it is done.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn start(&mut self, io: Io, memory: &GuestRam) -> Result<(), UringError> {
        let mut transfer = Transfer::default();
        let pointed = match &io.kind {
            IoKind::Read { pieces, .. } => point(&mut transfer, memory, pieces, Direction::IntoGuest),
            IoKind::Write { pieces, .. } => point(&mut transfer, memory, pieces, Direction::FromGuest),
            IoKind::Flush | IoKind::Zero { .. } => true,
        };
        let job = Job { kind: io.kind, transfer, moved: 0, range: 0, syncing: false };
        if self.put_off(&job.kind, memory) {
            self.finish(io.token, &job, Ok(()));
            return Ok(());
        }
        let failed = io::Error::from_raw_os_error(libc::EFAULT);
        match self.storage.engine() {
            _ if !pointed => self.finish(io.token, &job, Err(failed)),
            Means::Null => self.finish(io.token, &job, Ok(())),
            Means::Inline => {
                step(Moment::Submit);
                let mut job = job;
                let outcome = self.inline(&mut job);
                self.finish(io.token, &job, outcome);
            }
            Means::Ring => {
                self.jobs.insert(io.token, job);
                self.step(io.token)?;
                step(Moment::Submit);
            }
            // Raw images only are opened.
            Means::Mapped { .. } => self.finish(io.token, &job, Err(failed)),
        }
        Ok(())
    }

    /// What the client's end, a flush without a driver, has to be done with no memory at all.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn flush(&mut self, token: u16) -> Result<(), UringError> {
        let job = Job { kind: IoKind::Flush, transfer: Transfer::default(), moved: 0, range: 0, syncing: false };
        match self.storage.engine() {
            Means::Ring => {
                self.jobs.insert(token, job);
                self.step(token)
            }
            _ => {
                step(Moment::Flush);
                let outcome = self.storage.flush_inline();
                self.finish(token, &job, outcome);
                Ok(())
            }
        }
    }

    /// Whether a write is acknowledged before it is carried out: a fault that is planted, never in a product.
    fn put_off(&self, kind: &IoKind, memory: &GuestRam) -> bool {
        let IoKind::Write { offset, pieces, .. } = kind else { return false };
        if !strikes(Sabotage::AcknowledgeFirst) {
            return false;
        }
        let mut data = Vec::new();
        for (address, len) in pieces {
            let at = data.len();
            data.resize(at + *len as usize, 0);
            let _ = memory.read_slice(data.get_mut(at..).unwrap_or_default(), GuestAddress(*address));
        }
        postpone(self.storage.raw_fd(), *offset, data);
        true
    }

    fn finish(&mut self, token: u16, job: &Job, outcome: io::Result<()>) {
        match &job.kind {
            IoKind::Flush => step(Moment::Flush),
            IoKind::Write { offset, pieces, .. } => {
                let len: u64 = pieces.iter().map(|(_, len)| len).sum();
                if len >= 1024 && strikes(Sabotage::SwapSectors) {
                    swap_sectors(self.storage.raw_fd(), *offset);
                }
            }
            IoKind::Read { .. } | IoKind::Zero { .. } => {}
        }
        step(Moment::Done);
        let outcome = outcome.map_err(|error| {
            tracing::warn!(%error, what = ?name(&job.kind), "the medium failed");
            Failed
        });
        self.finished.push((token, outcome));
    }

    fn inline(&self, job: &mut Job) -> io::Result<()> {
        let storage = &self.storage;
        match &job.kind {
            IoKind::Read { offset, .. } => storage.read_inline(&mut job.transfer, *offset),
            IoKind::Write { offset, durable, .. } => storage.write_inline(&mut job.transfer, *offset, *durable),
            IoKind::Flush => {
                step(Moment::Flush);
                storage.flush_inline()
            }
            IoKind::Zero { ranges, release, durable } => {
                for (offset, len) in ranges {
                    match storage.fallocate_inline(mode(*release), *offset, *len) {
                        Err(error) if is_unsupported(&error) => storage.zero_inline(*offset, *len)?,
                        other => other?,
                    }
                }
                if *durable { storage.flush_inline() } else { Ok(()) }
            }
        }
    }

    /// Gives the ring the next step of a job; one that has none is over.
    fn step(&mut self, token: u16) -> Result<(), UringError> {
        let Some(job) = self.jobs.get_mut(&token) else { return Ok(()) };
        let fd = types::Fd(self.storage.raw_fd());
        let step = match &job.kind {
            IoKind::Read { offset, .. } | IoKind::Write { offset, .. } => {
                let (iov, count) = job.transfer.iovec();
                let at = offset.saturating_add(job.moved);
                if count == 0 {
                    Step::Over(Ok(()))
                } else {
                    let count = count.min(IOV_MAX);
                    let entry = match &job.kind {
                        IoKind::Write { durable, .. } => {
                            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                            opcode::Writev::new(fd, iov, count).offset(at).rw_flags(flags).build()
                        }
                        _ => opcode::Readv::new(fd, iov, count).offset(at).build(),
                    };
                    push(&mut self.ring, entry, token)?
                }
            }
            IoKind::Flush if job.syncing => Step::Over(Ok(())),
            IoKind::Flush => {
                job.syncing = true;
                step(Moment::Flush);
                push(&mut self.ring, sync(fd), token)?
            }
            IoKind::Zero { ranges, release, durable } => match ranges.get(job.range) {
                Some((offset, len)) => {
                    let mode = mode(*release).bits().cast_signed();
                    let entry = opcode::Fallocate::new(fd, *len).offset(*offset).mode(mode).build();
                    push(&mut self.ring, entry, token)?
                }
                None if *durable && !job.syncing => {
                    job.syncing = true;
                    push(&mut self.ring, sync(fd), token)?
                }
                None => Step::Over(Ok(())),
            },
        };
        if let Step::Over(outcome) = step
            && let Some(job) = self.jobs.remove(&token)
        {
            self.finish(token, &job, outcome);
        }
        Ok(())
    }

    /// What came of a step.
    fn stepped(&mut self, token: u16, result: i32) -> Result<(), UringError> {
        let Some(job) = self.jobs.get_mut(&token) else { return Ok(()) };
        let error = (result < 0).then(|| io::Error::from_raw_os_error(-result));
        let again =
            error.as_ref().is_some_and(|error| matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)));
        let outcome = match (&job.kind, error) {
            (_, Some(_)) if again => Ok(()),
            (IoKind::Zero { ranges, .. }, Some(error)) if !job.syncing && is_unsupported(&error) => {
                let range = ranges.get(job.range).copied();
                job.range += 1;
                range.map_or(Ok(()), |(offset, len)| self.storage.zero_inline(offset, len))
            }
            (_, Some(error)) => Err(error),
            (IoKind::Read { .. } | IoKind::Write { .. }, None) if result == 0 => {
                // The file has become shorter than it was.
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            (IoKind::Read { .. } | IoKind::Write { .. }, None) => {
                job.moved += u64::from(result.unsigned_abs());
                job.transfer.advance(result.unsigned_abs() as usize);
                Ok(())
            }
            (IoKind::Zero { .. }, None) => {
                job.range += usize::from(!job.syncing);
                Ok(())
            }
            (IoKind::Flush, None) => Ok(()),
        };
        match outcome {
            Ok(()) => self.step(token),
            Err(error) => {
                if let Some(job) = self.jobs.remove(&token) {
                    self.finish(token, &job, Err(error));
                }
                Ok(())
            }
        }
    }

    /// Whether anything is under way, or done and not told.
    pub fn is_busy(&self) -> bool {
        !self.jobs.is_empty() || !self.finished.is_empty()
    }

    /// Looks what has happened; with `wait`, not before something has. What was done is no more pointed at by the kernel.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn look(&mut self, wait: bool, memory: Option<&GuestRam>) -> Result<Found, UringError> {
        if wait && self.finished.is_empty() {
            self.ring.submit_and_wait()?;
        } else if self.ring.queued() > 0 || !self.jobs.is_empty() || self.ring.deliverable() {
            self.ring.submit()?;
        }
        let mut seen = std::mem::take(&mut self.seen);
        self.ring.reap(&mut seen);
        let mut found = Found::default();
        for completion in seen.drain(..) {
            let mark = completion.user_data;
            if mark & CLIENT != 0 {
                found.client |= mark == CLIENT | self.clients & CLIENT_MASK;
            } else if mark & DOORBELL == 0
                && let Ok(token) = u16::try_from(mark.wrapping_sub(1))
            {
                if let (Some(job), Some(memory)) = (self.jobs.get(&token), memory) {
                    job.transfer.landed(memory);
                }
                self.stepped(token, completion.result)?;
            }
        }
        self.seen = seen;
        found.done = std::mem::take(&mut self.finished);
        Ok(found)
    }
}

fn name(kind: &IoKind) -> &'static str {
    match kind {
        IoKind::Read { .. } => "read",
        IoKind::Write { .. } => "write",
        IoKind::Flush => "flush",
        IoKind::Zero { .. } => "write zeroes",
    }
}

fn mode(release: bool) -> FallocateFlags {
    FallocateFlags::KEEP_SIZE | if release { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOSYS))
}

fn sync(fd: types::Fd) -> squeue::Entry {
    opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
}

fn push(ring: &mut Uring, entry: squeue::Entry, token: u16) -> Result<Step, UringError> {
    // SAFETY: the iovec is the job's, which stays until its completion; the memory that it points to stays mapped until the
    // device is quiet, which waits for every job.
    unsafe { ring.push(&entry.user_data(u64::from(token) + 1)) }?;
    Ok(Step::Submitted)
}

fn point(transfer: &mut Transfer, memory: &GuestRam, pieces: &[Piece], direction: Direction) -> bool {
    let segment = |(address, len): &Piece| Segment { addr: GuestAddress(*address), len: *len as u32 };
    let segments: Vec<Segment> = pieces.iter().map(segment).collect();
    let segments = Segments(&segments);
    transfer.set(memory, segments, 0, segments.bytes(), direction).is_ok()
}
