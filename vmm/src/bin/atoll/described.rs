//! From the flags of `run` and the file that they name to the machine that they describe.

use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use atoll_vmm::api::{EventMonitorAt, ListenAt};
use atoll_vmm::backend::JailPolicy;
use atoll_vmm::config::{
    ConfigError, ConsoleConfig, ConsoleMode, CpuChoice, CpusConfig, DeviceConfig, DiskConfig, DisplayConfig, FileError,
    FlagError, FsConfig, GenericVhostUserConfig, GpuConfig, InputConfig, InputKind, MachineFile, MemoryConfig,
    NetConfig, NvmeConfig, PassthroughConfig, RngConfig, UserDeviceConfig, VmConfig, VsockConfig,
};
use atoll_vmm::cpu::kvm::Irqchip;
use atoll_vmm::rundir::CONSOLE_SOCKET;
use thiserror::Error;

use crate::cli::{CpuFlag, RunArgs};

/// What a guest's kernel is told when nobody says anything else.
const CMDLINE: &str = "console=ttyS0";

/// A mistake on the command line or in the file that it names.
#[derive(Debug, Error)]
pub(crate) enum UsageError {
    /// In a flag.
    #[error(transparent)]
    Flag(#[from] FlagError),
    /// In the file.
    #[error(transparent)]
    File(#[from] FileError),
    /// In how they go together.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A socket or file that a flag names wrongly.
    #[error("{0}")]
    Where(String),
}

/// Puts the option's name to what is wrong with where it leads.
fn whereabouts<T: FromStr<Err: Display>>(option: &str, text: Option<String>) -> Result<Option<T>, UsageError> {
    let read = text.map(|text| text.parse().map_err(|error| UsageError::Where(format!("{option} {text}: {error}"))));
    read.transpose()
}

/// What is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Described {
    /// The machine; without a kernel when it comes over the API.
    pub(crate) vm: VmConfig,
    /// Its name, if it has one.
    pub(crate) name: Option<String>,
    /// Where the API is served besides the run-time folder.
    pub(crate) api_socket: Option<ListenAt>,
    /// Where events are written.
    pub(crate) event_monitor: Option<EventMonitorAt>,
}

/// Adds the devices of a repeated flag to the file's: in place of the one of the file that has its id, else at the end.
fn put<T>(
    list: &mut Option<Vec<T>>,
    flags: &[String],
    read: impl Fn(&str) -> Result<T, FlagError>,
    id: impl Fn(&T) -> Option<&str>,
) -> Result<(), FlagError> {
    let of_file = list.as_ref().map_or(0, Vec::len);
    for text in flags {
        let device = read(text)?;
        let list = list.get_or_insert_default();
        let same = list.iter_mut().take(of_file).find(|known| id(known).is_some() && id(known) == id(&device));
        match same {
            Some(known) => *known = device,
            None => list.push(device),
        }
    }
    Ok(())
}

impl Described {
    /// Reads flags and file.
    pub(crate) fn read(args: &RunArgs) -> Result<Self, UsageError> {
        let MachineFile { mut vm, run } = match &args.config {
            Some(path) => MachineFile::read(path)?,
            None => MachineFile::default(),
        };
        overlay(&mut vm, args)?;
        let api_socket = whereabouts("--api-socket", args.api_socket.clone().or(run.api_socket))?;
        let event_monitor = whereabouts("--event-monitor", args.event_monitor.clone().or(run.event_monitor))?;
        Ok(Self { vm, name: args.name.clone().or(run.name), api_socket, event_monitor })
    }

    /// Finds what is wrong without opening anything.
    pub(crate) fn check(&self) -> Result<(), UsageError> {
        // Ports may lead to sockets whose place is only known once the machine has a folder.
        let mut vm = self.vm.clone();
        place(&mut vm, Path::new("/"));
        match (vm.payload.kernel.is_some(), &self.api_socket) {
            (false, Some(_)) if vm.devices().is_empty() => Ok(vm.check_devices()?),
            (false, Some(_)) => Err(UsageError::Where(
                "there is no kernel, so the machine comes over the API, and devices do not: give --kernel, or leave \
                 them out"
                    .into(),
            )),
            _ => Ok(vm.check()?),
        }
    }

    /// Gives ports that lead to a socket of their own a path in `folder`.
    pub(crate) fn settle(&mut self, folder: &Path) -> Result<(), UsageError> {
        place(&mut self.vm, folder);
        Ok(self.vm.check_devices()?)
    }

    /// Whether the machine comes over the API.
    pub(crate) fn waits_for_api(&self) -> bool {
        self.vm.payload.kernel.is_none()
    }
}

fn place(vm: &mut VmConfig, folder: &Path) {
    let ports = [(&mut vm.serial, CONSOLE_SOCKET), (&mut vm.console, "hvc0.sock")];
    for (port, name) in ports {
        if let Some(port) = port.as_mut().filter(|port| port.mode == ConsoleMode::Socket) {
            port.socket.get_or_insert_with(|| folder.join(name));
        }
    }
}

fn overlay(vm: &mut VmConfig, args: &RunArgs) -> Result<(), UsageError> {
    let payload = &mut vm.payload;
    payload.kernel = args.kernel.clone().or(payload.kernel.take());
    payload.initramfs = args.initramfs.clone().or(payload.initramfs.take());
    payload.cmdline = args.cmdline.clone().or(payload.cmdline.take());
    if payload.kernel.is_some() {
        payload.cmdline.get_or_insert_with(|| CMDLINE.into());
    }
    if let Some(text) = &args.memory {
        vm.memory = MemoryConfig::from_flag("--memory", text)?;
    }
    if let Some(text) = &args.cpus {
        vm.cpus = CpusConfig::from_flag("--cpus", text)?;
    }
    put(&mut vm.disks, &args.disk, |text| DiskConfig::from_flag("--disk", text), |disk| disk.id.as_deref())?;
    put(&mut vm.net, &args.net, |text| NetConfig::from_flag("--net", text), |net| net.id.as_deref())?;
    put(&mut vm.fs, &args.fs, |text| FsConfig::from_flag("--fs", text), |fs| fs.id.as_deref())?;
    let generic = |text: &str| GenericVhostUserConfig::from_flag("--generic-vhost-user", text);
    put(&mut vm.generic_vhost_user, &args.generic_vhost_user, generic, |device| device.id.as_deref())?;
    let nvme = |text: &str| NvmeConfig::from_flag("--nvme", text);
    put(&mut vm.nvme, &args.nvme, nvme, |nvme| nvme.id.as_deref())?;
    let user = |text: &str| UserDeviceConfig::from_flag("--user-device", text);
    put(&mut vm.user_devices, &args.user_device, user, |device| device.id.as_deref())?;
    let passed = |text: &str| PassthroughConfig::from_flag("--device", text);
    put(&mut vm.devices, &args.device, passed, |function| function.id.as_deref())?;
    if let Some(text) = &args.gpu {
        vm.gpu = Some(GpuConfig::from_flag("--gpu", text)?);
    }
    if let Some(text) = &args.display {
        vm.display = Some(DisplayConfig::from_flag("--display", text)?);
    }
    let input = |text: &str| InputConfig::from_flag("--input", text);
    put(&mut vm.input, &args.input, input, |input| input.id.as_deref())?;
    if vm.display.is_some() && vm.input.is_none() {
        let usual = [InputKind::Keyboard, InputKind::Tablet];
        vm.input = Some(usual.map(|kind| InputConfig { kind, ..InputConfig::default() }).into());
    }
    if let Some(text) = &args.vsock {
        vm.vsock = Some(VsockConfig::from_flag("--vsock", text)?);
    }
    if let Some(text) = &args.rng {
        vm.rng = RngConfig::from_flag("--rng", text)?;
    }
    let ports = [
        ("--serial", &args.serial, &mut vm.serial),
        ("--serial2", &args.serial2, &mut vm.serial2),
        ("--console", &args.console, &mut vm.console),
    ];
    for (option, text, port) in ports {
        if let Some(text) = text {
            *port = Some(ConsoleConfig::from_flag(option, text)?);
        }
    }
    // The terminal, unless the virtio console has it.
    let has_terminal = vm.console.as_ref().is_some_and(|console| console.mode == ConsoleMode::Tty);
    let mode = if has_terminal { ConsoleMode::Null } else { ConsoleMode::Tty };
    vm.serial.get_or_insert_with(|| ConsoleConfig::of(mode));
    let platform = &mut vm.platform;
    platform.cpu = match args.cpu {
        Some(CpuFlag::Auto) => CpuChoice::Auto,
        Some(CpuFlag::Kvm) => CpuChoice::Kvm,
        Some(CpuFlag::Soft) => CpuChoice::Soft,
        None => platform.cpu,
    };
    platform.cpu_model = args.cpu_model.clone().or(platform.cpu_model.take());
    if let Some(text) = &args.kvm {
        platform.irqchip = Irqchip::from_flag("--kvm", text)?;
    }
    platform.deterministic |= args.deterministic;
    platform.allow_faults |= args.allow_faults;
    platform.debug_devices.extend(args.debug_device.iter().cloned());
    platform.jail = args.jail.map_or(platform.jail, JailPolicy::from);
    platform.backend_dir = args.backend_dir.clone().or(platform.backend_dir.take());
    Ok(())
}

/// The device that a command plugs in, by the command's name.
pub(crate) fn device(command: &'static str, text: &str) -> Result<DeviceConfig, FlagError> {
    Ok(match command {
        "add-disk" => DeviceConfig::Disk(DiskConfig::from_flag(command, text)?),
        "add-net" => DeviceConfig::Net(NetConfig::from_flag(command, text)?),
        "add-nvme" => DeviceConfig::Nvme(NvmeConfig::from_flag(command, text)?),
        "add-user-device" => DeviceConfig::User(UserDeviceConfig::from_flag(command, text)?),
        "add-fs" => DeviceConfig::Fs(FsConfig::from_flag(command, text)?),
        "add-vsock" => DeviceConfig::Vsock(VsockConfig::from_flag(command, text)?),
        _ if text.split(',').any(|key| key.starts_with("path=")) => {
            DeviceConfig::Passthrough(PassthroughConfig::from_flag(command, text)?)
        }
        _ => DeviceConfig::Generic(GenericVhostUserConfig::from_flag(command, text)?),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn read(line: &[&str]) -> Result<Described, UsageError> {
        let line = ["atoll", "run"].iter().chain(line);
        let Command::Run(args) = Cli::try_parse_from(line).unwrap().command else { panic!("not run") };
        let mut described = Described::read(&args)?;
        described.check()?;
        described.settle(Path::new("/run/atoll"))?;
        Ok(described)
    }

    #[test]
    fn flags_describe_a_machine() {
        let described = read(&[
            "--kernel",
            "k",
            "--cmdline",
            "a",
            "--cmdline",
            "b c",
            "--memory",
            "size=1G,shared=on",
            "--cpus",
            "boot=2,max=2",
            "--serial",
            "socket",
            "--disk",
            "path=a",
            "path=b",
            "--disk",
            "path=c",
            "--net",
            "user=on",
            "--api-socket",
            "fd=3",
        ])
        .unwrap();
        let vm = &described.vm;
        let paths: Vec<_> = vm.disks.iter().flatten().filter_map(|disk| disk.path.clone()).collect();
        assert_eq!(paths, [Path::new("a"), Path::new("b"), Path::new("c")]);
        assert_eq!((vm.memory.size, vm.cpus.boot_vcpus), (1 << 30, 2));
        assert_eq!(vm.payload.cmdline.as_deref(), Some("b c"));
        assert_eq!(vm.serial.as_ref().unwrap().socket, Some("/run/atoll/console.sock".into()));
        assert_eq!(described.api_socket, Some(ListenAt::Descriptor(3)));
    }

    /// A flag with one value replaces the file's, a device is added or replaces its namesake.
    #[test]
    fn flags_override_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "name = \"web\"\nmemory.size = \"1G\"\n[payload]\nkernel = \"k\"\ninitramfs = \"i\"\n\
                    [[disks]]\nid = \"root\"\npath = \"old\"\n[[disks]]\npath = \"data\"\n";
        std::fs::write(&file, text).unwrap();
        let path = file.path().to_str().unwrap();
        let line = ["--config", path, "--kernel", "k2", "--disk", "path=new,id=root", "path=more", "--name", "db"];
        let described = read(&line).unwrap();
        let vm = described.vm;
        assert_eq!((described.name.as_deref(), vm.memory.size), (Some("db"), 1 << 30));
        assert_eq!((vm.payload.kernel, vm.payload.initramfs), (Some("k2".into()), Some("i".into())));
        let paths: Vec<_> = vm.disks.into_iter().flatten().filter_map(|disk| disk.path).collect();
        assert_eq!(paths, [Path::new("new"), Path::new("data"), Path::new("more")]);
    }

    #[test]
    fn mistakes_are_named() {
        let long = format!("socket=/{}", "x".repeat(120));
        let cases: [(&[&str], &str); 6] = [
            (&[], "--kernel"),
            (&["--kernel", "k", "--disk", "path=a,id=x", "path=b,id=x"], "'x'"),
            (&["--kernel", "k", "--console", "tty", "--serial", "tty"], "the terminal"),
            (&["--kernel", "k", "--serial2", "tty"], "second serial port"),
            (&["--kernel", "k", "--api-socket", "fd=x"], "fd=x: a number"),
            (&["--kernel", "k", "--serial", &long], "107"),
        ];
        for (line, expected) in cases {
            let error = read(line).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        }
        assert!(read(&["--api-socket", "/run/a=b"]).unwrap().waits_for_api());
    }
}
