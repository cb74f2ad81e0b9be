//! A successor in the making: started and greeted on a thread of its own, so that the device's thread hears the driver, a
//! pause or the end of the machine meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::virtio::DeviceOffer;

use super::Session;
use crate::seccomp::{self, ThreadClass};
use crate::vhost::device::{ConnectError, Shared, greet};
use crate::vhost::parts::Makers;
use crate::vhost::patience::Ending;
use crate::vhost::session::Preface;
use crate::vhost::source::Start;

/// How long one that came too late may take to end.
const REAP: Duration = Duration::from_secs(2);

pub(super) type Outcome = Result<(Box<Session>, DeviceOffer), ConnectError>;

/// Which incarnation is to be made, and how.
#[derive(Clone)]
pub(super) struct Make {
    pub(super) generation: u64,
    pub(super) start: Start,
    /// What it is told as soon as it is greeted.
    pub(super) preface: Option<Preface>,
}

/// An incarnation that is being prepared.
pub(super) struct Preparation {
    make: Make,
    ending: Ending,
    outcome: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl Preparation {
    /// Begins to start and greet an incarnation; the device's thread is woken when that is done.
    ///
    /// # Errors
    /// If there is no thread left.
    pub(super) fn begin(makers: &Makers, make: Make, shared: &Arc<Shared>) -> io::Result<Self> {
        let (told, outcome) = sync_channel(1);
        let (makers, shared, ending) = (makers.clone(), Arc::clone(shared), Ending::default());
        let (heard, wanted) = (Arc::clone(&ending), make.clone());
        let thread = std::thread::Builder::new().name(format!("next-{}", shared.name)).spawn(move || {
            seccomp::inherit(ThreadClass::Device);
            // Whoever began it keeps the other end until it has joined this thread.
            let _ = told.send(prepare(&makers, wanted, &heard));
            shared.wake();
        })?;
        Ok(Self { make, ending, outcome, thread: Some(thread) })
    }
    /// Which incarnation it is.
    pub(super) fn generation(&self) -> u64 {
        self.make.generation
    }
    /// How it is being started.
    pub(super) fn start(&self) -> &Start {
        &self.make.start
    }
    /// Nobody wants it any more: it ends as soon as its thread hears of it.
    pub(super) fn cancel(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
    }
    /// Whether one that was cancelled has ended.
    pub(super) fn is_over(&mut self) -> bool {
        let Some(outcome) = self.outcome() else { return false };
        if let Ok((mut session, _)) = outcome {
            session.give_up(Instant::now());
        }
        true
    }
    /// What came of it, once.
    pub(super) fn outcome(&mut self) -> Option<Outcome> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            // Its thread has panicked, which its hook has reported.
            Err(TryRecvError::Disconnected) => {
                Some(Err(ConnectError::Resource(io::Error::other("its thread is gone"))))
            }
        }
    }
}

fn prepare(makers: &Makers, make: Make, ending: &Ending) -> Outcome {
    let (mut session, offer) = greet(makers, make.generation, &make.start, ending)?;
    // One that lacks what the driver has accepted is not told of it: who made it says by name what is missing.
    let lacks = |preface: &Preface| preface.features.is_some_and(|accepted| accepted & !offer.features != 0);
    if let Some(preface) = make.preface.filter(|preface| !lacks(preface))
        && let Err(source) = session.brief(preface)
    {
        session.give_up(Instant::now() + REAP);
        let backend = "the process beside the one that serves".to_owned();
        return Err(ConnectError::Conversation { backend, source, last_lines: Vec::new() });
    }
    Ok((session, offer))
}

impl Drop for Preparation {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Ready too late: nobody wants it any more.
        if let Ok(Ok((mut session, _))) = self.outcome.try_recv() {
            session.give_up(Instant::now() + REAP);
        }
    }
}
