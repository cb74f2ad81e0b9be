//! The command line: its commands, and the flags of `run`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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

const RUN_AFTER: &str = "Examples:\n  \
    atoll run --kernel vmlinuz --initramfs initrd.img --disk path=root.img --cmdline \"console=ttyS0 root=/dev/vda\"\n  \
    atoll run --kernel vmlinuz --disk path=root.img path=data.img,readonly=on --net user=on,forward=2222:22\n  \
    atoll run --config vm.toml --memory size=4G --name web\n  \
    atoll run --api-socket /run/user/1000/vm.sock        # waits for vm.create\n\n\
    Flags override the file: a flag with one value replaces the file's; a device is added, or replaces the file's device \
    of the same id.\n\
    With --serial tty, Ctrl-A x ends the machine at once and Ctrl-A Ctrl-A types a Ctrl-A.\n\
    Exit status: 0 when the guest switched itself off or Ctrl-A x ended it, 1 when it failed, 2 for a mistake on the \
    command line, 128 + n when signal n ended it. A guest that resets starts again.";

/// Commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a virtual machine until it switches itself off.
    #[command(after_help = RUN_AFTER)]
    Run(Box<RunArgs>),
}

/// Names of the commands, and flags that are not `run`'s.
pub(crate) const NOT_RUN: &[&str] = &["run", "help", "-h", "--help", "-V", "--version"];

/// Which CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CpuFlag {
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

/// `--seccomp`: device processes are jailed in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SeccompFlag {
    /// Accepted.
    True,
    /// Accepted; nothing is switched off.
    False,
    /// Accepted; nothing is logged instead.
    Log,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A machine in a TOML file; flags override it.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The machine's name, by which other commands find it; the first free one of vm0, vm1, … when left out.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Kernel: an ELF vmlinux with a PVH entry point, or a bzImage (vmlinuz). Without one, and with --api-socket, the
    /// machine comes over the API.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line; the last one counts. console=ttyS0 when left out.
    #[arg(long, value_name = "TEXT", overrides_with = "cmdline", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// Guest memory: size=512M.
    #[arg(long, value_name = "KEYS")]
    pub(crate) memory: Option<String>,
    /// vCPUs: boot=1.
    #[arg(long, value_name = "KEYS")]
    pub(crate) cpus: Option<String>,
    /// A disk: path=FILE[,readonly=on][,direct=on][,serial=TEXT][,num_queues=N][,queue_size=N][,id=NAME], or an external
    /// backend: vhost_user=true,socket=PATH. Limits: bw_size=BYTES,bw_refill_time=MS, ops_size=N,ops_refill_time=MS, and
    /// bw_one_time_burst, ops_one_time_burst. Several may follow one flag, and it may be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) disk: Vec<String>,
    /// A network card: user=on[,forward=2222:22+udp:5353:53] (no rights needed), tap=NAME[,ip=A,mask=M], fd=[3,4],
    /// switch=NAME, or vhost_user=true,socket=PATH; with mac=, mtu=, num_queues=, queue_size=, pcap=FILE, id=, and the
    /// limits of --disk.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) net: Vec<String>,
    /// A shared folder: tag=NAME,socket=PATH of virtiofsd[,num_queues=N][,queue_size=N][,id=NAME].
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) fs: Vec<String>,
    /// Sockets between guest and host: cid=3,socket=PATH[,vhost_user=true][,id=NAME].
    #[arg(long, value_name = "KEYS")]
    pub(crate) vsock: Option<String>,
    /// Any vhost-user device: device_type=N,socket=PATH,queue_sizes=[256,256][,id=NAME].
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) generic_vhost_user: Vec<String>,
    /// Entropy for the guest: src=/dev/urandom, or off.
    #[arg(long, value_name = "KEYS")]
    pub(crate) rng: Option<String>,
    /// First serial port: tty (when left out), pty, socket[=PATH], file=PATH, null or off.
    #[arg(long, value_name = "WHERE")]
    pub(crate) serial: Option<String>,
    /// Second serial port, served by a process of its own: file=PATH, pty (its name is logged) or off.
    #[arg(long, value_name = "WHERE")]
    pub(crate) serial2: Option<String>,
    /// virtio console: off (when left out), null, tty, pty, file=PATH or socket[=PATH].
    #[arg(long, value_name = "WHERE")]
    pub(crate) console: Option<String>,
    /// Which CPU runs the guest: auto when left out.
    #[arg(long, value_enum)]
    pub(crate) cpu: Option<CpuFlag>,
    /// CPU model that the guest sees: atoll-v1 (when left out), atoll-v2 (x86-64-v2), or host (KVM only).
    #[arg(long, value_name = "NAME")]
    pub(crate) cpu_model: Option<String>,
    /// Software CPU only: guest time comes from retired instructions, so that two runs are identical.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Serves the API here too: PATH, path=PATH, or fd=N, an inherited listening socket.
    #[arg(long, value_name = "WHERE")]
    pub(crate) api_socket: Option<String>,
    /// Writes what happens, as JSON objects: path=FILE or fd=N.
    #[arg(long, value_name = "WHERE")]
    pub(crate) event_monitor: Option<String>,
    /// Form of the log. ATOLL_LOG sets its level (error, warn, info, debug, trace).
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) log: LogForm,
    /// Where the log goes instead of standard error.
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// More in the log: -v info, -vv debug, -vvv trace.
    #[arg(short, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Writes a JSON object about the run to this file at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Where the device processes' executables are; beside this one by default.
    #[arg(long, value_name = "FOLDER", env = "ATOLL_BACKEND_DIR")]
    pub(crate) backend_dir: Option<PathBuf>,
    /// Accepted for compatibility: device processes are jailed in any case.
    #[arg(long, value_enum)]
    pub(crate) seccomp: Option<SeccompFlag>,
}
