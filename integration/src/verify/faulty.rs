//! A disk with a planted fault, for the proof that the judge finds it. It never serves a product.
//!
//! It speaks rings, not vhost-user: a thread that maps the player's guest memory and has it all in its hand, so that it
//! can do what the kit makes impossible, such as completing a request twice. The medium is two layers, what is in the
//! cache and what is durable. Requests are taken in order and carried out in any order.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail};
use atoll_kit::driver::queue::NEXT;
use atoll_kit::driver::{Driver, Guest};
use atoll_verify::blk::sector::SECTOR;
use atoll_verify::dice::Dice;
use vmm_sys_util::eventfd::EventFd;

/// What is wrong with the disk. Each strikes at about every 50th request that it can strike at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Some sectors are forgotten by a flush that is acknowledged.
    LosesFlush,
    /// A request is put into the used ring twice.
    CompletesTwice,
    /// Writes are acknowledged and done later, unless it dies first.
    AcknowledgesEarly,
    /// Two neighbouring sectors of a write change places.
    SwapsSectors,
    /// A write goes one sector further than it should.
    Misses,
    /// A read's buffer is written again after its completion.
    WritesLate,
    /// Data of a write is fetched after its completion.
    FetchesLate,
    /// Half a sector of a write stays behind.
    Tears,
    /// A request is forgotten.
    Forgets,
    /// A read is completed without its data.
    DoesNotFill,
    /// A read returns what was there before the last write.
    ReturnsOld,
    /// A request is completed without a status.
    NoStatus,
    /// A write that was in flight when it died is not done again, though it is completed.
    ForgetsAtDeath,
    /// One bit of a write flips.
    FlipsBit,
    /// A read writes beyond its buffer.
    Overruns,
}

type Sector = [u8; SECTOR];

/// What survives the disk.
#[derive(Debug, Default)]
pub struct Medium {
    cache: HashMap<u64, Sector>,
    durable: HashMap<u64, Sector>,
}

impl Medium {
    /// The power fails.
    pub fn lose_power(&mut self) {
        self.cache = self.durable.clone();
    }
}

/// A medium that several disks use one after another.
pub type Shared = Arc<Mutex<Medium>>;

struct Ring {
    index: usize,
    desc: u64,
    avail: u64,
    used: u64,
    size: u16,
    next: u16,
    done: u16,
    kick: EventFd,
    call: EventFd,
}

#[derive(Clone)]
struct Request {
    ring: usize,
    head: u16,
    kind: u32,
    sector: u64,
    /// Address, length and whether the device may write it.
    parts: Vec<(u64, u32, bool)>,
    status: u64,
}

/// Requests that were taken and not completed: ring and head.
pub type Unfinished = Vec<(usize, u16)>;

/// A running disk; stops when dropped.
pub struct FaultyDisk {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Unfinished>>>,
}

impl FaultyDisk {
    /// Serves the rings of `driver`. Requests in `again` were taken by a predecessor and not completed.
    pub fn start(
        driver: &mut Driver,
        queues: usize,
        medium: &Shared,
        fault: Fault,
        seed: u64,
        again: Unfinished,
    ) -> Result<Self> {
        let mut rings = Vec::new();
        for index in 0..queues {
            let (queue, guest) = driver.queue(index)?;
            let done = queue.used_index(guest);
            let taken = again.iter().filter(|(ring, _)| *ring == index).count() as u16;
            rings.push(Ring {
                index,
                desc: queue.desc,
                avail: queue.avail,
                used: queue.used,
                size: queue.size(),
                next: done.wrapping_add(taken),
                done,
                kick: queue.kick.try_clone()?,
                call: queue.call.try_clone()?,
            });
        }
        let guest = driver.guest().again()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut disk = Disk {
            guest,
            rings,
            medium: Arc::clone(medium),
            fault,
            dice: Dice::new(seed),
            pending: Vec::new(),
            later: VecDeque::new(),
            old: HashMap::new(),
            strikes: 0,
        };
        for (ring, head) in again {
            let request = disk.request(ring, head)?;
            if fault == Fault::ForgetsAtDeath && request.kind == 1 {
                disk.complete(&request, 0, 1)?;
            } else {
                disk.pending.push(request);
            }
        }
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || disk.serve(&stopped));
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Dies, with whatever it has not done; gives what its successor must do again.
    pub fn die(mut self) -> Result<Unfinished> {
        self.end()
    }

    fn end(&mut self) -> Result<Unfinished> {
        self.stop.store(true, Ordering::Release);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(rest)) => rest,
            Some(Err(_)) => bail!("the faulty disk panicked"),
            None => Ok(Vec::new()),
        }
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// What is done some requests later.
enum Later {
    /// A write whose data was fetched.
    Store(u64, Vec<u8>),
    /// A write whose data was not.
    Fetch(Request),
    /// Into the guest's memory.
    Scribble(u64),
}

struct Disk {
    guest: Guest,
    rings: Vec<Ring>,
    medium: Shared,
    fault: Fault,
    dice: Dice,
    pending: Vec<Request>,
    later: VecDeque<Later>,
    old: HashMap<u64, Sector>,
    strikes: u64,
}

impl Disk {
    fn serve(mut self, stop: &AtomicBool) -> Result<Unfinished> {
        while !stop.load(Ordering::Acquire) {
            self.take()?;
            if self.pending.is_empty() {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            let at = self.dice.below(self.pending.len() as u64) as usize;
            let request = self.pending.swap_remove(at);
            if self.fault == Fault::ForgetsAtDeath {
                // Slow enough that there is always something to forget.
                std::thread::sleep(Duration::from_micros(200));
            }
            self.carry_out(&request)?;
            if self.later.len() > 8 {
                self.catch_up();
            }
        }
        // What was acknowledged early dies with it.
        Ok(self.pending.iter().map(|request| (request.ring, request.head)).collect())
    }

    fn take(&mut self) -> Result<()> {
        for index in 0..self.rings.len() {
            let _ = self.rings[index].kick.read();
            while self.pending.len() < 16 {
                let ring = &mut self.rings[index];
                if u16::from_le(self.guest.load(ring.avail + 2)) == ring.next {
                    break;
                }
                let head = u16::from_le(self.guest.load(ring.avail + 4 + 2 * u64::from(ring.next % ring.size)));
                ring.next = ring.next.wrapping_add(1);
                let request = self.request(index, head)?;
                self.pending.push(request);
            }
        }
        Ok(())
    }

    fn request(&self, ring: usize, head: u16) -> Result<Request> {
        let table = self.rings[ring].desc;
        let (mut parts, mut index) = (Vec::new(), head);
        loop {
            let at = table + 16 * u64::from(index);
            let flags: u16 = u16::from_le(self.guest.load(at + 12));
            parts.push((u64::from_le(self.guest.load(at)), u32::from_le(self.guest.load(at + 8)), flags & 2 != 0));
            if flags & NEXT == 0 || parts.len() > 16 {
                break;
            }
            index = u16::from_le(self.guest.load(at + 14));
        }
        let (header, ..) = parts.remove(0);
        let Some((status, ..)) = parts.pop() else { bail!("a chain without a status") };
        if parts.iter().any(|(at, len, _)| at + u64::from(*len) > self.guest.bytes() as u64)
            || !header.is_multiple_of(8)
        {
            bail!("a chain that was freed under our hands: that comes of completing twice");
        }
        let kind = u32::from_le(self.guest.load(header));
        Ok(Request { ring, head, kind, sector: u64::from_le(self.guest.load(header + 8)), parts, status })
    }

    fn strikes(&mut self, fault: Fault) -> bool {
        let hit = self.fault == fault && self.dice.below(50) == 0;
        self.strikes += u64::from(hit);
        hit
    }

    fn complete(&mut self, request: &Request, status: u8, len: u32) -> Result<()> {
        if !self.strikes(Fault::NoStatus) {
            self.guest.store(request.status, status);
        }
        let twice = 1 + u16::from(self.strikes(Fault::CompletesTwice));
        let ring = &mut self.rings[request.ring];
        debug_assert_eq!(ring.index, request.ring);
        for _ in 0..twice {
            let at = ring.used + 4 + 8 * u64::from(ring.done % ring.size);
            self.guest.store(at, u32::from(request.head).to_le());
            self.guest.store(at + 4, len.to_le());
            ring.done = ring.done.wrapping_add(1);
        }
        self.guest.store(ring.used + 2, ring.done.to_le());
        Ok(ring.call.write(1)?)
    }

    fn gather(&self, request: &Request) -> Vec<u8> {
        let mut data = Vec::new();
        for (at, len, _) in &request.parts {
            let start = data.len();
            data.resize(start + *len as usize, 0);
            self.guest.read(*at, &mut data[start..]);
        }
        data
    }

    fn store(&mut self, sector: u64, data: &[u8]) {
        let mut medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
        for (lba, bytes) in (sector..).zip(data.chunks_exact(SECTOR)) {
            let mut new = [0; SECTOR];
            new.copy_from_slice(bytes);
            let old = medium.cache.insert(lba, new).unwrap_or([0; SECTOR]);
            self.old.insert(lba, old);
        }
    }

    fn catch_up(&mut self) {
        match self.later.pop_front() {
            Some(Later::Store(sector, data)) => self.store(sector, &data),
            Some(Later::Fetch(request)) => {
                let data = self.gather(&request);
                self.store(request.sector, &data);
            }
            Some(Later::Scribble(at)) => self.guest.store(at, 0x55_u8),
            None => {}
        }
    }

    fn carry_out(&mut self, request: &Request) -> Result<()> {
        if self.strikes(Fault::Forgets) {
            return Ok(());
        }
        match request.kind {
            0 => self.read(request),
            1 => self.write(request),
            4 => {
                let forgets = self.fault == Fault::LosesFlush;
                let mut medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
                let Medium { cache, durable } = &mut *medium;
                durable.extend(
                    cache.iter().filter(|(lba, _)| !forgets || **lba % 16 != 3).map(|(lba, data)| (*lba, *data)),
                );
                drop(medium);
                self.complete(request, 0, 1)
            }
            _ => self.complete(request, 2, 1),
        }
    }

    fn write(&mut self, request: &Request) -> Result<()> {
        let mut data = self.gather(request);
        let mut sector = request.sector;
        if self.strikes(Fault::AcknowledgesEarly) {
            self.later.push_back(Later::Store(sector, data));
            return self.complete(request, 0, 1);
        }
        if self.strikes(Fault::FetchesLate) {
            self.complete(request, 0, 1)?;
            self.later.push_back(Later::Fetch(request.clone()));
            return Ok(());
        }
        if data.len() >= 2 * SECTOR && self.strikes(Fault::SwapsSectors) {
            let (first, second) = data.split_at_mut(SECTOR);
            first.swap_with_slice(&mut second[..SECTOR]);
        }
        if self.strikes(Fault::Misses) {
            sector += 1;
        }
        if self.strikes(Fault::FlipsBit) {
            data[100] ^= 4;
        }
        if self.strikes(Fault::Tears) {
            let medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
            let old = medium.cache.get(&sector).copied().unwrap_or([0; SECTOR]);
            data[SECTOR / 2..SECTOR].copy_from_slice(&old[SECTOR / 2..]);
        }
        self.store(sector, &data);
        self.complete(request, 0, 1)
    }

    fn read(&mut self, request: &Request) -> Result<()> {
        if self.strikes(Fault::DoesNotFill) {
            return self.complete(request, 0, 1);
        }
        let old = self.strikes(Fault::ReturnsOld);
        let mut data = Vec::new();
        let total: u64 = request.parts.iter().map(|(_, len, _)| u64::from(*len)).sum();
        let medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
        for lba in request.sector..request.sector + total / SECTOR as u64 {
            let found =
                if old { self.old.get(&lba).or_else(|| medium.cache.get(&lba)) } else { medium.cache.get(&lba) };
            data.extend_from_slice(found.unwrap_or(&[0; SECTOR]));
        }
        drop(medium);
        let mut rest = data.as_slice();
        for (at, len, writable) in &request.parts {
            let (part, others) = rest.split_at(*len as usize);
            if *writable {
                self.guest.write(*at, part);
            }
            rest = others;
        }
        let last = request.parts.last().map_or(0, |(at, len, _)| at + u64::from(*len));
        if self.strikes(Fault::Overruns) {
            self.guest.store(last, 0x55_u8);
        }
        self.complete(request, 0, total as u32 + 1)?;
        if self.strikes(Fault::WritesLate) {
            self.later.push_back(Later::Scribble(last - 1));
        }
        Ok(())
    }
}
