//! What the specification fixes for each type of device and the transport needs to know: how the function introduces itself
//! on the bus, and which bytes of its configuration a driver may write (virtio 1.2, chapter 5).

use std::ops::Range;

/// Network card.
pub const NET: u16 = 1;
/// Block device.
pub const BLOCK: u16 = 2;
/// Console.
pub const CONSOLE: u16 = 3;
/// Entropy source.
pub const ENTROPY: u16 = 4;
/// GPU.
pub const GPU: u16 = 16;
/// Keyboard, mouse, tablet.
pub const INPUT: u16 = 18;
/// Socket.
pub const VSOCK: u16 = 19;
/// IOMMU.
pub const IOMMU: u16 = 23;
/// Sound card.
pub const SOUND: u16 = 25;
/// Shared file system.
pub const FS: u16 = 26;

/// VIRTIO_BLK_F_CONFIG_WCE.
const BLK_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_CONSOLE_F_EMERG_WRITE.
const CONSOLE_EMERG_WRITE: u64 = 1 << 2;
/// VIRTIO_IOMMU_F_BYPASS_CONFIG.
const IOMMU_BYPASS_CONFIG: u64 = 1 << 6;

/// PCI class of a device type: 0xCCSSPP. Frozen: guests name their devices by it.
pub fn pci_class(device_type: u16) -> u32 {
    match device_type {
        NET => 0x02_0000,
        BLOCK => 0x01_8000,
        CONSOLE => 0x07_8000,
        GPU => 0x03_8000,
        INPUT => 0x09_8000,
        VSOCK => 0x02_8000,
        IOMMU => 0x08_0600,
        SOUND => 0x04_0100,
        FS => 0x01_8000,
        // Entropy and everything unknown: unclassified.
        _ => 0x00_ff00,
    }
}

/// The bytes that a driver may write once it has accepted `features`; the rest of configuration space is read-only.
pub fn writable_config(device_type: u16, features: u64) -> Option<Range<usize>> {
    match device_type {
        // writeback
        BLOCK if features & BLK_CONFIG_WCE != 0 => Some(32..33),
        // emerg_wr; meant for drivers that have negotiated nothing yet, so an offer is enough
        CONSOLE if features & CONSOLE_EMERG_WRITE != 0 => Some(8..12),
        // events_clear
        GPU => Some(4..8),
        // select, subsel
        INPUT => Some(0..2),
        // bypass
        IOMMU if features & IOMMU_BYPASS_CONFIG != 0 => Some(36..37),
        _ => None,
    }
}

/// Whether a driver may write `data` there at all: where a field must not be seen with another value, one is ignored.
pub fn writable_value(device_type: u16, data: &[u8]) -> bool {
    // bypass is 0 or 1 (5.13.4)
    device_type != IOMMU || data.iter().all(|byte| *byte <= 1)
}
