//! The host bridge, 00:00.0: an identity and nothing else.

use std::sync::Arc;

use super::config_space::{BarKind, ConfigSpace, Identity};
use super::function::{BarError, BarMapping, BarSpace, PciFunction};
use crate::access::Answer;

/// A PCI Express host bridge without registers of its own (the id that virtual machines use for one).
#[derive(Debug)]
pub struct HostBridge {
    config: ConfigSpace,
}

struct NoBars;
impl BarMapping for NoBars {
    fn map(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
    fn unmap(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// The bridge.
    pub fn new() -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        Self { config: ConfigSpace::new(identity, Arc::new(NoBars)) }
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) -> Answer {
        self.config.read(offset, data);
        Answer::Now
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) -> Answer {
        self.config.write(offset, data);
        Answer::Now
    }
    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        Answer::Now
    }
    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) -> Answer {
        Answer::Now
    }
    fn reset(&mut self) -> Answer {
        self.config.reset();
        Answer::Now
    }
    fn bars(&self) -> Vec<(u8, BarKind, u64)> {
        Vec::new()
    }
    fn assign_bar(&mut self, bar: u8, base: u64) -> Result<(), BarError> {
        self.config.assign_bar(bar, base)
    }
}
