//! A whole device: whatever its server says, the guest has an answer, and a successor that is honest has the device.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use atoll_devices::pci::{BarMapping, BarSpace, PciFunction};
use atoll_devices::{Answer, MsiMessage, MsiSink, WireSink};
use atoll_protocol::vfio_user::Command;
use vmm_sys_util::eventfd::EventFd;

use super::super::device::{Connected, UserDevice, Wanted};
use super::super::function::UserFunction;
use super::fake::{Character, LIES, Lie, Servers, register};
use crate::backend::PolicyConfig;
use crate::config::OnFailure;
use crate::irq::{EventRoute, InterruptFabric, IrqError, VectorTable};
use crate::lifecycle::{Heard, Story, Subscription};
use crate::machine::layout::ram;
use crate::memory::GuestMemory;
use crate::vhost::recovery::Rules;
use crate::vhost::{DeviceParts, DeviceState, Ending, InFlight, Limits, PauseError};

/// Nothing of this takes longer, on however busy a machine.
const WHOLE: Duration = Duration::from_secs(60);

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
impl BarMapping for Fabric {
    fn map(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
    fn unmap(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
}

struct Rig {
    device: UserDevice,
    function: Mutex<UserFunction>,
    resets: Arc<AtomicU32>,
    story: Subscription,
}

/// A device whose servers are of these characters, one after the other, and honest behind them.
fn rig(characters: impl IntoIterator<Item = Character>) -> Rig {
    let limits = Limits {
        start: WHOLE,
        step: Duration::from_millis(150),
        drain: Duration::from_millis(150),
        fence: Duration::from_millis(300),
        ..Limits::default()
    };
    let rules = Rules {
        policy: PolicyConfig { start_attempts: None, ..PolicyConfig::default() },
        on_failure: OnFailure::default(),
        fence: limits.fence,
        stall: None,
        debugged: false,
        standby: false,
        probation: limits.probation,
        trial: limits.trial,
    };
    let resets = Arc::new(AtomicU32::new(0));
    let story = Story::default();
    let heard = story.subscribe();
    let wanted = Wanted {
        name: "device".into(),
        source: Box::new(Servers(characters.into_iter().collect::<VecDeque<_>>(), Arc::clone(&resets))),
        record: None,
        memory: GuestMemory::new(&ram(16 << 20).unwrap()).unwrap(),
        rules,
        limits,
        story,
        meter: None,
        clock: DeviceParts::real_time(),
    };
    let connected = Connected::new(wanted, Ending::default()).unwrap();
    let shape = connected.shape().clone();
    let vectors = Arc::new(VectorTable::new(&Fabric, shape.vectors).unwrap());
    let device = connected.attach(Arc::clone(&vectors)).unwrap();
    let function = UserFunction::new(&shape, Arc::new(Fabric), vectors, Arc::clone(&device.shared)).unwrap();
    Rig { device, function: Mutex::new(function), resets, story: heard }
}

impl Rig {
    /// Reads a register as a vCPU does, which has an answer in any case.
    fn read(&self) -> u32 {
        let answer = self.function.lock().unwrap().bar_read(0, 0x10, &mut [0; 4]);
        let Answer::Later(mut deferred) = answer else { panic!("registers are the server's") };
        let deadline = Instant::now() + WHOLE;
        loop {
            let polled = Pin::new(&mut deferred).poll(&mut Context::from_waker(Waker::noop()));
            if let Poll::Ready(value) = polled {
                return value.expect("an answer") as u32;
            }
            assert!(Instant::now() < deadline, "no answer: {:?}", self.device.shared.status());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads until the device is at rest with an honest server, or was given up. Whether it has one.
    fn settles(&self) -> bool {
        let deadline = Instant::now() + WHOLE;
        loop {
            let value = self.read();
            let status = self.device.shared.status();
            match status.state {
                DeviceState::Running if value == register(status.generation) => return true,
                DeviceState::Quarantined { .. } => {
                    assert_eq!(self.read(), u32::MAX, "nobody is there");
                    return false;
                }
                _ => assert!(Instant::now() < deadline, "stays {status:?}"),
            }
        }
    }
}

#[test]
fn a_lie_to_the_guest_costs_the_server_its_place() {
    for lie in LIES {
        let rig = rig([Some((Command::RegionRead, lie))]);
        assert_eq!(rig.device.shared.status().generation, 1);
        if lie == Lie::No {
            // It lives, and does not want to: the guest reads what is not there.
            assert_eq!(rig.read(), u32::MAX);
            assert_eq!(rig.device.shared.status().lost, 0);
            continue;
        }
        assert!(rig.settles(), "{lie:?}: {:?}", rig.device.shared.status());
        let deadline = Instant::now() + WHOLE;
        // An answer too many is seen when nothing is asked.
        while rig.device.shared.status().lost == 0 {
            assert!(Instant::now() < deadline, "{lie:?} went by");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(rig.settles(), "{lie:?}");
    }
}

#[test]
fn a_successor_that_lies_is_followed_by_another_or_the_device_is_given_up() {
    for (command, lie) in [Command::RegionWrite, Command::SetIrqs, Command::DmaMap]
        .into_iter()
        .flat_map(|command| LIES.map(|lie| (command, lie)))
    {
        let rig = rig([Some((Command::RegionRead, Lie::HangUp)), Some((command, lie))]);
        let has_server = rig.settles();
        let status = rig.device.shared.status();
        // One that refuses or talks nonsense is what its successors would be: it takes the operator.
        assert!(has_server || status.lost > 0, "{command:?}, {lie:?}: {status:?}");
        if matches!(lie, Lie::HangUp | Lie::Silence | Lie::HalfHeader | Lie::HalfBody) {
            assert!(has_server && status.generation > 2, "{command:?}, {lie:?}: {status:?}");
        }
    }
}

#[test]
fn a_server_that_keeps_memory_is_given_up_and_the_pause_is_in_time() {
    for lie in LIES {
        let rig = rig([Some((Command::DmaUnmap, lie))]);
        assert!(rig.settles());
        let paused = rig.device.pause(Instant::now() + WHOLE);
        assert!(paused.is_ok(), "{lie:?}: {paused:?}");
        rig.device.resume().unwrap();
        let has_server = rig.settles();
        // An answer too many may be taken for that to the next question: nonsense, which takes the operator.
        assert!(has_server || lie == Lie::Twice, "{lie:?}: {:?}", rig.device.shared.status());
    }
}

#[test]
fn a_device_that_the_guest_has_given_up_begins_anew() {
    let rig = rig([]);
    assert!(rig.settles());
    let first = rig.resets.load(Ordering::SeqCst);
    rig.device.pause(Instant::now() + WHOLE).unwrap();
    rig.device.resume().unwrap();
    assert!(rig.settles());
    assert_eq!(rig.resets.load(Ordering::SeqCst), first, "nobody waited in vain");

    // A vCPU waits as long as it may, and goes on with ones.
    rig.device.pause(Instant::now() + WHOLE).unwrap();
    let answer = rig.function.lock().unwrap().bar_read(0, 0x1c, &mut [0; 4]);
    let Answer::Later(deferred) = answer else { panic!("registers are the server's") };
    deferred.give_up();
    rig.device.resume().unwrap();
    assert!(rig.settles());
    assert_eq!(rig.resets.load(Ordering::SeqCst), first + 1, "what the guest has given up is not gone on with");
    rig.device.pause(Instant::now() + WHOLE).unwrap();
    rig.device.resume().unwrap();
    assert!(rig.settles());
    assert_eq!(rig.resets.load(Ordering::SeqCst), first + 1, "and once is enough");
}

/// Events said `restarted` of somebody else's server that was killed, and no more: as if nothing had been lost.
#[test]
fn a_server_that_keeps_nothing_comes_back_anew_and_says_so() {
    let rig = rig([Some((Command::RegionRead, Lie::HangUp))]);
    assert!(rig.settles());
    assert_eq!(rig.resets.load(Ordering::SeqCst), 2, "the first one at the start, its successor whatever it had kept");
    let told = loop {
        match rig.story.next(WHOLE) {
            Heard::Event(event) if event.event == "restarted" => break format!("{event:?}"),
            Heard::Event(_) => {}
            other => panic!("nothing is told: {other:?}"),
        }
    };
    for words in ["no recovery", "after a reset", "requests that were in flight are lost", "its own timeout"] {
        assert!(told.contains(words), "{told}");
    }
}

/// A pause that a stopped server held up said that no request was in flight, which nobody knows.
#[test]
fn a_silent_server_is_not_said_to_be_idle() {
    let rig = rig([Some((Command::DmaUnmap, Lie::Silence))]);
    assert!(rig.settles());
    let late = rig.device.pause(Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert!(matches!(late, PauseError::Silent { in_flight: InFlight(None), .. }), "{late:?}");
    let told = late.to_string();
    assert!(told.contains("in flight is not known") && told.contains("SIGSTOP"), "{told}");
    assert!(rig.settles(), "it goes on, with another server if need be");
}
