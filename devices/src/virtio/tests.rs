//! A driver's way through the transport, the ways it can go wrong, and what a hostile one can do: nothing.

use std::sync::{Arc, Mutex};

use super::input_config::{self, Pages};
use super::pci::{BAR_LEN, DEVICE_OFFSET, NOTIFY_OFFSET};
use super::*;
use crate::access::{Answer, Completion, deferred};
use crate::interrupt::{MsiMessage, MsixRoutes, Wire, WireSink};
use crate::pci::{BarKind, BarMapping, BarSpace, PciFunction};

/// Everything that a transport reports, in the order in which it does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Intent(Intent),
    Notify(u16),
    Route(u16, Option<MsiMessage>),
    Signal(u16),
    Intx(bool),
    Placed(u16, Option<u64>),
}

#[derive(Clone, Default)]
struct Log {
    events: Arc<Mutex<Vec<Event>>>,
    /// When set, a reset is answered later; its completions are kept here.
    later: Arc<Mutex<Option<Vec<Completion>>>>,
}
impl Log {
    fn add(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
}
impl VirtioFrontend for Log {
    fn intent(&mut self, intent: Intent) -> Answer {
        let reset = intent == Intent::Reset;
        self.add(Event::Intent(intent));
        match self.later.lock().unwrap().as_mut() {
            Some(waiting) if reset => {
                let (completion, answer) = deferred();
                waiting.push(completion);
                Answer::Later(answer)
            }
            _ => Answer::Now,
        }
    }
    fn notify(&mut self, index: u16) {
        self.add(Event::Notify(index));
    }
}
impl MsixRoutes for Log {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.add(Event::Route(vector, message));
    }
    fn pending(&self, _vector: u16) -> bool {
        false
    }
    fn signal(&self, vector: u16) {
        self.add(Event::Signal(vector));
    }
}
impl WireSink for Log {
    fn set_level(&self, _line: u32, high: bool) {
        self.add(Event::Intx(high));
    }
}
impl NotifyPlacement for Log {
    fn placed(&mut self, index: u16, address: Option<u64>) {
        self.add(Event::Placed(index, address));
    }
}
impl BarMapping for Log {
    fn map(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
    fn unmap(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
}

const VERSION_1: u64 = 1 << 32;
const RING_RESET: u64 = 1 << 40;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const CONFIG_WCE: u64 = 1 << 11;

/// A block device of 8 GiB with two queues and a writable cache mode.
fn offer() -> DeviceOffer {
    let mut config = vec![0; 60];
    config[..8].copy_from_slice(&0x100_0000u64.to_le_bytes());
    DeviceOffer {
        device_type: device_class::BLOCK,
        features: VERSION_1 | RING_RESET | PROTOCOL_FEATURES | CONFIG_WCE,
        queue_sizes: vec![256, 128],
        config,
        pages: Pages::default(),
    }
}

fn parts(offer: DeviceOffer, log: &Log) -> VirtioPciParts {
    VirtioPciParts {
        offer,
        frontend: Box::new(log.clone()),
        mapping: Arc::new(log.clone()),
        doorbells: Box::new(log.clone()),
        routes: Arc::new(log.clone()),
        intx: Wire::new(Arc::new(log.clone()), 16),
        intx_pin: 1,
        intx_line: 16,
    }
}

fn function() -> (VirtioPci, Log) {
    let log = Log::default();
    let function = VirtioPci::new(parts(offer(), &log)).unwrap();
    (function, log)
}

fn put(function: &mut VirtioPci, offset: u64, data: &[u8]) {
    assert!(matches!(function.bar_write(0, offset, data), Answer::Now));
}
fn put32(function: &mut VirtioPci, offset: u64, value: u32) {
    put(function, offset, &value.to_le_bytes());
}
fn put16(function: &mut VirtioPci, offset: u64, value: u16) {
    put(function, offset, &value.to_le_bytes());
}
fn get<const N: usize>(function: &mut VirtioPci, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    assert!(matches!(function.bar_read(0, offset, &mut data), Answer::Now));
    data
}
fn status(function: &mut VirtioPci) -> u8 {
    get::<1>(function, 0x14)[0]
}
fn config32(function: &mut VirtioPci, offset: u16) -> u32 {
    let mut data = [0; 4];
    assert!(matches!(function.config_read(offset, &mut data), Answer::Now));
    u32::from_le_bytes(data)
}

/// Up to FEATURES_OK.
fn negotiate(function: &mut VirtioPci, features: u64) {
    put(function, 0x14, &[0]);
    put(function, 0x14, &[1]);
    put(function, 0x14, &[3]);
    for half in 0..2 {
        put32(function, 0x08, half);
        put32(function, 0x0c, (features >> (32 * half)) as u32);
    }
    put(function, 0x14, &[0xb]);
}

fn set_up_queue(function: &mut VirtioPci, index: u16, size: u16) {
    put16(function, 0x16, index);
    put16(function, 0x18, size);
    put16(function, 0x1a, index);
    put(function, 0x20, &(0x10_0000 + u64::from(index) * 0x1_0000).to_le_bytes());
    put32(function, 0x28, 0x20_0000);
    put32(function, 0x2c, 1);
    put(function, 0x30, &0x30_0000u64.to_le_bytes());
    put16(function, 0x1c, 1);
}

/// The whole way of a stock driver: features, queues, vectors, DRIVER_OK; what comes out is one intent.
#[test]
fn driver_brings_the_device_up() {
    let (mut function, log) = function();
    put32(&mut function, 0x00, 0);
    assert_eq!(
        u32::from_le_bytes(get(&mut function, 0x04)),
        CONFIG_WCE as u32,
        "bits of vhost-user are not the guest's"
    );
    put32(&mut function, 0x00, 1);
    assert_eq!(u32::from_le_bytes(get(&mut function, 0x04)), 1, "reset of one queue is not served");
    negotiate(&mut function, VERSION_1 | CONFIG_WCE);
    assert_eq!(status(&mut function), 0xb);
    assert_eq!(get::<2>(&mut function, 0x12), [2, 0]);
    put16(&mut function, 0x10, 2);
    set_up_queue(&mut function, 0, 256);
    put16(&mut function, 0x16, 1);
    assert_eq!(get::<8>(&mut function, 0x18), [128, 0, 0xff, 0xff, 0, 0, 1, 0], "size, no vector, off, notify offset");
    set_up_queue(&mut function, 1, 64);
    put16(&mut function, 0x16, 2);
    assert_eq!(get::<2>(&mut function, 0x18), [0, 0], "there is no third queue");
    put(&mut function, 0x14, &[0xf]);
    let queue = |index: u16, size| QueueConfig {
        index,
        size,
        descriptor_table: 0x10_0000 + u64::from(index) * 0x1_0000,
        available_ring: 0x1_0020_0000,
        used_ring: 0x30_0000,
        vector: Some(index),
    };
    let activate = Intent::Activate {
        features: VERSION_1 | CONFIG_WCE,
        queues: vec![queue(0, 256), queue(1, 64)],
        config_vector: Some(2),
    };
    assert_eq!(log.take(), [Event::Intent(activate)]);
    // Registers of a running device do not change.
    for (offset, value) in [(0x18, 8u16), (0x1a, 0), (0x10, 0)] {
        put16(&mut function, 0x16, 0);
        put16(&mut function, offset, value);
    }
    put32(&mut function, 0x20, 0);
    assert_eq!(get::<4>(&mut function, 0x20), [0, 0, 0x10, 0]);
    put16(&mut function, VirtioPci::notify_address(1), 1);
    put16(&mut function, VirtioPci::notify_address(2), 2);
    put(&mut function, VirtioPci::notify_address(1) + 1, &[1]);
    assert_eq!(log.take(), [Event::Notify(1)]);
    put(&mut function, 0x14, &[0]);
    assert_eq!(log.take(), [Event::Intent(Intent::Reset)]);
    assert_eq!(status(&mut function), 0);
    put(&mut function, 0x14, &[0]);
    assert_eq!(log.take(), [], "nothing to stop");
}

/// FEATURES_OK stays clear for a driver that wants what was not offered, or that is a legacy driver.
#[test]
fn unacceptable_features_are_refused() {
    for features in [0, CONFIG_WCE, VERSION_1 | 1, VERSION_1 | RING_RESET, VERSION_1 | PROTOCOL_FEATURES] {
        let (mut function, log) = function();
        negotiate(&mut function, features);
        assert_eq!(status(&mut function), 3, "{features:#x}");
        put(&mut function, 0x14, &[0xf]);
        assert_eq!((status(&mut function), log.take()), (3, vec![]), "no DRIVER_OK without FEATURES_OK");
    }
    let (mut function, _) = function();
    negotiate(&mut function, VERSION_1);
    put32(&mut function, 0x08, 0);
    put32(&mut function, 0x0c, u32::MAX);
    assert_eq!(function.accepted_features(), Some(VERSION_1), "features are fixed by FEATURES_OK");
    put(&mut function, 0x14, &[0x08]);
    assert_eq!(status(&mut function), 0xb, "status bits are not taken back");
}

/// Absurd queues are not enabled, and the device says that it needs a reset instead of using them.
#[test]
fn absurd_queues_are_refused() {
    let bad: [(&str, u64, &[u8]); 8] = [
        ("size zero", 0x18, &[0, 0]),
        ("size not a power of two", 0x18, &[100, 0]),
        ("size above the offer", 0x18, &[0, 2]),
        ("size 32768", 0x18, &[0, 0x80]),
        ("unaligned descriptors", 0x20, &[8, 0, 0, 0]),
        ("unaligned available ring", 0x28, &[1, 0, 0, 0]),
        ("unaligned used ring", 0x30, &[2, 0, 0, 0]),
        ("descriptors past the end of memory", 0x20, &[0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
    ];
    for (what, offset, data) in bad {
        let (mut function, log) = function();
        negotiate(&mut function, VERSION_1);
        put16(&mut function, 0x16, 0);
        put(&mut function, offset, data);
        put16(&mut function, 0x1c, 1);
        assert_eq!(get::<2>(&mut function, 0x1c), [0, 0], "{what}");
        assert_eq!(status(&mut function), 0x4b, "{what}");
        put(&mut function, 0x14, &[0xf]);
        assert!(
            matches!(&log.take()[..], [Event::Intent(Intent::Activate { queues, .. })] if queues.is_empty()),
            "{what}"
        );
    }
    let (mut function, _) = function();
    negotiate(&mut function, VERSION_1);
    set_up_queue(&mut function, 0, 64);
    set_up_queue(&mut function, 0, 32);
    assert_eq!(
        (get::<2>(&mut function, 0x18), status(&mut function)),
        ([64, 0], 0xb),
        "enabled twice: the first holds"
    );
}

/// A reset that takes its time: the guest polls until the frontend is done, and cannot start anew before.
#[test]
fn status_stays_until_the_reset_is_done() {
    let (mut function, log) = function();
    negotiate(&mut function, VERSION_1);
    set_up_queue(&mut function, 0, 64);
    put(&mut function, 0x14, &[0xf]);
    log.take();
    *log.later.lock().unwrap() = Some(Vec::new());
    put(&mut function, 0x14, &[0]);
    assert_eq!(status(&mut function), 0xf);
    put(&mut function, 0x14, &[0]);
    put(&mut function, 0x14, &[1]);
    put16(&mut function, 0x10, 0);
    // The fuzzer found this one: a frontend that is stopping its queues was still told to look at them.
    put16(&mut function, VirtioPci::notify_address(0), 0);
    assert_eq!(log.take(), [Event::Intent(Intent::Reset)], "one reset, however often the guest asks");
    assert_eq!(status(&mut function), 0xf);
    log.later.lock().unwrap().as_mut().unwrap().pop().unwrap().complete(0);
    assert_eq!(status(&mut function), 0);
    put16(&mut function, 0x16, 0);
    assert_eq!(get::<8>(&mut function, 0x18), [0, 1, 0xff, 0xff, 0, 0, 0, 0], "the queue is as at power-on");
    // A frontend that vanishes without an answer must not keep the guest for ever.
    negotiate(&mut function, VERSION_1);
    put(&mut function, 0x14, &[0xf]);
    put(&mut function, 0x14, &[0]);
    assert_eq!(status(&mut function), 0xf);
    log.later.lock().unwrap().as_mut().unwrap().clear();
    assert_eq!(status(&mut function), 0);
    // A machine reset hands the wait to whoever resets.
    negotiate(&mut function, VERSION_1);
    put(&mut function, 0x14, &[0xf]);
    assert!(matches!(function.reset(), Answer::Later(_)));
    assert_eq!(status(&mut function), 0);
    assert!(matches!(function.reset(), Answer::Now));
}

/// Interrupts by wire: the status register says why, and reading it lowers the line.
#[test]
fn interrupts_without_msix() {
    let (mut function, log) = function();
    negotiate(&mut function, VERSION_1);
    put(&mut function, 0x14, &[0xf]);
    log.take();
    function.signal_queue(0);
    function.signal_queue(1);
    function.config_changed(&[1; 60]);
    assert_eq!(log.take(), [Event::Intx(true)]);
    assert_eq!(config32(&mut function, 4) >> 16 & 8, 8, "interrupt status");
    assert_eq!(get::<1>(&mut function, 0x1000), [3]);
    assert_eq!(get::<1>(&mut function, 0x1000), [0]);
    assert_eq!(log.take(), [Event::Intx(false)]);
    // The command register silences the line without losing the cause.
    function.signal_queue(0);
    for command in [0x400u16, 0] {
        let _ = function.config_write(4, &command.to_le_bytes());
    }
    drop(function);
    assert_eq!(
        log.take(),
        [
            Event::Intx(true),
            Event::Intx(false),
            Event::Intx(true),
            Event::Placed(0, None),
            Event::Placed(1, None),
            Event::Intx(false)
        ]
    );
}

/// Interrupts by message: vectors that do not exist read back as "none", and such a queue stays silent.
#[test]
fn interrupts_with_msix() {
    let (mut function, log) = function();
    assert_eq!(config32(&mut function, 0x40) & 0xffff_00ff, 0x0002_0011, "three vectors");
    let _ = function.config_write(0x42, &0x8000u16.to_le_bytes());
    put(&mut function, 0x4000, &0xfee0_0000u64.to_le_bytes());
    put(&mut function, 0x4008, &0x31u64.to_le_bytes());
    let message = MsiMessage { address: 0xfee0_0000, data: 0x31 };
    assert_eq!(log.take(), [Event::Route(0, Some(message))]);
    assert_eq!(function.vector_message(0), Some(message));
    negotiate(&mut function, VERSION_1);
    put16(&mut function, 0x10, 0);
    put16(&mut function, 0x16, 1);
    put16(&mut function, 0x1a, 3);
    assert_eq!(get::<2>(&mut function, 0x1a), [0xff, 0xff]);
    set_up_queue(&mut function, 0, 64);
    put(&mut function, 0x14, &[0xf]);
    log.take();
    function.signal_queue(0);
    function.signal_queue(1);
    function.signal_queue(9);
    function.config_changed(&[2; 60]);
    function.set_needs_reset();
    function.set_needs_reset();
    assert_eq!(log.take(), [Event::Signal(0), Event::Signal(0), Event::Signal(0)]);
    assert_eq!((status(&mut function), get::<1>(&mut function, 0x1000)), (0x4f, [0]));
}

/// Configuration is read in any piece, changes with its generation, and can be written only where the device lets it.
#[test]
fn device_configuration() {
    let (mut function, log) = function();
    let config = offer().config;
    for start in 0..64usize {
        for width in [1, 2, 4, 8] {
            let mut data = [0xaa; 8];
            let _ = function.bar_read(0, 0x2000 + start as u64, &mut data[..width]);
            let expected: Vec<u8> = (start..start + width).map(|at| config.get(at).copied().unwrap_or(0)).collect();
            assert_eq!(data[..width], expected);
        }
    }
    negotiate(&mut function, VERSION_1 | CONFIG_WCE);
    for (offset, data) in [(0, &[9u8; 4][..]), (31, &[9; 2]), (32, &[9; 2]), (60, &[9]), (0xfff, &[9; 4]), (32, &[1])] {
        put(&mut function, 0x2000 + offset, data);
    }
    assert_eq!(log.take(), [Event::Intent(Intent::ConfigWrite { offset: 32, data: vec![1] })]);
    assert_eq!(get::<1>(&mut function, 0x2020), [1]);
    let generation = get::<1>(&mut function, 0x15);
    function.config_changed(&[5; 100]);
    assert_eq!(get::<1>(&mut function, 0x15), [generation[0] + 1]);
    assert_eq!(get::<4>(&mut function, 0x2000 + 58), [5, 5, 0, 0], "the length is frozen");
    function.config_changed(&[5; 60]);
    assert_eq!(get::<1>(&mut function, 0x15), [generation[0] + 1], "nothing has changed");
    negotiate(&mut function, VERSION_1);
    put(&mut function, 0x2020, &[0]);
    assert_eq!(log.take(), [], "read-only unless negotiated");
}

/// Doorbells follow the BAR: assigned by the board, switched on and off and moved by the guest.
#[test]
fn doorbells_follow_the_bar() {
    let (mut function, log) = function();
    assert_eq!(function.bars(), [(0, BarKind::Memory64 { prefetchable: false }, BAR_LEN)]);
    function.assign_bar(0, 0x80_0000_0000).unwrap();
    assert_eq!(log.take(), []);
    let _ = function.config_write(4, &[2]);
    let placed =
        |base: Option<u64>| (0..2).map(move |index| Event::Placed(index, base.map(|base| base + 4 * u64::from(index))));
    assert_eq!(log.take(), placed(Some(0x80_0000_0000 + NOTIFY_OFFSET)).collect::<Vec<_>>());
    let _ = function.config_write(0x14, &[0x81]);
    assert_eq!(log.take(), placed(Some(0x81_0000_0000 + NOTIFY_OFFSET)).collect::<Vec<_>>());
    let _ = function.config_write(4, &[0]);
    assert_eq!(log.take(), placed(None).collect::<Vec<_>>());
}

/// The access capability reaches the BAR without mapping it, as firmware does.
#[test]
fn access_through_configuration_space() {
    let (mut function, log) = function();
    let mut cap = config32(&mut function, 0x34) as u16 & 0xff;
    while config32(&mut function, cap) >> 24 != 5 {
        cap = (config32(&mut function, cap) >> 8) as u16 & 0xff;
    }
    let mut window = |bar: u8, offset: u32, len: u32, data: Option<&[u8]>| {
        let _ = function.config_write(cap + 4, &[bar]);
        let _ = function.config_write(cap + 8, &offset.to_le_bytes());
        let _ = function.config_write(cap + 12, &len.to_le_bytes());
        match data {
            Some(data) => {
                let _ = function.config_write(cap + 16, data);
                0
            }
            None => config32(&mut function, cap + 16),
        }
    };
    window(0, 0x14, 1, Some(&[1]));
    assert_eq!(window(0, 0x14, 1, None) & 0xff, 1);
    assert_eq!(window(0, 0x2000, 4, None), 0x100_0000);
    for (bar, offset, len) in [(1, 0x14, 1), (0, 0x14, 3), (0, 0x13, 2), (0, 0x1_0000, 4), (0, u32::MAX, 4), (0, 0, 0)]
    {
        window(bar, offset, len, Some(&[0; 4]));
        window(bar, offset, len, None);
    }
    assert_eq!(window(0, 0x14, 1, None) & 0xff, 1);
    assert_eq!(log.take(), []);
}

#[test]
fn impossible_offers_are_named() {
    let refused = |change: fn(&mut DeviceOffer)| {
        let mut offer = offer();
        change(&mut offer);
        VirtioPci::new(parts(offer, &Log::default())).unwrap_err()
    };
    assert_eq!(refused(|offer| offer.features = 1), OfferError::Legacy);
    assert_eq!(refused(|offer| offer.device_type = 64), OfferError::DeviceType(64));
    assert_eq!(refused(|offer| offer.queue_sizes.clear()), OfferError::QueueCount(0));
    assert_eq!(refused(|offer| offer.queue_sizes = vec![2; 1025]), OfferError::QueueCount(1025));
    assert_eq!(refused(|offer| offer.queue_sizes[1] = 100), OfferError::QueueSize { index: 1, size: 100 });
    assert_eq!(refused(|offer| offer.config = vec![0; 4097]), OfferError::ConfigLength(4097));
    let mut most = offer();
    most.queue_sizes = vec![2; 1024];
    assert!(VirtioPci::new(parts(most, &Log::default())).is_ok());
}

/// What guests see of a block device must not change between versions of board atoll-1.
#[test]
fn block_function_bytes_are_pinned() {
    let (mut function, _) = function();
    let mut bytes = Vec::new();
    for at in (0..0xb0).step_by(4) {
        bytes.extend(config32(&mut function, at).to_le_bytes());
    }
    let lines: Vec<String> =
        bytes.chunks(16).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>()).collect();
    assert_eq!(lines, GOLDEN_BLOCK);
    assert_eq!(config32(&mut function, 0x100), u32::MAX);
}

const GOLDEN_BLOCK: [&str; 11] = [
    "f41a4210000010000100800100000000",
    "04000000000000000000000000000000",
    "000000000000000000000000f41a0011",
    "00000000400000000000000010010000",
    "114c02000040000000c00000095c1001",
    "00000000000000003c000000096c1003",
    "000000000010000001000000097c1004",
    "00000000002000003c00000009901402",
    "00000000003000000800000004000000",
    "09001405000000000000000000000000",
    "00000000000000000000000000000000",
];

/// A state moves to a fresh function of the same offer, which then activates its own frontend.
#[test]
fn state_returns() {
    let (mut first, log) = function();
    first.assign_bar(0, 0x80_0000_0000).unwrap();
    let _ = first.config_write(4, &[6]);
    negotiate(&mut first, VERSION_1);
    set_up_queue(&mut first, 0, 64);
    put(&mut first, 0x14, &[0xf]);
    let activated = log.take().into_iter().find(|event| matches!(event, Event::Intent(_)));
    let state = first.state();
    let (mut second, log) = function();
    assert!(second.restore(state.clone()).is_some());
    let events = log.take();
    assert!(
        events.contains(&Event::Placed(0, Some(0x80_0000_3000))) && activated.is_some_and(|it| events.contains(&it))
    );
    assert_eq!(second.state(), state);
    let mut absurd = state.clone();
    absurd.common.queues[0].size = 3;
    let mut short = state;
    short.config.pop();
    for state in [absurd, short] {
        let (mut third, log) = function();
        assert!(third.restore(state).is_none());
        assert_eq!(log.take(), []);
    }
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    /// Every byte of configuration space with every value, in the middle of normal operation.
    #[test]
    fn every_byte_of_config_space() {
        let (mut function, _) = function();
        let identity = (config32(&mut function, 0), config32(&mut function, 8), config32(&mut function, 0x2c));
        for offset in 0..0x1000u16 {
            for value in 0..=255u8 {
                let _ = function.config_write(offset, &[value]);
                let _ = function.config_read(offset, &mut [0]);
            }
        }
        assert_eq!((config32(&mut function, 0), config32(&mut function, 8), config32(&mut function, 0x2c)), identity);
        assert!(matches!(function.reset(), Answer::Now));
        negotiate(&mut function, VERSION_1);
        assert_eq!(status(&mut function), 0xb, "the device still works");
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Bar(u64, u64, u8, bool),
        Config(u16, u32, u8, bool),
        Common(u8, u16),
        Later(bool),
        Done,
        Signal(u16),
        Changed(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let width = prop_oneof![Just(1u8), Just(2), Just(4), Just(8)];
        prop_oneof![
            (0..BAR_LEN + 64, any::<u64>(), width.clone(), any::<bool>())
                .prop_map(|(at, value, width, write)| Step::Bar(at, value, width, write)),
            (any::<u64>(), any::<u64>(), width.clone(), any::<bool>())
                .prop_map(|(at, value, width, write)| Step::Bar(at, value, width, write)),
            (0..0x100u16, any::<u32>(), width, any::<bool>()).prop_map(|(at, value, width, write)| Step::Config(
                at,
                value,
                width.min(4),
                write
            )),
            (0..0x3cu8, any::<u16>()).prop_map(|(at, value)| Step::Common(at, value)),
            (Just(0x14u8), prop_oneof![Just(0u16), Just(1), Just(3), Just(0xb), Just(0xf)])
                .prop_map(|(at, value)| Step::Common(at, value)),
            any::<bool>().prop_map(Step::Later),
            Just(Step::Done),
            any::<u16>().prop_map(Step::Signal),
            any::<u8>().prop_map(Step::Changed),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

        /// Random accesses of any width anywhere: no panic, and every activation that comes out is one that the offer allows.
        #[test]
        fn random_accesses_are_contained(steps in prop::collection::vec(step(), 1..200)) {
            let (mut function, log) = function();
            negotiate(&mut function, VERSION_1);
            for step in steps {
                match step {
                    Step::Bar(at, value, width, true) => {
                        let _ = function.bar_write(0, at, &value.to_le_bytes()[..usize::from(width)]);
                    }
                    Step::Bar(at, _, width, false) => {
                        let _ = function.bar_read(0, at, &mut [0; 8][..usize::from(width)]);
                    }
                    Step::Config(at, value, width, true) => {
                        let _ = function.config_write(at, &value.to_le_bytes()[..usize::from(width)]);
                    }
                    Step::Config(at, _, width, false) => {
                        let _ = function.config_read(at, &mut [0; 4][..usize::from(width)]);
                    }
                    Step::Common(at, value) => {
                        let data = value.to_le_bytes();
                        let width = if at == 0x14 { 1 } else { 2 };
                        let _ = function.bar_write(0, at.into(), &data[..width]);
                    }
                    Step::Later(later) => *log.later.lock().unwrap() = later.then(Vec::new),
                    Step::Done => {
                        if let Some(completion) = log.later.lock().unwrap().as_mut().and_then(Vec::pop) {
                            completion.complete(0);
                        }
                    }
                    Step::Signal(index) => function.signal_queue(index),
                    Step::Changed(value) => function.config_changed(&[value; 70]),
                }
                for event in log.take() {
                    match event {
                        Event::Intent(Intent::Activate { features, queues, config_vector }) => {
                            prop_assert_eq!(features & !(VERSION_1 | CONFIG_WCE), 0);
                            prop_assert!(features & VERSION_1 != 0 && config_vector.is_none_or(|vector| vector < 3));
                            for queue in queues {
                                prop_assert!(queue.index < 2 && queue.size.is_power_of_two() && queue.size <= 256);
                                prop_assert!(queue.vector.is_none_or(|vector| vector < 3));
                                prop_assert!(queue.descriptor_table.checked_add(16 * u64::from(queue.size)).is_some());
                            }
                        }
                        Event::Intent(Intent::ConfigWrite { offset, data }) => {
                            prop_assert_eq!((offset, data.len()), (32, 1));
                        }
                        Event::Notify(index) => prop_assert!(index < 2),
                        Event::Route(vector, _) | Event::Signal(vector) => prop_assert!(vector < 3),
                        _ => {}
                    }
                }
            }
        }
    }
}

/// A driver that asks an input device what it is turns pages by itself: nobody behind the transport hears of it, and a reset
/// closes the book.
#[test]
fn pages_are_turned_in_front() {
    let log = Log::default();
    let mut pages = Pages::default();
    pages.set(input_config::select::ID_NAME, 0, b"tablet".to_vec());
    let config = pages.config(0, 0).to_vec();
    let offer = DeviceOffer { device_type: device_class::INPUT, features: VERSION_1, config, pages, ..offer() };
    let mut function = VirtioPci::new(parts(offer, &log)).unwrap();
    negotiate(&mut function, VERSION_1);
    put(&mut function, DEVICE_OFFSET, &[input_config::select::ID_NAME]);
    assert_eq!(get::<3>(&mut function, DEVICE_OFFSET), [1, 0, 6]);
    assert_eq!(get::<8>(&mut function, DEVICE_OFFSET + 8), *b"tablet\0\0");
    put(&mut function, DEVICE_OFFSET + 1, &[9]);
    assert_eq!(get::<3>(&mut function, DEVICE_OFFSET), [1, 9, 0], "there is no such page");
    put(&mut function, DEVICE_OFFSET + 2, &[200]);
    assert_eq!(get::<3>(&mut function, DEVICE_OFFSET), [1, 9, 0], "the rest is the device's");
    assert_eq!(log.take(), [], "nobody was asked");
    put(&mut function, 0x14, &[0]);
    assert_eq!(get::<3>(&mut function, DEVICE_OFFSET), [0, 0, 0]);
}
