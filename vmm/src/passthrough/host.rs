//! The host's PCI functions and IOMMU groups, as its files show them.
//!
//! A function can go while it is looked at; one that is there only in part counts as gone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::bdf::Bdf;
use super::capabilities::Capabilities;

/// Functions and groups beyond this number are not looked at; no host has as many.
const FUNCTIONS_MAX: usize = 65_536;
/// Most that is read of a file.
const FILE_MAX: u64 = 1 << 20;
/// Of each BAR, the flags of the kernel's `struct resource`.
const IO: u64 = 0x100;
const MEMORY: u64 = 0x200;
const PREFETCH: u64 = 0x2000;
const MEMORY_64: u64 = 0x10_0000;

/// The tree could not be read.
#[derive(Debug, Error)]
pub enum HostError {
    /// There is no PCI there.
    #[error("cannot read {path} ({source}); is sysfs mounted, and has this machine PCI?")]
    NoPci {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// There is no such function.
    #[error("there is no PCI function {0}; `atoll vfio check` lists all")]
    NoFunction(Bdf),
    /// There is, and it cannot be read what it is.
    #[error("{bdf}: {what} cannot be read; root can: sudo atoll vfio check {bdf}")]
    Unreadable {
        /// Which.
        bdf: Bdf,
        /// The attribute.
        what: &'static str,
    },
}

/// Who wants to open the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Groups, the first one among them.
    pub gids: Vec<u32>,
}

impl Caller {
    /// This process.
    pub fn this() -> Self {
        let mut gids: Vec<u32> =
            rustix::process::getgroups().unwrap_or_default().into_iter().map(rustix::fs::Gid::as_raw).collect();
        gids.push(rustix::process::getegid().as_raw());
        Self { uid: rustix::process::geteuid().as_raw(), gids }
    }
    fn may_use(&self, file: &fs::Metadata) -> bool {
        let mode = file.mode();
        let granted = match () {
            () if self.uid == 0 => return true,
            () if file.uid() == self.uid => mode >> 6,
            () if self.gids.contains(&file.gid()) => mode >> 3,
            () => mode,
        };
        granted & 0o6 == 0o6
    }
}

/// Whose processor it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// Intel: VT-d.
    Intel,
    /// AMD: AMD-Vi.
    Amd,
    /// Another.
    Other,
}

impl Cpu {
    /// As the kernel's `/proc/cpuinfo` says.
    pub fn of(cpuinfo: &str) -> Self {
        let vendor = cpuinfo.lines().find_map(|line| line.strip_prefix("vendor_id")?.split_once(':'));
        match vendor.map(|pair| pair.1.trim()) {
            Some("GenuineIntel") => Self::Intel,
            Some("AuthenticAMD" | "HygonGenuine") => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// A stretch of addresses that a function has; none that is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Number of the BAR.
    pub index: u8,
    /// Bytes.
    pub bytes: u64,
    /// Ports, not memory.
    pub io: bool,
    /// 64-bit addresses.
    pub wide: bool,
    /// May be read ahead.
    pub prefetchable: bool,
}

/// One function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub bdf: Bdf,
    /// Vendor and device.
    pub id: (u16, u16),
    /// Class, subclass, interface.
    pub class: u32,
    /// What drives it now.
    pub driver: Option<String>,
    /// The only driver that may, by the administrator's word.
    pub driver_override: Option<String>,
    /// The group that the IOMMU can tell apart from others.
    pub group: Option<u32>,
    /// Its BARs.
    pub regions: Vec<Region>,
    /// How it can be reset, best first.
    pub reset_methods: Vec<String>,
    /// For a virtual function the physical one.
    pub physical: Option<Bdf>,
    /// Virtual functions that it has, and could have.
    pub virtual_functions: Option<(u32, u32)>,
    /// The firmware's screen is on it.
    pub boot_vga: bool,
    /// What its configuration space says.
    pub capabilities: Capabilities,
    /// The functions on the way to it from the root, the nearest last.
    pub path: Vec<Bdf>,
    /// Attributes that are there and could not be read.
    pub unreadable: Vec<&'static str>,
}

impl Function {
    /// A bridge of any kind.
    pub fn is_bridge(&self) -> bool {
        self.class >> 16 == 0x06
    }
    /// It is VFIO's.
    pub fn is_vfio(&self) -> bool {
        self.driver.as_deref() == Some("vfio-pci")
    }
}

/// What the IOMMU cannot tell apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Its functions.
    pub members: Vec<Bdf>,
    /// The firmware needs memory of its own to stay mapped for them: VFIO refuses.
    pub firmware_memory: bool,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    /// The IOMMUs by name.
    pub iommus: Vec<String>,
    /// All functions.
    pub functions: BTreeMap<Bdf, Function>,
    /// Functions that are there, and what of them cannot be read so that nothing can be said of them.
    pub unreadable: BTreeMap<Bdf, &'static str>,
    /// All groups.
    pub groups: BTreeMap<u32, Group>,
    /// Interrupts are remapped.
    pub interrupts_remapped: bool,
    /// Somebody allowed passthrough without that.
    pub unsafe_interrupts: bool,
    /// `vfio-pci` is there.
    pub vfio_loaded: bool,
    /// Whose processor.
    pub cpu: Cpu,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A file's text without the line's end; none when it is not there, not text, or not readable.
pub(super) fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(FILE_MAX).read_to_string(&mut text).ok()?;
    Some(text.trim_end().to_owned())
}

/// The last part of where a link leads.
pub(super) fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// Attributes of one function, and which of them could not be read though they are there.
struct Attributes<'a> {
    folder: &'a Path,
    unreadable: Vec<&'static str>,
}

impl Attributes<'_> {
    fn bytes(&mut self, name: &'static str, most: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = File::open(self.folder.join(name)).and_then(|file| file.take(most).read_to_end(&mut bytes));
        match read {
            Ok(_) => Some(bytes),
            // What is there is enough; of some devices reading fails half-way.
            Err(_) if !bytes.is_empty() => Some(bytes),
            Err(error) => {
                // One that is gone, with its function or without, has nothing to say.
                if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) {
                    self.unreadable.push(name);
                }
                None
            }
        }
    }
    fn text(&mut self, name: &'static str) -> Option<String> {
        Some(String::from_utf8(self.bytes(name, FILE_MAX)?).ok()?.trim_end().to_owned())
    }
    fn hex(&mut self, name: &'static str) -> Option<u64> {
        u64::from_str_radix(self.text(name)?.trim_start_matches("0x"), 16).ok()
    }
    fn number(&mut self, name: &'static str) -> Option<u32> {
        self.text(name)?.parse().ok()
    }
}

/// Names in a folder, sorted; none when it is not there.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(FUNCTIONS_MAX);
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The lines of `resource`: first and last address and flags; the first six are the BARs.
fn regions(resource: &str) -> Vec<Region> {
    let read = |(index, line): (usize, &str)| {
        let mut fields = line.split_whitespace().map(|field| u64::from_str_radix(field.trim_start_matches("0x"), 16));
        let (first, last, flags) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
        let bytes = last.checked_sub(first)?.checked_add(1)?;
        (flags & (IO | MEMORY) != 0).then_some(Region {
            index: index as u8,
            bytes,
            io: flags & IO != 0,
            wide: flags & MEMORY_64 != 0,
            prefetchable: flags & PREFETCH != 0,
        })
    };
    resource.lines().take(6).enumerate().filter_map(read).collect()
}

/// What it is; else the attribute that cannot be read and without which nothing can be said, or nothing when it is gone.
fn function(folder: &Path, bdf: Bdf) -> Result<Function, Option<&'static str>> {
    let mut has = Attributes { folder, unreadable: Vec::new() };
    let identity = [has.hex("vendor"), has.hex("device"), has.hex("class")];
    let [Some(vendor), Some(device), Some(class)] = identity else { return Err(has.unreadable.first().copied()) };
    let id = (u16::try_from(vendor).map_err(|_| None)?, u16::try_from(device).map_err(|_| None)?);
    let reset_methods = match has.text("reset_method") {
        Some(methods) => methods.split_whitespace().map(str::to_owned).collect(),
        // Kernels before 5.15 say only whether there is one.
        None if folder.join("reset").exists() => vec!["unnamed".to_owned()],
        None => Vec::new(),
    };
    let config = has.bytes("config", 4096).unwrap_or_default();
    let real = fs::canonicalize(folder).map_err(|_| None)?;
    let way = real.components().filter_map(|part| part.as_os_str().to_str()?.parse().ok());
    let total = has.number("sriov_totalvfs");
    let now = has.number("sriov_numvfs").unwrap_or(0);
    let driver_override = has.text("driver_override").filter(|name| !matches!(name.as_str(), "" | "(null)"));
    Ok(Function {
        bdf,
        id,
        class: u32::try_from(class).map_err(|_| None)?,
        driver: link_name(&folder.join("driver")),
        driver_override,
        group: link_name(&folder.join("iommu_group")).and_then(|group| group.parse().ok()),
        regions: regions(&has.text("resource").unwrap_or_default()),
        reset_methods,
        physical: link_name(&folder.join("physfn")).and_then(|name| name.parse().ok()),
        virtual_functions: total.map(|total| (now, total)),
        boot_vga: has.number("boot_vga") == Some(1),
        capabilities: Capabilities::read(&config),
        path: way.filter(|part| *part != bdf).collect(),
        unreadable: has.unreadable,
    })
}

impl Host {
    /// Looks at the tree below `root`.
    ///
    /// # Errors
    /// When there is no PCI in it.
    pub fn look(root: &Path) -> Result<Self, HostError> {
        let devices = root.join("sys/bus/pci/devices");
        fs::read_dir(&devices).map_err(|source| HostError::NoPci { path: devices.clone(), source })?;
        let (mut functions, mut unreadable) = (BTreeMap::new(), BTreeMap::new());
        for name in names(&devices) {
            let Ok(bdf) = name.parse::<Bdf>() else { continue };
            match function(&devices.join(&name), bdf) {
                Ok(function) => drop(functions.insert(bdf, function)),
                Err(Some(what)) => drop(unreadable.insert(bdf, what)),
                Err(None) => {}
            }
        }
        let mut groups: BTreeMap<u32, Group> = BTreeMap::new();
        for function in functions.values() {
            if let Some(group) = function.group {
                groups.entry(group).or_default().members.push(function.bdf);
            }
        }
        for (number, group) in &mut groups {
            let reserved = text(&root.join(format!("sys/kernel/iommu_groups/{number}/reserved_regions")));
            group.firmware_memory = reserved.is_some_and(|text| text.lines().any(|line| line.ends_with(" direct")));
        }
        let cpu = text(&root.join("proc/cpuinfo")).unwrap_or_default();
        let interrupts = text(&root.join("proc/interrupts")).unwrap_or_default();
        let allowed = text(&root.join("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"));
        Ok(Self {
            iommus: names(&root.join("sys/class/iommu")),
            functions,
            groups,
            interrupts_remapped: interrupts
                .split_whitespace()
                .any(|word| word.starts_with("IR-") || word.starts_with("INTEL-IR") || word.starts_with("AMD-IR")),
            unsafe_interrupts: allowed.is_some_and(|value| value.starts_with(['Y', 'y', '1'])),
            vfio_loaded: root.join("sys/bus/pci/drivers/vfio-pci").is_dir(),
            cpu: Cpu::of(&cpu),
            unreadable,
            cmdline: text(&root.join("proc/cmdline")).unwrap_or_default(),
            root: root.to_owned(),
        })
    }

    /// The tree.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// One function.
    ///
    /// # Errors
    /// When there is none.
    pub fn function(&self, bdf: Bdf) -> Result<&Function, HostError> {
        self.functions.get(&bdf).ok_or_else(|| match self.unreadable.get(&bdf) {
            Some(what) => HostError::Unreadable { bdf, what },
            None => HostError::NoFunction(bdf),
        })
    }

    /// The folder of a function.
    pub fn folder(&self, bdf: Bdf) -> PathBuf {
        self.root.join(format!("sys/bus/pci/devices/{bdf}"))
    }

    /// Whether the caller may open a device node; none when it is not there.
    pub(super) fn may_open(&self, node: &str, caller: &Caller) -> Option<bool> {
        fs::metadata(self.root.join(node)).ok().map(|file| caller.may_use(&file))
    }
}
