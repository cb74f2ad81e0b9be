//! Registers whose accesses an actor of this process completes ("later").

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use atoll_devices::access::{Answer, Completion, Overdue, RegisterDevice, deferred};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{AccessKind, CauseId, DeviceId, Generation, Width};

use super::Supervision;
use super::address::{Address, Mail};
use super::clock::Clock;
use super::roll::Roll;

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

/// Completes one access, unless its asker has given up. Dropping it abandons the access: a read gives all ones.
#[derive(Debug)]
pub struct AccessToken(Completion);

impl AccessToken {
    /// Completes the access: the value read, or anything for a write.
    pub fn complete(self, value: u64) {
        self.0.complete(value);
    }
}

/// The device of the board that stands for an actor.
///
/// The thread that asks waits for the device's budget; then, or when the mailbox is full or the actor is gone, a read
/// gives all ones, a write is dropped, and the supervisor hears `DeviceStalled`. An answer that comes after all goes
/// nowhere.
pub struct ActorDevice<M> {
    device: DeviceId,
    actor: Address<M>,
    wrap: fn(RegisterAccess) -> M,
    surroundings: Surroundings,
    stalls: Arc<Stalls>,
}

/// Tells the supervisor of stalls.
struct Stalls {
    device: DeviceId,
    supervision: Arc<dyn Supervision>,
}

impl Overdue for Stalls {
    fn overdue(&self, cause: CauseId) {
        let generation = Generation::FIRST;
        self.supervision.report(LifecycleEvent::DeviceStalled { device: self.device, generation, cause });
    }
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
    /// Where a device elsewhere is on the roll.
    pub roll: Roll,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("clock", &self.clock).field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Surroundings {
    /// The id of something new.
    pub(crate) fn next_cause(&self) -> CauseId {
        // 0 is "no cause".
        CauseId(self.causes.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }
}

impl<M: Mail> ActorDevice<M> {
    /// Stands for `actor`, whose message for an access is made by `wrap`.
    pub fn new(device: DeviceId, actor: Address<M>, wrap: fn(RegisterAccess) -> M, surroundings: Surroundings) -> Self {
        let stalls = Arc::new(Stalls { device, supervision: Arc::clone(&surroundings.supervision) });
        Self { device, actor, wrap, surroundings, stalls }
    }

    fn access(&self, offset: u64, width: Width, kind: AccessKind) -> Answer {
        let (completion, answer) = deferred();
        let cause = self.surroundings.next_cause();
        let token = AccessToken(completion);
        // The vCPU must not wait for room: a full mailbox is an actor that does not keep up.
        if self.actor.try_tell((self.wrap)(RegisterAccess { offset, width, kind, cause, token })).is_err() {
            self.stalls.overdue(cause);
            return Answer::Later(answer);
        }
        let hears = Arc::clone(&self.stalls) as Arc<dyn Overdue>;
        Answer::Later(answer.within(self.surroundings.budget, cause, hears))
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
