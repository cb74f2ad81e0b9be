//! Eventfds for a machine whose CPU is software: one thread waits for all of them and fires their messages, while no vCPU
//! does so by itself. One that runs the guest looks at them now and then, and one that is halted waits for them
//! ([`Doorstep`]): nobody has to be woken to wake it, and nobody takes the processor from it to tell it something.
//!
//! A masked eventfd is not watched and not read, so what is signalled meanwhile stays counted in it and is delivered when
//! a message is set again. The eventfds are in one epoll set; that set, as one descriptor, is in the set that the thread
//! sleeps at, and masked there while a vCPU serves it. The thread ends when the listener is dropped.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::MsiMessage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{EventRoute, IrqError};
use crate::actor::Laps;
use crate::seccomp::{self, ThreadClass};

/// What a signal leads to.
pub trait Signalled: Send + Sync {
    /// A backend has signalled: it may have written guest memory, and this message is to be delivered.
    fn signalled(&self, message: MsiMessage);
}

/// Most eventfds handled between two looks at the list.
const BATCH: usize = 32;
/// Cookies of what the thread sleeps at: the eventfd that ends it, the one that asks for a lap, the set of eventfds.
const END: u64 = 0;
const LAP: u64 = 1;
const EVENTS: u64 = 2;

struct Watched {
    event: EventFd,
    message: Mutex<Option<MsiMessage>>,
}

struct Shared {
    /// The eventfds that interrupt.
    events: Epoll,
    /// What the thread sleeps at.
    sleep: Epoll,
    end: EventFd,
    lap: EventFd,
    laps: Laps,
    watched: Mutex<Watches>,
    /// Held by whoever delivers: what another thread has taken is delivered when it is free.
    visit: Mutex<()>,
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
        let shared = Shared::new(sink).map_err(IrqError::Event)?;
        let shared = Arc::new(shared);
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
        let _ = self.shared.lap.write(1);
        self.shared.laps.wait(lap, deadline)
    }

    /// For who may be one to stand at the [`Doorstep`].
    pub fn door(&self) -> Door {
        Door(Arc::clone(&self.shared))
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
        self.shared.events.ctl(ControlOperation::Add, fd, masked).map_err(IrqError::Event)?;
        list.by_cookie.insert(cookie, Arc::clone(&watched));
        Ok(Box::new(Route { shared: Arc::clone(&self.shared), watched, cookie }))
    }
}

/// The way to the [`Doorstep`].
#[derive(Clone)]
pub struct Door(Arc<Shared>);

impl Door {
    /// From now on the calling thread looks at the eventfds; one thread at a time.
    pub fn step(&self) -> Doorstep<'_> {
        self.0.watch_events(false);
        Doorstep(&self.0)
    }
}

/// Where a thread stands that is to be interrupted: it looks at the eventfds itself, and waits for them and for whatever
/// else wakes it. The listener's thread sleeps meanwhile; it goes on when this is dropped.
pub struct Doorstep<'a>(&'a Shared);

impl Drop for Doorstep<'_> {
    fn drop(&mut self) {
        self.0.watch_events(true);
    }
}

impl Doorstep<'_> {
    /// Waits until an eventfd is signalled or `other` is readable, which is read, at most for `limit`. Whether there is
    /// something to [deliver](Self::deliver).
    pub fn wait(&self, other: &EventFd, limit: Option<Duration>) -> bool {
        let limit = limit.map(|limit| Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        let mut fds = [
            PollFd::from_borrowed_fd(borrow(&self.0.events), PollFlags::IN),
            PollFd::from_borrowed_fd(borrow(other), PollFlags::IN),
        ];
        // Interrupted or not: the caller looks again.
        let _ = poll(&mut fds, limit.as_ref());
        let [ready, woken] = fds.map(|fd| !fd.revents().is_empty());
        if woken {
            let _ = other.read();
        }
        ready
    }

    /// Delivers what was signalled; whether there was anything.
    pub fn deliver(&self) -> bool {
        self.0.visit() > 0
    }
}

#[allow(unsafe_code, reason = "vmm-sys-util's descriptors have no AsFd; they are borrowed for one call")]
fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
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
    fn new(sink: Arc<dyn Signalled>) -> std::io::Result<Self> {
        let eventfd = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let (events, sleep, end, lap) = (Epoll::new()?, Epoll::new()?, eventfd()?, eventfd()?);
        for (fd, cookie) in [(end.as_raw_fd(), END), (lap.as_raw_fd(), LAP), (events.as_raw_fd(), EVENTS)] {
            sleep.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, cookie))?;
        }
        let (laps, watched, visit) = (Laps::default(), Mutex::default(), Mutex::default());
        Ok(Self { events, sleep, end, lap, laps, watched, visit, sink })
    }

    /// Whether the thread wakes for eventfds. One that are signalled already count.
    fn watch_events(&self, on: bool) {
        let events = if on { EventSet::IN } else { EventSet::empty() };
        let changed =
            self.sleep.ctl(ControlOperation::Modify, self.events.as_raw_fd(), EpollEvent::new(events, EVENTS));
        if let Err(error) = changed {
            // The thread would be woken for nothing, or interrupts would wait for the vCPU: neither loses one.
            tracing::error!(%error, "the interrupt listener could not be told who listens");
        }
    }

    fn listen(&self) {
        let mut ready = [EpollEvent::default(); 3];
        loop {
            let count = match self.sleep.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the interrupt listener cannot wait any more");
                    return;
                }
            };
            for event in ready.iter().take(count) {
                match event.data() {
                    END => return,
                    LAP => {
                        let _ = self.lap.read();
                        let lap = self.laps.begin();
                        // What is ready is taken in the order in which it became so, and what is told of again comes last.
                        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner).by_cookie.len();
                        let visits = watched / BATCH + 2;
                        let _ = (0..visits).take_while(|_| self.visit() == BATCH).count();
                        self.laps.finish(lap);
                    }
                    _ => {
                        self.visit();
                    }
                }
            }
        }
    }

    /// Delivers what is ready, at most [`BATCH`] of it; how much that was.
    fn visit(&self) -> usize {
        let _visit = self.visit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events = [EpollEvent::default(); BATCH];
        let ready = self.events.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(ready) {
            self.deliver_to(event.data());
        }
        ready
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
            .events
            .ctl(ControlOperation::Modify, self.watched.event.as_raw_fd(), event)
            .map_err(IrqError::Event)?;
        *current = message;
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let fd = self.watched.event.as_raw_fd();
        let _ = self.shared.events.ctl(ControlOperation::Delete, fd, EpollEvent::default());
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

    /// While a vCPU looks after the eventfds itself, nobody else does, except for who asks for a lap; when it leaves, the
    /// thread goes on with what has come meanwhile.
    #[test]
    fn who_stands_at_the_doorstep_delivers() {
        let (listener, fired) = listener();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let route = listener.connect(&event).unwrap();
        route.set(Some(MESSAGE)).unwrap();
        let door = listener.door();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        for _ in 0..20 {
            let doorstep = door.step();
            assert!(!doorstep.deliver());
            event.write(1).unwrap();
            assert!(doorstep.wait(&wake, None), "the eventfd ends the wait");
            assert!(fired.try_recv().is_err(), "nothing is delivered behind its back");
            assert!(doorstep.deliver());
            assert_eq!(fired.try_recv(), Ok(MESSAGE));
            wake.write(1).unwrap();
            assert!(!doorstep.wait(&wake, None), "so does the other one");
            event.write(1).unwrap();
            assert!(listener.flush(Instant::now() + PATIENCE));
            assert_eq!(fired.try_recv(), Ok(MESSAGE), "a lap takes all that is there");
            event.write(1).unwrap();
            drop(doorstep);
            assert_eq!(fired.recv_timeout(PATIENCE), Ok(MESSAGE), "the thread goes on");
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
