//! DMA on purpose: a driver in user space, which maps memory for a device, takes it back, and has the device touch what it may
//! not.
//!
//! Devices are driven through VFIO ([`vfio`]), at addresses of the guest's IOMMU that are nobody's physical ones, by rings
//! of a few requests ([`ring`]): a disk ([`disk`]) and a network card ([`card`]). QEMU's teaching device ([`edu`]) does the same
//! for a device that is passed through. What is mapped must be reached, what is not must not: its bytes stay as they are, a
//! disk's request ends with an error, a card's frame is lost, and the device goes on serving. What the guest's kernel and the host say of it is looked at from outside.

pub mod card;
pub mod disk;
pub mod edu;
pub mod ring;
pub mod vfio;

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use card::RingCard;
use disk::{Kind, RingDisk};
use ring::WAIT;
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

/// Who asks, and what is asked for: another each time.
const ASKER: [u8; 4] = [10, 99, 99, 99];
/// A frame that has not come by then does not come.
const QUIET: Duration = Duration::from_millis(1500);

fn address(question: u8) -> [u8; 4] {
    [10, 99, 99, question]
}

/// Drives the card at `place`, behind which somebody answers questions of who has an address. It is taken from its driver and
/// not given back.
///
/// # Errors
/// When it cannot be driven at all.
pub fn on_a_card(place: &str) -> io::Result<DmaVerdict> {
    let container = Container::new()?;
    let device = container.device(Path::new("/sys/bus/pci/devices"), place)?;
    let (receive, transmit, source, target) = (Pages::new(1)?, Pages::new(1)?, Pages::new(1)?, Pages::new(1)?);
    container.map(RING, &receive, Rights::ReadWrite)?;
    container.map(RING + PAGE as u64, &transmit, Rights::ReadWrite)?;
    container.map(SOURCE, &source, Rights::Read)?;
    container.map(TARGET, &target, Rights::ReadWrite)?;
    let mut card = RingCard::start(&device, &receive, &transmit, RING)?;
    let mut verdict = DmaVerdict::default();
    let ask = |number: u8| source.write(0, &card::question(ASKER, address(number)));

    ask(1);
    card.offer(TARGET)?;
    card.send(SOURCE, card::QUESTION)?;
    verdict.expect("an answer comes to a mapped page", card.hears((&target, TARGET), address(1), WAIT)?);

    // What is sent is read from nowhere any more: nobody hears it, and the one behind it is heard.
    card.offer(TARGET)?;
    container.unmap(SOURCE)?;
    ask(2);
    card.send(SOURCE, card::QUESTION)?;
    verdict.expect("nothing is sent from an unmapped page", !card.hears((&target, TARGET), address(2), QUIET)?);
    verdict.faults += 1;
    container.map(SOURCE, &source, Rights::Read)?;
    ask(3);
    card.send(SOURCE, card::QUESTION)?;
    verdict.expect("a page mapped anew is sent", card.hears((&target, TARGET), address(3), WAIT)?);

    // What comes is written nowhere, nor to what is for reading; then it is again.
    for (rights, number, what) in [(None, 4, "an unmapped page"), (Some(Rights::Read), 6, "a read-only page")] {
        container.unmap(TARGET)?;
        if let Some(rights) = rights {
            container.map(TARGET, &target, rights)?;
        }
        target.fill(&pattern(number));
        ask(number);
        card.offer(TARGET)?;
        card.send(SOURCE, card::QUESTION)?;
        let given_back = card.received(QUIET).is_some();
        verdict.expect(&format!("{what} is not touched"), target.bytes() == pattern(number));
        verdict.faults += 1;
        if rights.is_some() {
            container.unmap(TARGET)?;
        }
        container.map(TARGET, &target, Rights::ReadWrite)?;
        if given_back {
            card.offer(TARGET)?;
        }
        ask(number + 1);
        card.send(SOURCE, card::QUESTION)?;
        let heard = card.hears((&target, TARGET), address(number + 1), WAIT)?;
        verdict.expect(&format!("after {what}, an answer comes"), heard);
    }
    card.stop()?;
    verdict.ok = verdict.wrong.is_empty();
    Ok(verdict)
}
