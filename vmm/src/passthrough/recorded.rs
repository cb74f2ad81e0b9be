//! A host written down: the files that [`Host::look`](super::Host::look) and [`check`](super::check()) read, in a folder that both can
//! look at later, on another machine, with the same outcome.
//!
//! Only those files are copied, and of a function's own folders only the way to its disks and networks. What this process may
//! not read is left out and named.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::bdf::Bdf;
use super::host::{link_name, names};

/// Most that is read of a file.
const FILE_MAX: u64 = 1 << 20;
/// Folders below one function, and how deep, as whoever looks at them goes.
const FOLDERS_MAX: usize = 4096;
const DEPTH_MAX: usize = 12;
/// Of the machine.
const FILES: [&str; 6] = [
    "proc/cpuinfo",
    "proc/interrupts",
    "proc/cmdline",
    "proc/self/mountinfo",
    "proc/swaps",
    "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
];
/// Of each function.
const ATTRIBUTES: [&str; 11] = [
    "vendor",
    "device",
    "class",
    "config",
    "resource",
    "reset",
    "reset_method",
    "driver_override",
    "sriov_totalvfs",
    "sriov_numvfs",
    "boot_vga",
];
const LINKS: [&str; 3] = ["driver", "iommu_group", "physfn"];

/// Nothing was written down, or not all.
#[derive(Debug, Error)]
pub enum RecordError {
    /// There is something of that name.
    #[error("{0} is there already: give a folder that is not, nothing is overwritten")]
    Exists(PathBuf),
    /// There is no PCI to write down.
    #[error("cannot read {path} ({source}); is sysfs mounted, and has this machine PCI?")]
    NoPci {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The folder does not take it.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What was written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Functions.
    pub functions: usize,
    /// Files that are there and could not be read.
    pub unreadable: Vec<PathBuf>,
}

struct Recorder<'a> {
    from: &'a Path,
    into: &'a Path,
    done: Recorded,
    looked: usize,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Write { path, source }
}

impl Recorder<'_> {
    fn folder(&self, path: &Path) -> Result<(), RecordError> {
        let into = self.into.join(path);
        fs::create_dir_all(&into).map_err(failed(&into))
    }

    /// Copies a file as far as it can be read; one that is not there is not there in the copy either.
    fn file(&mut self, path: &Path) -> Result<(), RecordError> {
        let from = self.from.join(path);
        // `reset` is only written to: that it is there is all that it says.
        let mut bytes = Vec::new();
        if !path.ends_with("reset") {
            let read = File::open(&from).and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes));
            match read {
                Ok(_) => {}
                Err(_) if !bytes.is_empty() => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(_) => {
                    self.done.unreadable.push(from);
                    return Ok(());
                }
            }
        } else if !from.exists() {
            return Ok(());
        }
        self.folder(path.parent().unwrap_or(Path::new("")))?;
        let into = self.into.join(path);
        fs::write(&into, bytes).map_err(failed(&into))
    }

    /// A link, of which only the name counts that it leads to.
    fn link(&self, path: &Path) -> Result<(), RecordError> {
        let Some(name) = link_name(&self.from.join(path)) else { return Ok(()) };
        self.folder(path.parent().unwrap_or(Path::new("")))?;
        let into = self.into.join(path);
        symlink(Path::new("..").join(name), &into).map_err(failed(&into))
    }

    /// Empty folders of the same names.
    fn same_names(&self, path: &Path) -> Result<(), RecordError> {
        names(&self.from.join(path)).iter().try_for_each(|name| self.folder(&path.join(name)))
    }

    fn function(&mut self, bdf: Bdf, root: &Path) -> Result<(), RecordError> {
        let named = Path::new("sys/bus/pci/devices").join(bdf.to_string());
        // Gone meanwhile, or not of this tree.
        let Ok(real) = fs::canonicalize(self.from.join(&named)) else { return Ok(()) };
        let Ok(real) = real.strip_prefix(root) else { return Ok(()) };
        self.folder(real)?;
        let into = self.into.join(&named);
        symlink(Path::new("../../../..").join(real), &into).map_err(failed(&into))?;
        ATTRIBUTES.iter().try_for_each(|name| self.file(&real.join(name)))?;
        LINKS.iter().try_for_each(|name| self.link(&real.join(name)))?;
        if let Some(group) = link_name(&self.from.join(real).join("iommu_group")) {
            self.file(&Path::new("sys/kernel/iommu_groups").join(&group).join("reserved_regions"))?;
            self.node(&Path::new("dev/vfio").join(group))?;
        }
        self.looked = 0;
        self.below(real, 0)
    }

    /// The way to disks and networks.
    fn below(&mut self, folder: &Path, depth: usize) -> Result<(), RecordError> {
        self.looked += 1;
        if self.looked > FOLDERS_MAX || depth > DEPTH_MAX {
            return Ok(());
        }
        let from = self.from.join(folder);
        let name = folder.file_name().unwrap_or_default();
        match link_name(&from.join("subsystem")).as_deref() {
            Some("block") => {
                self.link(&folder.join("subsystem"))?;
                self.file(&folder.join("dev"))?;
                let number = super::host::text(&from.join("dev")).unwrap_or_default();
                if !number.is_empty() {
                    self.same_names(&Path::new("sys/dev/block").join(number).join("holders"))?;
                }
            }
            Some("net") => {
                self.link(&folder.join("subsystem"))?;
                self.file(&Path::new("sys/class/net").join(name).join("operstate"))?;
            }
            _ => {}
        }
        for entry in names(&from) {
            let below = folder.join(&entry);
            let is_folder = fs::symlink_metadata(self.from.join(&below)).is_ok_and(|entry| entry.is_dir());
            if is_folder && entry.parse::<Bdf>().is_err() {
                self.below(&below, depth + 1)?;
            }
        }
        Ok(())
    }

    /// A device node, of which only counts who may open it.
    fn node(&self, path: &Path) -> Result<(), RecordError> {
        let Ok(there) = fs::metadata(self.from.join(path)) else { return Ok(()) };
        self.folder(path.parent().unwrap_or(Path::new("")))?;
        let into = self.into.join(path);
        fs::write(&into, []).map_err(failed(&into))?;
        let mode = fs::Permissions::from_mode(there.permissions().mode() & 0o666);
        fs::set_permissions(&into, mode).map_err(failed(&into))
    }
}

/// Writes the host below `from` down in the new folder `into`.
///
/// # Errors
/// [`RecordError`]; what was written until then stays.
pub fn record(from: &Path, into: &Path) -> Result<Recorded, RecordError> {
    let devices = from.join("sys/bus/pci/devices");
    let no_pci = |source| RecordError::NoPci { path: devices.clone(), source };
    fs::read_dir(&devices).map_err(no_pci)?;
    let root = fs::canonicalize(from).map_err(no_pci)?;
    fs::create_dir(into).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => RecordError::Exists(into.to_owned()),
        _ => RecordError::Write { path: into.to_owned(), source: error },
    })?;
    let mut recorder = Recorder { from, into, done: Recorded::default(), looked: 0 };
    recorder.folder(Path::new("sys/bus/pci/devices"))?;
    FILES.iter().try_for_each(|path| recorder.file(Path::new(path)))?;
    recorder.same_names(Path::new("sys/class/iommu"))?;
    if from.join("sys/bus/pci/drivers/vfio-pci").is_dir() {
        recorder.folder(Path::new("sys/bus/pci/drivers/vfio-pci"))?;
    }
    recorder.node(Path::new("dev/vfio/vfio"))?;
    for bdf in names(&devices).iter().filter_map(|name| name.parse().ok()) {
        recorder.function(bdf, &root)?;
        recorder.done.functions += 1;
    }
    Ok(recorder.done)
}
