//! What the spawner knows of one child: a state machine over the words of its sidecar and the clock.

use std::collections::{BTreeMap, BTreeSet};

use atoll_protocol::jail::JailedLayer;
use atoll_protocol::sidecar::{
    DeviceClass, GoodbyeReason, LogLevel, QueueProgress, SidecarFeatures, SidecarOrder, SidecarReport, TEXT_MAX,
};
use atoll_protocol::{Generation, PROTOCOL_VERSION, QueueIndex};

use super::event::{EventKind, ExitCause};
use super::spec::{JailPolicy, WatchLimits};
use crate::actor::Moment;

/// What the spawner is to do after a word or a deadline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchAction {
    /// Tell the listener.
    Event(EventKind),
    /// Tell the child.
    Order(SidecarOrder),
    /// Write to the log.
    Log(LogLevel, String),
    /// End it; the cause goes into the report of its exit.
    Kill(ExitCause),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Started; it has not said hello.
    Silent,
    /// It was told to start.
    Preparing,
    /// It serves.
    Ready,
    /// It said goodbye, or is being killed: only its exit matters now.
    Leaving,
}

#[derive(Clone, Copy, Debug)]
struct QueueWatch {
    completed: u64,
    in_flight: u32,
    /// Since when nothing was completed while something was in flight.
    since: Moment,
    told: bool,
}

/// The state of one child.
#[derive(Debug)]
pub struct Watch {
    class: DeviceClass,
    generation: Generation,
    /// It is started beside one that serves.
    beside: bool,
    limits: WatchLimits,
    phase: Phase,
    features: SidecarFeatures,
    /// When the present phase began, or the last word came.
    since: Moment,
    /// Since when it owes an answer to our ping.
    pinged: Option<Moment>,
    silence_told: bool,
    queues: BTreeMap<QueueIndex, QueueWatch>,
    goodbye: Option<GoodbyeReason>,
    was_ready: bool,
    policy: JailPolicy,
    /// How its jail came out, once it has said so.
    jail: Option<Vec<JailedLayer>>,
}

/// Of the pings that the watch sends itself; their answers are nobody else's business.
const PING_NONCE: u64 = 0;
/// More queues than any device has: a child that names more is wrong.
const QUEUES_MAX: usize = 1024;

impl Watch {
    /// A child that was started at `now`.
    #[must_use]
    pub fn new(class: DeviceClass, generation: Generation, limits: WatchLimits, now: Moment) -> Self {
        Self {
            class,
            generation,
            beside: false,
            limits,
            phase: Phase::Silent,
            features: SidecarFeatures::default(),
            since: now,
            pinged: None,
            silence_told: false,
            queues: BTreeMap::new(),
            goodbye: None,
            was_ready: false,
            policy: JailPolicy::default(),
            jail: None,
        }
    }

    /// How the child is to be jailed.
    #[must_use]
    pub fn jailed(self, policy: JailPolicy) -> Self {
        Self { policy, ..self }
    }

    /// Whether it is started beside another process that serves the device.
    #[must_use]
    pub fn beside(self, beside: bool) -> Self {
        Self { beside, ..self }
    }

    /// Whether it has ever been ready.
    #[must_use]
    pub fn was_ready(&self) -> bool {
        self.was_ready
    }

    /// What it said when it left, if it did.
    #[must_use]
    pub fn goodbye(&self) -> Option<&GoodbyeReason> {
        self.goodbye.as_ref()
    }

    /// The spawner kills it, or its exit has been asked for: deadlines no longer count.
    pub fn leaving(&mut self) {
        self.phase = Phase::Leaving;
    }

    /// The VMM itself was not running for this long (stopped, or starved): nobody is late because of that.
    pub fn postpone(&mut self, by: std::time::Duration) {
        self.since = self.since.after(by);
        self.pinged = self.pinged.map(|pinged| pinged.after(by));
        for queue in self.queues.values_mut() {
            queue.since = queue.since.after(by);
        }
    }

    /// A word of the child.
    pub fn hear(&mut self, report: SidecarReport, now: Moment) -> Vec<WatchAction> {
        if self.phase == Phase::Ready {
            self.since = now;
            self.pinged = None;
            self.silence_told = false;
        }
        match (self.phase, report) {
            (Phase::Leaving, SidecarReport::Goodbye { reason }) => {
                self.goodbye.get_or_insert(reason);
                Vec::new()
            }
            (_, SidecarReport::Log { text, .. }) if text.len() > TEXT_MAX => wrong("a log line is too long"),
            (_, SidecarReport::Log { level, text }) => vec![WatchAction::Log(level, text)],
            (Phase::Leaving, _) => Vec::new(),
            (Phase::Silent, SidecarReport::Hello { version, class, features, .. }) => {
                self.hello(version, class, features, now)
            }
            (_, SidecarReport::Goodbye { reason }) => {
                self.goodbye = Some(reason);
                self.phase = Phase::Leaving;
                Vec::new()
            }
            (Phase::Preparing, SidecarReport::Jailed { layers }) if self.jail.is_none() => self.jail(layers),
            (Phase::Preparing, SidecarReport::Ready { generation }) if generation == self.generation => {
                if self.policy == JailPolicy::Strict && self.jail.is_none() {
                    return vec![WatchAction::Kill(ExitCause::Unjailed(Vec::new()))];
                }
                self.phase = Phase::Ready;
                self.was_ready = true;
                self.since = now;
                let jail = self.jail.clone().unwrap_or_default();
                vec![WatchAction::Event(EventKind::Ready { features: self.features, jail })]
            }
            (Phase::Ready, SidecarReport::Progress { queues }) => self.progress(queues, now),
            (Phase::Ready, SidecarReport::Quiesced) => vec![WatchAction::Event(EventKind::Quiesced)],
            (Phase::Ready, SidecarReport::Measured { bytes }) => {
                vec![WatchAction::Event(EventKind::Measured { bytes })]
            }
            (Phase::Preparing | Phase::Ready, SidecarReport::Pong { nonce: PING_NONCE }) => Vec::new(),
            (Phase::Preparing | Phase::Ready, SidecarReport::Pong { nonce }) => {
                vec![WatchAction::Event(EventKind::Pong { nonce })]
            }
            (_, SidecarReport::Ready { .. }) => wrong("it said ready at the wrong time or for another generation"),
            (_, SidecarReport::Hello { .. }) => wrong("it said hello twice"),
            (Phase::Preparing | Phase::Ready, SidecarReport::Jailed { .. }) => {
                wrong("it told of its jail twice, or too late")
            }
            (Phase::Silent, _) => wrong("its first word was not hello"),
            (Phase::Preparing, _) => wrong("it reported before it was ready"),
        }
    }

    fn hello(&mut self, version: u16, class: DeviceClass, features: SidecarFeatures, now: Moment) -> Vec<WatchAction> {
        if version != PROTOCOL_VERSION {
            return wrong(&format!(
                "it speaks version {version} of the protocol, this build {PROTOCOL_VERSION}: use binaries of one release"
            ));
        }
        if class != self.class {
            return wrong(&format!("it serves a {class} device where a {} device belongs", self.class));
        }
        if self.beside && !features.contains(SidecarFeatures::BESIDE) {
            return wrong("it cannot wait beside a process that serves (no BESIDE on its sidecar)");
        }
        self.features = features;
        self.phase = Phase::Preparing;
        self.since = now;
        let progress_ms = u32::try_from(self.limits.progress.as_millis()).unwrap_or(u32::MAX);
        let generation = self.generation;
        vec![WatchAction::Order(if self.beside {
            SidecarOrder::StartBeside { generation, progress_ms }
        } else {
            SidecarOrder::Start { generation, progress_ms }
        })]
    }

    /// The last moment at which a process that is not jailed as it should be has not seen anything of the guest's.
    fn jail(&mut self, layers: Vec<JailedLayer>) -> Vec<WatchAction> {
        let mut named = BTreeSet::new();
        if !layers.iter().all(|layer| named.insert(layer.layer)) {
            return wrong("it named a layer of its jail twice");
        }
        let missing: Vec<JailedLayer> = layers.iter().copied().filter(|layer| !layer.stands()).collect();
        if self.policy == JailPolicy::Strict && (layers.is_empty() || !missing.is_empty()) {
            return vec![WatchAction::Kill(ExitCause::Unjailed(missing))];
        }
        self.jail = Some(layers);
        Vec::new()
    }

    fn progress(&mut self, queues: Vec<QueueProgress>, now: Moment) -> Vec<WatchAction> {
        for QueueProgress { queue, completed, in_flight } in &queues {
            if !self.queues.contains_key(queue) && self.queues.len() >= QUEUES_MAX {
                return wrong("it reports more queues than a device can have");
            }
            let known = self.queues.entry(*queue).or_insert(QueueWatch {
                completed: *completed,
                in_flight: 0,
                since: now,
                told: false,
            });
            if *completed < known.completed {
                return wrong("it took back completed requests");
            }
            if *completed > known.completed || known.in_flight == 0 {
                known.since = now;
                known.told = false;
            }
            known.completed = *completed;
            known.in_flight = *in_flight;
        }
        vec![WatchAction::Event(EventKind::Progress { queues })]
    }

    /// Looks at the deadlines. Call it after everything that the child said has been heard.
    pub fn check(&mut self, now: Moment) -> Vec<WatchAction> {
        let waited = now.since(self.since);
        match self.phase {
            Phase::Leaving => Vec::new(),
            Phase::Silent if waited >= self.limits.ready => {
                vec![WatchAction::Kill(ExitCause::NeverHello(self.limits.ready))]
            }
            Phase::Preparing if waited >= self.limits.ready => {
                vec![WatchAction::Kill(ExitCause::NeverReady(self.limits.ready))]
            }
            Phase::Silent | Phase::Preparing => Vec::new(),
            Phase::Ready => {
                let stall = self.limits.stall;
                let mut actions = Vec::new();
                match self.pinged {
                    // A backend may keep silent while nothing changes; then it is asked.
                    None if waited >= stall => {
                        self.pinged = Some(now);
                        actions.push(WatchAction::Order(SidecarOrder::Ping { nonce: PING_NONCE }));
                    }
                    Some(pinged) if !self.silence_told && now.since(pinged) >= stall => {
                        self.silence_told = true;
                        actions.push(stalled(None));
                    }
                    _ => {}
                }
                for (index, queue) in &mut self.queues {
                    if queue.in_flight > 0 && !queue.told && now.since(queue.since) >= stall {
                        queue.told = true;
                        actions.push(stalled(Some(*index)));
                    }
                }
                actions
            }
        }
    }

    /// The next moment at which [`Self::check`] can have something to say.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        match self.phase {
            Phase::Leaving => None,
            Phase::Silent | Phase::Preparing => Some(self.since.after(self.limits.ready)),
            Phase::Ready => {
                let silence = (!self.silence_told).then_some(self.pinged.unwrap_or(self.since));
                let queues = self.queues.values().filter(|queue| queue.in_flight > 0 && !queue.told);
                queues.map(|queue| queue.since).chain(silence).min().map(|since| since.after(self.limits.stall))
            }
        }
    }
}

fn stalled(queue: Option<QueueIndex>) -> WatchAction {
    WatchAction::Event(EventKind::Stalled { queue })
}

fn wrong(what: &str) -> Vec<WatchAction> {
    vec![WatchAction::Kill(ExitCause::Wrong(what.to_owned()))]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use atoll_protocol::ProcessId;
    use atoll_protocol::jail::{JailLayer, JailOutcome};

    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::from_start(Duration::from_millis(ms))
    }

    fn limits() -> WatchLimits {
        let ms = Duration::from_millis;
        WatchLimits { ready: ms(100), progress: ms(10), stall: ms(50) }
    }

    fn hello() -> SidecarReport {
        SidecarReport::Hello {
            version: PROTOCOL_VERSION,
            class: DeviceClass::Block,
            pid: ProcessId(1),
            features: SidecarFeatures::PROGRESS,
        }
    }

    fn ready() -> SidecarReport {
        SidecarReport::Ready { generation: Generation(4) }
    }

    fn progress(completed: u64, in_flight: u32) -> SidecarReport {
        SidecarReport::Progress { queues: vec![QueueProgress { queue: QueueIndex(1), completed, in_flight }] }
    }

    fn watch() -> Watch {
        Watch::new(DeviceClass::Block, Generation(4), limits(), at(0))
    }

    fn running() -> Watch {
        let mut watch = watch();
        let order = SidecarOrder::Start { generation: Generation(4), progress_ms: 10 };
        assert_eq!(watch.hear(hello(), at(90)), [WatchAction::Order(order)]);
        assert_eq!(watch.check(at(189)), [], "the deadline of ready counts from hello");
        let features = SidecarFeatures::PROGRESS;
        assert_eq!(watch.hear(ready(), at(189)), [WatchAction::Event(EventKind::Ready { features, jail: Vec::new() })]);
        watch
    }

    /// Never hello, never ready: killed at the deadline, and the report says which.
    #[test]
    fn start_has_deadlines() {
        let mut silent = watch();
        assert_eq!(silent.next_deadline(), Some(at(100)));
        assert_eq!(silent.check(at(99)), []);
        assert_eq!(silent.check(at(100)), [WatchAction::Kill(ExitCause::NeverHello(limits().ready))]);
        let mut preparing = watch();
        preparing.hear(hello(), at(10));
        assert_eq!(preparing.check(at(110)), [WatchAction::Kill(ExitCause::NeverReady(limits().ready))]);
    }

    /// One queue stands with a request in flight while reports go on: that queue is stalled, said once, until it moves.
    /// Then no report comes at all: the process is asked, and is stalled when it does not answer that either.
    #[test]
    fn stalls_are_per_queue_and_told_once() {
        let mut watch = running();
        for (now, completed, in_flight) in [(200, 5, 0), (210, 5, 3), (220, 5, 3), (250, 5, 4)] {
            assert_eq!(watch.hear(progress(completed, in_flight), at(now)).len(), 1);
            assert_eq!(watch.check(at(now)), []);
        }
        assert_eq!(watch.next_deadline(), Some(at(260)), "counted from when the first request was seen");
        let told = [WatchAction::Event(EventKind::Stalled { queue: Some(QueueIndex(1)) })];
        assert_eq!(watch.check(at(260)), told);
        assert_eq!(watch.check(at(290)), []);
        watch.hear(progress(6, 4), at(295));
        assert_eq!(watch.check(at(344)), []);
        let ping = WatchAction::Order(SidecarOrder::Ping { nonce: PING_NONCE });
        assert_eq!(watch.check(at(345)), [ping.clone(), told[0].clone()]);
        assert_eq!(watch.check(at(394)), []);
        assert_eq!(watch.check(at(395)), [WatchAction::Event(EventKind::Stalled { queue: None })]);
        assert_eq!(watch.check(at(500)), []);
        assert_eq!(watch.next_deadline(), None);
        assert_eq!(watch.hear(SidecarReport::Pong { nonce: PING_NONCE }, at(600)), []);
        assert_eq!(watch.check(at(649)), []);
        assert_eq!(watch.check(at(650)), [ping], "it lives again, and is watched again");
    }

    /// The VMM was stopped for a minute: no child is late because of that.
    #[test]
    fn own_absence_is_not_counted() {
        let mut watch = running();
        watch.hear(progress(1, 1), at(200));
        watch.postpone(Duration::from_mins(1));
        assert_eq!(watch.check(at(60_230)), []);
        assert_eq!(watch.check(at(60_250)).len(), 2, "the queue is told, the process asked");
    }

    /// A strict jail: what it lacks ends the process before it has seen anything, and silence about it does, too.
    #[test]
    fn a_strict_jail_is_whole_or_refused() {
        let stands = JailedLayer { layer: JailLayer::Calls, outcome: JailOutcome::Applied };
        let lacks = JailedLayer { layer: JailLayer::Scopes, outcome: JailOutcome::KernelLacks };
        let strict = || {
            let mut watch = watch().jailed(JailPolicy::Strict);
            watch.hear(hello(), at(1));
            watch
        };
        let jailed = |layers: &[JailedLayer]| SidecarReport::Jailed { layers: layers.to_vec() };
        let refused = |missing: &[JailedLayer]| [WatchAction::Kill(ExitCause::Unjailed(missing.to_vec()))];
        assert_eq!(strict().hear(jailed(&[stands, lacks]), at(2)), refused(&[lacks]));
        assert_eq!(strict().hear(jailed(&[]), at(2)), refused(&[]));
        assert_eq!(strict().hear(ready(), at(2)), refused(&[]));
        let mut whole = strict();
        assert_eq!(whole.hear(jailed(&[stands]), at(2)), []);
        let (features, jail) = (SidecarFeatures::PROGRESS, vec![stands]);
        assert_eq!(whole.hear(ready(), at(2)), [WatchAction::Event(EventKind::Ready { features, jail })]);
        let mut content = watch();
        content.hear(hello(), at(1));
        assert_eq!(content.hear(jailed(&[stands, lacks]), at(2)), []);
        let (features, jail) = (SidecarFeatures::PROGRESS, vec![stands, lacks]);
        assert_eq!(content.hear(ready(), at(2)), [WatchAction::Event(EventKind::Ready { features, jail })]);
    }

    /// Words that cannot be right, each in the state in which they cannot.
    #[test]
    fn wrong_words_kill() {
        let other = SidecarReport::Ready { generation: Generation(3) };
        let version = SidecarReport::Hello {
            version: PROTOCOL_VERSION + 1,
            class: DeviceClass::Block,
            pid: ProcessId(1),
            features: SidecarFeatures::default(),
        };
        let class = SidecarReport::Hello {
            version: PROTOCOL_VERSION,
            class: DeviceClass::Net,
            pid: ProcessId(1),
            features: SidecarFeatures::default(),
        };
        let long = SidecarReport::Log { level: LogLevel::Info, text: "x".repeat(TEXT_MAX + 1) };
        let stands = JailedLayer { layer: JailLayer::Calls, outcome: JailOutcome::Applied };
        let jailed = |layers: &[JailedLayer]| SidecarReport::Jailed { layers: layers.to_vec() };
        let cases: [(&str, Vec<SidecarReport>); 13] = [
            ("jailed before hello", vec![jailed(&[stands])]),
            ("jailed twice", vec![hello(), jailed(&[stands]), jailed(&[stands])]),
            ("jailed when it is ready", vec![hello(), ready(), jailed(&[stands])]),
            ("a layer twice", vec![hello(), jailed(&[stands, stands])]),
            ("another version", vec![version]),
            ("another class", vec![class]),
            ("ready before hello", vec![ready()]),
            ("progress before hello", vec![progress(1, 1)]),
            ("hello twice", vec![hello(), hello()]),
            ("progress before ready", vec![hello(), progress(1, 1)]),
            ("another generation", vec![hello(), other]),
            ("completed goes back", vec![hello(), ready(), progress(2, 0), progress(1, 0)]),
            ("a long line", vec![hello(), long]),
        ];
        for (name, words) in cases {
            let mut watch = watch();
            let mut last = Vec::new();
            for word in words {
                assert!(!matches!(last.as_slice(), [WatchAction::Kill(_)]), "{name}: killed too early");
                last = watch.hear(word, at(1));
            }
            assert!(matches!(last.as_slice(), [WatchAction::Kill(ExitCause::Wrong(_))]), "{name}: {last:?}");
        }
    }
}
