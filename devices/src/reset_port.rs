//! Port 0x64 of a keyboard controller that knows one command: to pulse the CPU's reset line.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use crate::access::{Answer, RegisterDevice};
use crate::power::{PowerEvent, PowerSink};

/// The port.
pub const PORT: u16 = 0x64;
/// Command and status as the controller counts its registers, from port 0x60.
const COMMAND: u8 = 4;

struct ResetLine(Arc<dyn PowerSink>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.power_event(PowerEvent::Reset);
        Ok(())
    }
}

/// Command port of the controller. As a device it answers port 0x64; its status says that it takes commands and that
/// nobody has typed anything.
pub struct ResetPort(I8042Device<ResetLine>);

impl ResetPort {
    /// A port whose reset goes to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self(I8042Device::new(ResetLine(power)))
    }
}

impl RegisterDevice for ResetPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        if let [first, ..] = data {
            *first = self.0.read(COMMAND);
        }
        Answer::Now
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Answer {
        if let [value, ..] = data {
            let Ok(()) = self.0.write(COMMAND, *value);
        }
        Answer::Now
    }
}

impl fmt::Debug for ResetPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ResetPort")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Events(Mutex<Vec<PowerEvent>>);
    impl PowerSink for Events {
        fn power_event(&self, event: PowerEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    /// `reboot=k`: wait until the controller takes a command, then 0xfe. Nothing else resets.
    #[test]
    fn only_the_reset_command_resets() {
        let events = Arc::new(Events::default());
        let mut port = ResetPort::new(Arc::clone(&events) as Arc<dyn PowerSink>);
        let mut status = [0xff];
        assert!(matches!(port.read(0, &mut status), Answer::Now));
        assert_eq!(status[0] & 2, 0);
        for value in 0..=255u8 {
            assert!(matches!(port.write(0, &[value]), Answer::Now));
        }
        assert_eq!(*events.0.lock().unwrap(), [PowerEvent::Reset]);
    }
}
