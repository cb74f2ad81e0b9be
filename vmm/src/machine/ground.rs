//! What a device may need of a machine before there is a board, and how its preparation is given up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::config::MachineConfig;
use super::end::MachineError;
use super::layout;
use crate::doorbell::Relay;
use crate::memory::GuestMemory;

/// Guest memory, and the thread of interposed doorbells: both are there before a board is.
#[derive(Clone)]
pub struct Ground {
    /// Guest memory.
    pub memory: GuestMemory,
    /// For interposed doorbells and calls.
    pub relay: Arc<Relay>,
}

impl Ground {
    /// The ground of a new machine.
    ///
    /// # Errors
    /// When there is no memory, thread or descriptor for it.
    pub fn new(config: &MachineConfig) -> Result<Self, MachineError> {
        Ok(Self { memory: GuestMemory::new(&layout::ram(config.memory_bytes)?)?, relay: Relay::new()? })
    }
}

#[derive(Default)]
struct Wish {
    withdrawn: bool,
    endings: Vec<Arc<AtomicBool>>,
}

/// Says to whatever is being prepared that nobody wants it any more. Clones speak of the same.
#[derive(Clone, Default)]
pub struct Withdrawal(Arc<Mutex<Wish>>);

impl Withdrawal {
    /// Nobody wants it any more: each wait of it ends now.
    pub fn withdraw(&self) {
        let mut wish = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wish.withdrawn = true;
        for ending in &wish.endings {
            ending.store(true, Ordering::Relaxed);
        }
    }

    /// Whether nobody wants it any more.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).withdrawn
    }

    /// A flag of one device's own that is raised with the others.
    #[must_use]
    pub fn ending(&self) -> Arc<AtomicBool> {
        let mut wish = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ending = Arc::new(AtomicBool::new(wish.withdrawn));
        wish.endings.push(Arc::clone(&ending));
        ending
    }
}
