//! DMA on purpose: a driver of a disk in user space, which maps memory for it, takes it back, and has the disk touch what it
//! may not.
//!
//! The disk is driven through VFIO ([`vfio`]), at addresses of the guest's IOMMU that are nobody's physical ones, by a ring
//! of a few requests ([`disk`]); QEMU's teaching device ([`edu`]) does the same for a device that is passed through. What is
//! mapped must be reached, what is not must not: its bytes stay as they are, the request ends with an error, and the disk goes
//! on serving. What the guest's kernel and the host say of it is looked at from outside.

pub mod disk;
pub mod edu;
pub mod vfio;

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use disk::{Kind, RingDisk};
use vfio::{Container, PAGE, Pages, Rights};

/// Where the device sees the ring, and the pages that it reads and writes: beyond all of a small guest's memory.
const RING: u64 = 0x1_0000_0000;
const SOURCE: u64 = 0x2_0000_0000;
const TARGET: u64 = 0x3_0000_1000;
/// Where nothing ever is.
const NOWHERE: u64 = 0x4_0000_0000;
/// Sectors that are used, each the first of a page.
const WRITTEN: u64 = 0;
const REFUSED: u64 = 8;
const AGAIN: u64 = 16;

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaVerdict {
    /// Everything was as it must be.
    pub ok: bool,
    /// Accesses that must have been refused.
    pub faults: u32,
    /// Messages that the device has sent as it was asked to.
    #[serde(default)]
    pub messages: u64,
    /// What was not as it must be.
    pub wrong: Vec<String>,
}

impl DmaVerdict {
    /// One line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
    fn expect(&mut self, what: &str, is: bool) {
        if !is {
            self.wrong.push(what.to_owned());
        }
    }
}

fn pattern(seed: u8) -> Vec<u8> {
    (0..PAGE).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed).wrapping_add((at >> 8) as u8)).collect()
}

/// Drives the disk at `place`, as PCI names it (`0000:00:04.0`). It is taken from its driver and not given back; its first
/// sectors hold zeroes at first.
///
/// # Errors
/// When it cannot be driven at all.
pub fn run(place: &str) -> io::Result<DmaVerdict> {
    let container = Container::new()?;
    let device = container.device(Path::new("/sys/bus/pci/devices"), place)?;
    let (ring, source, target) = (Pages::new(1)?, Pages::new(1)?, Pages::new(1)?);
    container.map(RING, &ring, Rights::ReadWrite)?;
    container.map(SOURCE, &source, Rights::ReadWrite)?;
    container.map(TARGET, &target, Rights::ReadWrite)?;
    let mut disk = RingDisk::start(&device, &ring, RING)?;
    let mut verdict = DmaVerdict::default();
    let whole = PAGE as u32;

    source.fill(&pattern(1));
    target.fill(&pattern(2));
    verdict.expect("a mapped page is written to the disk", disk.request(Kind::Write, WRITTEN, SOURCE, whole)?);
    verdict.expect("the disk is read into a mapped page", disk.request(Kind::Read, WRITTEN, TARGET, whole)?);
    verdict.expect("what was written is read", target.bytes() == pattern(1));

    container.unmap(TARGET)?;
    target.fill(&pattern(3));
    verdict.expect("reading into an unmapped page fails", !disk.request(Kind::Read, WRITTEN, TARGET, whole)?);
    verdict.expect("an unmapped page is not touched", target.bytes() == pattern(3));
    verdict.faults += 1;

    container.map(TARGET, &target, Rights::Read)?;
    verdict.expect("reading into a read-only page fails", !disk.request(Kind::Read, WRITTEN, TARGET, whole)?);
    verdict.expect("a read-only page is not touched", target.bytes() == pattern(3));
    verdict.faults += 1;

    container.unmap(SOURCE)?;
    verdict.expect("writing from an unmapped page fails", !disk.request(Kind::Write, REFUSED, SOURCE, whole)?);
    verdict.expect("reading to nowhere fails", !disk.request(Kind::Read, WRITTEN, NOWHERE, whole)?);
    verdict.faults += 2;

    // Mapped the other way round: what the device remembered would show.
    container.unmap(TARGET)?;
    container.map(SOURCE, &target, Rights::ReadWrite)?;
    container.map(TARGET, &source, Rights::ReadWrite)?;
    target.fill(&pattern(4));
    verdict.expect("a page mapped anew is written", disk.request(Kind::Write, AGAIN, SOURCE, whole)?);
    verdict.expect("and read into another", disk.request(Kind::Read, AGAIN, TARGET, whole)?);
    verdict.expect("it holds what was written", source.bytes() == pattern(4));
    verdict.expect("the refused sector is read", disk.request(Kind::Read, REFUSED, TARGET, whole)?);
    verdict.expect("nothing was written there", source.bytes().iter().all(|byte| *byte == 0));
    disk.stop()?;
    verdict.ok = verdict.wrong.is_empty();
    Ok(verdict)
}
