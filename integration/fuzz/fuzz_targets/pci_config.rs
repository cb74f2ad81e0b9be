//! A guest that writes whatever it likes to configuration space and registers of a board with a host bridge and a block
//! device. Nothing may panic; BARs that are mapped must be unmapped before they move; what reaches the device behind the
//! transport must be within its offer.
#![no_main]

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use atoll_devices::pci::{
    BarMapping, BarSpace, ConfigPorts, DevFn, Ecam, HostBridge, PciFunction, PciRoot, SharedFunction, SharedRoot,
};
use atoll_devices::virtio::input_config::Pages;
use atoll_devices::virtio::{
    DeviceOffer, Intent, NotifyPlacement, VirtioFrontend, VirtioPci, VirtioPciParts, device_class,
};
use atoll_devices::{
    Answer, Completion, MsiMessage, MsixRoutes, PowerEvent, PowerSink, RegisterDevice, Wire, WireSink, access,
};
use libfuzzer_sys::fuzz_target;

const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 11;
const QUEUES: [u16; 3] = [256, 128, 1];

/// Everything that the function reports to, and what it must keep to.
#[derive(Clone, Default)]
struct Board {
    mapped: Arc<Mutex<HashSet<(u8, u64, u64)>>>,
    waiting: Arc<Mutex<Vec<Completion>>>,
    active: Arc<Mutex<bool>>,
}

impl BarMapping for Board {
    fn map(&self, bar: u8, _space: BarSpace, base: u64, len: u64) {
        assert!(base.is_multiple_of(len) && base.checked_add(len - 1).is_some());
        let mut mapped = self.mapped.lock().unwrap();
        assert!(mapped.iter().all(|entry| entry.0 != bar), "mapped twice");
        mapped.insert((bar, base, len));
    }
    fn unmap(&self, bar: u8, _space: BarSpace, base: u64, len: u64) {
        assert!(self.mapped.lock().unwrap().remove(&(bar, base, len)), "unmapped what was not mapped");
    }
}

impl VirtioFrontend for Board {
    fn intent(&mut self, intent: Intent) -> Answer {
        let mut active = self.active.lock().unwrap();
        match intent {
            Intent::Activate { features, queues, config_vector } => {
                assert!(!*active, "activated twice");
                *active = true;
                assert_eq!(features & !FEATURES, 0);
                assert!(config_vector.is_none_or(|vector| vector <= QUEUES.len() as u16));
                for queue in queues {
                    let offered = QUEUES[usize::from(queue.index)];
                    assert!(queue.size.is_power_of_two() && queue.size <= offered);
                    assert!(queue.vector.is_none_or(|vector| vector <= QUEUES.len() as u16));
                    let size = u64::from(queue.size);
                    for (base, alignment, len) in [
                        (queue.descriptor_table, 16, 16 * size),
                        (queue.available_ring, 2, 6 + 2 * size),
                        (queue.used_ring, 4, 6 + 8 * size),
                    ] {
                        assert!(base.is_multiple_of(alignment) && base.checked_add(len).is_some());
                    }
                }
            }
            Intent::Reset => {
                assert!(*active, "reset of what is not active");
                *active = false;
                let (completion, answer) = access::deferred();
                self.waiting.lock().unwrap().push(completion);
                return Answer::Later(answer);
            }
            Intent::ConfigWrite { offset, data } => assert!(offset == 32 && data.len() == 1),
        }
        Answer::Now
    }
    fn notify(&mut self, index: u16) {
        assert!(usize::from(index) < QUEUES.len() && *self.active.lock().unwrap());
    }
}

impl NotifyPlacement for Board {
    fn placed(&mut self, index: u16, _address: Option<u64>) {
        assert!(usize::from(index) < QUEUES.len());
    }
}

impl MsixRoutes for Board {
    fn route(&self, vector: u16, _message: Option<MsiMessage>) {
        assert!(usize::from(vector) <= QUEUES.len());
    }
    fn pending(&self, vector: u16) -> bool {
        assert!(usize::from(vector) <= QUEUES.len());
        vector % 2 == 0
    }
    fn signal(&self, vector: u16) {
        assert!(usize::from(vector) <= QUEUES.len());
    }
}

impl WireSink for Board {
    fn set_level(&self, _line: u32, _high: bool) {}
}

impl PowerSink for Board {
    fn power_event(&self, event: PowerEvent) {
        assert_eq!(event, PowerEvent::Reset);
    }
}

/// What a stock driver writes.
fn bring_up(disk: &mut VirtioPci) {
    let writes: [(u64, &[u8]); 12] = [
        (0x14, &[3]),
        (0x08, &[1, 0, 0, 0]),
        (0x0c, &[1, 0, 0, 0]),
        (0x14, &[0xb]),
        (0x16, &[1, 0]),
        (0x18, &[64, 0]),
        (0x1a, &[1, 0]),
        (0x20, &[0, 0x10, 0, 0, 1, 0, 0, 0]),
        (0x28, &[0, 0x20, 0, 0, 1, 0, 0, 0]),
        (0x30, &[0, 0x30, 0, 0, 1, 0, 0, 0]),
        (0x1c, &[1, 0]),
        (0x14, &[0xf]),
    ];
    for (offset, data) in writes {
        let _ = disk.bar_write(0, offset, data);
    }
}

fuzz_target!(|data: &[u8]| {
    let board = Board::default();
    let offer = DeviceOffer {
        device_type: device_class::BLOCK,
        features: FEATURES,
        queue_sizes: QUEUES.to_vec(),
        config: vec![0x5a; 60],
        pages: Pages::default(),
    };
    let disk = VirtioPci::new(VirtioPciParts {
        offer,
        frontend: Box::new(board.clone()),
        mapping: Arc::new(board.clone()),
        doorbells: Box::new(board.clone()),
        routes: Arc::new(board.clone()),
        intx: Wire::new(Arc::new(board.clone()), 16),
        intx_pin: 1,
        intx_line: 16,
    });
    let disk = Arc::new(Mutex::new(disk.expect("a sound offer")));
    disk.lock().unwrap().assign_bar(0, 0x80_0000_0000).expect("a sound address");
    let root: SharedRoot = Arc::new(Mutex::new(PciRoot::new()));
    let bridge: SharedFunction = Arc::new(Mutex::new(HostBridge::new()));
    for (slot, function) in [(0, bridge), (1, Arc::clone(&disk) as SharedFunction)] {
        let at = DevFn::new(slot, 0).expect("a slot");
        root.lock().unwrap().add(at, function).expect("an empty bus");
    }
    let mut ports = ConfigPorts::new(Arc::clone(&root), Arc::new(board.clone()));
    let mut ecam = Ecam::new(root);

    // Half of the inputs begin with a driver that has brought the device up.
    let Some((start, data)) = data.split_first() else { return };
    if start & 1 != 0 {
        bring_up(&mut disk.lock().unwrap());
        assert!(*board.active.lock().unwrap());
    }

    // Each step: what and how wide, where (two bytes), eight bytes to write.
    for step in data.chunks_exact(11) {
        let width = 1usize << (step[0] & 3);
        let place = u64::from(u16::from_le_bytes([step[1], step[2]]));
        let value = &step[3..3 + width];
        let mut read = [0; 8];
        let read = &mut read[..width];
        let _ = match step[0] >> 2 & 0xf {
            0 | 1 => ecam.write(place, value),
            2 => ecam.read(place, read),
            // The disk's first 256 bytes, where everything is.
            3 | 4 => ecam.write(1 << 15 | place & 0xff, value),
            5 => ecam.read(1 << 15 | place & 0xff, read),
            6 => ports.write(place & 7, value),
            7 => ports.read(place & 7, read),
            8 => disk.lock().unwrap().bar_write(0, place, value),
            9 => disk.lock().unwrap().bar_read(0, place, read),
            // The common registers.
            10 | 11 => disk.lock().unwrap().bar_write(0, place & 0x3f, value),
            12 => disk.lock().unwrap().bar_write(0, 0x3000 + (place & 0xf), value),
            13 => {
                if let Some(completion) = board.waiting.lock().unwrap().pop() {
                    completion.complete(0);
                }
                Answer::Now
            }
            14 => {
                let mut disk = disk.lock().unwrap();
                disk.signal_queue(place as u16);
                disk.config_changed(value);
                if step[3] == 0 { disk.reset() } else { Answer::Now }
            }
            _ => {
                let mut disk = disk.lock().unwrap();
                let state = disk.state();
                disk.set_needs_reset();
                assert_eq!(state.pci[..4], [0xf4, 0x1a, 0x42, 0x10], "the identity is fixed");
                Answer::Now
            }
        };
    }
});
