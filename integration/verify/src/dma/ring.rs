//! A virtio device (virtio 1.2, 4.1) that is driven by hand: its registers, and rings of a few entries without interrupts.

use std::io;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::vfio::{Device, Pages, Region};

/// Entries of a ring, and where its parts are in their page. What lies behind them is the device's driver's.
const SIZE: u16 = 8;
const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = 0x200;
const USED: usize = 0x400;
/// Where the parts of a ring end.
pub const RING_END: usize = 0x800;
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
/// How long a device may take for anything.
pub const WAIT: Duration = Duration::from_secs(30);

/// A part of a request: where the device sees it, how long it is, and whether the device writes it.
pub type Part = (u64, u32, bool);

/// The device while it is driven.
pub struct VirtioFunction<'a> {
    device: &'a Device,
    common: (Region<'a>, u64),
    notify: (u8, u64, u32),
}

/// One of its rings.
pub struct Ring<'a> {
    number: u16,
    page: &'a Pages,
    doorbell: (Region<'a>, u64),
    asked: u16,
    seen: u16,
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

impl<'a> VirtioFunction<'a> {
    /// Takes the device over, up to FEATURES_OK.
    ///
    /// # Errors
    /// When it is no such device, or wants no driver like this.
    pub fn begin(device: &'a Device) -> io::Result<Self> {
        let config = device.config()?;
        // Memory and bus mastering.
        config.write(4, &6_u16.to_le_bytes())?;
        let (bar, offset, _) = capability(&config, 1)?;
        let function = Self { device, common: (device.bar(bar)?, offset), notify: capability(&config, 2)? };
        function.write(DEVICE_STATUS, &[0])?;
        let deadline = Instant::now() + WAIT;
        while function.status()? != 0 {
            if Instant::now() > deadline {
                return Err(io::Error::other("it does not reset"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        function.write(DEVICE_STATUS, &[SEEN])?;
        for (half, bits) in [(0_u32, 0_u32), (1, WANTED)] {
            function.write(FEATURE_SELECT, &half.to_le_bytes())?;
            function.write(FEATURES, &bits.to_le_bytes())?;
        }
        function.write(DEVICE_STATUS, &[SEEN | FEATURES_OK])?;
        if function.status()? & FEATURES_OK == 0 {
            return Err(io::Error::other("it does not want a driver behind an IOMMU"));
        }
        Ok(function)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.common.0.write(self.common.1 + at, bytes)
    }

    fn status(&self) -> io::Result<u8> {
        Ok(self.common.0.read::<1>(self.common.1 + DEVICE_STATUS)?[0])
    }

    /// Sets a ring up in `page`, which the device sees at `iova`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ring(&self, number: u16, page: &'a Pages, iova: u64) -> io::Result<Ring<'a>> {
        self.write(QUEUE_SELECT, &number.to_le_bytes())?;
        self.write(QUEUE_SIZE, &SIZE.to_le_bytes())?;
        for (register, part) in (0..).zip([DESCRIPTORS, AVAILABLE, USED]) {
            let address = iova + part as u64;
            self.write(QUEUE_ADDRESSES + 8 * register, &(address as u32).to_le_bytes())?;
            self.write(QUEUE_ADDRESSES + 8 * register + 4, &((address >> 32) as u32).to_le_bytes())?;
        }
        let of_queue = u16::from_le_bytes(self.common.0.read(self.common.1 + QUEUE_NOTIFY_OFFSET)?);
        self.write(QUEUE_ENABLE, &1_u16.to_le_bytes())?;
        let (bar, offset, multiplier) = self.notify;
        let doorbell = (self.device.bar(bar)?, offset + u64::from(of_queue) * u64::from(multiplier));
        Ok(Ring { number, page, doorbell, asked: 0, seen: 0 })
    }

    /// The rings are there: it may begin.
    ///
    /// # Errors
    /// The kernel's.
    pub fn go(&self) -> io::Result<()> {
        self.write(DEVICE_STATUS, &[SEEN | FEATURES_OK | DRIVER_OK])
    }

    /// Resets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stop(self) -> io::Result<()> {
        self.write(DEVICE_STATUS, &[0])
    }
}

impl Ring<'_> {
    /// The page that it is in.
    #[must_use]
    pub fn page(&self) -> &Pages {
        self.page
    }

    /// Makes one request available; the one before it is over.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ask(&mut self, parts: &[Part]) -> io::Result<()> {
        for (at, (address, len, device_writes)) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let flags = if last { 0 } else { NEXT } | if *device_writes { WRITE } else { 0 };
            let place = DESCRIPTORS + 16 * at;
            self.page.write(place, &address.to_le_bytes());
            self.page.write(place + 8, &len.to_le_bytes());
            self.page.write(place + 12, &flags.to_le_bytes());
            self.page.write(place + 14, &(at as u16 + 1).to_le_bytes());
        }
        self.page.write(AVAILABLE + 4 + 2 * usize::from(self.asked % SIZE), &0_u16.to_le_bytes());
        self.asked = self.asked.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.page.write(AVAILABLE + 2, &self.asked.to_le_bytes());
        fence(Ordering::SeqCst);
        self.doorbell.0.write(self.doorbell.1, &self.number.to_le_bytes())
    }

    /// Waits until a request is over; how many bytes the device says that it has written, or nothing when it takes longer.
    pub fn answered(&mut self, within: Duration) -> Option<u32> {
        let deadline = Instant::now() + within;
        while u16::from_le_bytes(self.page.read(USED + 2)) == self.seen {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        fence(Ordering::SeqCst);
        let entry = USED + 4 + 8 * usize::from(self.seen % SIZE);
        self.seen = self.seen.wrapping_add(1);
        Some(u32::from_le_bytes(self.page.read(entry + 4)))
    }
}
