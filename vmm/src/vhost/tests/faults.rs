//! Signals that come late or never (`atoll fault`): what exactly is late and lost, that everything after it is as before,
//! and what a recovery makes good.

use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::virtio::{Intent, VirtioFrontend};
use vmm_sys_util::eventfd::EventFd;

use super::fake::{Character, Life};
use super::{Fabric, Rig, Told, activate, await_state, parts, rig, wait};
use crate::doorbell::{Path, Relay};
use crate::irq::VectorTable;
use crate::lifecycle::{Heard, Story};
use crate::vhost::fault::roll;
use crate::vhost::{Care, DeviceState, Fault, FaultError, VhostDevice};

const LONG: Duration = Duration::from_secs(60);

/// A device that runs, its backend, and the relay that is between them.
fn running(care: Care, story: &Story) -> (Rig, Life, Arc<Relay>) {
    let (mut parts, lives) = parts(vec![Character::default()]);
    (parts.care, parts.story) = (care, story.clone());
    let (memory, relay) = (parts.memory.clone(), Arc::clone(&parts.relay));
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let told = Arc::<Told>::default();
    let connected = VhostDevice::connect(parts).unwrap();
    let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&told) as _).unwrap();
    let mut rig = Rig { device, frontend, vectors, told, lives, memory };
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let life = rig.lives.recv().unwrap();
    // The first kick is the front end's own.
    (0..2).for_each(|ring| assert_eq!(life.await_kick(ring), 1));
    (rig, life, relay)
}

fn flush(relay: &Relay) {
    assert!(relay.flush(Instant::now() + LONG), "the relay stands");
}

/// Waits for calls of a vector, and takes them.
fn await_call(vector: &EventFd) -> u64 {
    let deadline = Instant::now() + LONG;
    loop {
        match vector.read() {
            Ok(count) => return count,
            Err(_) => assert!(Instant::now() < deadline, "it was not called"),
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The first so many kicks and calls are late by what the seed says, at the least; those after them pass, and none is lost
/// or made up. `delay` is few and late, `slow` is many and a little late.
#[test]
fn late_signals_arrive_once_each() {
    for (fault, seed) in [(Fault::Delay, 1), (Fault::Slow, 2)] {
        let (mut rig, life, _relay) = running(Care::default(), &Story::default());
        let (late, late_ms) = match fault {
            Fault::Delay => (1 + roll(seed, 16), 1 + roll(seed ^ 1, 50)),
            _ => (1000, 1 + roll(seed ^ 1, 5)),
        };
        rig.device.inject(fault, seed).unwrap();
        let vector = rig.vectors.eventfd(0).unwrap();
        for number in 0..8 {
            let began = Instant::now();
            rig.frontend.notify(0);
            assert_eq!(life.await_kick(0), 1, "{fault:?}: kick {number}");
            assert!(number >= late || began.elapsed() >= Duration::from_millis(late_ms), "{fault:?}: kick {number}");
            let began = Instant::now();
            life.call(0);
            assert_eq!(await_call(&vector), 1, "{fault:?}: call {number}");
            assert!(number >= late || began.elapsed() >= Duration::from_millis(late_ms), "{fault:?}: call {number}");
        }
        assert_eq!((rig.device.status().lost, rig.device.status().state), (0, DeviceState::Running));
    }
}

/// The guest's kick is lost, so its request waits: until its next kick, or until the stall's deadline replaces the backend,
/// whose rings are kicked past the fault. The event names the queue.
#[test]
fn a_lost_kick_is_made_good_by_the_next_one_or_by_a_successor() {
    let (mut rig, life, relay) = running(Care::default(), &Story::default());
    let lost = 1 + roll(6, 4);
    rig.device.inject(Fault::DropKick, 6).unwrap();
    for _ in 0..lost {
        rig.frontend.notify(0);
        flush(&relay);
    }
    rig.frontend.notify(0);
    assert_eq!(life.await_kick(0), 1, "the one that was not lost");

    let story = Story::default();
    let care = Care { stall: Some(Duration::from_millis(200)), ..Care::default() };
    let (mut rig, _first, relay) = running(care, &story);
    let heard = story.subscribe();
    rig.device.inject(Fault::DropKick, 0).unwrap();
    rig.frontend.notify(0);
    flush(&relay);
    rig.set_indices(0, 1, 0);
    let Heard::Event(told) = heard.next(LONG) else { panic!("no event") };
    assert_eq!(told.event, "crashed");
    assert!(told.properties["reason"].contains("queue 0 has completed nothing"), "{told:?}");
    let second = rig.lives.recv_timeout(LONG).unwrap();
    second.await_message("SET_VRING_ENABLE 1");
    assert_eq!(rig.device.doorbells()[0].path(), Path::Interposed, "three more would be lost");
    // Those that the VMM gave the first one in vain are in the same doorbell.
    assert!(second.await_kick(0) >= 1, "and the successor's own kick is not");
}

/// The backend's call is lost, so the driver waits for a request that is done: until the next call, or until a recovery, which
/// calls every ring past the fault.
#[test]
fn a_lost_call_is_made_good_by_the_next_one_or_by_a_recovery() {
    let (rig, life, relay) = running(Care::default(), &Story::default());
    let lost = 1 + roll(0, 4);
    assert!(lost > 1, "more than the recovery's one");
    rig.device.inject(Fault::DropCall, 0).unwrap();
    let vector = rig.vectors.eventfd(0).unwrap();
    life.call(0);
    flush(&relay);
    assert!(vector.read().is_err(), "it was lost");
    rig.device.inject(Fault::Disconnect, 0).unwrap();
    let second = rig.lives.recv_timeout(LONG).unwrap();
    second.await_message("SET_VRING_ENABLE 1");
    assert_eq!(await_call(&vector), 1, "the recovery's call");
    await_state(&rig.device, |state| *state == DeviceState::Running);
    for _ in 1..lost {
        second.call(0);
        flush(&relay);
        assert!(vector.read().is_err(), "it was lost");
    }
    second.call(0);
    assert_eq!(await_call(&vector), 1, "the one that was not lost");
}

/// The others end the backend's life or leave it alone: a new incarnation, and an event that says why.
#[test]
fn broken_conversations_end_in_a_successor() {
    for (fault, reason) in [(Fault::Disconnect, "hung up"), (Fault::Garbage, "requests of its own cannot be right")] {
        let story = Story::default();
        let (rig, _first, _relay) = running(Care::default(), &story);
        let heard = story.subscribe();
        rig.device.inject(fault, 7).unwrap();
        let Heard::Event(told) = heard.next(LONG) else { panic!("no event") };
        assert_eq!(told.event, "crashed");
        assert!(told.properties["reason"].contains(reason), "{fault:?}: {told:?}");
        rig.lives.recv_timeout(LONG).unwrap().await_message("SET_VRING_ENABLE 1");
        let status = await_state(&rig.device, |state| *state == DeviceState::Running);
        assert_eq!((status.generation, status.lost), (2, 1));
    }
    // Somebody else's process is not ours to signal, and a device that has stopped has no connection.
    let mut rig = rig(vec![Character::default()]);
    for fault in [Fault::Kill, Fault::Stop] {
        assert!(matches!(rig.device.inject(fault, 0), Err(FaultError::NoProcess)));
    }
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));
    rig.device.stop(Instant::now() + LONG);
    assert!(matches!(rig.device.inject(Fault::Garbage, 0), Err(FaultError::Stopped)));
}
