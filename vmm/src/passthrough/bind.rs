//! Gives a function to `vfio-pci`, and back to whom it was taken from.
//!
//! What was there before is written down before anything is changed, and a step that fails undoes those before it. Whatever
//! the host still uses is refused; so is taking a function back that a process has open, because the kernel would wait for
//! that process without end.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::bdf::Bdf;
use super::host::{Host, HostError, link_name};
use super::in_use;

/// A function did not change hands; it is where it was.
#[derive(Debug, Error)]
pub enum BindError {
    /// No such function, or no PCI.
    #[error(transparent)]
    Host(#[from] HostError),
    /// `vfio-pci` is not there.
    #[error("vfio-pci is not loaded; sudo modprobe vfio-pci")]
    NotLoaded,
    /// It is a bridge.
    #[error("{0} is a bridge, which belongs to the host; bind a device behind it")]
    Bridge(Bdf),
    /// There is no IOMMU for it.
    #[error("no IOMMU is on for {0}, so that VFIO would refuse it; see atoll vfio check {0}")]
    NoIommu(Bdf),
    /// The host uses it.
    #[error("the host uses {bdf}: {losses}; stop that first")]
    InUse {
        /// The function.
        bdf: Bdf,
        /// What for.
        losses: String,
    },
    /// A process has it.
    #[error("process {pid} has {bdf} open; end it first")]
    Open {
        /// The function.
        bdf: Bdf,
        /// Whose.
        pid: u32,
    },
    /// It is not VFIO's.
    #[error("{bdf} is not bound to vfio-pci but to {driver}; there is nothing to give back")]
    NotOurs {
        /// The function.
        bdf: Bdf,
        /// Whose it is.
        driver: String,
    },
    /// A step failed; those before it are undone.
    #[error("cannot write {path} ({source}); {remedy}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The kernel did what it was asked and the driver did not take it.
    #[error("{driver} did not take {bdf}; the kernel's log (dmesg) says why")]
    NotTaken {
        /// The function.
        bdf: Bdf,
        /// Who should have.
        driver: &'static str,
    },
}

/// How a function was before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Who drove it.
    pub driver: Option<String>,
    /// Whom it was reserved for.
    pub driver_override: Option<String>,
}

/// Writes to sysfs.
pub trait Hands {
    /// Writes `value` to a file that is there.
    ///
    /// # Errors
    /// What the kernel said.
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()>;
}

/// The kernel's own files.
#[derive(Clone, Copy, Debug, Default)]
pub struct SysfsHands;

impl Hands for SysfsHands {
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        File::options().write(true).open(path)?.write_all(value.as_bytes())
    }
}

/// Where a function's record lies.
fn record_path(records: &Path, bdf: Bdf) -> PathBuf {
    records.join(format!("{bdf}.json"))
}

fn failed(path: &Path, source: io::Error) -> BindError {
    let remedy = match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "run it with sudo, outside of containers"
        }
        _ => "the kernel's log (dmesg) may say more",
    };
    BindError::Write { path: path.to_owned(), source, remedy }
}

/// One function in transit.
struct Move<'a, H> {
    hands: &'a mut H,
    folder: PathBuf,
    root: &'a Path,
    bdf: Bdf,
}

impl<H: Hands> Move<'_, H> {
    fn write(&mut self, path: &Path, value: &str) -> Result<(), BindError> {
        self.hands.write(path, value).map_err(|source| failed(path, source))
    }
    fn driver(&self) -> Option<String> {
        link_name(&self.folder.join("driver"))
    }
    fn reserve(&mut self, driver: Option<&str>) -> Result<(), BindError> {
        // An empty line takes the reservation away.
        self.write(&self.folder.join("driver_override"), &format!("{}\n", driver.unwrap_or_default()))
    }
    fn release(&mut self) -> Result<(), BindError> {
        match self.driver() {
            Some(_) => self.write(&self.folder.join("driver/unbind"), &self.bdf.to_string()),
            None => Ok(()),
        }
    }
    fn probe(&mut self) -> Result<(), BindError> {
        self.write(&self.root.join("sys/bus/pci/drivers_probe"), &self.bdf.to_string())
    }
    /// Makes it as it was, as far as that goes.
    fn put_back(&mut self, record: &Record) -> Result<(), BindError> {
        self.reserve(record.driver_override.as_deref())?;
        if self.driver() != record.driver {
            self.release()?;
            if record.driver.is_some() {
                self.probe()?;
            }
        }
        Ok(())
    }
}

/// Gives a function to `vfio-pci`; what it was before is also kept in the folder `records`. Nothing happens when it is there.
///
/// # Errors
/// [`BindError`]; then it is as it was.
pub fn bind(host: &Host, bdf: Bdf, records: &Path, hands: &mut impl Hands) -> Result<Record, BindError> {
    let function = host.function(bdf)?;
    let record = Record { driver: function.driver.clone(), driver_override: function.driver_override.clone() };
    if function.is_vfio() {
        return Ok(record);
    }
    if function.is_bridge() {
        return Err(BindError::Bridge(bdf));
    }
    if function.group.is_none() {
        return Err(BindError::NoIommu(bdf));
    }
    if !host.vfio_loaded {
        return Err(BindError::NotLoaded);
    }
    let losses = in_use::losses(host, bdf);
    if !losses.is_empty() {
        return Err(BindError::InUse { bdf, losses: losses.join(", ") });
    }
    let path = record_path(records, bdf);
    let kept = serde_json::to_vec(&record).map_err(io::Error::other);
    kept.and_then(|json| fs::create_dir_all(records).and_then(|()| fs::write(&path, json)))
        .map_err(|source| failed(&path, source))?;
    let mut moving = Move { hands, folder: host.folder(bdf), root: host.root(), bdf };
    let moved = moving.reserve(Some("vfio-pci")).and_then(|()| moving.release()).and_then(|()| moving.probe());
    let moved = moved.and_then(|()| match moving.driver().as_deref() {
        Some("vfio-pci") => Ok(()),
        _ => Err(BindError::NotTaken { bdf, driver: "vfio-pci" }),
    });
    if let Err(error) = moved {
        if let Err(worse) = moving.put_back(&record) {
            tracing::error!(%bdf, error = %worse, "could not be put back");
        }
        // A record of what did not happen; if it stays, it says the truth all the same.
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    Ok(record)
}

/// Gives a function back: to whom `records` says, or to whoever takes it. Returns who drives it now.
///
/// # Errors
/// [`BindError`].
pub fn unbind(host: &Host, bdf: Bdf, records: &Path, hands: &mut impl Hands) -> Result<Option<String>, BindError> {
    let function = host.function(bdf)?;
    if !function.is_vfio() {
        let driver = function.driver.clone().unwrap_or_else(|| "nothing".into());
        return Err(BindError::NotOurs { bdf, driver });
    }
    if let Some(pid) = in_use::opened_by(host, bdf) {
        return Err(BindError::Open { bdf, pid });
    }
    let path = record_path(records, bdf);
    let record: Option<Record> = fs::read(&path).ok().and_then(|json| serde_json::from_slice(&json).ok());
    let mut moving = Move { hands, folder: host.folder(bdf), root: host.root(), bdf };
    let reserved = record.as_ref().and_then(|record| record.driver_override.clone());
    moving.reserve(reserved.as_deref().filter(|name| *name != "vfio-pci"))?;
    moving.release()?;
    // One that nothing drove stays alone; without a record whoever knows it may have it.
    if record.is_none_or(|record| record.driver.is_some()) {
        moving.probe()?;
    }
    let driver = moving.driver();
    let _ = fs::remove_file(&path);
    Ok(driver)
}
