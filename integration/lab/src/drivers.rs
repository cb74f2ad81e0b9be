//! Drivers for devices that are passed through, which Debian's cloud kernels lack or the guest's image does not carry: a second
//! archive behind the guest's initramfs, and the full kernel of the same version for the network card's. The verifier's
//! program is in it too, and VFIO for 6.12, with which it drives a device inside the guest.

use std::path::Path;

use anyhow::{Context, Result};
use xtask::archive::Archive;
use xtask::lab::GUEST_VERIFIER;
use xtask::packages::{self, FULL_KERNEL};
use xtask::{full_kernel, images, place};

use crate::hardware;

/// Where they are on the disk of programs.
pub const FOLDER: &str = "passed";
/// The archive.
pub const ARCHIVE: &str = "drivers.cpio";
/// The full kernel.
pub const KERNEL: &str = "full-vmlinuz";
/// The kernel series that the drivers of pins are of.
pub const SERIES: &str = "6.1";
/// A driver that hands a device's interrupts to a program.
const PIN: &[&str] = &["drivers/uio/uio", "drivers/uio/uio_pci_generic"];
/// The kernel series that VFIO is of, which has a driver of the virtual IOMMU.
pub const BEHIND_SERIES: &str = "6.12";
/// VFIO, in the order in which its parts are loaded.
const VFIO: &[&str] = &[
    "virt/lib/irqbypass",
    "drivers/vfio/vfio",
    "drivers/vfio/vfio_iommu_type1",
    "drivers/vfio/pci/vfio-pci-core",
    "drivers/vfio/pci/vfio-pci",
];
const CARD: &str = "kernel/drivers/net/ethernet/intel/e1000e/e1000e.ko";

/// Scenarios that do without these drivers begin with this.
const WITHOUT: &str = "vfio-nvme";

/// Whether a scenario may need them.
pub fn wanted(scenario: &str) -> bool {
    hardware::wanted(&[scenario.to_owned()]) && !scenario.starts_with(WITHOUT)
}

/// Fetches the package that they come from.
///
/// # Errors
/// When it cannot be had.
pub fn obtain() -> Result<()> {
    packages::unpacked(&FULL_KERNEL).map(drop)
}

fn only(folder: &Path) -> Result<std::path::PathBuf> {
    let mut entries = std::fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?.flatten();
    Ok(entries.next().with_context(|| format!("nothing in {}", folder.display()))?.path())
}

/// Puts them into `tree`.
///
/// # Errors
/// When a package cannot be had.
pub fn put_into(tree: &Path) -> Result<()> {
    let folder = tree.join(FOLDER);
    std::fs::create_dir(&folder)?;
    let package = packages::unpacked(&FULL_KERNEL)?;
    // Packed, as it is: it unpacks itself.
    std::fs::copy(full_kernel::image()?, folder.join(KERNEL))?;
    let mut archive = Archive::behind(std::fs::File::create(folder.join(ARCHIVE))?, 1);
    for (group, series, names) in [("pin", SERIES, PIN), ("vfio", BEHIND_SERIES, VFIO)] {
        archive.folder(&format!("modules/{group}"))?;
        for (position, name) in names.iter().enumerate() {
            let bytes = images::module_of(series, name)?.with_context(|| format!("the kernel has {name} built in"))?;
            archive.file(&format!("modules/{group}/{position}.ko"), &bytes)?;
        }
    }
    archive.program("verify", &std::fs::read(place::program(GUEST_VERIFIER)?)?)?;
    archive.folder("modules/card")?;
    let release = only(&package.join("lib/modules"))?;
    archive.file("modules/card/0.ko", &std::fs::read(release.join(CARD))?)?;
    archive.end().map(drop)
}
