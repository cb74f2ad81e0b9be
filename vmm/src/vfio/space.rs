//! What devices may reach: a container of VFIO with guest memory mapped into it.
//!
//! Devices that are not behind the guest's IOMMU share one, in which all of RAM is at its guest-physical addresses; each
//! that is behind it has one of its own. RAM is one memfd that never moves, so it is mapped once.
#![allow(unsafe_code, reason = "devices are given guest memory, which is mapped for as long as they can reach it")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vfio_bindings::bindings::vfio;

use super::error::VfioError;
use super::ioctl;
use crate::memory::GuestMemory;
use crate::passthrough::Bdf;

const CONTAINER: &str = "/dev/vfio/vfio";
/// What newer kernels may have in its stead.
const IOMMUFD: &str = "/dev/iommu";
/// Pages of the IOMMU; no architecture that Atoll runs on has smaller ones.
pub(super) const PAGE: u64 = 4096;

/// A group in a container.
struct Group {
    file: File,
    /// Somebody else has it open too, so that closing it here does not take it out of the container.
    is_passed: bool,
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.is_passed
            && let Err(error) = ioctl::unset_container(&self.file)
        {
            tracing::warn!(%error, "a group that was passed as a descriptor stays in its container");
        }
    }
}

/// Addresses of devices, and what is behind them.
pub(super) struct DmaSpace {
    /// Before the container: groups leave it first.
    groups: Mutex<BTreeMap<u32, Weak<Group>>>,
    container: File,
    memory: GuestMemory,
}

/// A function in a space, open. It is closed before its group, and that before the container.
pub(super) struct OpenFunction {
    pub(super) file: File,
    _group: Arc<Group>,
    pub(super) space: Arc<DmaSpace>,
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// What an error of opening a file of VFIO means.
fn not_open(path: &str, source: io::Error) -> VfioError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => VfioError::Permission { path: path.into() },
        _ if source.raw_os_error() == Some(libc::EBUSY) => VfioError::Busy { what: path.into() },
        io::ErrorKind::NotFound if Path::new(IOMMUFD).exists() && !Path::new(CONTAINER).exists() => {
            VfioError::IommufdOnly { path: path.into() }
        }
        _ => VfioError::NoVfio { path: path.into(), source },
    }
}

/// A function in sysfs.
pub(super) struct Place {
    pub(super) bdf: Bdf,
    folder: PathBuf,
    /// Its group, opened by somebody with more rights.
    group: Option<Arc<OwnedFd>>,
}

impl Place {
    /// The function whose folder this is.
    pub(super) fn new(folder: &Path, bdf: Bdf, group: Option<Arc<OwnedFd>>) -> Self {
        Self { bdf, folder: folder.to_owned(), group }
    }

    /// Opens its group at this path, or takes the one that was passed.
    fn open_group(&self, path: &str) -> Result<File, VfioError> {
        let opened = match &self.group {
            Some(passed) => passed.try_clone().map(File::from),
            None => open(path),
        };
        opened.map_err(|source| not_open(path, source))
    }

    /// Its group, if it is there, vfio-pci's and behind an IOMMU.
    fn group(&self) -> Result<u32, VfioError> {
        let bdf = self.bdf;
        if !self.folder.is_dir() {
            return Err(VfioError::Missing { bdf, path: self.folder.display().to_string() });
        }
        let link = |name: &str| {
            let target = std::fs::read_link(self.folder.join(name)).ok()?;
            Some(target.file_name()?.to_str()?.to_owned())
        };
        let group = link("iommu_group").and_then(|name| name.parse().ok());
        let driver = link("driver");
        match (driver.as_deref(), group) {
            // Variants of it for some makers' devices.
            (Some(name), Some(group)) if name.contains("vfio") => Ok(group),
            (_, None) => Err(VfioError::NoIommu { bdf }),
            (Some(name), _) => Err(VfioError::NotBound { bdf, driver: format!("{name}'s") }),
            (None, _) => Err(VfioError::NotBound { bdf, driver: "nobody's".into() }),
        }
    }
}

impl DmaSpace {
    fn new(memory: &GuestMemory) -> Result<Self, VfioError> {
        let container = open(CONTAINER).map_err(|source| not_open(CONTAINER, source))?;
        let refused = |source| not_open(CONTAINER, source);
        if ioctl::api_version(&container).map_err(refused)? != vfio::VFIO_API_VERSION as i32 {
            return Err(VfioError::Lacks("API version 0"));
        }
        if !ioctl::has_extension(&container, vfio::VFIO_TYPE1v2_IOMMU).map_err(refused)? {
            return Err(VfioError::Lacks("IOMMU of type 1, version 2 (vfio_iommu_type1 is not loaded?)"));
        }
        Ok(Self { groups: Mutex::default(), container, memory: memory.clone() })
    }

    fn groups(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Weak<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group of a function, in this space; whether it is the first one, with which a space begins empty.
    fn join(&self, place: &Place, number: u32) -> Result<(Arc<Group>, bool), VfioError> {
        let bdf = place.bdf;
        let mut groups = self.groups();
        if let Some(group) = groups.get(&number).and_then(Weak::upgrade) {
            return Ok((group, false));
        }
        let path = format!("/dev/vfio/{number}");
        let failed = |step| move |source| VfioError::Step { bdf, step, source };
        let (file, is_passed) = (place.open_group(&path)?, place.group.is_some());
        let flags = ioctl::group_flags(&file).map_err(|source| match is_passed {
            true => VfioError::NoGroup { bdf, path: path.clone() },
            false => failed("asking for its group")(source),
        })?;
        if flags & vfio::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::NotViable { bdf, group: number });
        }
        let first = groups.values().all(|group| group.strong_count() == 0);
        ioctl::set_container(&file, &self.container).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY | libc::EINVAL) => VfioError::Busy { what: path.clone() },
            _ => VfioError::Step { bdf, step: "putting its group into a container", source },
        })?;
        if first {
            match ioctl::set_iommu(&self.container, vfio::VFIO_TYPE1v2_IOMMU) {
                // The last group is not quite gone, and all is as it was.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                chosen => chosen.map_err(failed("choosing the kind of IOMMU"))?,
            }
        }
        let group = Arc::new(Group { file, is_passed });
        groups.insert(number, Arc::downgrade(&group));
        Ok((group, first))
    }

    /// Opens a function, whose group joins this space; whether nothing is mapped in it yet.
    fn open(self: &Arc<Self>, place: &Place) -> Result<(OpenFunction, bool), VfioError> {
        let bdf = place.bdf;
        let (group, first) = self.join(place, place.group()?)?;
        let file = ioctl::device(&group.file, &bdf.to_string()).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => VfioError::Busy { what: bdf.to_string() },
            Some(libc::ENODEV) if place.group.is_some() => {
                VfioError::NoGroup { bdf, path: format!("/dev/vfio/{}", place.group().unwrap_or_default()) }
            }
            Some(libc::ENODEV) => VfioError::NotBound { bdf, driver: "another driver's".into() },
            _ => VfioError::Step { bdf, step: "opening it", source },
        })?;
        Ok((OpenFunction { file, _group: group, space: Arc::clone(self) }, first))
    }

    /// Maps all of RAM at its own addresses.
    fn map_all(&self) -> Result<(), VfioError> {
        self.memory.slots().iter().try_for_each(|slot| {
            // SAFETY: the slot is guest memory, which `self` keeps mapped for as long as the container exists, and which
            // this process accesses as memory that others write at any time.
            let mapped = unsafe { ioctl::map_dma(&self.container, slot.gpa, slot.len, slot.host, true) };
            mapped
                .or_else(|source| match source.raw_os_error() {
                    // It is there still.
                    Some(libc::EEXIST) => Ok(()),
                    _ => Err(source),
                })
                .map_err(|source| match source.raw_os_error() {
                    Some(libc::ENOMEM) => VfioError::Locked { mib: self.memory.size() >> 20 },
                    _ => VfioError::Map { gpa: slot.gpa, len: slot.len, source },
                })
        })
    }

    /// Maps what of RAM is at guest-physical `gpa..gpa + len`, all of which is page-aligned, at `iova`. Addresses that are
    /// not RAM stay unmapped: the device faults there.
    pub(super) fn map(&self, iova: u64, gpa: u64, len: u64, writable: bool) -> io::Result<()> {
        let end = gpa.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        for slot in self.memory.slots() {
            let (start, last) = (slot.gpa.max(gpa), (slot.gpa + slot.len).min(end));
            if start < last {
                let at = iova.checked_add(start - gpa).ok_or(io::ErrorKind::InvalidInput)?;
                let host = slot.host + (start - slot.gpa);
                // SAFETY: as for `map_all`; the stretch lies within the slot.
                unsafe { ioctl::map_dma(&self.container, at, last - start, host, writable) }?;
            }
        }
        Ok(())
    }

    /// Unmaps whatever is mapped in a range, which splits no mapping.
    pub(super) fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        ioctl::unmap_dma(&self.container, iova, len).map(drop)
    }
}

/// The space that the devices of one machine share, for as long as one of them has it.
#[derive(Clone, Default)]
pub(crate) struct SharedSpace(Arc<Mutex<Weak<DmaSpace>>>);

impl SharedSpace {
    /// Opens a function in it.
    ///
    /// # Errors
    /// When the function cannot be had, or memory cannot be mapped.
    pub(super) fn open(&self, place: &Place, memory: &GuestMemory) -> Result<OpenFunction, VfioError> {
        // One device after the other: the second must not come before memory is mapped for the first.
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (function, empty) = match shared.upgrade() {
            Some(space) => space.open(place)?,
            None => (own_space(place, memory)?, true),
        };
        if empty {
            function.space.map_all()?;
        }
        *shared = Arc::downgrade(&function.space);
        Ok(function)
    }
}

/// Opens a function in a space of its own, in which nothing is mapped.
///
/// # Errors
/// When it cannot be had.
pub(super) fn own_space(place: &Place, memory: &GuestMemory) -> Result<OpenFunction, VfioError> {
    // First what is wrong with the function itself.
    place.group()?;
    Ok(Arc::new(DmaSpace::new(memory)?).open(place)?.0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What stands in the way is told before VFIO is asked at all, so that it can be told on any host.
    #[test]
    fn what_is_in_the_way_is_named() {
        let sysfs = tempfile::tempdir().unwrap();
        let bdf: Bdf = "0000:01:00.0".parse().unwrap();
        let folder = sysfs.path().join("0000:01:00.0");
        let place = Place::new(&folder, bdf, None);
        assert!(matches!(place.group(), Err(VfioError::Missing { .. })));
        std::fs::create_dir(&folder).unwrap();
        symlink("/drivers/nvme", folder.join("driver")).unwrap();
        assert!(matches!(place.group(), Err(VfioError::NoIommu { .. })), "which binding it would not mend");
        symlink("/groups/7", folder.join("iommu_group")).unwrap();
        let error = place.group().unwrap_err();
        assert!(error.to_string().contains("nvme's"), "{error}");
        assert!(error.to_string().contains("atoll vfio bind 0000:01:00.0"), "{error}");
        std::fs::remove_file(folder.join("driver")).unwrap();
        assert!(matches!(place.group(), Err(VfioError::NotBound { .. })));
        symlink("/drivers/vfio-pci", folder.join("driver")).unwrap();
        assert_eq!(place.group().unwrap(), 7);
    }

    /// A descriptor that is no group's is told from one, with what it should be; and so is what cannot be opened.
    #[test]
    fn what_was_passed_must_be_the_group() {
        let bdf: Bdf = "0000:01:00.0".parse().unwrap();
        let passed = File::open("/dev/null").unwrap();
        let place = Place::new(Path::new("/nowhere"), bdf, Some(Arc::new(passed.into())));
        let file = place.open_group("/dev/vfio/7").unwrap();
        assert!(ioctl::group_flags(&file).is_err());
        let told = VfioError::NoGroup { bdf, path: "/dev/vfio/7".into() }.to_string();
        assert!(told.contains("fd=9 9<>/dev/vfio/7"), "{told}");
        let refused = |kind: io::ErrorKind| not_open("/dev/vfio/7", kind.into());
        assert!(matches!(refused(io::ErrorKind::PermissionDenied), VfioError::Permission { .. }));
        let busy = not_open("/dev/vfio/7", io::Error::from_raw_os_error(libc::EBUSY));
        assert!(matches!(busy, VfioError::Busy { .. }));
        let place = Place::new(Path::new("/nowhere"), bdf, None);
        assert!(place.open_group("/nowhere/7").is_err());
    }
}
