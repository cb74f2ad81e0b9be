//! The configuration space of virtio-input (virtio 1.2, 5.8.4): a driver writes which page it wants, and reads it.
//!
//! There are few pages and none ever changes, so whoever stands in front of a device asks for all of them once
//! ([`Pages::ask`]) and answers its driver by itself: a write of `select` and `subsel` puts another page in place
//! ([`Pages::config`]), and no process has to be waited for.

use std::collections::BTreeMap;

/// Bytes of the configuration space.
pub const LEN: usize = 136;
/// Most bytes of a page.
pub const PAGE_MAX: usize = 128;
/// Offsets: of `size`, and of the page.
const SIZE_AT: usize = 2;
const PAGE_AT: usize = 8;

/// What can be selected.
pub mod select {
    /// Name.
    pub const ID_NAME: u8 = 0x01;
    /// Serial number.
    pub const ID_SERIAL: u8 = 0x02;
    /// Bus type, vendor, product, version.
    pub const ID_DEVIDS: u8 = 0x03;
    /// Properties, a bit each.
    pub const PROP_BITS: u8 = 0x10;
    /// Codes of the type of event that `subsel` is, a bit each.
    pub const EV_BITS: u8 = 0x11;
    /// Limits of the absolute axis that `subsel` is.
    pub const ABS_INFO: u8 = 0x12;
}

/// Type of events that absolute axes have.
const ABS: u8 = 3;
/// Types of events and absolute axes that there can be.
const TYPES: u8 = 0x20;
const AXES: u8 = 0x40;

/// All pages of a device that say something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages(BTreeMap<(u8, u8), Vec<u8>>);

impl Pages {
    /// Adds a page, cut to what fits; an empty one is as if it were not there.
    pub fn set(&mut self, select: u8, subsel: u8, mut page: Vec<u8>) {
        page.truncate(PAGE_MAX);
        if page.is_empty() {
            self.0.remove(&(select, subsel));
        } else {
            self.0.insert((select, subsel), page);
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A page; empty, when there is none.
    #[must_use]
    pub fn page(&self, select: u8, subsel: u8) -> &[u8] {
        self.0.get(&(select, subsel)).map_or(&[], Vec::as_slice)
    }

    /// The whole configuration space once these are selected.
    #[must_use]
    pub fn config(&self, select: u8, subsel: u8) -> [u8; LEN] {
        let mut config = [0; LEN];
        let page = self.page(select, subsel);
        let head = [select, subsel, page.len() as u8];
        config.iter_mut().zip(head).for_each(|(to, byte)| *to = byte);
        config.iter_mut().skip(PAGE_AT).zip(page).for_each(|(to, byte)| *to = *byte);
        config
    }

    /// Asks somebody else's device for all pages: `read` selects one and gives the configuration space. What is not as long
    /// as it says is taken as far as it goes.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn ask<E>(mut read: impl FnMut(u8, u8) -> Result<Vec<u8>, E>) -> Result<Self, E> {
        let mut pages = Self::default();
        let ids = [select::ID_NAME, select::ID_SERIAL, select::ID_DEVIDS, select::PROP_BITS].map(|id| (id, 0));
        for (select, subsel) in ids.into_iter().chain((0..TYPES).map(|kind| (select::EV_BITS, kind))) {
            pages.take(select, subsel, &read(select, subsel)?);
        }
        let axes = pages.page(select::EV_BITS, ABS).to_vec();
        let has = |axis: u8| axes.get(usize::from(axis / 8)).is_some_and(|bits| bits & 1 << (axis % 8) != 0);
        for axis in (0..AXES).filter(|axis| has(*axis)) {
            pages.take(select::ABS_INFO, axis, &read(select::ABS_INFO, axis)?);
        }
        Ok(pages)
    }

    fn take(&mut self, select: u8, subsel: u8, config: &[u8]) {
        let size = config.get(SIZE_AT).copied().unwrap_or(0);
        let page = config.iter().skip(PAGE_AT).take(size.into()).copied();
        self.set(select, subsel, page.collect());
    }
}

/// A bitmap as pages have it: as long as its highest bit needs.
#[must_use]
pub fn bits(numbers: impl IntoIterator<Item = u16>) -> Vec<u8> {
    let mut bitmap = Vec::new();
    for number in numbers {
        let at = usize::from(number / 8);
        if bitmap.len() <= at {
            bitmap.resize(at + 1, 0);
        }
        if let Some(byte) = bitmap.get_mut(at) {
            *byte |= 1 << (number % 8);
        }
    }
    bitmap
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who asks has what there is, and no device makes the list long.
    #[test]
    fn a_copy_answers_as_the_device_would() {
        let mut device = Pages::default();
        device.set(select::ID_NAME, 0, b"pointer".to_vec());
        device.set(select::EV_BITS, ABS, bits([0, 1, 63]));
        device.set(select::ABS_INFO, 63, vec![9; 20]);
        device.set(select::ABS_INFO, 5, vec![1; 20]);
        let mut asked = 0;
        let copy = Pages::ask(|select, subsel| {
            asked += 1;
            Ok::<_, ()>(device.config(select, subsel).to_vec())
        });
        let copy = copy.unwrap();
        assert_eq!((copy.page(select::ABS_INFO, 63), copy.page(select::ABS_INFO, 5)), (&[9; 20][..], &[][..]));
        assert_eq!(&copy.config(select::ID_NAME, 0)[..16], b"\x01\0\x07\0\0\0\0\0pointer\0");
        assert_eq!(copy.config(7, 7)[..9], [7, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(asked, 4 + 32 + 3);
        let liar = Pages::ask(|_, _| Ok::<_, ()>(vec![255; 20])).unwrap();
        assert_eq!(liar.page(select::ID_NAME, 0), [255; 12]);
        assert!(bits([]).is_empty());
    }
}
