//! PCI hotplug by ACPI: a general-purpose event that says "look at the slots", and registers that say which.
//!
//! Two bitmaps, one bit a slot, are what the host wants of the guest: look for a device (`inserted`), let one go
//! (`leaving`). The guest's AML reads a bitmap, writes back what it has taken up, which clears it, and notifies the slots'
//! drivers. A guest that lets a device go writes its bit to the eject register.
//!
//! The event's status is the level of the two bitmaps and not a latch: it cannot be cleared while a request is open, so
//! no request is lost to a guest that clears all events when it starts, and none is told twice.
//!
//! Only slots that hold a device and are not fixed take requests or can be ejected, and each device leaves once; any
//! other write does nothing.

use std::fmt;
use std::sync::Arc;

use crate::access::{Answer, RegisterDevice};
use crate::interrupt::Wire;

/// Ports of the block.
pub const LEN: u64 = 0x20;
/// Where the general-purpose event block is: status and enable (ACPI 6.5, 4.8.4.1).
pub const GPE_OFFSET: u64 = 0;
/// Bytes of it: two of status, two of enable.
pub const GPE_LEN: u8 = 4;
/// The event of the slots: `_L01` in AML.
pub const GPE_SLOTS: u16 = 1;
/// Where the slot registers are: inserted, leaving, eject; each of 32 bits.
pub const SLOTS_OFFSET: u64 = 0x10;
/// Bytes of them.
pub const SLOTS_LEN: u64 = 0x0c;

const STATUS: usize = 0;
const ENABLE: usize = 2;
const INSERTED: u64 = SLOTS_OFFSET;
const LEAVING: u64 = SLOTS_OFFSET + 4;
const EJECT: u64 = SLOTS_OFFSET + 8;

/// Hears that the guest has let a device go. Called in the middle of the guest's write, with the block's lock held.
pub trait EjectSink: Send + Sync {
    /// The device in `slot` is to be out of the guest's sight when this returns.
    fn ejected(&self, slot: u8);
}

/// What a guest can see of the registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcpiHotplugState {
    /// Enabled events.
    pub enable: u16,
    /// Slots whose device is to be looked for.
    pub inserted: u32,
    /// Slots whose device is to be let go.
    pub leaving: u32,
}

/// The register block. As a device it answers [`LEN`] ports.
pub struct AcpiHotplug {
    state: AcpiHotplugState,
    /// Slots that hold a device which may leave.
    removable: u32,
    /// Those of them that the guest has let go and the host has not yet freed.
    ejected: u32,
    sci: Wire,
    sci_high: bool,
    sink: Arc<dyn EjectSink>,
}

/// The bit of a slot; none beyond 31.
fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

impl AcpiHotplug {
    /// As after power-on, without devices. `sci` is the system control interrupt.
    pub fn new(sci: Wire, sink: Arc<dyn EjectSink>) -> Self {
        Self { state: AcpiHotplugState::default(), removable: 0, ejected: 0, sci, sci_high: false, sink }
    }

    /// A device that may leave is in `slot`; the guest finds it by itself.
    pub fn occupied(&mut self, slot: u8) {
        self.vacated(slot);
        self.removable |= bit(slot);
    }

    /// Tells the guest to look for the device in `slot`.
    pub fn announce(&mut self, slot: u8) {
        self.state.inserted |= bit(slot) & self.removable & !self.ejected;
        self.update_sci();
    }

    /// Asks the guest to let the device in `slot` go, once more if it was asked before; whether there is one to ask for.
    pub fn ask_to_leave(&mut self, slot: u8) -> bool {
        let asked = bit(slot) & self.removable & !self.ejected;
        self.state.leaving |= asked;
        self.update_sci();
        asked != 0
    }

    /// Withdraws that, as far as the guest has not taken it up.
    pub fn withdraw(&mut self, slot: u8) {
        self.state.leaving &= !bit(slot);
        self.update_sci();
    }

    /// There is no device in `slot` any more.
    pub fn vacated(&mut self, slot: u8) {
        let others = !bit(slot);
        self.removable &= others;
        self.ejected &= others;
        self.state.inserted &= others;
        self.state.leaving &= others;
        self.update_sci();
    }

    /// The slots whose devices the guest has let go and nobody has freed yet, a bit each.
    pub fn ejected(&self) -> u32 {
        self.ejected
    }

    /// The registers.
    pub fn state(&self) -> AcpiHotplugState {
        self.state
    }

    /// Puts them back; requests for slots without a device are left out.
    pub fn restore(&mut self, state: AcpiHotplugState) {
        let there = self.removable & !self.ejected;
        self.state = AcpiHotplugState {
            enable: state.enable & 1 << GPE_SLOTS,
            inserted: state.inserted & there,
            leaving: state.leaving & there,
        };
        self.update_sci();
    }

    fn status(&self) -> u16 {
        u16::from(self.state.inserted | self.state.leaving != 0) << GPE_SLOTS
    }

    fn update_sci(&mut self) {
        let high = self.status() & self.state.enable != 0;
        if high != self.sci_high {
            self.sci_high = high;
            self.sci.set(high);
        }
    }

    fn eject(&mut self, slots: u32) {
        let going = slots & self.removable & !self.ejected;
        self.ejected |= going;
        self.state.inserted &= !going;
        self.state.leaving &= !going;
        (0..32).filter(|slot| going & bit(*slot) != 0).for_each(|slot| self.sink.ejected(slot));
    }

    fn image(&self) -> [u8; LEN as usize] {
        let mut image = [0; LEN as usize];
        image[STATUS..][..2].copy_from_slice(&self.status().to_le_bytes());
        image[ENABLE..][..2].copy_from_slice(&self.state.enable.to_le_bytes());
        image[INSERTED as usize..][..4].copy_from_slice(&self.state.inserted.to_le_bytes());
        image[LEAVING as usize..][..4].copy_from_slice(&self.state.leaving.to_le_bytes());
        image
    }
}

impl RegisterDevice for AcpiHotplug {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0);
        let image = self.image();
        let bytes = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Answer::Now
    }

    /// Events may be written by bytes; the slot registers take only whole doublewords.
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        if let Ok(slots) = data.try_into().map(u32::from_le_bytes) {
            match offset {
                INSERTED => self.state.inserted &= !slots,
                LEAVING => self.state.leaving &= !slots,
                EJECT => self.eject(slots),
                _ => {}
            }
        }
        let mut enable = self.state.enable.to_le_bytes();
        for (at, value) in (offset..).zip(data) {
            if let Some(byte) = at.checked_sub(ENABLE as u64).and_then(|at| enable.get_mut(usize::try_from(at).ok()?)) {
                *byte = *value;
            }
        }
        self.state.enable = u16::from_le_bytes(enable) & 1 << GPE_SLOTS;
        self.update_sci();
        Answer::Now
    }
}

impl fmt::Debug for AcpiHotplug {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("AcpiHotplug")
            .field("state", &self.state)
            .field("removable", &format_args!("{:#x}", self.removable))
            .field("ejected", &format_args!("{:#x}", self.ejected))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::interrupt::WireSink;

    #[derive(Default)]
    struct Log(Mutex<(Vec<bool>, Vec<u8>)>);
    impl WireSink for Log {
        fn set_level(&self, _line: u32, high: bool) {
            self.0.lock().unwrap().0.push(high);
        }
    }
    impl EjectSink for Log {
        fn ejected(&self, slot: u8) {
            self.0.lock().unwrap().1.push(slot);
        }
    }

    fn block() -> (AcpiHotplug, Arc<Log>) {
        let log = Arc::new(Log::default());
        let wire = Wire::new(Arc::clone(&log) as Arc<dyn WireSink>, 9);
        (AcpiHotplug::new(wire, Arc::clone(&log) as Arc<dyn EjectSink>), log)
    }
    fn put(block: &mut AcpiHotplug, offset: u64, data: &[u8]) {
        assert!(matches!(block.write(offset, data), Answer::Now));
    }
    fn get(block: &mut AcpiHotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(matches!(block.read(offset, &mut data), Answer::Now));
        u32::from_le_bytes(data)
    }

    /// What Linux does: at its start it clears all events and enables this one; then, when interrupted, it disables it, runs
    /// the method, clears it and enables it again. A request from before the start is still told.
    #[test]
    fn a_guest_that_starts_late_hears_of_everything() {
        let (mut block, log) = block();
        block.occupied(5);
        block.announce(5);
        block.occupied(6);
        assert!(block.ask_to_leave(6));
        put(&mut block, 2, &[0]);
        put(&mut block, 0, &[0xff]);
        assert!(log.0.lock().unwrap().0.is_empty());
        put(&mut block, 2, &[2]);
        assert_eq!(get(&mut block, 0) & 0xffff, 2);
        put(&mut block, 2, &[0]);
        let inserted = get(&mut block, INSERTED);
        put(&mut block, INSERTED, &inserted.to_le_bytes());
        let leaving = get(&mut block, LEAVING);
        put(&mut block, LEAVING, &leaving.to_le_bytes());
        assert_eq!((inserted, leaving), (1 << 5, 1 << 6));
        put(&mut block, 0, &[0xff]);
        put(&mut block, 2, &[2]);
        assert_eq!(log.0.lock().unwrap().0, [true, false], "told once, and quiet afterwards");
        put(&mut block, EJECT, &(1_u32 << 6).to_le_bytes());
        assert_eq!(log.0.lock().unwrap().1, [6]);
        assert_eq!(block.ejected(), 1 << 6);
        assert!(!block.ask_to_leave(6), "it is gone already");
        block.vacated(6);
        assert_eq!(block.ejected(), 0);
    }

    /// A request that the guest does not take up is withdrawn; one that it takes up later all the same is its own wish.
    #[test]
    fn withdrawn_requests_are_silent() {
        let (mut block, log) = block();
        put(&mut block, 2, &[2]);
        block.occupied(31);
        assert!(block.ask_to_leave(31) && !block.ask_to_leave(30) && !block.ask_to_leave(32));
        block.withdraw(31);
        assert_eq!(log.0.lock().unwrap().0, [true, false]);
        assert_eq!(get(&mut block, LEAVING), 0);
        put(&mut block, EJECT, &u32::MAX.to_le_bytes());
        assert_eq!(log.0.lock().unwrap().1, [31]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, Vec<u8>),
        Occupied(u8),
        Announce(u8),
        Ask(u8),
        Vacated(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let slot = 0_u8..40;
        let offset = prop_oneof![0..LEN, Just(u64::MAX), Just(u64::MAX - 2), Just(EJECT)];
        prop_oneof![
            4 => (offset, prop::collection::vec(any::<u8>(), 1..=8)).prop_map(|(at, data)| Step::Write(at, data)),
            1 => slot.clone().prop_map(Step::Occupied),
            1 => slot.clone().prop_map(Step::Announce),
            1 => slot.clone().prop_map(Step::Ask),
            1 => slot.prop_map(Step::Vacated),
        ]
    }

    proptest! {
        /// Whatever is written in whatever order: only a device that is there is let go, and only once; the interrupt is
        /// high exactly while an enabled request is open.
        #[test]
        fn hostile_writes_are_contained(steps in prop::collection::vec(step(), 0..64)) {
            let (mut block, log) = block();
            let mut there = 0_u64;
            for step in steps {
                let before = there;
                match step {
                    Step::Write(offset, data) => put(&mut block, offset, &data),
                    Step::Occupied(slot) => {
                        block.occupied(slot);
                        there |= 1 << slot & 0xffff_ffff;
                    }
                    Step::Announce(slot) => block.announce(slot),
                    Step::Ask(slot) => prop_assert_eq!(block.ask_to_leave(slot), there >> slot & 1 == 1),
                    Step::Vacated(slot) => {
                        block.vacated(slot);
                        there &= !(1 << slot);
                    }
                }
                for slot in std::mem::take(&mut log.0.lock().unwrap().1) {
                    prop_assert!(before >> slot & 1 == 1);
                    there &= !(1 << slot);
                }
                let open = get(&mut block, INSERTED) | get(&mut block, LEAVING);
                prop_assert_eq!(u64::from(open) & !there, 0);
                let high = log.0.lock().unwrap().0.last().copied().unwrap_or(false);
                prop_assert_eq!(high, open != 0 && block.state().enable != 0);
            }
        }
    }
}
