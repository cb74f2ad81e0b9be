//! From options to a running machine, and again when the guest resets.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use atoll_vmm::actor::RealClock;
use atoll_vmm::backend::{Household, UartBuilder, UartLine, UartOutput};
use atoll_vmm::config::{ConsoleMode, CpuChoice, DeviceConfig, VmConfig};
use atoll_vmm::cpu::probe::{Memo, Verdict, probe};
use atoll_vmm::lifecycle::Story;
use atoll_vmm::machine::{
    CpuKind, DeviceBuilder, EventReceiver, EventSender, Machine, MachineConfig, MachineEnd, MachineFigures, SerialLine,
    StopCause, boot::BootSource, chipset, events,
};
use atoll_vmm::vhost::{DeviceFactory, FactoryParts, runtime_dir};

use crate::cli::RunArgs;
use crate::described::{Described, UsageError};
use crate::report::Report;
use crate::signals;
use crate::terminal::RawTerminal;

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

/// The CPU that the options ask for, or that suits this host and why.
fn cpu(vm: &VmConfig) -> (CpuKind, Option<Verdict>) {
    let verdict = match vm.platform.cpu {
        // Taken as asked; the trial says whether to expect much of it.
        CpuChoice::Kvm => return (CpuKind::Kvm, Some(probe(Memo::of_user().as_ref()))),
        CpuChoice::Soft => return (CpuKind::Soft, None),
        CpuChoice::Auto if vm.platform.deterministic => {
            Verdict { usable: false, reason: "--deterministic counts instructions, which KVM does not".into() }
        }
        CpuChoice::Auto => probe(Memo::of_user().as_ref()),
    };
    (if verdict.usable { CpuKind::Kvm } else { CpuKind::Soft }, Some(verdict))
}

/// Nanoseconds of guest time that 1000 instructions take in deterministic mode.
const DETERMINISTIC_NS_PER_1000: u32 = 1000;
/// What the name of the second serial port's executable is.
const UART_BACKEND: &str = "atoll-uart";

fn machine(vm: &VmConfig, cpu: CpuKind) -> MachineConfig {
    let payload = vm.payload.clone();
    MachineConfig {
        boot: BootSource {
            kernel: payload.kernel.unwrap_or_default(),
            initramfs: payload.initramfs,
            command_line: payload.cmdline.unwrap_or_default(),
        },
        memory_bytes: vm.memory.size,
        vcpus: vm.cpus.boot_vcpus,
        cpu,
        cpu_model: vm.platform.cpu_model.clone().unwrap_or_else(|| "atoll-v1".into()),
        deterministic: vm.platform.deterministic.then_some(DETERMINISTIC_NS_PER_1000),
        com1: vm.serial.as_ref().is_some_and(|port| port.mode != ConsoleMode::Off),
    }
}

fn uart(vm: &VmConfig) -> anyhow::Result<Option<Arc<UartLine>>> {
    let Some(port) = &vm.serial2 else { return Ok(None) };
    let output = match port.mode {
        ConsoleMode::Pty => UartOutput::Pty,
        ConsoleMode::File => UartOutput::File(port.file.clone().unwrap_or_default()),
        _ => return Ok(None),
    };
    Ok(Some(Arc::new(UartLine::open(&output)?)))
}

/// What each incarnation of the machine is built from.
struct Plan {
    config: MachineConfig,
    /// Why the configured CPU was taken, where Atoll chose it.
    choice: Option<Verdict>,
    serial: Option<SerialLine>,
    devices: Vec<DeviceConfig>,
    factory: DeviceFactory,
    uart: Option<Arc<UartLine>>,
    backend_dir: Option<PathBuf>,
    household: Arc<Household>,
    events: EventSender,
}

impl Plan {
    /// All builders, in the order in which they take PCI slots.
    fn builders(&self) -> anyhow::Result<Vec<Box<dyn DeviceBuilder>>> {
        let mut builders = chipset();
        builders.extend(self.serial.as_ref().map(|line| line.builder(&self.events)).transpose()?);
        if let Some(line) = &self.uart {
            let builder = UartBuilder::new(Arc::clone(line), Arc::clone(&self.household));
            builders.push(Box::new(match &self.backend_dir {
                Some(folder) => builder.binary(folder.join(UART_BACKEND)),
                None => builder,
            }));
        }
        for device in &self.devices {
            builders.push(self.factory.builder(device)?);
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
    let mut described = Described::read(args)?;
    described.settle(Path::new("."))?;
    let vm = described.vm;
    let (kind, choice) = cpu(&vm);
    let config = machine(&vm, kind);
    signals::block()?;
    let (events, receiver) = events();
    signals::listen(events.clone()).map_err(anyhow::Error::from)?;
    let terminal = vm.serial.as_ref().is_some_and(|port| port.mode == ConsoleMode::Tty);
    let serial = vm.serial.as_ref().map(SerialLine::open).transpose().map_err(anyhow::Error::from)?.flatten();
    let _raw = if terminal { RawTerminal::enter() } else { None };
    let uart = uart(&vm)?;
    let household = Arc::new(Household::new(Arc::new(RealClock::new())).map_err(anyhow::Error::from)?);
    let backend_dir = vm.platform.backend_dir.clone();
    let factory = DeviceFactory::new(FactoryParts {
        household: Arc::clone(&household),
        backend_dir: backend_dir.clone(),
        runtime_dir: runtime_dir(),
        vm: "atoll".into(),
        story: Story::default(),
    });
    let mut devices = vm.devices();
    for (device, index) in devices.iter_mut().zip(0..) {
        let kind = device.kind().name();
        device.name_it(|| format!("_{kind}{index}"));
    }
    let plan = Plan { config, choice, serial, devices, factory, uart, backend_dir, household, events };
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
