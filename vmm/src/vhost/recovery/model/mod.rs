//! Every interleaving of supervisor, front end, driver and process for two queues and three requests, a reset, and a death at any
//! write of any step: the real [`Machine`](super::Machine), the real rules of a queue ([`atoll_kit::course`]) and of the
//! record of requests in flight ([`atoll_kit::inflight`]), and the real rule of who wakes whom. Only what lies between is
//! made up here: a driver, a storage, and a worker that carries the machine's actions out one by one.
//!
//! Where there is doubt the model is harder than the world: a kick that a dead thread has heard is gone, and a process
//! neither looks at a new ring by itself nor calls for what it found completed.
//!
//! Safety is looked at in each state. Liveness is the same question: no run goes on for ever (shown for itself), so every
//! run ends, and in a state where nothing more can happen everything must be answered and the device must run.
//!
//! The memory here is sequentially consistent; what weaker orders do to wake-ups is tried with loom in the kit.

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
    /// The process leaves out one kind of write to the record.
    Forget(Write),
}

impl Mistake {
    const ALL: [Self; 14] = [
        Self::SkipKick,
        Self::SkipCall,
        Self::SkipFence,
        Self::FromAvailable,
        Self::WithoutRecord,
        Self::KeepRecord,
        Self::Forget(Write::Version),
        Self::Forget(Write::DescNum),
        Self::Forget(Write::LastBatchHead),
        Self::Forget(Write::UsedIdx),
        Self::Forget(Write::Mark),
        Self::Forget(Write::Unmark),
        Self::Forget(Write::Next),
        Self::Forget(Write::Counter),
    ];
}

/// A device, its driver and so many deaths.
#[derive(Clone, Copy, Debug)]
struct Device {
    requests: [u8; QUEUES],
    deaths: u8,
    resets: u8,
    mistake: Option<Mistake>,
}

impl Model for Device {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.requests, self.deaths, self.resets)]
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
    for (requests, deaths, resets) in [([2, 1], 1, 0), ([1, 1], 2, 0), ([2, 0], 2, 0), ([2, 0], 1, 1)] {
        let model = Device { requests, deaths, resets, mistake: None };
        let checked = model.checker().threads(2).spawn_dfs().join();
        println!(
            "{requests:?} requests, {deaths} deaths, {resets} resets: {} states, {} steps, at most {} in a run",
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
    let model = Device { requests: [2, 0], deaths: 1, resets: 0, mistake: None };
    // Depth first; true for those on the way to where we are.
    let mut seen: HashMap<u64, bool> = HashMap::new();
    let first = State::new(model.requests, model.deaths, model.resets);
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
        let resets = u8::from(mistake == Mistake::KeepRecord);
        let model = Device { requests: [2, 1], deaths: 1, resets, mistake: Some(mistake) };
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
