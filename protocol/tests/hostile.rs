//! What a hostile peer can send: every decoder answers with a value or a typed error, never with a panic, and takes no
//! memory that the bytes do not pay for.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use atoll_protocol::access::ExitRecord;
use atoll_protocol::bus::{BusAnswer, BusCall, BusEvent, BusRequest};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::frame::{self, FrameError, HEADER_LEN};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::operator::{OperatorReply, OperatorRequest};
use atoll_protocol::saved::{self, Saved, SavedError, SavedType};
use atoll_protocol::sidecar::{
    LogLevel, PROGRESS_QUEUES_MAX, QueueProgress, SidecarOrder, SidecarReport, TEXT_MAX, cut_text,
};
use atoll_protocol::{
    CauseId, DeviceId, FrameSocket, Generation, Kind, Message, QueueIndex, RegionIndex, RequestId, SocketError, Width,
};
use proptest::prelude::*;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

const PATIENCE: Duration = Duration::from_secs(10);

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a pair")
}

/// Decodes a body as its kind says; the answer is of no interest.
fn decode_any(kind: Kind, body: &[u8]) {
    fn decode<M: Message>(body: &[u8]) {
        if let Ok(message) = frame::decode_body::<M>(M::KIND, body) {
            // What was decoded can be sent on: no decoded value is longer than its kind allows.
            frame::encode(&message, 0).expect("a decoded message can be encoded");
        }
    }
    match kind {
        Kind::BusRequest => decode::<BusRequest>(body),
        Kind::BusEvent => decode::<BusEvent>(body),
        Kind::SidecarReport => decode::<SidecarReport>(body),
        Kind::SidecarOrder => decode::<SidecarOrder>(body),
        Kind::OperatorRequest => decode::<OperatorRequest>(body),
        Kind::OperatorReply => decode::<OperatorReply>(body),
        Kind::Lifecycle => decode::<LifecycleEvent>(body),
        Kind::Exit => decode::<ExitRecord>(body),
        Kind::DisplayOrder => decode::<DisplayOrder>(body),
        Kind::DisplayReport => decode::<DisplayReport>(body),
    }
}

fn words() -> Vec<Vec<u8>> {
    let golden = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/golden.txt")).expect("golden.txt");
    let digit = |digit: u8| (digit as char).to_digit(16).expect("hex") as u8;
    let lines = golden.lines().filter_map(|line| line.split_once(" 41544f4c").map(|(_, rest)| rest.as_bytes()));
    let words: Vec<Vec<u8>> = lines
        .map(|hex| {
            b"ATOL".iter().copied().chain(hex.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1]))).collect()
        })
        .collect();
    assert!(words.len() > 60, "every word has an example");
    words
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Noise in the place of a body, of each kind.
    #[test]
    fn noise_never_panics(body in prop::collection::vec(any::<u8>(), 0..300), kind in 0..Kind::ALL.len()) {
        decode_any(Kind::ALL[kind], &body);
    }

    /// A real frame with up to four bytes changed, cut off anywhere.
    #[test]
    fn mutated_words_never_panic(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        length in any::<prop::sample::Index>(),
    ) {
        let words = words();
        let mut bytes = which.get(&words).clone();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(length.index(bytes.len() + 1));
        if let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>()
            && let Ok(header) = frame::FrameHeader::decode(header)
        {
            prop_assert!(header.length() <= header.kind().ceiling());
            decode_any(header.kind(), &rest[..rest.len().min(header.length())]);
        }
    }

    /// Any access and any answer arrive as they were sent, in whatever pieces the stream delivers them.
    #[test]
    fn accesses_survive_the_wire_in_pieces(
        id in any::<u64>(), cause in any::<u64>(), generation in any::<u64>(), budget_us in any::<u32>(),
        region in any::<u8>(), offset in any::<u64>(), value in any::<u64>(), width in 0..4usize,
        pieces in prop::collection::vec(1..12usize, 1..6),
    ) {
        let (region, width) = (RegionIndex(region), Width::ALL[width]);
        let call = BusCall::Write { region, offset, width, value };
        let request = BusRequest {
            id: RequestId(id), cause: CauseId(cause), generation: Generation(generation), budget_us, call,
        };
        let event = BusEvent::Answer {
            id: RequestId(id), cause: CauseId(cause), generation: Generation(generation), answer: BusAnswer::Value(value),
        };
        let mut bytes = frame::encode(&request, 0).unwrap();
        bytes.extend(frame::encode(&event, 0).unwrap());
        let (ours, theirs) = pair();
        let mut socket = FrameSocket::new(ours);
        let mut sent = 0;
        let mut received = Vec::new();
        for piece in pieces.iter().cycle() {
            if sent < bytes.len() {
                let end = (sent + piece).min(bytes.len());
                sent += send(&theirs, &bytes[sent..end], SendFlags::empty()).unwrap();
            }
            match socket.reader.receive(Some(Duration::ZERO)) {
                Ok(frame) => received.push(frame),
                Err(SocketError::Timeout(_)) => {}
                Err(error) => panic!("{error}"),
            }
            if received.len() == 2 {
                break;
            }
        }
        prop_assert_eq!(received[0].decode::<BusRequest>().unwrap(), request);
        prop_assert_eq!(received[1].decode::<BusEvent>().unwrap(), event);
    }

    /// Saved state with any byte changed is never restored as something else.
    #[test]
    fn damaged_state_is_refused(place in any::<prop::sample::Index>(), change in 1..=255u8, cut in any::<prop::sample::Index>()) {
        let whole = saved::save(&Counter { count: 77, extra: 5 }, Vec::new()).unwrap();
        let mut bytes = whole.clone();
        let place = place.index(bytes.len());
        bytes[place] ^= change;
        prop_assert!(saved::restore::<Counter>(&bytes).is_err(), "byte {place} was changed");
        let cut = cut.index(whole.len());
        let short = matches!(saved::restore::<Counter>(&whole[..cut]), Err(SavedError::Short { .. }));
        prop_assert!(short, "cut at {cut}");
    }

    #[test]
    fn noise_is_no_state(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        prop_assert!(saved::restore::<Counter>(&bytes).is_err());
    }
}

#[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
struct Counter {
    count: u64,
    extra: u32,
}

impl Saved for Counter {
    const TYPE: SavedType = SavedType(1);
    const VERSION: u16 = 2;

    fn from_older(version: u16, body: &[u8]) -> Option<Result<Self, postcard::Error>> {
        (version == 1).then(|| postcard::from_bytes(body).map(|count| Self { count, extra: 0 }))
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct CounterV1(u64);

impl Saved for CounterV1 {
    const TYPE: SavedType = SavedType(1);
    const VERSION: u16 = 1;
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct CounterV3(u64);

impl Saved for CounterV3 {
    const TYPE: SavedType = SavedType(1);
    const VERSION: u16 = 3;
}

/// State of the version before is read; of one to come, or of another type, it is refused and said why. Envelopes stand
/// one after the other in a file.
#[test]
fn older_state_is_read_and_newer_refused() {
    let bytes = saved::save(&CounterV1(9), Vec::new()).expect("saved");
    let bytes = saved::save(&Counter { count: 1, extra: 2 }, bytes).expect("saved");
    let (first, rest) = saved::restore::<Counter>(&bytes).expect("restored");
    assert_eq!(first, Counter { count: 9, extra: 0 });
    let (second, rest) = saved::restore::<Counter>(rest).expect("restored");
    assert_eq!((second, rest.len()), (Counter { count: 1, extra: 2 }, 0));
    let newer = saved::save(&CounterV3(9), Vec::new()).expect("saved");
    let refused = saved::restore::<Counter>(&newer).expect_err("newer");
    assert_eq!(refused, SavedError::Version { kind: SavedType(1), found: 3, newest: 2 });
    assert!(matches!(saved::restore::<CounterV3>(&bytes), Err(SavedError::Version { found: 1, .. })));
}

/// Each field of the header that cannot be right has an error of its own, and a claimed length is refused before the
/// body is waited for, let alone allocated.
#[test]
fn headers_that_cannot_be_right() {
    let good = frame::encode(&SidecarOrder::Quiesce, 0).expect("fits");
    let with = |place: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[place..place + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let kind = Kind::SidecarOrder;
    let cases = [
        (with(0, b"HTTP"), FrameError::Magic(*b"HTTP")),
        (with(4, &[0x7f, 0]), FrameError::Version(0x7f)),
        (with(6, &[0, 0]), FrameError::Kind(0)),
        (with(6, &[11, 0]), FrameError::Kind(11)),
        (with(8, &u32::MAX.to_le_bytes()), FrameError::Length { kind, length: u32::MAX }),
        (with(8, &1025u32.to_le_bytes()), FrameError::Length { kind, length: 1025 }),
        (with(12, &[9, 0]), FrameError::Descriptors { kind, found: 9, allowed: 8 }),
        (with(12, &[1, 0]), FrameError::Descriptors { kind, found: 0, allowed: 1 }),
        (with(14, &[0, 1]), FrameError::Reserved(0x100)),
    ];
    for (bytes, expected) in cases {
        let (ours, theirs) = pair();
        send(&theirs, &bytes, SendFlags::empty()).expect("sent");
        match FrameSocket::new(ours).reader.receive(Some(PATIENCE)) {
            Err(SocketError::Frame(error)) => assert_eq!(error, expected),
            other => panic!("{expected:?}: {other:?}"),
        }
    }
    let unexpected = frame::decode::<SidecarReport>(&good);
    assert_eq!(unexpected, Err(FrameError::Unexpected { wanted: Kind::SidecarReport, found: kind }));
    assert_eq!(frame::decode_body::<SidecarOrder>(kind, &[2, 0]), Err(FrameError::Trailing { kind, extra: 1 }));
    assert!(frame::decode_body::<SidecarOrder>(kind, &[]).is_err());
}

/// A list that claims more than its limit is refused at the claim; a list at its limit passes.
#[test]
fn lists_are_limited_before_they_are_allocated() {
    let report = |queues: usize| SidecarReport::Progress {
        queues: vec![QueueProgress { queue: QueueIndex(1), completed: 2, in_flight: 3 }; queues],
    };
    let full = frame::encode(&report(PROGRESS_QUEUES_MAX), 0).expect("fits");
    assert!(frame::decode::<SidecarReport>(&full).is_ok());
    let over = frame::encode(&report(PROGRESS_QUEUES_MAX + 1), 0).expect("fits");
    assert!(matches!(frame::decode::<SidecarReport>(&over), Err(FrameError::Body { .. })));
    // Progress, then a length of 2^63: ten bytes that claim more memory than there is.
    let claim = [2, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01];
    assert!(frame::decode_body::<SidecarReport>(Kind::SidecarReport, &claim).is_err());
}

/// Our own words are checked too: a log line is cut to what fits, one that was not is an error that names it.
#[test]
fn too_long_is_an_error_of_the_sender() {
    let long = "ä".repeat(TEXT_MAX);
    let cut = cut_text(&long);
    assert!(cut.len() <= TEXT_MAX && cut.len() + 2 > TEXT_MAX);
    let log = |text: &str| SidecarReport::Log { level: LogLevel::Info, text: text.to_owned() };
    assert!(frame::encode(&log(cut), 0).is_ok());
    let error = frame::encode(&log(&"x".repeat(16 << 10)), 0).expect_err("too long");
    assert!(error.to_string().starts_with("SidecarReport::Log takes 16"), "{error}");
    assert!(matches!(frame::encode(&log(""), 1), Err(FrameError::Descriptors { .. })));
}

/// Descriptors travel with the frame that they belong to, even when frames without any follow and precede it in one
/// stretch of the stream; they arrive close-on-exec. A frame with more than it says is refused, and nothing leaks.
#[test]
fn descriptors_stay_with_their_frame() {
    let (ours, theirs) = pair();
    let (mut ours, mut theirs) = (FrameSocket::new(ours), FrameSocket::new(theirs));
    let (probe, kept) = pair();
    let order = |nonce| SidecarOrder::Ping { nonce };
    theirs.writer.send(&order(1), &[], PATIENCE).expect("sent");
    theirs.writer.send(&order(2), &[kept.as_fd(), kept.as_fd()], PATIENCE).expect("sent");
    theirs.writer.send(&order(3), &[], PATIENCE).expect("sent");
    theirs.writer.send(&order(4), &[kept.as_fd()], PATIENCE).expect("sent");
    drop(kept);
    let mut counts = Vec::new();
    for nonce in 1..=4 {
        let frame = ours.reader.receive(Some(PATIENCE)).expect("a frame");
        assert_eq!(frame.decode::<SidecarOrder>(), Ok(order(nonce)));
        for fd in &frame.descriptors {
            assert!(rustix::io::fcntl_getfd(fd).expect("open").contains(rustix::io::FdFlags::CLOEXEC));
        }
        counts.push(frame.descriptors.len());
    }
    assert_eq!(counts, [0, 2, 0, 1]);
    let mut byte = [0];
    assert_eq!(rustix::io::read(&probe, &mut byte).expect("the last copy is closed"), 0);
}

/// Waits end: on time when nothing comes, at once when the peer hangs up or is made to, and a half frame is no end.
#[test]
fn waits_end() {
    let (ours, theirs) = pair();
    let mut ours = FrameSocket::new(ours);
    let start = Instant::now();
    let wait = Duration::from_millis(30);
    assert!(matches!(ours.reader.receive(Some(wait)), Err(SocketError::Timeout(limit)) if limit == wait));
    assert!(start.elapsed() >= wait);
    // A peer that never reads: the writer gives up on time, and the torn stream is not written again.
    let mut torn = None;
    for _ in 0..100_000 {
        let sent = ours.writer.send(&SidecarOrder::Quiesce, &[], Duration::ZERO);
        if let Err(error) = sent {
            torn = Some(error);
            break;
        }
    }
    assert!(matches!(torn, Some(SocketError::Timeout(_))), "{torn:?}");
    let half = frame::encode(&SidecarOrder::Exit, 0).expect("fits");
    send(&theirs, &half[..9], SendFlags::empty()).expect("sent");
    assert!(matches!(ours.reader.receive(Some(wait)), Err(SocketError::Timeout(_))));
    drop(theirs);
    let cut = ours.reader.receive(None);
    assert!(matches!(cut, Err(SocketError::Cut | SocketError::Io(_))), "{cut:?}");
    let closed = ours.writer.send(&SidecarOrder::Exit, &[], wait).expect_err("nobody there");
    assert!(closed.is_hang_up(), "{closed}");

    let (ours, _theirs) = pair();
    let mut ours = FrameSocket::new(ours);
    let handle = ours.reader.hang_up_handle();
    let waiting = std::thread::spawn(move || ours.reader.receive(None));
    std::thread::sleep(Duration::from_millis(10));
    handle.hang_up();
    assert!(matches!(waiting.join().expect("no panic"), Err(SocketError::Closed)));
}

/// Ids print with what they are, so that a log line needs no legend.
#[test]
fn ids_say_what_they_are() {
    assert_eq!(format!("{} {} {}", DeviceId(3), QueueIndex(1), Generation(2)), "device3 queue1 generation 2");
    assert_eq!(Generation(u64::MAX).next(), Generation(u64::MAX), "never back to an old one");
}
