//! PCI slots and where BARs go: what firmware would do on a real board, and what happens when a device comes or goes while
//! the guest runs.
//!
//! The root bus is what the guest sees; the slots here are what is taken. A device that is being plugged in has a slot and
//! is not on the bus yet; one that the guest has let go is no longer on the bus and keeps its slot until it has ended.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use atoll_devices::acpi_hotplug::EjectSink;
use atoll_devices::pci::root::PciRoot;
use atoll_devices::pci::{BarKind, BarMapping, BarSpace, DevFn, PciFunction, SharedFunction};
use atoll_devices::{Answer, RegisterDevice};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use super::board::BoardError;
use super::events::{EventSender, MachineEvent};
use super::layout;
use crate::cpu::{AddressSpace, SharedDevice, Space};

/// Offset of the command register, and its value while a function answers nowhere and masters nothing.
const COMMAND: (u16, [u8; 2]) = (4, [0; 2]);

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is in a slot.
struct Occupant {
    function: SharedFunction,
    bars: Vec<(BarKind, RangeInclusive)>,
}

/// Bus 0: each device gets the lowest free slot, in the order in which devices are built, so that a configuration always
/// gives the same board.
pub(super) struct PciSlots {
    root: Arc<Mutex<PciRoot>>,
    slots: [Option<Occupant>; layout::PCI_SLOTS as usize],
    /// Where the next function is to go, if not into the lowest free slot.
    wanted: Option<u8>,
    /// New functions stay off the bus until they are revealed.
    veiled: bool,
    windows: BarWindows,
}

impl PciSlots {
    pub(super) fn new() -> Self {
        Self {
            root: Arc::new(Mutex::new(PciRoot::new())),
            slots: [const { None }; layout::PCI_SLOTS as usize],
            wanted: None,
            veiled: false,
            windows: BarWindows::default(),
        }
    }
    pub(super) fn root(&self) -> &Arc<Mutex<PciRoot>> {
        &self.root
    }
    pub(super) fn want(&mut self, slot: Option<u8>) {
        self.wanted = slot;
    }
    pub(super) fn veil(&mut self, veiled: bool) {
        self.veiled = veiled;
    }
    fn is_free(&self, slot: u8) -> bool {
        self.slots.get(usize::from(slot)).is_some_and(Option::is_none)
    }
    /// The slot that the next function gets.
    pub(super) fn next(&self) -> Option<u8> {
        match self.wanted {
            Some(slot) => Some(slot).filter(|slot| self.is_free(*slot)),
            None => (0..layout::PCI_SLOTS).find(|slot| self.is_free(*slot)),
        }
    }
    /// How many functions find a slot yet.
    pub(super) fn free(&self) -> usize {
        self.free_places().count()
    }
    /// Where functions can come yet.
    pub(super) fn free_places(&self) -> impl Iterator<Item = DevFn> {
        (0..layout::PCI_SLOTS).filter(|slot| self.is_free(*slot)).filter_map(|slot| DevFn::new(slot, 0))
    }
    /// Where pin A of the next slot leads: pins turn by one from slot to slot, as the ACPI tables say.
    pub(super) fn next_pin_gsi(&self) -> u8 {
        layout::PCI_GSI_BASE as u8 + self.next().unwrap_or(0) % 4
    }
    pub(super) fn add(&mut self, function: SharedFunction, bars: &FunctionBars) -> Result<DevFn, BoardError> {
        let wanted = self.wanted;
        let slot = self.next().ok_or_else(|| wanted.map_or(BoardError::NoSlot, BoardError::SlotTaken))?;
        let place = DevFn::new(slot, 0).ok_or(BoardError::NoSlot)?;
        // A mapping serves one function; a second one would be a builder's mistake and is ignored.
        let _ = bars.function.set(Arc::downgrade(&function));
        let mut taken = Vec::new();
        let assigned = self.assign(&function, &mut taken);
        let occupant = Occupant { function: Arc::clone(&function), bars: taken };
        if let Err(error) = assigned {
            self.windows.free_all(occupant.bars);
            return Err(error);
        }
        if !self.veiled {
            lock(&self.root).add(place, function).map_err(|_| BoardError::SlotTaken(slot))?;
        }
        self.wanted = None;
        self.slots[usize::from(slot)] = Some(occupant);
        Ok(place)
    }
    fn assign(
        &mut self,
        function: &SharedFunction,
        taken: &mut Vec<(BarKind, RangeInclusive)>,
    ) -> Result<(), BoardError> {
        let mut device = lock(function);
        for (bar, kind, len) in device.bars() {
            let range = self.windows.take(kind, len).ok_or(BoardError::NoRoom { bar, len })?;
            taken.push((kind, range));
            device.assign_bar(bar, range.start())?;
        }
        Ok(())
    }
    /// Puts a veiled function on the bus.
    pub(super) fn reveal(&mut self, place: DevFn) {
        let Some(Some(occupant)) = self.slots.get(usize::from(place.slot())) else { return };
        // It fails when the function is there already, and then there is nothing to do.
        let _ = lock(&self.root).add(place, Arc::clone(&occupant.function));
    }
    /// Frees a slot: nothing of its function answers any more, and its BARs' addresses are given back.
    pub(super) fn remove(&mut self, place: DevFn) -> bool {
        let occupant = self.slots.get_mut(usize::from(place.slot())).and_then(Option::take);
        lock(&self.root).remove(place);
        let Some(occupant) = occupant else { return false };
        silence(&occupant.function);
        self.windows.free_all(occupant.bars);
        true
    }
}

/// Lets a function's BARs answer nowhere, and takes its doorbells away.
fn silence(function: &SharedFunction) {
    // A function answers writes of its command register at once.
    let _ = lock(function).config_write(COMMAND.0, &COMMAND.1);
}

/// Takes an ejected device out of the guest's sight at once, on the thread of the vCPU that ejected it: its addresses may
/// be another device's with the guest's next instruction. Whoever owns the board does the rest when it hears of it.
pub(super) struct Ejector {
    pub(super) root: Arc<Mutex<PciRoot>>,
    pub(super) events: EventSender,
}

impl EjectSink for Ejector {
    fn ejected(&self, slot: u8) {
        let function = DevFn::new(slot, 0).and_then(|place| lock(&self.root).remove(place));
        if let Some(function) = function {
            silence(&function);
        }
        self.events.tell(MachineEvent::Ejected(slot));
    }
}

/// Where BARs go: those of 64, of 32 bits and of ports into a window each, naturally aligned, the lowest room first.
struct BarWindows {
    memory: Option<AddressAllocator>,
    memory32: Option<AddressAllocator>,
    io: Option<AddressAllocator>,
}

impl Default for BarWindows {
    fn default() -> Self {
        // No window is empty or wraps, so all are there.
        let window = |span: layout::Span| AddressAllocator::new(span.start, span.len).ok();
        Self { memory: window(layout::MMIO64), memory32: window(layout::MMIO32), io: window(layout::PCI_IO) }
    }
}

impl BarWindows {
    fn window(&mut self, kind: BarKind) -> Option<&mut AddressAllocator> {
        match kind {
            BarKind::Memory64 { .. } => self.memory.as_mut(),
            BarKind::Memory32 => self.memory32.as_mut(),
            BarKind::Io => self.io.as_mut(),
        }
    }
    fn take(&mut self, kind: BarKind, len: u64) -> Option<RangeInclusive> {
        self.window(kind)?.allocate(len, len, AllocPolicy::FirstMatch).ok()
    }
    fn free_all(&mut self, bars: Vec<(BarKind, RangeInclusive)>) {
        for (kind, range) in bars {
            if let Some(Err(error)) = self.window(kind).map(|window| window.free(&range)) {
                tracing::error!(?range, %error, "a BAR's addresses were not taken");
            }
        }
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

impl FunctionBars {
    /// Whether a BAR answers at `base`, which it does not where something else was before it.
    pub(crate) fn answers(&self, space: BarSpace, base: u64) -> bool {
        lock(&self.mapped).contains(&(space_of(space), base))
    }
}

impl BarMapping for FunctionBars {
    fn map(&self, bar: u8, space: BarSpace, base: u64, len: u64) {
        let Some(function) = self.function.get().and_then(Weak::upgrade) else { return };
        let Some(board) = self.space.upgrade() else { return };
        let window: SharedDevice = Arc::new(Mutex::new(BarWindow { function, bar }));
        match board.insert(space_of(space), base, len, window) {
            Ok(()) => lock(&self.mapped).push((space_of(space), base)),
            // A guest may move a BAR onto another one or onto fixed registers: it then answers nowhere.
            Err(error) => tracing::debug!(bar, base, len, %error, "a BAR answers nowhere"),
        }
    }
    fn unmap(&self, _bar: u8, space: BarSpace, base: u64, _len: u64) {
        let mut mapped = lock(&self.mapped);
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
        lock(&self.function).bar_read(self.bar, offset, data)
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        lock(&self.function).bar_write(self.bar, offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Part of the frozen board: where the BARs of the first devices lie. Each is aligned to its length, and what is given
    /// back is used again.
    #[test]
    fn bars_are_where_they_were() {
        let mut windows = BarWindows::default();
        const WIDE: BarKind = BarKind::Memory64 { prefetchable: false };
        let bars =
            [(WIDE, 0x1_0000), (WIDE, 0x4000), (WIDE, 0x1_0000), (BarKind::Io, 32), (BarKind::Memory32, 0x2_0000)];
        let taken: Vec<_> = bars.into_iter().filter_map(|(kind, len)| Some((kind, windows.take(kind, len)?))).collect();
        let bases: Vec<_> = taken.iter().map(|(_, range)| range.start()).collect();
        assert_eq!(bases, [0x80_0000_0000, 0x80_0001_0000, 0x80_0002_0000, 0x1000, 0xc000_0000]);
        assert_eq!(windows.take(WIDE, 512 << 30), None);
        assert_eq!(windows.take(BarKind::Io, 0x1_0000), None);
        assert_eq!(windows.take(BarKind::Memory32, 1 << 30), None);
        windows.free_all(taken);
        assert_eq!(windows.take(WIDE, 512 << 30).map(|range| range.start()), Some(0x80_0000_0000));
    }
}
