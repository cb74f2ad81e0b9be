//! Recorded functions (of QEMU's emulations: an NVMe drive, one with virtual functions, a network card, a conventional device)
//! as a guest sees them and drives them, and functions that say whatever they like.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::capabilities::{capabilities, extended_capabilities};
use super::*;
use crate::access::Answer;
use crate::interrupt::{MsiMessage, MsixRoutes};
use crate::pci::{BarKind, BarMapping, BarSpace, PciFunction};

const NVME: &[u8] = include_bytes!("recorded/nvme.config");
const NVME_SRIOV: &[u8] = include_bytes!("recorded/nvme-sriov.config");
const E1000E: &[u8] = include_bytes!("recorded/e1000e.config");
const EDU: &[u8] = include_bytes!("recorded/edu.config");

fn facts(bar_lens: [u64; 6], msi: u16, msix: u16) -> HostFacts {
    HostFacts { bar_lens, pin: true, msi, msix }
}

fn nvme() -> HostFacts {
    facts([0x4000, 0, 0, 0, 0, 0], 0, 65)
}

fn e1000e() -> HostFacts {
    facts([0x2_0000, 0x2_0000, 32, 0x4000, 0, 0], 1, 5)
}

/// What the function behind and the board around are told.
#[derive(Default)]
struct Told {
    by: Vec<Interrupts>,
    written: Vec<(Region, u64, Vec<u8>)>,
    read: Vec<(Region, u64, usize)>,
    routes: HashMap<u16, Option<MsiMessage>>,
    mapped: HashMap<u8, u64>,
    /// What the command register was when something was mapped.
    command_at_map: Vec<u8>,
    resets: u32,
}

#[derive(Clone, Default)]
struct Bench(Arc<Mutex<Told>>);

impl Bench {
    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.0.lock().unwrap()
    }
    fn command(&self) -> u8 {
        let told = self.told();
        let last = told.written.iter().rev().find(|(region, at, _)| (*region, *at) == (Region::Config, 4));
        last.map_or(0, |(.., data)| data[0])
    }
}

impl HostFunction for Bench {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        assert!(data.len() <= 8);
        self.told().read.push((region, offset, data.len()));
        data.fill(0x5a);
    }
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        if region == Region::Config {
            assert!(matches!(data.len(), 1 | 2 | 4) && offset.is_multiple_of(data.len() as u64));
        }
        self.told().written.push((region, offset, data.to_vec()));
    }
    fn interrupt(&mut self, by: Interrupts) {
        self.told().by.push(by);
    }
    fn reset(&mut self) {
        self.told().resets += 1;
    }
}

impl MsixRoutes for Bench {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.told().routes.insert(vector, message);
    }
    fn pending(&self, vector: u16) -> bool {
        vector == 1
    }
    fn signal(&self, _vector: u16) {}
}

impl BarMapping for Bench {
    fn map(&self, bar: u8, _space: BarSpace, base: u64, _len: u64) {
        let command = self.command();
        let mut told = self.told();
        assert!(told.mapped.insert(bar, base).is_none(), "mapped twice");
        told.command_at_map.push(command);
    }
    fn unmap(&self, bar: u8, _space: BarSpace, base: u64, _len: u64) {
        let command = self.command();
        let mut told = self.told();
        assert_eq!(told.mapped.remove(&bar), Some(base), "unmapped what was not mapped");
        told.command_at_map.push(command);
    }
}

fn function(config: &[u8], facts: HostFacts) -> (PassedFunction, Bench) {
    let bench = Bench::default();
    let function = PassedFunction::new(PassedParts {
        config: config.to_vec(),
        facts,
        host: Box::new(bench.clone()),
        mapping: Arc::new(bench.clone()),
        routes: Arc::new(bench.clone()),
        line: 17,
    });
    (function.unwrap(), bench)
}

fn read(function: &mut PassedFunction, offset: u16) -> u32 {
    let mut data = [0; 4];
    assert!(matches!(function.config_read(offset, &mut data), Answer::Now));
    u32::from_le_bytes(data)
}

fn write(function: &mut PassedFunction, offset: u16, data: &[u8]) {
    assert!(matches!(function.config_write(offset, data), Answer::Now));
}

/// The guest's own walk through the list that it is shown.
fn listed(function: &mut PassedFunction) -> Vec<u8> {
    let mut config = vec![0; 256];
    for at in (0..256_u16).step_by(4) {
        let value = read(function, at).to_le_bytes();
        config[usize::from(at)..usize::from(at) + 4].copy_from_slice(&value);
    }
    // The status register is the function's, which the bench is not.
    config[6] = 0x10;
    capabilities(&config).iter().map(|capability| capability.id).collect()
}

/// A drive as Linux takes it: sized, placed, its table filled, MSI-X on, a doorbell.
#[test]
fn a_drive_is_driven() {
    let (mut function, bench) = function(NVME, nvme());
    assert_eq!(function.bars(), [(0, BarKind::Memory64 { prefetchable: false }, 0x4000)]);
    assert_eq!(read(&mut function, 0), 0x0010_1b36);
    assert_eq!(read(&mut function, 8), 0x0108_0202);
    assert_eq!(listed(&mut function), [0x11, 0x10, 0x01]);
    assert_eq!(bench.told().by, [Interrupts::Pin], "until the driver chooses messages");
    assert_eq!(read(&mut function, 0x3c), 0x0000_0111);

    write(&mut function, 0x10, &[0xff; 4]);
    assert_eq!(read(&mut function, 0x10), 0xffff_c004);
    function.assign_bar(0, 0x80_0000_0000).unwrap();
    write(&mut function, 4, &0x0406_u16.to_le_bytes());
    assert_eq!(bench.told().mapped.get(&0), Some(&0x80_0000_0000));
    assert_eq!(bench.told().command_at_map, [6], "the function decodes before a guest can reach it");
    assert_eq!(bench.command(), 6);

    // The table is in BAR 0 at 0x2000, the pending bits at 0x3000: neither reaches the function.
    bench.told().written.clear();
    for (at, value) in [(0x2010, 0xfee0_1000_u32), (0x2014, 0), (0x2018, 0x41), (0x201c, 0)] {
        let _ = function.bar_write(0, at, &value.to_le_bytes());
    }
    assert_eq!(bench.told().routes.get(&1), None, "MSI-X is off");
    write(&mut function, 0x42, &0xc040_u16.to_le_bytes());
    write(&mut function, 0x42, &0x8040_u16.to_le_bytes());
    assert_eq!(bench.told().by, [Interrupts::Pin, Interrupts::Vectors(65)]);
    assert_eq!(bench.told().routes.get(&1), Some(&Some(MsiMessage { address: 0xfee0_1000, data: 0x41 })));
    let mut pending = [0; 8];
    let _ = function.bar_read(0, 0x3000, &mut pending);
    assert_eq!(pending[0], 2);
    assert_eq!(bench.told().written, []);
    let _ = function.bar_write(0, 0x1000, &[7, 0, 0, 0]);
    assert_eq!(bench.told().written, [(Region::Bar(0), 0x1000, vec![7, 0, 0, 0])]);

    // The driver leaves: decoding ends before the function is told.
    write(&mut function, 4, &0_u16.to_le_bytes());
    assert_eq!(bench.told().command_at_map, [6, 6]);
    assert_eq!(bench.command(), 0);
    let _ = function.reset();
    assert_eq!(bench.told().by.last(), Some(&Interrupts::Pin));
    assert_eq!(bench.told().resets, 1);
    drop(function);
    assert_eq!(bench.told().by.last(), Some(&Interrupts::None));
    assert!(bench.told().routes.values().all(Option::is_none));
}

/// On the root bus an endpoint has no link; its power is its own business; virtual functions are not the guest's to make.
#[test]
fn what_means_nothing_to_a_guest_is_hidden() {
    let (mut function, bench) = function(NVME_SRIOV, facts([0x4000, 0, 0, 0, 0, 0], 0, 3));
    assert_eq!(read(&mut function, 0x80) >> 20 & 0xf, 9, "an integrated endpoint");
    assert_eq!(read(&mut function, 0x8c), 0, "no link");
    let kept: Vec<u16> = extended_capabilities(NVME_SRIOV).iter().map(|capability| capability.id).collect();
    assert_eq!(kept, [0x0e, 0x10]);
    assert_eq!((read(&mut function, 0x100), read(&mut function, 0x120)), (0, 0));
    bench.told().written.clear();
    write(&mut function, 0x128, &[1, 0]);
    assert_eq!(bench.told().written, [], "no virtual functions");
    write(&mut function, 0x64, &[3, 0]);
    assert_eq!(read(&mut function, 0x64) & 3, 3);
    assert_eq!(bench.told().written, [], "it stays powered");

    let (mut card, _) = self::function(E1000E, e1000e());
    assert_eq!(read(&mut card, 0x100) >> 20, 0x140, "the serial number comes next");
    assert_eq!(read(&mut card, 0x100) & 0xffff, 0, "errors are the host's");
    assert_eq!(read(&mut card, 0x140), 0x0001_0003);
    assert_eq!(read(&mut card, 0x144), 0x5a5a_5a5a, "its bytes are the function's");
}

/// A card with two memory BARs of 32 bits, ports, MSI and MSI-X: one of the two at a time.
#[test]
fn a_card_is_driven() {
    let (mut card, bench) = function(E1000E, e1000e());
    let kinds: Vec<_> = card.bars().iter().map(|(bar, kind, _)| (*bar, *kind)).collect();
    assert_eq!(kinds, [(0, BarKind::Memory32), (1, BarKind::Memory32), (2, BarKind::Io), (3, BarKind::Memory32)]);
    assert_eq!(listed(&mut card), [0x01, 0x05, 0x10, 0x11]);
    // MSI: wide, one message.
    write(&mut card, 0xd4, &0xfee0_2000_u32.to_le_bytes());
    write(&mut card, 0xdc, &0x4052_u16.to_le_bytes());
    write(&mut card, 0xd2, &0x0071_u16.to_le_bytes());
    assert_eq!(read(&mut card, 0xd0) >> 16 & 0x0f, 1, "it has one message, and no more can be enabled");
    assert_eq!(bench.told().by, [Interrupts::Pin, Interrupts::Messages(1)]);
    assert_eq!(bench.told().routes.get(&0), Some(&Some(MsiMessage { address: 0xfee0_2000, data: 0x4052 })));
    write(&mut card, 0xd2, &[0]);
    write(&mut card, 0xa3, &[0x80]);
    write(&mut card, 0xa3, &[0]);
    assert_eq!(bench.told().by[2..], [Interrupts::Pin, Interrupts::Vectors(5), Interrupts::Pin]);
    assert!(bench.told().routes.values().all(Option::is_none));
}

/// A conventional function has nothing above 256 bytes.
#[test]
fn conventional_functions_end_early() {
    let (mut function, _) = function(EDU, facts([1 << 20, 0, 0, 0, 0, 0], 1, 0));
    assert_eq!(function.bars(), [(0, BarKind::Memory32, 1 << 20)]);
    assert_eq!(listed(&mut function), [0x05]);
    assert_eq!(read(&mut function, 0x100), u32::MAX);
}

#[test]
fn what_cannot_be_shown_is_named() {
    let of = |change: fn(&mut Vec<u8>), facts: &HostFacts| {
        let mut config = NVME.to_vec();
        change(&mut config);
        Shown::of(&config, facts)
    };
    assert_eq!(of(|config| config.truncate(64), &nvme()), Err(ShownError::Short(64)));
    assert_eq!(of(|config| config.fill(0xff), &nvme()), Err(ShownError::Silent));
    assert_eq!(of(|config| config[0x0e] = 0x81, &nvme()), Err(ShownError::Bridge(1)));
    assert_eq!(of(|config| config[0x45] = 0x3f, &nvme()), Err(ShownError::Table { bar: 0 }));
    assert_eq!(of(|config| config[0x48] = 5, &nvme()), Err(ShownError::Table { bar: 5 }));
    let uneven = facts([0x3000, 0, 0, 0, 0, 0], 0, 65);
    assert_eq!(of(|_| (), &uneven), Err(ShownError::Bar { bar: 0, len: 0x3000 }));
}

/// The table's page and that of the pending bits are not a guest's to reach.
#[test]
fn direct_pages_leave_the_tables_out() {
    let msix = Shown::of(NVME, &nvme()).unwrap().msix;
    assert_eq!(direct_pages(0, 0x4000, &[(0, 0x4000)], msix), [(0, 0x2000)]);
    assert_eq!(direct_pages(0, 0x8000, &[(0, 0x8000)], msix), [(0, 0x2000), (0x4000, 0x4000)]);
    assert_eq!(direct_pages(1, 0x4000, &[(0, 0x4000)], msix), [(0, 0x4000)]);
    assert_eq!(direct_pages(1, 0x800, &[(0, 0x800)], None), []);
    assert_eq!(direct_pages(1, 0x4000, &[(0x800, 0x2000)], None), [(0x1000, 0x1000)]);
}

proptest! {
    /// Whatever a function says of itself, it is refused with a reason, or what a guest is shown of it keeps to the rules:
    /// lists end and name nothing that is not served, and nothing that a guest then does breaks anything.
    #[test]
    fn a_function_may_say_anything(
        mut config in proptest::collection::vec(any::<u8>(), 4096),
        lens in proptest::array::uniform6(prop_oneof![Just(0_u64), (2_u32..40).prop_map(|bits| 1 << bits)]),
        (msi, msix) in (0_u16..64, 0_u16..3000),
        list in proptest::collection::vec((16_u8..64, any::<u8>()), 0..6),
        accesses in proptest::collection::vec((any::<bool>(), 0_u16..4096, 0_u8..3, any::<u32>()), 0..60),
    ) {
        config[0x0e] &= 0x80;
        // A list that leads somewhere.
        let mut pointer = 0x34;
        for (place, id) in list {
            let known = [1, 3, 5, 9, 13, 16, 17, 19, 2][usize::from(id) % 9];
            config[pointer] = place * 4;
            config[usize::from(place) * 4] = known;
            pointer = usize::from(place) * 4 + 1;
        }
        config[6] |= 0x10;
        let bench = Bench::default();
        let function = PassedFunction::new(PassedParts {
            config,
            facts: HostFacts { bar_lens: lens, pin: msi % 2 == 0, msi, msix },
            host: Box::new(bench.clone()),
            mapping: Arc::new(bench.clone()),
            routes: Arc::new(bench.clone()),
            line: 17,
        });
        let Ok(mut function) = function else { return Ok(()) };
        for (bar, kind, len) in function.bars() {
            prop_assert!(len.is_power_of_two());
            if kind != BarKind::Io {
                let pages = direct_pages(bar, len, &[(0, len)], function.shown().msix);
                for (offset, size) in pages {
                    prop_assert!(size > 0 && offset % 4096 == 0 && size % 4096 == 0 && offset + size <= len);
                }
            }
        }
        for (is_write, offset, width, value) in accesses {
            let width = 1_u16 << width;
            let (offset, bytes) = (offset & !(width - 1), value.to_le_bytes());
            let mut data = bytes[..usize::from(width)].to_vec();
            if is_write {
                let _ = function.config_write(offset, &data);
                let _ = function.bar_write(value as u8 % 6, u64::from(value), &data);
            } else {
                let _ = function.config_read(offset, &mut data);
                let _ = function.bar_read(value as u8 % 6, u64::from(value), &mut data);
            }
        }
        let seen = listed(&mut function);
        prop_assert!(seen.iter().all(|id| [1, 3, 5, 9, 13, 16, 17, 19].contains(id)), "{seen:?}");
        prop_assert!(seen.iter().filter(|id| **id == 5).count() <= 1);
        let shown = function.shown().clone();
        for place in shown.msix.iter().flat_map(|place| [place.table, place.pending]) {
            prop_assert!(shown.bars.iter().any(|bar| bar.bar == place.bar && place.offset + place.len <= bar.len));
        }
    }
}
