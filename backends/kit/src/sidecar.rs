//! The channel to the supervisor that started this process (`--sidecar-fd`).
//!
//! One thread of the process belongs to it: it answers orders, reports how far each queue is, and ends the
//! process when the supervisor hangs up, because a backend must not outlive its VMM. It answers a ping only when every
//! queue thread goes round: that this thread lives says nothing. Without a supervisor the process serves whoever
//! connects, and there is no such thread.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_protocol::sidecar::{
    DeviceClass, GoodbyeReason, LogLevel, QueueProgress, SidecarFeatures, SidecarOrder, SidecarReport, cut_text,
};
use atoll_protocol::{FrameReader, FrameSocket, FrameWriter, PROTOCOL_VERSION, SocketError};
use atoll_protocol::{Generation, ProcessId, QueueIndex};
use thiserror::Error;

use crate::bad_build::{self, Bad};
use crate::worker::QueuePulse;

/// How long the supervisor may take to take a report.
const SEND_MAX: Duration = Duration::from_secs(2);
/// How long a queue thread may take to show that it goes round.
const PULSE_MAX: Duration = Duration::from_secs(1);
/// How long the supervisor may take to say start.
const START_MAX: Duration = Duration::from_secs(30);

/// The supervisor is gone or speaks another language.
#[derive(Debug, Error)]
#[error("the sidecar failed: {0}")]
pub struct SidecarError(#[from] SocketError);

/// The sending half; cheap to clone, for reports from any thread.
#[derive(Debug, Clone)]
pub struct Reports {
    writer: Arc<Mutex<FrameWriter>>,
}

impl Reports {
    /// Sends one report.
    pub fn send(&self, report: &SidecarReport) -> Result<(), SidecarError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(writer.send(report, &[], SEND_MAX)?)
    }

    /// A line for the supervisor's log. One that cannot be sent is lost: the hang-up is noticed elsewhere.
    pub fn log(&self, level: LogLevel, text: &str) {
        let _ = self.send(&SidecarReport::Log { level, text: cut_text(text).to_owned() });
    }

    /// The last word.
    pub fn goodbye(&self, reason: GoodbyeReason) {
        let _ = self.send(&SidecarReport::Goodbye { reason });
    }
}

/// The sidecar between hello and start.
#[derive(Debug)]
pub struct Sidecar {
    reader: FrameReader,
    reports: Reports,
    serving: Arc<AtomicBool>,
}

/// What the supervisor said at the start.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// Which incarnation this is.
    pub generation: Generation,
    /// Another one serves.
    pub beside: bool,
}

/// What the sidecar's thread asks of the process.
pub trait Orders: Send + 'static {
    /// Finish what is in flight and take nothing new.
    fn quiesce(&self);
    /// Finish what is in flight, clean up and end; the goodbye is sent by the callee.
    fn exit(&self, reports: &Reports) -> !;
    /// Looks what size the device has now, in bytes; zero for one that has none.
    fn measure(&self) -> u64 {
        0
    }
    /// The supervisor is gone: end at once.
    fn orphaned(&self) -> !;
}

impl Sidecar {
    /// Says hello on an inherited descriptor.
    pub fn hello(fd: OwnedFd, class: DeviceClass) -> Result<Self, SidecarError> {
        let features =
            SidecarFeatures::PROGRESS | SidecarFeatures::QUIESCE | SidecarFeatures::INFLIGHT | SidecarFeatures::BESIDE;
        let measures = if class == DeviceClass::Block { SidecarFeatures::MEASURE } else { SidecarFeatures::default() };
        let features = features | measures;
        Self::introduce(fd, class, features)
    }

    /// Says hello for a device that is no vhost-user device, and can what `features` say.
    pub fn introduce(fd: OwnedFd, class: DeviceClass, features: SidecarFeatures) -> Result<Self, SidecarError> {
        bad_build::fail(Some(Bad::DiesAtStart), Some(Bad::HangsBeforeHello));
        let (reader, writer) = FrameSocket::new(fd).split();
        let reports = Reports { writer: Arc::new(Mutex::new(writer)) };
        reports.send(&SidecarReport::Hello {
            version: PROTOCOL_VERSION,
            class,
            pid: ProcessId(std::process::id()),
            features,
        })?;
        Ok(Self { reader, reports, serving: Arc::default() })
    }

    /// The sending half.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// To be set when the device serves: progress before that is nothing that a supervisor wants to hear.
    pub fn serving(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.serving)
    }

    /// Starts the thread; the receiver gets what the supervisor says at the start.
    pub fn attend(self, queues: Vec<Arc<QueuePulse>>, orders: impl Orders) -> std::io::Result<Receiver<Started>> {
        let (start, started) = sync_channel(1);
        std::thread::Builder::new()
            .name("sidecar".to_owned())
            .stack_size(256 << 10)
            .spawn(move || attend(self, &queues, &orders, &start))?;
        Ok(started)
    }
}

fn attend(mut sidecar: Sidecar, queues: &[Arc<QueuePulse>], orders: &impl Orders, start: &SyncSender<Started>) {
    let begun = Instant::now();
    let mut running = false;
    let mut interval = None;
    let mut last = Vec::new();
    loop {
        let wait = if running {
            interval
        } else {
            Some(START_MAX.saturating_sub(begun.elapsed()).max(Duration::from_millis(1)))
        };
        match sidecar.reader.receive_message::<SidecarOrder>(wait) {
            Ok(SidecarOrder::Start { generation, progress_ms }) => {
                running = true;
                interval = (progress_ms > 0).then(|| Duration::from_millis(progress_ms.into()));
                let _ = start.try_send(Started { generation, beside: false });
            }
            Ok(SidecarOrder::StartBeside { generation, progress_ms }) => {
                running = true;
                interval = (progress_ms > 0).then(|| Duration::from_millis(progress_ms.into()));
                let _ = start.try_send(Started { generation, beside: true });
            }
            Ok(SidecarOrder::Ping { nonce }) => {
                // Silence is the truth about a queue thread that hangs.
                if all_beat(queues) && sidecar.reports.send(&SidecarReport::Pong { nonce }).is_err() {
                    orders.orphaned();
                }
            }
            Ok(SidecarOrder::Quiesce) => {
                orders.quiesce();
                if sidecar.reports.send(&SidecarReport::Quiesced).is_err() {
                    orders.orphaned();
                }
            }
            Ok(SidecarOrder::Exit) => orders.exit(&sidecar.reports),
            Ok(SidecarOrder::Measure) => {
                let bytes = orders.measure();
                if sidecar.reports.send(&SidecarReport::Measured { bytes }).is_err() {
                    orders.orphaned();
                }
            }
            Err(SocketError::Timeout(_)) if running => {
                if !sidecar.serving.load(Ordering::Acquire) {
                    continue;
                }
                let now = progress(queues);
                // Nothing new is no news: an idle disk costs its supervisor nothing.
                if now != last {
                    if sidecar.reports.send(&SidecarReport::Progress { queues: now.clone() }).is_err() {
                        orders.orphaned();
                    }
                    last = now;
                }
            }
            Err(e) => {
                tracing::error!(error = %e, "the supervisor is gone");
                orders.orphaned();
            }
        }
    }
}

/// Asks all queue threads to show that they go round, and waits a moment for it.
fn all_beat(queues: &[Arc<QueuePulse>]) -> bool {
    queues.iter().for_each(|queue| queue.ask());
    let deadline = Instant::now() + PULSE_MAX;
    while !queues.iter().all(|queue| queue.beats()) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn progress(queues: &[Arc<QueuePulse>]) -> Vec<QueueProgress> {
    queues
        .iter()
        .zip(0_u16..)
        .map(|(counters, index)| {
            let completed = counters.completed.load(Ordering::Relaxed);
            let in_flight = counters.taken.load(Ordering::Relaxed).saturating_sub(completed);
            QueueProgress { queue: QueueIndex(index), completed, in_flight: in_flight as u32 }
        })
        .collect()
}
