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

/// How long one that came too late may take to end.
const REAP: Duration = Duration::from_secs(2);

type Outcome = Result<(Box<Session>, DeviceOffer), ConnectError>;

/// An incarnation that is being prepared.
pub(super) struct Preparation {
    generation: u64,
    ending: Ending,
    outcome: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl Preparation {
    /// Begins to start and greet incarnation `generation`; the device's thread is woken when that is done.
    ///
    /// # Errors
    /// If there is no thread left.
    pub(super) fn begin(makers: &Makers, generation: u64, shared: &Arc<Shared>) -> io::Result<Self> {
        let (told, outcome) = sync_channel(1);
        let (makers, shared, ending) = (makers.clone(), Arc::clone(shared), Ending::default());
        let heard = Arc::clone(&ending);
        let thread = std::thread::Builder::new().name(format!("next-{}", shared.name)).spawn(move || {
            seccomp::inherit(ThreadClass::Device);
            // Whoever began it keeps the other end until it has joined this thread.
            let _ = told.send(greet(&makers, generation, &heard));
            shared.wake();
        })?;
        Ok(Self { generation, ending, outcome, thread: Some(thread) })
    }
    /// Which incarnation it is.
    pub(super) fn generation(&self) -> u64 {
        self.generation
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
