//! Configuration space, BARs, MSI-X and the root bus as a guest's firmware and kernel drive them, and as a hostile one does.

use std::sync::{Arc, Mutex};

use super::config_space::{CONFIG_LEN, CapabilityError};
use super::*;
use crate::access::{Answer, RegisterDevice};
use crate::interrupt::{MsiMessage, MsixRoutes};
use crate::power::{PowerEvent, PowerSink};

/// A board's map: what answers where.
#[derive(Default)]
struct Mapped(Mutex<Vec<(u8, BarSpace, u64, u64)>>);
impl BarMapping for Mapped {
    fn map(&self, bar: u8, space: BarSpace, base: u64, len: u64) {
        self.0.lock().unwrap().push((bar, space, base, len));
    }
    fn unmap(&self, bar: u8, space: BarSpace, base: u64, len: u64) {
        let mut mapped = self.0.lock().unwrap();
        let index =
            mapped.iter().position(|entry| *entry == (bar, space, base, len)).expect("unmapped what is not mapped");
        mapped.remove(index);
    }
}
impl Mapped {
    fn now(&self) -> Vec<(u8, u64)> {
        self.0.lock().unwrap().iter().map(|entry| (entry.0, entry.2)).collect()
    }
}

const IDENTITY: Identity =
    Identity { vendor: 0x1234, device: 0x5678, revision: 2, class: 0xff_0000, subsystem_vendor: 1, subsystem: 2 };

fn space() -> (ConfigSpace, Arc<Mapped>) {
    let mapped = Arc::new(Mapped::default());
    (ConfigSpace::new(IDENTITY, Arc::clone(&mapped) as Arc<dyn BarMapping>), mapped)
}

fn dword(config: &ConfigSpace, offset: u16) -> u32 {
    let mut data = [0; 4];
    config.read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// As Linux does it: decoding off, all ones, read the size, address back, decoding on. Then the driver moves the BAR.
#[test]
fn bars_are_sized_and_moved() {
    let (mut config, mapped) = space();
    config.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x1_0000).unwrap();
    config.add_bar(2, BarKind::Io, 0x40).unwrap();
    config.add_bar(3, BarKind::Memory32, 0x1000).unwrap();
    for (at, size) in [(0x10, 0xffff_0004), (0x14, 0xffff_ffff), (0x18, 0xffff_ffc1), (0x1c, 0xffff_f000), (0x20, 0)] {
        config.write(at, &[0xff; 4]);
        assert_eq!(dword(&config, at), size, "{at:#x}");
    }
    assert_eq!(mapped.now(), []);
    config.assign_bar(0, 0x80_0000_0000).unwrap();
    config.write(0x18, &0x1040u32.to_le_bytes());
    config.write(0x1c, &0u32.to_le_bytes());
    config.write(4, &3u16.to_le_bytes());
    assert_eq!(mapped.now(), [(0, 0x80_0000_0000), (2, 0x1040)], "address zero is nobody's");
    config.write(0x14, &0x81u32.to_le_bytes());
    config.write(0x1c, &0xc000_0000u32.to_le_bytes());
    assert_eq!(mapped.now(), [(2, 0x1040), (0, 0x81_0000_0000), (3, 0xc000_0000)]);
    config.write(4, &1u16.to_le_bytes());
    assert_eq!(mapped.now(), [(2, 0x1040)]);
    config.reset();
    assert_eq!(mapped.now(), []);
    config.write(4, &2u16.to_le_bytes());
    assert_eq!(mapped.now(), [(0, 0x80_0000_0000)], "a reset puts BARs where firmware had put them");
    drop(config);
    assert_eq!(mapped.now(), [], "a function that is gone answers nowhere");
}

#[test]
fn impossible_bars_are_refused() {
    let (mut config, _) = space();
    let wide = BarKind::Memory64 { prefetchable: true };
    assert_eq!(config.add_bar(5, wide, 0x1000), Err(BarError::Taken { bar: 5 }));
    config.add_bar(1, wide, 0x1000).unwrap();
    for bar in [1, 2, 6, 255] {
        assert_eq!(config.add_bar(bar, BarKind::Memory32, 0x1000), Err(BarError::Taken { bar }));
    }
    assert_eq!(config.add_bar(0, wide, 0x1000), Err(BarError::Taken { bar: 0 }));
    for len in [0, 8, 0x1001, 1 << 32] {
        assert_eq!(config.add_bar(3, BarKind::Memory32, len), Err(BarError::BadLength { bar: 3, len }));
    }
    assert!(config.add_bar(4, BarKind::Io, 512).is_err());
    assert_eq!(config.assign_bar(2, 0x1000), Err(BarError::NoSuchBar { bar: 2 }));
    assert!(config.assign_bar(1, 0x800).is_err());
}

#[test]
fn capabilities_are_linked() {
    let (mut config, _) = space();
    assert_eq!(dword(&config, 4) >> 16, 0);
    let first = config.add_capability(9, &[1, 2, 3], &[0, 0xf0]).unwrap();
    let second = config.add_capability(9, &[0; 12], &[]).unwrap();
    assert_eq!((first, second), (0x40, 0x48));
    assert_eq!(dword(&config, 4) >> 16, 0x10);
    assert_eq!(dword(&config, 0x34) & 0xff, 0x40);
    assert_eq!(dword(&config, 0x40).to_le_bytes(), [9, 0x48, 1, 2]);
    config.write(0x40, &[0xff; 4]);
    assert_eq!(dword(&config, 0x40).to_le_bytes(), [9, 0x48, 1, 0xf2]);
    assert_eq!(config.add_capability(9, &[0; 200], &[]), Err(CapabilityError { len: 202 }));
}

/// Every byte of configuration space, every value: only what may change changes, and what is mapped can be unmapped again.
#[test]
fn every_byte_of_config_space() {
    let (mut config, mapped) = space();
    config.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x4000).unwrap();
    config.add_bar(2, BarKind::Io, 0x20).unwrap();
    config.set_interrupt(1, 11);
    config.add_capability(9, &[0x55; 6], &[0x0f]).unwrap();
    let before = *config.bytes();
    let writable: Vec<usize> =
        [0x04, 0x05, 0x0c, 0x0d, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x3c, 0x42].into();
    for offset in 0..4096u16 {
        for value in 0..=255u8 {
            config.write(offset, &[value]);
        }
        for width in [2, 4] {
            config.write(offset, &[0xff, 0xff, 0xff, 0xff][..width]);
            config.write(offset, &[0, 0, 0, 0][..width]);
        }
        let mut data = [0; 4];
        config.read(offset, &mut data);
        if usize::from(offset) >= CONFIG_LEN {
            assert_eq!(data, [0xff; 4]);
        }
    }
    for (index, (now, then)) in config.bytes().iter().zip(&before).enumerate() {
        assert!(now == then || writable.contains(&index), "byte {index:#x} changed");
    }
    config.write(4, &[0, 0]);
    assert_eq!(mapped.now(), []);
}

/// What the guest's drivers see of the bridge must not change between versions of board atoll-1.
#[test]
fn host_bridge_bytes_are_pinned() {
    let mut bridge = HostBridge::new();
    let mut data = [0; 64];
    for (dword, at) in data.chunks_mut(4).zip((0..).step_by(4)) {
        let _ = bridge.config_read(at, dword);
    }
    let mut expected = [0u8; 64];
    expected[..12].copy_from_slice(&[0x36, 0x1b, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0x06]);
    expected[0x2c..0x30].copy_from_slice(&[0xf4, 0x1a, 0x00, 0x11]);
    assert_eq!(data, expected);
}

#[derive(Default)]
struct Routes {
    told: Mutex<Vec<(u16, Option<MsiMessage>)>>,
    signalled: Mutex<Vec<u16>>,
}
impl MsixRoutes for Routes {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.told.lock().unwrap().push((vector, message));
    }
    fn pending(&self, vector: u16) -> bool {
        self.signalled.lock().unwrap().contains(&vector)
    }
    fn signal(&self, vector: u16) {
        self.signalled.lock().unwrap().push(vector);
    }
}
impl Routes {
    fn take(&self) -> Vec<(u16, Option<MsiMessage>)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

/// The routes follow the table, the vector's mask, the function's mask and the enable bit; each change is told once.
#[test]
fn msix_routes_follow_the_guest() {
    let (mut config, _) = space();
    let routes = Arc::new(Routes::default());
    let mut msix = Msix::new(3, Arc::clone(&routes) as Arc<dyn MsixRoutes>).unwrap();
    msix.add_capability(&mut config, 0, 0x4000, 0xc000).unwrap();
    assert_eq!((dword(&config, 0x40), dword(&config, 0x44), dword(&config, 0x48)), (0x0002_0011, 0x4000, 0xc000));
    let mut control = |msix: &mut Msix, value: u16| {
        config.write(0x42, &value.to_le_bytes());
        msix.config_written(&config, 0x42, 2);
    };
    let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    msix.table_write(16, &0xfee0_1000u64.to_le_bytes());
    msix.table_write(24, &0x41u64.to_le_bytes());
    assert_eq!(routes.take(), [], "MSI-X is off");
    control(&mut msix, 0xc000);
    assert_eq!(routes.take(), [], "all are masked");
    msix.signal(1);
    let mut pending = [0; 8];
    msix.pending_read(0, &mut pending);
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    control(&mut msix, 0x8000);
    assert_eq!(routes.take(), [(1, Some(message))]);
    msix.table_write(28, &1u32.to_le_bytes());
    msix.table_write(28, &1u32.to_le_bytes());
    assert_eq!(routes.take(), [(1, None)]);
    msix.table_write(28, &0u32.to_le_bytes());
    msix.table_write(16, &0xfee0_2003u32.to_le_bytes());
    let moved = MsiMessage { address: 0xfee0_2000, data: 0x41 };
    assert_eq!(routes.take(), [(1, Some(message)), (1, Some(moved))]);
    // Narrow, odd and far accesses do nothing.
    for (offset, len) in [(17, 4), (16, 2), (16, 1), (48, 4), (!7, 8)] {
        msix.table_write(offset, &[0xff; 8][..len]);
        msix.table_read(offset, &mut [0; 8][..len]);
    }
    assert_eq!(routes.take(), []);
    msix.signal(3);
    msix.pending_read(u64::MAX - 7, &mut pending);
    assert_eq!(pending, [0; 8]);
    msix.reset();
    assert_eq!(routes.take(), [(1, None)]);
    assert!(Msix::new(0, Arc::clone(&routes) as Arc<dyn MsixRoutes>).is_err());
    assert!(Msix::new(2049, routes).is_err());
}

#[derive(Default)]
struct Events(Mutex<Vec<PowerEvent>>);
impl PowerSink for Events {
    fn power_event(&self, event: PowerEvent) {
        self.0.lock().unwrap().push(event);
    }
}

/// Nothing here is answered later.
fn now(answer: Answer) {
    match answer {
        Answer::Now => {}
        Answer::Later(deferred) => panic!("{deferred:?}"),
    }
}

/// Both ways find the same function; what is not there reads as all ones; another function in a slot shows in the header.
#[test]
fn two_ways_to_configuration_space() {
    let root: SharedRoot = Arc::default();
    let bridge = || Arc::new(Mutex::new(HostBridge::new())) as SharedFunction;
    let zero = DevFn::new(0, 0).unwrap();
    root.lock().unwrap().add(zero, bridge()).unwrap();
    assert!(root.lock().unwrap().add(zero, bridge()).is_err());
    let events = Arc::new(Events::default());
    let mut ports = ConfigPorts::new(Arc::clone(&root), Arc::clone(&events) as Arc<dyn PowerSink>);
    let mut ecam = Ecam::new(Arc::clone(&root));
    let mut by_ports = |address: u32, port: u64, data: &mut [u8]| {
        now(ports.write(0, &address.to_le_bytes()));
        now(ports.read(port, data));
    };
    let mut data = [0; 4];
    by_ports(0x8000_0000, 4, &mut data);
    assert_eq!(data, [0x36, 0x1b, 0x08, 0]);
    by_ports(0x8000_0008, 7, &mut data[..1]);
    assert_eq!(data[0], 0x06, "base class, by a byte access");
    for (address, port, len) in
        [(0x0000_0000, 4, 4), (0x8000_0800, 4, 4), (0x8001_0000, 4, 4), (0x8000_0000, 6, 4), (0x8000_0000, 7, 2)]
    {
        by_ports(address, port, &mut data[..len]);
        assert_eq!(data[..len], [0xff; 4][..len], "{address:#x}");
    }
    for (offset, len, expected) in [(0, 4, 0x0008_1b36u64), (1 << 20, 4, 0xffff_ffff), (1 << 15, 2, 0xffff), (2, 2, 8)]
    {
        let mut data = [0; 8];
        now(ecam.read(offset, &mut data[..len]));
        assert_eq!(u64::from_le_bytes(data), expected, "{offset:#x}");
    }
    now(ecam.read(0x100, &mut data));
    assert_eq!(data, [0xff; 4], "no extended configuration space");
    now(ecam.write(0x3c, &[9]));
    now(ecam.read(u64::MAX, &mut data));
    let mut header = [0];
    now(ecam.read(0x0e, &mut header));
    assert_eq!(header, [0]);
    root.lock().unwrap().add(DevFn::new(0, 3).unwrap(), bridge()).unwrap();
    now(ecam.read(0x0e, &mut header));
    assert_eq!(header, [0x80]);
    now(ecam.read(0x0c, &mut data));
    assert_eq!(data[2], 0x80);
    assert!(root.lock().unwrap().remove(DevFn::new(0, 3).unwrap()).is_some());
    assert_eq!(root.lock().unwrap().free_slot(0), DevFn::new(1, 0));
    // The reset register lies in the middle of the address register.
    now(ports.write(1, &[2]));
    assert_eq!(events.0.lock().unwrap().len(), 0);
    now(ports.write(1, &[ConfigPorts::RESET_VALUE]));
    assert_eq!(*events.0.lock().unwrap(), [PowerEvent::Reset]);
}
