//! Outages that other front ends do not come through: each test tells what was reported elsewhere.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::virtio::{Intent, VirtioFrontend};

use super::fake::{Character, Misdeed, serve};
use super::{Fabric, Told, activate, await_state, parts, rig, spoiled, wait};
use crate::config::OnFailure;
use crate::doorbell::Relay;
use crate::irq::VectorTable;
use crate::lifecycle::{Heard, Story};
use crate::vhost::patience::Patience;
use crate::vhost::source::{BackendSource, Fence, Incarnation, SourceError};
use crate::vhost::{
    Care, Connected, DeviceParts, DeviceState, EndIsEnough, ExternalSocket, Limits, VhostDevice, VhostFrontend,
};

fn attach_told(connected: Connected) -> (VhostDevice, VhostFrontend, Arc<Told>) {
    let (vectors, told) = (Arc::new(VectorTable::new(&Fabric, 3).unwrap()), Arc::<Told>::default());
    let (device, frontend) = connected.attach(vectors, Arc::clone(&told) as _).unwrap();
    (device, frontend, told)
}

fn attach(connected: Connected) -> (VhostDevice, VhostFrontend) {
    let (device, frontend, _) = attach_told(connected);
    (device, frontend)
}

/// Backends of which the last one takes as long to greet as anybody waits, and whose end is all that there is to see.
struct Seen(Box<dyn BackendSource>);

impl BackendSource for Seen {
    fn connect(&mut self, generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        self.0.connect(generation, patience)
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(EndIsEnough)
    }
}

/// A device that runs, and then has only successors that never say a word.
fn silenced() -> (DeviceParts, std::sync::mpsc::Receiver<super::fake::Life>) {
    let (mut parts, lives) = parts(vec![Character::default(), spoiled("SET_OWNER", Misdeed::Silence)]);
    parts.limits = Limits::default();
    let source = std::mem::replace(&mut parts.source, Box::new(ExternalSocket::new("/nowhere")));
    parts.source = Box::new(Seen(source));
    (parts, lives)
}

/// Elsewhere a device whose backend was dead could not be removed, or only after eleven seconds: the guest's reset waited
/// for a successor, and then the end did. The guest's driver resets the device, takes it over again, lets it go; the
/// machine pauses, goes on, and takes it away: all of it while a successor is greeted that never answers.
#[test]
fn nobody_waits_for_a_successor() {
    let (parts, lives) = silenced();
    let (mut device, mut frontend) = attach(VhostDevice::connect(parts).unwrap());
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    lives.recv().unwrap().die();
    let _silent = lives.recv_timeout(Duration::from_secs(20)).unwrap();
    let began = Instant::now();
    assert_eq!(wait(frontend.intent(Intent::Reset)), Some(0));
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    device.pause(Instant::now() + Duration::from_secs(20)).unwrap();
    device.resume().unwrap();
    assert_eq!(wait(frontend.intent(Intent::Reset)), Some(0));
    device.stop(Instant::now() + Duration::from_secs(20));
    // A silent step has five seconds, a start ten: none of this has waited for either.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

/// The guest reboots while its disk's backend is being restarted: the board goes at once, and the next board's driver has
/// its disk as soon as there is a backend.
#[test]
fn a_reboot_while_a_backend_is_restarting() {
    let (parts, lives) = silenced();
    let (memory, story) = (parts.memory.clone(), parts.story.clone());
    let (mut device, mut frontend) = attach(VhostDevice::connect(parts).unwrap());
    let heard = story.subscribe();
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    lives.recv().unwrap().die();
    let silent = lives.recv_timeout(Duration::from_secs(20)).unwrap();
    let began = Instant::now();
    let mut connected = device.leave(Instant::now() + Duration::from_secs(20)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    drop(silent);
    connected.move_to(memory, Relay::new().unwrap());
    let (mut device, mut frontend) = attach(connected);
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    let Heard::Event(told) = heard.next(Duration::from_secs(20)) else { panic!("no event") };
    assert_eq!((told.event.as_str(), told.properties["generation"].as_str()), ("crashed", "1"));
    // The one that is silent is not waited for either.
    let began = Instant::now();
    device.stop(Instant::now() + Duration::from_secs(20));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

/// Somebody else's backend restarts behind its socket. First there is no name, then a name at which nobody listens, then a
/// listener that dies with our connection in its queue (connect succeeds, and nobody will ever answer), then one that hangs up after
/// a word; and then a good one. Only a whole handshake counts, and nobody gives up in between.
#[test]
fn a_listener_that_comes_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listen = || {
        let _ = std::fs::remove_file(&path);
        UnixListener::bind(&path).unwrap()
    };
    let first = listen();
    let accept = |listener: &UnixListener, character| serve(listener.accept().unwrap().0, character);
    let (mut parts, _) = parts(vec![Character::default()]);
    parts.source = Box::new(ExternalSocket::new(&path));
    let backend = std::thread::spawn(move || (accept(&first, Character::default()), first));
    let (device, mut frontend) = attach(VhostDevice::connect(parts).unwrap());
    let (life, first) = backend.join().unwrap();
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    std::fs::remove_file(&path).unwrap();
    drop(first);
    life.die();
    await_state(&device, |state| matches!(state, DeviceState::Waiting { why } if why.contains("nobody listens")));
    // A name without a listener.
    drop(listen());
    std::thread::sleep(Duration::from_millis(50));
    // A listener with our connection in its queue.
    let dying = listen();
    let mut fds = [rustix::event::PollFd::new(&dying, rustix::event::PollFlags::IN)];
    let soon = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&soon)), Ok(1), "it has connected");
    drop(dying);
    // One that hangs up in the middle of the greeting.
    let rude = listen();
    let life = serve(rude.accept().unwrap().0, spoiled("GET_QUEUE_NUM", Misdeed::DieHalfway));
    life.await_message("GET_QUEUE_NUM");
    drop(rude);
    let good = listen();
    let life = serve(good.accept().unwrap().0, Character::default());
    life.await_message("SET_VRING_ENABLE 1");
    let status = await_state(&device, |state| *state == DeviceState::Running);
    assert_eq!(status.lost, 1);
}

/// A backend answers whatever it is asked, and does not touch a request that waits for it: it is replaced. One that is being
/// debugged is not; it is told of.
#[test]
fn a_backend_that_stands() {
    let stall = Some(Duration::from_millis(200));
    for debugged in [false, true] {
        let (mut parts, lives) = parts(vec![Character::default()]);
        parts.care = Care { stall, debugged, ..Care::default() };
        let (memory, story) = (parts.memory.clone(), Story::default());
        parts.story = story.clone();
        let heard = story.subscribe();
        let (device, mut frontend) = attach(VhostDevice::connect(parts).unwrap());
        assert_eq!(wait(frontend.intent(activate())), Some(0));
        let _first = lives.recv().unwrap();
        super::set_indices(&memory, 1, 8, 7);
        let Heard::Event(told) = heard.next(Duration::from_secs(20)) else { panic!("no event") };
        if debugged {
            assert_eq!(told.event, "stalled");
            assert!(told.properties["reason"].contains("queue 1 has completed nothing"), "{told:?}");
            assert_eq!((device.status().state, device.status().lost), (DeviceState::Running, 0));
        } else {
            assert_eq!(told.event, "crashed");
            lives.recv_timeout(Duration::from_secs(20)).unwrap().await_message("SET_VRING_ENABLE 1");
        }
    }
}

/// A quarantined device that the operator wants back: its driver goes on where it was, without a reset.
#[test]
fn the_operator_leads_back() {
    let less = Character { features: (1 << 32) | (1 << 30) | (1 << 29), ..Character::default() };
    let mut rig = rig(vec![Character::default(), less, Character::default()]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    rig.lives.recv().unwrap().die();
    await_state(&rig.device, |state| matches!(state, DeviceState::Quarantined { .. }));
    rig.device.revive();
    let _refused = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    let third = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    third.await_message("SET_VRING_ENABLE 1");
    let status = await_state(&rig.device, |state| *state == DeviceState::Running);
    assert_eq!((status.generation, status.lost), (3, 1));
}

/// What becomes of a device whose successor will not do is its owner's to say: with `wait` it is tried again for ever, and goes
/// on when the right one is back; with `unplug` the guest is asked to let it go.
#[test]
fn the_owner_says_what_becomes_of_it() {
    let less = || Character { features: (1 << 32) | (1 << 30) | (1 << 29), ..Character::default() };
    let (mut parts, lives) = parts(vec![Character::default(), less(), less(), Character::default()]);
    parts.on_failure = OnFailure::Wait;
    parts.care.policy.backoff_max = Duration::from_millis(50);
    let (device, mut frontend, told) = attach_told(VhostDevice::connect(parts).unwrap());
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    lives.recv().unwrap().die();
    await_state(&device, |state| matches!(state, DeviceState::Waiting { why } if why.contains("VIRTIO_BLK_F_FLUSH")));
    let successors: Vec<_> = (0..3).map(|_| lives.recv_timeout(Duration::from_secs(20)).unwrap()).collect();
    successors[2].await_message("SET_VRING_ENABLE 1");
    assert!(told.0.lock().unwrap().is_empty(), "the driver hears nothing of it");

    let (mut parts, lives) = super::parts(vec![Character::default(), less()]);
    parts.on_failure = OnFailure::Unplug;
    let (device, mut frontend, told) = attach_told(VhostDevice::connect(parts).unwrap());
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    lives.recv().unwrap().die();
    await_state(&device, |state| matches!(state, DeviceState::Quarantined { .. }));
    assert_eq!(*told.0.lock().unwrap(), ["needs reset", "unplug"]);
}
