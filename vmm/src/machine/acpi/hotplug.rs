//! The AML of PCI slots: each can be ejected, and an event says which to look at or to let go.
//!
//! The event's method reads a bitmap of the hotplug registers, writes back what it has read, which takes it up, and
//! notifies the slots: 1 is "device check", 3 "eject request" (ACPI 6.5, 5.6.6). Slot 0 is the host bridge and fixed.

use acpi_tables::aml::{
    Acquire, And, Arg, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Mutex, Name, Notify, OpRegion, OpRegionSpace, Path, Release, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use atoll_devices::acpi_hotplug::{GPE_SLOTS, SLOTS_LEN, SLOTS_OFFSET};

use crate::machine::layout::{ACPI_HOTPLUG, PCI_SLOTS};

const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// An `Acquire` that waits for ever: the lock is held for a few register accesses.
const NO_TIMEOUT: u16 = 0xffff;

/// AML that is there already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn slot_name(slot: u8) -> Path {
    format!("S{slot:02X}_").as_str().into()
}

/// What belongs into the scope of the host bridge: registers, slots and the methods that serve them.
pub(super) fn slots(sink: &mut Vec<u8>) {
    let start = ACPI_HOTPLUG.start + SLOTS_OFFSET;
    OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &start, &SLOTS_LEN).to_aml_bytes(sink);
    Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        ["HPIN", "HPLV", "HPEJ"].map(|name| FieldEntry::Named(name_seg(name), 32)).into(),
    )
    .to_aml_bytes(sink);
    Mutex::new("HPLK".into(), 0).to_aml_bytes(sink);
    let mut notices = Vec::new();
    for slot in 1..PCI_SLOTS {
        let bit = 1_u32 << slot;
        let address = u32::from(slot) << 16;
        let lock = Acquire::new("HPLK".into(), NO_TIMEOUT);
        let eject_register: Path = "HPEJ".into();
        let eject = Store::new(&eject_register, &bit);
        let unlock = Release::new("HPLK".into());
        Device::new(
            slot_name(slot),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), &slot),
                &Method::new("_EJ0".into(), 1, true, vec![&lock, &eject, &unlock]),
            ],
        )
        .to_aml_bytes(sink);
        let (slot, notice) = (slot_name(slot), Arg(1));
        If::new(&And::new(&ZERO, &Arg(0), &bit), vec![&Notify::new(&slot, &notice)]).to_aml_bytes(&mut notices);
    }
    // Arg0: slots by bit. Arg1: what to tell them.
    Method::new("HPNT".into(), 2, false, vec![&Raw(notices)]).to_aml_bytes(sink);
    let mut steps = Vec::new();
    Acquire::new("HPLK".into(), NO_TIMEOUT).to_aml_bytes(&mut steps);
    for (register, notice) in [("HPIN", DEVICE_CHECK), ("HPLV", EJECT_REQUEST)] {
        let register: Path = register.into();
        Store::new(&Local(0), &register).to_aml_bytes(&mut steps);
        Store::new(&register, &Local(0)).to_aml_bytes(&mut steps);
        MethodCall::new("HPNT".into(), vec![&Local(0), &notice]).to_aml_bytes(&mut steps);
    }
    Release::new("HPLK".into()).to_aml_bytes(&mut steps);
    Method::new("HPEV".into(), 0, true, vec![&Raw(steps)]).to_aml_bytes(sink);
}

/// The event, by level: its status stays until all requests are taken up.
pub(super) fn event(sink: &mut Vec<u8>) {
    let look = MethodCall::new("\\_SB_.PCI0.HPEV".into(), vec![]);
    let name = format!("_L{GPE_SLOTS:02X}");
    let method = Method::new(name.as_str().into(), 0, true, vec![&look]);
    Scope::new("\\_GPE".into(), vec![&method]).to_aml_bytes(sink);
}

fn name_seg(name: &str) -> [u8; 4] {
    let mut seg = [b'_'; 4];
    seg.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    seg
}
