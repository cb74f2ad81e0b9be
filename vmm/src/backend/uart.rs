//! The second serial port of the board, served by `atoll-uart`: a device of registers elsewhere.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_devices::{Wire, WireSink};
use atoll_protocol::bus::Region;
use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::{DeviceId, RegionIndex, Space};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use thiserror::Error;

use super::household::Household;
use super::policy::PolicyConfig;
use super::registers::{RegisterBackend, RegisterProcess};
use super::spec::{PassedFd, WatchLimits, beside_this_binary};
use crate::actor::remote::RemoteShape;
use crate::lifecycle::{DeviceReport, DeviceState, Story};
use crate::machine::layout::{COM2, COM2_GSI};
use crate::machine::{Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError, Transcript};

/// Its number among the devices of a machine; disks count from 0.
const DEVICE: DeviceId = DeviceId(0x1000);
/// What it is called on the board.
const NAME: &str = "serial1";
/// How long one access may take. A process that needs longer for a byte is stuck.
const ACCESS_MAX: Duration = Duration::from_secs(1);

/// Where the port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UartOutput {
    /// A file that gets what the guest prints.
    File(PathBuf),
    /// A new pseudo-terminal, whose name is logged.
    Pty,
}

/// Why the port cannot be had.
#[derive(Debug, Error)]
pub enum UartError {
    /// The file cannot be written.
    #[error("{} cannot be opened for the serial port: {source}; name a file in a folder that can be written", .path.display())]
    Output {
        /// Which file.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("no pseudo-terminal for the serial port: {0}; give it a file instead")]
    Pty(#[source] io::Error),
    /// Where the running binary is cannot be told.
    #[error("atoll-uart cannot be found: {0}")]
    Binary(#[source] io::Error),
}

#[derive(Debug)]
enum End {
    File(Transcript),
    Pty(OwnedFd),
}

/// The host's end of the line: opened once, it outlives the incarnations of the process and the resets of the guest.
#[derive(Debug)]
pub struct UartLine {
    end: End,
    /// A pseudo-terminal hangs up when nobody holds its other side.
    _other_side: Option<OwnedFd>,
    /// What people open to get to it.
    name: Option<String>,
}

impl UartLine {
    /// Opens the file, or makes the pseudo-terminal.
    ///
    /// # Errors
    /// [`UartError::Output`] and [`UartError::Pty`].
    pub fn open(output: &UartOutput) -> Result<Self, UartError> {
        match output {
            UartOutput::File(path) => {
                let named = |source| UartError::Output { path: path.clone(), source };
                Ok(Self { end: End::File(Transcript::open(path).map_err(named)?), _other_side: None, name: None })
            }
            UartOutput::Pty => Self::pty().map_err(UartError::Pty),
        }
    }

    /// A guest begins to print.
    pub fn begin(&self) {
        if let End::File(file) = &self.end {
            file.begin();
        }
    }

    fn pass(&self) -> io::Result<OwnedFd> {
        match &self.end {
            End::File(file) => file.file().try_clone().map(OwnedFd::from),
            End::Pty(end) => end.try_clone(),
        }
    }

    fn pty() -> io::Result<Self> {
        let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&end)?;
        unlockpt(&end)?;
        let name = ptsname(&end, Vec::new())?.to_string_lossy().into_owned();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let other = rustix::fs::open(name.as_str(), flags, Mode::empty())?;
        let mut attributes = tcgetattr(&other)?;
        attributes.make_raw();
        tcsetattr(&other, OptionalActions::Now, &attributes)?;
        tracing::info!("the second serial port is at {name}");
        Ok(Self { end: End::Pty(end), _other_side: Some(other), name: Some(name) })
    }

    /// Name of the pseudo-terminal, where the line leads to one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

/// Makes the port.
pub struct UartBuilder {
    line: Arc<UartLine>,
    binary: Option<PathBuf>,
    household: Arc<Household>,
    story: Option<Story>,
}

impl UartBuilder {
    /// A port at the end of `line`, whose process `household` starts and keeps.
    #[must_use]
    pub fn new(line: Arc<UartLine>, household: Arc<Household>) -> Self {
        Self { line, binary: None, household, story: None }
    }

    /// Another binary than `atoll-uart` beside the running one.
    #[must_use]
    pub fn binary(self, binary: PathBuf) -> Self {
        Self { binary: Some(binary), ..self }
    }

    /// One whose lives are told in `story`.
    #[must_use]
    pub fn telling(self, story: &Story) -> Self {
        Self { story: Some(story.clone()), ..self }
    }

    /// How the process is started, apart from any board.
    ///
    /// # Errors
    /// All of [`UartError`].
    pub fn process(&self, wire: Wire) -> Result<RegisterProcess, UartError> {
        let exe = match &self.binary {
            Some(binary) => binary.clone(),
            None => beside_this_binary("atoll-uart").map_err(UartError::Binary)?,
        };
        let line = Arc::clone(&self.line);
        let fds = move || Ok(vec![PassedFd { flag: "--output-fd".into(), fd: line.pass()? }]);
        Ok(RegisterProcess {
            name: self.name(),
            device: DEVICE,
            exe,
            args: Vec::new(),
            fds: Box::new(fds),
            shape: RemoteShape {
                class: DeviceClass::Uart,
                regions: vec![Region { space: Space::Pio, length: COM2.len }],
            },
            wires: vec![wire],
            budget: ACCESS_MAX,
            limits: WatchLimits::default(),
            policy: PolicyConfig::default(),
            story: self.story.clone(),
        })
    }
}

impl DeviceBuilder for UartBuilder {
    fn name(&self) -> String {
        NAME.into()
    }

    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let socket = Arc::<Socket>::default();
        let wire = Wire::new(Arc::clone(&socket) as Arc<dyn WireSink>, 0);
        let process = self.process(wire).map_err(|error| BuildError::new(NAME, error))?;
        let backend = RegisterBackend::start(process, &self.household).map_err(|error| BuildError::new(NAME, error))?;
        place(UartLife { backend, socket }, board)
    }
}

/// The port whose board is gone, on the next one, with its process.
struct Survivor(UartLife);

impl DeviceBuilder for Survivor {
    fn name(&self) -> String {
        NAME.into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        place(self.0, board)
    }
}

fn place(port: UartLife, board: &mut Board) -> Result<BuiltDevice, BuildError> {
    port.socket.plug(Some(board.wire(COM2_GSI)));
    if let Some(registers) = port.backend.remote().region(RegionIndex(0)) {
        let added = board.add_registers(NAME, Space::Pio, COM2, registers);
        added.map_err(|error| BuildError::new(NAME, error))?;
    }
    Ok(BuiltDevice { name: NAME.into(), place: None, life: Box::new(port) })
}

/// Where the wire of the process ends: at the board that there is. Boards come and go, the process stays.
#[derive(Default)]
struct Socket(Mutex<Option<Wire>>);

impl Socket {
    fn plug(&self, wire: Option<Wire>) {
        let before = std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), wire);
        if let Some(before) = before {
            before.set(false);
        }
    }
}

impl WireSink for Socket {
    fn set_level(&self, _line: u32, high: bool) {
        if let Some(wire) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            wire.set(high);
        }
    }
}

struct UartLife {
    backend: RegisterBackend,
    socket: Arc<Socket>,
}

impl DeviceLife for UartLife {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.backend.stop(deadline);
        Ok(())
    }
    fn report(&self) -> Option<DeviceReport> {
        Some(self.backend.report())
    }
    fn survive(mut self: Box<Self>, deadline: Instant) -> Option<Box<dyn DeviceBuilder>> {
        self.socket.plug(None);
        if self.backend.report().state == DeviceState::Quarantined {
            // A reset is a new chance: the next one starts from the beginning.
            self.backend.stop(deadline);
            return None;
        }
        self.backend.remote().reset();
        Some(Box::new(Survivor(*self)))
    }
}
