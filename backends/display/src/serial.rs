//! The guest's serial console: what it prints is kept for a while and told to all who look, what they type goes back. Nobody
//! makes the guest wait, and who is slow misses what is old.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use tokio::sync::{Notify, watch};

use crate::ready;

/// What is kept of what the guest has printed.
const HISTORY_MAX: usize = 64 << 10;
/// What is kept of what was typed and not taken.
const TYPED_MAX: usize = 16 << 10;

#[derive(Debug, Default)]
struct Lines {
    history: VecDeque<u8>,
    /// Bytes that were printed in all.
    end: u64,
    typed: VecDeque<u8>,
}

/// The console, shared.
#[derive(Debug)]
pub struct Serial {
    lines: Mutex<Lines>,
    /// How many bytes were printed in all.
    printed: watch::Sender<u64>,
    typed: Notify,
}

impl Serial {
    /// A console on which nothing was printed.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { lines: Mutex::default(), printed: watch::Sender::new(0), typed: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says when there is more.
    #[must_use]
    pub fn listen(&self) -> watch::Receiver<u64> {
        self.printed.subscribe()
    }

    /// What was printed from there on, at most so much, and where it ends; what is not kept any more is left out.
    #[must_use]
    pub fn since(&self, from: u64, most: usize) -> (Vec<u8>, u64) {
        let lines = self.lock();
        let first = lines.end - lines.history.len() as u64;
        let from = from.clamp(first, lines.end);
        let bytes: Vec<u8> = lines.history.iter().skip((from - first) as usize).take(most).copied().collect();
        let end = from + bytes.len() as u64;
        (bytes, end)
    }

    /// Somebody types. What the guest does not take in time is lost.
    pub fn write(&self, bytes: &[u8]) {
        let mut lines = self.lock();
        let room = TYPED_MAX - lines.typed.len().min(TYPED_MAX);
        lines.typed.extend(bytes.iter().take(room));
        self.typed.notify_one();
    }

    /// The guest prints.
    fn print(&self, bytes: &[u8]) {
        let mut lines = self.lock();
        lines.history.extend(bytes);
        let excess = lines.history.len().saturating_sub(HISTORY_MAX);
        lines.history.drain(..excess);
        lines.end += bytes.len() as u64;
        let end = lines.end;
        drop(lines);
        self.printed.send_replace(end);
    }

    /// Carries bytes both ways until the guest's side ends.
    pub async fn carry(&self, line: OwnedFd) {
        if let Err(error) = self.try_carry(line).await {
            tracing::warn!(%error, "the serial console has ended");
        }
    }

    async fn try_carry(&self, line: OwnedFd) -> std::io::Result<()> {
        fcntl_setfl(&line, fcntl_getfl(&line)? | OFlags::NONBLOCK)?;
        let line = ready::watch(line)?;
        let mut bytes = vec![0; 4096];
        loop {
            let waits = !self.lock().typed.is_empty();
            tokio::select! {
                guard = line.readable() => {
                    let mut guard = guard?;
                    match rustix::io::read(line.get_ref(), &mut bytes) {
                        Ok(0) => return Ok(()),
                        Ok(count) => self.print(bytes.get(..count).unwrap_or_default()),
                        Err(Errno::AGAIN) => guard.clear_ready(),
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                    drop(guard);
                    tokio::task::yield_now().await;
                }
                guard = line.writable(), if waits => {
                    let mut guard = guard?;
                    let mut lines = self.lock();
                    match rustix::io::write(line.get_ref(), lines.typed.as_slices().0) {
                        Ok(count) => drop(lines.typed.drain(..count)),
                        Err(Errno::AGAIN) => guard.clear_ready(),
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                () = self.typed.notified() => {}
            }
        }
    }
}
