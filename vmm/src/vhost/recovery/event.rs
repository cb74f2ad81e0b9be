//! What the recovery machine hears, and what it wants done.

use crate::backend::Ending;
use crate::vhost::device::Recovery;

/// Something happened. Generations tell whose news it is; news of an incarnation that is not there any more changes
/// nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// An incarnation that was to be started is there, was greeted, and offers what the guest was shown. One that was not
    /// started beside another says so only when nothing of its predecessor is under way any more.
    Greeted { generation: u64, recovery: Recovery },
    /// It could not be started, or greeted; nothing of it is left.
    NotStarted { generation: u64, failure: Failure },
    /// The rings are with it, each enabled.
    HandedOver { generation: u64 },
    /// A step of that failed: it may have some of them.
    HandOverFailed { generation: u64, failure: Failure },
    /// Somebody has closed the gate: the rings stayed here.
    Withheld,
    /// It has given the rings back and touches them no more.
    TakenBack { generation: u64 },
    /// It is to be taken for dead: it ended, hung up, was late or absurd.
    Lost { generation: u64, why: String },
    /// It was killed, and is reaped, or nothing more of its end can be seen.
    Ended { generation: u64, end: End },
    /// How far the rings are. Spared: the backend is being debugged.
    Sampled { samples: Vec<super::Sample>, spared: bool },
    /// It says, or somebody saw, that it stands. Spared: it is being debugged.
    Stalled { generation: u64, what: String, spared: bool },
    /// Nothing of any dead incarnation is under way any more.
    FencePassed,
    /// The stand-in has the rings.
    Employed,
    /// There is no stand-in to be had.
    NotEmployed,
    /// What was unfinished without a record has been failed, once; or could not be.
    Settled(Result<(), String>),
    /// The driver has set up its rings.
    Activated,
    /// The driver has reset the device.
    Reset,
    /// The rings are to stay here.
    Pause,
    /// They may go out again.
    Resume,
    /// The board goes; the driver with it.
    Leave,
    /// The device ends.
    Stop,
    /// Another board has come.
    Arrive,
    /// The operator wants it back.
    Revive,
    /// The operator wants another build in the present one's place.
    Upgrade,
    /// What the device knows has moved from the present backend to the new build's.
    Transferred { generation: u64 },
    /// It has not: the new one does not take it, or is gone. The present one has lost nothing.
    NotTransferred { generation: u64, why: String },
    /// What a spare was told of the device is not true any more.
    Outdated,
    /// Time has passed.
    Time,
}

/// Why an incarnation does not serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It is gone or silent; another one may do better.
    Passing(String),
    /// Another one would end the same way: it refuses, or lacks what the guest was shown.
    Hopeless(String),
}

/// How an incarnation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    /// As a restart sees it.
    pub(crate) ending: Ending,
    /// It completed something since it got the rings.
    pub(crate) progressed: bool,
    /// It left requests without an answer.
    pub(crate) unfinished: bool,
}

/// Which program an incarnation is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Build {
    /// That of the backend that serves.
    Present,
    /// That which is to replace it.
    New,
}

/// Why rings are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TakeBack {
    /// The driver has reset the device.
    Reset,
    /// The device is paused.
    Pause,
    /// The board goes.
    Leave,
    /// A new build is to take its place.
    Upgrade,
}

/// What an operator hears of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tale {
    /// It is lost.
    Crashed { generation: u64 },
    /// Its successor serves, or could.
    Restarted { generation: u64 },
    /// Its successor could not be started, this often in a row by now; told for the first one, and then for each that
    /// doubles the number.
    StartFailed { generation: u64, times: u32, why: String },
    /// None is to be had, and is waited for without limit.
    Waiting { why: String },
    /// No backend serves it any more.
    Quarantined { why: String },
    /// It stands, and is left alone.
    Stalled { what: String },
    /// Nobody could show that a dead backend's writes are done.
    FenceGivenUp,
    /// A new build is being tried.
    UpgradeStarted { generation: u64 },
    /// It serves, and so will its successors.
    Upgraded { generation: u64 },
    /// The old build carries on, or is back.
    UpgradeRefused { why: String },
    /// The new build served, and died too soon to be kept: the old one is started again.
    RolledBack { why: String },
    /// A spare waits.
    SpareReady { generation: u64 },
    /// The spare is gone; there will be another.
    SpareLost { generation: u64, why: String },
}

/// Something is to be done, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start or reach this incarnation and greet it; tell `Greeted` or `NotStarted`.
    Spawn { generation: u64 },
    /// The same beside the one that serves: of the new build, or of the present one.
    SpawnBeside { generation: u64, build: Build },
    /// One that was greeted is the device's backend from now on, and its build that of its successors.
    Promote { generation: u64 },
    /// End one that was started beside, whatever it is at. It never had rings; nobody waits for its end.
    DropBeside { generation: u64 },
    /// Move what the device knows from one backend to the other; neither has rings. Tell `Transferred` or
    /// `NotTransferred`, or `Lost` of the first.
    Transfer { from: u64, to: u64 },
    /// The build before the last one promoted is that of the successors again.
    Revert,
    /// Hang up, kill it, reap it; tell `Ended`, once it has.
    Kill { generation: u64 },
    /// Look for the proof that nothing of the dead is under way; tell `FencePassed`.
    WatchFence,
    /// The fence is behind us.
    Settled,
    /// Hand over the rings, from the start or from where they are; tell `HandedOver`, `HandOverFailed`, `Withheld`.
    HandOver { generation: u64, continued: bool },
    /// Kick every ring once, and where `call`, call it too: the last ones before a death may be lost.
    Kick { call: bool },
    /// Show the driver what the successor's configuration has that the last one's had not.
    ShowConfig,
    /// Take the rings back; tell `TakenBack` or `Lost`.
    TakeBack { generation: u64, why: TakeBack },
    /// Let the stand-in take the rings; tell `Employed`, `NotEmployed` or `Withheld`.
    Employ,
    /// Take them back from it.
    Dismiss,
    /// Fail what is unfinished without a record; tell `Settled`.
    Settle,
    /// Forget every request in flight.
    ClearRecord,
    /// The driver's activation is done.
    CompleteActivation,
    /// The driver's resets are done.
    CompleteResets,
    /// Set DEVICE_NEEDS_RESET.
    NeedsReset,
    /// Ask the machine to unplug the device.
    AskUnplug,
    /// Tell the story.
    Tell(Tale),
}

/// What a spare is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpareState {
    /// None is wanted.
    Off,
    /// It is wanted, and not there yet.
    Coming,
    /// It waits.
    Ready(u64),
}

/// What the device is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// A backend is there; it has no rings.
    Idle,
    /// A backend has the rings.
    Running,
    /// Another backend is on its way.
    Recovering { why: String },
    /// There is none to be had now; it is waited for without limit.
    Waiting { why: String },
    /// Given up until a reset or an operator.
    Quarantined { why: String },
}
