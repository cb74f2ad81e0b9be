//! COM1 and its threads: between the port and the terminal, a file, a pseudo terminal, a socket or nowhere.
//!
//! A thread writes what the guest prints, in batches, so that a guest's byte costs no wake-up of its own; another one
//! reads what is typed. Neither is a vCPU's: a terminal that stands still fills the port's buffer and slows down the
//! guest's driver, not its CPU.
#![allow(unsafe_code, reason = "vmm-sys-util's EventFd has no AsFd; its descriptor is borrowed for one poll")]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use atoll_devices::serial::{Serial, SerialHost};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::{COM1, COM1_GSI};
use super::serial_branch::SerialBranch;
use super::serial_peer::{Came, Peer, PeerOutput};
use super::{
    Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, EventSender, LifeError, MachineEvent, StopCause,
};
use crate::cpu::Space;
use crate::seccomp::{self, ThreadClass};
use crate::unix_socket::SocketError;

/// How long the writer gathers output before it writes again.
const GATHER: Duration = Duration::from_millis(2);
/// What is read from the terminal at once.
const INPUT_CHUNK: usize = 256;
/// Typed bytes that may wait for room in the port.
const TYPED_MAX: usize = 4096;
/// How often to see whether there is room, while some wait.
const ROOM_LOOK_NS: i64 = 5_000_000;
/// First and second byte of the escape: Ctrl-A x ends the machine, Ctrl-A Ctrl-A types a Ctrl-A.
const ESCAPE: u8 = 0x01;
const ESCAPE_QUIT: u8 = b'x';

/// Why the port cannot lead where it should.
#[derive(Debug, Error)]
pub enum SerialError {
    /// The file cannot be written.
    #[error("cannot write --serial file={path}: {source}; choose another file")]
    File {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: std::io::Error,
    },
    /// No pseudo terminal.
    #[error("no pseudo terminal for the serial port: {0}; give it a file or a socket instead")]
    Pty(#[source] std::io::Error),
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A file or socket without its path.
    #[error("the serial port's mode needs {0}=PATH")]
    NoPath(&'static str),
    /// No thread or eventfd.
    #[error("no thread or eventfd for the serial port ({0}); raise the limits (ulimit -u, -n)")]
    Resource(#[from] std::io::Error),
}

/// Where COM1 leads.
pub enum SerialEnd {
    /// Input and output, with the escape.
    Terminal {
        /// What is typed.
        input: File,
        /// What the guest prints.
        output: File,
        /// Hears of the escape.
        events: EventSender,
    },
    /// Output only.
    Output(File),
    /// People who come and leave.
    Peer(Arc<Peer>),
    /// What the guest prints is gone.
    Null,
}

/// Builds COM1.
pub struct SerialBuilder {
    end: SerialEnd,
    branch: Option<Arc<SerialBranch>>,
}

impl SerialBuilder {
    /// A port that leads to `end`, and to `branch` besides.
    pub fn new(end: SerialEnd, branch: Option<Arc<SerialBranch>>) -> Self {
        Self { end, branch }
    }
}

impl DeviceBuilder for SerialBuilder {
    fn name(&self) -> String {
        "serial".into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let name = self.name();
        let link = Arc::new(Link::default());
        let port = Arc::new(Mutex::new(Serial::new(board.wire(COM1_GSI), Arc::clone(&link) as Arc<dyn SerialHost>)));
        board
            .add_shared_registers("serial", Space::Pio, COM1, Arc::clone(&port) as _)
            .map_err(|error| BuildError::new(&name, error))?;
        let life = SerialLife { end: Some(self.end), branch: self.branch, port, link, running: None };
        Ok(BuiltDevice { name, place: None, life: Box::new(life) })
    }
}

type Port = Arc<Mutex<Serial>>;

fn lock(port: &Port) -> MutexGuard<'_, Serial> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the port wakes its threads.
#[derive(Default)]
struct Link {
    writer: OnceLock<Thread>,
    ended: AtomicBool,
}

impl Link {
    fn wake_writer(&self) {
        if let Some(thread) = self.writer.get() {
            thread.unpark();
        }
    }
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake_writer();
    }
}

impl SerialHost for Link {
    fn output_ready(&self) {
        self.wake_writer();
    }
    /// The reader looks by itself while anything waits: it has to watch for the escape meanwhile.
    fn input_room(&self) {}
}

/// Where input comes from.
enum Input {
    Terminal(File, EventSender),
    Peer(Arc<Peer>),
    Branch(Arc<SerialBranch>),
}

/// The threads of a started port.
struct Running {
    /// Disconnected when the writer has written everything.
    drained: Receiver<()>,
    writer: JoinHandle<()>,
    readers: Vec<(JoinHandle<()>, EventFd)>,
}

struct SerialLife {
    end: Option<SerialEnd>,
    branch: Option<Arc<SerialBranch>>,
    port: Port,
    link: Arc<Link>,
    running: Option<Running>,
}

impl SerialLife {
    fn launch(&mut self) -> Result<(), SerialError> {
        let (mut output, input): (Box<dyn Write + Send>, _) = match self.end.take() {
            Some(SerialEnd::Terminal { input, output, events }) => {
                (Box::new(output), Some(Input::Terminal(input, events)))
            }
            Some(SerialEnd::Peer(peer)) => (Box::new(PeerOutput(Arc::clone(&peer))), Some(Input::Peer(peer))),
            Some(SerialEnd::Output(file)) => (Box::new(file), None),
            Some(SerialEnd::Null) | None => (Box::new(std::io::sink()), None),
        };
        let (done, drained) = sync_channel::<()>(0);
        let writer = {
            let (port, link, branch) = (Arc::clone(&self.port), Arc::clone(&self.link), self.branch.clone());
            std::thread::Builder::new().name("serial-out".into()).spawn(move || {
                seccomp::enter(ThreadClass::Line);
                write_output(&port, &link, output.as_mut(), branch.as_deref());
                drop(done);
            })?
        };
        let _ = self.link.writer.set(writer.thread().clone());
        // What was printed before the thread was known has woken nobody.
        writer.thread().unpark();
        let mut readers = Vec::new();
        for input in input.into_iter().chain(self.branch.clone().map(Input::Branch)) {
            let end = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
            let seen = end.try_clone()?;
            let (port, link) = (Arc::clone(&self.port), Arc::clone(&self.link));
            let thread = std::thread::Builder::new().name("serial-in".into()).spawn(move || {
                seccomp::enter(ThreadClass::Line);
                match input {
                    Input::Terminal(input, events) => read_input(&port, &link, input, &seen, &events),
                    Input::Peer(peer) => read_far_end(&port, &link, &seen, |end, room, to| peer.wait(end, room, to)),
                    Input::Branch(branch) => {
                        read_far_end(&port, &link, &seen, |end, room, to| branch.wait(end, room, to));
                    }
                }
            })?;
            readers.push((thread, end));
        }
        self.running = Some(Running { drained, writer, readers });
        Ok(())
    }
}

impl DeviceLife for SerialLife {
    fn start(&mut self) -> Result<(), LifeError> {
        self.launch().map_err(|error| LifeError { device: "serial".into(), step: "start", source: Box::new(error) })
    }

    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.link.end();
        let Some(running) = self.running.take() else { return Ok(()) };
        for (thread, end) in running.readers {
            let _ = end.write(1);
            let _ = thread.join();
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match running.drained.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => {
                let source = "what it leads to takes no more output; the rest of it is lost".into();
                Err(LifeError { device: "serial".into(), step: "stop", source })
            }
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                let _ = running.writer.join();
                Ok(())
            }
        }
    }
}

/// Writes what the guest prints until the port has ended and everything is out.
fn write_output(port: &Port, link: &Link, output: &mut dyn Write, branch: Option<&SerialBranch>) {
    let mut bytes = Vec::new();
    let mut broken = false;
    loop {
        let ended = link.has_ended();
        bytes.clear();
        lock(port).take_output(&mut bytes);
        if bytes.is_empty() {
            if ended {
                return;
            }
            std::thread::park();
            continue;
        }
        if let Some(branch) = branch {
            branch.print(&bytes);
        }
        // Output that nobody takes must not stop the guest.
        if !broken && let Err(error) = output.write_all(&bytes).and_then(|()| output.flush()) {
            tracing::warn!(%error, "the serial port's output goes nowhere from here on");
            broken = true;
        }
        if !ended {
            std::thread::sleep(GATHER);
        }
    }
}

/// What a typed byte means: Ctrl-A x is the wish to leave, Ctrl-A Ctrl-A a Ctrl-A.
#[derive(Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Passes bytes on; whether the escape was among them.
    pub fn pass(&mut self, typed: &[u8], into: &mut Vec<u8>) -> bool {
        for byte in typed {
            match (self.escaped, *byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, ESCAPE_QUIT) => return true,
                (true, ESCAPE) => {
                    self.escaped = false;
                    into.push(ESCAPE);
                }
                (escaped, byte) => {
                    self.escaped = false;
                    if escaped {
                        into.push(ESCAPE);
                    }
                    into.push(byte);
                }
            }
        }
        false
    }
}

/// Typed bytes that wait for room in the port.
struct Typed {
    waiting: VecDeque<u8>,
    /// A person types: what finds no room is lost, but the escape is still seen. Else nothing is read until there is room.
    lossy: bool,
}

impl Typed {
    fn accepts_input(&self) -> bool {
        self.lossy || self.waiting.len() < TYPED_MAX
    }
    fn add(&mut self, bytes: &[u8]) {
        let room = if self.lossy { TYPED_MAX.saturating_sub(self.waiting.len()) } else { usize::MAX };
        self.waiting.extend(bytes.iter().take(room));
    }
    /// Hands over what the port has room for.
    fn feed(&mut self, port: &Port) {
        if !self.waiting.is_empty() {
            let taken = lock(port).receive(self.waiting.make_contiguous());
            self.waiting.drain(..taken.min(self.waiting.len()));
        }
    }
}

/// Reads what is typed until the port ends or there is no more input.
fn read_input(port: &Port, link: &Link, mut input: File, end: &EventFd, events: &EventSender) {
    let mut filter = EscapeFilter::default();
    let mut chunk = [0; INPUT_CHUNK];
    let mut passed = Vec::new();
    let mut typed = Typed { waiting: VecDeque::new(), lossy: input.is_terminal() };
    let mut ended = false;
    while !link.has_ended() && (!ended || !typed.waiting.is_empty()) {
        typed.feed(port);
        match wait_for_input((!ended && typed.accepts_input()).then_some(&input), end, !typed.waiting.is_empty()) {
            Wait::Input => {}
            Wait::Nothing => continue,
            Wait::End => return,
        }
        let read = match input.read(&mut chunk) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock) => {
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, "nothing more can be read for the serial port");
                0
            }
        };
        ended = read == 0;
        passed.clear();
        if filter.pass(chunk.get(..read).unwrap_or_default(), &mut passed) {
            events.tell(MachineEvent::Stop(StopCause::Escape));
            return;
        }
        typed.add(&passed);
    }
}

/// Reads what people at the far end type until the port ends.
fn read_far_end(port: &Port, link: &Link, end: &EventFd, wait: impl Fn(BorrowedFd<'_>, bool, &mut [u8]) -> Came) {
    // SAFETY: the descriptor belongs to `end`, which outlives this borrow.
    let end = unsafe { BorrowedFd::borrow_raw(end.as_raw_fd()) };
    let mut chunk = [0; INPUT_CHUNK];
    let mut typed = Typed { waiting: VecDeque::new(), lossy: false };
    while !link.has_ended() {
        typed.feed(port);
        // A port that takes nothing must not be asked without end.
        match wait(end, typed.waiting.is_empty(), &mut chunk) {
            Came::Bytes(count) => typed.add(chunk.get(..count).unwrap_or_default()),
            Came::Nothing => {}
            Came::End => return,
        }
    }
}

/// Why waiting for input has ended.
enum Wait {
    Input,
    /// Time to see whether the port has room.
    Nothing,
    /// The port has ended.
    End,
}

/// Waits for input, if it is wanted, and not for long when something `waits` for room in the port.
fn wait_for_input(input: Option<&File>, end: &EventFd, waits: bool) -> Wait {
    // SAFETY: the descriptor belongs to `end`, which outlives this borrow.
    let end = unsafe { BorrowedFd::borrow_raw(end.as_raw_fd()) };
    let look = Timespec { tv_sec: 0, tv_nsec: ROOM_LOOK_NS };
    let mut fds = vec![PollFd::from_borrowed_fd(end, PollFlags::IN)];
    fds.extend(input.map(|input| PollFd::from_borrowed_fd(input.as_fd(), PollFlags::IN)));
    match poll(&mut fds, waits.then_some(&look)) {
        Err(rustix::io::Errno::INTR) | Ok(0) => Wait::Nothing,
        Err(_) => Wait::End,
        Ok(_) if fds.first().is_some_and(|end| !end.revents().is_empty()) => Wait::End,
        Ok(_) => Wait::Input,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(typed: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut filter, mut into) = (EscapeFilter::default(), Vec::new());
        let quit = typed.iter().any(|part| filter.pass(part, &mut into));
        (into, quit)
    }

    /// Ctrl-A x quits also when the two bytes arrive apart; everything else reaches the guest unchanged.
    #[test]
    fn escape_is_recognised() {
        assert_eq!(filtered(&[b"ls\n"]), (b"ls\n".to_vec(), false));
        assert_eq!(filtered(&[b"ab\x01", b"xcd"]), (b"ab".to_vec(), true));
        assert_eq!(filtered(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filtered(&[b"\x01c"]), (b"\x01c".to_vec(), false));
    }
}
