//! Guest images: kernels as Debian ships them, and a small initramfs and root disk around Debian's busybox.
//!
//! The initramfs loads the virtio modules, mounts `/dev/vda` if there is one and hands over to `/sbin/init` on it, else
//! it starts a shell. Either way the shell's prompt is [`PROMPT`], which is what boots are timed against. Drivers beyond
//! disks cost time at each boot, so they are loaded only where the kernel's command line asks for their group:
//! `atoll.load=net,fs`, see [`GROUPS`].

use crate::archive::Archive;
use crate::packages::{self, Package};
use crate::{payload, place};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Prompt of the guest's shell.
pub const PROMPT: &str = "atoll# ";

/// Changes when the contents of the images change, so that cached ones are made anew.
const EDITION: u32 = 6;

/// One kernel with its initramfs, in every form that a boot test wants.
#[derive(Clone, Debug)]
pub struct Guest {
    /// "6.1" or "6.12".
    pub series: &'static str,
    /// The bzImage exactly as packaged.
    pub bzimage: PathBuf,
    /// The ELF kernel inside it, with its PVH note.
    pub vmlinux: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// A clean root disk; copy it before use.
    pub disk: PathBuf,
}

struct Series {
    name: &'static str,
    package: Package,
    /// Modules to load, in order; what is built into the kernel is absent from the package and passed over.
    modules: &'static [&'static str],
}

const SERIES: [Series; 2] = [
    Series { name: "6.1", package: packages::KERNEL_6_1, modules: MODULES },
    Series { name: "6.12", package: packages::KERNEL_6_12, modules: MODULES },
];

const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];

/// Further modules by group, in the order in which they are loaded.
pub const GROUPS: &[(&str, &[&str])] = &[
    ("net", &["net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net"]),
    ("fs", &["fs/fuse/fuse", "fs/fuse/virtiofs"]),
    ("console", &["drivers/char/virtio_console"]),
    ("rng", &["drivers/char/hw_random/virtio-rng"]),
    (
        "vsock",
        &[
            "net/vmw_vsock/vsock",
            "net/vmw_vsock/vmw_vsock_virtio_transport_common",
            "net/vmw_vsock/vmw_vsock_virtio_transport",
        ],
    ),
    ("button", &["drivers/acpi/button"]),
    ("iommu", &["drivers/iommu/virtio-iommu"]),
];

const APPLETS: &[&str] = &[
    "acpid",
    "awk",
    "base64",
    "blockdev",
    "cat",
    "chmod",
    "cmp",
    "cp",
    "cttyhack",
    "cut",
    "date",
    "dd",
    "df",
    "dmesg",
    "echo",
    "fdisk",
    "find",
    "free",
    "grep",
    "halt",
    "head",
    "hexdump",
    "hostname",
    "httpd",
    "id",
    "ifconfig",
    "insmod",
    "ip",
    "kill",
    "ln",
    "ls",
    "lsmod",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mknod",
    "more",
    "mount",
    "mv",
    "nc",
    "nslookup",
    "od",
    "ping",
    "poweroff",
    "ps",
    "readlink",
    "reboot",
    "rm",
    "rmdir",
    "route",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "switch_root",
    "sync",
    "tail",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "truncate",
    "udhcpc",
    "umount",
    "uname",
    "uptime",
    "usleep",
    "vi",
    "wc",
    "wget",
    "xargs",
    "yes",
];

/// The kernel's log leaves the console to the shell once that is there: a line of it in the middle of what a command prints
/// would be taken for its output. `dmesg` still has everything.
const INITRAMFS_INIT: &str = r#"#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do insmod "$module"; done
for group in $(sed -n 's/.*atoll\.load=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' '); do
    for module in /modules/"$group"/*.ko; do insmod "$module"; done
done
for try in $(seq 200); do
    grep -q vda /proc/partitions && break
    grep -qsE '0x1042|0x1001' /sys/bus/pci/devices/*/device || break
    sleep 0.1
done
if [ -b /dev/vda ]; then
    mount -t ext4 /dev/vda /root && exec switch_root /root /sbin/init
    echo "cannot mount /dev/vda: staying in the initramfs"
fi
export PS1='atoll# '
echo 1 > /proc/sys/kernel/printk
exec setsid cttyhack sh
"#;

const DISK_INIT: &str = r#"#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
export HOME=/root PS1='atoll# '
cd /root
echo 1 > /proc/sys/kernel/printk
exec setsid cttyhack sh
"#;

/// What `udhcpc` runs when it has a lease.
const LEASE_SCRIPT: &str = r#"#!/bin/sh
case "$1" in
deconfig) ip addr flush dev "$interface"; ip link set "$interface" up ;;
bound | renew)
    ip addr replace "$ip/${mask:-24}" dev "$interface"
    for gateway in $router; do
        ip route replace "$gateway" dev "$interface"
        ip route replace default via "$gateway" dev "$interface"
        break
    done
    : > /etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >> /etc/resolv.conf; done
    ;;
esac
"#;
const LEASE_SCRIPT_AT: &str = "etc/udhcpc/default.script";

/// The guest of a kernel series, "6.1" or "6.12"; made on first use.
pub fn guest(series: &str) -> Result<Guest> {
    let Some(series) = SERIES.iter().find(|known| known.name == series) else {
        bail!("no kernel series {series}: choose 6.1 or 6.12");
    };
    let package = packages::unpacked(&series.package)?;
    let busybox = packages::unpacked(&packages::BUSYBOX)?.join("bin/busybox");
    let bzimage = only_file_starting(&package.join("boot"), "vmlinuz-")?;
    let release = bzimage
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix("vmlinuz-"))
        .context("a kernel image is named after its release")?
        .to_owned();
    let folder = place::cache()?.join(format!("images-{EDITION}"));
    std::fs::create_dir_all(&folder)?;
    let guest = Guest {
        series: series.name,
        vmlinux: folder.join(format!("vmlinux-{release}")),
        initramfs: folder.join(format!("initramfs-{release}.cpio")),
        disk: folder.join("root.ext4"),
        bzimage,
    };
    made(&guest.vmlinux, |path| Ok(std::fs::write(path, payload::vmlinux(&std::fs::read(&guest.bzimage)?)?)?))?;
    let modules = package.join("lib/modules").join(&release).join("kernel");
    made(&guest.initramfs, |path| write_initramfs(path, &busybox, &modules, series.modules))?;
    made(&guest.disk, |path| write_disk(path, &busybox))?;
    Ok(guest)
}

/// Both guests.
pub fn all() -> Result<Vec<Guest>> {
    SERIES.iter().map(|series| guest(series.name)).collect()
}

/// A private copy of the root disk, for one VM.
pub fn copy_of_disk(guest: &Guest, folder: &Path) -> Result<PathBuf> {
    let copy = folder.join("root.ext4");
    copy_sparsely(&guest.disk, &copy).with_context(|| format!("cannot copy {}", guest.disk.display()))?;
    Ok(copy)
}

/// Copies a file, with holes where there are zeroes. Not every `cp` can do that.
pub fn copy_sparsely(from: &Path, to: &Path) -> std::io::Result<()> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut chunk = vec![0; 64 << 10];
    let mut at = 0;
    while at < length {
        let read = from.read_at(&mut chunk, at)?;
        let bytes = chunk.get(..read).filter(|bytes| !bytes.is_empty()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        if bytes.iter().any(|byte| *byte != 0) {
            to.write_all_at(bytes, at)?;
        }
        at += read as u64;
    }
    Ok(())
}

/// Makes `path` by way of a temporary name, unless it is there.
pub(crate) fn made(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.is_file() {
        return Ok(());
    }
    let folder = path.parent().context("an image lies in a folder")?;
    let staging = tempfile::Builder::new().prefix(".making").tempfile_in(folder)?;
    make(staging.path()).with_context(|| format!("cannot make {}", path.display()))?;
    staging.persist(path)?;
    Ok(())
}

fn only_file_starting(folder: &Path, prefix: &str) -> Result<PathBuf> {
    std::fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix)))
        .with_context(|| format!("no {prefix}* in {}", folder.display()))
}

/// A module of a kernel series; `None` if the kernel has it built in.
pub fn module_of(series: &str, name: &str) -> Result<Option<Vec<u8>>> {
    let Some(series) = SERIES.iter().find(|known| known.name == series) else {
        bail!("no kernel series {series}: choose 6.1 or 6.12");
    };
    let modules = packages::unpacked(&series.package)?.join("lib/modules");
    let release = std::fs::read_dir(&modules)?.flatten().next().context("a kernel's package has modules")?;
    module(&release.path().join("kernel"), name)
}

/// A module's bytes, unpacked if the package holds it packed; `None` if the kernel has it built in.
fn module(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let plain = folder.join(format!("{name}.ko"));
    if plain.is_file() {
        return Ok(Some(std::fs::read(plain)?));
    }
    let packed = folder.join(format!("{name}.ko.xz"));
    if packed.is_file() {
        let mut bytes = Vec::new();
        lzma_rs::xz_decompress(&mut std::io::BufReader::new(File::open(&packed)?), &mut bytes)
            .map_err(|error| anyhow::anyhow!("cannot unpack {}: {error:?}", packed.display()))?;
        return Ok(Some(bytes));
    }
    Ok(None)
}

fn write_initramfs(path: &Path, busybox: &Path, modules: &Path, names: &[&str]) -> Result<()> {
    let mut archive = Archive::new(File::create(path)?);
    let folders = ["bin", "dev", "etc", "mnt", "proc", "root", "sys", "tmp", "etc/udhcpc"];
    for folder in folders {
        archive.folder(folder)?;
    }
    archive.program(LEASE_SCRIPT_AT, LEASE_SCRIPT.as_bytes())?;
    archive.program("init", INITRAMFS_INIT.as_bytes())?;
    archive.program("bin/busybox", &std::fs::read(busybox)?)?;
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    let folders = GROUPS.iter().map(|(group, names)| (format!("modules/{group}"), *names));
    for (folder, names) in std::iter::once(("modules".to_owned(), names)).chain(folders) {
        archive.folder(&folder)?;
        for (position, name) in names.iter().enumerate() {
            if let Some(bytes) = module(modules, name)? {
                let short = name.rsplit('/').next().unwrap_or(name);
                archive.program(&format!("{folder}/{position:02}-{short}.ko"), &bytes)?;
            }
        }
    }
    archive.end().map(drop)
}

/// Puts the script for leases where busybox looks for it.
pub(crate) fn write_lease_script(root: &Path) -> Result<()> {
    let script = root.join(LEASE_SCRIPT_AT);
    std::fs::create_dir_all(script.parent().context("the script lies in a folder")?)?;
    std::fs::write(&script, LEASE_SCRIPT)?;
    Ok(std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?)
}

fn write_disk(path: &Path, busybox: &Path) -> Result<()> {
    let tree = tempfile::tempdir()?;
    for folder in ["bin", "dev", "etc", "mnt", "proc", "root", "sbin", "sys", "tmp"] {
        std::fs::create_dir(tree.path().join(folder))?;
    }
    std::fs::copy(busybox, tree.path().join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", tree.path().join("bin").join(applet))?;
    }
    write_lease_script(tree.path())?;
    let init = tree.path().join("sbin/init");
    std::fs::write(&init, DISK_INIT)?;
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755))?;
    let mkfs = place::on_path("mkfs.ext4").context("mkfs.ext4 is missing: install e2fsprogs")?;
    place::run(
        Command::new(mkfs)
            .args(["-q", "-F", "-L", "atoll-root", "-E", "root_owner=0:0,lazy_itable_init=0", "-d"])
            .arg(tree.path())
            .arg(path)
            .arg("96M")
            .stdin(Stdio::null()),
    )
}
