//! The command line.

use std::path::PathBuf;

use atoll_vmm::backend::UartOutput;
use atoll_vmm::machine::boot::BootSource;
use atoll_vmm::machine::{MachineConfig, SerialMode};
use atoll_vmm::vhost::DiskConfig;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::keyvalue::{Bytes, OptionError, Options};

/// A virtual machine monitor in which every device is a process of its own.
#[derive(Debug, Parser)]
#[command(name = "atoll", version, max_term_width = 120, after_help = AFTER)]
pub(crate) struct Cli {
    /// What to do; `run` when left out.
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER: &str = "Options without a command mean `run`.\n\
    With --serial tty, Ctrl-A x ends the machine at once and Ctrl-A Ctrl-A types a Ctrl-A.\n\
    Exit status: 0 when the guest switched itself off or Ctrl-A x ended it, 1 when it failed, 2 for a mistake on the \
    command line, 128 + n when signal n ended it. A guest that resets starts again.";

/// Commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a virtual machine until it switches itself off.
    #[command(after_help = AFTER)]
    Run(Box<RunArgs>),
}

/// Names of the commands, and flags that are not `run`'s.
pub(crate) const NOT_RUN: &[&str] = &["run", "help", "-h", "--help", "-V", "--version"];

/// Which CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CpuChoice {
    /// KVM where it can run a stock guest, else the software CPU.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// The software CPU, which needs nothing of the host.
    Soft,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogForm {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Kernel: an ELF vmlinux with a PVH entry point, or a bzImage (vmlinuz).
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line; the last one counts.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=ttyS0",
        overrides_with = "cmdline",
        allow_hyphen_values = true
    )]
    pub(crate) cmdline: String,
    /// Guest memory: size=512M.
    #[arg(long, value_name = "KEYS", default_value = "size=512M")]
    pub(crate) memory: String,
    /// vCPUs: boot=1.
    #[arg(long, value_name = "KEYS", default_value = "boot=1")]
    pub(crate) cpus: String,
    /// A disk: path=FILE[,readonly=on][,direct=on][,serial=TEXT][,num_queues=N], or an external backend:
    /// vhost_user=true,socket=PATH. May be given several times.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) disk: Vec<String>,
    /// First serial port: tty, file=PATH, null or off.
    #[arg(long, value_name = "WHERE", default_value = "tty")]
    pub(crate) serial: String,
    /// Second serial port, served by a process of its own: file=PATH, pty (its name is logged) or off.
    #[arg(long, value_name = "WHERE", default_value = "off")]
    pub(crate) serial2: String,
    /// Console device: there is none yet, only off is accepted.
    #[arg(long, value_name = "WHERE", default_value = "off")]
    pub(crate) console: String,
    /// Which CPU runs the guest.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) cpu: CpuChoice,
    /// CPU model that the guest sees: atoll-v1, atoll-v2 (x86-64-v2), or host (KVM only).
    #[arg(long, value_name = "NAME", default_value = "atoll-v1")]
    pub(crate) cpu_model: String,
    /// Software CPU only: guest time comes from retired instructions, so that two runs are identical.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Form of the log on standard error. ATOLL_LOG sets its level (error, warn, info, debug, trace).
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) log: LogForm,
    /// Writes a JSON object about the run to this file at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Where the device processes' executables are; beside this one by default.
    #[arg(long, value_name = "FOLDER", env = "ATOLL_BACKEND_DIR")]
    pub(crate) backend_dir: Option<PathBuf>,
}

/// Nanoseconds of guest time that 1000 instructions take in deterministic mode.
const DETERMINISTIC_NS_PER_1000: u32 = 1000;

/// Reads `--memory`.
fn memory(text: &str) -> Result<u64, OptionError> {
    let options = Options::parse("--memory", text, &["size", "shared"])?;
    if options.get::<bool>("shared")? == Some(false) {
        let (option, key) = ("--memory", "shared");
        return Err(OptionError::Value { option, key, value: "off".into(), expected: "on, as devices are processes," });
    }
    options.need::<Bytes>("size").map(|size| size.0)
}

/// Reads `--cpus`.
fn cpus(text: &str) -> Result<u32, OptionError> {
    let options = Options::parse("--cpus", text, &["boot", "max"])?;
    let boot = options.need::<u32>("boot")?;
    let refuse = |key, value: u32, expected| {
        Err(OptionError::Value { option: "--cpus", key, value: value.to_string(), expected })
    };
    if !(1..=255).contains(&boot) {
        return refuse("boot", boot, "a number from 1 to 255");
    }
    match options.get::<u32>("max")? {
        Some(max) if max != boot => refuse("max", max, "the same number as boot, as vCPUs cannot be added later,"),
        _ => Ok(boot),
    }
}

/// Reads `--serial`.
fn serial(text: &str) -> Result<SerialMode, OptionError> {
    match text {
        "tty" => Ok(SerialMode::Tty),
        "null" => Ok(SerialMode::Null),
        "off" => Ok(SerialMode::Off),
        _ if text.starts_with("file=") => {
            let path = Options::parse("--serial", text, &["file"])?.need::<String>("file")?;
            Ok(SerialMode::File(path.into()))
        }
        _ => {
            let (option, value) = ("--serial", text.into());
            Err(OptionError::Choice { option, value, valid: "tty, file=PATH, null or off" })
        }
    }
}

/// Reads `--serial2`.
pub(crate) fn serial2(args: &RunArgs) -> Result<Option<UartOutput>, OptionError> {
    match args.serial2.as_str() {
        "off" => Ok(None),
        "pty" => Ok(Some(UartOutput::Pty)),
        text if text.starts_with("file=") => {
            let path = Options::parse("--serial2", text, &["file"])?.need::<String>("file")?;
            Ok(Some(UartOutput::File(path.into())))
        }
        text => {
            let part = text.into();
            Err(OptionError::NoPair { option: "--serial2", part, valid: "file; or give pty or off".into() })
        }
    }
}

/// What the name of the second serial port's executable is.
pub(crate) const UART_BACKEND: &str = "atoll-uart";
/// What the name of the disks' executable is.
const DISK_BACKEND: &str = "atoll-blk";

/// Reads each `--disk`.
pub(crate) fn disks(args: &RunArgs) -> Result<Vec<DiskConfig>, OptionError> {
    let binary = args.backend_dir.as_ref().map(|folder| folder.join(DISK_BACKEND));
    let read = |text: &String| match text.parse::<DiskConfig>() {
        Ok(disk) => Ok(DiskConfig { binary: binary.clone(), ..disk }),
        Err(source) => Err(OptionError::Disk { text: text.clone(), source }),
    };
    args.disk.iter().map(read).collect()
}

/// The machine that the options describe, apart from which CPU runs it.
pub(crate) fn machine(args: &RunArgs, cpu: atoll_vmm::machine::CpuKind) -> Result<MachineConfig, OptionError> {
    if args.console != "off" {
        let (option, value) = ("--console", args.console.clone());
        return Err(OptionError::Choice { option, value, valid: "off; the guest's console is --serial" });
    }
    Ok(MachineConfig {
        boot: BootSource {
            kernel: args.kernel.clone(),
            initramfs: args.initramfs.clone(),
            command_line: args.cmdline.clone(),
        },
        memory_bytes: memory(&args.memory)?,
        vcpus: cpus(&args.cpus)?,
        cpu,
        cpu_model: args.cpu_model.clone(),
        deterministic: args.deterministic.then_some(DETERMINISTIC_NS_PER_1000),
        serial: serial(&args.serial)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> RunArgs {
        let Command::Run(args) = Cli::try_parse_from(line).unwrap().command;
        *args
    }

    #[test]
    fn options_describe_a_machine() {
        let args = parse(&[
            "atoll",
            "run",
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
            "file=/tmp/x",
            "--disk",
            "path=a",
            "path=b",
            "--disk",
            "path=c",
        ]);
        assert_eq!(args.disk, ["path=a", "path=b", "path=c"]);
        let machine = machine(&args, atoll_vmm::machine::CpuKind::Soft).unwrap();
        assert_eq!((machine.memory_bytes, machine.vcpus), (1 << 30, 2));
        assert_eq!(machine.boot.command_line, "b c");
        assert_eq!(machine.serial, SerialMode::File("/tmp/x".into()));
    }

    #[test]
    fn mistakes_are_one_line() {
        let messages = [
            memory("size=512M,shared=off").unwrap_err().to_string(),
            cpus("boot=0").unwrap_err().to_string(),
            cpus("boot=1,max=4").unwrap_err().to_string(),
            serial("pty").unwrap_err().to_string(),
            serial2(&parse(&["atoll", "run", "--kernel", "k", "--serial2", "tty"])).unwrap_err().to_string(),
            memory("sze=1").unwrap_err().to_string(),
        ];
        for message in messages {
            assert!(!message.contains('\n') && message.starts_with("--"), "{message}");
        }
    }
}
