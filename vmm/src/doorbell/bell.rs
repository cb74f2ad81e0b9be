//! One doorbell.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::relay::{Interposer, Relay, RelayError, RelayedEvent, signal};
use crate::cpu::{CpuError, DoorbellWatch, Space};

/// Which way signals take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// From whoever signals straight to whoever listens.
    Direct,
    /// Through the relay's thread.
    Interposed,
}

/// A doorbell could not be made, placed or switched.
#[derive(Debug, Error)]
pub enum DoorbellError {
    /// No eventfd.
    #[error("no eventfd for a doorbell ({0}); raise the limit on open files (ulimit -n)")]
    Event(#[source] io::Error),
    /// The relay refused.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// The processor refused to watch the address.
    #[error("doorbell at {address:#x} ({space:?}): {source}")]
    Watch {
        /// Address space of the doorbell.
        space: Space,
        /// Its address.
        address: u64,
        /// Why not.
        #[source]
        source: CpuError,
    },
}

/// Where the processor watches a doorbell by itself.
struct Placement {
    watch: Arc<dyn DoorbellWatch>,
    space: Space,
    address: u64,
}

impl Placement {
    fn error(&self, source: CpuError) -> DoorbellError {
        DoorbellError::Watch { space: self.space, address: self.address, source }
    }
    fn watch(&self, event: &EventFd) -> Result<(), DoorbellError> {
        self.watch.watch(self.space, self.address, event).map_err(|source| self.error(source))
    }
    fn unwatch(&self, event: &EventFd) -> Result<(), DoorbellError> {
        self.watch.unwatch(self.space, self.address, event).map_err(|source| self.error(source))
    }
}

struct State {
    /// `Some` while interposed; its source is then what the guest signals.
    relayed: Option<RelayedEvent>,
    placement: Option<Placement>,
}

impl State {
    fn source<'a>(&'a self, backend: &'a EventFd) -> &'a EventFd {
        self.relayed.as_ref().map_or(backend, RelayedEvent::source)
    }
}

/// A queue's way from the guest to the backend.
pub struct Doorbell {
    backend: EventFd,
    relay: Arc<Relay>,
    state: Mutex<State>,
}

impl Doorbell {
    /// Makes one with a direct path, not placed anywhere.
    ///
    /// # Errors
    /// If there is no eventfd left.
    pub fn new(relay: &Arc<Relay>) -> Result<Arc<Self>, DoorbellError> {
        let backend = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(DoorbellError::Event)?;
        let state = State { relayed: None, placement: None };
        Ok(Arc::new(Self { backend, relay: Arc::clone(relay), state: Mutex::new(state) }))
    }
    /// The backend's end: what SET_VRING_KICK carries, the same for every incarnation.
    pub fn backend_event(&self) -> &EventFd {
        &self.backend
    }
    /// The guest rings, by a write that nobody watched.
    pub fn ring(&self) {
        let state = self.state();
        signal(state.source(&self.backend), 1);
    }
    /// Rings past any interposer: the VMM itself wants the backend to look at the queue.
    pub fn nudge(&self) {
        signal(&self.backend, 1);
    }
    /// The way that kicks take now.
    pub fn path(&self) -> Path {
        if self.state().relayed.is_some() { Path::Interposed } else { Path::Direct }
    }
    /// Kicks that the relay has seen since the path was last interposed; `None` while direct.
    pub fn count(&self) -> Option<u64> {
        self.state().relayed.as_ref().map(RelayedEvent::count)
    }
    /// Sends kicks through the relay, to `interposer`. The guest keeps running; no kick is lost.
    ///
    /// # Errors
    /// If there is no descriptor left, or the processor refuses; the path is then what it was, or direct without the
    /// processor's help.
    pub fn interpose(&self, interposer: Arc<dyn Interposer>) -> Result<(), DoorbellError> {
        let mut state = self.state();
        let from = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(DoorbellError::Event)?;
        let to = self.backend.try_clone().map_err(DoorbellError::Event)?;
        let relayed = self.relay.carry(from, to, interposer)?;
        self.rewire(&mut state, Some(relayed))
    }
    /// Sends kicks straight to the backend. The guest keeps running; no kick is lost.
    ///
    /// # Errors
    /// If the processor refuses; the path is direct all the same, without its help.
    pub fn make_direct(&self) -> Result<(), DoorbellError> {
        self.rewire(&mut self.state(), None)
    }
    /// Swaps the source. Between unwatch and watch a guest's kick leaves the guest and waits for the lock in [`ring`].
    /// What the old source still holds goes on when it is dropped.
    ///
    /// [`ring`]: Self::ring
    fn rewire(&self, state: &mut State, next: Option<RelayedEvent>) -> Result<(), DoorbellError> {
        let placement = state.placement.take();
        if let Some(placement) = &placement {
            placement.unwatch(state.source(&self.backend))?;
        }
        state.relayed = next;
        if let Some(placement) = placement {
            placement.watch(state.source(&self.backend))?;
            state.placement = Some(placement);
        }
        Ok(())
    }
    /// Lets the processor watch the doorbell at an address, instead of where it was before.
    pub(super) fn place(&self, watch: Arc<dyn DoorbellWatch>, space: Space, address: u64) -> Result<(), DoorbellError> {
        self.displace()?;
        let mut state = self.state();
        let placement = Placement { watch, space, address };
        placement.watch(state.source(&self.backend))?;
        state.placement = Some(placement);
        Ok(())
    }
    /// Ends the processor's watching.
    pub(super) fn displace(&self) -> Result<(), DoorbellError> {
        let mut state = self.state();
        match state.placement.take() {
            Some(placement) => placement.unwatch(state.source(&self.backend)),
            None => Ok(()),
        }
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        if let Err(error) = self.displace() {
            tracing::warn!(%error, "a doorbell was left in place");
        }
    }
}
