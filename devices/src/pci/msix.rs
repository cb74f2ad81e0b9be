//! MSI-X (PCI 3.0, 6.8.2): the capability, the table and the pending bits.
//!
//! The table says what each vector sends; whether it can send now goes to [`MsixRoutes`], which connects eventfds to it.
//! Signals to a vector that cannot send stay with the routes, which is also where the pending bits are read.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use super::config_space::{CapabilityError, ConfigSpace};
use crate::interrupt::{MsiMessage, MsixRoutes};

/// Capability id.
pub const MSIX_ID: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY_LEN: u64 = 16;
/// Most vectors of a function.
pub const VECTORS_MAX: u16 = 2048;

const ENABLE: u8 = 1 << 7;
const FUNCTION_MASK: u8 = 1 << 6;
const ENTRY_MASKED: u32 = 1;

/// A function cannot have that many vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a function has 1 to {VECTORS_MAX} MSI-X vectors, not {0}")]
pub struct VectorCountError(pub u16);

/// What the guest wrote into one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixEntry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control: bit 0 masks.
    pub control: u32,
}

impl Default for MsixEntry {
    fn default() -> Self {
        Self { address: 0, data: 0, control: ENTRY_MASKED }
    }
}

/// What a guest can see of a function's MSI-X, beside its control register in configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsixState {
    /// The table.
    pub entries: Vec<MsixEntry>,
    /// MSI-X is enabled; INTx is then silent.
    pub enabled: bool,
    /// All vectors are masked.
    pub function_masked: bool,
}

/// MSI-X of one function.
pub struct Msix {
    state: MsixState,
    /// What the routes were last told.
    told: Vec<Option<MsiMessage>>,
    capability: u8,
    routes: Arc<dyn MsixRoutes>,
}

impl Msix {
    /// `vectors` vectors, all masked, told to `routes`.
    ///
    /// # Errors
    /// [`VectorCountError`] for none or more than 2048.
    pub fn new(vectors: u16, routes: Arc<dyn MsixRoutes>) -> Result<Self, VectorCountError> {
        if !(1..=VECTORS_MAX).contains(&vectors) {
            return Err(VectorCountError(vectors));
        }
        let entries = vec![MsixEntry::default(); vectors.into()];
        let state = MsixState { entries, enabled: false, function_masked: false };
        Ok(Self { state, told: vec![None; vectors.into()], capability: 0, routes })
    }

    /// Adds the capability: table at `table` and pending bits at `pending` of BAR `bar`, both multiples of 8.
    ///
    /// # Errors
    /// [`CapabilityError`] when configuration space is full.
    pub fn add_capability(
        &mut self,
        config: &mut ConfigSpace,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<(), CapabilityError> {
        let mut body = Vec::with_capacity(10);
        body.extend((self.vectors() - 1).to_le_bytes());
        body.extend((table & !7 | u32::from(bar)).to_le_bytes());
        body.extend((pending & !7 | u32::from(bar)).to_le_bytes());
        self.capability = config.add_capability(MSIX_ID, &body, &[0, ENABLE | FUNCTION_MASK])?;
        Ok(())
    }

    /// What the control register says now, where another configuration space holds it.
    pub fn set_control(&mut self, enabled: bool, function_masked: bool) {
        (self.state.enabled, self.state.function_masked) = (enabled, function_masked);
        (0..self.vectors()).for_each(|vector| self.tell(vector));
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.state.entries.len() as u16
    }

    /// Whether MSI-X is enabled.
    pub fn enabled(&self) -> bool {
        self.state.enabled
    }

    /// What `vector` sends now; `None` while it cannot send, or when there is no such vector.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.state.entries.get(usize::from(vector))?;
        let open = self.state.enabled && !self.state.function_masked && entry.control & ENTRY_MASKED == 0;
        open.then_some(MsiMessage { address: entry.address, data: entry.data })
    }

    /// Signals a vector from inside the VMM. A vector that does not exist is ignored.
    pub fn signal(&self, vector: u16) {
        if vector < self.vectors() {
            self.routes.signal(vector);
        }
    }

    /// Looks at the control register after a write of `len` bytes at `offset` of configuration space.
    pub fn config_written(&mut self, config: &ConfigSpace, offset: u16, len: usize) {
        if ConfigSpace::touches(offset, len, self.capability + 3, 1) {
            self.follow_control(config);
        }
    }

    fn follow_control(&mut self, config: &ConfigSpace) {
        let control = config.bytes()[usize::from(self.capability) + 3];
        self.set_control(control & ENABLE != 0, control & FUNCTION_MASK != 0);
    }

    /// Reads the table, 4 or 8 bytes at a multiple of 4; zeros otherwise.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        for (at, chunk) in (offset..).step_by(4).zip(data.chunks_mut(4)) {
            if let Some(entry) = usize::try_from(at / ENTRY_LEN).ok().and_then(|index| self.state.entries.get(index)) {
                let value = match at % ENTRY_LEN / 4 {
                    0 => entry.address as u32,
                    1 => (entry.address >> 32) as u32,
                    2 => entry.data,
                    _ => entry.control,
                };
                chunk.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table, 4 or 8 bytes at a multiple of 4; anything else is ignored.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        for (at, chunk) in (offset..).step_by(4).zip(data.chunks(4)) {
            let Some(bytes) = chunk.first_chunk::<4>() else { return };
            let value = u32::from_le_bytes(*bytes);
            let Some(index) = usize::try_from(at / ENTRY_LEN).ok() else { return };
            let Some(entry) = self.state.entries.get_mut(index) else { return };
            match at % ENTRY_LEN / 4 {
                0 => entry.address = entry.address >> 32 << 32 | u64::from(value & !3),
                1 => entry.address = u64::from(value) << 32 | entry.address & 0xffff_ffff,
                2 => entry.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
            self.tell(index as u16);
        }
    }

    /// Reads the pending bits.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = (0..8u64).fold(0, |bits, bit| {
                let vector = at.checked_mul(8).and_then(|first| u16::try_from(first + bit).ok());
                let pending = vector.is_some_and(|vector| vector < self.vectors() && self.routes.pending(vector));
                bits | u8::from(pending) << bit
            });
        }
    }

    /// As after power-on. Configuration space is reset by its owner.
    pub fn reset(&mut self) {
        self.state.entries.fill(MsixEntry::default());
        (self.state.enabled, self.state.function_masked) = (false, false);
        (0..self.vectors()).for_each(|vector| self.tell(vector));
    }

    /// What the guest can see.
    pub fn state(&self) -> &MsixState {
        &self.state
    }

    /// Puts a state back and tells the routes; a table of another length is refused with `false`.
    pub fn restore(&mut self, state: MsixState) -> bool {
        if state.entries.len() != self.state.entries.len() {
            return false;
        }
        self.state = state;
        (0..self.vectors()).for_each(|vector| self.tell(vector));
        true
    }

    fn tell(&mut self, vector: u16) {
        let message = self.message(vector);
        let told = &mut self.told[usize::from(vector)];
        if *told != message {
            *told = message;
            self.routes.route(vector, message);
        }
    }
}

impl Drop for Msix {
    /// A function that is removed interrupts nobody.
    fn drop(&mut self) {
        self.state.enabled = false;
        (0..self.vectors()).for_each(|vector| self.tell(vector));
    }
}

impl fmt::Debug for Msix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state.fmt(formatter)
    }
}
