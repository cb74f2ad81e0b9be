//! The thread that actors run on. Actors decide and hand on, so one is enough, and vCPUs are never on it.
//!
//! It drives a runtime of its own that has no other worker: waking an actor is then an entry in one queue and one wake-up,
//! with no search for somebody who could take work over.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::seccomp::{self, ThreadClass};

/// The thread. Dropping it ends it, and all actors that still run with it.
#[derive(Debug)]
pub struct ActorThread {
    runtime: Handle,
    end: Option<oneshot::Sender<()>>,
    join: Option<JoinHandle<()>>,
    /// Hangs up when the thread is done with everything but its own end.
    over: Mutex<Receiver<()>>,
    end_max: Duration,
}

/// How long an actor may hold on to the thread when it is to end; they only decide and hand on.
const END_MAX: Duration = Duration::from_secs(5);

impl ActorThread {
    /// Starts it.
    ///
    /// # Errors
    /// The kernel has no thread or descriptor left.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_time().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let (working, over) = sync_channel::<()>(0);
        let join = std::thread::Builder::new().name("actors".into()).spawn(move || {
            seccomp::enter(ThreadClass::Actors);
            let _working = working;
            // Told or left alone: both are the end.
            let _ = runtime.block_on(ended);
            drop(runtime);
        })?;
        Ok(Self { runtime: handle, end: Some(end), join: Some(join), over: Mutex::new(over), end_max: END_MAX })
    }

    /// Where to start actors; also to wait for something of theirs from another thread.
    #[must_use]
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for ActorThread {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(join) = self.join.take()
            && join.thread().id() != std::thread::current().id()
        {
            let over = self.over.get_mut().unwrap_or_else(PoisonError::into_inner);
            if over.recv_timeout(self.end_max) == Err(RecvTimeoutError::Timeout) {
                tracing::error!(after = ?self.end_max, "an actor does not let go of its thread: ending without it; please report it");
                return;
            }
            // A panic has been reported by its hook.
            let _ = join.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// An actor that waits for something that never comes kept the whole end of the machine monitor waiting.
    #[test]
    fn an_actor_that_does_not_let_go_is_left() {
        let mut actors = ActorThread::start().unwrap();
        actors.end_max = Duration::from_millis(50);
        let (release, held) = sync_channel::<()>(0);
        let (told, begun) = sync_channel(1);
        let _task = actors.runtime().spawn(async move {
            let _ = told.send(());
            let _ = held.recv();
        });
        begun.recv_timeout(Duration::from_secs(60)).unwrap();
        let began = Instant::now();
        drop(actors);
        assert!(began.elapsed() < Duration::from_secs(60));
        drop(release);
    }
}
