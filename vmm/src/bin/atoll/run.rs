//! `run`: from the description of a machine to its end.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use atoll_vmm::actor::RealClock;
use atoll_vmm::api::{Api, ApiServer, EventMonitor, ListenAt, own_inherited};
use atoll_vmm::backend::Household;
use atoll_vmm::config::{ConsoleConfig, ConsoleMode, VmConfig};
use atoll_vmm::lifecycle::{Controller, Home, Settings, Story, VmControl, VmError, VmmEnd};
use atoll_vmm::machine::{MachineEnd, MachineEvent, StopCause};
use atoll_vmm::rundir::{API_SOCKET, RunDir, RunDirError, RunRoot};
use atoll_vmm::seccomp::{self, ThreadClass};

use crate::cli::RunArgs;
use crate::console;
use crate::described::{Described, UsageError};
use crate::report::{self, Report};
use crate::signals;
use crate::terminal::RawTerminal;

/// How long device processes have to end by themselves before they are killed.
const BACKEND_GRACE: Duration = Duration::from_secs(2);
/// How long requests at hand may take to be answered at the end.
const API_GRACE: Duration = Duration::from_secs(1);

/// Why a machine did not run to a good end.
pub(crate) enum RunError {
    /// The options are wrong.
    Usage(UsageError),
    /// Something else is.
    Failed(anyhow::Error),
}

impl From<UsageError> for RunError {
    fn from(error: UsageError) -> Self {
        Self::Usage(error)
    }
}

impl From<anyhow::Error> for RunError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> RunError {
    RunError::Failed(error.into())
}

/// What a descriptor is to be, and how a shell opens it for a command.
pub(crate) const TAP: &str = "the card's TAP, open: 9<>/dev/tapN behind the command, with fd=9 in it";
pub(crate) const GROUP: &str = "the function's group, open: 9<>/dev/vfio/GROUP behind the command, with fd=9 in it";

/// Takes a descriptor that this process was started with; `wanted` is what it should be.
pub(crate) fn inherited(option: &str, fd: i32, wanted: &str) -> Result<OwnedFd, UsageError> {
    let why = match fd {
        ..0 => "a descriptor is a number from 0 on",
        _ => "atoll was started without a descriptor of that number",
    };
    own_inherited(fd).ok_or_else(|| UsageError::Where(format!("{option} fd={fd}: {why}; pass {wanted}")))
}

/// Takes the descriptors that `--net fd=` and `--device fd=` name.
fn take_descriptors(vm: &mut VmConfig) -> Result<(), UsageError> {
    for net in vm.net.iter_mut().flatten() {
        for fd in net.fds.iter().flatten() {
            net.descriptors.0.push(Arc::new(inherited("--net", *fd, TAP)?));
        }
    }
    for function in vm.devices.iter_mut().flatten() {
        if let Some(fd) = function.fd {
            function.group.0.push(Arc::new(inherited("--device", fd, GROUP)?));
        }
    }
    Ok(())
}

/// Everything that serves people besides the machine itself.
struct Desk {
    servers: Vec<ApiServer>,
    monitor: Option<EventMonitor>,
}

impl Desk {
    fn open(
        described: &Described,
        folder: &RunDir,
        api: &Api,
        monitor: Option<EventMonitor>,
    ) -> Result<Self, RunError> {
        let own = ListenAt::Path(folder.path().join(API_SOCKET));
        let mut servers = Vec::new();
        for at in described.api_socket.iter().chain([&own]) {
            let listener = at.open().map_err(|error| match error.is_mistake() {
                true => RunError::Usage(UsageError::Where(format!("--api-socket: {error}"))),
                false => failed(error),
            })?;
            servers.push(ApiServer::start(listener, api.clone()).map_err(failed)?);
        }
        Ok(Self { servers, monitor })
    }

    fn close(self) {
        for server in self.servers {
            server.stop(API_GRACE);
        }
        if let Some(monitor) = self.monitor {
            monitor.stop(API_GRACE);
        }
    }
}

/// Runs what the options describe; the exit status.
pub(crate) fn run(args: &RunArgs) -> Result<u8, RunError> {
    let mut described = Described::read(args)?;
    described.check()?;
    if let Some(path) = &args.report {
        report::check(path)?;
    }
    take_descriptors(&mut described.vm)?;
    let root = RunRoot::of_user().map_err(failed)?;
    let folder = match &described.name {
        Some(name) => root.claim(name),
        None => root.claim_free(),
    };
    let folder = folder.map_err(|error| match error {
        RunDirError::Name { .. } => RunError::Usage(UsageError::Where(format!("--name: {error}"))),
        _ => failed(error),
    })?;
    described.settle(folder.path())?;
    signals::block()?;
    // Before there is any thread that a guest could drive.
    if let Err(error) = seccomp::choose(args.seccomp.into()) {
        tracing::warn!("threads run without filters of system calls: {error}");
    }
    let household = Arc::new(Household::new(Arc::new(RealClock::new())).map_err(failed)?);
    let ended = watched(args, &described, &root, &folder, &household);
    household.shutdown(BACKEND_GRACE);
    ended
}

fn watched(
    args: &RunArgs,
    described: &Described,
    root: &RunRoot,
    folder: &RunDir,
    household: &Arc<Household>,
) -> Result<u8, RunError> {
    let story = Story::default();
    // Before the controller, so that the monitor hears of its start.
    let monitor = described.event_monitor.as_ref().map(|at| EventMonitor::start(at, &story));
    let monitor = monitor.transpose().map_err(failed)?;
    let home = Home { name: folder.name().into(), runtime_dir: root.path().into() };
    let settings = Settings::new(home, story.clone(), Arc::clone(household));
    let (controller, ended) = Controller::start(settings).map_err(failed)?;
    signals::listen(controller.events()).map_err(failed)?;
    let control: Arc<dyn VmControl> = Arc::clone(&controller) as _;
    let (registry, counted) = (household.metrics().clone(), Arc::clone(&control));
    // A machine that is busy with something else has its figures all the same; only instructions must be asked for.
    let metrics = Arc::new(move || counted.metrics().unwrap_or_else(|_| registry.prometheus()));
    let desk = Desk::open(described, folder, &Api { control, story, metrics }, monitor)?;
    let on_terminal =
        |port: &Option<_>| port.as_ref().is_some_and(|port: &ConsoleConfig| port.mode == ConsoleMode::Tty);
    let raw = (on_terminal(&described.vm.serial) || on_terminal(&described.vm.console)) && !described.waits_for_api();
    let _raw = if raw { RawTerminal::enter() } else { None };
    let began = begin(&controller, described, folder.name());
    if began.is_ok() && on_terminal(&described.vm.console) {
        carry_console(&controller)?;
    }
    if began.is_err() {
        // Ends the thread that would keep the machine.
        controller.stop(StopCause::Escape);
    }
    let VmmEnd { end, figures } = ended.wait();
    desk.close();
    // A boot that was given up because somebody wants the machine to end is no failure of the machine's.
    if !matches!(end, MachineEnd::Asked | MachineEnd::Stopped(StopCause::Signal(_))) {
        began.map_err(failed)?;
    }
    if let Some(path) = &args.report {
        Report::new(figures.cpu, &figures, &end).write(path)?;
    }
    match end {
        MachineEnd::PowerOff | MachineEnd::Reset | MachineEnd::Asked | MachineEnd::Stopped(StopCause::Escape) => Ok(0),
        MachineEnd::Stopped(StopCause::Signal(signal)) => Ok(signals::exit_status(signal)),
        MachineEnd::Failed(text) => Err(RunError::Failed(anyhow::anyhow!(text))),
    }
}

/// Connects the terminal with the virtio console, until the machine ends or the escape is typed.
fn carry_console(controller: &Arc<Controller>) -> anyhow::Result<()> {
    let console = controller.info()?.config.console.and_then(|console| console.file);
    let Some(path) = console else {
        anyhow::bail!("the virtio console has no pseudo terminal; give it a socket instead")
    };
    let far = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path)?;
    let events = controller.events();
    std::thread::Builder::new().name("console".into()).spawn(move || {
        seccomp::enter(ThreadClass::Line);
        match console::relay(&far, None) {
            Ok(console::Parted::Escape) => events.tell(MachineEvent::Stop(StopCause::Escape)),
            Ok(console::Parted::Machine | console::Parted::Input) => {}
            Err(error) => tracing::warn!("the terminal and the virtio console have parted: {error:#}"),
        }
    })?;
    Ok(())
}

/// Boots the machine, unless it comes over the API.
fn begin(controller: &Controller, described: &Described, name: &str) -> Result<(), VmError> {
    if described.waits_for_api() {
        tracing::info!(target: "atoll::machine", "{name} waits for vm.create");
        return Ok(());
    }
    let mut vm = described.vm.clone();
    if let Some(console) = vm.console.as_mut().filter(|console| console.mode == ConsoleMode::Tty) {
        // Its process has no terminal: it gets a pseudo terminal, and this one carries bytes.
        console.mode = ConsoleMode::Pty;
    }
    controller.create(vm)?;
    controller.boot()?;
    tracing::info!(target: "atoll::machine", "name: {name}");
    Ok(())
}
