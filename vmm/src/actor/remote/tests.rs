//! Stories of a device at the other end of a socket, and of a lane beside it where there is one, played by the test itself.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Instant;

use atoll_devices::interrupt::WireSink;
use atoll_protocol::bus::Refusal;
use atoll_protocol::lane::DeviceEnd;
use atoll_protocol::{LineIndex, Space};

use super::super::clock::RealClock;
use super::super::park::{Parked, StopSignal, park_access};
use super::super::tests::Listener;
use super::*;
use crate::actor::Roll;

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Levels(Mutex<Vec<(u32, bool)>>);

impl WireSink for Levels {
    fn set_level(&self, line: u32, high: bool) {
        self.0.lock().expect("no panic").push((line, high));
    }
}

struct Bench {
    remote: Remote,
    region: RemoteRegion,
    events: mpsc::Receiver<LifecycleEvent>,
    levels: Arc<Levels>,
}

fn regions() -> Vec<Region> {
    vec![Region { space: Space::Pio, length: 8 }]
}

impl Bench {
    fn new(budget: Duration) -> Self {
        let (supervision, events) = Listener::new();
        let surroundings = Surroundings {
            clock: Arc::new(RealClock::new()),
            budget,
            supervision,
            causes: Arc::default(),
            roll: Roll::default(),
        };
        let levels = Arc::new(Levels::default());
        let wires = vec![Wire::new(Arc::clone(&levels) as Arc<dyn WireSink>, 3)];
        let shape = RemoteShape { class: DeviceClass::Uart, regions: regions() };
        let remote = Remote::new(DeviceId(2), shape, wires, None, surroundings).expect("a thread");
        let region = remote.region(RegionIndex(0)).expect("it has one");
        Self { remote, region, events, levels }
    }

    /// Attaches a process that the test plays; gives its end.
    fn attach(&self, generation: u64) -> Peer {
        self.attach_by(generation, true)
    }

    fn attach_by(&self, generation: u64, lane: bool) -> Peer {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let peer = std::thread::spawn(move || Peer::attached(theirs.into(), regions(), 1, Some(lane)));
        self.remote.attach(ours.into(), Generation(generation), PATIENCE).expect("attached");
        peer.join().expect("no panic")
    }

    fn next_event(&self) -> LifecycleEvent {
        self.events.recv_timeout(PATIENCE).expect("an event")
    }
}

struct Peer {
    socket: FrameSocket,
    lane: Option<DeviceEnd>,
    generation: Generation,
}

impl Peer {
    /// Answers what a VMM begins with; `lane` says whether it offers one, and whether that is taken.
    fn attached(socket: OwnedFd, regions: Vec<Region>, lines: u8, lane: Option<bool>) -> Self {
        let mut socket = FrameSocket::new(socket);
        let question: BusRequest = socket.reader.receive_message(Some(PATIENCE)).expect("a question");
        assert!(matches!(question.call, BusCall::Attach { device: DeviceId(2), .. }), "{question:?}");
        let mut peer = Self { socket, lane: None, generation: question.generation };
        peer.answer(&question, BusAnswer::Attached { class: DeviceClass::Uart, regions, lines });
        let Some(taken) = lane else { return peer };
        let offer = peer.socket.reader.receive(Some(PATIENCE)).expect("an offer");
        let question = offer.decode::<BusRequest>().expect("a question");
        assert_eq!(question.call, BusCall::Lane);
        let [memory, bell, post] = offer.descriptors.try_into().expect("three descriptors");
        if taken {
            peer.answer(&question, BusAnswer::Done);
            peer.lane = Some(DeviceEnd::new(memory.as_fd(), bell, post).expect("a lane"));
        } else {
            peer.answer(&question, BusAnswer::Refused(Refusal::NoLane));
        }
        peer
    }

    fn question(&mut self) -> BusRequest {
        let Some(lane) = &mut self.lane else {
            return self.socket.reader.receive_message(Some(PATIENCE)).expect("a question");
        };
        let begun = Instant::now();
        loop {
            if let Some(question) = lane.take().expect("a sane VMM") {
                return question;
            }
            assert!(begun.elapsed() < PATIENCE, "a question");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn answer(&mut self, question: &BusRequest, answer: BusAnswer) {
        let generation = self.generation;
        self.say(&BusEvent::Answer { id: question.id, cause: question.cause, generation, answer });
    }

    fn say(&mut self, event: &BusEvent) {
        match &mut self.lane {
            Some(lane) => {
                lane.say(event).expect("room");
                lane.announce();
            }
            None => self.socket.writer.send(event, &[], PATIENCE).expect("sent"),
        }
    }
}

fn wait(answer: Answer) -> Option<u64> {
    let clock = RealClock::new();
    match answer {
        Answer::Later(later) => match park_access(later, &clock, PATIENCE, &StopSignal::new()) {
            Parked::Done(value) => value,
            other => panic!("{other:?}"),
        },
        Answer::Now => panic!("answered now"),
    }
}

/// Read, write and interrupt, by the lane and over the socket of a process that declines one; answers may overtake each
/// other.
#[test]
fn round_trip_out_of_order() {
    for lane in [true, false] {
        round_trip(lane);
    }
}

fn round_trip(lane: bool) {
    let mut bench = Bench::new(PATIENCE);
    let mut peer = bench.attach_by(1, lane);
    let read = bench.region.read(5, &mut [0; 1]);
    let write = bench.region.write(0, &[0x41]);
    let (first, second) = (peer.question(), peer.question());
    assert_eq!(first.call, BusCall::Read { region: RegionIndex(0), offset: 5, width: Width::Byte });
    let stored = BusCall::Write { region: RegionIndex(0), offset: 0, width: Width::Byte, value: 0x41 };
    assert_eq!(second.call, stored);
    assert_ne!(first.cause, second.cause);
    peer.say(&BusEvent::Line { generation: Generation(1), cause: second.cause, line: LineIndex(0), level: true });
    peer.answer(&second, BusAnswer::Done);
    assert_eq!(wait(write), Some(0));
    assert_eq!(
        *bench.levels.0.lock().expect("no panic"),
        [(3, true)],
        "raised before the write that raised it is done"
    );
    peer.answer(&first, BusAnswer::Value(0x60));
    assert_eq!(wait(read), Some(0x60));
    assert!(matches!(bench.region.read(6, &mut [0; 4]), Answer::Now), "it leaves the window: nobody is asked");
    let counts = RemoteCounts { asked: 2, answered: 2, ..RemoteCounts::default() };
    assert_eq!(bench.remote.counts(), counts);
}

/// The process takes a question and sits on it. The vCPU goes on by the deadline, the supervisor hears of it, and the
/// answer that comes after all is dropped. A second question, asked while the thread had nothing to watch, stalls too.
#[test]
fn stalled_process_costs_one_deadline() {
    let budget = Duration::from_millis(50);
    let mut bench = Bench::new(budget);
    let mut peer = bench.attach(1);
    for round in 1..=2 {
        // Long enough that the thread sleeps without a limit.
        std::thread::sleep(budget * 3);
        let start = Instant::now();
        let answer = bench.region.read(0, &mut [0; 1]);
        let question = peer.question();
        assert_eq!(wait(answer), None);
        assert!(start.elapsed() >= budget);
        let stalled =
            LifecycleEvent::DeviceStalled { device: DeviceId(2), generation: Generation(1), cause: question.cause };
        assert_eq!(bench.next_event(), stalled);
        peer.answer(&question, BusAnswer::Value(1));
        let answer = bench.region.read(1, &mut [0; 1]);
        let question = peer.question();
        peer.answer(&question, BusAnswer::Value(2));
        assert_eq!(wait(answer), Some(2), "the late answer is not taken for the next question's");
        assert_eq!(bench.remote.counts().stale, round);
    }
}

/// The process dies with a question in its hands and its interrupt raised; a second question comes while nobody is
/// there. The first is lost at once, the wire goes low, the second is answered by the successor. The predecessor's
/// answers count for nothing.
#[test]
fn successor_answers_what_was_not_yet_asked() {
    let mut bench = Bench::new(PATIENCE);
    let mut peer = bench.attach(1);
    peer.say(&BusEvent::Line { generation: Generation(1), cause: CauseId(0), line: LineIndex(0), level: true });
    let lost = bench.region.read(0, &mut [0; 2]);
    peer.question();
    drop(peer);
    assert_eq!(wait(lost), None);
    assert_eq!(bench.next_event(), LifecycleEvent::DeviceDied { device: DeviceId(2), generation: Generation(1) });
    assert_eq!(*bench.levels.0.lock().expect("no panic"), [(3, true), (3, false)]);
    assert!(!bench.remote.is_attached());

    let kept = bench.region.read(2, &mut [0; 2]);
    let mut successor = bench.attach(2);
    let question = successor.question();
    assert_eq!(question.generation, Generation(2));
    let late = BusAnswer::Value(0x666);
    successor.say(&BusEvent::Answer {
        id: question.id,
        cause: question.cause,
        generation: Generation(1),
        answer: late,
    });
    successor.answer(&question, BusAnswer::Value(0x1234));
    assert_eq!(wait(kept), Some(0x1234));
    let counts = bench.remote.counts();
    assert_eq!((counts.lost, counts.stale, counts.answered), (1, 1, 1));
    let (socket, _keep) = UnixStream::pair().expect("a pair");
    let refused = bench.remote.attach(socket.into(), Generation(2), PATIENCE);
    assert!(matches!(refused, Err(AttachError::Generation { .. })), "{refused:?}");
}

/// What cannot be right ends the connection, whatever it is, and the supervisor hears of a death.
#[test]
fn wrong_words_end_the_connection() {
    let line = |generation, line| BusEvent::Line {
        generation: Generation(generation),
        cause: CauseId(0),
        line: LineIndex(line),
        level: true,
    };
    let msi =
        BusEvent::Msi { generation: Generation(1), cause: CauseId(0), message: atoll_protocol::MsiMessage::default() };
    let answer = |id, answer| BusEvent::Answer { id, cause: CauseId(0), generation: Generation(1), answer };
    type Wrong = Box<dyn Fn(RequestId) -> BusEvent>;
    let cases: Vec<(&str, Wrong)> = vec![
        ("a line that it does not have", Box::new(move |_| line(1, 1))),
        ("a generation to come", Box::new(move |_| line(2, 0))),
        ("a message that it does not have", Box::new(move |_| msi.clone())),
        ("a value that is too wide", Box::new(move |id| answer(id, BusAnswer::Value(0x100)))),
        ("done to a read", Box::new(move |id| answer(id, BusAnswer::Done))),
        ("an id never used", Box::new(move |id| answer(RequestId(id.0 + 1), BusAnswer::Value(1)))),
    ];
    for (name, wrong) in cases {
        let mut bench = Bench::new(PATIENCE);
        let mut peer = bench.attach(1);
        let read = bench.region.read(0, &mut [0; 1]);
        let question = peer.question();
        peer.say(&wrong(question.id));
        assert_eq!(wait(read), None, "{name}");
        let died = LifecycleEvent::DeviceDied { device: DeviceId(2), generation: Generation(1) };
        assert_eq!(bench.next_event(), died, "{name}");
        assert!(peer.socket.reader.receive(Some(PATIENCE)).is_err(), "{name}: the peer sees a hang-up");
    }
    let bench = Bench::new(PATIENCE);
    let peer = bench.attach(1);
    let raw = peer.socket.reader.as_fd().try_clone_to_owned().expect("a descriptor");
    rustix::io::write(&raw, &[0x55; 40]).expect("written");
    assert!(matches!(bench.next_event(), LifecycleEvent::DeviceDied { .. }), "bytes that are no frame");
}

/// A process that serves another device than the guest was shown, or says nothing, is not attached.
#[test]
fn attach_checks_the_shape() {
    let bench = Bench::new(PATIENCE);
    let wider = vec![Region { space: Space::Pio, length: 16 }];
    for (regions, lines) in [(wider, 1), (regions(), 2), (Vec::new(), 0)] {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let peer = std::thread::spawn(move || Peer::attached(theirs.into(), regions, lines, None));
        let refused = bench.remote.attach(ours.into(), Generation(1), PATIENCE);
        assert!(matches!(refused, Err(AttachError::Shape { .. })), "{refused:?}");
        drop(peer.join());
    }
    let (ours, _silent) = UnixStream::pair().expect("a pair");
    let refused = bench.remote.attach(ours.into(), Generation(1), Duration::from_millis(20));
    assert!(matches!(refused, Err(AttachError::Connection { source: SocketError::Timeout(_), .. })), "{refused:?}");
    bench.attach(1);
}

/// The same conversation over TCP: a device process on another host.
#[test]
fn over_tcp() {
    let mut bench = Bench::new(PATIENCE);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound");
    let peer = std::thread::spawn(move || {
        let theirs = std::net::TcpStream::connect(address).expect("connected");
        let mut peer = Peer::attached(theirs.into(), regions(), 0, None);
        let question = peer.question();
        peer.answer(&question, BusAnswer::Value(0x99));
        peer
    });
    let (ours, _) = listener.accept().expect("accepted");
    bench.remote.attach(ours.into(), Generation(1), PATIENCE).expect("attached");
    assert_eq!(wait(bench.region.read(7, &mut [0; 1])), Some(0x99));
    drop(peer.join());
}

/// Two vCPUs wait at once and a wire changes meanwhile: each gets its own answer, whoever takes it from the lane. What
/// comes while nobody waits is taken too, and a machine that ends does not wait for the process.
#[test]
fn waiting_threads_take_what_has_come() {
    let bench = Bench::new(PATIENCE);
    let mut peer = bench.attach(1);
    let ask = |offset| {
        let (mut region, stop) = (bench.region.clone(), StopSignal::new());
        let signal = stop.clone();
        let thread = std::thread::spawn(move || match region.read(offset, &mut [0; 1]) {
            Answer::Later(later) => park_access(later, &RealClock::new(), PATIENCE, &stop),
            Answer::Now => panic!("answered now"),
        });
        (thread, signal)
    };
    for _ in 0..200 {
        let (first, second) = (ask(1), ask(2));
        let questions = [peer.question(), peer.question()];
        peer.say(&BusEvent::Line { generation: Generation(1), cause: CauseId(0), line: LineIndex(0), level: true });
        for question in questions.iter().rev() {
            let BusCall::Read { offset, .. } = question.call else { panic!("{question:?}") };
            peer.answer(question, BusAnswer::Value(offset));
        }
        assert_eq!(first.0.join().expect("no panic"), Parked::Done(Some(1)));
        assert_eq!(second.0.join().expect("no panic"), Parked::Done(Some(2)));
    }
    peer.say(&BusEvent::Line { generation: Generation(1), cause: CauseId(0), line: LineIndex(0), level: false });
    let begun = Instant::now();
    while bench.levels.0.lock().expect("no panic").last() != Some(&(3, false)) {
        assert!(begun.elapsed() < PATIENCE, "nobody takes what nobody waits for");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (waiting, signal) = ask(3);
    peer.question();
    signal.raise();
    assert_eq!(waiting.join().expect("no panic"), Parked::Stopped);
}
