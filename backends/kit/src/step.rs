//! Named moments at which a test build dies, and ways in which it does wrong, on purpose (feature `steps`).
//!
//! A campaign of kills wants to aim: between the used element and the used index, in the middle of a replay. The places are
//! calls of [`step`]; each place where a fault can be planted asks [`strikes`]. Without the feature both are nothing, and
//! the compiler removes what hangs on them: a product has neither.
//!
//! With it, a page beside the program's binary says at which step to die, at which occurrence of it, and which fault to
//! commit how often; the process counts there what it passed. The file is called [`PAGE_NAME`]; without it nothing is
//! armed. Beside it [`DURABLE_NAME`] holds what a loss of power would leave of an image: the contents that the file had
//! when its last finished flush began.

/// The page's file, in the folder of the program's binary.
pub const PAGE_NAME: &str = "steps";
/// The durable image's file, there too.
pub const DURABLE_NAME: &str = "durable";
/// Bytes of the page.
pub const PAGE_BYTES: usize = 4096;

/// A moment in the life of a request or of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// A head was read from the avail ring.
    Fetch,
    /// It is marked as in flight.
    Mark,
    /// Its operation was handed to the kernel, or is about to be carried out.
    Submit,
    /// Its operation has ended.
    Done,
    /// Its status was written.
    Status,
    /// Its element stands in the used ring.
    UsedElement,
    /// The used index has moved.
    UsedIndex,
    /// Its completion is counted in the record, where that is a step of its own.
    Counted,
    /// It is no longer marked as in flight.
    Unmarked,
    /// The guest was interrupted.
    Call,
    /// A message of the conversation has been read, and is not yet answered.
    Handshake,
    /// An unfinished request of a predecessor is taken again.
    Replay,
    /// A flush is about to be carried out, or has been.
    Flush,
    /// A ring is stopped.
    Reset,
    /// The configuration space is written.
    ConfigWrite,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Fetch,
        Self::Mark,
        Self::Submit,
        Self::Done,
        Self::Status,
        Self::UsedElement,
        Self::UsedIndex,
        Self::Counted,
        Self::Unmarked,
        Self::Call,
        Self::Handshake,
        Self::Replay,
        Self::Flush,
        Self::Reset,
        Self::ConfigWrite,
    ];

    /// As tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Mark => "mark",
            Self::Submit => "submit",
            Self::Done => "done",
            Self::Status => "status",
            Self::UsedElement => "used-element",
            Self::UsedIndex => "used-index",
            Self::Counted => "counted",
            Self::Unmarked => "unmarked",
            Self::Call => "call",
            Self::Handshake => "handshake",
            Self::Replay => "replay",
            Self::Flush => "flush",
            Self::Reset => "reset",
            Self::ConfigWrite => "config-write",
        }
    }
}

/// A planted fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Sabotage {
    /// A flush is acknowledged and not carried out.
    LoseFlush,
    /// A request is put into the used ring twice.
    CompleteTwice,
    /// A successor skips a request that nobody has taken.
    ReplayElsewhere,
    /// A successor takes unfinished requests in the wrong order.
    ReplayOutOfOrder,
    /// A write is acknowledged and carried out later.
    AcknowledgeFirst,
    /// A successor does not wait for the I/O of its predecessor.
    SkipFence,
    /// Two neighbouring sectors of a write change places.
    SwapSectors,
    /// A buffer is written again after the guest has got it back.
    WriteLate,
    /// A successor does not interrupt the guest for what it completes.
    ForgetCall,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::LoseFlush,
        Self::CompleteTwice,
        Self::ReplayElsewhere,
        Self::ReplayOutOfOrder,
        Self::AcknowledgeFirst,
        Self::SkipFence,
        Self::SwapSectors,
        Self::WriteLate,
        Self::ForgetCall,
    ];

    /// As the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoseFlush => "lose-flush",
            Self::CompleteTwice => "complete-twice",
            Self::ReplayElsewhere => "replay-elsewhere",
            Self::ReplayOutOfOrder => "replay-out-of-order",
            Self::AcknowledgeFirst => "acknowledge-first",
            Self::SkipFence => "skip-fence",
            Self::SwapSectors => "swap-sectors",
            Self::WriteLate => "write-late",
            Self::ForgetCall => "forget-call",
        }
    }
}

/// Words of the page, each of eight bytes.
pub mod word {
    /// The step to die at, from 1; 0 for none.
    pub const ARMED: usize = 0;
    /// At which occurrence of it, counted down.
    pub const COUNTDOWN: usize = 1;
    /// The step that a process died at, from 1.
    pub const DIED_AT: usize = 2;
    /// The fault to commit, from 1; 0 for none.
    pub const SABOTAGE: usize = 3;
    /// At every which opportunity.
    pub const PERIOD: usize = 4;
    /// Opportunities so far.
    pub const OPPORTUNITIES: usize = 5;
    /// Faults committed.
    pub const STRIKES: usize = 6;
    /// Nanoseconds that the last incarnation waited for the fence.
    pub const FENCE_NS: usize = 7;
    /// Incarnations that have passed their fence.
    pub const FENCES: usize = 8;
    /// Bytes of the durable image.
    pub const DURABLE_BYTES: usize = 9;
    /// Flushes that have ended.
    pub const FLUSHES: usize = 10;
    /// The kernel's number of the error that operations on the image end with.
    pub const ERROR: usize = 11;
    /// So many of them, counted down.
    pub const ERRORS_LEFT: usize = 12;
    /// What is wrong with the build, from 1 ([`Bad`](crate::bad_build::Bad)); 0: nothing.
    pub const BUILD: usize = 13;
    /// How often each step was passed, from here on.
    pub const PASSED: usize = 16;
}

#[cfg(feature = "steps")]
pub use armed::{
    begin, build, die, fails, fence_took, postpone, step, strikes, swap_sectors, sync_begins, sync_ended, write_late,
    wrote_through,
};
#[cfg(not(feature = "steps"))]
pub use nothing::{
    begin, build, die, fails, fence_took, postpone, step, strikes, swap_sectors, sync_begins, sync_ended, write_late,
    wrote_through,
};

#[cfg(not(feature = "steps"))]
mod nothing {
    use std::os::fd::RawFd;
    use std::time::Duration;

    use vm_memory::GuestMemory;

    use super::{Sabotage, Step};
    use crate::chain::Chain;

    /// Looks for the page. Nothing in a product.
    #[inline(always)]
    pub fn begin() {}
    /// What is wrong with the build: in a product nothing that we know.
    #[inline(always)]
    pub const fn build() -> u64 {
        0
    }
    /// Never in a product.
    #[inline(always)]
    pub fn die() {}
    /// This moment is reached. Nothing in a product.
    #[inline(always)]
    pub fn step(_step: Step) {}
    /// Whether to do wrong here and now: never in a product.
    #[inline(always)]
    pub const fn strikes(_sabotage: Sabotage) -> bool {
        false
    }
    /// How the operation that ends now has failed, if it is told to: never in a product.
    #[inline(always)]
    pub const fn fails() -> Option<i32> {
        None
    }
    /// The fence fell after this long. Nothing in a product.
    #[inline(always)]
    pub fn fence_took(_waited: Duration) {}
    /// A flush of the image begins. Nothing in a product.
    #[inline(always)]
    pub fn sync_begins(_image: RawFd) {}
    /// The flush that began last has ended. Nothing in a product.
    #[inline(always)]
    pub fn sync_ended() {}
    /// A write that is durable by itself has ended. Nothing in a product.
    #[inline(always)]
    pub fn wrote_through(_image: RawFd, _offset: u64, _len: u64) {}
    /// Writes a chain's buffer again, later. Nothing in a product.
    #[inline(always)]
    pub fn write_late<M: GuestMemory>(_mem: &M, _chain: &Chain) {}
    /// Writes to the image, later. Nothing in a product.
    #[inline(always)]
    pub fn postpone(_image: RawFd, _offset: u64, _data: Vec<u8>) {}
    /// Exchanges two sectors of the image. Nothing in a product.
    #[inline(always)]
    pub fn swap_sectors(_image: RawFd, _offset: u64) {}
}

#[cfg(feature = "steps")]
mod armed {
    #![allow(unsafe_code, reason = "reads of the image and the end of the process go past the standard library")]

    use std::collections::VecDeque;
    use std::fs::File;
    use std::os::fd::RawFd;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::time::Duration;

    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, MmapRegion, VolatileMemory};

    use super::{DURABLE_NAME, PAGE_BYTES, PAGE_NAME, Sabotage, Step, word};
    use crate::chain::Chain;

    /// Faulty writes that are put off, and by how many others.
    const LATE: usize = 8;

    struct Page {
        words: MmapRegion<()>,
        durable: Option<MmapRegion<()>>,
        /// What the image held when the flush began that is under way.
        taken: Mutex<Vec<u8>>,
        /// Writes that were acknowledged and not carried out.
        postponed: Mutex<VecDeque<(u64, Vec<u8>)>>,
        /// Buffers that were given back and are still to be written.
        returned: Mutex<VecDeque<GuestAddress>>,
    }

    static PAGE: OnceLock<Option<Page>> = OnceLock::new();

    impl Page {
        fn open() -> Option<Self> {
            let folder = std::env::current_exe().ok()?.parent()?.to_owned();
            let map = |name: &str, bytes: Option<usize>| {
                let file = File::options().read(true).write(true).open(folder.join(name)).ok()?;
                let bytes = bytes.or_else(|| usize::try_from(file.metadata().ok()?.len()).ok())?;
                MmapRegion::from_file(FileOffset::new(file, 0), bytes).ok()
            };
            Some(Self {
                words: map(PAGE_NAME, Some(PAGE_BYTES))?,
                durable: map(DURABLE_NAME, None),
                taken: Mutex::default(),
                postponed: Mutex::default(),
                returned: Mutex::default(),
            })
        }

        fn word(&self, index: usize) -> &AtomicU64 {
            self.words.get_atomic_ref(8 * index).expect("a word of the page")
        }
    }

    fn page() -> Option<&'static Page> {
        PAGE.get().and_then(Option::as_ref)
    }

    /// Looks for the page, before the jail closes.
    pub fn begin() {
        PAGE.get_or_init(Page::open);
    }

    /// What is wrong with the build.
    pub fn build() -> u64 {
        page().map_or(0, |page| page.word(word::BUILD).load(Ordering::Acquire))
    }

    /// Ends the process here.
    pub fn die() {
        // SAFETY: system calls without pointers. The jail allows these.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGKILL);
        }
    }

    /// This moment is reached: the process dies here when it is told to.
    pub fn step(step: Step) {
        let Some(page) = page() else { return };
        page.word(word::PASSED + step as usize).fetch_add(1, Ordering::Relaxed);
        if step == Step::Fetch && crate::bad_build::is(crate::bad_build::Bad::DiesAtFirstRequest) {
            die();
        }
        if page.word(word::ARMED).load(Ordering::Acquire) != step as u64 + 1 {
            return;
        }
        if page.word(word::COUNTDOWN).fetch_sub(1, Ordering::AcqRel) == 1 {
            page.word(word::ARMED).store(0, Ordering::Release);
            page.word(word::DIED_AT).store(step as u64 + 1, Ordering::Release);
            die();
        }
    }

    /// Whether to do wrong here and now.
    pub fn strikes(sabotage: Sabotage) -> bool {
        let Some(page) = page() else { return false };
        if page.word(word::SABOTAGE).load(Ordering::Acquire) != sabotage as u64 + 1 {
            return false;
        }
        let period = page.word(word::PERIOD).load(Ordering::Relaxed).max(1);
        let hit = (page.word(word::OPPORTUNITIES).fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(period);
        page.word(word::STRIKES).fetch_add(u64::from(hit), Ordering::Relaxed);
        hit
    }

    /// How the operation on the image that ends now has failed (an errno), if it is told to.
    pub fn fails() -> Option<i32> {
        let page = page()?;
        let left = page.word(word::ERRORS_LEFT);
        left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).ok()?;
        i32::try_from(page.word(word::ERROR).load(Ordering::Acquire)).ok()
    }

    /// The fence fell after this long.
    pub fn fence_took(waited: Duration) {
        let Some(page) = page() else { return };
        page.word(word::FENCE_NS).store(waited.as_nanos() as u64, Ordering::Relaxed);
        page.word(word::FENCES).fetch_add(1, Ordering::Release);
    }

    fn read(image: RawFd, offset: u64, out: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            // SAFETY: the buffer is writable for the length given; the descriptor is only read.
            let count = unsafe {
                libc::pread(image, rest.as_mut_ptr().cast(), rest.len(), offset as libc::off_t + done as libc::off_t)
            };
            match usize::try_from(count) {
                Ok(count) if count > 0 => done += count,
                _ => break,
            }
        }
        done
    }

    /// A flush of the image begins: what has been written by now is what it is about.
    pub fn sync_begins(image: RawFd) {
        let Some((page, durable)) = page().and_then(|page| Some((page, page.durable.as_ref()?))) else { return };
        let mut taken = page.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // Direct I/O wants an aligned buffer; images here are small and pages whole.
        let mut bytes = vec![0; durable.size() + 4096];
        let from = bytes.as_ptr().align_offset(4096);
        let len = bytes.get_mut(from..from + durable.size()).map_or(0, |room| read(image, 0, room));
        *taken = bytes.get(from..from + len).unwrap_or_default().to_vec();
    }

    /// The flush that began last has ended: what it was about is durable.
    pub fn sync_ended() {
        let Some((page, durable)) = page().and_then(|page| Some((page, page.durable.as_ref()?))) else { return };
        let taken = page.taken.lock().unwrap_or_else(PoisonError::into_inner);
        durable.as_volatile_slice().copy_from(&taken[..]);
        page.word(word::DURABLE_BYTES).store(taken.len() as u64, Ordering::Release);
        page.word(word::FLUSHES).fetch_add(1, Ordering::Release);
    }

    /// A write that is durable by itself has ended.
    pub fn wrote_through(image: RawFd, offset: u64, len: u64) {
        let Some((page, durable)) = page().and_then(|page| Some((page, page.durable.as_ref()?))) else { return };
        let _order = page.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = (offset / 4096 * 4096, (offset + len).next_multiple_of(4096));
        let mut bytes = vec![0; (end - start) as usize + 4096];
        let from = bytes.as_ptr().align_offset(4096);
        let Some(room) = bytes.get_mut(from..from + (end - start) as usize) else { return };
        if read(image, start, room) < (offset + len - start) as usize {
            return;
        }
        let part = room.get((offset - start) as usize..(offset + len - start) as usize).unwrap_or_default();
        if let Ok(to) = durable.get_slice(offset as usize, part.len()) {
            to.copy_from(part);
            page.word(word::DURABLE_BYTES).fetch_max(offset + len, Ordering::Release);
        }
    }

    /// Writes a chain's buffer again, when some more requests have ended.
    pub fn write_late<M: GuestMemory>(mem: &M, chain: &Chain) {
        let Some(page) = page() else { return };
        let mut returned = page.returned.lock().unwrap_or_else(PoisonError::into_inner);
        returned.extend(chain.writable().0.iter().find(|part| part.len >= 16).map(|part| part.addr));
        if returned.len() > LATE
            && let Some(addr) = returned.pop_front()
        {
            let _ = mem.write_slice(&[0x5a; 8], addr);
        }
    }

    /// Writes to the image, when some more writes have been put off.
    pub fn postpone(image: RawFd, offset: u64, data: Vec<u8>) {
        let Some(page) = page() else { return };
        let mut postponed = page.postponed.lock().unwrap_or_else(PoisonError::into_inner);
        postponed.push_back((offset, data));
        if postponed.len() > LATE
            && let Some((offset, data)) = postponed.pop_front()
        {
            write(image, offset, &data);
        }
    }

    fn write(image: RawFd, offset: u64, data: &[u8]) {
        // SAFETY: the buffer is readable for the length given; the descriptor is only used.
        unsafe { libc::pwrite(image, data.as_ptr().cast(), data.len(), offset.cast_signed()) };
    }

    /// Exchanges two neighbouring sectors of the image.
    pub fn swap_sectors(image: RawFd, offset: u64) {
        let mut both = [0; 1024];
        if read(image, offset, &mut both) == both.len() {
            both.rotate_left(512);
            write(image, offset, &both);
        }
    }
}
