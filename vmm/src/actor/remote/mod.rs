//! Registers that another process serves ("elsewhere"), over a UNIX or TCP socket, in frames of `protocol`.
//!
//! [`Remote`] is the VMM's end: it outlives the processes that serve the device one after the other, each attached with
//! a socket and a generation. [`RemoteRegion`] is one register window of it on the board. A vCPU sends its question
//! itself. To a process on the same host that goes by a [lane](atoll_protocol::lane), where the vCPU fetches the answer
//! too. One thread per device receives what nobody waits for and all that comes by the socket, and watches the deadlines.
//!
//! - Late: a read gives all ones, a write is dropped, the supervisor hears `DeviceStalled`.
//! - Dead: the same at once for what was sent, and `DeviceDied`; its wires go low. What is asked while nobody is attached
//!   waits, until its deadline, for the successor.
//! - An answer that comes too late, or from an earlier generation, is dropped and counted. One that cannot be right ends
//!   the connection: whoever sent it is killed, not argued with.

mod link;
mod receiving;
mod table;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_devices::access::{Answer, Arrivals, Completion, RegisterDevice, deferred};
use atoll_devices::interrupt::{MsiSink, Wire};
use atoll_protocol::bus::{BusAnswer, BusCall, BusEvent, BusRequest, Region};
use atoll_protocol::lane::{VmmEnd, Watch};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::{
    CauseId, DeviceId, FrameReader, FrameSocket, Generation, RegionIndex, RequestId, SocketError, Width,
};
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use self::link::{Link, Offered};
use self::table::{Asked, Table};
use super::clock::Moment;
use super::device::{Surroundings, little_endian};
use super::rate::RateLimit;
use super::roll::{ActorReport, Post};

use crate::seccomp::{self, ThreadClass};

/// What a device process must be to serve a device: fixed when the board is built, the same for each incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteShape {
    /// What it serves.
    pub class: DeviceClass,
    /// Its register windows.
    pub regions: Vec<Region>,
}

/// Why a process could not be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The connection failed or was not answered in time.
    #[error("{device} {generation}: no answer to attach: {source}")]
    Connection {
        /// Which device.
        device: DeviceId,
        /// Which incarnation.
        generation: Generation,
        /// What the connection said.
        #[source]
        source: SocketError,
    },
    /// It answered something else.
    #[error("{device} {generation}: attach was answered by {answer}: use a device process of this release")]
    Answer {
        /// Which device.
        device: DeviceId,
        /// Which incarnation.
        generation: Generation,
        /// What came.
        answer: String,
    },
    /// It serves another device than the guest was shown.
    #[error("{device} {generation} is {found}, the board has {wanted}: start the process that fits")]
    Shape {
        /// Which device.
        device: DeviceId,
        /// Which incarnation.
        generation: Generation,
        /// What it says it is.
        found: String,
        /// What it should be.
        wanted: String,
    },
    /// A generation must be newer than all before.
    #[error("{device} has seen {seen}, so {offered} cannot be attached")]
    Generation {
        /// Which device.
        device: DeviceId,
        /// The newest so far.
        seen: Generation,
        /// The one that was to be attached.
        offered: Generation,
    },
}

/// How often what happened to one remote device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoteCounts {
    /// Accesses asked.
    pub asked: u64,
    /// Answers that completed an access.
    pub answered: u64,
    /// Accesses given up at their deadline, or because too many were open.
    pub stalled: u64,
    /// Accesses lost with a process that died.
    pub lost: u64,
    /// Answers and interrupts dropped because they were late or of an earlier generation.
    pub stale: u64,
    /// Accesses that the device refused.
    pub refused: u64,
}

/// A thread that wakes this much too late was stopped, or starved, and so was the rest of the VMM.
const OVERSLEPT: Duration = Duration::from_millis(200);

/// What the thread listens to.
struct Incoming {
    generation: Generation,
    reader: FrameReader,
    /// Rung for what came by the lane and nobody waits for.
    post: Option<Arc<OwnedFd>>,
}

struct State {
    table: Table,
    /// Newest generation ever attached; 0 before the first.
    generation: Generation,
    link: Option<Link>,
    /// The receiving half of a new link, on its way to the thread.
    arriving: Option<Incoming>,
    counts: RemoteCounts,
    /// Questions for which the table had no room.
    full: u64,
    /// The thread waits without a limit, and must be woken for a new deadline.
    asleep: bool,
    closing: bool,
    /// Nobody is expected.
    given_up: bool,
    limit: RateLimit,
}

struct Shared {
    device: DeviceId,
    shape: RemoteShape,
    wires: Vec<Wire>,
    msi: Option<Arc<dyn MsiSink>>,
    surroundings: Surroundings,
    wake: OwnedFd,
    state: Mutex<State>,
}

impl Post for Shared {
    fn report(&self) -> ActorReport {
        let state = self.lock();
        let (waiting, capacity) = state.table.depth();
        let at = match (&state.link, state.given_up) {
            (Some(_), _) => "attached",
            (None, true) => "given up",
            (None, false) => "detached",
        };
        ActorReport {
            name: format!("bus{}", self.device.0).into(),
            waiting,
            capacity,
            full: state.full,
            generation: state.generation.0,
            state: at.into(),
        }
    }
}

/// The VMM's end of a device that other processes serve. Dropping it ends the connection and the thread.
pub struct Remote {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.shared.device)
    }
}

/// One register window of a remote device, as the board maps it.
#[derive(Clone)]
pub struct RemoteRegion {
    shared: Arc<Shared>,
    region: RegionIndex,
    length: u64,
}

impl fmt::Debug for RemoteRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteRegion({}, {})", self.shared.device, self.region)
    }
}

impl Remote {
    /// A device that nobody serves yet. Its process may use as many wires as there are in `wires`, and messages if `msi`
    /// is given.
    ///
    /// # Errors
    /// The kernel has no descriptor or thread left.
    pub fn new(
        device: DeviceId,
        shape: RemoteShape,
        wires: Vec<Wire>,
        msi: Option<Arc<dyn MsiSink>>,
        surroundings: Surroundings,
    ) -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let limit = RateLimit::new(Arc::clone(&surroundings.clock), 5, Duration::from_secs(1));
        let state = State {
            table: Table::new(),
            generation: Generation(0),
            link: None,
            arriving: None,
            counts: RemoteCounts::default(),
            full: 0,
            asleep: false,
            closing: false,
            given_up: false,
            limit,
        };
        let roll = surroundings.roll.clone();
        let shared = roll.post(Shared { device, shape, wires, msi, surroundings, wake, state: Mutex::new(state) });
        let thread = std::thread::Builder::new().name(format!("bus{}", device.0)).spawn({
            let shared = Arc::clone(&shared);
            move || {
                seccomp::enter(ThreadClass::Talk);
                shared.serve();
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A register window of the device, if it has so many.
    #[must_use]
    pub fn region(&self, region: RegionIndex) -> Option<RemoteRegion> {
        let length = self.shared.shape.regions.get(usize::from(region.0))?.length;
        Some(RemoteRegion { shared: Arc::clone(&self.shared), region, length })
    }

    /// Puts a process at the other end, in place of the one before. Waits at most four times `patience` for its answers,
    /// so it is not for a vCPU, nor for an actor's own task.
    ///
    /// # Errors
    /// All of [`AttachError`]; the device is then served by whoever served it before.
    pub fn attach(&self, socket: OwnedFd, generation: Generation, patience: Duration) -> Result<(), AttachError> {
        let shared = &self.shared;
        let device = shared.device;
        let seen = shared.lock().generation;
        if generation <= seen {
            return Err(AttachError::Generation { device, seen, offered: generation });
        }
        let mut socket = FrameSocket::new(socket);
        let question = |id, call| BusRequest {
            id,
            cause: shared.surroundings.next_cause(),
            generation,
            budget_us: u32::try_from(patience.as_micros()).unwrap_or(u32::MAX),
            call,
        };
        let failed = |source| AttachError::Connection { device, generation, source };
        let attach = question(RequestId(0), BusCall::Attach { device, generation });
        let event: BusEvent = socket.ask(&attach, patience).map_err(failed)?;
        self.check_attached(generation, &event)?;
        let lane = match link::offer(&mut socket, &question(RequestId(0), BusCall::Lane), patience).map_err(failed)? {
            Offered::Lane(lane) => Some(lane),
            Offered::Socket => None,
            Offered::Odd(event) => {
                return Err(AttachError::Answer { device, generation, answer: format!("{event:?}") });
            }
        };
        let (reader, writer) = socket.split();
        let post = lane.as_ref().map(VmmEnd::post);
        let link = Link::new(writer, lane);
        let mut state = shared.lock();
        if generation <= state.generation {
            return Err(AttachError::Generation { device, seen: state.generation, offered: generation });
        }
        let predecessor = shared.unlink(&mut state);
        state.generation = generation;
        state.given_up = false;
        state.link = Some(link);
        state.arriving = Some(Incoming { generation, reader, post });
        let unsent = state.table.unsent();
        let mut broken = None;
        let now = shared.surroundings.clock.now();
        for id in unsent {
            broken = broken.or(shared.send(&mut state, id, now));
        }
        drop(state);
        shared.wake();
        shared.tell(predecessor);
        shared.tell(broken);
        Ok(())
    }

    fn check_attached(&self, generation: Generation, event: &BusEvent) -> Result<(), AttachError> {
        let shared = &self.shared;
        let device = shared.device;
        match event {
            BusEvent::Answer {
                id: RequestId(0),
                generation: answered,
                answer: BusAnswer::Attached { class, regions, lines },
                ..
            } if *answered == generation => {
                let fits = *class == shared.shape.class
                    && *regions == shared.shape.regions
                    && usize::from(*lines) <= shared.wires.len();
                if fits {
                    return Ok(());
                }
                let describe = |class: DeviceClass, regions: &[Region], lines: usize| {
                    format!("a {class} device with the regions {regions:?} and {lines} interrupt lines")
                };
                Err(AttachError::Shape {
                    device,
                    generation,
                    found: describe(*class, regions, usize::from(*lines)),
                    wanted: describe(shared.shape.class, &shared.shape.regions, shared.wires.len()),
                })
            }
            other => Err(AttachError::Answer { device, generation, answer: format!("{other:?}") }),
        }
    }

    /// Ends the present connection, if there is one, as when the process died. What a supervisor does before it starts
    /// a successor.
    pub fn detach(&self) {
        let event = self.shared.unlink(&mut self.shared.lock());
        self.shared.wake();
        self.shared.tell(event);
    }

    /// The machine was reset: the device forgets its registers. Does not wait; later questions come after it.
    pub fn reset(&self) {
        let shared = &self.shared;
        let (event, _) = shared.ask(BusCall::Reset, Asked::Reset, None);
        shared.tell(event);
    }

    /// Nobody will come: what is asked from now on is answered as nobody's at once, until somebody is attached after all.
    pub fn give_up(&self) {
        let mut state = self.shared.lock();
        let event = self.shared.unlink(&mut state);
        state.given_up = true;
        state.table.abandon_all();
        drop(state);
        self.shared.wake();
        self.shared.tell(event);
    }

    /// Whether a process serves it.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.shared.lock().link.is_some()
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> RemoteCounts {
        self.shared.lock().counts
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        // Nobody is to hear of an end that was wanted.
        let _ = self.shared.unlink(&mut state);
        drop(state);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl RegisterDevice for RemoteRegion {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        let Some(width) = self.width_at(offset, data.len()) else {
            data.fill(0xff);
            return Answer::Now;
        };
        let (completion, answer) = deferred();
        let call = BusCall::Read { region: self.region, offset, width };
        let (event, watch) = self.shared.ask(call, Asked::Read(width), Some(completion));
        self.shared.tell(event);
        Answer::Later(answer.elsewhere(Arc::clone(&self.shared) as Arc<dyn Arrivals>, watch))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        let Some(width) = self.width_at(offset, data.len()) else { return Answer::Now };
        let (completion, answer) = deferred();
        let call = BusCall::Write { region: self.region, offset, width, value: little_endian(data) };
        let (event, watch) = self.shared.ask(call, Asked::Write, Some(completion));
        self.shared.tell(event);
        Answer::Later(answer.elsewhere(Arc::clone(&self.shared) as Arc<dyn Arrivals>, watch))
    }
}

impl RemoteRegion {
    /// The width of an access, if it is one and lies within the window.
    fn width_at(&self, offset: u64, bytes: usize) -> Option<Width> {
        let width = Width::from_bytes(bytes)?;
        let end = offset.checked_add(u64::try_from(bytes).ok()?)?;
        (end <= self.length).then_some(width)
    }
}

impl Arrivals for Shared {
    fn collect(&self) {
        self.tell(self.take_from_lane());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when it is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn tell(&self, event: Option<LifecycleEvent>) {
        if let Some(event) = event {
            self.surroundings.supervision.report(event);
        }
    }

    /// Asks, or keeps the question for whoever is attached next. With a completion, whoever is to wait for the answer is
    /// announced on the lane before it is asked: the process may answer before this returns.
    fn ask(
        &self,
        call: BusCall,
        asked: Asked,
        completion: Option<Completion>,
    ) -> (Option<LifecycleEvent>, Option<Watch>) {
        let now = self.surroundings.clock.now();
        let cause = self.surroundings.next_cause();
        let mut state = self.lock();
        state.counts.asked += 1;
        if state.given_up {
            state.counts.lost += 1;
            return (None, None);
        }
        let deadline = now.after(self.surroundings.budget);
        let waits = completion.is_some();
        let Some(id) = state.table.insert(call, asked, cause, deadline, completion) else {
            state.counts.stalled += 1;
            state.full += 1;
            return (Some(self.stalled(state.generation, cause)), None);
        };
        let watch = if waits { state.link.as_ref().and_then(|link| link.lane()).map(VmmEnd::watch) } else { None };
        let event = self.send(&mut state, id, now);
        if std::mem::take(&mut state.asleep) {
            self.wake();
        }
        (event, watch)
    }

    /// Sends a question if somebody is attached; an event if that somebody turns out to be gone.
    fn send(&self, state: &mut State, id: RequestId, now: Moment) -> Option<LifecycleEvent> {
        let generation = state.generation;
        let link = state.link.as_mut()?;
        let request = state.table.send(id, generation, now)?;
        match link.send(&request) {
            Ok(()) => None,
            Err(error) => {
                let device = self.device;
                tracing::warn!(%device, %generation, %error, "a question could not be sent; the connection is closed");
                state.table.abandon(id);
                state.counts.lost += 1;
                self.unlink(state)
            }
        }
    }

    /// Ends the present connection. Its questions are lost, its wires are low.
    fn unlink(&self, state: &mut State) -> Option<LifecycleEvent> {
        let link = state.link.take()?;
        state.arriving = None;
        link.hang_up();
        let lost = state.table.abandon_sent();
        state.counts.lost += lost as u64;
        for wire in &self.wires {
            wire.set(false);
        }
        Some(LifecycleEvent::DeviceDied { device: self.device, generation: state.generation })
    }

    fn stalled(&self, generation: Generation, cause: CauseId) -> LifecycleEvent {
        LifecycleEvent::DeviceStalled { device: self.device, generation, cause }
    }
}

#[cfg(test)]
mod tests;
