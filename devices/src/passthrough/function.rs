//! The function that the guest sees: owned bytes answered here, everything else handed to the host's function.

use std::sync::Arc;

use thiserror::Error;

use super::shown::{HostFacts, Shown, ShownError};
use crate::access::Answer;
use crate::interrupt::MsixRoutes;
use crate::pci::config_space::{BarKind, CONFIG_LEN, ConfigSpace};
use crate::pci::function::{BarError, BarMapping, PciFunction};
use crate::pci::msix::{Msix, VectorCountError};

const COMMAND: usize = 4;

/// What of the host's function an access goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// Configuration space.
    Config,
    /// A BAR.
    Bar(u8),
}

/// How the function is to interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Interrupts {
    /// Not at all.
    #[default]
    None,
    /// By its pin.
    Pin,
    /// By so many messages (MSI).
    Messages(u16),
    /// By the vectors of MSI-X.
    Vectors(u16),
}

/// The host's function. Accesses are of 1, 2, 4 or 8 bytes at a multiple of their length.
pub trait HostFunction: Send {
    /// Reads; all ones when it does not answer.
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]);
    /// Writes; lost when it does not answer.
    fn write(&mut self, region: Region, offset: u64, data: &[u8]);
    /// Has it interrupt in this way from now on, and in no other.
    fn interrupt(&mut self, by: Interrupts);
    /// The machine is reset: the function is as after power-on, and silent.
    fn reset(&mut self);
}

/// A function could not be put before a guest.
#[derive(Debug, Error)]
pub enum FunctionError {
    /// It cannot be shown.
    #[error(transparent)]
    Shown(#[from] ShownError),
    /// Its BARs.
    #[error(transparent)]
    Bar(#[from] BarError),
    /// Its vectors.
    #[error(transparent)]
    Vectors(#[from] VectorCountError),
}

/// What a function is made from.
pub struct PassedParts {
    /// Its configuration space, 256 or 4096 bytes, as after a reset.
    pub config: Vec<u8>,
    /// What the host says of it.
    pub facts: HostFacts,
    /// The function.
    pub host: Box<dyn HostFunction>,
    /// Follows its BARs.
    pub mapping: Arc<dyn BarMapping>,
    /// Where the messages of its vectors are told; as many as [`Shown::vectors`] of the same configuration space.
    pub routes: Arc<dyn MsixRoutes>,
    /// The line that firmware would have written for its pin.
    pub line: u8,
}

/// A host function in the guest's hands.
pub struct PassedFunction {
    shown: Shown,
    config: ConfigSpace,
    host: Box<dyn HostFunction>,
    routes: Arc<dyn MsixRoutes>,
    msix: Option<Msix>,
    interrupts: Interrupts,
}

/// Splits an access into parts of 1, 2 or 4 bytes at multiples of their length, of those of its bytes that are `wanted`.
fn parts(start: usize, len: usize, wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = (usize, usize)> {
    let end = start + len;
    let mut at = start;
    std::iter::from_fn(move || {
        while at < end && !wanted(at) {
            at += 1;
        }
        let fits = |width: usize| at.is_multiple_of(width) && at + width <= end && (at..at + width).all(&wanted);
        let width = [4, 2, 1].into_iter().find(|width| at < end && fits(*width))?;
        at += width;
        Some((at - width, width))
    })
}

impl PassedFunction {
    /// Puts the function before a guest, silent and with BARs that answer nowhere.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn new(parts: PassedParts) -> Result<Self, FunctionError> {
        let PassedParts { config: bytes, facts, host, mapping, routes, line } = parts;
        let shown = Shown::of(&bytes, &facts)?;
        let mut config = ConfigSpace::of(shown.bytes, shown.writable, mapping);
        for bar in &shown.bars {
            config.add_bar(bar.bar, bar.kind, bar.len)?;
        }
        if shown.pin {
            config.set_interrupt(1, line);
        }
        let msix = shown.msix.map(|place| Msix::new(place.vectors, Arc::clone(&routes))).transpose()?;
        let mut function = Self { shown, config, host, routes, msix, interrupts: Interrupts::None };
        function.tell_command(0);
        function.follow();
        Ok(function)
    }

    /// What the guest is shown.
    pub fn shown(&self) -> &Shown {
        &self.shown
    }

    /// How it interrupts now.
    pub fn interrupts(&self) -> Interrupts {
        self.interrupts
    }

    /// Looks at what the guest has said about interrupts, and has the host's function do it.
    fn follow(&mut self) {
        let bytes = self.config.bytes();
        if let (Some(place), Some(msix)) = (self.shown.msix, &mut self.msix) {
            let control = bytes.get(usize::from(place.capability) + 3).copied().unwrap_or(0);
            let (enabled, masked) = (control & 0x80 != 0, control & 0x40 != 0);
            if (enabled, masked) != (msix.state().enabled, msix.state().function_masked) {
                msix.set_control(enabled, masked);
            }
        }
        let vectors = self.msix.as_ref().filter(|msix| msix.enabled()).map(Msix::vectors);
        let messages = self.shown.msi.and_then(|place| place.enabled(bytes)).filter(|_| vectors.is_none());
        let wanted = match (vectors, messages) {
            (Some(vectors), _) => Interrupts::Vectors(vectors),
            (None, Some(messages)) => Interrupts::Messages(messages),
            (None, None) if self.shown.pin => Interrupts::Pin,
            (None, None) => Interrupts::None,
        };
        if let Some(place) = self.shown.msi.filter(|_| vectors.is_none()) {
            (0..place.vectors()).for_each(|vector| self.routes.route(vector, place.message(bytes, vector)));
        }
        if wanted != self.interrupts {
            self.interrupts = wanted;
            self.host.interrupt(wanted);
        }
    }

    fn is_owned(&self, at: usize) -> bool {
        self.shown.owned.get(at).copied().unwrap_or(false)
    }

    fn read_low(&mut self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        self.config.read(offset, data);
        let owned = self.shown.owned;
        for (at, width) in parts(start, data.len(), |at| owned.get(at).is_some_and(|owned| !owned)) {
            if let Some(bytes) = data.get_mut(at - start..at - start + width) {
                self.host.read(Region::Config, at as u64, bytes);
            }
        }
        if let Some(at) = self.shown.msi.and_then(|place| place.pending()) {
            for (byte, index) in data.iter_mut().zip(start..) {
                if let Some(first) = index.checked_sub(at).filter(|byte| *byte < 4) {
                    *byte = (0..8).fold(0, |bits, bit| {
                        let vector = first as u16 * 8 + bit;
                        let there = self.shown.msi.is_some_and(|place| vector < place.vectors());
                        bits | u8::from(there && self.routes.pending(vector)) << bit
                    });
                }
            }
        }
    }

    fn read_extended(&mut self, offset: u16, data: &mut [u8]) {
        let Some(headers) = &self.shown.extended else { return data.fill(0xff) };
        let aligned = offset & !3;
        if let Some(header) = headers.get(&aligned) {
            let bytes = header.to_le_bytes();
            for (byte, at) in data.iter_mut().zip(usize::from(offset - aligned)..) {
                *byte = bytes.get(at).copied().unwrap_or(0);
            }
            return;
        }
        data.fill(0);
        if self.shown.kept_at(offset) {
            self.host.read(Region::Config, offset.into(), data);
        }
    }

    fn tell_command(&mut self, command: u16) {
        self.host.write(Region::Config, COMMAND as u64, &command.to_le_bytes());
    }

    /// A write to bytes of which some are the board's.
    fn write_owned(&mut self, offset: u16, data: &[u8]) {
        let command = ConfigSpace::touches(offset, data.len(), COMMAND as u8, 2);
        if command {
            // The function decodes before anything is mapped to it, and until nothing is any more.
            let meanwhile = self.config.command() | self.config.command_after(offset, data);
            self.tell_command(meanwhile);
        }
        self.config.write(offset, data);
        if command {
            self.tell_command(self.config.command());
        }
        self.follow();
    }
}

impl PciFunction for PassedFunction {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) -> Answer {
        if usize::from(offset) < CONFIG_LEN {
            self.read_low(offset, data);
        } else {
            self.read_extended(offset, data);
        }
        Answer::Now
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Answer {
        let start = usize::from(offset);
        if start >= CONFIG_LEN {
            let header = self.shown.extended.as_ref().is_some_and(|headers| headers.contains_key(&(offset & !3)));
            if !header && self.shown.kept_at(offset) {
                self.host.write(Region::Config, offset.into(), data);
            }
            return Answer::Now;
        }
        let owned = self.shown.owned;
        for (at, width) in parts(start, data.len(), |at| owned.get(at).is_some_and(|owned| !owned)) {
            if let Some(bytes) = data.get(at - start..at - start + width) {
                self.host.write(Region::Config, at as u64, bytes);
            }
        }
        if (start..start + data.len()).any(|at| self.is_owned(at)) {
            self.write_owned(offset, data);
        }
        Answer::Now
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        match (&self.msix, self.shown.msix) {
            (Some(msix), Some(place)) if place.table.touches(bar, offset, data.len()) => {
                if let Some(at) = offset.checked_sub(place.table.offset) {
                    msix.table_read(at, data);
                }
            }
            (Some(msix), Some(place)) if place.pending.touches(bar, offset, data.len()) => {
                if let Some(at) = offset.checked_sub(place.pending.offset) {
                    msix.pending_read(at, data);
                }
            }
            _ => self.host.read(Region::Bar(bar), offset, data),
        }
        Answer::Now
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) -> Answer {
        match (&mut self.msix, self.shown.msix) {
            (Some(msix), Some(place)) if place.table.touches(bar, offset, data.len()) => {
                if let Some(at) = offset.checked_sub(place.table.offset) {
                    msix.table_write(at, data);
                }
            }
            // Read-only.
            (Some(_), Some(place)) if place.pending.touches(bar, offset, data.len()) => {}
            _ => self.host.write(Region::Bar(bar), offset, data),
        }
        Answer::Now
    }

    fn reset(&mut self) -> Answer {
        self.config.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.host.reset();
        self.tell_command(0);
        self.follow();
        Answer::Now
    }

    fn bars(&self) -> Vec<(u8, BarKind, u64)> {
        self.config.bars().collect()
    }

    fn assign_bar(&mut self, bar: u8, base: u64) -> Result<(), BarError> {
        self.config.assign_bar(bar, base)
    }
}

impl Drop for PassedFunction {
    /// A function that is removed interrupts nobody.
    fn drop(&mut self) {
        if self.interrupts != Interrupts::None {
            self.host.interrupt(Interrupts::None);
        }
    }
}
