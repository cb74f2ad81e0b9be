//! Upgrades, word by word: what the old build and the new one hear, and what comes of states that cannot be right.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::fake::StateChannel;
use super::*;
use crate::vhost::upgrade::{UpgradeError, UpgradeOrder};

fn knowing(channel: StateChannel) -> Character {
    let usual = Character::default();
    Character { protocol: usual.protocol | Protocol::DEVICE_STATE, channel, ..usual }
}

fn order() -> UpgradeOrder {
    UpgradeOrder { exe: std::env::current_exe().unwrap(), step: Duration::from_secs(5) }
}

fn running(characters: Vec<Character>) -> (Rig, Life) {
    let mut rig = rig(characters);
    assert_eq!(wait(rig.frontend.intent(activate())), Some(0));
    let life = rig.lives.recv().unwrap();
    (rig, life)
}

/// The new build is told of features, memory and the record while the old one serves, and of nothing more; the old one
/// stops and says what it knows; the new one hears it, and gets the rings. Whichever channel each uses.
#[test]
fn a_build_takes_over_word_by_word() {
    for (old, new) in [
        (StateChannel::Memory, StateChannel::Memory),
        (StateChannel::Memory, StateChannel::Offered),
        (StateChannel::Offered, StateChannel::Memory),
    ] {
        let (rig, old) = running(vec![knowing(old), knowing(new)]);
        let before = old.log().len();
        assert_eq!(rig.device.upgrade(order()), Ok(2), "{:?}", old.log());
        let last = &old.log()[before..];
        assert_eq!(last, ["GET_VRING_BASE 0", "GET_VRING_BASE 1", "SET_DEVICE_STATE_FD SAVE", "CHECK_DEVICE_STATE"]);
        let new = rig.lives.recv().unwrap().log();
        let at = |word: &str| {
            new.iter().position(|said| said.starts_with(word)).unwrap_or_else(|| panic!("{word}: {new:?}"))
        };
        let words =
            ["SET_FEATURES", "SET_MEM_TABLE", "SET_INFLIGHT_FD", "SET_DEVICE_STATE_FD LOAD", "CHECK_DEVICE_STATE"];
        let places = words.map(at);
        assert!(places.is_sorted() && places[4] < at("SET_VRING_NUM 0"), "{new:?}");
        let again = |word: &str| new.iter().filter(|said| said.starts_with(word)).count();
        assert_eq!((again("SET_MEM_TABLE"), again("SET_FEATURES"), again("SET_INFLIGHT_FD")), (1, 1, 1), "{new:?}");
        let status = rig.device.status();
        assert_eq!((status.lost, status.generation), (0, 2));
        assert_eq!(status.exe.as_deref(), std::env::current_exe().ok().as_deref());
    }
}

/// A state that does not come, is no memory or has no end, a build that lacks something or is silent: the old one has its
/// rings, and nothing was lost.
#[test]
fn the_old_build_carries_on() {
    use StateChannel::{Endless, Long, Memory, Pipe};
    let silent = |at: &str| Character { misdeed: Some((at.into(), Misdeed::Silence)), ..knowing(Memory) };
    let refusing = |at: &str| Character { misdeed: Some((at.into(), Misdeed::Refuse)), ..knowing(Memory) };
    let stateless = Character { protocol: Character::default().protocol, ..knowing(Memory) };
    let lacking = Character { features: (1 << 32) | (1 << 30) | (1 << 29), ..knowing(Memory) };
    for (old, new, why) in [
        (knowing(Endless), knowing(Memory), "cannot be read"),
        (knowing(Pipe), knowing(Memory), "no memory"),
        (knowing(Long), knowing(Memory), "longer than"),
        (knowing(Memory), knowing(Pipe), "no memory"),
        (knowing(Memory), stateless, "DEVICE_STATE"),
        (knowing(Memory), lacking, "VIRTIO_BLK_F_FLUSH"),
        (knowing(Memory), refusing("CHECK_DEVICE_STATE"), "refuses"),
        (knowing(Memory), refusing("SET_DEVICE_STATE_FD"), "refused"),
        (knowing(Memory), silent("GET_CONFIG"), "did not answer GET_CONFIG"),
        (knowing(Memory), silent("SET_MEM_TABLE"), "did not answer SET_MEM_TABLE"),
    ] {
        let (rig, old) = running(vec![old, new]);
        let told = rig.device.upgrade(order()).unwrap_err();
        assert!(matches!(&told, UpgradeError::Refused(said) if said.contains(why)), "{why}: {told}");
        let status = await_state(&rig.device, |state| *state == DeviceState::Running);
        assert_eq!((status.lost, status.generation), (0, 1), "{why}");
        // The last word of a start, or the one before the question that shows that it was heard.
        assert!(
            old.log().iter().rev().take(2).any(|said| said.starts_with("SET_VRING_ENABLE")),
            "{why}: {:?}",
            old.log()
        );
    }
}
