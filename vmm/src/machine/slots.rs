//! PCI slots and where BARs go: what firmware would do on a real board.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use atoll_devices::pci::root::PciRoot;
use atoll_devices::pci::{BarMapping, BarSpace, DevFn, PciFunction, SharedFunction};
use atoll_devices::{Answer, RegisterDevice};

use super::board::BoardError;
use super::layout;
use crate::cpu::{AddressSpace, SharedDevice, Space};

/// Bus 0: slots are given in the order in which devices are built, so that a configuration always gives the same board.
pub(super) struct PciSlots {
    root: Arc<Mutex<PciRoot>>,
    next: u8,
    windows: BarWindows,
}

impl PciSlots {
    pub(super) fn new() -> Self {
        Self { root: Arc::new(Mutex::new(PciRoot::new())), next: 0, windows: BarWindows::default() }
    }
    pub(super) fn root(&self) -> &Arc<Mutex<PciRoot>> {
        &self.root
    }
    /// Where pin A of the next slot leads: pins turn by one from slot to slot, as the ACPI tables say.
    pub(super) fn next_pin_gsi(&self) -> u8 {
        layout::PCI_GSI_BASE as u8 + self.next % 4
    }
    pub(super) fn add(&mut self, function: SharedFunction, bars: &FunctionBars) -> Result<DevFn, BoardError> {
        let place = DevFn::new(self.next, 0).ok_or(BoardError::NoSlot)?;
        // A mapping serves one function; a second one would be a builder's mistake and is ignored.
        let _ = bars.function.set(Arc::downgrade(&function));
        {
            let mut device = function.lock().unwrap_or_else(PoisonError::into_inner);
            for (bar, space, len) in device.bars() {
                let base = self.windows.take(space, len).ok_or(BoardError::NoRoom { bar, len })?;
                device.assign_bar(bar, base)?;
            }
        }
        let added = self.root.lock().unwrap_or_else(PoisonError::into_inner).add(place, function);
        added.map_err(|_| BoardError::NoSlot)?;
        self.next += 1;
        Ok(place)
    }
}

/// Where the next BAR goes: memory BARs into the 64-bit window, I/O BARs into theirs, each naturally aligned.
struct BarWindows {
    memory: u64,
    io: u64,
}

impl Default for BarWindows {
    fn default() -> Self {
        Self { memory: layout::MMIO64.start, io: layout::PCI_IO.start }
    }
}

impl BarWindows {
    fn take(&mut self, space: BarSpace, len: u64) -> Option<u64> {
        let (next, window) = match space {
            BarSpace::Memory => (&mut self.memory, layout::MMIO64),
            BarSpace::Io => (&mut self.io, layout::PCI_IO),
        };
        let base = next.checked_next_multiple_of(len)?;
        let end = base.checked_add(len).filter(|end| *end <= window.end())?;
        *next = end;
        Some(base)
    }
}

/// Keeps the board's address map in step with one function's BARs.
pub struct FunctionBars {
    space: Weak<AddressSpace>,
    function: OnceLock<Weak<Mutex<dyn PciFunction>>>,
    /// What this function has in the map: a BAR that was refused must not unmap what is there in its stead.
    mapped: Mutex<Vec<(Space, u64)>>,
}

fn space_of(space: BarSpace) -> Space {
    match space {
        BarSpace::Io => Space::Pio,
        BarSpace::Memory => Space::Mmio,
    }
}

impl FunctionBars {
    pub(super) fn new(space: &Arc<AddressSpace>) -> Self {
        Self { space: Arc::downgrade(space), function: OnceLock::new(), mapped: Mutex::default() }
    }
}

impl BarMapping for FunctionBars {
    fn map(&self, bar: u8, space: BarSpace, base: u64, len: u64) {
        let Some(function) = self.function.get().and_then(Weak::upgrade) else { return };
        let Some(board) = self.space.upgrade() else { return };
        let window: SharedDevice = Arc::new(Mutex::new(BarWindow { function, bar }));
        match board.insert(space_of(space), base, len, window) {
            Ok(()) => self.mapped.lock().unwrap_or_else(PoisonError::into_inner).push((space_of(space), base)),
            // A guest may move a BAR onto another one or onto fixed registers: it then answers nowhere.
            Err(error) => tracing::debug!(bar, base, len, %error, "a BAR answers nowhere"),
        }
    }
    fn unmap(&self, _bar: u8, space: BarSpace, base: u64, _len: u64) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = mapped.iter().position(|place| *place == (space_of(space), base)) else { return };
        mapped.swap_remove(index);
        if let Some(board) = self.space.upgrade() {
            // It is there: nobody else removes what this function has mapped.
            let _ = board.remove(space_of(space), base);
        }
    }
}

/// One BAR of a function, as the address map holds it.
struct BarWindow {
    function: SharedFunction,
    bar: u8,
}

impl RegisterDevice for BarWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        self.function.lock().unwrap_or_else(PoisonError::into_inner).bar_read(self.bar, offset, data)
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.function.lock().unwrap_or_else(PoisonError::into_inner).bar_write(self.bar, offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Part of the frozen board: where the BARs of the first devices lie. Each is aligned to its length.
    #[test]
    fn bars_are_where_they_were() {
        let mut windows = BarWindows::default();
        let bars = [
            (BarSpace::Memory, 0x1_0000),
            (BarSpace::Memory, 0x4000),
            (BarSpace::Memory, 0x1_0000),
            (BarSpace::Io, 32),
        ];
        let bases: Vec<_> = bars.into_iter().map(|(space, len)| windows.take(space, len)).collect();
        assert_eq!(bases, [Some(0x80_0000_0000), Some(0x80_0001_0000), Some(0x80_0002_0000), Some(0x1000)]);
        assert_eq!(windows.take(BarSpace::Memory, 512 << 30), None);
        assert_eq!(windows.take(BarSpace::Io, 0x1_0000), None);
    }
}
