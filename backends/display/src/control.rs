//! The conversation with the VMM: one order, one answer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use atoll_protocol::display::SCANOUTS_MAX;
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::{Frame, FrameSocket, SocketError};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::ready;
use crate::record::{RecordError, Recording};
use crate::shot::{self, ShotError};
use crate::stage::{SIDE_MAX, SIDE_MIN, Stage};

/// How long the VMM may leave an answer unread.
const SEND_MAX: Duration = Duration::from_secs(2);

/// Why the conversation ends.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The VMM speaks another language, or does not read.
    #[error("the control socket failed: {0}")]
    Socket(#[from] SocketError),
    /// It cannot be waited for.
    #[error("the control socket cannot be waited for: {0}")]
    Wait(#[from] io::Error),
}

/// Why an order is not carried out; its words are the answer.
#[derive(Debug, Error)]
enum Refusal {
    #[error("there is no head {0}: there are 0 to {last}", last = SCANOUTS_MAX - 1)]
    NoHead(u32),
    #[error("this order needs one descriptor beside it; {0} came")]
    Descriptors(usize),
    #[error("head {0} is being recorded already: stop that first (`atoll record VM --stop`)")]
    Recorded(u32),
    #[error("head {0} is not being recorded")]
    NotRecorded(u32),
    #[error("a head has {SIDE_MIN} to {SIDE_MAX} columns and rows, not {0} by {1}")]
    Size(u32, u32),
    #[error("the device does not hear of sizes: the guest was not told")]
    NoFollower,
    #[error("another device's socket is being taken over: ask again")]
    Busy,
    #[error(transparent)]
    Shot(#[from] ShotError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the recording was lost")]
    Lost,
}

struct Tape {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<u32, RecordError>>,
}

/// Obeys a VMM.
pub struct Control {
    stage: Arc<Stage>,
    displays: mpsc::Sender<OwnedFd>,
    tapes: BTreeMap<u32, Tape>,
}

impl Control {
    /// Sockets of devices go to `displays`.
    #[must_use]
    pub fn new(stage: Arc<Stage>, displays: mpsc::Sender<OwnedFd>) -> Self {
        Self { stage, displays, tapes: BTreeMap::new() }
    }

    /// Obeys until the VMM hangs up.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn attend(&mut self, socket: OwnedFd) -> Result<(), ControlError> {
        let ready = ready::watch(socket.try_clone()?)?;
        let mut socket = FrameSocket::new(socket);
        loop {
            let mut guard = ready.readable().await?;
            match socket.reader.receive(Some(Duration::ZERO)) {
                Ok(frame) => {
                    let (report, beside) = self.obey(frame).await?;
                    let beside: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
                    socket.writer.send(&report, &beside, SEND_MAX)?;
                }
                Err(SocketError::Timeout(_)) => guard.clear_ready(),
                Err(error) if error.is_hang_up() => break,
                Err(error) => return Err(error.into()),
            }
        }
        for (head, tape) in std::mem::take(&mut self.tapes) {
            tracing::info!(head, "a recording ends with who wanted it");
            let _ = tape.stop.send(());
            // What cannot be finished by then stays as it is.
            let _ = timeout(SEND_MAX, tape.task).await;
        }
        Ok(())
    }

    async fn obey(&mut self, frame: Frame) -> Result<(DisplayReport, Option<OwnedFd>), SocketError> {
        let order = frame.decode::<DisplayOrder>()?;
        let outcome = self.carry_out(order, frame.descriptors).await;
        Ok(outcome.unwrap_or_else(|refusal| (DisplayReport::Refused { reason: refusal.to_string() }, None)))
    }

    async fn carry_out(
        &mut self,
        order: DisplayOrder,
        mut beside: Vec<OwnedFd>,
    ) -> Result<(DisplayReport, Option<OwnedFd>), Refusal> {
        let mut one = || match (beside.pop(), beside.len()) {
            (Some(fd), 0) => Ok(fd),
            (first, others) => Err(Refusal::Descriptors(usize::from(first.is_some()) + others)),
        };
        let number =
            |head: u32| usize::try_from(head).ok().filter(|head| *head < SCANOUTS_MAX).ok_or(Refusal::NoHead(head));
        let report = match order {
            DisplayOrder::Screenshot { head } => {
                let picture = self.stage.lock().shown(number(head)?);
                let picture = picture.ok_or(ShotError::Dark(head as usize))?;
                let (width, height) = picture.size();
                let file = shot::sealed(&shot::png(&picture)?)?;
                return Ok((DisplayReport::Screenshot { head, width, height }, Some(file)));
            }
            DisplayOrder::Record { head } => {
                let file = File::from(one()?);
                self.record(number(head)?, head, file)?;
                DisplayReport::Done
            }
            DisplayOrder::StopRecord { head } => {
                let tape = self.tapes.remove(&head).ok_or(Refusal::NotRecorded(head))?;
                // One that has ended by itself says why.
                let _ = tape.stop.send(());
                let frames = tape.task.await.map_err(|_| Refusal::Lost)?;
                self.mark(number(head)?, false);
                DisplayReport::Recorded { head, frames: frames? }
            }
            DisplayOrder::NewDisplay => {
                self.displays.try_send(one()?).map_err(|_| Refusal::Busy)?;
                DisplayReport::Done
            }
            DisplayOrder::NewInput { kind } => {
                self.stage.seat().connect(kind, one()?);
                DisplayReport::Done
            }
            DisplayOrder::Resize { head, width, height } => {
                if [width, height].iter().any(|side| !(SIDE_MIN..=SIDE_MAX).contains(side)) {
                    return Err(Refusal::Size(width, height));
                }
                if !self.stage.resize(number(head)?, (width, height)) {
                    return Err(Refusal::NoFollower);
                }
                DisplayReport::Done
            }
            DisplayOrder::Info => {
                let heads = self.stage.lock();
                DisplayReport::Info { heads: heads.describe(), connected: heads.connected }
            }
        };
        Ok((report, None))
    }

    fn record(&mut self, number: usize, head: u32, file: File) -> Result<(), Refusal> {
        if self.tapes.contains_key(&head) {
            return Err(Refusal::Recorded(head));
        }
        let recording = Recording::begin(&self.stage, number, file)?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(recording.run(Arc::clone(&self.stage), stopped));
        self.mark(number, true);
        self.tapes.insert(head, Tape { stop, task });
        Ok(())
    }

    fn mark(&self, head: usize, recorded: bool) {
        if let Some(mark) = self.stage.lock().recorded.get_mut(head) {
            *mark = recorded;
        }
    }
}
