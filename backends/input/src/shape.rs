//! What each kind of device says of itself, and so which events it has.

use std::ops::RangeInclusive;

use atoll_devices::virtio::input_config::{Pages, bits, select};
use atoll_protocol::input::{AXIS_MAX, Event, InputKind, code};

/// Codes of a keyboard's keys: all that a keyboard of a PC has, and those for media that come with it.
const KEYS: RangeInclusive<u16> = 1..=248;
/// Buttons of a pointer.
const BUTTONS: RangeInclusive<u16> = code::BTN_LEFT..=code::BTN_EXTRA;
/// Lights of a keyboard: Num Lock, Caps Lock, Scroll Lock.
const LIGHTS: RangeInclusive<u16> = 0..=2;
/// BUS_VIRTUAL, vendor (that of virtio), version.
const BUS_VIRTUAL: u16 = 6;
const VENDOR: u16 = 0x1af4;
const VERSION: u16 = 1;

/// Its keys or buttons.
#[must_use]
pub fn keys(kind: InputKind) -> RangeInclusive<u16> {
    match kind {
        InputKind::Keyboard => KEYS,
        InputKind::Tablet | InputKind::Mouse => BUTTONS,
    }
}

fn relative(kind: InputKind) -> &'static [u16] {
    match kind {
        InputKind::Keyboard => &[],
        InputKind::Tablet => &[code::HWHEEL, code::WHEEL],
        InputKind::Mouse => &[code::X, code::Y, code::HWHEEL, code::WHEEL],
    }
}

fn absolute(kind: InputKind) -> &'static [u16] {
    match kind {
        InputKind::Tablet => &[code::X, code::Y],
        InputKind::Keyboard | InputKind::Mouse => &[],
    }
}

/// Whether a device of this kind can say this.
#[must_use]
pub fn has(kind: InputKind, event: Event) -> bool {
    match event.kind() {
        code::KEY => keys(kind).contains(&event.code()),
        code::REL => relative(kind).contains(&event.code()),
        code::ABS => absolute(kind).contains(&event.code()),
        _ => false,
    }
}

/// Its configuration space.
#[must_use]
pub fn pages(kind: InputKind, serial: &str) -> Pages {
    let mut pages = Pages::default();
    pages.set(select::ID_NAME, 0, format!("Atoll {kind}").into_bytes());
    pages.set(select::ID_SERIAL, 0, serial.as_bytes().to_vec());
    let ids = [BUS_VIRTUAL, VENDOR, kind as u16 + 1, VERSION];
    pages.set(select::ID_DEVIDS, 0, ids.into_iter().flat_map(u16::to_le_bytes).collect());
    let types = [
        (code::KEY, bits(keys(kind))),
        (code::REL, bits(relative(kind).iter().copied())),
        (code::ABS, bits(absolute(kind).iter().copied())),
    ];
    for (subsel, bitmap) in types {
        pages.set(select::EV_BITS, subsel as u8, bitmap);
    }
    if kind == InputKind::Keyboard {
        pages.set(select::EV_BITS, code::LED as u8, bits(LIGHTS));
        // Keys repeat, and the driver does it: delay and period.
        pages.set(select::EV_BITS, code::REP as u8, bits(0..=1));
    }
    for axis in absolute(kind) {
        // Least, most, fuzz, flat, resolution.
        let limits = [0, u32::from(AXIS_MAX), 0, 0, 0].into_iter().flat_map(u32::to_le_bytes);
        pages.set(select::ABS_INFO, *axis as u8, limits.collect());
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device says that it has, it lets through, and nothing else.
    #[test]
    fn a_device_is_what_it_says() {
        for kind in InputKind::ALL {
            let pages = pages(kind, "");
            assert!(pages.page(select::ID_SERIAL, 0).is_empty());
            let says = |kind: u8, code: u16| {
                let bitmap = pages.page(select::EV_BITS, kind);
                bitmap.get(usize::from(code / 8)).is_some_and(|byte| byte & 1 << (code % 8) != 0)
            };
            for code in 0..=code::KEY_MAX {
                assert_eq!(has(kind, Event::key(code, true).unwrap()), says(1, code), "{kind} {code}");
            }
            for code in 0..=code::REL_MAX {
                assert_eq!(has(kind, Event::relative(code, 1).unwrap()), says(2, code), "{kind} {code}");
            }
            for code in 0..=code::ABS_MAX {
                assert_eq!(has(kind, Event::absolute(code, 1).unwrap()), says(3, code), "{kind} {code}");
                assert_eq!(pages.page(select::ABS_INFO, code as u8).len(), if says(3, code) { 20 } else { 0 });
            }
            assert!(!has(kind, Event::SYN));
        }
    }
}
