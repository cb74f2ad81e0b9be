//! Every interleaving of supervisor, front end, driver and process for two queues and three requests, a reset, and a death at any
//! write of any step: the real [`Machine`](super::Machine), the real rules of a queue ([`atoll_kit::course`]) and of the
//! record of requests in flight ([`atoll_kit::inflight`]), and the real rule of who wakes whom. Only what lies between is
//! made up here: a driver, a storage, and a worker that carries the machine's actions out one by one. An operator upgrades the
//! device in the middle of it, or a spare waits for the death of the one that serves.
//!
//! Where there is doubt the model is harder than the world: a kick that a dead thread has heard is gone, and a process
//! neither looks at a new ring by itself nor calls for what it found completed.
//!
//! Safety is looked at in each state. Liveness is the same question: no run goes on for ever (shown for itself), so every
//! run ends, and in a state where nothing more can happen everything must be answered and the device must run.
//!
//! The memory here is sequentially consistent; what weaker orders do to wake-ups is tried with loom in the kit.

mod beside;
mod memory;
mod state;

use std::collections::HashMap;

use memory::Write;
use state::{QUEUES, State, Step};
use stateright::{Checker, Model, Property};

/// Something that is done wrong on purpose: the model must find each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    /// No ring is kicked after a recovery.
    SkipKick,
    /// No ring is called after a recovery.
    SkipCall,
    /// Nobody waits for what the dead have under way.
    SkipFence,
    /// A successor begins behind everything that is available.
    FromAvailable,
    /// A successor knows nothing of what was in flight.
    WithoutRecord,
    /// A reset leaves the record as it is.
    KeepRecord,
    /// A backend that is to be replaced says that it has given the rings back, and has not.
    KeepRings,
    /// What a device knows is not moved to a new build, and that it was is said.
    SkipTransfer,
    /// After an upgrade the old build is started.
    KeepBuild,
    /// After an upgrade that failed the new build is started.
    SkipRevert,
    /// One that is not wanted any more is not ended.
    KeepBeside,
    /// Nobody tells the operator what became of an upgrade.
    SkipAnswer,
    /// The process leaves out one kind of write to the record.
    Forget(Write),
}

impl Mistake {
    const ALL: [Self; 20] = [
        Self::SkipKick,
        Self::SkipCall,
        Self::SkipFence,
        Self::FromAvailable,
        Self::WithoutRecord,
        Self::KeepRecord,
        Self::KeepRings,
        Self::SkipTransfer,
        Self::KeepBuild,
        Self::SkipRevert,
        Self::KeepBeside,
        Self::SkipAnswer,
        Self::Forget(Write::Version),
        Self::Forget(Write::DescNum),
        Self::Forget(Write::LastBatchHead),
        Self::Forget(Write::UsedIdx),
        Self::Forget(Write::Mark),
        Self::Forget(Write::Unmark),
        Self::Forget(Write::Next),
        Self::Forget(Write::Counter),
    ];

    /// The smallest device on which it shows.
    fn device(self) -> Device {
        let (upgrading, requests) = (Device { upgrades: 1, ..Device::new([1, 0], 0) }, [2, 1]);
        let device = match self {
            Self::KeepRings | Self::SkipTransfer | Self::KeepBeside | Self::SkipAnswer => upgrading,
            // It shows with the death that comes after the upgrade, or after the one that ended it.
            Self::KeepBuild => Device { deaths: 1, ..upgrading },
            Self::SkipRevert => Device { deaths: 2, ..upgrading },
            Self::KeepRecord => Device { resets: 1, ..Device::new(requests, 1) },
            _ => Device::new(requests, 1),
        };
        Device { mistake: Some(self), ..device }
    }
}

/// A device, its driver, its operator and so many deaths.
#[derive(Clone, Copy, Debug)]
struct Device {
    requests: [u8; QUEUES],
    deaths: u8,
    resets: u8,
    upgrades: u8,
    /// A spare waits.
    standby: bool,
    mistake: Option<Mistake>,
}

impl Device {
    /// So many requests in each queue.
    const fn new(requests: [u8; QUEUES], deaths: u8) -> Self {
        Self { requests, deaths, resets: 0, upgrades: 0, standby: false, mistake: None }
    }
}

impl Model for Device {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.complaint.is_none() {
            *actions = state.steps(self.mistake);
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        state.after(step, self.mistake)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is lost, doubled, or done before the fence", |_, state: &State| {
                state.complaint.is_none()
            }),
            Property::always("what comes to an end has answered everything", |model: &Self, state: &State| {
                state.complaint.is_some() || !state.steps(model.mistake).is_empty() || state.is_done()
            }),
            Property::sometimes("every death is survived", |_, state: &State| {
                state.deaths_left == 0 && state.is_done()
            }),
        ]
    }
}

/// The whole of it. Says how many states there are.
#[test]
#[allow(clippy::print_stdout, reason = "how much was looked at is for people who run it")]
fn every_interleaving_is_safe_and_comes_to_an_end() {
    for model in [
        Device::new([2, 1], 1),
        Device::new([1, 1], 2),
        Device::new([2, 0], 2),
        Device { resets: 1, ..Device::new([2, 0], 1) },
        Device { upgrades: 1, ..Device::new([2, 0], 0) },
        Device { upgrades: 1, ..Device::new([1, 0], 2) },
        Device { upgrades: 1, resets: 1, ..Device::new([1, 0], 1) },
        Device { standby: true, ..Device::new([1, 0], 2) },
        Device { standby: true, upgrades: 1, ..Device::new([1, 0], 1) },
    ] {
        let checked = model.checker().threads(2).spawn_dfs().join();
        println!(
            "{model:?}: {} states, {} steps, at most {} in a run",
            checked.unique_state_count(),
            checked.state_count(),
            checked.max_depth()
        );
        for (property, path) in checked.discoveries() {
            let complaint = path.last_state().complaint;
            assert_eq!(property, "every death is survived", "{complaint:?} after {:?}", path.into_actions());
        }
        assert!(checked.is_done() && checked.discovery("every death is survived").is_some());
    }
}

/// No state comes again in one run, so that each run ends.
#[test]
fn no_run_goes_on_for_ever() {
    let model = Device { upgrades: 1, standby: true, ..Device::new([1, 0], 1) };
    // Depth first; true for those on the way to where we are.
    let mut seen: HashMap<u64, bool> = HashMap::new();
    let first = State::new(&model);
    seen.insert(first.digest(), true);
    let mut way = vec![(first.digest(), model.next_states(&first))];
    while let Some((at, ahead)) = way.last_mut() {
        let Some(state) = ahead.pop() else {
            seen.insert(*at, false);
            way.pop();
            continue;
        };
        match seen.get(&state.digest()) {
            Some(true) => panic!("a run comes back to {state:?}"),
            Some(false) => {}
            None => {
                seen.insert(state.digest(), true);
                way.push((state.digest(), model.next_states(&state)));
            }
        }
    }
    assert!(seen.len() > 1000, "only {} states", seen.len());
}

/// Each mistake is found.
#[test]
#[allow(clippy::print_stdout, reason = "how each mistake shows is for people who run it")]
fn the_model_can_fail() {
    for mistake in Mistake::ALL {
        let model = mistake.device();
        let checked =
            model.checker().threads(2).finish_when(stateright::HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found = checked.discoveries().into_iter().find(|(property, _)| *property != "every death is survived");
        let Some((property, path)) = found else {
            panic!("{mistake:?} is not found in {} states", checked.state_count())
        };
        let complaint = path.last_state().complaint.unwrap_or(property);
        println!(
            "{mistake:?}: {complaint}, after {} steps of {} states",
            path.into_actions().len(),
            checked.state_count()
        );
    }
}
