//! What all device processes of a VMM share: the runtime and tree of the actors, the spawner, the supervisor, the clock.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{DeviceId, Generation};
use tokio::sync::broadcast;

use super::spawner::Spawner;
use super::supervisor::{Supervisor, SupervisorMail};
use crate::actor::{ActorReport, ActorThread, Address, Clock, Ending, Surroundings, Tree};
use crate::metrics::Registry;

/// One per VMM process; it outlives the machines that a reset makes one after the other.
#[derive(Debug)]
pub struct Household {
    actors: ActorThread,
    tree: Tree,
    clock: Arc<dyn Clock>,
    spawner: Spawner,
    supervisor: Address<SupervisorMail>,
    story: broadcast::Sender<LifecycleEvent>,
    causes: Arc<AtomicU64>,
    generations: Generations,
    metrics: Registry,
}

/// The last generation of each device, over all machines that this process has run: no number is used twice, so an event
/// of a machine that is gone is never taken for one of its successor.
#[derive(Clone, Debug, Default)]
pub(super) struct Generations(Arc<Mutex<BTreeMap<DeviceId, Generation>>>);

impl Generations {
    /// The generation of a device's next process.
    pub(super) fn first(&self, device: DeviceId) -> Generation {
        self.lock().get(&device).map_or(Generation::FIRST, |last| last.next())
    }

    /// A device had this generation.
    pub(super) fn used(&self, device: DeviceId, generation: Generation) {
        let mut all = self.lock();
        let last = all.entry(device).or_insert(generation);
        *last = generation.max(*last);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<DeviceId, Generation>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Household {
    /// Starts the actors' thread, the spawner's thread and the supervisor.
    ///
    /// # Errors
    /// The kernel has no thread or descriptor left.
    pub fn new(clock: Arc<dyn Clock>) -> io::Result<Self> {
        let actors = ActorThread::start()?;
        let tree = Tree::new("vmm", actors.runtime().clone(), |ended| match &ended.ending {
            Ending::Finished | Ending::Stopped => tracing::debug!(actor = &*ended.actor, "ended"),
            ending => tracing::error!(actor = &*ended.actor, ?ending, "an actor did not end as it should"),
        });
        let spawner = Spawner::new(Arc::clone(&clock))?;
        let (supervisor, story) = Supervisor::start(&tree, actors.runtime(), Arc::clone(&clock));
        Ok(Self {
            actors,
            tree,
            clock,
            spawner,
            supervisor,
            story,
            causes: Arc::default(),
            generations: Generations::default(),
            metrics: Registry::default(),
        })
    }

    /// The parent of all device processes.
    #[must_use]
    pub fn spawner(&self) -> &Spawner {
        &self.spawner
    }

    /// Who judges exits and stalls.
    #[must_use]
    pub fn supervisor(&self) -> &Address<SupervisorMail> {
        &self.supervisor
    }

    /// What the supervisor saw, from now on. A watcher that is slow misses the oldest.
    #[must_use]
    pub fn story(&self) -> broadcast::Receiver<LifecycleEvent> {
        self.story.subscribe()
    }

    /// Where actors run.
    #[must_use]
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        self.actors.runtime()
    }

    /// Where actors are started.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Everybody of the household who has a mailbox: actors, the spawner, devices of registers elsewhere, what waits for a
    /// device process.
    #[must_use]
    pub fn census(&self) -> Vec<ActorReport> {
        let mut all = self.tree.census();
        all.extend(self.spawner.roll().report());
        all
    }

    /// Time.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The figures of devices and vCPUs, over all machines that this process has run.
    #[must_use]
    pub fn metrics(&self) -> &Registry {
        &self.metrics
    }

    pub(super) fn generations(&self) -> &Generations {
        &self.generations
    }

    /// What a device that is not answered at once needs.
    #[must_use]
    pub fn surroundings(&self, budget: Duration) -> Surroundings {
        Surroundings {
            clock: Arc::clone(&self.clock),
            budget,
            supervision: Arc::new(self.supervisor.clone()),
            causes: Arc::clone(&self.causes),
            roll: self.spawner.roll().clone(),
        }
    }

    /// Ends everything: the actors, then the processes, each within `grace`. No process is left afterwards, and none can
    /// be started.
    pub fn shutdown(&self, grace: Duration) {
        self.actors.runtime().block_on(self.tree.shutdown(grace));
        self.spawner.shutdown(grace);
    }
}
