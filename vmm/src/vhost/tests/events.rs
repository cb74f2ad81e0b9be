//! Events that a configuration space tells of, and that the driver takes note of: a GPU's, whose screens become others.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use atoll_devices::virtio::input_config::Pages;
use atoll_devices::virtio::{DeviceOffer, Intent, VirtioFrontend, device_class};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::fake::{Character, Life};
use super::{Capabilities, ConfigWish, ConversationError, DeviceClass, Rig, activate, parts, rig_of, wait};

/// events_read, events_clear, num_scanouts, num_capsets.
const CALM: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
/// Another size is wanted for a screen.
const EVENT: [u8; 16] = [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
/// What the driver writes when it knows.
const ACKNOWLEDGE: (u32, [u8; 4]) = (4, [1, 0, 0, 0]);

struct Screen;

impl DeviceClass for Screen {
    fn device_type(&self) -> u16 {
        device_class::GPU
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Needed(16)
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        Ok(DeviceOffer {
            device_type: self.device_type(),
            features: backend.features,
            queue_sizes: vec![64; 2],
            config: backend.config.clone(),
            pages: Pages::default(),
        })
    }
}

fn with(config: [u8; 16]) -> Character {
    let protocol = Protocol::MQ | Protocol::CONFIG | Protocol::INFLIGHT_SHMFD | Protocol::BACKEND_REQ;
    Character { protocol, config: config.to_vec(), ..Character::default() }
}

/// A GPU that runs, served by one after the other.
fn screen(configs: &[[u8; 16]]) -> (Rig, Life) {
    let (mut parts, lives) = parts(configs.iter().map(|config| with(*config)).collect());
    parts.class = Box::new(Screen);
    let mut rig = rig_of(parts, lives);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let life = next(&rig.lives);
    (rig, life)
}

fn next(lives: &Receiver<Life>) -> Life {
    let life = lives.recv_timeout(Duration::from_secs(20)).unwrap();
    life.await_message("SET_VRING_ENABLE 1");
    life
}

impl Rig {
    /// Waits until the driver was shown the configurations `expected`, in this order, and nothing else.
    fn await_shown(&self, expected: &[[u8; 16]]) {
        let expected: Vec<String> = expected.iter().map(|config| format!("config {config:?}")).collect();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let told = self.told.0.lock().unwrap().clone();
            let shown: Vec<String> = told.into_iter().filter(|word| word.starts_with("config")).collect();
            if shown == expected {
                return;
            }
            assert!(Instant::now() < deadline && shown.len() <= expected.len(), "{shown:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn acknowledge(&mut self) {
        let (offset, data) = ACKNOWLEDGE;
        let _ = self.frontend.intent(Intent::ConfigWrite { offset, data: data.to_vec() });
    }
}

/// A guest's screen followed the first change of its viewer's window and no other: the first event was shown for ever, and the
/// second one changed nothing. What the driver has acknowledged is gone, the backend hears of it, and the next event is one; one
/// that comes while another stands is told, too.
#[test]
fn an_event_after_an_acknowledged_one_is_heard() {
    let (mut rig, life) = screen(&[CALM]);
    life.tells_config(&EVENT);
    rig.await_shown(&[EVENT]);
    rig.acknowledge();
    rig.await_shown(&[EVENT, CALM]);
    life.await_message("SET_CONFIG 4 [1, 0, 0, 0]");
    life.has_config(&CALM);
    life.tells_config(&EVENT);
    rig.await_shown(&[EVENT, CALM, EVENT]);
    life.tells_config(&EVENT);
    rig.await_shown(&[EVENT, CALM, EVENT, EVENT]);
    rig.acknowledge();
    rig.await_shown(&[EVENT, CALM, EVENT, EVENT, CALM]);
}

/// A successor that still has the event tells of it again, and the driver may acknowledge it to that one. What was acknowledged
/// is not said to the next one, which knows of no event; the next event is heard from there.
#[test]
fn events_outlive_their_backend() {
    let (mut rig, first) = screen(&[CALM, EVENT, CALM]);
    first.tells_config(&EVENT);
    rig.await_shown(&[EVENT]);
    first.die();
    let second = next(&rig.lives);
    rig.await_shown(&[EVENT, EVENT]);
    rig.acknowledge();
    rig.await_shown(&[EVENT, EVENT, CALM]);
    second.await_message("SET_CONFIG 4 [1, 0, 0, 0]");
    assert!(!second.log()[..second.log().len() - 1].iter().any(|message| message.starts_with("SET_CONFIG")));
    second.die();
    let third = next(&rig.lives);
    third.tells_config(&EVENT);
    rig.await_shown(&[EVENT, EVENT, CALM, EVENT]);
    assert!(!third.log().iter().any(|message| message.starts_with("SET_CONFIG")), "{:?}", third.log());
}
