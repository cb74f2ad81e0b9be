//! From what a user says about a machine to what the assembler needs: which CPU, which builders, in which order.
//!
//! A plan is made when a machine boots, and each of its incarnations is built from it: what a guest's reset must not close
//! (serial lines, the file that gets their output) is opened once, here.

use std::path::PathBuf;
use std::sync::Arc;

use super::controller::Home;
use super::error::{ErrorKind, VmError};
use super::story::Story;
use crate::backend::{Household, UartBuilder, UartLine, UartOutput};
use crate::config::{ConsoleConfig, ConsoleMode, CpuChoice, DeviceConfig, PlatformConfig, VmConfig};
use crate::cpu::probe::{Memo, Verdict, probe};
use crate::iommu::IommuBuilder;
use crate::machine::boot::BootSource;
use crate::machine::{CpuKind, DeviceBuilder, EventSender, MachineConfig, SerialLine, chipset};
use crate::screen::{DisplayBuilder, DisplayLine};
use crate::vhost::{DeviceFactory, FactoryError, FactoryParts};

/// Nanoseconds of guest time that 1000 instructions take in deterministic mode.
const DETERMINISTIC_NS_PER_1000: u32 = 1000;
/// CPU model of those who name none.
const CPU_MODEL: &str = "atoll-v1";
/// Executable of the second serial port's process.
const UART_BACKEND: &str = "atoll-uart";

/// What each incarnation of a machine is built from.
pub(super) struct Plan {
    config: MachineConfig,
    /// Why this CPU was taken, where Atoll chose it.
    choice: Option<Verdict>,
    serial: Option<SerialLine>,
    uart: Option<Arc<UartLine>>,
    /// Where a display is, if there is one.
    line: Option<Arc<DisplayLine>>,
    backend_dir: Option<PathBuf>,
    household: Arc<Household>,
    story: Story,
    factory: DeviceFactory,
}

impl From<FactoryError> for VmError {
    fn from(error: FactoryError) -> Self {
        let kind = if error.is_unsupported() { ErrorKind::Unsupported } else { ErrorKind::Bad };
        Self::new(kind, error)
    }
}

fn failed(error: impl std::fmt::Display) -> VmError {
    VmError::new(ErrorKind::Failed, error)
}

/// The CPU that the configuration asks for, or that suits this host and why.
fn choose_cpu(platform: &PlatformConfig) -> (CpuKind, Option<Verdict>) {
    let verdict = match platform.cpu {
        // Taken as asked; the trial says whether to expect much of it.
        CpuChoice::Kvm => return (CpuKind::Kvm, Some(probe(Memo::of_user().as_ref()))),
        CpuChoice::Soft => return (CpuKind::Soft, None),
        CpuChoice::Auto if platform.deterministic => {
            Verdict { usable: false, reason: "--deterministic counts instructions, which KVM does not".into() }
        }
        CpuChoice::Auto => probe(Memo::of_user().as_ref()),
    };
    (if verdict.usable { CpuKind::Kvm } else { CpuKind::Soft }, Some(verdict))
}

/// Where COM2 leads.
fn uart(config: Option<&ConsoleConfig>) -> Result<Option<Arc<UartLine>>, VmError> {
    let Some(config) = config else { return Ok(None) };
    let output = match (config.mode, &config.file) {
        (ConsoleMode::Off, _) => return Ok(None),
        (ConsoleMode::Pty, _) => UartOutput::Pty,
        (ConsoleMode::File, Some(path)) => UartOutput::File(path.clone()),
        (mode, _) => {
            let text = format!("serial2 cannot be {mode:?}; it can be Pty, Off, or File with a file");
            return Err(VmError::new(ErrorKind::Bad, text));
        }
    };
    UartLine::open(&output).map(|line| Some(Arc::new(line))).map_err(failed)
}

impl Plan {
    /// Opens what lives longer than one incarnation.
    ///
    /// # Errors
    /// When something cannot be opened, or is not there.
    pub(super) fn open(
        config: &VmConfig,
        home: &Home,
        household: &Arc<Household>,
        story: &Story,
    ) -> Result<Self, VmError> {
        let payload = &config.payload;
        let kernel = payload.kernel.clone().ok_or(crate::config::ConfigError::NoKernel)?;
        let (cpu, choice) = choose_cpu(&config.platform);
        // A machine whose user says nothing about it has a port that leads nowhere.
        let nowhere = ConsoleConfig { mode: ConsoleMode::Null, ..ConsoleConfig::default() };
        let mut serial = SerialLine::open(config.serial.as_ref().unwrap_or(&nowhere)).map_err(failed)?;
        let machine = MachineConfig {
            boot: BootSource {
                kernel,
                initramfs: payload.initramfs.clone(),
                command_line: payload.cmdline.clone().unwrap_or_default(),
            },
            memory_bytes: config.memory.size,
            vcpus: config.cpus.boot_vcpus,
            cpu,
            cpu_model: config.platform.cpu_model.clone().unwrap_or_else(|| CPU_MODEL.to_owned()),
            irqchip: config.platform.irqchip,
            deterministic: config.platform.deterministic.then_some(DETERMINISTIC_NS_PER_1000),
            com1: serial.is_some(),
        };
        household.spawner().jail(config.platform.jail);
        let factory = DeviceFactory::new(FactoryParts {
            household: Arc::clone(household),
            backend_dir: config.platform.backend_dir.clone(),
            runtime_dir: home.runtime_dir.clone(),
            vm: home.name.clone(),
            story: story.clone(),
        })
        .debugging(config.platform.debug_devices.clone());
        let has_page = config.display.as_ref().is_some_and(|display| display.web.is_some());
        let branch = serial.as_mut().filter(|_| has_page).map(SerialLine::branch).transpose().map_err(failed)?;
        let line = DisplayLine::open(config, factory.joint(), branch).map_err(failed)?.map(Arc::new);
        Ok(Self {
            story: story.clone(),
            config: machine,
            choice,
            serial,
            uart: uart(config.serial2.as_ref())?,
            backend_dir: config.platform.backend_dir.clone(),
            household: Arc::clone(household),
            line,
            factory,
        })
    }

    /// What the assembler reads.
    pub(super) fn machine(&self) -> &MachineConfig {
        &self.config
    }

    /// The machine has been built, and its guest begins to print: files that get it are empty from now on.
    pub(super) fn begin_lines(&self) {
        if let Some(line) = &self.serial {
            line.begin();
        }
        if let Some(line) = &self.uart {
            line.begin();
        }
        self.factory.begin_console();
    }

    /// Tells where the serial ports lead, for pseudo terminals that were made.
    pub(super) fn tell_lines(&self, config: &mut VmConfig) {
        if let (Some(line), Some(serial)) = (&self.serial, &mut config.serial) {
            *serial = line.told();
        }
        if let (Some(line), Some(display)) = (&self.line, &mut config.display) {
            *display = line.told();
        }
        let name = self.uart.as_ref().and_then(|line| line.name());
        if let (Some(name), Some(serial2)) = (name, &mut config.serial2) {
            serial2.file = Some(name.into());
        }
        if let (Some(name), Some(console)) = (self.factory.console_terminal(), &mut config.console) {
            console.file = Some(name);
        }
    }

    /// Where the display is.
    pub(super) fn line(&self) -> Option<&Arc<DisplayLine>> {
        self.line.as_ref()
    }

    /// Says which CPU was chosen. Only once the machine is built: a mistake is one line, not the choice of a CPU that runs
    /// nothing and then the mistake.
    pub(super) fn tell_choice(&self) {
        let Some(choice) = &self.choice else { return };
        if self.config.cpu == CpuKind::Kvm && !choice.usable {
            let reason = &choice.reason;
            tracing::warn!(
                target: "atoll::machine",
                "cpu: kvm, as asked, though a stock guest may stay silent on it: {reason}; see --cpu auto"
            );
        } else {
            tracing::info!(target: "atoll::machine", "cpu: {choice}");
        }
    }

    /// The builders of everything that is not a device of the configuration's list.
    fn board(&self, events: &EventSender) -> Result<Vec<Box<dyn DeviceBuilder>>, VmError> {
        let mut builders = chipset();
        builders.extend(self.serial.as_ref().map(|line| line.builder(events)).transpose().map_err(failed)?);
        if let Some(line) = &self.uart {
            let builder = UartBuilder::new(Arc::clone(line), Arc::clone(&self.household)).telling(&self.story);
            builders.push(Box::new(match &self.backend_dir {
                Some(folder) => builder.binary(folder.join(UART_BACKEND)),
                None => builder,
            }));
        }
        if let Some(line) = &self.line {
            let (line, folder) = (Arc::clone(line), self.backend_dir.clone());
            builders.push(Box::new(DisplayBuilder::new(line, folder, Arc::clone(&self.household), self.story.clone())));
        }
        Ok(builders)
    }

    /// All builders, in the order in which they take PCI slots.
    ///
    /// # Errors
    /// When a device is of a kind that cannot be built.
    pub(super) fn builders(
        &self,
        config: &VmConfig,
        events: &EventSender,
    ) -> Result<Vec<Box<dyn DeviceBuilder>>, VmError> {
        let mut builders = self.board(events)?;
        if config.devices().iter().any(DeviceConfig::iommu) {
            builders.push(Box::new(IommuBuilder));
        }
        for device in config.devices() {
            builders.push(self.device(&device)?);
        }
        Ok(builders)
    }

    /// The builder of one device.
    ///
    /// # Errors
    /// When its configuration is wrong in itself, or asks for what is not there.
    pub(super) fn device(&self, device: &DeviceConfig) -> Result<Box<dyn DeviceBuilder>, VmError> {
        Ok(self.factory.builder(device)?)
    }
}
