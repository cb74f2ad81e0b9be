//! The event monitor: what happens to the machine, as JSON objects one after the other, into a FIFO, a file or an inherited
//! descriptor.
//!
//! A thread of its own takes events from its queue and writes them; it may wait for its reader, the machine does not. A
//! reader that is slow or gone costs the queue's bound of memory, then events, which are counted and told. Clients read
//! into 4 KiB: an object is shorter than that, so that a FIFO takes it whole or not at all.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use serde::Serialize;
use thiserror::Error;

use super::connection::lost;
use super::listen::own;
use super::reply::braceless_json;
use super::wire::{self, WireError};
use crate::config::{KeyError, PathOrFd};
use crate::lifecycle::{Heard, Story, StoryEvent, Subscription};
use crate::seccomp::{self, ThreadClass};

/// Bytes of an object at most.
pub const EVENT_MAX: usize = 4094;
/// How often the thread looks whether it shall end.
const PAUSE: Duration = Duration::from_millis(100);

/// Why events cannot be written there.
#[derive(Debug, Error)]
pub enum MonitorError {
    /// The file.
    #[error("events cannot be written to {path}: {source}; give path= of a FIFO or of a file in a writable folder")]
    Open {
        /// Which.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The descriptor.
    #[error("descriptor {0} is not open for writing: give fd=N of a pipe, socket or file")]
    Descriptor(RawFd),
    /// A key that there is not, or none of its value.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Neither.
    #[error("'{0}' is neither path=FIFO nor fd=N")]
    Syntax(String),
    /// No thread.
    #[error("there is no thread for the event monitor: {0}")]
    Thread(io::Error),
}

/// What `--event-monitor` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventMonitorAt {
    /// A FIFO, or a file that is made if it is not there.
    Path(PathBuf),
    /// An inherited descriptor.
    Descriptor(RawFd),
}

impl FromStr for EventMonitorAt {
    type Err = MonitorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match PathOrFd::read(text)? {
            Some(PathOrFd::Path(path)) => Ok(Self::Path(path)),
            Some(PathOrFd::Fd(fd)) => Ok(Self::Descriptor(fd)),
            None => Err(MonitorError::Syntax(text.into())),
        }
    }
}

impl EventMonitorAt {
    fn open(&self) -> Result<File, MonitorError> {
        match self {
            Self::Path(path) => open_path(path).map_err(|source| MonitorError::Open { path: path.clone(), source }),
            Self::Descriptor(fd) => {
                let file = own(*fd).map(File::from).ok_or(MonitorError::Descriptor(*fd))?;
                let flags = rustix::fs::fcntl_getfl(&file).map_err(|_| MonitorError::Descriptor(*fd))?;
                if flags.intersection(rustix::fs::OFlags::RWMODE) == rustix::fs::OFlags::RDONLY {
                    return Err(MonitorError::Descriptor(*fd));
                }
                let _ = rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC);
                Ok(file)
            }
        }
    }
}

fn open_path(path: &Path) -> io::Result<File> {
    // A FIFO is opened for reading too: then it can be opened before its reader is there, which gets what happened
    // until it comes, and does not break when the reader goes.
    let fifo = path.metadata().is_ok_and(|found| found.file_type().is_fifo());
    let mut options = OpenOptions::new();
    options.write(true).read(fifo).append(!fifo).create(!fifo).mode(0o600);
    options.custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(path)
}

/// Writes events until it is stopped.
pub struct EventMonitor {
    /// Set once: from then on nothing is waited for, and by then nothing is written any more.
    end: Arc<OnceLock<Instant>>,
    thread: Option<JoinHandle<()>>,
}

impl EventMonitor {
    /// Begins to write what `story` tells from now on.
    ///
    /// # Errors
    /// [`MonitorError`].
    pub fn start(at: &EventMonitorAt, story: &Story) -> Result<Self, MonitorError> {
        let end = Arc::new(OnceLock::new());
        let writer = Writer { file: at.open()?, end: Arc::clone(&end) };
        let (story, subscription) = (story.clone(), story.subscribe());
        let thread = thread::Builder::new()
            .name("event-monitor".into())
            .spawn(move || {
                seccomp::enter(ThreadClass::Operator);
                match writer.write_all(&story, &subscription) {
                    Ok(()) | Err(WireError::Late) => {}
                    Err(error) => tracing::warn!(%error, "nobody reads the event monitor any more"),
                }
            })
            .map_err(MonitorError::Thread)?;
        Ok(Self { end, thread: Some(thread) })
    }

    /// Writes what was told already, as far as its reader takes it within `limit`, then ends.
    pub fn stop(mut self, limit: Duration) {
        self.finish(limit);
    }

    fn finish(&mut self, limit: Duration) {
        if let Some(thread) = self.thread.take() {
            let _ = self.end.set(Instant::now() + limit);
            let _ = thread.join();
        }
    }
}

impl Drop for EventMonitor {
    fn drop(&mut self) {
        self.finish(Duration::ZERO);
    }
}

struct Writer {
    file: File,
    end: Arc<OnceLock<Instant>>,
}

impl Writer {
    fn write_all(&self, story: &Story, events: &Subscription) -> Result<(), WireError> {
        loop {
            let ending = self.end.get().is_some();
            let event = match events.next(if ending { Duration::ZERO } else { PAUSE }) {
                Heard::Event(event) => event,
                Heard::Lost(count) => lost(story.elapsed(), count),
                Heard::Nothing if ending => return Ok(()),
                Heard::Nothing => continue,
                Heard::Closed => return Ok(()),
            };
            self.write(&encode(event))?;
        }
    }

    /// Writes one object whole: half of one would spoil all that follow.
    fn write(&self, bytes: &[u8]) -> Result<(), WireError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let pause = Instant::now() + PAUSE;
            match wire::wait(
                self.file.as_fd(),
                PollFlags::OUT,
                Some(self.end.get().map_or(pause, |end| pause.min(*end))),
            ) {
                Ok(()) => {}
                Err(WireError::Late) if self.end.get().is_none_or(|end| Instant::now() < *end) => continue,
                Err(error) => return Err(error),
            }
            match self.write_now(rest) {
                Ok(moved) => rest = rest.get(moved..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn write_now(&self, bytes: &[u8]) -> Result<usize, Errno> {
        // Flags of an inherited descriptor are shared with who gave it, so they stay. A pipe that has room at all has room
        // for a whole object; a socket may have less, and must be told not to wait.
        match rustix::net::send(&self.file, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::NOTSOCK) => rustix::io::write(&self.file, bytes),
            other => other,
        }
    }
}

/// An event with all its keys: clients look for them.
#[derive(Serialize)]
struct Told<'a> {
    timestamp: Duration,
    source: &'a str,
    event: &'a str,
    properties: Option<&'a BTreeMap<String, String>>,
}

/// Writes an event in at most [`EVENT_MAX`] bytes, with shorter properties where it must be.
fn encode(mut event: StoryEvent) -> Vec<u8> {
    for budget in [usize::MAX, 256, 64, 16] {
        event.properties.values_mut().for_each(|value| shorten(value, budget));
        let properties = Some(&event.properties).filter(|properties| !properties.is_empty());
        if let Some(bytes) = encode_whole(&event, properties) {
            return bytes;
        }
    }
    shorten(&mut event.source, 64);
    shorten(&mut event.event, 64);
    encode_whole(&event, None).unwrap_or_default()
}

fn encode_whole(event: &StoryEvent, properties: Option<&BTreeMap<String, String>>) -> Option<Vec<u8>> {
    let StoryEvent { timestamp, source, event, .. } = event;
    let mut bytes = braceless_json(&Told { timestamp: *timestamp, source, event, properties }).ok()?;
    bytes.push(b'\n');
    (bytes.len() <= EVENT_MAX).then_some(bytes)
}

fn shorten(text: &mut String, characters: usize) {
    if let Some((end, _)) = text.char_indices().nth(characters) {
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    use proptest::prelude::*;
    use serde_json::{Deserializer, Value};

    use super::*;

    #[test]
    fn the_command_line_says_where() {
        assert_eq!("path=a".parse::<EventMonitorAt>().unwrap(), EventMonitorAt::Path("a".into()));
        assert_eq!("fd=3".parse::<EventMonitorAt>().unwrap(), EventMonitorAt::Descriptor(3));
        for text in ["", "a", "path=", "fd=", "fd=-2"] {
            assert!(text.parse::<EventMonitorAt>().is_err(), "{text}");
        }
    }

    /// A FIFO that nobody reads neither stops the machine nor loses what its reader, when it comes, can still have.
    #[test]
    fn nobody_waits_for_a_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let story = Story::default();
        let monitor = EventMonitor::start(&EventMonitorAt::Path(path.clone()), &story).unwrap();
        let text = "{ \u{e4}".repeat(30);
        let begun = Instant::now();
        for number in 0..20_000 {
            story.tell("vm", "tick", [("number", number.to_string()), ("text", text.clone())]);
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "telling waited for a reader");
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        monitor.stop(Duration::ZERO);
        let mut bytes = Vec::new();
        let _ = reader.read_to_end(&mut bytes);
        let events: Vec<Value> =
            Deserializer::from_slice(&bytes).into_iter().collect::<Result<_, _>>().expect("whole objects");
        assert!(events.iter().any(|event| event["event"] == "tick" && event["properties"]["text"] == text));
        assert!(events.iter().all(|event| event["timestamp"]["nanos"].is_u64()));
    }

    /// What was told before the end is written, and an inherited socket that has little room gets objects whole.
    #[test]
    fn the_last_events_are_written() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 4096).unwrap();
        let story = Story::default();
        let at = EventMonitorAt::Descriptor(theirs.into_raw_fd());
        let monitor = EventMonitor::start(&at, &story).unwrap();
        let reader = thread::spawn(move || {
            let events = Deserializer::from_reader(ours).into_iter::<Value>();
            events.map(|event| event.expect("a whole object")["event"].clone()).collect::<Vec<_>>()
        });
        for _ in 0..100 {
            story.tell("vm", "busy", [("text", "x".repeat(3000))]);
        }
        story.tell("vmm", "shutdown", []);
        monitor.stop(Duration::from_secs(20));
        let heard = reader.join().unwrap();
        assert_eq!((heard.len(), heard.last().cloned()), (101, Some("shutdown".into())));
    }

    #[test]
    fn what_cannot_be_written_to_is_refused() {
        let read_only = File::open("/dev/null").unwrap().into_raw_fd();
        for fd in [read_only, 1_000_000] {
            let error = EventMonitor::start(&EventMonitorAt::Descriptor(fd), &Story::default()).err();
            assert!(matches!(error, Some(MonitorError::Descriptor(_))));
        }
        let nowhere = EventMonitorAt::Path("/nowhere/at/all".into());
        assert!(matches!(EventMonitor::start(&nowhere, &Story::default()).err(), Some(MonitorError::Open { .. })));
    }

    proptest! {
        /// However long its texts are, an object fits into what clients read at once, and a brace is always structure.
        #[test]
        fn an_event_fits(
            source in "\\PC{0,20}",
            properties in prop::collection::btree_map("\\PC{0,40}", "\\PC{0,3000}", 0..12),
        ) {
            let event = StoryEvent { timestamp: Duration::MAX, source, event: "crashed".into(), properties };
            let bytes = encode(event);
            prop_assert!(!bytes.is_empty() && bytes.len() <= EVENT_MAX);
            let value: Value = serde_json::from_slice(&bytes).unwrap();
            prop_assert_eq!(&value["event"], "crashed");
            let depth = bytes.iter().filter(|byte| **byte == b'{').count();
            prop_assert_eq!(depth, if value["properties"].is_null() { 2 } else { 3 });
        }
    }
}
