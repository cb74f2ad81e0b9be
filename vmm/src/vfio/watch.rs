//! A function's thread: hears what the host says of it, and sets its line where nobody else does.
//!
//! The host says two things: the function has failed (an uncorrectable error of the bus), and the host wants it back (its
//! driver is to be unbound, or it is being pulled out). In the second case the guest is asked to let it go, and when it does
//! not the function is taken away: it reads as ones then, and the host waits no longer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bars::DirectBars;
use super::device::Device;
use super::pin::Pin;
use crate::lifecycle::Story;
use crate::machine::{EventSender, MachineEvent};
use crate::seccomp::{self, ThreadClass};

/// How long a guest may take to let a function go that the host wants back.
const LET_GO_MAX: Duration = Duration::from_secs(20);
/// How often a line that is high is sampled while the guest does not touch the function.
const SAMPLE: Duration = Duration::from_millis(4);
/// The thread looks around at least this often.
const IDLE: Duration = Duration::from_secs(60);

/// What the thread needs.
pub(super) struct Watched {
    pub(super) name: String,
    pub(super) device: Arc<Device>,
    pub(super) bars: Arc<DirectBars>,
    pub(super) pin: Option<Arc<Pin>>,
    pub(super) story: Story,
    pub(super) events: EventSender,
}

/// The thread; it ends when this is dropped.
pub(super) struct Watch {
    end: EventFd,
    thread: Option<JoinHandle<()>>,
}

#[allow(unsafe_code, reason = "vmm-sys-util's EventFd has no AsFd; its descriptor is borrowed for one poll")]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Watch {
    /// Starts it.
    ///
    /// # Errors
    /// When there is no thread or descriptor for it.
    pub(super) fn start(watched: Watched) -> io::Result<Self> {
        let end = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let ends = end.try_clone()?;
        let name: String = format!("vfio-{}", watched.name).chars().take(15).collect();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            seccomp::enter(ThreadClass::Events);
            watched.run(&ends);
        })?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            // It only fails if the thread panicked, which its hook has reported.
            let _ = thread.join();
        }
    }
}

impl Watched {
    fn tell(&self, event: &str, more: &str) {
        let properties = [("id", self.name.clone()), ("function", self.device.bdf().to_string()), ("why", more.into())];
        self.story.tell("device", event, properties);
    }

    fn run(self, end: &EventFd) {
        let mut wanted_until: Option<Instant> = None;
        loop {
            let by_hand = self.pin.as_ref().filter(|pin| pin.by_hand());
            let high = by_hand.is_some_and(|pin| pin.is_high());
            let left = wanted_until.map_or(IDLE, |until| until.saturating_duration_since(Instant::now()));
            let limit = if high { SAMPLE.min(left) } else { left };
            let fds =
                [Some(end), Some(&self.device.failed), Some(&self.device.wanted), by_hand.map(|pin| pin.raised())];
            let mut fds: Vec<PollFd<'_>> =
                fds.iter().flatten().map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)).collect();
            let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
            // Interrupted or not: whatever is readable is looked at.
            let _ = poll(&mut fds, Some(&limit));
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            if ready(0) {
                return;
            }
            if let Some(pin) = by_hand {
                if ready(3) {
                    pin.told();
                } else if high {
                    pin.served();
                }
            }
            if ready(1) && self.device.failed.read().is_ok() {
                let why = "the host reports an error of the bus that cannot be corrected; the guest's driver may be stuck \
                           until the device is removed and added again";
                self.device.complain(why.into());
                self.tell("failed", why);
            }
            if ready(2) && self.device.wanted.read().is_ok() && wanted_until.is_none() {
                let why = "the host wants it back";
                self.device.complain(why.into());
                self.tell("wanted-back", why);
                self.events.tell(MachineEvent::GivenUp(self.name.clone()));
                wanted_until = Some(Instant::now() + LET_GO_MAX);
            }
            if wanted_until.is_some_and(|until| until <= Instant::now()) {
                self.bars.close();
                self.device.close();
                let why = "the host wanted it back, and the guest did not let it go: it is gone, and reads as ones";
                self.device.complain(why.into());
                self.tell("taken-away", why);
                // Nothing more is to be heard of it, but its end.
                wanted_until = None;
            }
        }
    }
}
