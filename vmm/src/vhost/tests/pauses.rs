//! Pauses, new boards, and configurations that change while a driver runs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use atoll_devices::virtio::{Intent, VirtioFrontend};

use super::by_hand::{GET_VRING_BASE, Hand, Hands, Held, SET_FEATURES, SET_VRING_BASE, SET_VRING_NUM};
use super::{Fabric, Told, activate, await_state, limits, parts, queue, rig_of_dying, wait};
use crate::config::NetConfig;
use crate::doorbell::Relay;
use crate::irq::VectorTable;
use crate::lifecycle::{Heard, Story};
use crate::machine::layout::ram;
use crate::memory::GuestMemory;
use crate::vhost::kinds::{Kind, Net};
use crate::vhost::tests::fake::Character;
use crate::vhost::{Care, Connected, DeviceParts, DeviceState, PauseError, VhostDevice, VhostFrontend};

/// A network card behind a backend by hand.
struct Card {
    device: VhostDevice,
    frontend: VhostFrontend,
    told: Arc<Told>,
    backends: Receiver<Held>,
    story: Story,
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn attach(connected: Connected) -> (VhostDevice, VhostFrontend, Arc<Told>) {
    let told = Arc::new(Told::default());
    let vectors = Arc::new(VectorTable::new(&Fabric, 4).unwrap());
    let (device, frontend) = connected.attach(vectors, Arc::clone(&told) as _).unwrap();
    (device, frontend, told)
}

fn memory() -> GuestMemory {
    GuestMemory::new(&ram(16 << 20).unwrap()).unwrap()
}

/// MAC, status, pairs, MTU.
fn config(mac: u8, status: u8) -> Vec<u8> {
    [[mac; 6].as_slice(), &[status, 0], &[1, 0], &[0, 0]].concat()
}

impl Card {
    fn new(hand: Hand) -> Self {
        let (source, backends) = Hands::new(hand);
        let (vhost_user, vhost_socket) = (true, Some("/s".into()));
        let words =
            NetConfig { mac: Some("52:54:00:00:00:01".into()), vhost_user, vhost_socket, ..NetConfig::default() };
        let net = Net::new(&words, "vm", "_net0", std::path::Path::new("/run")).unwrap();
        let story = Story::default();
        let parts = DeviceParts {
            name: "_net0".into(),
            class: net.class(),
            source: Box::new(source),
            memory: memory(),
            relay: Relay::new().unwrap(),
            limits: limits(),
            story: story.clone(),
            meter: None,
            on_failure: crate::config::OnFailure::default(),
            track: crate::config::Track::default(),
            care: Care::default(),
            iommu: false,
            isolation: Default::default(),
            joint: None,
            clock: DeviceParts::real_time(),
        };
        let (device, frontend, told) = attach(VhostDevice::connect(parts).unwrap());
        Self { device, frontend, told, backends, story }
    }
    fn backend(&self) -> Held {
        self.backends.recv_timeout(Duration::from_secs(20)).unwrap()
    }
    fn await_told(&self, count: usize) -> Vec<String> {
        let deadline = soon();
        loop {
            let told = self.told.0.lock().unwrap().clone();
            if told.len() >= count {
                return told;
            }
            assert!(Instant::now() < deadline, "only {told:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn plain() -> Hand {
    let hand = Hand::default();
    *hand.config.lock().unwrap() = config(7, 1);
    Hand { features: hand.features | 1 << 16, ..hand }
}

/// The driver's rings, without MSI-X to spare vectors.
fn run() -> Intent {
    Intent::Activate {
        features: (1 << 32) | (1 << 16) | (1 << 5),
        queues: vec![queue(0), queue(1)],
        config_vector: None,
    }
}

/// Tells the front end that the configuration has changed, and waits for its answer.
fn tell_change(mut channel: &UnixStream) {
    channel.write_all(&[2, 9, 0].map(u32::to_le_bytes).concat()).unwrap();
    let mut answer = [0; 20];
    channel.read_exact(&mut answer).unwrap();
    assert_eq!(answer[12..], [0; 8]);
}

/// The backend of a network card lets its link go down: the driver hears it. That the card now has another address cannot
/// be; the driver goes on with the one it was shown, which the backend never knew.
#[test]
fn changed_configuration_reaches_the_driver() {
    let hand = plain();
    let mut card = Card::new(hand.clone());
    let backend = card.backend();
    assert_eq!(wait(card.frontend.intent(run())), Some(0));
    // The address is the front end's: the backend is not told of a bit that it does not have.
    let accepted = backend.bodies(SET_FEATURES).pop().unwrap();
    assert_eq!(accepted, ((1_u64 << 32) | (1 << 30) | (1 << 16)).to_le_bytes());
    let channel = backend.requests.recv().unwrap();
    *hand.config.lock().unwrap() = config(9, 0);
    tell_change(&channel);
    assert_eq!(card.await_told(1), ["config [82, 84, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]"]);
    // Nothing new: the driver is left in peace.
    tell_change(&channel);
    // Many changes between two looks are one.
    *hand.config.lock().unwrap() = config(9, 1);
    (0..100).for_each(|_| tell_change(&channel));
    assert_eq!(card.await_told(2)[1], "config [82, 84, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0]");
    // Not during a pause, and as soon as it is over.
    card.device.pause(soon()).unwrap();
    *hand.config.lock().unwrap() = config(9, 0);
    tell_change(&channel);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(card.told.0.lock().unwrap().len(), 2);
    card.device.resume().unwrap();
    card.await_told(3);
    // A backend that speaks nonsense there is replaced.
    (&channel).write_all(&[0xff; 12]).unwrap();
    card.backend();
    let status = await_state(&card.device, |state| *state == DeviceState::Running);
    assert_eq!((status.generation, status.lost), (2, 1));
    assert!(status.last_exit.unwrap().contains("requests of its own"), "and the reason is told");
}

/// Rings are taken back when the backend has finished, and go on from where it says.
#[test]
fn pause_takes_the_rings_and_resume_gives_them_back() {
    let mut card = Card::new(Hand { base: 5, ..plain() });
    let backend = card.backend();
    // A device that nobody drives has nothing to give.
    card.device.pause(soon()).unwrap();
    card.device.resume().unwrap();
    assert_eq!(backend.count(GET_VRING_BASE), 0);
    assert_eq!(wait(card.frontend.intent(run())), Some(0));
    assert_eq!(card.device.queues().len(), 2);
    for round in 1..=3 {
        card.device.pause(soon()).unwrap();
        assert_eq!((backend.count(GET_VRING_BASE), backend.count(SET_VRING_NUM)), (2 * round, 2 * round));
        card.device.resume().unwrap();
        assert_eq!(backend.count(SET_VRING_NUM), 2 * round + 2);
        assert_eq!(backend.bodies(SET_VRING_BASE).pop().unwrap(), [1, 0, 0, 0, 5, 0, 0, 0]);
    }
    let status = card.device.status();
    assert_eq!((status.state, status.generation, status.lost), (DeviceState::Running, 1, 0));
    // Resumed without having been paused.
    card.device.resume().unwrap();
    assert_eq!(backend.count(SET_VRING_NUM), 8);
    // What dies during a pause is replaced, and gets nothing before the pause is over.
    card.device.pause(soon()).unwrap();
    backend.die();
    let second = card.backend();
    await_state(&card.device, |state| *state == DeviceState::Idle);
    assert_eq!(second.count(SET_VRING_NUM), 0);
    card.device.resume().unwrap();
    second.await_count(SET_VRING_NUM, 2);
}

/// A backend is slow to finish: the pause says so at its deadline and is undone. When the backend gives the rings back at
/// last it gets them again, and nothing else has happened.
#[test]
fn late_pause_is_undone() {
    let mut card = Card::new(plain());
    let backend = card.backend();
    assert_eq!(wait(card.frontend.intent(run())), Some(0));
    let slow = backend.slow.lock().unwrap();
    let began = Instant::now();
    let late = card.device.pause(Instant::now() + Duration::from_millis(60));
    assert!(matches!(late, Err(PauseError::Late { .. })), "{late:?}");
    assert!(began.elapsed() < Duration::from_millis(190), "{:?}", began.elapsed());
    drop(slow);
    backend.await_count(SET_VRING_NUM, 4);
    let status = await_state(&card.device, |state| *state == DeviceState::Running);
    assert_eq!((status.generation, status.lost), (1, 0));
    card.device.pause(soon()).unwrap();
}

/// The same, and the backend never gives the rings back: it dies, or is ended for it. Its successor gets them, since the pause
/// is long given up.
#[test]
fn late_pause_is_undone_for_the_successor() {
    let mut card = Card::new(plain());
    let backend = card.backend();
    assert_eq!(wait(card.frontend.intent(run())), Some(0));
    let slow = backend.slow.lock().unwrap();
    let late = card.device.pause(Instant::now() + Duration::from_millis(60));
    assert!(matches!(late, Err(PauseError::Late { .. })), "{late:?}");
    // As the machine does with all its devices.
    card.device.resume().unwrap();
    backend.die();
    drop(slow);
    card.backend().await_count(SET_VRING_NUM, 2);
    let status = await_state(&card.device, |state| *state == DeviceState::Running);
    assert_eq!((status.generation, status.lost), (2, 1));
    card.device.pause(soon()).unwrap();
}

/// Nobody is there who could keep the rings: the pause waits a while for the proof that the dead one's writes are done,
/// and never until its deadline.
#[test]
fn dead_backends_delay_no_pause() {
    let rig = rig_of_dying();
    await_state(&rig.device, |state| matches!(state, DeviceState::Recovering { .. }));
    let (began, limit) = (Instant::now(), Duration::from_millis(400));
    rig.device.pause(began + limit).unwrap();
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    rig.device.resume().unwrap();
}

/// The machine is reset: the backend lives on, gets the rings of the next board's driver, and knows nothing of what the last
/// driver wrote. If it dies in between, the next board has its successor.
#[test]
fn backends_survive_their_board() {
    let (parts, lives) = parts(vec![Character::default()]);
    let (mut device, mut frontend, _) = attach(VhostDevice::connect(parts).unwrap());
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    let life = lives.recv().unwrap();
    let _ = frontend.intent(Intent::ConfigWrite { offset: 3, data: vec![9] });
    life.await_message("SET_CONFIG 3 [9]");
    let mut connected = device.leave(soon()).unwrap();
    assert!(device.leave(soon()).is_none());
    assert_eq!(wait(frontend.intent(Intent::Reset)), None);
    assert_eq!(life.log()[life.log().len() - 3..], ["GET_VRING_BASE 0", "GET_VRING_BASE 1", "SET_CONFIG 3 [7]"]);
    connected.move_to(memory(), Relay::new().unwrap());
    let (mut device, mut frontend, _) = attach(connected);
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    assert_eq!(life.log().iter().filter(|message| *message == "SET_OWNER").count(), 1, "the same conversation");
    assert_eq!(life.log().iter().filter(|message| *message == "SET_VRING_BASE 0 0").count(), 2, "from the start");
    life.die();
    let second = lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 1");
    let mut connected = device.leave(soon()).unwrap();
    second.die();
    connected.move_to(memory(), Relay::new().unwrap());
    let (device, mut frontend, _) = attach(connected);
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    let third = lives.recv_timeout(Duration::from_secs(20)).unwrap();
    third.await_message("SET_VRING_ENABLE 1");
    let status = await_state(&device, |state| *state == DeviceState::Running);
    assert_eq!((status.generation, status.lost), (3, 2));
}

/// A board goes while its backend is dead and none comes: nobody waits longer than was said, and the next board tries on.
#[test]
fn a_board_does_not_wait_for_the_dead() {
    let mut rig = rig_of_dying();
    await_state(&rig.device, |state| matches!(state, DeviceState::Recovering { .. }));
    let began = Instant::now();
    let connected = rig.device.leave(began + Duration::from_millis(500)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let (device, ..) = attach(connected);
    assert!(matches!(device.status().state, DeviceState::Recovering { .. }));
}

/// Deaths and returns are told with name, generation and reason.
#[test]
fn the_story_is_told() {
    let mut card = Card::new(plain());
    let heard = card.story.subscribe();
    assert_eq!(wait(card.frontend.intent(run())), Some(0));
    card.backend().die();
    for (event, generation) in [("crashed", "1"), ("restarted", "2")] {
        let Heard::Event(told) = heard.next(Duration::from_secs(20)) else { panic!("no event") };
        assert_eq!((told.source.as_str(), told.event.as_str()), ("device", event));
        assert_eq!((told.properties["id"].as_str(), told.properties["generation"].as_str()), ("_net0", generation));
        assert_eq!(told.properties.contains_key("reason"), event == "crashed");
    }
}
