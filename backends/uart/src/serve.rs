//! The conversation on the bus: one thread that answers questions about registers, says when the interrupt wire changes,
//! and carries characters between the port and the line.
//!
//! A VMM on the same host offers a lane, and everything is said there from then on; one question then costs this thread
//! two system calls, to sleep and to wake the asker. Nothing is asked of the line unless epoll says that it has something.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use atoll_protocol::bus::{BusAnswer, BusCall, BusEvent, BusRequest, Refusal, Region};
use atoll_protocol::lane::{DeviceEnd, LaneError};
use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::{CauseId, Frame, FrameSocket, Generation, LineIndex, RegionIndex, SocketError, Space, Width};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use thiserror::Error;

use crate::line::Line;
use crate::port::{Port, REGISTERS};

/// How long the VMM may leave an answer unread.
const SEND_MAX: Duration = Duration::from_secs(5);
/// What is not set off by a question has no cause.
const NO_CAUSE: CauseId = CauseId(0);

/// Why the service ended.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    /// The VMM speaks another language, or does not read.
    #[error("the bus failed: {0}")]
    Bus(#[from] SocketError),
    /// The VMM writes on the lane what cannot be right, or does not read it.
    #[error("the lane failed: {0}")]
    Lane(#[from] LaneError),
    /// The kernel did not let us wait.
    #[error("waiting for the bus failed: {0}")]
    Poll(Errno),
}

/// What the thread sleeps on.
const BUS: u64 = 0;
const BELL: u64 = 1;
const LINE: u64 = 2;

/// Questions between two looks at the line.
const TURN: u32 = 64;

/// What a sleep ended with.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    bus: bool,
    typed: bool,
}

/// A serial port on a bus.
pub(crate) struct Server {
    bus: FrameSocket,
    lane: Option<DeviceEnd>,
    epoll: OwnedFd,
    /// What of the line is in the epoll set.
    watched: EventFlags,
    port: Port,
    line: Line,
    /// Who we are, once the VMM has said so.
    generation: Option<Generation>,
    /// The wire's level as the VMM knows it.
    level: bool,
}

impl Server {
    /// A port after power-on, on a bus where nobody has attached yet.
    ///
    /// # Errors
    /// The kernel has no descriptor left.
    pub(crate) fn new(bus: FrameSocket, line: Line) -> Result<Self, ServeError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(ServeError::Poll)?;
        epoll::add(&epoll, bus.reader.as_fd(), EventData::new_u64(BUS), EventFlags::IN).map_err(ServeError::Poll)?;
        let watched = EventFlags::empty();
        Ok(Self { bus, lane: None, epoll, watched, port: Port::new(), line, generation: None, level: false })
    }

    /// Serves until the VMM hangs up.
    ///
    /// # Errors
    /// All of [`ServeError`].
    pub(crate) fn run(&mut self) -> Result<(), ServeError> {
        loop {
            let ready = self.wait()?;
            // So many at once that a flood of questions does not keep the line waiting for ever.
            for _ in 0..TURN {
                let Some(request) = self.lane.as_mut().map_or(Ok(None), DeviceEnd::take)? else { break };
                self.answer(&request)?;
            }
            for _ in 0..if ready.bus { TURN } else { 0 } {
                match self.bus.reader.receive(Some(Duration::ZERO)) {
                    Ok(frame) => self.hear(frame)?,
                    Err(SocketError::Timeout(_)) => break,
                    Err(error) if error.is_hang_up() => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
            let room = self.port.room();
            if ready.typed && room > 0 && self.line.input().is_some() {
                let typed = self.line.receive(room);
                self.port.receive(&typed);
            }
            self.line.flush();
            self.tell_level(NO_CAUSE)?;
            if let Some(lane) = &mut self.lane {
                lane.announce();
            }
        }
    }

    fn wait(&mut self) -> Result<Ready, ServeError> {
        self.watch_line().map_err(ServeError::Poll)?;
        let mut ready = Ready::default();
        if self.lane.as_ref().is_some_and(|lane| !lane.falls_asleep()) {
            return Ok(ready);
        }
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(BELL) }; 3];
        let count = match epoll::wait(&self.epoll, events.as_mut_slice(), None) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(errno) => return Err(ServeError::Poll(errno)),
        };
        for event in events.into_iter().take(count) {
            let (flags, data) = (event.flags, event.data);
            match data.u64() {
                BUS => ready.bus = true,
                LINE => ready.typed |= flags != EventFlags::OUT,
                _ => {}
            }
        }
        Ok(ready)
    }

    /// Watches the line for what matters now.
    fn watch_line(&mut self) -> Result<(), Errno> {
        let mut wanted = EventFlags::empty();
        // A full receiver leaves the rest at the terminal; its next read is a question, which comes by here.
        wanted.set(EventFlags::IN, self.line.input().is_some() && self.port.room() > 0);
        wanted.set(EventFlags::OUT, self.line.is_backed_up());
        if wanted == self.watched {
            return Ok(());
        }
        let (line, data) = (self.line.output(), EventData::new_u64(LINE));
        if self.watched.is_empty() {
            epoll::add(&self.epoll, line, data, wanted)?;
        } else if wanted.is_empty() {
            epoll::delete(&self.epoll, line)?;
        } else {
            epoll::modify(&self.epoll, line, data, wanted)?;
        }
        self.watched = wanted;
        Ok(())
    }

    /// A question that came by the socket.
    fn hear(&mut self, frame: Frame) -> Result<(), ServeError> {
        let request: BusRequest = frame.decode().map_err(SocketError::from)?;
        let lane = match (&request.call, <[OwnedFd; 3]>::try_from(frame.descriptors)) {
            (BusCall::Lane, Ok([memory, bell, post])) if self.lane.is_none() && self.generation.is_some() => {
                Some(self.join(memory.as_fd(), bell, post)?)
            }
            _ => None,
        };
        let agreed = lane.is_some();
        self.answer_with(&request, |this| match &request.call {
            BusCall::Lane => {
                if agreed {
                    Ok(BusAnswer::Done)
                } else {
                    Err(Refusal::NoLane)
                }
            }
            _ => this.carry_out(&request),
        })?;
        // From the next word on.
        if agreed {
            self.lane = lane;
        }
        Ok(())
    }

    /// The end of a lane, with its bell in the epoll set.
    fn join(&self, memory: BorrowedFd<'_>, bell: OwnedFd, post: OwnedFd) -> Result<DeviceEnd, ServeError> {
        let lane = DeviceEnd::new(memory, bell, post)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.epoll, lane.bell(), EventData::new_u64(BELL), flags).map_err(ServeError::Poll)?;
        Ok(lane)
    }

    fn answer(&mut self, request: &BusRequest) -> Result<(), ServeError> {
        self.answer_with(request, |this| this.carry_out(request))
    }

    fn answer_with(
        &mut self,
        request: &BusRequest,
        carry_out: impl FnOnce(&mut Self) -> Result<BusAnswer, Refusal>,
    ) -> Result<(), ServeError> {
        let answer = carry_out(self).unwrap_or_else(BusAnswer::Refused);
        // The wire first: when the access is done, its interrupt is there, as on a board.
        self.tell_level(request.cause)?;
        let (id, cause) = (request.id, request.cause);
        let generation = self.generation.unwrap_or(request.generation);
        self.say(&BusEvent::Answer { id, cause, generation, answer })
    }

    fn say(&mut self, event: &BusEvent) -> Result<(), ServeError> {
        let Some(lane) = &mut self.lane else { return Ok(self.bus.writer.send(event, &[], SEND_MAX)?) };
        let begun = Instant::now();
        loop {
            match lane.say(event) {
                Err(LaneError::Full) if begun.elapsed() < SEND_MAX => {
                    lane.announce();
                    std::thread::sleep(Duration::from_millis(1));
                }
                said => return Ok(said?),
            }
        }
    }

    fn carry_out(&mut self, request: &BusRequest) -> Result<BusAnswer, Refusal> {
        if let BusCall::Attach { generation, .. } = request.call {
            self.generation = Some(generation);
            let regions = vec![Region { space: Space::Pio, length: REGISTERS }];
            return Ok(BusAnswer::Attached { class: DeviceClass::Uart, regions, lines: 1 });
        }
        match self.generation {
            None => return Err(Refusal::NotAttached),
            Some(generation) if generation != request.generation => return Err(Refusal::Generation),
            Some(_) => {}
        }
        match request.call {
            BusCall::Read { region, offset, width } => {
                let register = register(region, offset, width)?;
                Ok(BusAnswer::Value(u64::from(self.port.read(register))))
            }
            BusCall::Write { region, offset, width, value } => {
                let register = register(region, offset, width)?;
                let value = u8::try_from(value).map_err(|_| Refusal::Width)?;
                self.port.write(register, value);
                self.line.send(self.port.take_sent());
                Ok(BusAnswer::Done)
            }
            BusCall::Reset => {
                self.port = Port::new();
                Ok(BusAnswer::Done)
            }
            BusCall::Ping | BusCall::Attach { .. } => Ok(BusAnswer::Done),
            // On a lane, of all places.
            BusCall::Lane => Err(Refusal::NoLane),
        }
    }

    fn tell_level(&mut self, cause: CauseId) -> Result<(), ServeError> {
        let level = self.port.level();
        let Some(generation) = self.generation else { return Ok(()) };
        if level != self.level {
            self.level = level;
            let event = BusEvent::Line { generation, cause, line: LineIndex(0), level };
            self.say(&event)?;
        }
        Ok(())
    }
}

/// The register of an access, which the guest chose: any offset and width may come.
fn register(region: RegionIndex, offset: u64, width: Width) -> Result<u8, Refusal> {
    if region != RegionIndex(0) || offset >= REGISTERS {
        return Err(Refusal::OutOfRange);
    }
    if width != Width::Byte {
        return Err(Refusal::Width);
    }
    u8::try_from(offset).map_err(|_| Refusal::OutOfRange)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use atoll_protocol::{DeviceId, RequestId};

    use super::*;

    struct Vmm {
        bus: FrameSocket,
        next: u64,
        server: JoinHandle<Result<(), ServeError>>,
        lines: Vec<bool>,
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    impl Vmm {
        fn new(line: Line) -> Self {
            let (ours, theirs) = UnixStream::pair().expect("a pair");
            let mut server = Server::new(FrameSocket::new(theirs.into()), line).expect("a server");
            let server = std::thread::spawn(move || server.run());
            Self { bus: FrameSocket::new(ours.into()), next: 0, server, lines: Vec::new() }
        }

        fn ask(&mut self, generation: u64, call: BusCall) -> BusAnswer {
            self.next += 1;
            let (id, cause, generation) = (RequestId(self.next), CauseId(self.next * 10), Generation(generation));
            let request = BusRequest { id, cause, generation, budget_us: 1000, call };
            self.bus.writer.send(&request, &[], PATIENCE).expect("sent");
            loop {
                match self.bus.reader.receive_message(Some(PATIENCE)).expect("an event") {
                    BusEvent::Answer { id: answered, cause: because, answer, .. } => {
                        assert_eq!((answered, because), (id, cause));
                        return answer;
                    }
                    BusEvent::Line { level, line: LineIndex(0), .. } => self.lines.push(level),
                    other => panic!("{other:?}"),
                }
            }
        }

        fn read(&mut self, offset: u64) -> BusAnswer {
            self.ask(4, BusCall::Read { region: RegionIndex(0), offset, width: Width::Byte })
        }

        fn write(&mut self, offset: u64, value: u64) -> BusAnswer {
            self.ask(4, BusCall::Write { region: RegionIndex(0), offset, width: Width::Byte, value })
        }

        fn attach(&mut self) {
            let generation = Generation(4);
            let answer = self.ask(4, BusCall::Attach { device: DeviceId(1), generation });
            assert!(matches!(answer, BusAnswer::Attached { class: DeviceClass::Uart, lines: 1, .. }), "{answer:?}");
        }

        fn end(self) -> Result<(), ServeError> {
            drop(self.bus);
            self.server.join().expect("no panic")
        }
    }

    fn nowhere() -> Line {
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null").expect("there is one");
        Line::descriptor(null.into()).expect("a line")
    }

    /// Characters out to a file, characters in from a terminal, each with its interrupt; a reset forgets the registers
    /// and lowers the wire; the end of the VMM is the end of the service.
    #[test]
    fn conversation() {
        let (line, name) = Line::pty().expect("a pseudo-terminal");
        let seat = std::fs::OpenOptions::new().read(true).write(true).open(name).expect("its other side");
        let mut vmm = Vmm::new(line);
        vmm.attach();
        assert_eq!(vmm.write(1, 2), BusAnswer::Done);
        assert_eq!(vmm.lines, [true], "raised before the answer");
        assert_eq!(vmm.read(2), BusAnswer::Value(0xc2));
        assert_eq!(vmm.write(0, u64::from(b'!')), BusAnswer::Done);
        let mut shown = [0];
        std::io::Read::read_exact(&mut &seat, &mut shown).expect("shown");
        assert_eq!((shown, &*vmm.lines), ([b'!'], [true, false, true].as_slice()));

        assert_eq!(vmm.write(1, 1), BusAnswer::Done);
        std::io::Write::write_all(&mut &seat, b"k").expect("typed");
        while vmm.read(5) == BusAnswer::Value(0x60) {}
        assert_eq!(vmm.read(0), BusAnswer::Value(u64::from(b'k')));
        assert_eq!(vmm.lines[3..], [false, true, false], "masked, received, read");

        vmm.write(1, 2);
        assert_eq!(vmm.ask(4, BusCall::Reset), BusAnswer::Done);
        assert_eq!(vmm.lines.last(), Some(&false));
        assert_eq!(vmm.read(1), BusAnswer::Value(0));
        vmm.end().expect("a hang-up is no error");
    }

    /// What a confused or hostile VMM, or a guest through it, may ask: each is refused by name, none ends the service.
    #[test]
    fn refusals() {
        let mut vmm = Vmm::new(nowhere());
        assert_eq!(vmm.read(0), BusAnswer::Refused(Refusal::NotAttached));
        vmm.attach();
        assert_eq!(vmm.ask(3, BusCall::Ping), BusAnswer::Refused(Refusal::Generation));
        assert_eq!(vmm.read(8), BusAnswer::Refused(Refusal::OutOfRange));
        assert_eq!(vmm.read(u64::MAX), BusAnswer::Refused(Refusal::OutOfRange));
        assert_eq!(vmm.write(7, 0x100), BusAnswer::Refused(Refusal::Width));
        let wide = BusCall::Read { region: RegionIndex(0), offset: 0, width: Width::Dword };
        assert_eq!(vmm.ask(4, wide), BusAnswer::Refused(Refusal::Width));
        let elsewhere = BusCall::Read { region: RegionIndex(1), offset: 0, width: Width::Byte };
        assert_eq!(vmm.ask(4, elsewhere), BusAnswer::Refused(Refusal::OutOfRange));
        assert_eq!(vmm.ask(4, BusCall::Ping), BusAnswer::Done);
        assert_eq!(vmm.write(7, 0x5a), BusAnswer::Done);
        assert_eq!(vmm.read(7), BusAnswer::Value(0x5a), "the scratch register");
        vmm.end().expect("a hang-up is no error");
    }
}
