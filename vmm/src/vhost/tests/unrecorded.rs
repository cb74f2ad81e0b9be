//! Backends that keep no record of what they have taken: what the front end knows all the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::virtio::{Intent, VirtioFrontend};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vm_memory::{Bytes, GuestAddress};

use super::fake::Character;
use super::{Fabric, Rig, Told, await_state, parts, queue, wait};
use crate::config::Track;
use crate::irq::VectorTable;
use crate::vhost::{DeviceState, Recovery, VhostDevice};

fn unrecorded(track: Track) -> Rig {
    let character = Character { protocol: Protocol::CONFIG | Protocol::REPLY_ACK, ..Character::default() };
    let (mut parts, lives) = parts(vec![character]);
    parts.track = track;
    let memory = parts.memory.clone();
    let connected = VhostDevice::connect(parts).unwrap();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let told = Arc::<Told>::default();
    let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&told) as _).unwrap();
    Rig { device, frontend, vectors, told, lives, memory }
}

fn only_queue() -> Intent {
    Intent::Activate { features: 1 << 32, queues: vec![queue(0)], config_vector: None }
}

impl Rig {
    /// A request of one descriptor, a status byte at 3 MiB and `head`.
    fn ask(&self, head: u16, entry: u16) {
        let (queue, memory) = (queue(0), self.memory.mapped());
        let descriptor = ((3_u128 << 20) + u128::from(head)) | (1 << 64) | (2 << 96);
        memory.write_obj(descriptor, GuestAddress(queue.descriptor_table + 16 * u64::from(head))).unwrap();
        memory.write_obj(0xee_u8, GuestAddress((3 << 20) + u64::from(head))).unwrap();
        memory.write_obj(head, GuestAddress(queue.available_ring + 4 + 2 * u64::from(entry % 64))).unwrap();
        memory.write_obj(entry.wrapping_add(1), GuestAddress(queue.available_ring + 2)).unwrap();
    }
    fn status(&self, head: u16) -> u8 {
        self.memory.mapped().read_obj(GuestAddress((3 << 20) + u64::from(head))).unwrap()
    }
    fn used(&self) -> u16 {
        self.memory.mapped().read_obj(GuestAddress(queue(0).used_ring + 2)).unwrap()
    }
    /// As a backend that sees the driver's own ring.
    fn complete(&self, head: u16, entry: u16) {
        let used = queue(0).used_ring;
        self.memory.mapped().write_obj(u64::from(head), GuestAddress(used + 4 + 8 * u64::from(entry % 64))).unwrap();
        self.memory.mapped().write_obj(entry.wrapping_add(1), GuestAddress(used + 2)).unwrap();
    }
}

/// The second of three was completed before the backend died: the first and the third fail, in their order, and the
/// device goes on behind them. The window between the indices would have failed the second again.
#[test]
fn what_was_in_flight_fails_and_the_device_goes_on() {
    let mut rig = unrecorded(Track::Auto);
    assert_eq!(rig.device.status().recovery, Recovery::IdleOnly);
    assert_eq!(wait(rig.frontend.intent(only_queue())), Some(0));
    let first = rig.lives.recv().unwrap();
    (0..3).for_each(|head| rig.ask(10 + head, head));
    rig.complete(11, 0);
    first.die();
    let second = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 0 1");
    await_state(&rig.device, |state| *state == DeviceState::Running);
    assert!(second.log().contains(&"SET_VRING_BASE 0 3".to_owned()), "{:?}", second.log());
    assert_eq!((rig.used(), [10, 11, 12].map(|head| rig.status(head))), (3, [1, 0xee, 1]));
    let used = queue(0).used_ring + 4;
    let heads = [0, 1, 2].map(|at| rig.memory.mapped().read_obj::<u32>(GuestAddress(used + 8 * at)).unwrap());
    assert_eq!(heads, [11, 10, 12]);
    assert!(rig.vectors.eventfd(0).unwrap().read().unwrap() > 0, "the driver was called");
}

/// The backend sees rings of the VMM's beside the guest's memory, fresh ones in each life, with what is left in them; its
/// own record would be about other rings, and is not asked for.
#[test]
fn shadowed_backends_are_survived_in_full() {
    let mut rig = unrecorded(Track::Shadow);
    assert_eq!(rig.device.status().recovery, Recovery::Full);
    rig.ask(7, 0);
    assert_eq!(wait(rig.frontend.intent(only_queue())), Some(0));
    let first = rig.lives.recv().unwrap();
    for head in 1..3 {
        rig.ask(7 + head, head);
        rig.frontend.notify(0);
    }
    assert!(first.await_kick(0) > 0);
    let check = |log: Vec<String>| {
        let said = |start: &str| log.iter().find(|line| line.starts_with(start)).cloned().unwrap_or_default();
        let table = said("SET_MEM_TABLE");
        assert!(table.contains(" 0x200000000000=0x10200000000000+0x1000@0x0"), "{table}");
        let rings = said("SET_VRING_ADDR 0");
        assert!(rings.starts_with("SET_VRING_ADDR 0 0x10000000100000 0x10200000000000 0x102000000000"), "{rings}");
        assert_eq!(said("SET_VRING_BASE"), "SET_VRING_BASE 0 0");
        assert!(!log.iter().any(|line| line.contains("INFLIGHT")), "{log:?}");
    };
    check(first.log());
    first.die();
    let second = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 0 1");
    await_state(&rig.device, |state| *state == DeviceState::Running);
    check(second.log());
    assert!(second.await_kick(0) > 0, "there is something for it");
    assert_eq!((rig.used(), rig.status(7)), (0, 0xee), "nothing was lost, nothing was made up");
    // Its driver resets it and takes it over again: nothing of the old life is left.
    assert_eq!(wait(rig.frontend.intent(Intent::Reset)), Some(0));
    rig.set_indices(0, 0, 0);
    assert_eq!(wait(rig.frontend.intent(only_queue())), Some(0));
    rig.device.stop(Instant::now() + Duration::from_secs(5));
    assert!(rig.told.0.lock().unwrap().is_empty());
}
