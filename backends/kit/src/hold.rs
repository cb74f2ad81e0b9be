//! What keeps a process that was started beside another one from touching what both would.
//!
//! It is greeted, and told of memory, features and requests in flight, while its predecessor serves. With the first ring
//! that it is handed it takes the predecessor's place: it raises the fence, and only then tells its device of the driver.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::fence::{Fence, FenceError};
use crate::step::fence_took;
use crate::worker::Gate;

/// How long the predecessor's lock may take to fall: whoever hands over rings knows that it has ended.
const WAIT: Duration = Duration::from_secs(2);

/// The fence that is not raised, and the gate behind it.
pub(crate) struct Hold {
    fence: Mutex<Box<dyn Fence>>,
    gate: Arc<Gate>,
}

impl Hold {
    /// Keeps the gate closed until [`Hold::release`].
    pub(crate) fn new(fence: Box<dyn Fence>, gate: Arc<Gate>) -> Self {
        Self { fence: Mutex::new(fence), gate }
    }
    /// Takes the predecessor's place.
    pub(crate) fn release(&self) -> Result<(), FenceError> {
        let began = Instant::now();
        self.fence.lock().unwrap_or_else(PoisonError::into_inner).raise(WAIT)?;
        fence_took(began.elapsed());
        self.gate.open();
        Ok(())
    }
}
