//! Guest time for devices that need it.
//!
//! A device that measures time takes it as a parameter, in nanoseconds of guest time since power-on, so that tests, the
//! deterministic mode and a resumed snapshot decide what time it is. [`AtTime`] reads a clock and makes an ordinary
//! [`RegisterDevice`] of such a device.

use std::fmt;
use std::sync::Arc;

use crate::access::{Answer, RegisterDevice};

/// Where guest time comes from.
pub trait GuestClock: Send + Sync {
    /// Nanoseconds of guest time since power-on; never goes back.
    fn now_ns(&self) -> u64;
}

/// A device made of registers whose contents depend on the time.
pub trait TimedDevice: Send {
    /// As [`RegisterDevice::read`], at guest time `now_ns`.
    fn read_at(&mut self, offset: u64, data: &mut [u8], now_ns: u64) -> Answer;
    /// As [`RegisterDevice::write`], at guest time `now_ns`.
    fn write_at(&mut self, offset: u64, data: &[u8], now_ns: u64) -> Answer;
}

/// A [`TimedDevice`] beside the clock that it runs by.
pub struct AtTime<D> {
    /// The device.
    pub device: D,
    clock: Arc<dyn GuestClock>,
}

impl<D> AtTime<D> {
    /// Lets `device` run by `clock`.
    pub fn new(device: D, clock: Arc<dyn GuestClock>) -> Self {
        Self { device, clock }
    }
}

impl<D: TimedDevice> RegisterDevice for AtTime<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        self.device.read_at(offset, data, self.clock.now_ns())
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.device.write_at(offset, data, self.clock.now_ns())
    }
}

impl<D: fmt::Debug> fmt::Debug for AtTime<D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("AtTime").field(&self.device).finish()
    }
}
