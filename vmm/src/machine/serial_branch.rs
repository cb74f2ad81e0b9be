//! A second end of a serial line, for the page of a display: what the guest prints goes there too, what is typed there comes
//! to the port.
//!
//! Whoever listens is a process that may die. The last [`KEPT_MAX`] bytes of what was printed are kept and told to the next
//! one, so its page begins where the last one's ended. One that is slow misses what is old; it never holds the guest up.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::serial_peer::{Came, ROOM_LOOK, timespec, would_block};
use crate::doorbell::{borrowed, signal, take};

/// Bytes of what was printed that are kept.
const KEPT_MAX: usize = 64 << 10;

#[derive(Default)]
struct State {
    kept: VecDeque<u8>,
    /// Bytes at the end of `kept` that the listener has not been told.
    untold: usize,
    listener: Option<UnixStream>,
}

/// The second end.
pub struct SerialBranch {
    state: Mutex<State>,
    /// There is another listener.
    joined: EventFd,
}

impl std::fmt::Debug for SerialBranch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialBranch")
    }
}

impl SerialBranch {
    /// One without a listener.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { state: Mutex::default(), joined: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)? })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream for a new listener, who takes the place of the one before and is told all that is kept.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn join(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut state = self.lock();
        state.untold = state.kept.len();
        state.listener = Some(ours);
        drop(state);
        signal(&self.joined, 1);
        Ok(theirs.into())
    }

    /// Takes what the guest prints.
    pub(super) fn print(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.kept.extend(bytes);
        let surplus = state.kept.len().saturating_sub(KEPT_MAX);
        state.kept.drain(..surplus);
        state.untold = state.untold.saturating_add(bytes.len()).min(KEPT_MAX);
        let lagged = state.untold > bytes.len();
        state.tell();
        // Whoever waits for room has to know that there is something to wait for.
        if !lagged && state.untold > 0 && state.listener.is_some() {
            signal(&self.joined, 1);
        }
    }

    /// Waits for input (if there is `room` for any), for room at the listener, for another listener, or for `end`.
    pub(super) fn wait(&self, end: BorrowedFd<'_>, room: bool, chunk: &mut [u8]) -> Came {
        let (listener, lags) = {
            let mut state = self.lock();
            state.tell();
            // A copy, so that the guest's output is not kept out while this thread waits.
            (state.listener.as_ref().and_then(|listener| listener.try_clone().ok()), state.untold > 0)
        };
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, room);
        wanted.set(PollFlags::OUT, lags);
        let mut fds = vec![
            PollFd::from_borrowed_fd(end, PollFlags::IN),
            PollFd::from_borrowed_fd(borrowed(&self.joined), PollFlags::IN),
        ];
        fds.extend(listener.as_ref().map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), wanted)));
        // A port that takes nothing must be asked again.
        if poll(&mut fds, (!room).then(|| timespec(ROOM_LOOK)).as_ref()).is_err() {
            return Came::Nothing;
        }
        let told: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if told.first().is_some_and(|end| !end.is_empty()) {
            return Came::End;
        }
        take(&self.joined);
        let Some((mut listener, told)) = listener.zip(told.get(2)) else { return Came::Nothing };
        if told.contains(PollFlags::IN) {
            match listener.read(chunk) {
                Ok(read) if read > 0 => return Came::Bytes(read),
                Err(error) if would_block(&error) => {}
                _ => self.forget(),
            }
        } else if told.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.forget();
        }
        Came::Nothing
    }

    /// The listener has gone, unless there is another already.
    fn forget(&self) {
        let mut state = self.lock();
        let gone = state.listener.as_ref().is_some_and(|listener| {
            let mut fds = [PollFd::new(listener, PollFlags::empty())];
            poll(&mut fds, Some(&timespec(std::time::Duration::ZERO))).is_ok() && !fds[0].revents().is_empty()
        });
        if gone {
            state.listener = None;
        }
    }
}

impl State {
    /// Tells the listener what it takes at once.
    fn tell(&mut self) {
        while self.untold > 0
            && let Some(listener) = &mut self.listener
        {
            let from = self.kept.len() - self.untold.min(self.kept.len());
            let (first, second) = self.kept.as_slices();
            let piece = match from.checked_sub(first.len()) {
                Some(from) => second.get(from..),
                None => first.get(from..),
            };
            match listener.write(piece.unwrap_or_default()) {
                Ok(0) => return,
                Ok(written) => self.untold -= written.min(self.untold),
                Err(error) if would_block(&error) => return,
                Err(_) => self.listener = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn heard(listener: &mut UnixStream, bytes: usize) -> Vec<u8> {
        listener.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut heard = vec![0; bytes];
        listener.read_exact(&mut heard).unwrap();
        heard
    }

    /// A listener that comes late, or after the death of another, is told what was printed before; one that reads nothing
    /// holds nobody up and misses what is old.
    #[test]
    fn whoever_comes_is_told_what_was_printed() {
        let branch = SerialBranch::new().unwrap();
        let (end, mut chunk) = (EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap(), [0; 16]);
        branch.print(b"before ");
        let mut first = UnixStream::from(branch.join().unwrap());
        assert_eq!(branch.wait(borrowed(&end), true, &mut chunk), Came::Nothing, "somebody has come");
        branch.print(b"and after");
        assert_eq!(heard(&mut first, 16), b"before and after");
        first.write_all(b"typed").unwrap();
        assert_eq!(branch.wait(borrowed(&end), true, &mut chunk), Came::Bytes(5));
        assert_eq!(&chunk[..5], b"typed");
        drop(first);
        assert_eq!(branch.wait(borrowed(&end), true, &mut chunk), Came::Nothing, "it has gone");

        let mut second = UnixStream::from(branch.join().unwrap());
        assert_eq!(branch.wait(borrowed(&end), true, &mut chunk), Came::Nothing);
        assert_eq!(heard(&mut second, 16), b"before and after");
        let flood: Vec<u8> = (0..4_000_000_u32).map(|at| (at % 251) as u8).collect();
        flood.chunks(1000).for_each(|chunk| branch.print(chunk));
        let last = flood[flood.len() - 1000..].to_vec();
        let mut seen = Vec::new();
        second.set_nonblocking(true).unwrap();
        while !seen.ends_with(&last) {
            // Whoever waits has its turn, whether there is something to wait for or not.
            signal(&branch.joined, 1);
            branch.wait(borrowed(&end), true, &mut chunk);
            let mut piece = vec![0; 1 << 16];
            while let Ok(read) = second.read(&mut piece) {
                seen.extend(&piece[..read]);
            }
        }
        assert!(seen.len() < flood.len(), "not all of it was kept");
        signal(&end, 1);
        assert_eq!(branch.wait(borrowed(&end), true, &mut chunk), Came::End);
    }
}
