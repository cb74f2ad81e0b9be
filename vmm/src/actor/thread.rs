//! The thread that actors run on. Actors decide and hand on, so one is enough, and vCPUs are never on it.
//!
//! It drives a runtime of its own that has no other worker: waking an actor is then an entry in one queue and one wake-up,
//! with no search for somebody who could take work over.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::seccomp::{self, ThreadClass};

/// The thread. Dropping it ends it, and all actors that still run with it.
#[derive(Debug)]
pub struct ActorThread {
    runtime: Handle,
    end: Option<oneshot::Sender<()>>,
    join: Option<JoinHandle<()>>,
}

impl ActorThread {
    /// Starts it.
    ///
    /// # Errors
    /// The kernel has no thread or descriptor left.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_time().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let join = std::thread::Builder::new().name("actors".into()).spawn(move || {
            seccomp::enter(ThreadClass::Actors);
            // Told or left alone: both are the end.
            let _ = runtime.block_on(ended);
        })?;
        Ok(Self { runtime: handle, end: Some(end), join: Some(join) })
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
            // A panic has been reported by its hook.
            let _ = join.join();
        }
    }
}
