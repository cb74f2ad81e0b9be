//! Eventfds for a machine whose CPU is software: one thread waits for all of them and fires their messages. A vCPU that
//! is halted waits for them as well ([`Doorstep`]), so that nobody has to be woken to wake it.
//!
//! A masked eventfd is not watched and not read, so what is signalled meanwhile stays counted in it and is delivered when
//! a message is set again. The thread sleeps in epoll; it ends when the listener is dropped.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::MsiMessage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{EventRoute, IrqError};
use crate::actor::{Lap, Laps};
use crate::seccomp::{self, ThreadClass};

/// What a signal leads to.
pub trait Signalled: Send + Sync {
    /// A backend has signalled: it may have written guest memory, and this message is to be delivered.
    fn signalled(&self, message: MsiMessage);
}

/// Most eventfds handled between two looks at the list.
const BATCH: usize = 32;
/// The epoll cookie of the eventfd that ends the thread.
const END: u64 = u64::MAX;
/// That of the eventfd that asks for a lap.
const LAP: u64 = u64::MAX - 1;

struct Watched {
    event: EventFd,
    message: Mutex<Option<MsiMessage>>,
}

struct Shared {
    epoll: Epoll,
    end: EventFd,
    lap: EventFd,
    laps: Laps,
    watched: Mutex<Watches>,
    /// Held while another thread than the listener's delivers.
    visit: Mutex<()>,
    /// A copy of the epoll descriptor, to be polled.
    ready: OwnedFd,
    sink: Arc<dyn Signalled>,
}

#[derive(Default)]
struct Watches {
    next: u64,
    by_cookie: HashMap<u64, Arc<Watched>>,
}

/// The thread and its list.
pub struct EventListener {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl EventListener {
    /// Starts the thread.
    pub fn start(sink: Arc<dyn Signalled>) -> Result<Self, IrqError> {
        let epoll = Epoll::new().map_err(IrqError::Event)?;
        let end = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(IrqError::Event)?;
        epoll
            .ctl(ControlOperation::Add, end.as_raw_fd(), EpollEvent::new(EventSet::IN, END))
            .map_err(IrqError::Event)?;
        let lap = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(IrqError::Event)?;
        epoll
            .ctl(ControlOperation::Add, lap.as_raw_fd(), EpollEvent::new(EventSet::IN, LAP))
            .map_err(IrqError::Event)?;
        let ready = duplicate(&epoll).map_err(IrqError::Event)?;
        let shared = Arc::new(Shared {
            epoll,
            end,
            lap,
            laps: Laps::default(),
            watched: Mutex::default(),
            visit: Mutex::default(),
            ready,
            sink,
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("irq-events".into())
                .spawn(move || {
                    seccomp::enter(ThreadClass::Events);
                    shared.listen();
                })
                .map_err(IrqError::Event)?
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits until what was signalled before this call has been delivered, or stays counted because its route is masked.
    /// Whether it was by `deadline`.
    pub fn flush(&self, deadline: Instant) -> bool {
        let lap = self.shared.laps.ask();
        // Behind everything that is ready already: epoll reports in that order.
        let _ = self.shared.lap.write(1);
        self.shared.laps.wait(lap, deadline)
    }

    /// A place to wait at.
    pub fn doorstep(&self) -> Doorstep {
        Doorstep(Arc::clone(&self.shared))
    }

    /// Watches a copy of `event`; masked until a message is set.
    pub fn connect(&self, event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
        let event = event.try_clone().map_err(IrqError::Event)?;
        let watched = Arc::new(Watched { event, message: Mutex::new(None) });
        let mut list = self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let cookie = list.next;
        list.next += 1;
        let fd = watched.event.as_raw_fd();
        let masked = EpollEvent::new(EventSet::empty(), cookie);
        self.shared.epoll.ctl(ControlOperation::Add, fd, masked).map_err(IrqError::Event)?;
        list.by_cookie.insert(cookie, Arc::clone(&watched));
        Ok(Box::new(Route { shared: Arc::clone(&self.shared), watched, cookie }))
    }
}

/// Where a thread waits that is to be interrupted: for eventfds, and for whatever else wakes it.
pub struct Doorstep(Arc<Shared>);

impl Doorstep {
    /// Waits until an eventfd is signalled or `other` is readable, which is read, at most for `limit`. Whether there is
    /// something to [deliver](Self::deliver).
    pub fn wait(&self, other: &EventFd, limit: Option<Duration>) -> bool {
        let limit = limit.map(|limit| Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        let mut fds =
            [PollFd::new(&self.0.ready, PollFlags::IN), PollFd::from_borrowed_fd(borrow(other), PollFlags::IN)];
        // Interrupted or not: the caller looks again.
        let _ = poll(&mut fds, limit.as_ref());
        let [ready, woken] = fds.map(|fd| !fd.revents().is_empty());
        if woken {
            let _ = other.read();
        }
        ready
    }

    /// Delivers what was signalled.
    pub fn deliver(&self) {
        self.0.visit();
    }
}

#[allow(unsafe_code, reason = "vmm-sys-util's descriptors have no AsFd; they are borrowed for one call")]
fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn duplicate(epoll: &Epoll) -> std::io::Result<OwnedFd> {
    borrow(epoll).try_clone_to_owned()
}

impl Drop for EventListener {
    fn drop(&mut self) {
        let _ = self.shared.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn listen(&self) {
        let mut events = [EpollEvent::default(); BATCH];
        // A lap that was asked for, and how many more batches may be before it is done.
        let mut asked: Option<(Lap, usize)> = None;
        loop {
            let limit = if asked.is_some() { 0 } else { -1 };
            let ready = match self.epoll.wait(limit, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the interrupt listener cannot wait any more");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    END => return,
                    LAP => {
                        let _ = self.lap.read();
                        // The kernel may tell of the lap before what was signalled earlier: it keeps what it has told once
                        // in its list for another look. All that is ready by now is in the batches that follow.
                        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner).by_cookie.len();
                        asked = Some((self.laps.begin(), watched / BATCH + 2));
                        continue;
                    }
                    _ => {}
                }
                self.deliver_to(event.data());
            }
            asked = match asked {
                Some((lap, left)) if ready < BATCH || left == 0 => {
                    // What a visitor has taken is delivered, too.
                    drop(self.visit.lock().unwrap_or_else(PoisonError::into_inner));
                    self.laps.finish(lap);
                    None
                }
                Some((lap, left)) => Some((lap, left - 1)),
                None => None,
            };
        }
    }

    /// Delivers what is ready, on the thread of a vCPU.
    fn visit(&self) {
        let _visit = self.visit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events = [EpollEvent::default(); BATCH];
        let ready = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(ready).filter(|event| !matches!(event.data(), END | LAP)) {
            self.deliver_to(event.data());
        }
    }

    fn deliver_to(&self, cookie: u64) {
        let watched = {
            let list = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
            list.by_cookie.get(&cookie).cloned()
        };
        if let Some(watched) = watched {
            self.deliver(&watched);
        }
    }

    /// Reads the count and fires, unless the route has been masked since epoll returned.
    fn deliver(&self, watched: &Watched) {
        let message = watched.message.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(message) = *message
            && watched.event.read().is_ok()
        {
            self.sink.signalled(message);
        }
    }
}

struct Route {
    shared: Arc<Shared>,
    watched: Arc<Watched>,
    cookie: u64,
}

impl EventRoute for Route {
    fn set(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        let mut current = self.watched.message.lock().unwrap_or_else(PoisonError::into_inner);
        let events = if message.is_some() { EventSet::IN } else { EventSet::empty() };
        let event = EpollEvent::new(events, self.cookie);
        self.shared
            .epoll
            .ctl(ControlOperation::Modify, self.watched.event.as_raw_fd(), event)
            .map_err(IrqError::Event)?;
        *current = message;
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let fd = self.watched.event.as_raw_fd();
        let _ = self.shared.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner).by_cookie.remove(&self.cookie);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;

    struct Report(Mutex<Sender<MsiMessage>>);

    impl Signalled for Report {
        fn signalled(&self, message: MsiMessage) {
            let _ = self.0.lock().unwrap().send(message);
        }
    }

    fn listener() -> (EventListener, Receiver<MsiMessage>) {
        let (sender, receiver) = channel();
        (EventListener::start(Arc::new(Report(Mutex::new(sender)))).unwrap(), receiver)
    }

    const PATIENCE: Duration = Duration::from_secs(10);
    const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41 };
    const OTHER: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x42 };

    /// A driver masks a vector, the device interrupts, the driver unmasks: the interrupt must come then, once.
    #[test]
    fn what_is_signalled_while_masked_comes_on_unmask() {
        let (listener, fired) = listener();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let route = listener.connect(&event).unwrap();
        event.write(1).unwrap();
        event.write(1).unwrap();
        assert!(fired.recv_timeout(Duration::from_millis(50)).is_err());
        route.set(Some(MESSAGE)).unwrap();
        assert_eq!(fired.recv_timeout(PATIENCE), Ok(MESSAGE));
        route.set(None).unwrap();
        event.write(1).unwrap();
        route.set(Some(OTHER)).unwrap();
        assert_eq!(fired.recv_timeout(PATIENCE), Ok(OTHER));
        assert!(fired.try_recv().is_err());
    }

    /// A pause must know that nothing is on its way any more.
    #[test]
    fn flushed_is_delivered() {
        let (listener, fired) = listener();
        let events: Vec<_> = (0..100).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let routes: Vec<_> = events.iter().map(|event| listener.connect(event).unwrap()).collect();
        routes.iter().for_each(|route| route.set(Some(MESSAGE)).unwrap());
        for _ in 0..20 {
            events.iter().for_each(|event| event.write(1).unwrap());
            assert!(listener.flush(Instant::now() + PATIENCE));
            assert_eq!(fired.try_iter().count(), events.len());
        }
    }

    /// Routes come and go while the thread waits; a dropped one is silent and the listener ends.
    #[test]
    fn dropped_routes_are_silent() {
        let (listener, fired) = listener();
        let (first, second) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let gone = listener.connect(&first).unwrap();
        let kept = listener.connect(&second).unwrap();
        gone.set(Some(MESSAGE)).unwrap();
        kept.set(Some(OTHER)).unwrap();
        drop(gone);
        first.write(1).unwrap();
        second.write(1).unwrap();
        assert_eq!(fired.recv_timeout(PATIENCE), Ok(OTHER));
        drop(listener);
        assert!(fired.try_recv().is_err());
    }
}
