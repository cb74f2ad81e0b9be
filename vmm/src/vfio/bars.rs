//! A function's BARs on the board: in the address map as any other's, and their pages as windows into the function where the
//! processor has such.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use atoll_devices::pci::{BarMapping, BarSpace};

use crate::cpu::MemoryWindows;
use crate::machine::FunctionBars;
use crate::memory::DevicePages;

/// Pages of a BAR that the guest may reach by itself.
pub(super) struct Direct {
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) pages: Arc<DevicePages>,
}

#[derive(Default)]
struct State {
    direct: Vec<Direct>,
    /// What is shown now, by BAR.
    shown: BTreeMap<u8, Vec<Box<dyn Send>>>,
}

/// Follows the BARs of one function.
pub(super) struct DirectBars {
    registers: Arc<FunctionBars>,
    windows: Option<Arc<dyn MemoryWindows>>,
    state: Mutex<State>,
}

impl DirectBars {
    /// Of BARs that `registers` follows, with windows where the processor has some.
    pub(super) fn new(
        registers: Arc<FunctionBars>,
        windows: Option<Arc<dyn MemoryWindows>>,
        direct: Vec<Direct>,
    ) -> Self {
        Self { registers, windows, state: Mutex::new(State { direct, shown: BTreeMap::new() }) }
    }

    /// Closes all windows for good, and gives the pages back.
    pub(super) fn close(&self) {
        let state = std::mem::take(&mut *self.state());
        // Windows first: the pages must be there while a guest sees them.
        drop(state.shown);
        drop(state.direct);
    }

    /// How many bytes the guest reaches by itself.
    pub(super) fn direct_bytes(&self) -> u64 {
        self.state().direct.iter().map(|direct| direct.pages.len()).sum()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BarMapping for DirectBars {
    fn map(&self, bar: u8, space: BarSpace, base: u64, len: u64) {
        self.registers.map(bar, space, base, len);
        let Some(windows) = &self.windows else { return };
        // Where something else was before it, it answers nowhere.
        if space != BarSpace::Memory || !self.registers.answers(space, base) {
            return;
        }
        let mut state = self.state();
        let State { direct, shown } = &mut *state;
        for part in direct.iter().filter(|part| part.bar == bar) {
            match windows.show(base + part.offset, Arc::clone(&part.pages)) {
                Ok(window) => shown.entry(bar).or_default().push(window),
                // Each access comes out, and is answered all the same.
                Err(error) => tracing::debug!(bar, base, %error, "registers of a device cost an exit"),
            }
        }
    }

    fn unmap(&self, bar: u8, space: BarSpace, base: u64, len: u64) {
        drop(self.state().shown.remove(&bar));
        self.registers.unmap(bar, space, base, len);
    }
}
