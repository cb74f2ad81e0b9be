//! The root bus and the two ways to its configuration space: ports 0xcf8 to 0xcff and the enhanced configuration region.
//!
//! 256 buses are decoded and only bus 0 is populated. A function that is not there reads as all ones. The lock of the root
//! is released before a function is asked, so a function that takes its time holds up nobody else.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::function::{DevFn, SharedFunction};
use crate::access::{Answer, RegisterDevice};
use crate::power::{PowerEvent, PowerSink};

/// Bytes of the enhanced configuration region: 256 buses.
pub const ECAM_LEN: u64 = 256 << 20;

const HEADER_TYPE: u16 = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;

/// A slot that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("PCI function 00:{:02x}.{} is taken; choose another slot", .0.slot(), .0.function())]
pub struct SlotTaken(pub DevFn);

/// Bus 0.
#[derive(Default)]
pub struct PciRoot {
    functions: Vec<(DevFn, SharedFunction)>,
}

impl PciRoot {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plugs a function in.
    ///
    /// # Errors
    /// [`SlotTaken`].
    pub fn add(&mut self, at: DevFn, function: SharedFunction) -> Result<(), SlotTaken> {
        match self.position(at) {
            Ok(_) => Err(SlotTaken(at)),
            Err(index) => {
                self.functions.insert(index, (at, function));
                Ok(())
            }
        }
    }

    /// Pulls a function out.
    pub fn remove(&mut self, at: DevFn) -> Option<SharedFunction> {
        self.position(at).ok().map(|index| self.functions.remove(index).1)
    }

    /// The function at `at`.
    pub fn function(&self, at: DevFn) -> Option<SharedFunction> {
        self.position(at).ok().map(|index| Arc::clone(&self.functions[index].1))
    }

    /// All functions in order.
    pub fn functions(&self) -> impl Iterator<Item = (DevFn, &SharedFunction)> {
        self.functions.iter().map(|(at, function)| (*at, function))
    }

    /// The first free slot from `from` on.
    pub fn free_slot(&self, from: u8) -> Option<DevFn> {
        (from..32)
            .find(|slot| self.functions.iter().all(|(at, _)| at.slot() != *slot))
            .and_then(|slot| DevFn::new(slot, 0))
    }

    fn position(&self, at: DevFn) -> Result<usize, usize> {
        self.functions.binary_search_by_key(&at, |entry| entry.0)
    }

    fn multi_function(&self, at: DevFn) -> bool {
        self.functions.iter().any(|(other, _)| other.slot() == at.slot() && other.function() != 0)
    }
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.functions.iter().map(|entry| entry.0)).finish()
    }
}

/// The root as the two ways share it.
pub type SharedRoot = Arc<Mutex<PciRoot>>;

/// One configuration access that has been decoded.
#[derive(Clone, Copy)]
struct Target {
    bus: u8,
    at: DevFn,
    register: u16,
}

impl Target {
    /// 1, 2 or 4 bytes inside one doubleword.
    fn fits(self, len: usize) -> bool {
        matches!(len, 1 | 2 | 4) && usize::from(self.register & 3) + len <= 4
    }

    fn read(self, root: &SharedRoot, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        if self.bus != 0 || !self.fits(data.len()) {
            return Answer::Now;
        }
        let (function, multi) = {
            let root = root.lock().unwrap_or_else(PoisonError::into_inner);
            match root.function(self.at) {
                Some(function) => (function, self.at.function() == 0 && root.multi_function(self.at)),
                None => return Answer::Now,
            }
        };
        let answer = function.lock().unwrap_or_else(PoisonError::into_inner).config_read(self.register, data);
        if let (true, Answer::Now, Some(index)) = (multi, &answer, HEADER_TYPE.checked_sub(self.register))
            && let Some(header) = data.get_mut(usize::from(index))
        {
            *header |= MULTI_FUNCTION;
        }
        answer
    }

    fn write(self, root: &SharedRoot, data: &[u8]) -> Answer {
        if self.bus != 0 || !self.fits(data.len()) {
            return Answer::Now;
        }
        let function = root.lock().unwrap_or_else(PoisonError::into_inner).function(self.at);
        match function {
            Some(function) => function.lock().unwrap_or_else(PoisonError::into_inner).config_write(self.register, data),
            None => Answer::Now,
        }
    }
}

/// The enhanced configuration region: 1 MiB a bus, 4 KiB a function.
#[derive(Clone, Debug)]
pub struct Ecam(SharedRoot);

impl Ecam {
    /// A way to `root`.
    pub fn new(root: SharedRoot) -> Self {
        Self(root)
    }

    fn target(offset: u64) -> Option<Target> {
        let bus = u8::try_from(offset >> 20).ok()?;
        Some(Target { bus, at: DevFn::from_byte((offset >> 12) as u8), register: (offset & 0xfff) as u16 })
    }
}

impl RegisterDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        Self::target(offset).map_or(Answer::Now, |target| target.read(&self.0, data))
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        Self::target(offset).map_or(Answer::Now, |target| target.write(&self.0, data))
    }
}

/// Ports 0xcf8 to 0xcff: the address register, its data window, and the reset register 0xcf9 that chipsets put between.
pub struct ConfigPorts {
    root: SharedRoot,
    address: u32,
    reset_control: u8,
    power: Arc<dyn PowerSink>,
}

impl ConfigPorts {
    /// First port.
    pub const PORT: u16 = 0xcf8;
    /// Number of ports.
    pub const LEN: u64 = 8;
    /// Writing this to port 0xcf9 resets the machine (the value of ACPI's reset register).
    pub const RESET_VALUE: u8 = 0x06;
    const RESET: u8 = 0x04;

    /// A way to `root`; resets go to `power`.
    pub fn new(root: SharedRoot, power: Arc<dyn PowerSink>) -> Self {
        Self { root, address: 0, reset_control: 0, power }
    }

    /// The address register, for whoever saves it.
    pub fn address(&self) -> u32 {
        self.address
    }

    /// Machine reset, or a saved address register put back.
    pub fn set_address(&mut self, address: u32) {
        self.address = address & 0x80ff_fffc;
        self.reset_control = 0;
    }

    fn target(&self, offset: u64) -> Option<Target> {
        (self.address & 1 << 31 != 0).then(|| Target {
            bus: (self.address >> 16) as u8,
            at: DevFn::from_byte((self.address >> 8) as u8),
            register: (self.address & 0xfc) as u16 | (offset & 3) as u16,
        })
    }
}

impl RegisterDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (1, 1) => data.fill(self.reset_control),
            (4..=7, _) => return self.target(offset).map_or(Answer::Now, |target| target.read(&self.root, data)),
            _ => {}
        }
        Answer::Now
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc,
            (1, &[value]) => {
                self.reset_control = value & 0x0a;
                if value & Self::RESET != 0 {
                    self.power.power_event(PowerEvent::Reset);
                }
            }
            (4..=7, _) => return self.target(offset).map_or(Answer::Now, |target| target.write(&self.root, data)),
            _ => {}
        }
        Answer::Now
    }
}

impl fmt::Debug for ConfigPorts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ConfigPorts({:#010x})", self.address)
    }
}
