//! Backends that lie: about lengths, ids and indices, with answers to what was not asked and descriptors that nobody
//! wants, and in floods. The device names the lie or waits for its successor; nothing hangs and nothing is kept.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::by_hand::{GET_VRING_BASE, Hand, Hands, Held, SET_VRING_NUM};
use super::*;

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;

/// What is done to a true answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lie {
    /// It answers another request.
    OtherRequest,
    /// It is no answer.
    NoReply,
    /// It is of no version.
    NoVersion,
    /// It says that it is this long.
    Long(u32),
    /// All of its body is this byte.
    Body(u8),
    /// It comes twice.
    Twice,
    /// It ends in the middle of its header, and nothing follows.
    HalfHeader,
    /// It ends in the middle of its body, and nothing follows.
    HalfBody,
    /// Something comes before it.
    Noise,
    /// It has descriptors with it.
    Descriptors,
    /// There is none, and no end either.
    Silence,
}

const LIES: [Lie; 15] = [
    Lie::OtherRequest,
    Lie::NoReply,
    Lie::NoVersion,
    Lie::Long(0),
    Lie::Long(3),
    Lie::Long(4097),
    Lie::Long(u32::MAX),
    Lie::Body(0),
    Lie::Body(0xff),
    Lie::Twice,
    Lie::HalfHeader,
    Lie::HalfBody,
    Lie::Noise,
    Lie::Descriptors,
    Lie::Silence,
];

impl Lie {
    /// Answers with it.
    pub(super) fn tell(self, socket: &UnixStream, mut message: Vec<u8>) {
        match self {
            Self::OtherRequest => message[0] ^= 0x40,
            Self::NoReply => message[4] &= !4,
            Self::NoVersion => message[4] &= !3,
            Self::Long(size) => message[8..12].copy_from_slice(&size.to_le_bytes()),
            Self::Body(byte) => message[12..].fill(byte),
            Self::Twice => message.extend(message.clone()),
            Self::HalfHeader => message.truncate(7),
            Self::HalfBody => message.truncate(12 + (message.len() - 12) / 2),
            Self::Noise => message.insert(0, 0x5a),
            Self::Descriptors => return with_descriptors(socket, &message),
            Self::Silence => message.clear(),
        }
        let mut stream = socket;
        let _ = stream.write_all(&message);
    }
}

/// Sends it with the write ends of a pipe; their reader must see its end.
fn with_descriptors(socket: &UnixStream, message: &[u8]) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let fds = [writer.as_fd(); 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL);
    drop(writer);
    if sent.is_ok() {
        KEPT.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            // Until the last copy is closed.
            let _ = reader.read(&mut [0]);
            KEPT.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

/// Pipes whose write ends somebody still has.
static KEPT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

fn honest() -> Hand {
    let hand = Hand::default();
    *hand.config.lock().unwrap() = vec![7; 16];
    hand
}

fn liars(hands: Vec<Hand>) -> (VhostDevice, VhostFrontend, Receiver<Held>) {
    let (source, held) = Hands::of(hands);
    let (parts, _) = parts(vec![Character::default()]);
    let connected = VhostDevice::connect(DeviceParts { source: Box::new(source), ..parts }).unwrap();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let (device, frontend) = connected.attach(vectors, Arc::new(Told::default())).unwrap();
    (device, frontend, held)
}

fn restart(frontend: &mut VhostFrontend, what: &str) {
    assert_eq!(wait(frontend.intent(Intent::Reset)), Some(0), "{what}");
    assert_eq!(wait(frontend.intent(activate())), Some(0), "{what}");
}

/// Each answer, told wrong in each way by the second incarnation: the third, which is honest, serves the driver at the
/// latest when it has reset the device. Descriptors that came along are closed.
#[test]
fn no_lie_lasts() {
    let requests = [GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG, SET_VRING_NUM, GET_VRING_BASE];
    let cases: Vec<(u32, Lie)> =
        requests.into_iter().flat_map(|request| LIES.into_iter().map(move |lie| (request, lie))).collect();
    // Much of the time is waiting for a step's end: side by side.
    std::thread::scope(|scope| {
        for part in cases.chunks(cases.len().div_ceil(10)) {
            scope.spawn(move || part.iter().for_each(|(request, lie)| endure(*request, *lie)));
        }
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while KEPT.load(Ordering::SeqCst) > 0 {
        assert!(Instant::now() < deadline, "{} descriptors are kept", KEPT.load(Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn endure(request: u32, lie: Lie) {
    let what = format!("{lie:?} as answer to request {request}");
    let (device, mut frontend, held) = liars(vec![honest(), Hand { lie: Some((request, lie)), ..honest() }, honest()]);
    assert_eq!(wait(frontend.intent(activate())), Some(0), "{what}");
    held.recv().unwrap().die();
    let second = held.recv_timeout(Duration::from_secs(20)).expect(&what);
    second.await_count(1, 1);
    // One that is believed is asked for its rings by the first reset; a driver that meets a device which is given up by
    // then resets it once more.
    restart(&mut frontend, &what);
    await_state(&device, |state| matches!(state, DeviceState::Running | DeviceState::Quarantined { .. }));
    restart(&mut frontend, &what);
    await_state(&device, |state| *state == DeviceState::Running);
}

/// The device writes where its index of completions is, and a hostile one writes there what it likes: beyond what the
/// driver made available, backwards, anything. Its successor is told that number and the operator sees no more requests
/// than a ring can hold.
#[test]
fn used_indices_mislead_nobody() {
    let mut rig = rig(vec![Character::default()]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let mut life = rig.lives.recv().unwrap();
    for (available, used) in [(10, 11), (10, 60_000), (0, 1), (65_535, 0), (5, 70), (40_000, 39_999), (7, 7)] {
        rig.set_indices(0, available, used);
        let reports = rig.device.queues();
        assert!(reports.iter().all(|queue| queue.in_flight <= queue.size), "{available}, {used}: {reports:?}");
        life.die();
        life = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
        life.await_message("SET_VRING_ENABLE 1");
        await_state(&rig.device, |state| *state == DeviceState::Running);
        assert!(life.log().contains(&format!("SET_VRING_BASE 0 {used}")), "{:?}", life.log());
    }
}

/// A backend that says without end that its configuration has changed, and calls without end: the driver's wishes are
/// carried out all the same.
#[test]
fn floods_keep_nobody_waiting() {
    let (_device, mut frontend, held) = liars(vec![honest()]);
    let held = held.recv().unwrap();
    let requests = held.requests.recv_timeout(Duration::from_secs(20)).unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let flood = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            requests.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
            let message = [2_u32, 1, 0].map(u32::to_le_bytes).concat().repeat(300);
            let mut sent = 0_u64;
            while !ended.load(Ordering::Relaxed) {
                sent += u64::from((&requests).write_all(&message).is_ok());
            }
            sent
        }
    });
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(wait(frontend.intent(activate())), Some(0));
        assert_eq!(wait(frontend.intent(Intent::Reset)), Some(0));
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    ended.store(true, Ordering::Relaxed);
    assert!(flood.join().unwrap() > 0);
}
