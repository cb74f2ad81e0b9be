//! A device of registers that is served elsewhere, by a process that the VMM starts and keeps alive ([`Kept`]). A stalled
//! incarnation is killed, so that one access is late and not every one. In quarantine nobody is asked any more: the registers
//! read as all ones at once.

use std::error::Error as StdError;
use std::ffi::OsString;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_devices::interrupt::Wire;
use atoll_protocol::{DeviceId, Generation};

use super::household::Household;
use super::kept::{ATTACH_MAX, Attachment, Kept, KeptError, KeptProcess};
use super::policy::PolicyConfig;
use super::spec::{PassedFd, WatchLimits};
use crate::actor::remote::{Remote, RemoteShape};
use crate::config::DeviceKind;
use crate::lifecycle::{DeviceReport, Story};

/// Opens what each incarnation inherits besides the bus.
type MakeFds = Box<dyn FnMut() -> std::io::Result<Vec<PassedFd>> + Send>;

/// How to start each incarnation of a device's backend.
pub struct RegisterProcess {
    /// Name of the device, for errors and logs.
    pub name: String,
    /// The device.
    pub device: DeviceId,
    /// Its binary.
    pub exe: PathBuf,
    /// Its arguments, without those of descriptors.
    pub args: Vec<OsString>,
    /// Descriptors besides the bus, made anew for each incarnation.
    pub fds: MakeFds,
    /// What it must serve.
    pub shape: RemoteShape,
    /// Its interrupt wires.
    pub wires: Vec<Wire>,
    /// How long an access may take.
    pub budget: Duration,
    /// Deadlines of a start.
    pub limits: WatchLimits,
    /// When to give it up.
    pub policy: PolicyConfig,
    /// Where its lives are told.
    pub story: Option<Story>,
}

impl fmt::Debug for RegisterProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisterProcess({}, {})", self.name, self.exe.display())
    }
}

/// The bus's end, and what the next incarnation gets of it.
struct Registers {
    remote: Arc<Remote>,
    more: Mutex<MakeFds>,
    ours: Mutex<Option<UnixStream>>,
}

impl Attachment for Registers {
    fn descriptors(&self) -> std::io::Result<Vec<PassedFd>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut fds = vec![PassedFd { flag: "--bus-fd".into(), fd: OwnedFd::from(theirs) }];
        fds.extend((self.more.lock().unwrap_or_else(PoisonError::into_inner))()?);
        *self.ours.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
        Ok(fds)
    }
    fn attach(&self, generation: Generation) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ours = ours.ok_or("it was started without a bus")?;
        Ok(self.remote.attach(ours.into(), generation, ATTACH_MAX)?)
    }
    fn detach(&self) {
        self.remote.detach();
    }
    fn give_up(&self) {
        self.remote.give_up();
    }
    fn done(&self) -> u64 {
        self.remote.counts().answered
    }
}

/// A served device. Dropping it ends the process at once.
#[derive(Debug)]
pub struct RegisterBackend {
    kept: Kept,
    remote: Arc<Remote>,
}

impl RegisterBackend {
    /// Starts the first incarnation and waits until it serves.
    ///
    /// # Errors
    /// All of [`KeptError`]; no process is left then.
    pub fn start(process: RegisterProcess, household: &Household) -> Result<Self, KeptError> {
        let RegisterProcess { name, device, exe, args, fds, shape, wires, budget, limits, policy, story } = process;
        let class = shape.class;
        let remote = Remote::new(device, shape, wires, None, household.surroundings(budget));
        let remote = Arc::new(remote.map_err(|source| KeptError::Host { name: name.clone(), source })?);
        let registers = Registers { remote: Arc::clone(&remote), more: Mutex::new(fds), ours: Mutex::default() };
        let kind = DeviceKind::Uart;
        let process = KeptProcess { name, device, kind, class, exe, args, limits, policy, story };
        Ok(Self { kept: Kept::start(process, Arc::new(registers), household)?, remote })
    }

    /// The bus's end, whose regions the board maps.
    #[must_use]
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// What an operator is told of it.
    #[must_use]
    pub fn report(&self) -> DeviceReport {
        self.kept.report()
    }

    /// Asks the process to end, kills it at `deadline`, and waits for its end.
    pub fn stop(&mut self, deadline: Instant) {
        self.kept.stop(deadline);
    }
}
