//! PCI functions of the lab, as its administrator sees them: found by what they are, given to VFIO and back by `atoll vfio`,
//! used by the lab's own drivers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::place;

/// Actions and resources of NVMe's Virtualization Management command (NVMe 1.4, 5.22).
const ASSIGN: u32 = 8;
const ONLINE: u32 = 9;
const QUEUES: u32 = 0;
const INTERRUPTS: u32 = 1;
/// The secondary controller of the first virtual function.
const SECONDARY: u32 = 1;

const DEVICES: &str = "/sys/bus/pci/devices";
/// How long the lab's own drivers may take to come up.
const DRIVER_LIMIT: Duration = Duration::from_secs(300);

/// One function.
pub(super) struct Function {
    /// Its name, `0000:01:00.0`.
    pub(super) bdf: String,
}

/// Sends a drive the command that gives a virtual function what it needs.
#[allow(unsafe_code, reason = "an administrator's command of NVMe is an ioctl")]
fn manage(node: &std::fs::File, action: u32, resource: u32, count: u32) -> Result<()> {
    /// NVME_IOCTL_ADMIN_CMD (linux/nvme_ioctl.h).
    const ADMIN_COMMAND: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<[u32; 18]>(b'N', 0x41);
    // `struct nvme_admin_cmd`: opcode and flags, and the tenth and eleventh dword of the command.
    let mut command = [0_u32; 18];
    command[0] = 0x1c;
    command[10] = SECONDARY << 16 | resource << 8 | action;
    command[11] = count;
    // SAFETY: the structure is as long as the opcode says, and the command moves no data.
    let call = unsafe { rustix::ioctl::Updater::<ADMIN_COMMAND, [u32; 18]>::new(&mut command) };
    // SAFETY: as above; the kernel writes into nothing but the structure.
    unsafe { rustix::ioctl::ioctl(node, call) }.context("the drive refuses Virtualization Management")?;
    Ok(())
}

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn all() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(DEVICES).context("the lab has no PCI")?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// Waits until `look` finds something.
pub(super) fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + DRIVER_LIMIT;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "no {what} within {DRIVER_LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command of the lab; what it prints.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{:?} ended with {}: {said} {}", command, output.status, errors.trim());
    }
    Ok(said)
}

/// Runs a line of shell in the lab; what it prints.
pub(super) fn shell(line: &str) -> Result<String> {
    output(Command::new("/bin/sh").args(["-c", line]))
}

impl Function {
    /// The one with this vendor and device.
    pub(super) fn of_id(vendor: u16, device: u16) -> Result<Self> {
        let is = |bdf: &String| {
            let of = |name: &str| text(Path::new(DEVICES).join(bdf).join(name));
            of("vendor") == format!("{vendor:#06x}") && of("device") == format!("{device:#06x}")
        };
        let bdf = all()?.into_iter().find(is);
        Ok(Self { bdf: bdf.with_context(|| format!("no function {vendor:04x}:{device:04x} in the lab"))? })
    }

    /// The NVMe drive with this serial number, which the lab's own driver has.
    pub(super) fn drive(serial: &str) -> Result<Self> {
        let look = || {
            let controllers = std::fs::read_dir("/sys/class/nvme").ok()?.flatten();
            let mut ours = controllers.filter(|entry| text(entry.path().join("serial")) == serial);
            Some(Self { bdf: text(ours.next()?.path().join("address")) })
        };
        until(&format!("drive {serial}"), look)
    }

    /// Its folder in sysfs.
    pub(super) fn folder(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.bdf)
    }

    /// The file of its IOMMU group, which VFIO makes.
    pub(super) fn group(&self) -> Result<PathBuf> {
        let link = std::fs::read_link(self.folder().join("iommu_group")).context("it is in no IOMMU group")?;
        Ok(Path::new("/dev/vfio").join(link.file_name().context("a link leads somewhere")?))
    }

    /// The block device of a drive that the lab's driver has.
    pub(super) fn disk(&self) -> Result<PathBuf> {
        let look = || {
            let controller = std::fs::read_dir(self.folder().join("nvme")).ok()?.flatten().next()?;
            let names = std::fs::read_dir(controller.path()).ok()?.flatten();
            let mut names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let name = names.find(|name| name.starts_with("nvme") && name.contains('n') && name[4..].contains('n'))?;
            // With several paths to it the disk is the subsystem's, whose name lacks the path.
            let plain = match (name.find('c'), name.rfind('n')) {
                (Some(from), Some(to)) if from < to => format!("{}{}", &name[..from], &name[to..]),
                _ => name,
            };
            let disk = Path::new("/dev").join(plain);
            disk.exists().then_some(disk)
        };
        until(&format!("disk of {}", self.bdf), look)
    }

    /// Makes one virtual function of a drive, with a queue and an interrupt of its own, which nobody drives.
    pub(super) fn make_virtual(&self) -> Result<Self> {
        let write = |name: &str, value: &str| {
            let path = self.folder().join(name);
            std::fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
        };
        write("sriov_drivers_autoprobe", "0")?;
        write("sriov_numvfs", "1")?;
        let controller = std::fs::read_dir(self.folder().join("nvme"))?.flatten().next().context("no controller")?;
        let node = Path::new("/dev").join(controller.file_name());
        let node = std::fs::File::open(&node).with_context(|| format!("no {}", node.display()))?;
        for (what, kind, count) in [(ASSIGN, QUEUES, 2), (ASSIGN, INTERRUPTS, 1), (ONLINE, QUEUES, 0)] {
            manage(&node, what, kind, count)?;
        }
        let link = std::fs::read_link(self.folder().join("virtfn0")).context("no virtual function")?;
        let name = link.file_name().context("a link leads somewhere")?;
        Ok(Self { bdf: name.to_string_lossy().into_owned() })
    }

    /// Takes it away again.
    pub(super) fn drop_virtual(&self) -> Result<()> {
        Ok(std::fs::write(self.folder().join("sriov_numvfs"), "0")?)
    }

    fn vfio(&self, what: &str) -> Result<String> {
        output(Command::new(place::program("atoll")?).args(["vfio", what, &self.bdf]))
    }

    /// `atoll vfio check`, which must have nothing to complain of that stands in the way.
    pub(super) fn check(&self) -> Result<String> {
        self.vfio("check")
    }

    /// Gives it to VFIO.
    pub(super) fn bind(&self) -> Result<()> {
        self.vfio("bind").map(drop)
    }

    /// Gives it back to the lab's driver.
    pub(super) fn unbind(&self) -> Result<()> {
        self.vfio("unbind").map(drop)
    }
}

/// Gives back whatever a scenario that failed has left with VFIO, and finds what it has pulled out.
pub(super) fn give_all_back() -> Result<()> {
    shell("[ ! -e /sys/bus/pci/rescan ] || echo 1 > /sys/bus/pci/rescan")?;
    for bdf in all()? {
        let function = Function { bdf };
        let driver = std::fs::read_link(function.folder().join("driver")).unwrap_or_default();
        if driver.ends_with("vfio-pci") {
            function.unbind()?;
        }
    }
    Ok(())
}

/// The sum of so many blocks of 64 KiB of a disk, from a block on, read past the cache.
pub(super) fn sum_of(disk: &Path, from: u32, blocks: u32) -> Result<String> {
    let disk = disk.display();
    let line = format!("dd if={disk} bs=64k skip={from} count={blocks} iflag=direct 2>/dev/null | md5sum");
    let sum = shell(&line)?.split_whitespace().next().unwrap_or_default().to_owned();
    ensure!(sum.len() == 32, "no sum of {disk}: {sum}");
    Ok(sum)
}
