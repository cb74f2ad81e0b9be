//! A virtio disk (virtio 1.2, 4.1 and 5.2) with one ring, one request at a time and no interrupts.

use std::io;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::vfio::{Device, Pages, Region};

/// Entries of the ring, and where its parts are in their page.
const SIZE: u16 = 8;
const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = 0x200;
const USED: usize = 0x400;
const HEADER: usize = 0x800;
const STATUS: usize = 0x900;
/// Registers of the common configuration.
const FEATURE_SELECT: u64 = 8;
const FEATURES: u64 = 12;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFFSET: u64 = 30;
const QUEUE_ADDRESSES: u64 = 32;
/// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK.
const SEEN: u8 = 1 | 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// VERSION_1 and ACCESS_PLATFORM, in the upper half.
const WANTED: u32 = 1 | 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const WAIT: Duration = Duration::from_secs(30);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the disk.
    Read,
    /// To it.
    Write,
}

/// The disk while it is driven.
pub struct RingDisk<'a> {
    common: (Region<'a>, u64),
    doorbell: (Region<'a>, u64),
    ring: &'a Pages,
    iova: u64,
    asked: u16,
}

/// Where a part of the device's registers is: BAR and offset, and what follows there in the capability.
fn capability(config: &Region<'_>, kind: u8) -> io::Result<(u8, u64, u32)> {
    let mut at = u64::from(config.read::<1>(0x34)?[0]);
    for _ in 0..48 {
        let [id, next, _, cfg_type, bar] = config.read(at)?;
        if id == 9 && cfg_type == kind {
            let offset = u32::from_le_bytes(config.read(at + 8)?);
            return Ok((bar, offset.into(), u32::from_le_bytes(config.read(at + 16)?)));
        }
        if next == 0 {
            break;
        }
        at = next.into();
    }
    Err(io::Error::other(format!("it has no capability of virtio of kind {kind}")))
}

impl<'a> RingDisk<'a> {
    /// Takes the device over, with a ring in the page `ring`, which it sees at `iova`.
    ///
    /// # Errors
    /// When it is no such device, or wants no driver like this.
    pub fn start(device: &'a Device, ring: &'a Pages, iova: u64) -> io::Result<Self> {
        let config = device.config()?;
        // Memory and bus mastering.
        config.write(4, &6_u16.to_le_bytes())?;
        let (bar, offset, _) = capability(&config, 1)?;
        let common = (device.bar(bar)?, offset);
        let (bar, notify, multiplier) = capability(&config, 2)?;
        let write = |at: u64, bytes: &[u8]| common.0.write(common.1 + at, bytes);
        let status = || Ok::<_, io::Error>(common.0.read::<1>(common.1 + DEVICE_STATUS)?[0]);
        write(DEVICE_STATUS, &[0])?;
        let deadline = Instant::now() + WAIT;
        while status()? != 0 {
            if Instant::now() > deadline {
                return Err(io::Error::other("it does not reset"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        write(DEVICE_STATUS, &[SEEN])?;
        for (half, bits) in [(0_u32, 0_u32), (1, WANTED)] {
            write(FEATURE_SELECT, &half.to_le_bytes())?;
            write(FEATURES, &bits.to_le_bytes())?;
        }
        write(DEVICE_STATUS, &[SEEN | FEATURES_OK])?;
        if status()? & FEATURES_OK == 0 {
            return Err(io::Error::other("it does not want a driver behind an IOMMU"));
        }
        write(QUEUE_SELECT, &0_u16.to_le_bytes())?;
        write(QUEUE_SIZE, &SIZE.to_le_bytes())?;
        for (register, part) in (0..).zip([DESCRIPTORS, AVAILABLE, USED]) {
            let address = iova + part as u64;
            write(QUEUE_ADDRESSES + 8 * register, &(address as u32).to_le_bytes())?;
            write(QUEUE_ADDRESSES + 8 * register + 4, &((address >> 32) as u32).to_le_bytes())?;
        }
        let of_queue = u16::from_le_bytes(common.0.read(common.1 + QUEUE_NOTIFY_OFFSET)?);
        write(QUEUE_ENABLE, &1_u16.to_le_bytes())?;
        write(DEVICE_STATUS, &[SEEN | FEATURES_OK | DRIVER_OK])?;
        let doorbell = (device.bar(bar)?, notify + u64::from(of_queue) * u64::from(multiplier));
        Ok(Self { common, doorbell, ring, iova, asked: 0 })
    }

    /// Has it move `len` bytes between a sector and `data`; whether it says that it has.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn request(&mut self, kind: Kind, sector: u64, data: u64, len: u32) -> io::Result<bool> {
        let (code, flags) = if kind == Kind::Read { (0_u32, WRITE) } else { (1, 0) };
        self.ring.write(HEADER, &code.to_le_bytes());
        self.ring.write(HEADER + 4, &[0; 4]);
        self.ring.write(HEADER + 8, &sector.to_le_bytes());
        self.ring.write(STATUS, &[0xff]);
        let parts = [
            (self.iova + HEADER as u64, 16, NEXT, 1),
            (data, len, flags | NEXT, 2),
            (self.iova + STATUS as u64, 1, WRITE, 0_u16),
        ];
        for (at, (address, len, flags, next)) in parts.into_iter().enumerate() {
            let place = DESCRIPTORS + 16 * at;
            self.ring.write(place, &address.to_le_bytes());
            self.ring.write(place + 8, &len.to_le_bytes());
            self.ring.write(place + 12, &flags.to_le_bytes());
            self.ring.write(place + 14, &next.to_le_bytes());
        }
        self.ring.write(AVAILABLE + 4 + 2 * usize::from(self.asked % SIZE), &0_u16.to_le_bytes());
        self.asked = self.asked.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.ring.write(AVAILABLE + 2, &self.asked.to_le_bytes());
        fence(Ordering::SeqCst);
        self.doorbell.0.write(self.doorbell.1, &0_u16.to_le_bytes())?;
        let deadline = Instant::now() + WAIT;
        while u16::from_le_bytes(self.ring.read(USED + 2)) != self.asked {
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{kind:?} of sector {sector} at {data:#x} gets no answer")));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        fence(Ordering::SeqCst);
        Ok(self.ring.read::<1>(STATUS)[0] == 0)
    }

    /// Resets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stop(self) -> io::Result<()> {
        self.common.0.write(self.common.1 + DEVICE_STATUS, &[0])
    }
}
