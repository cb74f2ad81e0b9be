//! What an operator is told of a process that is kept alive: how it is when he asks, and its deaths and returns as they happen.

use std::sync::{Mutex, MutexGuard, PoisonError};

use atoll_protocol::Generation;
use atoll_protocol::jail::JailedLayer;

use super::event::{BackendExit, ExitCause};
use crate::config::DeviceKind;
use crate::lifecycle::{DeviceReport, DeviceState, RecoveryClass, Story};

/// The process as it was last heard of; the device's thread, the spawner and the supervisor write here.
#[derive(Default)]
pub(super) struct Standing {
    known: Mutex<Known>,
    name: String,
    /// Where its lives are told.
    story: Option<Story>,
}

#[derive(Debug, Default)]
struct Known {
    generation: u64,
    pid: Option<u32>,
    serves: bool,
    given_up: Option<String>,
    lost: u64,
    failed_starts: u64,
    jail: Vec<JailedLayer>,
    last_exit: Option<String>,
    last_lines: Vec<String>,
}

impl Standing {
    /// A process of this name, whose lives are told in `story`.
    pub(super) fn new(name: String, story: Option<Story>) -> Self {
        Self { known: Mutex::default(), name, story }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: &str, generation: u64, reason: Option<String>) {
        if let Some(story) = &self.story {
            let known = [("id", self.name.clone()), ("generation", generation.to_string())];
            story.tell("device", event, known.into_iter().chain(reason.map(|reason| ("reason", reason))));
        }
    }

    /// An incarnation was started.
    pub(super) fn started(&self, generation: Generation, pid: u32) {
        let mut known = self.lock();
        (known.generation, known.pid, known.given_up) = (generation.0, Some(pid), None);
    }

    /// It is ready.
    pub(super) fn ready(&self, jail: &[JailedLayer]) {
        let mut known = self.lock();
        (known.serves, known.jail) = (true, jail.to_vec());
        if known.lost + known.failed_starts > 0 {
            let (device, generation) = (&self.name, known.generation);
            tracing::warn!(device, generation, "backend is back");
            self.tell("restarted", generation, None);
        }
    }

    /// It has ended.
    pub(super) fn exited(&self, exit: &BackendExit) {
        let mut known = self.lock();
        let served = std::mem::take(&mut known.serves);
        known.lost += u64::from(served && exit.cause != ExitCause::Asked);
        known.failed_starts += u64::from(!served && exit.cause != ExitCause::Asked);
        known.pid = None;
        (known.last_exit, known.last_lines) = (Some(exit.to_string()), exit.last_stderr.clone());
        if exit.cause != ExitCause::Asked {
            let (device, generation) = (&self.name, known.generation);
            tracing::warn!(device, generation, %exit, "backend lost");
            self.tell(if served { "crashed" } else { "start-failed" }, generation, Some(exit.to_string()));
        }
    }

    /// There will be no other.
    pub(super) fn given_up(&self, why: String) {
        let mut known = self.lock();
        let (device, generation) = (&self.name, known.generation);
        tracing::error!(device, why, "device quarantined until the operator revives it");
        self.tell("quarantined", generation, Some(why.clone()));
        known.given_up = Some(why);
    }

    /// For people. A port's successor begins with its registers as at power-on, so only an idle one comes back as it was.
    pub(super) fn report(&self, id: &str, kind: DeviceKind) -> DeviceReport {
        let known = self.lock();
        let (state, reason) = match (&known.given_up, known.serves) {
            (Some(why), _) => (DeviceState::Quarantined, Some(why.clone())),
            (None, true) => (DeviceState::Running, None),
            (None, false) => (DeviceState::Recovering, known.last_exit.clone()),
        };
        DeviceReport {
            id: id.to_owned(),
            kind,
            bdf: None,
            state,
            reason,
            generation: known.generation,
            restarts: known.lost,
            failed_starts: known.failed_starts,
            upgrade: None,
            link: None,
            recovery: if kind == DeviceKind::Display { RecoveryClass::ContextLoss } else { RecoveryClass::IdleOnly },
            counted: None,
            pid: known.pid,
            exe: None,
            standby: None,
            jail: known.jail.iter().map(|layer| (layer.layer.to_string(), layer.outcome.to_string())).collect(),
            last_exit: known.last_exit.clone(),
            last_lines: known.last_lines.clone(),
            queues: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::event::ExitStatus;
    use crate::lifecycle::Heard;

    #[test]
    fn lives_are_told() {
        let story = Story::default();
        let heard = story.subscribe();
        let told = || match heard.next(Duration::from_secs(60)) {
            Heard::Event(event) => event.event,
            other => format!("{other:?}"),
        };
        let standing = Standing::new("serial1".into(), Some(story));
        standing.started(Generation(1), 77);
        standing.ready(&[]);
        let report = standing.report("serial1", DeviceKind::Uart);
        assert_eq!((report.state, report.pid, report.restarts), (DeviceState::Running, Some(77), 0));
        let last_stderr = vec!["ouch".to_owned()];
        let (status, cause) = (ExitStatus::Signal(9), ExitCause::Unknown);
        let exit = BackendExit { name: "serial1".into(), status, cause, was_ready: true, last_stderr };
        standing.exited(&exit);
        let report = standing.report("serial1", DeviceKind::Uart);
        assert_eq!((report.state, report.pid, report.restarts), (DeviceState::Recovering, None, 1));
        assert_eq!(report.last_lines, ["ouch"]);
        assert_eq!(told(), "crashed");
        standing.started(Generation(2), 78);
        standing.exited(&exit);
        assert_eq!(told(), "start-failed");
        standing.given_up("it crashes and crashes".into());
        let report = standing.report("serial1", DeviceKind::Uart);
        // One that was never ready was not lost.
        assert_eq!((report.state, report.generation, report.restarts), (DeviceState::Quarantined, 2, 1));
        assert_eq!(told(), "quarantined");
        standing.started(Generation(3), 79);
        standing.ready(&[]);
        assert_eq!(told(), "restarted");
    }
}
