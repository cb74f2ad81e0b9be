//! Single decisions of the machine, each with its story; the schedules of `simulation` try all of them together.

use std::time::Duration;

use super::*;
use crate::actor::Moment;
use crate::backend::{Ending, PolicyConfig};
use crate::config::OnFailure;
use crate::vhost::device::Recovery;

struct Story {
    machine: Machine,
    now: Duration,
}

fn rules() -> Rules {
    let (fence, stall) = (Duration::from_secs(10), Some(Duration::from_secs(30)));
    let (standby, probation, trial) = (false, Duration::from_millis(200), Duration::from_secs(10));
    let policy = PolicyConfig::default();
    Rules { policy, on_failure: OnFailure::Error, fence, stall, debugged: false, standby, probation, trial }
}

fn end(idle: bool) -> End {
    End { ending: Ending::Crash { idle }, progressed: false, unfinished: false }
}

impl Story {
    fn new(rules: Rules) -> Self {
        Self { machine: Machine::new(rules, Recovery::Full), now: Duration::ZERO }
    }
    /// A driver runs the device.
    fn running(rules: Rules) -> Self {
        let mut story = Self::new(rules);
        assert_eq!(
            story.on(Event::Activated),
            [Action::ClearRecord, Action::HandOver { generation: 1, continued: false }]
        );
        let done = [Action::Kick { call: false }, Action::CompleteActivation];
        assert_eq!(story.on(Event::HandedOver { generation: 1 }), done);
        story
    }
    fn on(&mut self, event: Event) -> Vec<Action> {
        self.machine.on(event, Moment::from_start(self.now))
    }
    /// Lets the time pass until the machine has something to do.
    fn pass(&mut self) -> Vec<Action> {
        let due = self.machine.due_at().expect("something to wait for");
        self.now = self.now.max(due.since(Moment::default()));
        self.on(Event::Time)
    }
    fn lose(&mut self, generation: u64, idle: bool) -> Vec<Action> {
        assert_eq!(self.on(Event::Lost { generation, why: "gone".into() }), [Action::Kill { generation }]);
        self.on(Event::Ended { generation, end: end(idle) })
    }
    fn greeted(&mut self, generation: u64) -> Vec<Action> {
        self.on(Event::Greeted { generation, recovery: Recovery::Full })
    }
    fn not_started(&mut self, generation: u64) -> Vec<Action> {
        self.on(Event::NotStarted { generation, failure: Failure::Passing("not there".into()) })
    }
}

/// Other front ends give a backend sixty seconds and then switch the device off for good. Here an outage of a process of
/// ours may last longer than a minute where its user wants that, one of somebody else's socket as long as it likes; then the device goes on.
#[test]
fn an_outage_longer_than_a_minute() {
    let some = PolicyConfig { start_attempts: Some(50), ..PolicyConfig::default() };
    let forever = PolicyConfig { start_attempts: None, ..PolicyConfig::default() };
    for (policy, outage) in [(some, 61), (forever, 100_000)] {
        let mut story = Story::running(Rules { policy, ..rules() });
        let mut actions = story.lose(1, false);
        let mut generation = 1;
        while story.now < Duration::from_secs(outage) {
            if let Some(Action::Spawn { generation: next }) = actions.last() {
                generation = *next;
                actions = story.not_started(generation);
            } else {
                actions = story.pass();
            }
            assert!(!matches!(story.machine.state(), State::Quarantined { .. }), "after {:?}", story.now);
        }
        while !matches!(actions.last(), Some(Action::Spawn { .. })) {
            actions = story.pass();
        }
        generation += 1;
        let greeted = story.on(Event::Greeted { generation, recovery: Recovery::Full });
        assert_eq!(greeted.last(), Some(&Action::HandOver { generation, continued: true }));
        assert_eq!(story.on(Event::HandedOver { generation }), [Action::Kick { call: true }]);
        assert_eq!(story.machine.state(), State::Running);
    }
}

/// A guest that resets a device without a backend, as a reboot or an unplug does, waited eleven seconds for a successor.
/// Now it waits for the dead one's last writes and for nothing else; and a driver that comes then waits for nobody.
#[test]
fn a_reset_waits_for_the_fence_and_for_no_successor() {
    let mut story = Story::running(rules());
    assert!(story.lose(1, false).contains(&Action::WatchFence));
    assert_eq!(story.on(Event::Reset), []);
    assert_eq!(story.on(Event::FencePassed), [Action::Settled, Action::ClearRecord, Action::CompleteResets]);
    assert_eq!(story.on(Event::Activated), [Action::CompleteActivation]);
    assert!(matches!(story.machine.state(), State::Recovering { .. }));
    // Nobody can see it: then it is believed after its time.
    let mut blind = Story::running(rules());
    blind.lose(1, false);
    blind.not_started(2);
    assert_eq!(blind.on(Event::Reset), []);
    while blind.now < rules().fence {
        match blind.pass().as_slice() {
            [Action::Spawn { generation }] => drop(blind.not_started(*generation)),
            actions => assert!(actions.contains(&Action::CompleteResets) && blind.now >= rules().fence, "{actions:?}"),
        }
    }
}

/// A device that is given up while its driver resets it set NEEDS_RESET, and the driver that came after the reset found a
/// device that was broken before it was touched.
#[test]
fn nobody_asks_a_driver_for_a_reset_that_it_is_doing() {
    let mut story = Story::running(rules());
    story.lose(1, false);
    assert_eq!(story.on(Event::Reset), []);
    let hopeless = Event::NotStarted { generation: 2, failure: Failure::Hopeless("lacks FLUSH".into()) };
    let told = story.on(hopeless);
    assert_eq!(told, [Action::Tell(Tale::Quarantined { why: "lacks FLUSH".into() })]);
    assert_eq!(story.on(Event::FencePassed).last(), Some(&Action::CompleteResets));
    // With a driver it says so, and the stand-in gets the rings once the fence has passed.
    let mut driven = Story::running(rules());
    driven.lose(1, false);
    let told = driven.on(Event::NotStarted { generation: 2, failure: Failure::Hopeless("lacks FLUSH".into()) });
    assert_eq!(told.last(), Some(&Action::NeedsReset));
    assert_eq!(driven.on(Event::FencePassed), [Action::Settled, Action::Employ]);
    driven.on(Event::Employed);
    let again = driven.on(Event::Reset);
    assert_eq!(again, [Action::Dismiss, Action::Spawn { generation: 3 }, Action::ClearRecord, Action::CompleteResets]);
}

/// A pause during recovery: the successor comes, and gets nothing before the pause is over.
#[test]
fn a_pause_during_recovery() {
    let mut story = Story::running(rules());
    story.lose(1, false);
    assert_eq!(story.on(Event::Pause), []);
    let greeted = story.on(Event::Greeted { generation: 2, recovery: Recovery::Full });
    assert!(!greeted.iter().any(|action| matches!(action, Action::HandOver { .. })), "{greeted:?}");
    assert_eq!(story.on(Event::Resume), [Action::HandOver { generation: 2, continued: true }]);
    // The gate was closed before the thread heard of it.
    assert_eq!(story.on(Event::Withheld), []);
    assert_eq!(story.machine.state(), State::Idle);
    assert_eq!(story.on(Event::Resume), [Action::HandOver { generation: 2, continued: true }]);
}

/// A queue with work in it stands: its backend is replaced at the deadline, though it answers whatever it is asked. One
/// that is being debugged is told of, once. A machine that was itself stopped for an hour blames nobody. Before that its
/// kick is given again: one that was lost costs two looks, and no backend.
#[test]
fn a_queue_that_stands() {
    let stand = |story: &mut Story, seconds: u64| {
        story.now += Duration::from_secs(seconds);
        let samples = vec![Sample { queue: 0, used: 7, waiting: true }];
        let actions = story.on(Event::Sampled { samples, spared: false });
        let kicks = actions.iter().filter(|action| **action == Action::Kick { call: false }).count();
        (actions.into_iter().filter(|action| !matches!(action, Action::Kick { .. })).collect::<Vec<_>>(), kicks)
    };
    let until = |story: &mut Story| -> Vec<Action> { (0..5).flat_map(|_| stand(story, 8).0).collect() };
    assert_eq!(until(&mut Story::running(rules())), [Action::Kill { generation: 1 }]);
    let told = until(&mut Story::running(Rules { debugged: true, ..rules() }));
    assert!(matches!(told.as_slice(), [Action::Tell(Tale::Stalled { .. })]), "{told:?}");
    assert_eq!(until(&mut Story::running(Rules { stall: None, ..rules() })), []);
    let mut stopped = Story::running(rules());
    assert_eq!(stand(&mut stopped, 8), (vec![], 0));
    assert_eq!(stand(&mut stopped, 3600), (vec![], 1));
    assert_eq!((0..3).flat_map(|_| stand(&mut stopped, 8).0).collect::<Vec<_>>(), [Action::Kill { generation: 1 }]);
}

/// A new build is made ready beside the one that serves, and then a process of the old build that would have the rings if
/// the new one failed; the driver's rings are nowhere only between two words, and the old build is forgotten when the new
/// one has served for a while.
#[test]
fn a_new_build_takes_over() {
    let mut story = Story::running(rules());
    let tried = story.on(Event::Upgrade);
    assert_eq!(
        tried,
        [
            Action::Tell(Tale::UpgradeStarted { generation: 2 }),
            Action::SpawnBeside { generation: 2, build: Build::New }
        ]
    );
    let ready = story.greeted(2);
    assert_eq!(ready, [Action::SpawnBeside { generation: 3, build: Build::Present }]);
    assert_eq!(story.greeted(3), [Action::TakeBack { generation: 1, why: TakeBack::Upgrade }]);
    assert_eq!(story.on(Event::TakenBack { generation: 1 }), [Action::Transfer { from: 1, to: 2 }]);
    assert_eq!(story.on(Event::Transferred { generation: 2 }), [Action::Kill { generation: 1 }]);
    assert!(story.machine.is_replaced(1) && story.machine.lost() == 0);
    let promoted = story.on(Event::Ended { generation: 1, end: end(true) });
    assert_eq!(promoted, [Action::WatchFence, Action::Promote { generation: 2 }, Action::ShowConfig]);
    let over = story.on(Event::FencePassed);
    assert_eq!(over, [Action::Settled, Action::HandOver { generation: 2, continued: true }]);
    assert_eq!(story.on(Event::HandedOver { generation: 2 }), [Action::Kick { call: true }]);
    let done = [Action::Tell(Tale::Upgraded { generation: 2 }), Action::DropBeside { generation: 3 }];
    assert_eq!(story.pass(), done);
    assert_eq!((story.machine.lost(), story.machine.state()), (0, State::Running));
    assert_eq!(story.machine.spare(), SpareState::Off);
    // If it dies soon, the old one comes back; later its death is one like any other.
    let mut soon = Story { machine: story.machine.clone(), now: story.now };
    let actions = soon.lose(2, false);
    let back = [Action::Tell(Tale::RolledBack { why: "gone".into() }), Action::Spawn { generation: 4 }];
    assert!(actions.contains(&Action::Revert) && actions.ends_with(&back), "{actions:?}");
    soon.on(Event::FencePassed);
    soon.greeted(4);
    soon.on(Event::HandedOver { generation: 4 });
    assert!(!soon.lose(4, false).contains(&Action::Revert), "once");
    assert!(story.machine.is_on_trial());
    assert_eq!((story.pass(), story.machine.due_at(), story.machine.is_on_trial()), (vec![], None, false));
    assert!(!story.lose(2, false).contains(&Action::Revert));
}

/// Fails every start until the device is given up. Says how often the failures were told.
fn fail_until_quarantined(story: &mut Story, mut actions: Vec<Action>) -> Vec<u32> {
    let mut told = Vec::new();
    loop {
        told.extend(actions.iter().filter_map(|action| match action {
            Action::Tell(Tale::StartFailed { times, .. }) => Some(*times),
            _ => None,
        }));
        if matches!(story.machine.state(), State::Quarantined { .. }) {
            return told;
        }
        actions = match actions.iter().find_map(|action| match action {
            Action::Spawn { generation } => Some(*generation),
            _ => None,
        }) {
            Some(generation) => story.not_started(generation),
            None => story.pass(),
        };
    }
}

/// A program that does not start any more was silent for two minutes, and again so long after each reset of the guest.
/// Each failure is counted; the first is told, and then each that doubles their number; a reset is one attempt more, a word
/// of the operator all of them.
#[test]
fn failed_starts_are_told_and_counted() {
    let mut story = Story::running(rules());
    let actions = story.lose(1, false);
    assert_eq!(fail_until_quarantined(&mut story, actions), [1, 2, 4, 8, 16]);
    assert_eq!(story.machine.failed_starts(), 20);
    assert!(story.now < Duration::from_secs(30), "{:?}", story.now);
    story.on(Event::FencePassed);
    story.on(Event::Employed);
    let actions = story.on(Event::Reset);
    let before = story.now;
    assert_eq!(fail_until_quarantined(&mut story, actions), [0_u32; 0]);
    assert_eq!((story.machine.failed_starts(), story.now), (21, before));
    let actions = story.on(Event::Revive);
    assert_eq!(fail_until_quarantined(&mut story, actions), [1, 2, 4, 8, 16]);
    // One that is waited for: that it is, is told once.
    let mut waiting = Story::running(Rules { on_failure: OnFailure::Wait, ..rules() });
    let mut actions = waiting.lose(1, false);
    let mut told = 0;
    while waiting.machine.failed_starts() < 60 {
        told += actions.iter().filter(|action| matches!(action, Action::Tell(Tale::Waiting { .. }))).count();
        actions = match actions.last() {
            Some(Action::Spawn { generation }) => waiting.not_started(*generation),
            _ => waiting.pass(),
        };
    }
    assert_eq!((told, matches!(waiting.machine.state(), State::Waiting { .. })), (1, true));
}

/// Where the program is broken, another one is the way out: it takes a device that was given up, or that waits, as a
/// successor does. One that will not do is refused, and changes nothing.
#[test]
fn an_upgrade_out_of_a_crash_loop() {
    let mut story = Story::running(rules());
    let actions = story.lose(1, false);
    fail_until_quarantined(&mut story, actions);
    story.on(Event::FencePassed);
    story.on(Event::Employed);
    let tried = |actions: &[Action]| match actions {
        [Action::Tell(Tale::UpgradeStarted { .. }), Action::SpawnBeside { generation, build: Build::New }] => {
            *generation
        }
        other => panic!("{other:?}"),
    };
    let generation = tried(&story.on(Event::Upgrade));
    let failure = Failure::Hopeless("lacks FLUSH".into());
    let refused = story.on(Event::NotStarted { generation, failure });
    assert_eq!(refused, [Action::Tell(Tale::UpgradeRefused { why: "lacks FLUSH".into() })]);
    assert!(matches!(story.machine.state(), State::Quarantined { .. }));
    let generation = tried(&story.on(Event::Upgrade));
    let actions = story.greeted(generation);
    let place = |wanted: Action| actions.iter().position(|action| *action == wanted).expect("done");
    assert!(place(Action::Dismiss) < place(Action::Promote { generation }), "{actions:?}");
    assert_eq!(actions.last(), Some(&Action::HandOver { generation, continued: true }));
    story.on(Event::HandedOver { generation });
    assert!(story.pass().contains(&Action::Tell(Tale::Upgraded { generation })));
    // While the old program is being started once more, that is waited for.
    let mut recovering = Story::running(rules());
    recovering.lose(1, false);
    let generation = tried(&recovering.on(Event::Upgrade));
    assert_eq!(recovering.greeted(generation), []);
    assert!(recovering.not_started(2).contains(&Action::Promote { generation }));
    let over = [Action::Settled, Action::HandOver { generation, continued: true }];
    assert_eq!(recovering.on(Event::FencePassed), over);
}

/// A new build that will not do: before it has anything the old one carries on untouched; when the old one has given its
/// rings back it gets them again; and when the new one has had them, the process of the old build that waits has them
/// next, without a start.
#[test]
fn a_new_build_that_will_not_do() {
    let refused = |actions: &[Action]| {
        actions.iter().any(|action| matches!(action, Action::Tell(Tale::UpgradeRefused { why }) if why == "bad"))
    };
    let hopeless = || Failure::Hopeless("bad".into());
    let mut early = Story::running(rules());
    early.on(Event::Upgrade);
    let actions = early.on(Event::NotStarted { generation: 2, failure: hopeless() });
    assert!(refused(&actions) && actions.len() == 1 && early.machine.state() == State::Running, "{actions:?}");
    let mut state = Story::running(rules());
    state.on(Event::Upgrade);
    state.greeted(2);
    state.greeted(3);
    state.on(Event::TakenBack { generation: 1 });
    let actions = state.on(Event::NotTransferred { generation: 2, why: "bad".into() });
    assert!(refused(&actions) && actions.contains(&Action::DropBeside { generation: 2 }), "{actions:?}");
    let carries_on = [Action::HandOver { generation: 1, continued: true }, Action::DropBeside { generation: 3 }];
    assert!(actions.ends_with(&carries_on), "{actions:?}");
    for covered in [true, false] {
        let mut late = Story::running(rules());
        late.on(Event::Upgrade);
        late.greeted(2);
        // Where the old build does not start any more there is nothing to wait for.
        let ready = if covered { late.greeted(3) } else { late.not_started(3) };
        assert_eq!(ready, [Action::TakeBack { generation: 1, why: TakeBack::Upgrade }]);
        late.on(Event::TakenBack { generation: 1 });
        late.on(Event::Transferred { generation: 2 });
        late.on(Event::Ended { generation: 1, end: end(true) });
        late.on(Event::FencePassed);
        assert_eq!(
            late.on(Event::HandOverFailed { generation: 2, failure: hopeless() }),
            [Action::Kill { generation: 2 }],
            "one that refuses does not quarantine the device"
        );
        let actions = late.on(Event::Ended { generation: 2, end: end(false) });
        assert!(refused(&actions) && actions.contains(&Action::Revert), "{actions:?}");
        if covered {
            assert!(actions.contains(&Action::Promote { generation: 3 }), "{actions:?}");
            let over = [Action::Settled, Action::HandOver { generation: 3, continued: true }];
            assert_eq!(late.on(Event::FencePassed), over);
        } else {
            assert_eq!(actions.last(), Some(&Action::Spawn { generation: 4 }));
        }
    }
}

/// What befalls the old one, its cover or the machine while an upgrade waits for that cover.
#[test]
fn an_upgrade_whose_cover_is_not_ready() {
    let covering = || {
        let mut story = Story::running(rules());
        story.on(Event::Upgrade);
        story.greeted(2);
        story
    };
    // The old one is lost: what was to be the cover is its successor, and the new build is let go.
    let mut lost = covering();
    let actions = lost.on(Event::Lost { generation: 1, why: "gone".into() });
    assert_eq!(actions.first(), Some(&Action::DropBeside { generation: 2 }));
    let actions = lost.on(Event::Ended { generation: 1, end: end(false) });
    assert!(!actions.iter().any(|action| matches!(action, Action::Spawn { .. })), "{actions:?}");
    let promoted = lost.greeted(3);
    assert!(promoted.contains(&Action::Promote { generation: 3 }), "{promoted:?}");
    // Its knowledge of the device is of yesterday: the upgrade goes on without it.
    let actions = covering().on(Event::Outdated);
    let without = [Action::DropBeside { generation: 3 }, Action::TakeBack { generation: 1, why: TakeBack::Upgrade }];
    assert_eq!(actions, without);
    // The machine starts again: nothing is left beside the one that serves.
    let actions = covering().on(Event::Leave);
    for generation in [2, 3] {
        assert!(actions.contains(&Action::DropBeside { generation }), "{actions:?}");
    }
}

/// With a spare nobody is started when a backend is lost: the spare has the rings as soon as the fence has passed, and the
/// next spare is made afterwards. One that dies is replaced without anybody noticing.
#[test]
fn a_spare_takes_over() {
    let mut story = Story::running(Rules { standby: true, ..rules() });
    assert_eq!(story.pass(), [Action::SpawnBeside { generation: 2, build: Build::Present }]);
    let ready = story.on(Event::Greeted { generation: 2, recovery: Recovery::Full });
    assert_eq!(ready, [Action::Tell(Tale::SpareReady { generation: 2 })]);
    let lost = story.on(Event::Lost { generation: 2, why: "gone".into() });
    assert_eq!(lost.first(), Some(&Action::DropBeside { generation: 2 }));
    assert_eq!(story.machine.state(), State::Running);
    assert_eq!(story.pass(), [Action::SpawnBeside { generation: 3, build: Build::Present }]);
    story.on(Event::Greeted { generation: 3, recovery: Recovery::Full });
    let actions = story.lose(1, false);
    assert!(
        !actions.iter().any(|action| matches!(action, Action::Spawn { .. } | Action::HandOver { .. })),
        "{actions:?}"
    );
    assert!(actions.contains(&Action::Promote { generation: 3 }), "{actions:?}");
    let over = story.on(Event::FencePassed);
    assert_eq!(over, [Action::Settled, Action::HandOver { generation: 3, continued: true }]);
    assert_eq!(story.on(Event::HandedOver { generation: 3 }), [Action::Kick { call: true }]);
    assert!(matches!(story.pass().as_slice(), [Action::SpawnBeside { generation: 4, build: Build::Present }]));
}

/// A killed process that does not end (its storage hangs) has no successor before it has, and yet keeps nobody waiting for
/// longer than was said.
#[test]
fn one_that_cannot_be_killed() {
    let mut story = Story::running(rules());
    assert_eq!(story.on(Event::Lost { generation: 1, why: "late".into() }), [Action::Kill { generation: 1 }]);
    assert_eq!(story.on(Event::FencePassed), [], "whatever could be seen, it may still write");
    assert_eq!(story.on(Event::Reset), []);
    assert!(story.pass().contains(&Action::CompleteResets));
    assert_eq!((story.now, story.machine.due_at()), (rules().fence, None));
    assert_eq!(story.on(Event::Activated), [Action::CompleteActivation]);
    assert!(story.on(Event::Ended { generation: 1, end: end(false) }).contains(&Action::Spawn { generation: 2 }));
}
