//! The driver for a block device of Linux, or a file: threads with direct I/O.
//!
//! Each thread takes the next operation of the load, tells of it, carries it out with one system call, and tells how it
//! ended. One lock orders what is told: an operation is told before its system call begins and after it has ended. The
//! main thread watches the deadlines. Buffers are poisoned before and after use and taken in turn, so that a device which
//! writes late is caught.
//!
//! Where a guest was restarted its next driver has a higher epoch, which is the upper half of its operations' numbers.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::history::{self, Event, Outcome, Record};
use super::sector::{SECTOR, is_poison, poison};
use super::workload::{Kind, Operation, Workload};

/// Buffers of a thread.
const BUFFERS: usize = 3;
const ALIGNMENT: usize = 4096;
/// Bytes behind the data of a buffer that nobody may touch.
const GUARD: usize = 64;

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The device or file.
    pub device: PathBuf,
    /// The load.
    pub load: Workload,
    /// Restarts of the guest before this one.
    pub epoch: u32,
    /// How long, at most.
    pub length: Duration,
    /// The load ends early when this file is there.
    pub stop: Option<PathBuf>,
    /// Requests at a time.
    pub threads: u16,
    /// How long an operation may take.
    pub deadline: Duration,
}

struct Teller {
    out: Box<dyn Write + Send>,
    sequence: u64,
    start: Instant,
    failed: Option<io::Error>,
}

impl Teller {
    fn tell(&mut self, event: Event) {
        let at_us = self.start.elapsed().as_micros() as u64;
        let line = history::line(self.sequence, &Record { at_us, event });
        self.sequence += 1;
        // One write for a line keeps others from writing into it.
        if let Err(e) = self.out.write_all(line.as_bytes()) {
            self.failed.get_or_insert(e);
        }
    }
}

struct Shared {
    file: File,
    is_device: bool,
    load: Workload,
    epoch: u32,
    teller: Mutex<Teller>,
    in_flight: Mutex<HashMap<u64, (Instant, bool)>>,
    next: AtomicU64,
    stop: AtomicBool,
    running: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the load, telling its history to `out`.
pub fn run(plan: &Plan, out: Box<dyn Write + Send>) -> io::Result<()> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&plan.device)?;
    let is_device = file.metadata()?.file_type().is_block_device();
    let start = Instant::now();
    let shared = Arc::new(Shared {
        file,
        is_device,
        load: plan.load,
        epoch: plan.epoch,
        teller: Mutex::new(Teller { out, sequence: 0, start, failed: None }),
        in_flight: Mutex::default(),
        next: AtomicU64::new(u64::from(plan.epoch) << 32),
        stop: AtomicBool::new(false),
        running: AtomicU64::new(plan.threads.into()),
    });
    shared.tell(Event::Begin(plan.load, plan.epoch));
    let mut last = Thread::new(&shared);
    if plan.epoch > 0 {
        last.sweep();
    }
    for _ in 0..plan.threads {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || {
            Thread::new(&shared).play();
            shared.running.fetch_sub(1, Ordering::AcqRel);
        });
    }
    let end = start + plan.length;
    let mut given_up = end + plan.deadline;
    while shared.running.load(Ordering::Acquire) > 0 && Instant::now() < given_up {
        std::thread::sleep(Duration::from_millis(20));
        let asked = plan.stop.as_ref().is_some_and(|path| path.exists());
        if shared.watch(plan.deadline) || asked || Instant::now() >= end {
            shared.stop.store(true, Ordering::Release);
            given_up = given_up.min(Instant::now() + plan.deadline);
        }
    }
    if shared.running.load(Ordering::Acquire) == 0 {
        last.finish();
    }
    let in_flight = if is_device { requests_in_flight(&plan.device)? } else { 0 };
    let open = lock(&shared.in_flight).len() as u32;
    shared.tell(Event::End { in_flight: in_flight + open, avail: 0, used: 0 });
    let mut teller = lock(&shared.teller);
    teller.out.flush()?;
    teller.failed.take().map_or(Ok(()), Err)
}

/// Requests that the kernel has handed to the device and not got back.
fn requests_in_flight(device: &Path) -> io::Result<u32> {
    let name = device.file_name().unwrap_or_default();
    let text = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("inflight"))?;
    Ok(text.split_whitespace().filter_map(|count| count.parse::<u32>().ok()).sum())
}

impl Shared {
    fn tell(&self, event: Event) {
        lock(&self.teller).tell(event);
    }

    /// Tells of operations that have just missed their deadline; true when there are any.
    fn watch(&self, deadline: Duration) -> bool {
        let mut late = Vec::new();
        for (op, (since, told)) in &mut *lock(&self.in_flight) {
            if !*told && since.elapsed() > deadline {
                *told = true;
                late.push(*op);
            }
        }
        late.iter().for_each(|op| self.tell(Event::Overdue(*op)));
        !late.is_empty()
    }
}

/// Memory that direct I/O takes, and the operation that it was poisoned for.
struct Buffer {
    memory: Vec<u8>,
    from: usize,
    owner: u64,
}

impl Buffer {
    fn new(bytes: usize) -> Self {
        let mut memory = vec![0; bytes + GUARD + ALIGNMENT];
        poison(&mut memory, 0);
        let from = memory.as_ptr().align_offset(ALIGNMENT);
        // Poison is laid in words, so its pattern is the same from any aligned start.
        Self { memory, from, owner: 0 }
    }

    fn all(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.from..).unwrap_or_default()
    }
}

struct Thread<'a> {
    shared: &'a Shared,
    buffers: [Buffer; BUFFERS],
    turn: usize,
}

impl<'a> Thread<'a> {
    fn new(shared: &'a Shared) -> Self {
        let bytes = shared.load.sectors_max as usize * SECTOR;
        Self { shared, buffers: std::array::from_fn(|_| Buffer::new(bytes)), turn: 0 }
    }

    fn play(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
            self.carry_out(self.shared.load.operation(id));
        }
        self.check_all();
    }

    fn sweep(&mut self) {
        let first = self.shared.next.fetch_add(self.shared.load.sectors, Ordering::Relaxed);
        for operation in self.shared.load.sweep(first) {
            self.carry_out(operation);
        }
    }

    fn finish(&mut self) {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.carry_out(Operation { id, kind: Kind::Flush, lba: 0, sectors: 0, writer: 0 });
        self.shared.tell(Event::Settled);
        self.sweep();
        self.check_all();
    }

    fn check_all(&mut self) {
        for buffer in &mut self.buffers {
            let owner = buffer.owner;
            if !is_poison(buffer.all(), owner) {
                self.shared.tell(Event::Late(owner));
            }
        }
    }

    fn carry_out(&mut self, operation: Operation) {
        let shared = self.shared;
        self.turn = (self.turn + 1) % BUFFERS;
        let Some(buffer) = self.buffers.get_mut(self.turn) else { return };
        let before = std::mem::replace(&mut buffer.owner, operation.id);
        if !is_poison(buffer.all(), before) {
            shared.tell(Event::Late(before));
        }
        poison(buffer.all(), operation.id);
        let len = operation.sectors as usize * SECTOR;
        let Some((data, guard)) = buffer.all().split_at_mut_checked(len) else { return };
        if operation.kind == Kind::Write {
            shared.load.fill(&operation, shared.epoch, data);
        }
        // Into the list first: an operation that is told of and not in the list would never be missed.
        lock(&shared.in_flight).insert(operation.id, (Instant::now(), false));
        shared.tell(Event::Invoke(operation));
        let ended = shared.system_call(&operation, data);
        let guarded = is_poison(guard, operation.id);
        let (outcome, seen) = match ended {
            Ok(()) if operation.kind == Kind::Read => {
                (Outcome::Done, history::look(data, shared.load.run(), operation.lba))
            }
            Ok(()) => (Outcome::Done, Vec::new()),
            Err(e) => (Outcome::Failed(e.raw_os_error().unwrap_or(libc::EIO).unsigned_abs()), Vec::new()),
        };
        poison(data, operation.id);
        shared.tell(Event::Complete(operation.id, outcome, seen));
        if !guarded {
            shared.tell(Event::Late(operation.id));
        }
        lock(&shared.in_flight).remove(&operation.id);
    }
}

impl Shared {
    fn system_call(&self, operation: &Operation, data: &mut [u8]) -> io::Result<()> {
        let at = operation.lba * SECTOR as u64;
        match operation.kind {
            Kind::Read => self.file.read_exact_at(data, at),
            Kind::Write => self.file.write_all_at(data, at),
            Kind::Flush => self.file.sync_data(),
            Kind::Discard => self.clear(libc::c_ulong::from(0x1277_u32), at, data.len() as u64),
            Kind::Zeroes => self.clear(libc::c_ulong::from(0x127f_u32), at, data.len() as u64),
        }
    }

    /// BLKDISCARD or BLKZEROOUT.
    fn clear(&self, request: libc::c_ulong, at: u64, len: u64) -> io::Result<()> {
        if !self.is_device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let range = [at, len];
        #[allow(unsafe_code, reason = "an ioctl without a safe wrapper")]
        // SAFETY: both requests read two 64-bit numbers, which live until the call returns.
        let result = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&self.file), request, range.as_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
