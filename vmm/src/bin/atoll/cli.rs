//! The command line: its commands, and the flags of `run`.

use std::path::PathBuf;

use atoll_vmm::backend::JailPolicy;
use atoll_vmm::config::Mode;
use atoll_vmm::machine::LinkState;
use atoll_vmm::seccomp;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// A virtual machine monitor in which every device is a process of its own.
#[derive(Debug, Parser)]
#[command(name = "atoll", version = VERSION, max_term_width = 120, after_help = AFTER)]
pub(crate) struct Cli {
    /// What to do; `run` when left out.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Both names: of this program, and of the one whose interface it speaks.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (speaks as cloud-hypervisor v51.0.0)");

const AFTER: &str = "Options without a command mean `run`. NAME is a machine of `atoll ps`, or the path of an API socket.\n\
    Exit status: 0 when it was done, 1 when it was refused or failed, 2 for a mistake on the command line or in the file \
    that it names (nothing was begun then); see atoll run --help for that of a machine.";

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
    /// Lists this user's machines.
    #[command(after_help = "Example:\n  atoll ps --json | jq -r '.[].name'")]
    Ps {
        /// As a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Shows a machine and its devices.
    #[command(after_help = "Example:\n  atoll info web --json | jq .config.disks")]
    Info {
        #[command(flatten)]
        vm: Target,
        /// The API's own object.
        #[arg(long)]
        json: bool,
    },
    /// Boots a machine that was created or switched off.
    #[command(after_help = "Example:\n  atoll shutdown web --keep && atoll boot web")]
    Boot(Target),
    /// Stops the vCPUs and drains the devices.
    #[command(after_help = "Example:\n  atoll pause web; cp --sparse=always disk.img copy.img; atoll resume web")]
    Pause(Target),
    /// Lets a paused machine go on.
    #[command(after_help = "Example:\n  atoll resume web")]
    Resume(Target),
    /// Presses the reset button: the guest starts again, device processes stay. A paused machine runs then.
    #[command(after_help = "Example:\n  atoll reset web")]
    Reset(Target),
    /// Presses the power button; the guest decides what to do.
    #[command(after_help = "Example:\n  atoll power-button web")]
    PowerButton(Target),
    /// Ends a machine and its process at once, whatever the guest is at.
    #[command(
        after_help = "Examples:\n  atoll shutdown web\n  atoll shutdown web --keep     # atoll boot web starts it again"
    )]
    Shutdown {
        #[command(flatten)]
        vm: Target,
        /// Only switches the machine off; its process and configuration stay.
        #[arg(long)]
        keep: bool,
    },
    /// Says where to look at a machine with a display: the page's address, VNC's, the password.
    #[command(after_help = "Example:\n  atoll run --gpu on --display web=127.0.0.1:0 …; atoll display web")]
    Display {
        #[command(flatten)]
        vm: Target,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Takes a picture of what a machine shows, as a PNG.
    #[command(after_help = "Example:\n  atoll screenshot web out.png")]
    Screenshot {
        #[command(flatten)]
        vm: Target,
        /// Where it goes
        out: PathBuf,
        /// Of which screen
        #[arg(long, value_name = "N", default_value_t = 0)]
        head: u32,
    },
    /// Records what a machine shows, as an animated PNG, until Ctrl-C.
    #[command(after_help = "Example:\n  atoll record web out.png --seconds 10")]
    Record {
        #[command(flatten)]
        vm: Target,
        /// Where it goes
        #[arg(required_unless_present = "stop")]
        out: Option<PathBuf>,
        /// Of which screen
        #[arg(long, value_name = "N", default_value_t = 0)]
        head: u32,
        /// For so long
        #[arg(long, value_name = "S")]
        seconds: Option<u32>,
        /// Ends a recording whose `atoll record` was killed
        #[arg(long, conflicts_with_all = ["out", "seconds"])]
        stop: bool,
    },
    /// Gives a screen of a machine another size; the guest follows.
    #[command(after_help = "Example:\n  atoll resize-display web 1920x1080")]
    ResizeDisplay {
        #[command(flatten)]
        vm: Target,
        /// Columns and rows
        #[arg(value_name = "WIDTHxHEIGHT")]
        mode: Mode,
        /// Of which screen
        #[arg(long, value_name = "N", default_value_t = 0)]
        head: u32,
    },
    /// Plugs a disk in: the keys of run's --disk.
    #[command(after_help = "Example:\n  atoll add-disk web path=data.img,id=data")]
    AddDisk(Plug),
    /// Plugs a network card in: the keys of run's --net.
    #[command(after_help = "Examples:\n  atoll add-net web user=on\n  atoll add-net web switch=lan,id=lan0")]
    AddNet(Plug),
    /// Plugs a shared folder in: the keys of run's --fs.
    #[command(after_help = "Example:\n  atoll add-fs web tag=src,socket=/run/user/1000/virtiofsd.sock")]
    AddFs(Plug),
    /// Plugs an NVMe disk in: the keys of run's --nvme.
    #[command(after_help = "Example:\n  atoll add-nvme web path=data.img,id=data")]
    AddNvme(Plug),
    /// Plugs a PCI device of another process in (vfio-user): the keys of run's --user-device.
    #[command(after_help = "Example:\n  atoll add-user-device web socket=/run/nvme.sock")]
    AddUserDevice(Plug),
    /// Plugs sockets between guest and host in: the keys of run's --vsock.
    #[command(after_help = "Example:\n  atoll add-vsock web cid=3,socket=/run/user/1000/web.vsock")]
    AddVsock(Plug),
    /// Plugs a PCI function of the host in (the keys of run's --device), or any vhost-user device (those of
    /// --generic-vhost-user).
    #[command(after_help = "Examples:\n  atoll add-device web path=/sys/bus/pci/devices/0000:01:00.0,id=nvme\n  \
                      atoll add-device web path=/sys/bus/pci/devices/0000:01:00.0,fd=9 9<>/dev/vfio/7\n  \
                      atoll add-device web device_type=rng,socket=/run/rng.sock,queue_sizes=[64]")]
    AddDevice(Plug),
    /// Pulls a device out: asks the guest, and waits until it has let it go.
    #[command(after_help = "Example:\n  atoll remove web data")]
    Remove {
        #[command(flatten)]
        vm: Target,
        /// The device, as `atoll info` names it.
        #[arg(value_name = "ID")]
        id: String,
        /// How long to wait for the guest, in seconds; 0 only asks.
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        wait: u64,
    },
    /// Changes the size of a disk; the guest is told.
    #[command(after_help = "Example:\n  atoll resize-disk web _disk0 20G")]
    ResizeDisk {
        #[command(flatten)]
        vm: Target,
        /// The disk, as `atoll info` names it.
        #[arg(value_name = "ID")]
        id: String,
        /// Its new size: bytes, or with K, M, G, T after the number.
        #[arg(value_name = "SIZE")]
        size: String,
        /// It may be less than now: what lies behind is gone then. Shrink the guest's file system first.
        #[arg(long)]
        shrink: bool,
    },
    /// Plugs the cable of a network card in or out; the guest sees its carrier come and go.
    #[command(after_help = "Example:\n  atoll link web _net1 down")]
    Link {
        #[command(flatten)]
        vm: Target,
        /// The card, as `atoll info` names it.
        #[arg(value_name = "ID")]
        id: String,
        /// Plugged in, or not.
        #[arg(value_name = "up|down")]
        link: LinkState,
    },
    /// Gives a device whose backend was given up, or is waited for, another chance at once.
    #[command(after_help = "Example:\n  atoll revive web _disk0")]
    Revive {
        #[command(flatten)]
        vm: Target,
        /// The device, as `atoll info` names it.
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Puts another build in the place of the process that serves a device, while the guest runs. The new one is started
    /// and tried beside the old one; on any failure the old one carries on, and what failed is said.
    #[command(after_help = "Example:\n  atoll upgrade web _disk0 --exe /usr/lib/atoll-next/atoll-blk")]
    Upgrade {
        #[command(flatten)]
        vm: Target,
        /// The device, as `atoll info` names it.
        #[arg(value_name = "ID")]
        id: String,
        /// The new program. A process that is started after a crash is of this program, too, from then on.
        #[arg(long, value_name = "FILE")]
        exe: PathBuf,
        /// How long it may take for each word while the guest waits, in milliseconds; then the old one comes back.
        #[arg(long, value_name = "MS", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
        step_ms: u32,
    },
    /// Does to a device what the world may do: kill, stop, delay, drop-kick, drop-call, slow, disconnect or garbage. Only for
    /// a machine that was started with --allow-faults.
    #[command(after_help = "Example:\n  atoll fault web _disk0 kill")]
    Fault {
        #[command(flatten)]
        vm: Target,
        /// The device, as `atoll info` names it.
        #[arg(value_name = "ID")]
        id: String,
        /// What happens to it.
        #[arg(value_name = "FAULT")]
        fault: atoll_vmm::vhost::Fault,
        /// How long and how often follows from it.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Prints what happens to a machine, a JSON object a line, until it ends.
    #[command(
        after_help = "Exit status: 0 when the machine's process has ended as it should, 1 when it was killed.\nExample:\n  atoll events web | jq -r 'select(.source == \"device\") | .event'"
    )]
    Events(Target),
    /// Prints the live tree of a machine, or a part of it, as JSON.
    #[command(after_help = "Examples:\n  atoll inspect web\n  atoll inspect web devices/_disk0/queues")]
    Inspect {
        #[command(flatten)]
        vm: Target,
        /// Which part; slashes between its steps.
        #[arg(value_name = "PATH", default_value = "")]
        path: String,
    },
    /// Shows vCPUs and devices at work, anew each second; q ends it.
    #[command(after_help = "Examples:\n  atoll top\n  atoll top web --once     # one frame as text, for scripts")]
    Top {
        /// The machine; not needed when only one runs.
        #[arg(value_name = "NAME")]
        vm: Option<String>,
        /// Prints one frame, over one second, and ends.
        #[arg(long)]
        once: bool,
    },
    /// Attaches this terminal to a machine's serial port (--serial pty or socket); Ctrl-A x detaches. At the end of
    /// standard input that is no terminal, all of it has been sent; what the guest prints is shown for --wait seconds more.
    #[command(
        after_help = "Exit status: 0 when it was detached or the machine has ended, 1 when its process was killed.\n\
            Examples:\n  atoll run --kernel vmlinuz --serial socket --name web &\n  atoll console web\n  \
            echo uname -r | atoll console web --wait 5"
    )]
    Console {
        #[command(flatten)]
        vm: Target,
        /// How long to go on printing after the end of standard input, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 1)]
        wait: u32,
    },
    /// Says what this machine can do for virtual machines, and how to mend what it cannot.
    #[command(
        after_help = "Exit status: 0 if some CPU can run a guest.\nExample:\n  atoll doctor --json | jq '.[] | select(.verdict != \"ok\")'"
    )]
    Doctor {
        /// As a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// PCI devices of this host: which of them a guest can have, and giving them to VFIO and back.
    #[command(subcommand)]
    Vfio(VfioCommand),
    /// Runs a network switch that machines plug into with --net switch=NAME, until a signal ends it.
    #[command(
        after_help = "Examples:\n  atoll switch lan &\n  atoll run --kernel vmlinuz --net switch=lan\n  atoll switch lan --pcap lan.pcap"
    )]
    Switch(SwitchArgs),
}

/// What is done about a PCI device.
#[derive(Debug, Subcommand)]
pub(crate) enum VfioCommand {
    /// Says whether a device can be passed through: IOMMU, group, ACS, driver, reset, BARs, interrupts; and for what is
    /// missing the command that mends it. All devices when none is named.
    #[command(
        after_help = "Exit status: 0 if the device, or any when none is named, is ready for a guest; 1 if not.\n\
            Examples:\n  atoll vfio check\n  atoll vfio check 01:00.0 --json | jq '.findings[] | select(.verdict != \"ok\")'"
    )]
    Check {
        /// The device, as lspci names it.
        #[arg(value_name = "BDF")]
        bdf: Option<atoll_vmm::passthrough::Bdf>,
        /// As JSON: an object, or an array of them when none is named.
        #[arg(long)]
        json: bool,
        /// Looks at a copy of another machine's sys, proc and dev.
        #[arg(long, value_name = "FOLDER", default_value = "/", hide_default_value = true)]
        tree: PathBuf,
    },
    /// Writes what `vfio check` reads of this host into a new folder, for a report or for another machine: `vfio check --tree
    /// FOLDER` says there what it says here. The kernel's command line and the table of mounts are in it; look through it before you
    /// give it away.
    #[command(after_help = "Example:\n  sudo atoll vfio record host && tar czf host.tar.gz host")]
    Record {
        /// The folder; it must not be there.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
    /// Takes a device from its driver and gives it to vfio-pci. What the host still uses is refused; a step that fails undoes
    /// those before it.
    #[command(after_help = "Example:\n  sudo atoll vfio bind 01:00.0")]
    Bind {
        /// The device, as lspci names it.
        #[arg(value_name = "BDF")]
        bdf: atoll_vmm::passthrough::Bdf,
    },
    /// Gives a device back to the driver that it was taken from.
    #[command(after_help = "Example:\n  sudo atoll vfio unbind 01:00.0")]
    Unbind {
        /// The device, as lspci names it.
        #[arg(value_name = "BDF")]
        bdf: atoll_vmm::passthrough::Bdf,
    },
}

/// A machine.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// The machine: its name, or the path of its API socket.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

/// A device for a machine.
#[derive(Debug, Args)]
pub(crate) struct Plug {
    /// The machine.
    #[command(flatten)]
    pub(crate) vm: Target,
    /// The device.
    #[arg(value_name = "KEYS")]
    pub(crate) keys: String,
}

/// Options of `switch`.
#[derive(Debug, Args)]
pub(crate) struct SwitchArgs {
    /// The switch's name.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Machines that can be plugged in at a time.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) ports: u16,
    /// Writes every frame to this file (pcap); PORT=FILE captures one port. May be repeated.
    #[arg(long, value_name = "FILE")]
    pub(crate) pcap: Vec<String>,
    /// Where the device processes' executables are; beside this one by default.
    #[arg(long, value_name = "FOLDER", env = "ATOLL_BACKEND_DIR")]
    pub(crate) backend_dir: Option<PathBuf>,
}

/// Names of the commands, and flags that are not `run`'s.
pub(crate) const NOT_RUN: &[&str] = &["-h", "--help", "-V", "--version", "help"];

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

/// `--jail`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum JailFlag {
    /// Every layer, or no device.
    Strict,
    /// What this host has.
    Default,
    /// None.
    Off,
}

impl From<JailFlag> for JailPolicy {
    fn from(flag: JailFlag) -> Self {
        match flag {
            JailFlag::Strict => Self::Strict,
            JailFlag::Default => Self::Default,
            JailFlag::Off => Self::Off,
        }
    }
}

/// `--seccomp`: what becomes of a system call that is not for a thread of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SeccompFlag {
    /// It ends the process.
    True,
    /// Nothing is looked at.
    False,
    /// It is done, and told to the kernel's log.
    Log,
}

impl From<SeccompFlag> for seccomp::Mode {
    fn from(flag: SeccompFlag) -> Self {
        match flag {
            SeccompFlag::True => Self::Enforce,
            SeccompFlag::False => Self::Off,
            SeccompFlag::Log => Self::Log,
        }
    }
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
    /// A disk: path=FILE[,image_type=raw|qcow2][,backing_files=on][,readonly=on][,direct=on][,serial=TEXT][,num_queues=N]
    /// [,queue_size=N][,id=NAME], or an external backend: vhost_user=true,socket=PATH[,track=shadow]. Limits:
    /// bw_size=BYTES,bw_refill_time=MS, ops_size=N,ops_refill_time=MS, and bw_one_time_burst, ops_one_time_burst. With
    /// on_failure=error|wait|unplug for a backend that cannot be had again, start_attempts=N for how often in a row it may fail
    /// to start before that (20 when left out, half a minute; 0 for any number); standby=on keeps a spare process beside the one
    /// that serves. iommu=on puts it behind a virtual IOMMU; isolation=copy leaves its process nothing of the guest's memory but
    /// copies of requests. Both are keys of --net, --fs, --vsock, --rng and --generic-vhost-user too. Several may follow one flag,
    /// and it may be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) disk: Vec<String>,
    /// A network card: user=on[,forward=2222:22+udp:5353:53] (no rights needed), tap=NAME[,ip=A,mask=M], fd=[3,4],
    /// switch=NAME, or vhost_user=true,socket=PATH[,track=shadow]; with mac=, mtu=, num_queues=, queue_size=, pcap=FILE,
    /// id=, on_failure=, and the limits of --disk.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) net: Vec<String>,
    /// An NVMe disk: path=FILE[,readonly=on][,num_queues=N][,serial=TEXT][,id=NAME], with on_failure=, stall_timeout= and
    /// start_attempts= as for --disk. The image is raw.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) nvme: Vec<String>,
    /// A PCI device that another process serves (vfio-user): socket=PATH[,on_failure=wait][,id=NAME].
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) user_device: Vec<String>,
    /// A shared folder: tag=NAME,socket=PATH of virtiofsd[,num_queues=N][,queue_size=N][,id=NAME].
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) fs: Vec<String>,
    /// Sockets between guest and host: cid=3,socket=PATH (a program of the host connects there and says CONNECT PORT; one
    /// that listens at PATH_PORT is reached by the guest), or vhost_user=true,socket=PATH of a backend; with id=.
    #[arg(long, value_name = "KEYS")]
    pub(crate) vsock: Option<String>,
    /// Any vhost-user device: device_type=N,socket=PATH,queue_sizes=[256,256][,id=NAME].
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) generic_vhost_user: Vec<String>,
    /// A GPU: on, or scanouts=N, modes=[1920x1080,…], memory=256M, virgl=on (3D); or another's backend, socket=PATH[,scanouts=N].
    #[arg(long, value_name = "KEYS")]
    pub(crate) gpu: Option<String>,
    /// What shows the GPU's pictures: on (screenshots only), or web=127.0.0.1:8006 (browsers), vnc=127.0.0.1:5900 or
    /// vnc=unix:PATH, with password_file=FILE. It brings a keyboard and a tablet, unless --input says something else.
    #[arg(long, value_name = "KEYS")]
    pub(crate) display: Option<String>,
    /// What is typed and pointed with: keyboard, tablet, mouse, each once.
    #[arg(long, value_name = "KIND", num_args = 1..)]
    pub(crate) input: Vec<String>,
    /// A PCI function of the host, bound to vfio-pci: path=/sys/bus/pci/devices/0000:01:00.0[,iommu=on][,id=NAME]
    /// [,fd=N of its group, open: fd=9 here and 9<>/dev/vfio/GROUP behind the command]; `atoll vfio check` says what it needs.
    #[arg(long, value_name = "KEYS", num_args = 1..)]
    pub(crate) device: Vec<String>,
    /// Entropy for the guest: src=/dev/urandom, or off.
    #[arg(long, value_name = "KEYS")]
    pub(crate) rng: Option<String>,
    /// First serial port: tty (when left out), pty, socket[=PATH], file=PATH, null or off.
    #[arg(long, value_name = "WHERE")]
    pub(crate) serial: Option<String>,
    /// Second serial port, served by a process of its own: file=PATH, pty (its name is logged) or off.
    #[arg(long, value_name = "WHERE")]
    pub(crate) serial2: Option<String>,
    /// virtio console: off (when left out), null, tty, pty, file=PATH or socket[=PATH], and behind it what becomes of it
    /// when its process does not come back, as for disks: pty,stall_timeout=10,on_failure=wait.
    #[arg(long, value_name = "WHERE")]
    pub(crate) console: Option<String>,
    /// Which CPU runs the guest: auto when left out.
    #[arg(long, value_enum)]
    pub(crate) cpu: Option<CpuFlag>,
    /// Of KVM: irqchip=kernel (when left out), or irqchip=split, which leaves only the local APICs to the host's kernel.
    #[arg(long, value_name = "KEYS")]
    pub(crate) kvm: Option<String>,
    /// CPU model that the guest sees: atoll-v1 (when left out), atoll-v2 (x86-64-v2), or host (KVM only).
    #[arg(long, value_name = "NAME")]
    pub(crate) cpu_model: Option<String>,
    /// Software CPU only: guest time comes from retired instructions, so that two runs are identical.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Leaves the process of this device alone when it stands, as in a debugger: that is told of, and nothing else is done.
    #[arg(long, value_name = "ID")]
    pub(crate) debug_device: Vec<String>,
    /// Lets `atoll fault` do to devices what the world may do, for tests.
    #[arg(long)]
    pub(crate) allow_faults: bool,
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
    /// How device processes are jailed: strict (in every layer, or there is no device), default (in every layer that this
    /// host has) or off (for debuggers).
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) jail: Option<JailFlag>,
    /// What becomes of a system call that the thread of its kind (vCPU, interrupts, device, …) has no need of: true (it ends
    /// the process), log (the kernel logs it) or false (nothing). Device processes have their own, see --jail.
    #[arg(long, value_enum, value_name = "HOW", default_value = "true", env = "ATOLL_SECCOMP")]
    pub(crate) seccomp: SeccompFlag,
}
