//! Why a function of the host cannot be had, and what helps.

use std::io;

use thiserror::Error;

use crate::passthrough::Bdf;

/// A function of the host cannot be given to the guest.
#[derive(Debug, Error)]
pub enum VfioError {
    /// Its folder is not there.
    #[error("there is no PCI function {bdf} ({path}); `atoll vfio check` lists all")]
    Missing {
        /// Which.
        bdf: Bdf,
        /// Where it should be.
        path: String,
    },
    /// It is another driver's.
    #[error(
        "{bdf} is {driver}, not vfio-pci's: `atoll vfio bind {bdf}` gives it to vfio-pci, and remembers whose it was"
    )]
    NotBound {
        /// Which.
        bdf: Bdf,
        /// Whose it is.
        driver: String,
    },
    /// No IOMMU.
    #[error(
        "{bdf} is in no IOMMU group, so nothing would keep it from the host's memory: switch the IOMMU on in the \
         firmware's setup; `atoll vfio check {bdf}` says what else this host needs"
    )]
    NoIommu {
        /// Which.
        bdf: Bdf,
    },
    /// VFIO itself is missing.
    #[error("cannot open {path} ({source}): load VFIO (`modprobe vfio-pci`)")]
    NoVfio {
        /// What.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel has another VFIO.
    #[error("this kernel's VFIO has no {0}, which Linux has had since 3.10")]
    Lacks(&'static str),
    /// No permission.
    #[error("no permission to open {path}: give it to this user (`chown $USER {path}`), or run as root")]
    Permission {
        /// What.
        path: String,
    },
    /// What was passed is not its group.
    #[error("the descriptor that was passed for {bdf} is not its group's: open that, and pass it (`fd=9 9<>{path}`)")]
    NoGroup {
        /// Which.
        bdf: Bdf,
        /// What it should be.
        path: String,
    },
    /// The kernel has devices' own files, and no groups.
    #[error(
        "there is no {path}, but /dev/iommu: this kernel serves VFIO through iommufd alone, which Atoll does not speak; a kernel \
         with CONFIG_VFIO_GROUP and CONFIG_VFIO_CONTAINER (or CONFIG_IOMMUFD_VFIO_CONTAINER) has groups"
    )]
    IommufdOnly {
        /// What is missing.
        path: String,
    },
    /// A register bank that no board has room for.
    #[error(
        "{bdf}: BAR {bar} has {len:#x} bytes, and a guest has {room:#x} for all BARs of that kind: make it smaller (`echo N > \
         /sys/bus/pci/devices/{bdf}/resource{bar}_resize`, where the device can), or pass another device"
    )]
    BarTooLarge {
        /// Which.
        bdf: Bdf,
        /// The BAR's number.
        bar: u8,
        /// Its length.
        len: u64,
        /// What there is.
        room: u64,
    },
    /// Somebody else has it.
    #[error("{what} is in use: by another machine, or twice by this one? a device can be given away once")]
    Busy {
        /// What.
        what: String,
    },
    /// The group has functions of other drivers.
    #[error(
        "the IOMMU cannot tell {bdf} from other functions of its group {group}, which are not all vfio-pci's: `atoll vfio \
         check {bdf}` names them; bind them too, or give up on this slot"
    )]
    NotViable {
        /// Which.
        bdf: Bdf,
        /// Its group.
        group: u32,
    },
    /// The limit on locked memory.
    #[error(
        "the device may reach {mib} MiB of guest memory at any time, so they must be locked in place, and this user may lock \
         less: raise the limit (`ulimit -l unlimited`, LimitMEMLOCK= of systemd), or run as root"
    )]
    Locked {
        /// How much.
        mib: u64,
    },
    /// Addresses that the host's IOMMU does not take.
    #[error("the host's IOMMU refuses guest memory at {gpa:#x}, {len:#x} bytes ({source}): give the guest less memory")]
    Map {
        /// Where, in the guest.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("{bdf}: {step} failed: {source}")]
    Step {
        /// Which.
        bdf: Bdf,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It cannot be put before a guest.
    #[error("{bdf}: {source}")]
    Function {
        /// Which.
        bdf: Bdf,
        /// Why not.
        #[source]
        source: atoll_devices::passthrough::FunctionError,
    },
    /// It has nothing but a pin.
    #[error("{bdf} interrupts by its pin alone, which --kvm irqchip=split does not carry: leave that out")]
    PinOnly {
        /// Which.
        bdf: Bdf,
    },
    /// Behind a virtual IOMMU that is not there.
    #[error(
        "iommu=on needs the machine's IOMMU, which is there from the start or not at all: start the machine with a device that has iommu=on"
    )]
    NoUnit,
}
