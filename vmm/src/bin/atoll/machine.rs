//! From options to a running machine, and again when the guest resets.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use atoll_vmm::actor::RealClock;
use atoll_vmm::backend::{Household, UartBuilder, UartLine};
use atoll_vmm::cpu::probe::{Memo, Verdict, probe};
use atoll_vmm::machine::{
    CpuKind, DeviceBuilder, EventReceiver, EventSender, Machine, MachineConfig, MachineEnd, MachineFigures,
    SerialBuilder, SerialEnd, SerialMode, StopCause, chipset, events,
};
use atoll_vmm::vhost::{DiskBuilder, DiskConfig};

use crate::cli::{self, CpuChoice, RunArgs};
use crate::keyvalue::OptionError;
use crate::report::Report;
use crate::signals;
use crate::terminal::RawTerminal;

/// Why a machine did not run to a good end.
pub(crate) enum RunError {
    /// The options are wrong.
    Usage(OptionError),
    /// Something else is.
    Failed(anyhow::Error),
}

impl From<OptionError> for RunError {
    fn from(error: OptionError) -> Self {
        Self::Usage(error)
    }
}

impl From<anyhow::Error> for RunError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// The CPU that the options ask for, or that suits this host and why.
fn cpu(args: &RunArgs) -> (CpuKind, Option<Verdict>) {
    let verdict = match args.cpu {
        // Taken as asked; the trial says whether to expect much of it.
        CpuChoice::Kvm => return (CpuKind::Kvm, Some(probe(Memo::of_user().as_ref()))),
        CpuChoice::Soft => return (CpuKind::Soft, None),
        CpuChoice::Auto if args.deterministic => {
            Verdict { usable: false, reason: "--deterministic counts instructions, which KVM does not".into() }
        }
        CpuChoice::Auto => probe(Memo::of_user().as_ref()),
    };
    (if verdict.usable { CpuKind::Kvm } else { CpuKind::Soft }, Some(verdict))
}

/// Where COM1 leads; opened once, handed to each incarnation of the machine as a copy.
enum SerialTarget {
    Terminal(File, File),
    File(File),
    Null,
    Off,
}

impl SerialTarget {
    fn open(mode: &SerialMode) -> anyhow::Result<Self> {
        let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        Ok(match mode {
            SerialMode::Tty => Self::Terminal(copy(std::io::stdin().as_fd())?, copy(std::io::stdout().as_fd())?),
            SerialMode::File(path) => Self::File(SerialEnd::create(path)?),
            SerialMode::Null => Self::Null,
            SerialMode::Off => Self::Off,
        })
    }
    fn builder(&self, events: &EventSender) -> anyhow::Result<Option<Box<dyn DeviceBuilder>>> {
        let end = match self {
            Self::Terminal(input, output) => {
                SerialEnd::Terminal { input: input.try_clone()?, output: output.try_clone()?, events: events.clone() }
            }
            Self::File(file) => SerialEnd::Output(file.try_clone()?),
            Self::Null => SerialEnd::Null,
            Self::Off => return Ok(None),
        };
        Ok(Some(Box::new(SerialBuilder::new(end))))
    }
}

/// What each incarnation of the machine is built from.
struct Plan {
    config: MachineConfig,
    /// Why the configured CPU was taken, where Atoll chose it.
    choice: Option<Verdict>,
    serial: SerialTarget,
    disks: Vec<DiskConfig>,
    uart: Option<Arc<UartLine>>,
    backend_dir: Option<PathBuf>,
    household: Arc<Household>,
    events: EventSender,
}

impl Plan {
    /// All builders, in the order in which they take PCI slots.
    fn builders(&self) -> anyhow::Result<Vec<Box<dyn DeviceBuilder>>> {
        let mut builders = chipset();
        builders.extend(self.serial.builder(&self.events)?);
        if let Some(line) = &self.uart {
            let builder = UartBuilder::new(Arc::clone(line), Arc::clone(&self.household));
            builders.push(Box::new(match &self.backend_dir {
                Some(folder) => builder.binary(folder.join(cli::UART_BACKEND)),
                None => builder,
            }));
        }
        for (disk, index) in self.disks.iter().zip(0..) {
            builders.push(Box::new(DiskBuilder::new(disk.clone(), index, self.household.spawner().clone())));
        }
        Ok(builders)
    }

    /// Builds a machine and runs it to its end; the `first` says which CPU was chosen.
    fn run_once(
        &self,
        first: bool,
        receiver: &EventReceiver,
        figures: &mut MachineFigures,
    ) -> anyhow::Result<MachineEnd> {
        let mut machine = Machine::build(&self.config, self.builders()?, &self.events)?;
        // Only now: a mistake is one line, not the choice of a CPU that runs nothing and then the mistake.
        if let (Some(choice), true) = (&self.choice, first) {
            if self.config.cpu == CpuKind::Kvm && !choice.usable {
                let reason = &choice.reason;
                tracing::warn!(
                    "cpu: kvm, as asked, though a stock guest may stay silent on it: {reason}; see --cpu auto"
                );
            } else {
                tracing::info!("cpu: {choice}");
            }
        }
        machine.start()?;
        let end = machine.wait(receiver);
        figures.add(&machine.stop());
        Ok(end)
    }
}

/// Runs what the options describe; the exit status.
pub(crate) fn run(args: &RunArgs) -> Result<u8, RunError> {
    let disks = cli::disks(args)?;
    let serial2 = cli::serial2(args)?;
    let (kind, choice) = cpu(args);
    let config = cli::machine(args, kind)?;
    signals::block()?;
    let (events, receiver) = events();
    signals::listen(events.clone()).map_err(anyhow::Error::from)?;
    let serial = SerialTarget::open(&config.serial)?;
    let _raw = if config.serial == SerialMode::Tty { RawTerminal::enter() } else { None };
    let uart = serial2.map(|output| UartLine::open(&output)).transpose().map_err(anyhow::Error::from)?.map(Arc::new);
    let household = Arc::new(Household::new(Arc::new(RealClock::new())).map_err(anyhow::Error::from)?);
    let plan = Plan { config, choice, serial, disks, uart, backend_dir: args.backend_dir.clone(), household, events };
    let ended = run_to_end(&plan, args.report.as_deref(), &receiver);
    plan.household.shutdown(BACKEND_GRACE);
    ended
}

/// How long device processes have to end by themselves before they are killed.
const BACKEND_GRACE: Duration = Duration::from_secs(2);

/// Runs machines until one ends for good; the exit status.
fn run_to_end(plan: &Plan, report: Option<&Path>, receiver: &EventReceiver) -> Result<u8, RunError> {
    let mut figures = MachineFigures::default();
    let mut first = true;
    let end = loop {
        let end = plan.run_once(first, receiver, &mut figures)?;
        first = false;
        if end != MachineEnd::Reset {
            break end;
        }
        // What the machine that is gone has said since concerns nobody; a wish to stop does.
        if let Some(cause) = receiver.discard_stale() {
            break MachineEnd::Stopped(cause);
        }
        tracing::info!("the guest resets: it starts again");
    };
    if let Some(path) = report {
        Report::new(figures.cpu, &figures, &end).write(path)?;
    }
    match end {
        MachineEnd::PowerOff | MachineEnd::Reset | MachineEnd::Asked | MachineEnd::Stopped(StopCause::Escape) => Ok(0),
        MachineEnd::Stopped(StopCause::Signal(signal)) => Ok(signals::exit_status(signal)),
        MachineEnd::Failed(text) => Err(RunError::Failed(anyhow::anyhow!(text))),
    }
}
