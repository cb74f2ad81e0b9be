//! QEMU's teaching device (its `docs/specs/edu.rst`), which copies between memory and a buffer of its own: a passed-through device
//! that does what it is told, with whatever address.
//!
//! What is mapped must be reached. What is not (any more, or not for writing) must stay as it is; the device does not say
//! that it was refused, and goes on. Who maps for it, and where refused accesses are told, is looked at from outside.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::vfio::{Container, PAGE, Pages, Region, Rights};
use super::{DmaVerdict, pattern};

/// What it says of itself.
const ID: u32 = 0x0100_00ed;
/// It interrupts, with these bits; until these bits are taken back.
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;
/// Messages that it is asked for, one after the other.
const MESSAGES: u64 = 10;
const SOURCE_REGISTER: u64 = 0x80;
const TARGET_REGISTER: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
/// It begins; clear again when it has ended.
const START: u32 = 1;
/// From its buffer to memory.
const TO_MEMORY: u32 = 2;
/// Its buffer, in addresses of its own.
const BUFFER: u32 = 0x4_0000;
/// Addresses that it can reach have 28 bits.
const FROM: u32 = 0x0800_0000;
const TO: u32 = 0x0900_0000;
/// Where nothing ever is.
const NOWHERE: u32 = 0x0a00_0000;
/// Bytes that are copied. Its buffer has twice as many, but QEMU 7.2 ends itself at a copy that reaches the buffer's end.
const COPIED: usize = PAGE / 2;
const WAIT: Duration = Duration::from_secs(30);

struct Copier<'a>(Region<'a>);

impl Copier<'_> {
    fn write(&self, at: u64, value: u32) -> io::Result<()> {
        self.0.write(at, &value.to_le_bytes())
    }

    fn copy(&self, from: u32, to: u32, direction: u32) -> io::Result<()> {
        self.write(SOURCE_REGISTER, from)?;
        self.write(TARGET_REGISTER, to)?;
        self.write(COUNT, COPIED as u32)?;
        self.write(COMMAND, START | direction)?;
        let deadline = Instant::now() + WAIT;
        while u32::from_le_bytes(self.0.read(COMMAND)?) & START != 0 {
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("it does not end to copy from {from:#x} to {to:#x}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Has it read a page.
    fn take(&self, from: u32) -> io::Result<()> {
        self.copy(from, BUFFER, 0)
    }

    /// Has it write one.
    fn give(&self, to: u32) -> io::Result<()> {
        self.copy(BUFFER, to, TO_MEMORY)
    }
}

/// What it copies of a pattern.
fn begins(pages: &Pages, seed: u8) -> bool {
    pages.bytes().iter().zip(pattern(seed)).take(COPIED).all(|(byte, expected)| *byte == expected)
}

/// Drives the device at `place`, as PCI names it. It is taken from its driver and not given back.
///
/// # Errors
/// When it cannot be driven at all.
pub fn run(place: &str) -> io::Result<DmaVerdict> {
    let container = Container::new()?;
    let device = container.device(Path::new("/sys/bus/pci/devices"), place)?;
    // Memory and bus mastering.
    device.config()?.write(4, &6_u16.to_le_bytes())?;
    let edu = Copier(device.bar(0)?);
    let id = u32::from_le_bytes(edu.0.read(0)?);
    if id != ID {
        return Err(io::Error::other(format!("it is no teaching device: it says {id:#x}")));
    }
    let (source, target) = (Pages::new(1)?, Pages::new(1)?);
    let mut verdict = DmaVerdict::default();
    container.map(FROM.into(), &source, Rights::ReadWrite)?;
    container.map(TO.into(), &target, Rights::ReadWrite)?;
    source.fill(&pattern(1));
    target.fill(&pattern(2));
    edu.take(FROM)?;
    edu.give(TO)?;
    verdict.expect("a mapped page is read, and another one written", begins(&target, 1));

    container.unmap(TO.into())?;
    target.fill(&pattern(3));
    edu.give(TO)?;
    verdict.expect("an unmapped page is not written", begins(&target, 3));
    verdict.faults += 1;

    container.map(TO.into(), &target, Rights::Read)?;
    edu.give(TO)?;
    verdict.expect("a read-only page is not written", begins(&target, 3));
    edu.take(TO)?;
    verdict.faults += 1;

    edu.give(NOWHERE)?;
    container.unmap(FROM.into())?;
    source.fill(&pattern(4));
    edu.take(FROM)?;
    verdict.faults += 2;
    container.unmap(TO.into())?;
    container.map(TO.into(), &target, Rights::ReadWrite)?;
    edu.give(TO)?;
    verdict.expect("an unmapped page is not read", !begins(&target, 4));

    // Mapped the other way round: what the IOMMU remembered would show.
    container.unmap(TO.into())?;
    container.map(FROM.into(), &target, Rights::ReadWrite)?;
    container.map(TO.into(), &source, Rights::ReadWrite)?;
    target.fill(&pattern(5));
    edu.take(FROM)?;
    edu.give(TO)?;
    verdict.expect("pages mapped anew are reached", begins(&source, 5));

    let mut message = device.message()?;
    for _ in 0..MESSAGES {
        edu.write(RAISE, 1)?;
        verdict.messages += message.sent(WAIT)?;
        edu.write(ACKNOWLEDGE, 1)?;
    }
    verdict.expect("each interrupt is one message", verdict.messages == MESSAGES);
    verdict.ok = verdict.wrong.is_empty();
    Ok(verdict)
}
