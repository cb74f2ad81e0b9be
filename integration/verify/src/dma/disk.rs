//! A disk (virtio 1.2, 5.2), one request at a time.

use std::io;

use super::ring::{RING_END, Ring, VirtioFunction, WAIT};
use super::vfio::{Device, Pages};

/// Where a request's header and status are in the page of the ring.
const HEADER: usize = RING_END;
const STATUS: usize = RING_END + 0x100;

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
    function: VirtioFunction<'a>,
    ring: Ring<'a>,
    iova: u64,
}

impl<'a> RingDisk<'a> {
    /// Takes the device over, with a ring in the page `ring`, which it sees at `iova`.
    ///
    /// # Errors
    /// When it is no such device, or wants no driver like this.
    pub fn start(device: &'a Device, ring: &'a Pages, iova: u64) -> io::Result<Self> {
        let function = VirtioFunction::begin(device)?;
        let ring = function.ring(0, ring, iova)?;
        function.go()?;
        Ok(Self { function, ring, iova })
    }

    /// Has it move `len` bytes between a sector and `data`; whether it says that it has.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn request(&mut self, kind: Kind, sector: u64, data: u64, len: u32) -> io::Result<bool> {
        let code = if kind == Kind::Read { 0_u32 } else { 1 };
        let page = self.ring.page();
        page.write(HEADER, &code.to_le_bytes());
        page.write(HEADER + 4, &[0; 4]);
        page.write(HEADER + 8, &sector.to_le_bytes());
        page.write(STATUS, &[0xff]);
        let (header, status) = (self.iova + HEADER as u64, self.iova + STATUS as u64);
        self.ring.ask(&[(header, 16, false), (data, len, kind == Kind::Read), (status, 1, true)])?;
        let answered = self.ring.answered(WAIT);
        let silent = || io::Error::other(format!("{kind:?} of sector {sector} at {data:#x} gets no answer"));
        answered.ok_or_else(silent)?;
        Ok(self.ring.page().read::<1>(STATUS)[0] == 0)
    }

    /// Resets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stop(self) -> io::Result<()> {
        self.function.stop()
    }
}
