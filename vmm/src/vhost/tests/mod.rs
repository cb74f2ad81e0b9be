//! The front end against backends that do everything right, and everything wrong.

mod by_hand;
mod carrier;
mod events;
mod fake;
mod faults;
mod hostile;
mod mortal;
mod offers;
mod outages;
mod pauses;
mod unrecorded;
mod upgrades;

use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use atoll_devices::virtio::input_config::Pages;
use atoll_devices::virtio::{DeviceOffer, Intent, QueueConfig, VirtioFrontend};
use atoll_devices::{Answer, Deferred, MsiMessage, MsiSink, WireSink};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::config::{OnFailure, Track};
use crate::doorbell::{PassThrough, Path, Relay};
use crate::irq::{EventRoute, InterruptFabric, IrqError, VectorTable};
use crate::lifecycle::Story;
use crate::machine::layout::ram;
use crate::memory::GuestMemory;
use fake::{Character, Fakes, Life, Misdeed};

struct Fabric;
struct Route;

impl WireSink for Fabric {
    fn set_level(&self, _line: u32, _high: bool) {}
}
impl MsiSink for Fabric {
    fn fire(&self, _message: MsiMessage) {}
}
impl InterruptFabric for Fabric {
    fn connect(&self, _event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
        Ok(Box::new(Route))
    }
}
impl EventRoute for Route {
    fn set(&self, _message: Option<MsiMessage>) -> Result<(), IrqError> {
        Ok(())
    }
}

/// What the transport was told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Transport for Told {
    fn queue_used(&self, index: u16) {
        self.0.lock().unwrap().push(format!("used {index}"));
    }
    fn config_changed(&self, config: &[u8]) {
        self.0.lock().unwrap().push(format!("config {config:?}"));
    }
    fn needs_reset(&self) {
        self.0.lock().unwrap().push("needs reset".into());
    }
    fn ask_unplug(&self) {
        self.0.lock().unwrap().push("unplug".into());
    }
}

/// A device of two queues with a small configuration.
struct Plain;

impl DeviceClass for Plain {
    fn device_type(&self) -> u16 {
        2
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Needed(16)
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        Ok(DeviceOffer {
            device_type: 2,
            features: backend.features,
            queue_sizes: vec![64; usize::from(backend.queues.unwrap_or(1).min(2))],
            config: backend.config.clone(),
            pages: Pages::default(),
        })
    }
}

struct Rig {
    device: VhostDevice,
    frontend: VhostFrontend,
    vectors: Arc<VectorTable>,
    told: Arc<Told>,
    lives: Receiver<Life>,
    memory: GuestMemory,
}

fn limits() -> Limits {
    Limits {
        probation: Duration::from_millis(100),
        trial: Duration::from_secs(10),
        start: Duration::from_secs(5),
        step: Duration::from_millis(200),
        drain: Duration::from_millis(200),
        fence: Duration::from_millis(300),
    }
}

fn parts(characters: Vec<Character>) -> (DeviceParts, Receiver<Life>) {
    let (source, lives) = Fakes::new(characters);
    let parts = DeviceParts {
        name: "disk0".into(),
        class: Box::new(Plain),
        source: Box::new(source),
        memory: GuestMemory::new(&ram(16 << 20).unwrap()).unwrap(),
        relay: Relay::new().unwrap(),
        limits: limits(),
        story: Story::default(),
        meter: None,
        on_failure: OnFailure::default(),
        track: Track::default(),
        care: Care::default(),
        iommu: false,
        isolation: Default::default(),
        joint: None,
        clock: DeviceParts::real_time(),
    };
    (parts, lives)
}

fn rig(characters: Vec<Character>) -> Rig {
    let (parts, lives) = parts(characters);
    rig_of(parts, lives)
}

fn rig_of(parts: DeviceParts, lives: Receiver<Life>) -> Rig {
    let memory = parts.memory.clone();
    let connected = VhostDevice::connect(parts).unwrap();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let told = Arc::new(Told::default());
    let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&told) as _).unwrap();
    Rig { device, frontend, vectors, told, lives, memory }
}

/// Ring `index` of 64 at 1 MiB and 2 MiB.
fn queue(index: u16) -> QueueConfig {
    let base = (u64::from(index) + 1) << 20;
    QueueConfig {
        index,
        size: 64,
        descriptor_table: base,
        available_ring: base + 0x1000,
        used_ring: base + 0x2000,
        vector: Some(index),
    }
}

fn activate() -> Intent {
    let features = (1 << 32) | (1 << 29);
    Intent::Activate { features, queues: vec![queue(0), queue(1)], config_vector: Some(2) }
}

/// Waits like a vCPU; `None` when nobody will ever answer.
fn wait(answer: Answer) -> Option<u64> {
    let Answer::Later(mut deferred) = answer else { return Some(0) };
    poll_until(&mut deferred, Duration::from_secs(20)).expect("no answer in time")
}

fn poll_until(deferred: &mut Deferred, limit: Duration) -> Option<Option<u64>> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Poll::Ready(value) = Pin::new(&mut *deferred).poll(&mut Context::from_waker(Waker::noop())) {
            return Some(value);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

fn await_state(device: &VhostDevice, wanted: impl Fn(&DeviceState) -> bool) -> DeviceStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = device.status();
        if wanted(&status.state) {
            return status;
        }
        assert!(Instant::now() < deadline, "stays {status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn set_indices(memory: &GuestMemory, index: u16, available: u16, used: u16) {
    let queue = queue(index);
    let memory = memory.mapped();
    memory.write_obj(available, GuestAddress(queue.available_ring + 2)).unwrap();
    memory.write_obj(used, GuestAddress(queue.used_ring + 2)).unwrap();
}

impl Rig {
    fn set_indices(&self, index: u16, available: u16, used: u16) {
        set_indices(&self.memory, index, available, used);
    }
}

const HANDSHAKE: [&str; 7] = [
    "SET_OWNER",
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    // MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD
    "SET_PROTOCOL_FEATURES 0x1209",
    "GET_QUEUE_NUM",
    "GET_CONFIG 0 16",
    // VERSION_1, PROTOCOL_FEATURES, EVENT_IDX
    "SET_FEATURES 0x160000000",
];

fn rings(bases: [u16; 2]) -> Vec<String> {
    let mut log = Vec::new();
    for (index, base) in bases.into_iter().enumerate() {
        let ring = ((index as u64 + 1) << 20) + (1 << 52);
        log.push(format!("SET_VRING_NUM {index} 64"));
        log.push(format!("SET_VRING_BASE {index} {base}"));
        log.push(format!("SET_VRING_ADDR {index} {ring:#x} {:#x} {:#x}", ring + 0x1000, ring + 0x2000));
        log.push(format!("SET_VRING_CALL {index}"));
        log.push(format!("SET_VRING_ERR {index}"));
        log.push(format!("SET_VRING_KICK {index}"));
        log.push(format!("SET_VRING_ENABLE {index} 1"));
    }
    log
}

fn started(question: bool, bases: [u16; 2]) -> Vec<String> {
    let mut log: Vec<String> = HANDSHAKE.iter().map(|&message| message.to_owned()).collect();
    log.push("SET_MEM_TABLE 0x0=0x10000000000000+0x1000000@0x0".into());
    if question {
        log.push("GET_INFLIGHT_FD 2 64".into());
    }
    log.push("SET_INFLIGHT_FD 2 64 2176".into());
    log.extend(rings(bases));
    log
}

/// The whole of a device's life, message by message: features, memory table, then each ring's NUM, BASE, ADDR, CALL, ERR,
/// KICK, ENABLE; stopped by GET_VRING_BASE and by nothing before it; started again from zero with a cleared record.
#[test]
fn messages_come_in_order() {
    let mut rig = rig(vec![Character::default()]);
    assert_eq!(rig.device.status().state, DeviceState::Idle);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let life = rig.lives.recv().unwrap();
    let mut expected = started(true, [0, 0]);
    assert_eq!(life.log(), expected);
    assert_eq!(rig.device.status().state, DeviceState::Running);

    // What the backend writes into its record does not outlive the driver's reset.
    rustix::io::pwrite(life.seen.lock().unwrap().inflight.as_ref().unwrap(), &[1; 64], 64).unwrap();
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));
    expected.extend(["GET_VRING_BASE 0".to_owned(), "GET_VRING_BASE 1".to_owned()]);
    assert_eq!(life.log(), expected);
    let mut record = [1; 64];
    rustix::io::pread(life.seen.lock().unwrap().inflight.as_ref().unwrap(), &mut record, 64).unwrap();
    assert_eq!(record, [0; 64]);

    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    expected.extend(started(false, [0, 0]).split_off(6));
    assert_eq!(life.log(), expected);

    let _ = rig.frontend.intent(Intent::ConfigWrite { offset: 4, data: vec![9] });
    life.await_message("SET_CONFIG 4 [9]");
    rig.device.stop(Instant::now() + Duration::from_secs(5));
    expected.push("SET_CONFIG 4 [9]".into());
    expected.extend(["GET_VRING_BASE 0".to_owned(), "GET_VRING_BASE 1".to_owned()]);
    assert_eq!(life.log(), expected);
    assert_eq!(rig.device.status().state, DeviceState::Stopped);
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), None, "a stopped device answers nothing");
}

fn connect_with(character: Character) -> ConversationError {
    let (parts, _lives) = parts(vec![character]);
    match VhostDevice::connect(parts) {
        Err(ConnectError::Conversation { source, .. }) => source,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("connected"),
    }
}

fn spoiled(at: &str, misdeed: Misdeed) -> Character {
    Character { misdeed: Some((at.to_owned(), misdeed)), ..Character::default() }
}

/// A backend that dies, falls silent or says no at each step of the handshake: a typed error that names the step, within
/// the step's time.
#[test]
fn handshake_fails_in_words() {
    for message in &HANDSHAKE[..6] {
        let name = message.split(' ').next().unwrap();
        for misdeed in [Misdeed::Die, Misdeed::DieHalfway] {
            let error = connect_with(spoiled(message, misdeed));
            // A message that has no answer is followed by one that finds the socket closed.
            assert!(matches!(error, ConversationError::Gone { .. }), "{name}, {misdeed:?}: {error}");
            assert!(error.is_gone());
        }
        let began = Instant::now();
        let error = connect_with(spoiled(message, Misdeed::Silence));
        assert!(matches!(error, ConversationError::Silent { .. }), "{name}: {error}");
        assert!(began.elapsed() >= Duration::from_millis(200), "{name}");
    }
    let error = connect_with(spoiled("GET_CONFIG", Misdeed::Refuse));
    assert!(matches!(error, ConversationError::Refused { step: Step::GetConfig }), "{error}");
    assert_eq!(error.to_string(), "the backend refused GET_CONFIG");
    let error = connect_with(spoiled("GET_FEATURES", Misdeed::Silence));
    assert!(error.to_string().starts_with("the backend did not answer GET_FEATURES within 200 ms"), "{error}");
}

/// Answers that cannot be right, and features that are missing, are named.
#[test]
fn absurd_answers_are_named() {
    let plain = Character::default;
    let cases: [(Character, &str); 6] = [
        (Character { features: 1 << 30, ..plain() }, "lacks VIRTIO_F_VERSION_1"),
        (Character { features: 0, ..plain() }, "lacks VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1"),
        (Character { protocol: vhost::vhost_user::VhostUserProtocolFeatures::MQ, ..plain() }, "lacks CONFIG"),
        (Character { queues: 0, ..plain() }, "no queue at all"),
        (Character { queues: 1 << 40, ..plain() }, "GET_QUEUE_NUM cannot be right"),
        (Character { config: vec![0; 3], ..plain() }, "refused GET_CONFIG"),
    ];
    // The crate that the fakes stand on sends no wrong lengths, so these are written by hand.
    for (answer, expected) in [
        ([24, 5, 12 + 16, 0, 17, 0], "17 bytes (16 present) from 0"),
        ([24, 5, 12 + 15, 0, 16, 0], "16 bytes (15 present) from 0"),
        ([24, 5, 12 + 16, 4, 16, 0], "16 bytes (16 present) from 4"),
        ([24, 5, u32::MAX, 0, 16, 0], "a message of 4294967295 bytes"),
        ([24, 5, 4, 0, 16, 0], "a message of 4 bytes"),
        ([25, 5, 28, 0, 16, 0], "a header of request 25"),
        ([24, 1, 28, 0, 16, 0], "with flags 0x1"),
    ] {
        let (front, mut back) = UnixStream::pair().unwrap();
        let mut bytes: Vec<u8> = answer.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        bytes.resize(24 + 16, 0);
        back.write_all(&bytes).unwrap();
        let error = config_space::read(&front, 16).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    for (character, expected) in cases {
        let error = connect_with(character.clone());
        assert!(error.to_string().contains(expected), "{character:?}: {error}");
        assert!(!error.is_gone(), "{error}");
    }
}

/// Whatever a backend does while the rings are handed over, the driver's DRIVER_OK completes (its requests wait in their
/// rings until a better one has come); the half-done negotiation is repeated from its first message.
#[test]
fn half_done_start_is_repeated_as_a_whole() {
    let all = started(true, [0, 0]);
    for message in &all[6..] {
        for misdeed in [Misdeed::Die, Misdeed::Silence] {
            let mut rig = rig(vec![spoiled(message, misdeed), Character::default()]);
            assert_eq!(wait(rig.frontend.intent(activate())), Some(0), "{message}, {misdeed:?}");
            let first = rig.lives.recv().unwrap();
            let second = rig.lives.recv().unwrap();
            second.await_message("SET_VRING_ENABLE 1");
            assert_eq!(first.log().last(), Some(message), "{misdeed:?}");
            // Where the record's size was known already it is not asked again.
            let log = second.log();
            assert!(log == all || log == started(false, [0, 0]), "{message}, {misdeed:?}: {log:?}");
            let status = await_state(&rig.device, |state| *state == DeviceState::Running);
            assert_eq!((status.generation, status.lost), (2, 1));
        }
    }
}

/// A backend that says no to the rings is not asked again: the driver is told that the device needs a reset, and a reset
/// leads back. Its vCPU is kept waiting for none of it.
#[test]
fn refusal_quarantines_until_reset() {
    let mut rig = rig(vec![spoiled("SET_VRING_ADDR 1", Misdeed::Refuse), Character::default()]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let status = rig.device.status();
    assert_eq!(status.state, DeviceState::Quarantined { why: "the backend refused SET_VRING_ADDR of ring 1".into() });
    assert_eq!(*rig.told.0.lock().unwrap(), ["needs reset"]);
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    await_state(&rig.device, |state| *state == DeviceState::Running);
}

/// The backend dies under load. Its successor gets the same record of requests in flight, starts each ring from its used
/// index, and every ring is kicked and called once. Kicks given meanwhile are there.
#[test]
fn successor_takes_over() {
    let mut rig = rig(vec![Character::default()]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let first = rig.lives.recv().unwrap();
    first.await_kick(0);
    first.await_kick(1);
    rustix::io::pwrite(first.seen.lock().unwrap().inflight.as_ref().unwrap(), b"three in flight", 100).unwrap();
    rig.set_indices(0, 40_008, 40_005);
    rig.set_indices(1, 2, 2);
    first.die();
    rig.frontend.notify(0);

    let second = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 1");
    let status = await_state(&rig.device, |state| *state == DeviceState::Running);
    assert_eq!((status.generation, status.lost, status.recovery), (2, 1, Recovery::Full));
    assert_eq!(second.log(), started(false, [40_005, 2]));
    let mut record = [0; 15];
    rustix::io::pread(second.seen.lock().unwrap().inflight.as_ref().unwrap(), &mut record, 100).unwrap();
    assert_eq!(&record, b"three in flight");
    assert!(second.await_kick(0) >= 2, "the guest's own kick and the front end's");
    assert_eq!(second.await_kick(1), 1);
    for vector in [0, 1] {
        assert_eq!(rig.vectors.eventfd(vector).unwrap().read().unwrap(), 1, "ring {vector} was called once");
    }
}

/// A backend without a record of requests in flight: nothing is lost as long as nothing was under way; otherwise nobody
/// can know what was done, and the device says so instead of doing requests twice or never.
#[test]
fn without_a_record_only_idle_rings_recover() {
    let protocol = vhost::vhost_user::VhostUserProtocolFeatures::CONFIG;
    let mut rig = rig(vec![Character { protocol, ..Character::default() }]);
    let queue_0 = Intent::Activate { features: 1 << 32, queues: vec![queue(0)], config_vector: None };
    assert_eq!(rig.device.status().recovery, Recovery::IdleOnly);
    assert_eq!(wait(rig.frontend.intent(queue_0.clone())), Some(0));
    rig.set_indices(0, 7, 7);
    rig.lives.recv().unwrap().die();
    let second = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 0");
    assert!(second.log().contains(&"SET_VRING_BASE 0 7".to_owned()));
    rig.set_indices(0, 9, 7);
    second.die();
    let status = await_state(&rig.device, |state| matches!(state, DeviceState::Quarantined { .. }));
    let DeviceState::Quarantined { why } = status.state else { unreachable!() };
    assert!(why.contains("unfinished requests in queue 0"), "{why}");
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));
    assert_eq!(wait(rig.frontend.intent(queue_0)), Some(0));
}

/// A successor that offers less than the guest was shown is not taken, and the missing bit is named; one that offers more
/// is, and nothing of the surplus reaches the driver.
#[test]
fn successor_must_offer_what_was_shown() {
    let less = Character { features: (1 << 32) | (1 << 30) | (1 << 29), ..Character::default() };
    let other_config = Character { config: vec![8; 16], ..Character::default() };
    let one_queue = Character { queues: 1, ..Character::default() };
    let no_record =
        Character { protocol: vhost::vhost_user::VhostUserProtocolFeatures::CONFIG, queues: 1, ..Character::default() };
    let cases = [
        (less, "lacks VIRTIO_BLK_F_FLUSH"),
        (other_config, "lacks the capacity that the guest was shown"),
        (one_queue, "lacks 2 queues (it has 1)"),
        (no_record, "lacks MQ, INFLIGHT_SHMFD"),
    ];
    for (character, expected) in cases {
        let mut rig = rig(vec![Character::default(), character]);
        assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
        rig.lives.recv().unwrap().die();
        let status = await_state(&rig.device, |state| matches!(state, DeviceState::Quarantined { .. }));
        let DeviceState::Quarantined { why } = status.state else { unreachable!() };
        assert!(why.contains(expected), "{why}");
    }
    let more = Character { features: u64::MAX, queues: 9, ..Character::default() };
    let mut rig = rig(vec![Character::default(), more]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    rig.lives.recv().unwrap().die();
    let second = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 1");
    assert!(second.log().contains(&"SET_FEATURES 0x160000000".to_owned()));
}

/// A guest that resets the device while its backend is dead, or that never finishes what it was asked, is not kept
/// waiting: the reset is done when a successor is there, or when the wait for one has an end.
#[test]
fn reset_does_not_wait_for_the_dead() {
    let mut rig = rig(vec![spoiled("GET_VRING_BASE 1", Misdeed::Silence), Character::default()]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));
    let status = await_state(&rig.device, |state| *state == DeviceState::Idle);
    assert_eq!(status.lost, 1);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));

    let began = Instant::now();
    let mut alone = rig_of_dying();
    await_state(&alone.device, |state| matches!(state, DeviceState::Recovering { .. }));
    assert_eq!(wait(alone.frontend.intent(Intent::Reset)), Some(0));
    assert!(began.elapsed() >= Duration::from_millis(300));
}

/// A backend that was stopped with the rings in its hands keeps neither a reset nor the end of the machine waiting for as
/// long as a drain may take: a guest that switched itself off waited ten seconds for it.
#[test]
fn a_stuck_backend_is_not_drained_for_long() {
    let (mut parts, _lives) = parts(vec![spoiled("GET_VRING_BASE 0", Misdeed::Silence)]);
    parts.limits.drain = Duration::from_secs(60);
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let connected = VhostDevice::connect(parts).unwrap();
    let (mut device, mut frontend) = connected.attach(vectors, Arc::<Told>::default() as _).unwrap();
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    assert_eq!(wait(frontend.intent(Intent::Reset)), Some(0));
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    let began = Instant::now();
    device.stop(began + Duration::from_secs(60));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

/// A machine that ends does not wait for a backend that is slow to greet: only what it was given back matters.
#[test]
fn stopping_waits_for_nobody() {
    let (mut parts, lives) = parts(vec![Character::default(), spoiled("GET_FEATURES", Misdeed::Silence)]);
    parts.limits = Limits::default();
    let connected = VhostDevice::connect(parts).unwrap();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let (mut device, mut frontend) = connected.attach(vectors, Arc::new(Told::default())).unwrap();
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    lives.recv().unwrap().die();
    lives.recv_timeout(Duration::from_secs(20)).unwrap().await_message("GET_FEATURES");
    let began = Instant::now();
    device.stop(Instant::now() + Duration::from_secs(5));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(device.status().state, DeviceState::Stopped);
}

/// One good backend, and then only such as die at once.
fn rig_of_dying() -> Rig {
    let mut rig = rig(vec![Character::default(), spoiled("SET_OWNER", Misdeed::Die)]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    rig.lives.recv().unwrap().die();
    rig
}

/// Calls through the relay and straight, switched while a backend never stops calling: the guest hears each of them.
#[test]
fn switching_calls_loses_none() {
    let mut rig = rig(vec![Character::default()]);
    assert!(matches!(rig.device.interpose_calls(0, None), Err(SwitchError::NotRunning(0))));
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let life = Arc::new(rig.lives.recv().unwrap());
    let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let backend = {
        let (life, ended) = (Arc::clone(&life), Arc::clone(&ended));
        std::thread::spawn(move || {
            let mut calls = 0_u64;
            loop {
                life.call(0);
                calls += 1;
                if ended.load(std::sync::atomic::Ordering::Relaxed) {
                    return calls;
                }
            }
        })
    };
    for _ in 0..20 {
        rig.device.interpose_calls(0, Some(Arc::new(PassThrough))).unwrap();
        assert!(rig.device.calls_counted(0).is_some());
        rig.device.interpose_calls(0, None).unwrap();
        assert_eq!(rig.device.calls_counted(0), None);
    }
    ended.store(true, std::sync::atomic::Ordering::Relaxed);
    let calls = backend.join().unwrap();
    assert_eq!(rig.vectors.eventfd(0).unwrap().read().unwrap(), calls);

    let bell = &rig.device.doorbells()[1];
    bell.interpose(Arc::new(PassThrough)).unwrap();
    assert_eq!(bell.path(), Path::Interposed);
    life.await_kick(1);
    rig.frontend.notify(1);
    assert_eq!(life.await_kick(1), 1);
    rig.frontend.notify(99);
}

/// A driver that uses no MSI-X is interrupted by the transport's pin; one that puts a ring outside of RAM stops itself.
#[test]
fn pins_and_bad_rings() {
    let mut rig = rig(vec![Character::default()]);
    let mut without_vector = queue(0);
    without_vector.vector = None;
    let intent = |queue| Intent::Activate { features: 1 << 32, queues: vec![queue], config_vector: None };
    assert_eq!(wait(rig.frontend.intent(intent(without_vector))), Some(0));
    rig.lives.recv().unwrap().call(0);
    let deadline = Instant::now() + Duration::from_secs(20);
    while rig.told.0.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "no pin interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(*rig.told.0.lock().unwrap(), ["used 0"]);
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));

    for (field, address) in [(0, 0x100_0000), (1, u64::MAX - 1), (2, (16 << 20) - 8)] {
        let mut outside = queue(0);
        *[&mut outside.descriptor_table, &mut outside.available_ring, &mut outside.used_ring][field] = address;
        assert_eq!(wait(rig.frontend.intent(intent(outside))), None);
    }
    assert_eq!(rig.told.0.lock().unwrap().len(), 4);
    assert_eq!(rig.device.status().lost, 0, "the backend was not bothered with it");
}

/// A backend of an earlier age, by hand: one ring, no REPLY_ACK. Messages 3 (SET_OWNER), 2 (SET_FEATURES) and their kin
/// have no answer there, so none may be asked for; the start ends with a question, which shows that all was read.
#[test]
fn backend_without_acknowledgements() {
    let (front, back) = UnixStream::pair().unwrap();
    let backend = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut header = [0; 12];
        while (&back).read_exact(&mut header).is_ok() {
            let [request, flags, size] = [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
            let mut body = vec![0; size as usize];
            (&back).read_exact(&mut body).unwrap();
            assert_eq!(flags, 1, "message {request} asks for an answer that nobody will give");
            seen.push(request);
            let answer: Option<Vec<u8>> = match request {
                1 => Some(((1_u64 << 32) | (1 << 30)).to_le_bytes().into()),
                15 => Some((1_u64 << 9).to_le_bytes().into()),
                24 | 11 => Some(body),
                _ => None,
            };
            if let Some(body) = answer {
                let mut message = Vec::new();
                for word in [request, 5, body.len() as u32] {
                    message.extend(word.to_le_bytes());
                }
                message.extend(body);
                (&back).write_all(&message).unwrap();
            }
        }
        seen
    });
    let (mut parts, _lives) = parts(vec![Character::default()]);
    parts.source = Box::new(Once(Some(front)));
    let connected = VhostDevice::connect(parts).unwrap();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let (mut device, mut frontend) = connected.attach(vectors, Arc::new(Told::default())).unwrap();
    let intent = Intent::Activate { features: 1 << 32, queues: vec![queue(0)], config_vector: None };
    assert_eq!(wait(frontend.intent(intent)), Some(0));
    device.interpose_calls(0, Some(Arc::new(PassThrough))).unwrap();
    device.stop(Instant::now() + Duration::from_secs(5));
    drop(device);
    let handshake = [3, 1, 15, 16, 24];
    let start = [2, 5, 8, 10, 9, 13, 14, 12, 18, 1];
    let switch_and_stop = [13, 1, 11];
    assert_eq!(backend.join().unwrap(), [&handshake[..], &start, &switch_and_stop].concat());
}

/// A single connection.
struct Once(Option<UnixStream>);

impl BackendSource for Once {
    fn connect(&mut self, _generation: u64, _patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let gone = || SourceError::Start { hopeless: false, source: "there is no second one".into() };
        Ok(Incarnation { socket: self.0.take().ok_or_else(gone)?, process: None })
    }
    fn describe(&self) -> String {
        "a backend by hand".into()
    }
}
