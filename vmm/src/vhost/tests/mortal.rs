//! Backends whose process dies while their socket stays open, because somebody else has a copy of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_devices::virtio::{Intent, VirtioFrontend};
use rustix::event::EventfdFlags;

use super::fake::{Character, Fakes, Life, Misdeed};
use super::{Fabric, Told, activate, await_state, parts, spoiled, wait};
use crate::irq::VectorTable;
use crate::vhost::patience::Patience;
use crate::vhost::source::{BackendProcess, BackendSource, EndIsEnough, Fence, Incarnation, SourceError};
use crate::vhost::{ConnectError, ConversationError, DeviceState, Limits, VhostDevice};

/// What kills and buries it.
type Death = Arc<Mutex<OwnedFd>>;

/// A process as the front end knows it: a descriptor that is readable once it has ended.
struct Process(Death, OwnedFd);

fn die(death: &Death) {
    rustix::io::write(&*death.lock().unwrap(), &1_u64.to_ne_bytes()).unwrap();
}

impl BackendProcess for Process {
    fn id(&self) -> u32 {
        1
    }
    fn ended(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
    fn kill(&mut self, _deadline: Instant) -> String {
        die(&self.0);
        "killed by signal 9".into()
    }
    fn measure(&mut self, _patience: &mut Patience) -> Result<u64, String> {
        Err("it has no size".into())
    }
    fn finish(&mut self, deadline: Instant) -> String {
        self.kill(deadline)
    }
}

/// Fakes, each with a process beside its socket.
struct Mortals {
    fakes: Fakes,
    deaths: Sender<Death>,
}

impl BackendSource for Mortals {
    fn connect(&mut self, generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let Incarnation { socket, .. } = self.fakes.connect(generation, patience)?;
        let ended = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let death = Arc::new(Mutex::new(ended.try_clone().unwrap()));
        let _ = self.deaths.send(Arc::clone(&death));
        Ok(Incarnation { socket, process: Some(Box::new(Process(death, ended))) })
    }
    fn describe(&self) -> String {
        "a mortal".into()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(EndIsEnough)
    }
}

/// Steps so long that no test waits for their end.
const STEP: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(60);

fn mortals(characters: Vec<Character>) -> (crate::vhost::DeviceParts, Receiver<Life>, Receiver<Death>) {
    let (mut parts, _) = parts(vec![Character::default()]);
    let (fakes, lives) = Fakes::new(characters);
    let (deaths, dying) = channel();
    parts.source = Box::new(Mortals { fakes, deaths });
    parts.limits = Limits { step: STEP, drain: STEP, ..Limits::default() };
    (parts, lives, dying)
}

/// A request was under way when its backend was killed, and the connection did not break, since a process that the backend had
/// started held the socket: the device stood for the five seconds that a step may take. In the greeting, in the hand-over, in
/// the middle of a running device's reset: the end of the process ends the wait.
#[test]
fn a_death_in_the_middle_of_a_request_ends_it() {
    let steps = ["SET_OWNER", "GET_FEATURES", "GET_CONFIG", "SET_MEM_TABLE", "SET_VRING_KICK 1", "SET_VRING_ENABLE 0"];
    for step in steps {
        let (parts, lives, dying) =
            mortals(vec![Character::default(), spoiled(step, Misdeed::Silence), Character::default()]);
        let connected = VhostDevice::connect(parts).unwrap();
        let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
        let (device, mut frontend) = connected.attach(vectors, Arc::<Told>::default() as _).unwrap();
        assert_eq!(wait(frontend.intent(activate())), Some(0), "{step}");
        let _first = lives.recv().unwrap();
        die(&dying.recv().unwrap());
        let second = lives.recv_timeout(SOON).unwrap();
        second.await_message(step);
        // Its socket stays open, and it says nothing more.
        die(&dying.recv_timeout(SOON).unwrap());
        let third = lives.recv_timeout(SOON).expect(step);
        third.await_message("SET_VRING_ENABLE 1");
        await_state(&device, |state| *state == DeviceState::Running);
    }
}

/// The same when the driver lets go of the device: nobody waits for the rings of a backend that is dead.
#[test]
fn a_death_in_the_middle_of_a_drain_ends_it() {
    let (parts, lives, dying) = mortals(vec![spoiled("GET_VRING_BASE 1", Misdeed::Silence), Character::default()]);
    let connected = VhostDevice::connect(parts).unwrap();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let (device, mut frontend) = connected.attach(vectors, Arc::<Told>::default() as _).unwrap();
    assert_eq!(wait(frontend.intent(activate())), Some(0));
    let reset = frontend.intent(Intent::Reset);
    lives.recv().unwrap().await_message("GET_VRING_BASE 1");
    die(&dying.recv().unwrap());
    assert_eq!(wait(reset), Some(0));
    assert_eq!(device.status().lost, 1);
}

/// The first backend of a machine that starts: the error says where it died, and comes at once.
#[test]
fn a_death_in_the_first_greeting_is_named() {
    let (parts, lives, dying) = mortals(vec![spoiled("GET_QUEUE_NUM", Misdeed::Silence)]);
    let connecting = std::thread::spawn(move || VhostDevice::connect(parts).err());
    let life = lives.recv_timeout(SOON).unwrap();
    life.await_message("GET_QUEUE_NUM");
    die(&dying.recv_timeout(SOON).unwrap());
    let deadline = Instant::now() + SOON;
    while !connecting.is_finished() {
        assert!(Instant::now() < deadline, "it waits for the dead");
        std::thread::sleep(Duration::from_millis(2));
    }
    let Some(ConnectError::Conversation { source, .. }) = connecting.join().unwrap() else { panic!("no such error") };
    assert!(
        matches!(&source, ConversationError::Gone { reason, .. } if reason.contains("its process has ended")),
        "{source}"
    );
    assert!(source.to_string().contains("GET_QUEUE_NUM"), "{source}");
}
