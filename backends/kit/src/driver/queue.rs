//! The driver's half of a split virtqueue (virtio 1.2, section 2.7).

use std::convert::Infallible;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_devices::virtio::notification::{self, Wish, Words};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::guest::Guest;

/// VIRTIO_RING_F_EVENT_IDX as a bit.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Another descriptor follows.
pub const NEXT: u16 = 1;
/// The device writes it.
pub const WRITE: u16 = 2;
/// It points to a table.
pub const INDIRECT: u16 = 4;

/// Bytes of guest memory that a queue takes: rings, then 32 bytes per entry for requests' small parts.
pub const QUEUE_BYTES: u64 = 128 << 10;

/// How long the interrupt for a completion may take that is seen already: a device on a busy host may be put aside just
/// between the two, or be killed there, and then its successor interrupts.
const CALL_MAX: Duration = Duration::from_secs(10);

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// An interrupt.
    Called,
    /// There was something already.
    Already,
    /// Nothing came in time.
    Late,
    /// Something was completed, and no interrupt came for it.
    Uncalled,
}

/// Waits for an interrupt of a device that interrupts for each completion; returns at once when `is_completed` says that
/// there is one already.
///
/// # Errors
/// When the wait fails.
pub fn wait_for_interrupt(call: &EventFd, timeout: Duration, is_completed: impl Fn() -> bool) -> Result<Woken> {
    if is_completed() {
        return Ok(Woken::Already);
    }
    wait_for_call(call, timeout, is_completed)
}

fn wait_for_call(call: &EventFd, timeout: Duration, is_completed: impl Fn() -> bool) -> Result<Woken> {
    #[allow(unsafe_code, reason = "EventFd lends no borrowed descriptor")]
    // SAFETY: the eventfd lives as long as its borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    let within = |time: Duration| {
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Timespec::try_from(time).ok().as_ref())
    };
    let mut called = within(timeout)? > 0;
    // What is completed at this very moment has its call on the way.
    let uncalled = !called && is_completed();
    if uncalled {
        called = within(CALL_MAX)? > 0;
    }
    let _ = call.read();
    Ok(match (called, uncalled) {
        (true, _) => Woken::Called,
        (false, true) => Woken::Uncalled,
        (false, false) => Woken::Late,
    })
}

/// A queue. It lies at the start of guest memory, one after the other.
#[derive(Debug)]
pub struct Queue {
    size: u16,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the avail ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Guest address of 32 bytes per entry for headers and status bytes.
    pub small: u64,
    /// Wakes the device.
    pub kick: EventFd,
    /// Wakes us.
    pub call: EventFd,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    published: u16,
    next_used: u16,
}

impl Queue {
    /// Queue `index` with `size` entries.
    pub fn new(guest: &Guest, index: u16, size: u16) -> Result<Self> {
        ensure!(size.is_power_of_two() && size <= 1024, "queue size {size}");
        let base = u64::from(index) * QUEUE_BYTES;
        let queue = Self {
            size,
            desc: base,
            avail: base + 0x8000,
            used: base + 0xa000,
            small: base + 0x10000,
            kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            call: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            event_idx: false,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_avail: 0,
            published: 0,
            next_used: 0,
        };
        guest.store(queue.avail, 0_u16);
        Ok(queue)
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The used index in memory: where a successor goes on when nothing is in flight.
    pub fn used_index(&self, guest: &Guest) -> u16 {
        u16::from_le(guest.load(self.used + 2))
    }

    /// Writes one descriptor.
    pub fn describe(&self, guest: &Guest, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.desc + 16 * u64::from(index);
        guest.store(at, addr.to_le());
        guest.store(at + 8, len.to_le());
        guest.store(at + 12, flags.to_le());
        guest.store(at + 14, next.to_le());
    }

    /// The head that the next chain will have.
    pub fn next_head(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Makes a chain of readable and writable ranges available; none when there are too few free descriptors. The
    /// device sees it after [`Queue::publish`].
    pub fn add(&mut self, guest: &Guest, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let chain: Vec<u16> = self.free.drain(self.free.len() - count..).rev().collect();
        let parts = readable.iter().map(|r| (r, 0)).chain(writable.iter().map(|w| (w, WRITE)));
        for (position, ((addr, len), flags)) in parts.enumerate() {
            let index = *chain.get(position)?;
            match chain.get(position + 1) {
                Some(next) => self.describe(guest, index, *addr, *len, flags | NEXT, *next),
                None => self.describe(guest, index, *addr, *len, flags, 0),
            }
        }
        let head = *chain.first()?;
        *self.chains.get_mut(usize::from(head))? = chain;
        self.add_head(guest, head);
        Some(head)
    }

    /// Makes a head available whose descriptors the caller has written.
    pub fn add_head(&mut self, guest: &Guest, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        guest.store(slot, head.to_le());
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Publishes what was added and kicks if the device wants it.
    pub fn publish(&mut self, guest: &Guest) -> Result<()> {
        guest.store(self.avail + 2, self.next_avail.to_le());
        let old = std::mem::replace(&mut self.published, self.next_avail);
        let Ok(wanted) = notification::is_to_be_woken(&self.words(guest), old, self.next_avail);
        if wanted {
            self.kick.write(1)?;
        }
        Ok(())
    }

    fn words<'a>(&self, guest: &'a Guest) -> DriverWords<'a> {
        let size = u64::from(self.size);
        let (event, wish) = (self.avail + 4 + 2 * size, self.used + 4 + 8 * size);
        DriverWords { guest, event_idx: self.event_idx, event, wish, used: self.used }
    }

    /// Takes one finished request: its head and the bytes written.
    pub fn take(&mut self, guest: &Guest) -> Option<(u16, u32)> {
        if u16::from_le(guest.load(self.used + 2)) == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let head = u32::from_le(guest.load(at)) as u16;
        let len = u32::from_le(guest.load(at + 4));
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(chain) = self.chains.get_mut(usize::from(head)) {
            self.free.append(chain);
        }
        Some((head, len))
    }

    /// Says how far the used ring was looked at: a call is wanted for what is completed behind it.
    pub fn ask_for_call(&self, guest: &Guest) {
        let Ok(_) = notification::ask_to_be_woken(&mut self.words(guest), self.next_used);
    }

    /// Asks for a call at the next completion and waits for it; returns at once when there is one already.
    pub fn wait(&mut self, guest: &Guest, timeout: Duration) -> Result<()> {
        self.wait_for_call(guest, timeout).map(drop)
    }

    /// Like [`Queue::wait`], and says what came: a guest that is not interrupted would sleep for ever.
    pub fn wait_for_call(&mut self, guest: &Guest, timeout: Duration) -> Result<Woken> {
        let Ok(already) = notification::ask_to_be_woken(&mut self.words(guest), self.next_used);
        if already {
            return Ok(Woken::Already);
        }
        wait_for_call(&self.call, timeout, || u16::from_le(guest.load(self.used + 2)) != self.next_used)
    }

    /// Takes one finished request, waiting for it.
    pub fn take_within(&mut self, guest: &Guest, timeout: Duration) -> Result<(u16, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(done) = self.take(guest) {
                return Ok(done);
            }
            let left = deadline.checked_duration_since(Instant::now()).context("no completion in time")?;
            self.wait(guest, left)?;
        }
    }

    /// Heads of the requests that were added and not taken back.
    pub fn heads_in_flight(&self) -> Vec<u16> {
        (0..).zip(&self.chains).filter(|(_, chain)| !chain.is_empty()).map(|(head, _)| head).collect()
    }

    /// Requests that were published and not taken back.
    pub fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.next_used)
    }
}

/// The driver's view of the words by which it and the device wake each other.
struct DriverWords<'a> {
    guest: &'a Guest,
    event_idx: bool,
    /// Guest addresses of what the driver asks for, of what the device asks for, and of the used ring.
    event: u64,
    wish: u64,
    used: u64,
}

impl Words for DriverWords<'_> {
    type Error = Infallible;
    fn ask(&mut self, next: u16) -> std::result::Result<(), Infallible> {
        self.guest.store(self.event, next.to_le());
        Ok(())
    }
    fn wish(&self) -> std::result::Result<Wish, Infallible> {
        Ok(if self.event_idx {
            Wish::Past(u16::from_le(self.guest.load(self.wish)))
        } else {
            Wish::Always(u16::from_le(self.guest.load::<u16>(self.used)) & 1 == 0)
        })
    }
    fn shown(&self) -> std::result::Result<u16, Infallible> {
        Ok(u16::from_le(self.guest.load(self.used + 2)))
    }
}
