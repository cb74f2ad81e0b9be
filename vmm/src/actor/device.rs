//! Registers whose accesses an actor of this process completes ("later").

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use atoll_devices::access::{Answer, Completion, RegisterDevice, deferred};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{AccessKind, CauseId, DeviceId, Generation, Width};
use tokio::runtime::Handle;

use super::Supervision;
use super::address::{Address, Mail};
use super::clock::Clock;

/// An access as the actor gets it.
#[derive(Debug)]
pub struct RegisterAccess {
    /// First byte within the device's range.
    pub offset: u64,
    /// Bytes.
    pub width: Width,
    /// Load, or store and what.
    pub kind: AccessKind,
    /// The access's id in traces.
    pub cause: CauseId,
    /// Completes it.
    pub token: AccessToken,
}

/// Completes one access, once, unless its deadline has. Dropping it abandons the access: a read gives all ones.
#[derive(Debug)]
pub struct AccessToken {
    slot: Arc<Mutex<Option<Completion>>>,
    timer: tokio::task::AbortHandle,
}

impl AccessToken {
    /// Completes the access: the value read, or anything for a write.
    pub fn complete(self, value: u64) {
        if let Some(completion) = take(&self.slot) {
            completion.complete(value);
        }
    }
}

impl Drop for AccessToken {
    fn drop(&mut self) {
        self.timer.abort();
        drop(take(&self.slot));
    }
}

fn take(slot: &Mutex<Option<Completion>>) -> Option<Completion> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// The device of the board that stands for an actor.
///
/// An access waits for its answer for the device's budget; then, or when the mailbox is full or the actor is gone, a
/// read gives all ones, a write is dropped, and the supervisor hears `DeviceStalled`.
pub struct ActorDevice<M> {
    device: DeviceId,
    actor: Address<M>,
    wrap: fn(RegisterAccess) -> M,
    runtime: Handle,
    surroundings: Surroundings,
}

impl<M> fmt::Debug for ActorDevice<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ActorDevice({}, {:?})", self.device, self.actor)
    }
}

/// What all devices of one board that are not answered at once share.
#[derive(Clone)]
pub struct Surroundings {
    /// Time of the deadlines.
    pub clock: Arc<dyn Clock>,
    /// How long an access may take.
    pub budget: Duration,
    /// Who hears of stalls.
    pub supervision: Arc<dyn Supervision>,
    /// Source of cause ids, shared by the whole VM.
    pub causes: Arc<AtomicU64>,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("clock", &self.clock).field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Surroundings {
    /// The id of something new.
    pub(super) fn next_cause(&self) -> CauseId {
        // 0 is "no cause".
        CauseId(self.causes.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }
}

impl<M: Mail> ActorDevice<M> {
    /// Stands for `actor`, whose message for an access is made by `wrap`.
    pub fn new(
        device: DeviceId,
        actor: Address<M>,
        wrap: fn(RegisterAccess) -> M,
        runtime: Handle,
        surroundings: Surroundings,
    ) -> Self {
        Self { device, actor, wrap, runtime, surroundings }
    }

    fn access(&self, offset: u64, width: Width, kind: AccessKind) -> Answer {
        let (completion, answer) = deferred();
        let slot = Arc::new(Mutex::new(Some(completion)));
        let cause = self.surroundings.next_cause();
        let stalled = LifecycleEvent::DeviceStalled { device: self.device, generation: Generation::FIRST, cause };
        let timer = self.runtime.spawn({
            let Surroundings { clock, budget, supervision, .. } = self.surroundings.clone();
            let (slot, stalled) = (Arc::clone(&slot), stalled.clone());
            let deadline = clock.now().after(budget);
            async move {
                while clock.now() < deadline {
                    tokio::time::sleep(clock.nap(deadline)).await;
                }
                if let Some(completion) = take(&slot) {
                    drop(completion);
                    supervision.report(stalled);
                }
            }
        });
        let token = AccessToken { slot, timer: timer.abort_handle() };
        // The vCPU must not wait for room: a full mailbox is an actor that does not keep up.
        if self.actor.try_tell((self.wrap)(RegisterAccess { offset, width, kind, cause, token })).is_err() {
            self.surroundings.supervision.report(stalled);
        }
        Answer::Later(answer)
    }
}

impl<M: Mail> RegisterDevice for ActorDevice<M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        let Some(width) = Width::from_bytes(data.len()) else {
            data.fill(0xff);
            return Answer::Now;
        };
        self.access(offset, width, AccessKind::Read)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        let Some(width) = Width::from_bytes(data.len()) else { return Answer::Now };
        self.access(offset, width, AccessKind::Write(little_endian(data)))
    }
}

/// The value of up to 8 bytes.
pub(super) fn little_endian(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}
