//! The virtio console, served by `atoll-console` (virtio 1.2, 5.3).
//!
//! The host's end of the first port is opened here, once for the life of the VMM process: a pseudo-terminal keeps its name
//! and a socket its clients' path over restarts of the backend and resets of the guest.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::CONSOLE;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use thiserror::Error;

use super::{Host, Kind, KindError};
use crate::backend::PassedFd;
use crate::config::{ConsoleConfig, ConsoleMode};
use crate::machine::Transcript;
use crate::vhost::class::{ConfigWish, DeviceClass, too_few_queues};
use crate::vhost::error::ConversationError;
use crate::vhost::session::Capabilities;
use crate::vhost::source::BackendSource;

const QUEUE_SIZE: u16 = 128;
/// cols, rows, max_nr_ports, emerg_wr.
const CONFIG_LEN: u32 = 12;
const MAX_PORTS_AT: usize = 4;
/// VIRTIO_CONSOLE_F_MULTIPORT.
const MULTIPORT: u64 = 1 << 1;
/// Receive and transmit queue of a port; the control queues are such a pair too.
const PAIR: u32 = 2;
/// Queues of `atoll-console` with one port: its pair and that of control messages.
const OWN_QUEUES: u16 = 4;
/// Most ports that a backend may offer.
const PORTS_MAX: u32 = 31;

/// Why the host's end of the console cannot be had.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// A mode without what it needs.
    #[error("mode {mode:?} needs {key}=PATH")]
    Missing {
        /// The mode.
        mode: ConsoleMode,
        /// What it needs.
        key: &'static str,
    },
    /// Not there.
    #[error(
        "mode {0:?} is not supported for the virtio console: use it for --serial, or give the console pty, file or socket"
    )]
    Unsupported(ConsoleMode),
    /// The file cannot be written.
    #[error("{} cannot be opened: {source}; name a file in a folder that can be written", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Something is there.
    #[error("{} is taken: name another path, or end who listens there", .0.display())]
    Taken(PathBuf),
    /// The socket cannot be made.
    #[error("no socket at {}: {source}; name a path of at most 107 bytes in a folder that can be written", .path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("no pseudo-terminal for the console: {0}; give it a file instead")]
    Pty(#[source] io::Error),
}

/// The host's end of the first port.
enum End {
    /// Bytes go both ways through it.
    Stream(OwnedFd),
    /// What the guest prints goes there.
    File(Transcript),
    /// One client at a time connects to it. The path goes with it.
    Listener(UnixListener, PathBuf),
}

/// What is opened once.
struct Line {
    end: End,
    /// A pseudo-terminal hangs up when nobody holds its other side.
    _other_side: Option<OwnedFd>,
    /// Name of the pseudo-terminal.
    name: Option<PathBuf>,
}

impl Drop for Line {
    fn drop(&mut self) {
        if let End::Listener(_, path) = &self.end {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The line of a VMM's console, opened with the first machine that has one.
#[derive(Clone, Default)]
pub(in crate::vhost) struct ConsoleLine(Arc<Mutex<Option<Kept>>>);

/// A line and the configuration that it was opened for.
type Kept = (ConsoleConfig, Arc<Line>);

impl ConsoleLine {
    /// Where its pseudo-terminal is.
    pub(in crate::vhost) fn terminal(&self) -> Option<PathBuf> {
        let line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        line.as_ref().and_then(|(_, line)| line.name.clone())
    }
    /// A guest begins to print.
    pub(in crate::vhost) fn begin(&self) {
        let line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, line)) = line.as_ref()
            && let End::File(file) = &line.end
        {
            file.begin();
        }
    }
    /// The line that is open, or one that is opened now.
    fn open(&self, config: &ConsoleConfig) -> Result<Arc<Line>, ConsoleError> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, line)) = kept.as_ref()
            && known == config
        {
            return Ok(Arc::clone(line));
        }
        *kept = None;
        let line = Arc::new(Line::open(config)?);
        *kept = Some((config.clone(), Arc::clone(&line)));
        Ok(line)
    }
}

impl Line {
    fn open(config: &ConsoleConfig) -> Result<Self, ConsoleError> {
        let mode = config.mode;
        let plain = |end| Ok(Self { end, _other_side: None, name: None });
        match mode {
            ConsoleMode::Off | ConsoleMode::Tty => Err(ConsoleError::Unsupported(mode)),
            ConsoleMode::Null => {
                let path = PathBuf::from("/dev/null");
                let file = OpenOptions::new().read(true).write(true).open(&path);
                plain(End::Stream(file.map_err(|source| ConsoleError::File { path, source })?.into()))
            }
            ConsoleMode::File => {
                let path = config.file.clone().ok_or(ConsoleError::Missing { mode, key: "file" })?;
                let file = Transcript::open(&path);
                plain(End::File(file.map_err(|source| ConsoleError::File { path, source })?))
            }
            ConsoleMode::Socket => {
                let path = config.socket.clone().ok_or(ConsoleError::Missing { mode, key: "socket" })?;
                plain(End::Listener(listen(&path)?, path))
            }
            ConsoleMode::Pty => Self::pty().map_err(ConsoleError::Pty),
        }
    }

    fn pty() -> io::Result<Self> {
        let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&end)?;
        unlockpt(&end)?;
        let name = PathBuf::from(ptsname(&end, Vec::new())?.to_string_lossy().into_owned());
        let other = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let mut attributes = tcgetattr(&other)?;
        attributes.make_raw();
        tcsetattr(&other, OptionalActions::Now, &attributes)?;
        tracing::info!("the console is at {}", name.display());
        Ok(Self { end: End::Stream(end), _other_side: Some(other), name: Some(name) })
    }

    /// What an incarnation of the backend gets.
    fn pass(&self) -> io::Result<PassedFd> {
        Ok(match &self.end {
            End::Stream(end) => PassedFd { flag: "--port-fd".into(), fd: end.try_clone()? },
            End::File(file) => PassedFd { flag: "--port-fd".into(), fd: file.file().try_clone()?.into() },
            End::Listener(listener, _) => PassedFd { flag: "--listen-fd".into(), fd: listener.try_clone()?.into() },
        })
    }
}

/// Listens at `path`; a socket that nobody listens on any more is replaced.
fn listen(path: &Path) -> Result<UnixListener, ConsoleError> {
    let failed = |source| ConsoleError::Socket { path: path.to_owned(), source };
    if let Ok(there) = path.symlink_metadata() {
        if !there.file_type().is_socket() || UnixStream::connect(path).is_ok() {
            return Err(ConsoleError::Taken(path.to_owned()));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    UnixListener::bind(path).map_err(failed)
}

/// A console as it is configured.
pub(in crate::vhost) struct Console {
    pub(in crate::vhost) config: ConsoleConfig,
    pub(in crate::vhost) line: ConsoleLine,
}

impl Console {
    /// Refuses what could not be opened in any case.
    pub(in crate::vhost) fn check(config: &ConsoleConfig) -> Result<(), ConsoleError> {
        let mode = config.mode;
        match mode {
            ConsoleMode::Off | ConsoleMode::Tty => Err(ConsoleError::Unsupported(mode)),
            ConsoleMode::File if config.file.is_none() => Err(ConsoleError::Missing { mode, key: "file" }),
            ConsoleMode::Socket if config.socket.is_none() => Err(ConsoleError::Missing { mode, key: "socket" }),
            _ => Ok(()),
        }
    }
}

impl Kind for Console {
    fn shown(&self) -> String {
        "--console".into()
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(ConsoleClass)
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Other(u32::from(CONSOLE))
    }
    fn own_queues(&self) -> Option<u16> {
        Some(OWN_QUEUES)
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        let line = self.line.open(&self.config)?;
        let descriptors = move || Ok(vec![line.pass()?]);
        host.process("atoll-console", self.sidecar(), Vec::new(), Box::new(descriptors))
    }
}

/// As many ports as the backend has.
struct ConsoleClass;

impl DeviceClass for ConsoleClass {
    fn device_type(&self) -> u16 {
        CONSOLE
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::AnyOf(&[CONFIG_LEN])
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        let mut features = backend.features;
        let told = backend.config.get(MAX_PORTS_AT..).and_then(|rest| rest.first_chunk::<4>());
        let ports = match told {
            Some(bytes) if features & MULTIPORT != 0 => u32::from_le_bytes(*bytes).clamp(1, PORTS_MAX),
            _ => {
                features &= !MULTIPORT;
                1
            }
        };
        // Every port has a pair; with more than one possible port a second pair carries control messages.
        let queues = PAIR * if features & MULTIPORT != 0 { ports + 1 } else { 1 };
        if let Some(has) = backend.queues.filter(|has| u32::from(*has) < queues) {
            return Err(too_few_queues(queues as usize, has));
        }
        let mut config = backend.config.clone();
        if let Some(field) = config.get_mut(MAX_PORTS_AT..MAX_PORTS_AT + 4) {
            field.copy_from_slice(&ports.to_le_bytes());
        }
        Ok(DeviceOffer {
            device_type: CONSOLE,
            features,
            queue_sizes: vec![QUEUE_SIZE; queues as usize],
            config,
            pages: Pages::default(),
        })
    }
    fn in_order(&self) -> bool {
        true
    }
}
