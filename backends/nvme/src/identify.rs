//! What the controller says of itself (5.15), and its log pages (5.14).

use crate::record::QUEUES_MAX;
use crate::spec::{BLOCK_SHIFT, ENTRIES_MAX, EVENTS_MAX, NAMESPACE, TRANSFER_SHIFT, VERSION};

/// Vendor of the function: that of vfio-user's NVMe controllers, for which drivers know no quirk.
pub const VENDOR: u16 = 0x4e58;
/// Device.
pub const DEVICE: u16 = 0x0001;

/// Bytes of each structure.
pub const LEN: usize = 4096;
/// Kelvin.
const TEMPERATURE: u16 = 313;
/// Kelvin at which a real one would warn.
pub const TEMPERATURE_MAX: u16 = 343;

/// The namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Bytes.
    pub bytes: u64,
    /// It cannot be written.
    pub read_only: bool,
    /// What the driver is told as the serial number, at most 20 bytes.
    pub serial: String,
}

impl Namespace {
    /// Blocks.
    pub fn blocks(&self) -> u64 {
        self.bytes >> BLOCK_SHIFT
    }

    /// A name that is the same for each incarnation and, as far as the serial number is, no other's (RFC 9562, version 8).
    fn uuid(&self) -> [u8; 16] {
        let hash = |seed: u64| {
            self.serial.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
        };
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
        uuid[8..].copy_from_slice(&hash(0x6c62_272e_07bb_0142).to_be_bytes());
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }
}

/// Puts numbers and text where they belong.
struct Page([u8; LEN]);

impl Page {
    fn new() -> Self {
        Self([0; LEN])
    }
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(to) = self.0.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }
    fn text(&mut self, at: usize, len: usize, text: &str) {
        let padded: Vec<u8> = text.bytes().chain(std::iter::repeat(b' ')).take(len).collect();
        self.put(at, &padded);
    }
}

/// Identify Controller (CNS 1).
pub fn controller(namespace: &Namespace) -> Vec<u8> {
    let mut page = Page::new();
    page.put(0, &VENDOR.to_le_bytes());
    page.put(2, &VENDOR.to_le_bytes());
    page.text(4, 20, &namespace.serial);
    page.text(24, 40, "Atoll NVMe");
    page.text(64, 8, env!("CARGO_PKG_VERSION"));
    page.put(77, &[TRANSFER_SHIFT]);
    page.put(78, &1_u16.to_le_bytes());
    page.put(80, &VERSION.to_le_bytes());
    // An I/O controller.
    page.put(111, &[1]);
    // Aborts and AERs at a time, both counted from zero.
    page.put(258, &[3, EVENTS_MAX as u8 - 1]);
    // The one firmware slot is read-only.
    page.put(260, &[1 | 1 << 1]);
    page.put(266, &TEMPERATURE_MAX.to_le_bytes());
    page.put(268, &(TEMPERATURE_MAX + 10).to_le_bytes());
    // Sizes of queue entries as powers of two, most and least.
    page.put(512, &[0x66, 0x44]);
    page.put(514, &(ENTRIES_MAX as u16).to_le_bytes());
    page.put(516, &1_u32.to_le_bytes());
    // Dataset management and write zeroes.
    page.put(520, &(1_u16 << 2 | 1 << 3).to_le_bytes());
    // There is a volatile write cache, and all namespaces can be flushed at once.
    page.put(525, &[0b111]);
    let uuid: String = namespace.uuid().iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |range: std::ops::Range<usize>| uuid.get(range).unwrap_or_default();
    let name = format!(
        "nqn.2014-08.org.nvmexpress:uuid:{}-{}-{}-{}-{}",
        part(0..8),
        part(8..12),
        part(12..16),
        part(16..20),
        part(20..32)
    );
    page.put(768, name.as_bytes());
    // Power state 0: 10 W at most.
    page.put(2048, &1000_u16.to_le_bytes());
    page.0.to_vec()
}

/// Identify Namespace (CNS 0): zeros for one that is not there.
pub fn namespace(namespace: &Namespace) -> Vec<u8> {
    let mut page = Page::new();
    for at in [0, 8, 16] {
        page.put(at, &namespace.blocks().to_le_bytes());
    }
    // Blocks may have no room behind them.
    page.put(24, &[1]);
    // A block that was given up reads as zeros, also by Write Zeroes.
    page.put(33, &[0b1001]);
    page.put(99, &[u8::from(namespace.read_only)]);
    page.put(130, &[BLOCK_SHIFT as u8]);
    page.0.to_vec()
}

/// Active namespaces above `after` (CNS 2).
pub fn namespaces(after: u32) -> Vec<u8> {
    let mut page = Page::new();
    if after < NAMESPACE {
        page.put(0, &NAMESPACE.to_le_bytes());
    }
    page.0.to_vec()
}

/// Names of the namespace (CNS 3): a UUID.
pub fn descriptors(namespace: &Namespace) -> Vec<u8> {
    let mut page = Page::new();
    page.put(0, &[3, 16]);
    page.put(4, &namespace.uuid());
    page.0.to_vec()
}

/// SMART / Health Information (log page 2).
pub fn health(completed: u64) -> Vec<u8> {
    let mut page = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(to) = page.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    put(1, &TEMPERATURE.to_le_bytes());
    // Spare room, in per cent, and when there is too little.
    put(3, &[100, 10]);
    put(64, &completed.to_le_bytes());
    page
}

/// Firmware Slot Information (log page 3).
pub fn firmware() -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    for (to, byte) in
        page.iter_mut().skip(8).take(8).zip(env!("CARGO_PKG_VERSION").bytes().chain(std::iter::repeat(b' ')))
    {
        *to = byte;
    }
    page
}

/// Most I/O queues of each kind that a controller with `queues` of them tells of (counted from zero, twice in a word).
pub fn queue_count(queues: u16) -> u32 {
    let count = u32::from(queues.clamp(1, QUEUES_MAX as u16)) - 1;
    count | count << 16
}
