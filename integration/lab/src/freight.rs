//! What is carried into the lab: two read-only disks and an initramfs.
//!
//! The disk of tools (kernels and images of guests, QEMU as the yardstick, libraries) changes with their packages and is
//! kept in the cache; that of programs is Atoll's latest build. Programs are linked dynamically and run with the loader
//! and the libraries of this host. The initramfs loads modules, puts a root of its own together (device processes pivot
//! theirs, which an initramfs does not allow) and starts the agent.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use xtask::archive::Archive;
use xtask::images::{self, Guest};
use xtask::lab::{GUEST_VERIFIER, PEERS, TINY_GUESTS};
use xtask::{packages, place};

use crate::{drivers, ending};

/// Changes when what is carried changes in kind.
const EDITION: u32 = 1;

/// The kernel series of the lab's own machine.
const OUTER_SERIES: &str = "6.12";

/// Programs of this host that scenarios use.
const TOOLS: [&str; 3] = ["qemu-system-x86_64", "debugfs", "e2fsck"];
/// What QEMU reads at its start.
const FIRMWARE: [(&str, &[&str]); 2] = [
    (
        "/usr/share/qemu",
        &["bios-microvm.bin", "qboot.rom", "linuxboot.bin", "linuxboot_dma.bin", "kvmvapic.bin", "pvh.bin"],
    ),
    ("/usr/share/seabios", &["bios.bin", "bios-256k.bin", "bios-microvm.bin"]),
];
/// Atoll's programs, as they lie beside each other.
const PROGRAMS: [&str; 10] = [
    "atoll",
    "atoll-blk",
    "atoll-nvme",
    "atoll-net",
    "atoll-rng",
    "atoll-console",
    "atoll-uart",
    "lab-agent",
    TINY_GUESTS,
    GUEST_VERIFIER,
];

/// Modules of the lab's kernel, in order.
const MODULES: &[&str] = &[
    "drivers/block/virtio_blk",
    "virt/lib/irqbypass",
    "arch/x86/kvm/kvm",
    "arch/x86/kvm/kvm-amd",
    "drivers/net/tun",
    "net/llc/llc",
    "net/802/stp",
    "net/bridge/bridge",
];

/// Modules of the lab's kernel where devices are passed through.
const VFIO_MODULES: &[&str] = &[
    "drivers/vfio/vfio",
    "drivers/vfio/vfio_iommu_type1",
    "drivers/vfio/pci/vfio-pci-core",
    "drivers/vfio/pci/vfio-pci",
];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys /new
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do insmod "$module"; done
if grep -q lab.vfio /proc/cmdline; then for module in /modules/vfio/*.ko; do insmod "$module"; done; fi
mount -t tmpfs -o mode=755 new /new
cd /new
mkdir -p bin dev proc sys tmp run etc root usr atoll tools
cp /bin/busybox bin/
chroot /new /bin/busybox --install -s /bin
for try in $(seq 2000); do [ -b /dev/vda ] && [ -b /dev/vdb ] && break; sleep 0.1; done
mount -t ext4 -o ro /dev/vda tools
mount -t ext4 -o ro /dev/vdb atoll
ln -s tools/lib lib
ln -s tools/lib lib64
echo 'root:x:0:0:root:/root:/bin/sh' > etc/passwd
mount --move /dev dev
mount --move /proc proc
mount --move /sys sys
exec switch_root /new /bin/sh -c '
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
ip link set lo up
export HOME=/root PATH=/bin:/tools/bin TMPDIR=/tmp CARGO_TARGET_DIR=/atoll
cd /root
/atoll/release/lab-agent $(sed -n "s/.*lab\.run=\([^ ]*\).*/\1/p" /proc/cmdline | tr , " ")
echo "lab: the agent ended with $?"
reboot -f
'
"#;

/// Everything that the lab's machine boots from.
pub struct Freight {
    /// Its kernel, unpacked.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// The disk of tools.
    pub tools: PathBuf,
    /// The disk of programs.
    pub programs: PathBuf,
}

/// Where a guest's images are inside the lab.
pub fn guest_inside(series: &'static str) -> Guest {
    let folder = Path::new("/tools/guests").join(series);
    Guest {
        series,
        bzimage: folder.join("bzimage"),
        vmlinux: folder.join("vmlinux"),
        initramfs: folder.join("initramfs"),
        disk: PathBuf::from("/tools/guests/root.ext4"),
    }
}

/// Kernel series of guests.
pub const GUESTS: [&str; 2] = ["6.1", "6.12"];

/// Libraries that a program is linked with, the loader among them.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd is missing: install libc-bin")?;
    if !output.status.success() {
        bail!("ldd {}: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn copy_into(folder: &Path, file: &Path) -> Result<()> {
    let name = file.file_name().with_context(|| format!("{} names no file", file.display()))?;
    std::fs::copy(file, folder.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    Ok(())
}

/// Makes an ext4 image of a folder, a little larger than what is in it.
fn image_of(tree: &Path, path: &Path) -> Result<()> {
    let output = Command::new("du").args(["-sm"]).arg(tree).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mebibytes: u64 = text.split_whitespace().next().unwrap_or_default().parse().context("du gives a number")?;
    let mkfs = place::on_path("mkfs.ext4").context("mkfs.ext4 is missing: install e2fsprogs")?;
    place::run(
        Command::new(mkfs)
            .args(["-q", "-F", "-O", "^has_journal", "-E", "root_owner=0:0", "-d"])
            .arg(tree)
            .arg(path)
            .arg(format!("{}M", mebibytes + mebibytes / 10 + 16))
            .stdin(Stdio::null())
            // It tells of a file that it makes; reports are all that goes there.
            .stdout(Stdio::null()),
    )
}

/// What the disk of tools is made of, as text: another text is another disk.
fn identity(files: &[PathBuf]) -> Result<String> {
    use std::fmt::Write as _;
    let mut text = format!("{EDITION}\n");
    for file in files {
        let data = std::fs::metadata(file).with_context(|| format!("no {}", file.display()))?;
        let modified = data.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        writeln!(text, "{} {} {}", file.display(), data.len(), modified.as_nanos())?;
    }
    Ok(text)
}

fn tools(folder: &Path) -> Result<PathBuf> {
    let guests: Vec<Guest> = GUESTS.iter().map(|series| images::guest(series)).collect::<Result<_>>()?;
    let programs: Vec<PathBuf> = TOOLS
        .iter()
        .map(|name| place::on_path(name).with_context(|| format!("{name} is missing")))
        .collect::<Result<_>>()?;
    let mut linked = BTreeSet::new();
    for program in programs.iter().cloned().chain([place::program("atoll")?]) {
        linked.extend(libraries(&program)?);
    }
    let firmware: Vec<PathBuf> = FIRMWARE
        .iter()
        .flat_map(|(from, names)| names.iter().map(move |name| Path::new(from).join(name)))
        .filter(|path| path.is_file())
        .collect();
    let mut all: Vec<PathBuf> = programs.iter().chain(&firmware).chain(&linked).cloned().collect();
    all.extend(
        guests
            .iter()
            .flat_map(|guest| [&guest.vmlinux, &guest.bzimage, &guest.initramfs, &guest.disk].map(Clone::clone)),
    );
    let (path, noted, wanted) = (folder.join("tools.ext4"), folder.join("tools.txt"), identity(&all)?);
    if path.is_file() && std::fs::read_to_string(&noted).is_ok_and(|text| text == wanted) {
        return Ok(path);
    }
    eprintln!("lab: making the disk of tools");
    let tree = tempfile::tempdir_in(folder)?;
    let at = |name: &str| tree.path().join(name);
    for name in ["bin", "lib", "firmware"] {
        std::fs::create_dir(at(name))?;
    }
    // Everything in one folder; the loader looks into this one of the architecture first.
    std::os::unix::fs::symlink(".", at("lib").join("x86_64-linux-gnu"))?;
    programs.iter().try_for_each(|file| copy_into(&at("bin"), file))?;
    linked.iter().try_for_each(|file| copy_into(&at("lib"), file))?;
    firmware.iter().try_for_each(|file| copy_into(&at("firmware"), file))?;
    for guest in &guests {
        let folder = at("guests").join(guest.series);
        std::fs::create_dir_all(&folder)?;
        for (name, file) in [("vmlinux", &guest.vmlinux), ("bzimage", &guest.bzimage), ("initramfs", &guest.initramfs)]
        {
            std::fs::copy(file, folder.join(name))?;
        }
    }
    let disk = guests.first().context("there is a guest")?;
    place::run(Command::new("cp").arg("--sparse=always").arg(&disk.disk).arg(at("guests").join("root.ext4")))?;
    let staging = tempfile::Builder::new().prefix(".making").tempfile_in(folder)?;
    image_of(tree.path(), staging.path())?;
    staging.persist(&path)?;
    std::fs::write(noted, wanted)?;
    Ok(path)
}

fn programs(folder: &Path, with_drivers: bool) -> Result<PathBuf> {
    let tree = tempfile::tempdir_in(folder)?;
    for name in PROGRAMS {
        let inside = tree.path().join("release").join(name);
        std::fs::create_dir_all(inside.parent().context("it lies in a folder")?)?;
        let program = place::program(name)?;
        std::fs::copy(&program, inside).with_context(|| format!("cannot copy {}", program.display()))?;
    }
    if with_drivers {
        drivers::put_into(tree.path())?;
    }
    let path = folder.join("programs.ext4");
    image_of(tree.path(), &path)?;
    Ok(path)
}

fn initramfs(path: &Path) -> Result<()> {
    let busybox = packages::unpacked(&packages::BUSYBOX)?.join("bin/busybox");
    let mut archive = Archive::new(File::create(path)?);
    for folder in ["bin", "modules", "modules/vfio"] {
        archive.folder(folder)?;
    }
    archive.program("init", INIT.as_bytes())?;
    archive.program("bin/busybox", &std::fs::read(busybox)?)?;
    for (folder, modules) in [("modules", MODULES), ("modules/vfio", VFIO_MODULES)] {
        for (position, name) in modules.iter().enumerate() {
            if let Some(bytes) = images::module_of(OUTER_SERIES, name)? {
                let short = name.rsplit('/').next().unwrap_or(name);
                archive.program(&format!("{folder}/{position:02}-{short}.ko"), &bytes)?;
            }
        }
    }
    archive.end().map(drop)
}

/// Fetches what comes from elsewhere, if it is not there yet: QEMU, kernels, busybox; with drivers for devices that are passed
/// through, if some need them.
///
/// # Errors
/// When something cannot be had.
pub fn obtain(drivers: bool) -> Result<()> {
    packages::ensure_peers(&PEERS)?;
    packages::unpacked(&packages::BUSYBOX)?;
    GUESTS.iter().try_for_each(|series| images::guest(series).map(drop))?;
    if drivers {
        drivers::obtain()?;
    }
    Ok(())
}

/// Makes all of it in `folder`; the disk of tools is kept in the cache.
///
/// # Errors
/// When something of it cannot be had or made, or a signal ends the lab.
pub fn load(folder: &Path, drivers: bool) -> Result<Freight> {
    let kept = place::cache()?.join("lab");
    std::fs::create_dir_all(&kept)?;
    let path = folder.join("initramfs");
    initramfs(&path)?;
    let readable = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&path, readable)?;
    ending::check()?;
    let tools = tools(&kept)?;
    ending::check()?;
    let programs = programs(folder, drivers)?;
    Ok(Freight { kernel: images::guest(OUTER_SERIES)?.vmlinux, initramfs: path, tools, programs })
}
