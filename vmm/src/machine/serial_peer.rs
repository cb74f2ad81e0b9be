//! The far end of a serial line that people come to and leave: a pseudo terminal or a UNIX socket.
//!
//! What the guest prints while nobody is there is kept, the last [`BACKLOG_MAX`] bytes of it, and told to whoever comes
//! next. A reader that stands still is waited for once, for [`STUCK_MAX`]; after that the guest goes on and the oldest
//! output is lost, until the reader moves again.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::unix_socket::BoundSocket;

/// Output that waits for somebody to come, in bytes.
const BACKLOG_MAX: usize = 64 << 10;
/// How long a reader that takes nothing holds the guest's output up.
const STUCK_MAX: Duration = Duration::from_secs(1);
/// How often to look whether somebody has opened the pseudo terminal: the kernel does not tell.
const COME_LOOK: Duration = Duration::from_millis(200);
/// How often to look whether the port has room for more input.
pub(super) const ROOM_LOOK: Duration = Duration::from_millis(5);

enum Way {
    Pty(OwnedFd),
    Socket(BoundSocket),
}

#[derive(Default)]
struct State {
    backlog: VecDeque<u8>,
    client: Option<UnixStream>,
    /// The reader has been waited for in vain.
    stuck: bool,
}

/// The far end.
pub struct Peer {
    way: Way,
    state: Mutex<State>,
}

/// What came of waiting for input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// So many bytes were typed.
    Bytes(usize),
    /// Time to look around.
    Nothing,
    /// The port has ended.
    End,
}

pub(super) fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 })
}

/// What is ready of one descriptor within `limit`.
fn ready(fd: BorrowedFd<'_>, wanted: PollFlags, limit: Duration) -> PollFlags {
    let mut fds = [PollFd::from_borrowed_fd(fd, wanted)];
    match poll(&mut fds, Some(&timespec(limit))) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

pub(super) fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Peer {
    /// A new pseudo terminal in raw mode, and the name of the side that people open.
    ///
    /// # Errors
    /// When there are none left.
    pub(super) fn pty() -> io::Result<(Self, PathBuf)> {
        let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&end)?;
        unlockpt(&end)?;
        let name = PathBuf::from(ptsname(&end, Vec::new())?.to_string_lossy().into_owned());
        // Opened and closed once: from then on the kernel tells whether anybody holds the other side.
        let other = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let mut attributes = tcgetattr(&other)?;
        attributes.make_raw();
        tcsetattr(&other, OptionalActions::Now, &attributes)?;
        rustix::fs::fcntl_setfl(&end, OFlags::NONBLOCK)?;
        Ok((Self { way: Way::Pty(end), state: Mutex::default() }, name))
    }

    /// Whoever connects to `socket`, one at a time.
    ///
    /// # Errors
    /// When the socket cannot be polled.
    pub(super) fn socket(socket: BoundSocket) -> io::Result<Self> {
        socket.listener().set_nonblocking(true)?;
        Ok(Self { way: Way::Socket(socket), state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the guest prints.
    pub(super) fn print(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.backlog.extend(bytes);
        self.flush(&mut state);
        let surplus = state.backlog.len().saturating_sub(BACKLOG_MAX);
        state.backlog.drain(..surplus);
    }

    /// Hands over what waits, as far as there is somebody who takes it.
    fn flush(&self, state: &mut State) {
        let deadline = Instant::now() + if state.stuck { Duration::ZERO } else { STUCK_MAX };
        let State { backlog, client, stuck } = state;
        loop {
            let (chunk, _) = backlog.as_slices();
            if chunk.is_empty() {
                return;
            }
            let (written, fd) = match (&self.way, client.as_ref()) {
                (Way::Pty(end), _) => {
                    if ready(end.as_fd(), PollFlags::OUT, Duration::ZERO).contains(PollFlags::HUP) {
                        return;
                    }
                    (rustix::io::write(end, chunk).map_err(io::Error::from), end.as_fd())
                }
                (Way::Socket(_), Some(stream)) => ((&mut &*stream).write(chunk), stream.as_fd()),
                (Way::Socket(_), None) => return,
            };
            match written {
                Ok(written) => {
                    backlog.drain(..written);
                    *stuck = false;
                }
                Err(error) if would_block(&error) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        *stuck = true;
                        return;
                    }
                    ready(fd, PollFlags::OUT, left);
                }
                Err(_) => {
                    *client = None;
                    return;
                }
            }
        }
    }

    /// Waits for input (if there is `room` for any), for somebody to come or leave, or for `end`.
    pub(super) fn wait(&self, end: BorrowedFd<'_>, room: bool, chunk: &mut [u8]) -> Came {
        match &self.way {
            Way::Pty(master) => self.wait_pty(master, end, room, chunk),
            Way::Socket(socket) => self.wait_socket(socket, end, room, chunk),
        }
    }

    fn wait_pty(&self, master: &OwnedFd, end: BorrowedFd<'_>, room: bool, chunk: &mut [u8]) -> Came {
        if ready(master.as_fd(), PollFlags::empty(), Duration::ZERO).contains(PollFlags::HUP) {
            let ended = !ready(end, PollFlags::IN, COME_LOOK).is_empty();
            return if ended { Came::End } else { Came::Nothing };
        }
        let waits = {
            let mut state = self.lock();
            self.flush(&mut state);
            !state.backlog.is_empty()
        };
        let wanted = if room { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [PollFd::from_borrowed_fd(end, PollFlags::IN), PollFd::new(master, wanted)];
        let look = (waits || !room).then(|| timespec(ROOM_LOOK));
        if poll(&mut fds, look.as_ref()).is_err() {
            return Came::Nothing;
        }
        if !fds[0].revents().is_empty() {
            return Came::End;
        }
        if !fds[1].revents().contains(PollFlags::IN) {
            return Came::Nothing;
        }
        match rustix::io::read(master, chunk) {
            Ok(read) => Came::Bytes(read),
            Err(_) => Came::Nothing,
        }
    }

    fn wait_socket(&self, socket: &BoundSocket, end: BorrowedFd<'_>, room: bool, chunk: &mut [u8]) -> Came {
        let (client, waits) = {
            let mut state = self.lock();
            self.flush(&mut state);
            // A copy, so that the writer is not kept out while this thread waits.
            (state.client.as_ref().and_then(|client| client.try_clone().ok()), !state.backlog.is_empty())
        };
        let wanted = if room { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![PollFd::from_borrowed_fd(end, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        fds.extend(client.as_ref().map(|client| PollFd::new(client, wanted)));
        let look = (client.is_some() && (waits || !room)).then(|| timespec(ROOM_LOOK));
        if poll(&mut fds, look.as_ref()).is_err() {
            return Came::Nothing;
        }
        let told: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if told.first().is_some_and(|end| !end.is_empty()) {
            return Came::End;
        }
        if told.get(1).is_some_and(|come| !come.is_empty()) {
            self.admit(socket);
        }
        let Some((mut client, told)) = client.zip(told.get(2)) else { return Came::Nothing };
        if told.contains(PollFlags::IN) {
            match client.read(chunk) {
                Ok(read) if read > 0 => return Came::Bytes(read),
                Err(error) if would_block(&error) => return Came::Nothing,
                _ => {}
            }
        } else if !told.intersects(PollFlags::HUP | PollFlags::ERR) {
            return Came::Nothing;
        }
        self.lock().client = None;
        Came::Nothing
    }

    /// Lets the one who knocks in, if nobody is there yet.
    fn admit(&self, socket: &BoundSocket) {
        let Ok((mut client, _)) = socket.listener().accept() else { return };
        let mut state = self.lock();
        if state.client.is_some() {
            let _ = client.write_all(b"somebody else is attached to this console\r\n");
            return;
        }
        if client.set_nonblocking(true).is_ok() {
            state.stuck = false;
            state.client = Some(client);
        }
    }
}

/// What the guest prints, on its way to the far end.
pub(super) struct PeerOutput(pub(super) std::sync::Arc<Peer>);

impl Write for PeerOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.print(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn eventfd() -> OwnedFd {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
    }

    /// Waits until something was typed.
    fn typed(peer: &Peer, end: &OwnedFd) -> Vec<u8> {
        let mut chunk = [0; 64];
        for _ in 0..100 {
            if let Came::Bytes(count) = peer.wait(end.as_fd(), true, &mut chunk) {
                return chunk[..count].to_vec();
            }
        }
        panic!("nothing came");
    }

    /// Whoever opens the terminal late reads what was printed before, types and leaves; the next one goes on.
    #[test]
    fn a_pty_keeps_output_for_who_comes() {
        let (peer, name) = Peer::pty().unwrap();
        let end = eventfd();
        for text in [b"early", b"later"] {
            peer.print(text);
            let mut terminal = File::options().read(true).write(true).open(&name).unwrap();
            terminal.write_all(b"x").unwrap();
            assert_eq!(typed(&peer, &end), b"x");
            let mut read = [0; 5];
            terminal.read_exact(&mut read).unwrap();
            assert_eq!(&read, text);
        }
    }

    /// One client at a time: the second is told so, and after the first has left the next one is let in. The backlog is
    /// bounded and a reader that stands still costs one wait.
    #[test]
    fn a_socket_serves_one_client_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.sock");
        let peer = Peer::socket(BoundSocket::bind(&path).unwrap()).unwrap();
        let end = eventfd();
        peer.print(&vec![b'a'; BACKLOG_MAX + 5]);
        assert_eq!(peer.lock().backlog.len(), BACKLOG_MAX);
        let mut first = UnixStream::connect(&path).unwrap();
        first.write_all(b"hi").unwrap();
        assert_eq!(typed(&peer, &end), b"hi");
        let mut output = vec![0; BACKLOG_MAX];
        std::thread::scope(|scope| {
            scope.spawn(|| first.read_exact(&mut output).unwrap());
            while !peer.lock().backlog.is_empty() {
                peer.wait(end.as_fd(), true, &mut [0; 8]);
            }
        });
        assert!(output.iter().all(|byte| *byte == b'a'));
        let mut second = UnixStream::connect(&path).unwrap();
        peer.wait(end.as_fd(), true, &mut [0; 8]);
        let mut told = String::new();
        second.read_to_string(&mut told).unwrap();
        assert!(told.contains("somebody else"), "{told}");
        // The first one stands still: one wait of a second, not one for each line.
        let started = Instant::now();
        for _ in 0..200 {
            peer.print(&[b'b'; 4096]);
        }
        assert!(started.elapsed() < 3 * STUCK_MAX, "{:?}", started.elapsed());
        drop(first);
        let mut third = UnixStream::connect(&path).unwrap();
        third.write_all(b"me").unwrap();
        assert_eq!(typed(&peer, &end), b"me");
    }

    /// The port's end is told at once, also while nobody is there.
    #[test]
    fn the_end_is_heard() {
        let (peer, _name) = Peer::pty().unwrap();
        let end = eventfd();
        rustix::io::write(&end, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(peer.wait(end.as_fd(), true, &mut [0; 8]), Came::End);
    }
}
