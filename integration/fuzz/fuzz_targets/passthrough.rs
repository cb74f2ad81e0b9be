//! A PCI function of the host that says of itself whatever it likes, and a guest that does with it whatever it likes. Nothing may
//! panic; a function that is taken shows a list that ends, BARs and tables that lie within each other, pages of its own only,
//! and is mapped and unmapped in pairs; what is asked of the real one is aligned and within its space.
#![no_main]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use atoll_devices::passthrough::capabilities::capabilities;
use atoll_devices::passthrough::{
    EXTENDED_LEN, HostFacts, HostFunction, Interrupts, PassedFunction, PassedParts, Region, direct_pages,
};
use atoll_devices::pci::{BarKind, BarMapping, BarSpace, PciFunction};
use atoll_devices::{MsiMessage, MsixRoutes};
use libfuzzer_sys::fuzz_target;

#[derive(Default)]
struct State {
    mapped: HashMap<u8, u64>,
    by: Option<Interrupts>,
}

/// What is behind the function and around it.
#[derive(Clone, Default)]
struct Bench(Arc<Mutex<State>>);

impl HostFunction for Bench {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8));
        if region == Region::Config {
            assert!(offset + data.len() as u64 <= EXTENDED_LEN as u64);
        }
        data.fill(0xa5);
    }
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        if region == Region::Config {
            assert!(matches!(data.len(), 1 | 2 | 4) && offset.is_multiple_of(data.len() as u64));
            assert!(offset + data.len() as u64 <= EXTENDED_LEN as u64);
        }
    }
    fn interrupt(&mut self, by: Interrupts) {
        assert_ne!(self.0.lock().unwrap().by.replace(by), Some(by), "told twice");
    }
    fn reset(&mut self) {}
}

impl MsixRoutes for Bench {
    fn route(&self, _vector: u16, _message: Option<MsiMessage>) {}
    fn pending(&self, vector: u16) -> bool {
        vector.is_multiple_of(2)
    }
    fn signal(&self, _vector: u16) {}
}

impl BarMapping for Bench {
    fn map(&self, bar: u8, _space: BarSpace, base: u64, len: u64) {
        assert!(base.checked_add(len - 1).is_some());
        assert!(self.0.lock().unwrap().mapped.insert(bar, base).is_none(), "mapped twice");
    }
    fn unmap(&self, bar: u8, _space: BarSpace, base: u64, _len: u64) {
        assert_eq!(self.0.lock().unwrap().mapped.remove(&bar), Some(base), "unmapped what was not mapped");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<12>() else { return };
    let mut bar_lens = [0; 6];
    for (len, byte) in bar_lens.iter_mut().zip(head) {
        // Mostly powers of two, as of honest devices.
        *len = match byte {
            0..64 => 1_u64 << byte,
            64..192 => 0,
            _ => u64::from(*byte) << 8,
        };
    }
    let facts = HostFacts {
        bar_lens,
        pin: head[6] & 1 != 0,
        msi: u16::from(head[7]),
        msix: u16::from_le_bytes([head[8], head[9]]),
    };
    let told = usize::from(u16::from_le_bytes([head[10], head[11]])).min(rest.len());
    let (said, accesses) = rest.split_at(told);
    let mut config = said.to_vec();
    config.resize(if head[6] & 2 != 0 { EXTENDED_LEN } else { 256 }, 0);
    let bench = Bench::default();
    let function = PassedFunction::new(PassedParts {
        config,
        facts,
        host: Box::new(bench.clone()),
        mapping: Arc::new(bench.clone()),
        routes: Arc::new(bench.clone()),
        line: 17,
    });
    let Ok(mut function) = function else { return };
    let shown = function.shown().clone();
    for bar in &shown.bars {
        assert!(bar.bar < 6 && bar.len.is_power_of_two());
        if bar.kind != BarKind::Io {
            for (offset, len) in direct_pages(bar.bar, bar.len, &[(0, bar.len)], shown.msix) {
                assert!(len > 0 && offset % 4096 == 0 && len % 4096 == 0);
                assert!(offset.checked_add(len).is_some_and(|end| end <= bar.len));
            }
        }
    }
    for place in shown.msix.iter().flat_map(|place| [place.table, place.pending]) {
        assert!(shown.bars.iter().any(|bar| bar.bar == place.bar && place.offset + place.len <= bar.len));
    }
    let mut low = shown.bytes;
    low[6] |= 0x10;
    assert!(capabilities(&low).iter().filter(|capability| capability.id == 0x11).count() <= 1);
    // Each step: what and how wide, where (three bytes), four bytes to write.
    for step in accesses.chunks_exact(8) {
        let width = 1_usize << (step[0] & 3);
        let offset = u64::from(u32::from_le_bytes([step[1], step[2], step[3], 0]));
        let mut data = [0; 8];
        data[..4].copy_from_slice(&step[4..8]);
        let data = &mut data[..width];
        let bar = step[3] % 6;
        // As the bus does: aligned, and within the function's space.
        let (low, place) = (offset as u16 & 0xff & !(width as u16 - 1), offset as u16 & 0xfff & !(width as u16 - 1));
        let _ = match step[0] >> 2 & 7 {
            0 | 1 if width <= 4 => function.config_write(low, data),
            2 if width <= 4 => function.config_write(place, data),
            3 if width <= 4 => function.config_read(place, data),
            4 => function.bar_write(bar, offset & !(width as u64 - 1), data),
            5 => function.bar_read(bar, offset & !(width as u64 - 1), data),
            6 => function.reset(),
            _ => {
                let _ = function.assign_bar(bar, u64::from(step[4]) << 20);
                continue;
            }
        };
    }
    drop(function);
    assert!(matches!(bench.0.lock().unwrap().by, None | Some(Interrupts::None)));
});
