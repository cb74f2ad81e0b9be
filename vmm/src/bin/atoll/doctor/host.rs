//! What the host has: memory, limits, devices to pass through, programs.

use std::fs;
use std::path::{Path, PathBuf};

use atoll_vmm::passthrough::{Cpu, switch_on};
use atoll_vmm::rundir::RunRoot;
use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::table::bytes;

/// Open files that a machine with some devices needs.
const NOFILE_MIN: u64 = 1024;
/// Device processes of ours.
const BACKENDS: [(&str, &str); 10] = [
    ("atoll-blk", "disks"),
    ("atoll-net", "networks"),
    ("atoll-uart", "the second serial port"),
    ("atoll-rng", "entropy"),
    ("atoll-nvme", "NVMe disks"),
    ("atoll-console", "virtio consoles"),
    ("atoll-vsock", "sockets to the guest"),
    ("atoll-gpu", "pictures"),
    ("atoll-display", "screens for people"),
    ("atoll-input", "keyboards and pointers"),
];

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Memory and huge pages.
pub(super) fn memory() -> Vec<Check> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo(&text, "MemAvailable").unwrap_or(0) << 10;
    let free = if available >= 512 << 20 {
        Check::ok("memory", format!("{} available", bytes(available)))
    } else {
        Check::warn(
            "memory",
            format!("{} available", bytes(available)),
            "end something, or give guests less with --memory",
        )
    };
    let pages = (meminfo(&text, "HugePages_Total").unwrap_or(0), meminfo(&text, "Hugepagesize").unwrap_or(0) << 10);
    let huge = match pages {
        (0, _) => Check::ok("huge pages", "none reserved; none are needed"),
        (count, size) => Check::ok("huge pages", format!("{count} of {}", bytes(size))),
    };
    let folder = match RunRoot::of_user() {
        Ok(root) => Check::ok("run-time folder", root.path().display().to_string()),
        Err(error) => {
            Check::fail("run-time folder", error.to_string(), "let XDG_RUNTIME_DIR name a folder of this user's")
        }
    };
    vec![free, huge, folder]
}

/// Resource limits of this process, which machines inherit.
pub(super) fn limits() -> Vec<Check> {
    let nofile = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let files = if nofile >= NOFILE_MIN {
        Check::ok("open files", if nofile == u64::MAX { "no limit".into() } else { format!("limit {nofile}") })
    } else {
        Check::warn("open files", format!("limit {nofile}"), format!("ulimit -n {NOFILE_MIN}"))
    };
    let locked = match getrlimit(Resource::Memlock).current {
        None => Check::ok("locked memory", "no limit"),
        Some(limit) => Check::ok("locked memory", format!("limit {}; only passthrough needs more", bytes(limit))),
    };
    vec![files, locked]
}

fn entries(folder: &str) -> usize {
    fs::read_dir(folder).map_or(0, |entries| entries.filter_map(Result::ok).count())
}

/// IOMMU groups and VFIO.
pub(super) fn passthrough() -> Vec<Check> {
    let groups = entries("/sys/kernel/iommu_groups");
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let iommu = if groups > 0 {
        Check::ok("iommu", format!("{groups} groups"))
    } else {
        Check::warn(
            "iommu",
            "no groups: devices of this host cannot be given to a guest",
            // Of this processor's maker: what the other one needs would only mislead.
            format!("only passthrough needs it: {}", switch_on(Cpu::of(&cpuinfo))),
        )
    };
    let vfio = if Path::new("/dev/vfio/vfio").exists() {
        Check::ok("vfio", "/dev/vfio/vfio is there")
    } else {
        Check::warn("vfio", "/dev/vfio/vfio is missing", "modprobe vfio-pci; only passthrough needs it")
    };
    vec![iommu, vfio]
}

/// The executable `name` in PATH or one of `others`.
fn found(name: &str, others: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).chain(others.iter().map(PathBuf::from)).collect();
    folders.into_iter().map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Device processes, ours and others'.
pub(super) fn programs() -> Vec<Check> {
    let folder = std::env::var_os("ATOLL_BACKEND_DIR").map(PathBuf::from);
    let folder = folder.or_else(|| Some(std::env::current_exe().ok()?.parent()?.to_owned())).unwrap_or_default();
    let missing: Vec<&(&str, &str)> = BACKENDS.iter().filter(|(name, _)| !folder.join(name).is_file()).collect();
    let ours = if missing.is_empty() {
        let names: Vec<_> = BACKENDS.iter().map(|(name, _)| *name).collect();
        Check::ok("device processes", names.join(", "))
    } else {
        let words: Vec<_> = missing.iter().map(|(name, what)| format!("{name} ({what})")).collect();
        let found = format!("missing in {}: {}", folder.display(), words.join(", "));
        let remedy = "install them beside atoll, or name their folder by ATOLL_BACKEND_DIR";
        // Without disks there is little that a guest can do.
        if missing.iter().any(|(name, _)| *name == "atoll-blk") {
            Check::fail("device processes", found, remedy)
        } else {
            Check::warn("device processes", found, remedy)
        }
    };
    let passt = match found("passt", &[]) {
        Some(path) => Check::ok("passt", path.display().to_string()),
        None => Check::warn("passt", "not found: no --net user=on", "install the package passt"),
    };
    let virtiofsd = match found("virtiofsd", &["/usr/libexec", "/usr/lib/qemu"]) {
        Some(path) => Check::ok("virtiofsd", path.display().to_string()),
        None => Check::warn("virtiofsd", "not found: no shared folders", "install the package virtiofsd"),
    };
    vec![ours, passt, virtiofsd]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       100 kB\nMemAvailable:   42 kB\nHugePages_Total:    3\n";
        assert_eq!((meminfo(text, "MemAvailable"), meminfo(text, "HugePages_Total")), (Some(42), Some(3)));
        assert_eq!(meminfo(text, "Mem"), None);
    }
}
