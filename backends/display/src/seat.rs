//! Whoever sits before the screen: keys and pointers of all viewers, told to the guest's input devices.
//!
//! A key is down for the guest as long as any viewer holds it; a viewer that goes lets go. A device that does not take what it
//! is told misses it, and hears what is held when it listens again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use atoll_protocol::display::Rect;
use atoll_protocol::input::{AXIS_MAX, Event, Frame, InputKind, REPORT_MAX, Report, Speaker, Spoken, code};

/// A viewer's number.
pub type ViewerId = u64;

/// Buttons of a viewer's pointer, by their bits.
const BUTTONS: [(u8, u16); 4] = [(0, code::BTN_LEFT), (1, code::BTN_MIDDLE), (2, code::BTN_RIGHT), (7, code::BTN_SIDE)];
/// Bits that are clicks of a wheel: axis and direction.
const WHEELS: [(u8, u16, i32); 4] =
    [(3, code::WHEEL, 1), (4, code::WHEEL, -1), (5, code::HWHEEL, -1), (6, code::HWHEEL, 1)];

/// The pointer of one viewer.
#[derive(Clone, Copy, Debug, Default)]
struct Pointer {
    buttons: u8,
    at: (u32, u32),
}

/// Devices, and what is held.
#[derive(Debug, Default)]
pub struct Seat {
    devices: BTreeMap<InputKind, Speaker>,
    /// Keys and buttons that are down, and who holds them.
    held: BTreeMap<(InputKind, u16), BTreeSet<ViewerId>>,
    pointers: BTreeMap<ViewerId, Pointer>,
}

impl Seat {
    /// From now on this is the device of this kind.
    pub fn connect(&mut self, kind: InputKind, socket: OwnedFd) {
        self.devices.insert(kind, Speaker::new(socket));
        self.say(kind, Vec::new());
    }

    /// Which device pointers are for: one that is told places is better.
    fn pointer_kind(&self) -> InputKind {
        if self.devices.contains_key(&InputKind::Tablet) { InputKind::Tablet } else { InputKind::Mouse }
    }

    /// A viewer's key.
    pub fn key(&mut self, viewer: ViewerId, key: u16, down: bool) {
        let changed = self.hold(viewer, InputKind::Keyboard, key, down);
        self.say(InputKind::Keyboard, changed.into_iter().collect());
    }

    /// A viewer's pointer is at `at` of `desk`, which has all of the guest's heads.
    pub fn pointer(&mut self, viewer: ViewerId, (x, y): (u32, u32), desk: Rect, buttons: u8) {
        let kind = self.pointer_kind();
        let before = self.pointers.insert(viewer, Pointer { buttons, at: (x, y) });
        let mut events = Vec::new();
        let before = before.unwrap_or(Pointer { buttons: 0, at: (x, y) });
        if kind == InputKind::Tablet {
            events.push(Event::absolute(code::X, scaled(x.saturating_sub(desk.x), desk.width)));
            events.push(Event::absolute(code::Y, scaled(y.saturating_sub(desk.y), desk.height)));
        } else {
            for (axis, now, was) in [(code::X, x, before.at.0), (code::Y, y, before.at.1)] {
                let by = i64::from(now) - i64::from(was);
                if by != 0 {
                    events.push(Event::relative(axis, by.clamp(-65_536, 65_536) as i32));
                }
            }
        }
        let mut events: Vec<Event> = events.into_iter().flatten().collect();
        let changed = before.buttons ^ buttons;
        for (bit, button) in BUTTONS.into_iter().filter(|(bit, _)| changed >> bit & 1 != 0) {
            events.extend(self.hold(viewer, kind, button, buttons >> bit & 1 != 0));
        }
        for (_, axis, by) in WHEELS.into_iter().filter(|(bit, ..)| (changed & buttons) >> bit & 1 != 0) {
            events.extend(Event::relative(axis, by));
        }
        self.say(kind, events);
    }

    /// A viewer has gone.
    pub fn leave(&mut self, viewer: ViewerId) {
        self.pointers.remove(&viewer);
        for kind in InputKind::ALL {
            let keys: Vec<u16> = self.held.keys().filter(|(of, _)| *of == kind).map(|(_, key)| *key).collect();
            let up: Vec<Event> = keys.into_iter().filter_map(|key| self.hold(viewer, kind, key, false)).collect();
            for up in up.chunks(REPORT_MAX) {
                self.say(kind, up.to_vec());
            }
        }
    }

    /// Notes who holds what; the event, if that is news for the guest.
    fn hold(&mut self, viewer: ViewerId, kind: InputKind, key: u16, down: bool) -> Option<Event> {
        let holders = self.held.entry((kind, key)).or_default();
        let was = !holders.is_empty();
        if down {
            holders.insert(viewer);
        } else {
            holders.remove(&viewer);
        }
        let is = !holders.is_empty();
        if !is {
            self.held.remove(&(kind, key));
        }
        (was != is).then(|| Event::key(key, is).ok()).flatten()
    }

    /// Tells a device, which hears first what is held if it has missed something.
    fn say(&mut self, kind: InputKind, events: Vec<Event>) {
        let Some(device) = self.devices.get_mut(&kind) else { return };
        let mut told = Vec::new();
        if device.owes_begin() {
            let held = self.held.keys().filter(|(of, _)| *of == kind);
            told.extend(held.filter_map(|(_, key)| Event::key(*key, true).ok()));
            told.retain(|event| !events.contains(event));
        }
        told.extend(events);
        let mut outcome = device.begin();
        for events in told.chunks(REPORT_MAX) {
            // One that has missed the beginning is told nothing of the rest.
            let Ok(Spoken::Sent) = outcome else { break };
            let Ok(report) = Report::new(events.to_vec()) else { break };
            outcome = device.say(&Frame::Report(report));
        }
        if let Err(error) = outcome {
            tracing::warn!(%error, device = %kind, "an input device is gone; what is typed is lost until there is another");
            self.devices.remove(&kind);
        }
    }
}

/// A place among so many, on an absolute axis.
fn scaled(at: u32, count: u32) -> u16 {
    let last = u64::from(count.saturating_sub(1).max(1));
    (u64::from(at).min(last) * u64::from(AXIS_MAX) / last) as u16
}

#[cfg(test)]
mod tests {
    use atoll_protocol::input::Hearer;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    const DESK: Rect = Rect { x: 0, y: 0, width: 1001, height: 501 };

    fn device(seat: &mut Seat, kind: InputKind) -> Hearer {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        seat.connect(kind, a);
        Hearer::new(b)
    }

    fn heard(hearer: &mut Hearer) -> Vec<(u16, u16, i32)> {
        let mut heard = Vec::new();
        while let Some(frame) = hearer.try_hear().unwrap() {
            match frame {
                Frame::Begin => heard.push((99, 0, 0)),
                Frame::Report(report) => {
                    heard.extend(report.events().iter().map(|event| (event.kind(), event.code(), event.value())));
                }
            }
        }
        heard
    }

    /// Two people hold Shift: it is down until the second lets go, or goes.
    #[test]
    fn keys_belong_to_all_who_hold_them() {
        let mut seat = Seat::default();
        let mut keyboard = device(&mut seat, InputKind::Keyboard);
        seat.key(1, 42, true);
        seat.key(2, 42, true);
        seat.key(2, 30, true);
        seat.key(1, 42, false);
        seat.key(1, 31, false);
        assert_eq!(heard(&mut keyboard), [(99, 0, 0), (1, 42, 1), (1, 30, 1)]);
        // The device was started again: it is told what is held.
        let mut keyboard = device(&mut seat, InputKind::Keyboard);
        assert_eq!(heard(&mut keyboard), [(99, 0, 0), (1, 30, 1), (1, 42, 1)]);
        seat.leave(2);
        assert_eq!(heard(&mut keyboard), [(1, 30, 0), (1, 42, 0)]);
    }

    /// Places on a tablet, steps of a mouse, buttons and wheels on both.
    #[test]
    fn pointers_point() {
        let mut seat = Seat::default();
        let mut mouse = device(&mut seat, InputKind::Mouse);
        seat.pointer(1, (10, 10), DESK, 0);
        seat.pointer(1, (7, 10), DESK, 0b1_0001);
        seat.pointer(1, (7, 12), DESK, 0);
        let told = heard(&mut mouse);
        assert_eq!(told, [(99, 0, 0), (2, 0, -3), (1, 0x110, 1), (2, 8, -1), (2, 1, 2), (1, 0x110, 0)]);
        let mut tablet = device(&mut seat, InputKind::Tablet);
        seat.pointer(1, (1000, 250), DESK, 0b100);
        seat.pointer(1, (60_000, 0), DESK, 0b100);
        seat.leave(1);
        let told = heard(&mut tablet);
        assert_eq!(told[..4], [(99, 0, 0), (3, 0, 0x7fff), (3, 1, 0x3fff), (1, 0x111, 1)]);
        assert_eq!(told[4..], [(3, 0, 0x7fff), (3, 1, 0), (1, 0x111, 0)]);
    }

    /// A device that does not listen, and one that is gone, keep nobody waiting.
    #[test]
    fn deaf_devices_do_no_harm() {
        let mut seat = Seat::default();
        let mut keyboard = device(&mut seat, InputKind::Keyboard);
        for at in 0..3000 {
            seat.key(1, 30, at % 2 == 0);
        }
        seat.key(1, 31, true);
        assert!(heard(&mut keyboard).len() < 3000);
        seat.key(1, 32, true);
        assert_eq!(heard(&mut keyboard), [(99, 0, 0), (1, 31, 1), (1, 32, 1)]);
        drop(keyboard);
        seat.key(1, 33, true);
        assert!(seat.devices.is_empty());
    }
}
