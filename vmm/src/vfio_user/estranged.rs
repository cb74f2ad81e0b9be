//! A controller that came back as after a reset, while the guest's driver believes that it has enabled it.
//!
//! Nothing interrupts a driver for that: it finds out when its own time for a request is up. Linux' NVMe driver then reads CSTS. One
//! that says "not ready, nothing wrong" has it send an Abort, which nobody answers, and wait as long a second time; one that says
//! "fatal" has it reset the controller at once. For that driver the second is true, so until it writes CC the fatal bit is
//! set (NVM Express 1.4, 3.1.5 and 3.1.6). Other classes have no such bit that anybody would know.

/// Mass storage, non-volatile memory, NVMe.
const NVME: u32 = 0x0001_0802;
/// BAR 0: controller configuration, and status with its fatal bit.
const REGION: u32 = 0;
const CC: std::ops::Range<u64> = 0x14..0x18;
const CSTS: u64 = 0x1c;
const FATAL: u64 = 2;

/// Whether driver and device still mean the same.
#[derive(Debug)]
pub(super) struct Estranged {
    nvme: bool,
    now: bool,
}

impl Estranged {
    /// They do; `class` is the device's.
    pub(super) fn new(class: u32) -> Self {
        Self { nvme: class == NVME, now: false }
    }

    /// The device has begun anew, and the driver has not.
    pub(super) fn begin(&mut self) {
        self.now = self.nvme;
    }

    /// The driver writes registers.
    pub(super) fn written(&mut self, region: u32, offset: u64, len: usize) {
        let end = offset.saturating_add(len as u64);
        if region == REGION && offset < CC.end && CC.start < end {
            self.now = false;
        }
    }

    /// What the driver reads, where the device says `value`.
    pub(super) fn read(&self, region: u32, offset: u64, len: usize, value: u64) -> u64 {
        match CSTS.checked_sub(offset) {
            Some(at) if self.now && region == REGION && at < len as u64 => value | FATAL << (8 * at),
            _ => value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_that_came_anew_says_so_until_it_is_configured() {
        let mut nvme = Estranged::new(NVME);
        assert_eq!(nvme.read(0, 0x1c, 4, 1), 1);
        nvme.begin();
        assert_eq!((nvme.read(0, 0x1c, 4, 0), nvme.read(0, 0x18, 8, 0)), (2, 2 << 32));
        assert_eq!((nvme.read(0, 0x14, 4, 0), nvme.read(0, 0x20, 4, 0), nvme.read(2, 0x1c, 4, 0)), (0, 0, 0));
        nvme.written(0, 0x1000, 4);
        nvme.written(0, u64::MAX, 8);
        assert_eq!(nvme.read(0, 0x1c, 4, 0), 2, "a doorbell says nothing");
        nvme.written(0, 0x14, 4);
        assert_eq!(nvme.read(0, 0x1c, 4, 0), 0);
        let mut other = Estranged::new(0x02_0000);
        other.begin();
        assert_eq!(other.read(0, 0x1c, 4, 0), 0);
    }
}
