//! The cable of a card, plugged out and in.

use super::*;
use crate::machine::LinkState;
use atoll_devices::virtio::input_config::Pages;

/// A card with one pair of queues and a status.
struct Card;

impl DeviceClass for Card {
    fn device_type(&self) -> u16 {
        1
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Needed(16)
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        let (features, config) = (backend.features, backend.config.clone());
        Ok(DeviceOffer { device_type: 1, features, queue_sizes: vec![64; 2], config, pages: Pages::default() })
    }
}

const STATUS: u64 = 1 << 16;

fn character(features: u64) -> Character {
    let plain = Character::default();
    Character {
        features: plain.features | features,
        config: vec![1, 2, 3, 4, 5, 6, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        ..plain
    }
}

fn card(characters: Vec<Character>) -> Rig {
    let (mut parts, lives) = parts(characters);
    parts.class = Box::new(Card);
    let memory = parts.memory.clone();
    let vectors = Arc::new(VectorTable::new(&Fabric, 3).unwrap());
    let told = Arc::new(Told::default());
    let connected = VhostDevice::connect(parts).unwrap();
    let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&told) as _).unwrap();
    Rig { device, frontend, vectors, told, lives, memory }
}

fn status_told(rig: &Rig) -> Vec<bool> {
    let told = rig.told.0.lock().unwrap();
    let carrier = |words: &String| {
        words.starts_with("config [1, 2, 3, 4, 5, 6, 1, ") || !words.starts_with("config [1, 2, 3, 4, 5, 6, 0, ")
    };
    told.iter().filter(|words| words.starts_with("config")).map(carrier).collect()
}

/// Rings are disabled before the driver hears of it, and enabled again before it hears of that; a successor starts with the
/// cable out, and so does a device that was paused.
#[test]
fn a_cable_stays_out_over_a_death() {
    let mut rig = card(vec![character(STATUS)]);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let first = rig.lives.recv().unwrap();
    rig.device.set_link(LinkState::Down).unwrap();
    let log = first.log();
    let at = log.iter().position(|message| message == "SET_VRING_ENABLE 0 0").unwrap();
    assert_eq!(log[at + 1], "SET_VRING_ENABLE 1 0");
    assert_eq!(status_told(&rig), [false]);
    rig.device.set_link(LinkState::Down).unwrap();
    assert_eq!(first.log().len(), log.len(), "it is out already");

    first.die();
    let second = rig.lives.recv_timeout(Duration::from_secs(20)).unwrap();
    second.await_message("SET_VRING_ENABLE 1");
    await_state(&rig.device, |state| *state == DeviceState::Running);
    let enables = |life: &Life| -> Vec<String> {
        life.log().into_iter().filter(|message| message.starts_with("SET_VRING_ENABLE")).collect()
    };
    assert_eq!(enables(&second), ["SET_VRING_ENABLE 0 0", "SET_VRING_ENABLE 1 0"]);
    assert_eq!(status_told(&rig), [false], "nothing new");

    rig.device.set_link(LinkState::Up).unwrap();
    assert_eq!(enables(&second)[2..], ["SET_VRING_ENABLE 0 1", "SET_VRING_ENABLE 1 1"]);
    assert_eq!(status_told(&rig), [false, true]);
    rig.device.stop(Instant::now() + Duration::from_secs(5));
    assert!(rig.device.set_link(LinkState::Down).unwrap_err().to_string().contains("stopped"));
}

/// What has no carrier to show says so.
#[test]
fn what_has_no_cable_says_so() {
    let why = |rig: Rig| rig.device.set_link(LinkState::Down).unwrap_err().to_string();
    assert!(why(rig(vec![Character::default()])).contains("no network card"));
    assert!(why(card(vec![character(0)])).contains("VIRTIO_NET_F_STATUS"));
}
