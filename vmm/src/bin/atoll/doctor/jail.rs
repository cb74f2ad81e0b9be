//! What the kernel offers for jails: each layer is tried, as a device process tries it.
#![allow(unsafe_code, reason = "system calls that are tried without the crates that use them")]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use atoll_protocol::jail::{JailLayer, JailOutcome};

use atoll_vmm::seccomp;

use super::Check;

/// Since which version of landlock a layer is whole.
const LANDLOCK: [(JailLayer, i64); 3] = [(JailLayer::Files, 5), (JailLayer::Ports, 4), (JailLayer::Scopes, 6)];

/// Namespaces that a device process leaves its host by.
const NAMESPACES: [(&str, libc::c_int); 5] = [
    ("mount", libc::CLONE_NEWNS),
    ("network", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

/// What device processes are jailed with.
pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![landlock(landlock_version()), filters(), ring(), user_namespaces()];
    checks.push(namespaces());
    let whole = checks.iter().all(Check::is_ok);
    checks.push(if whole {
        Check::ok("jail", "whole: --jail=strict can be had")
    } else {
        Check::warn(
            "jail",
            "not whole: device processes are jailed by the rest, and --jail=strict refuses them",
            "mend what is named above",
        )
    });
    checks
}

/// The newest version of landlock that the kernel knows; 0 without it.
fn landlock_version() -> i64 {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call only answers a number; there is no attribute to read.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, VERSION) };
    version.max(0)
}

fn landlock(version: i64) -> Check {
    let missing = LANDLOCK.iter().filter(|(_, since)| version < *since).map(|(layer, _)| *layer);
    let missing: Vec<JailLayer> = missing.collect();
    match (version, missing.as_slice()) {
        (0, _) => Check::warn("landlock", "the kernel has none", JailLayer::Files.remedy(JailOutcome::KernelLacks)),
        (_, []) => Check::ok("landlock", format!("version {version}: files, ports, scopes")),
        (_, [first, ..]) => {
            let names: Vec<_> = missing.iter().map(|layer| layer.name()).collect();
            let remedy = missing.last().unwrap_or(first).remedy(JailOutcome::KernelLacks);
            Check::warn("landlock", format!("version {version} lacks {}", names.join(", ")), remedy)
        }
    }
}

fn filters() -> Check {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions.contains("kill_process") {
        let logs = if actions.contains("log") { " and filters that log (--seccomp=log)" } else { "" };
        match seccomp::try_out(seccomp::Mode::Enforce) {
            Ok(()) => {
                let classes = seccomp::ThreadClass::ALL.len();
                Check::ok(
                    "seccomp",
                    format!("filters that kill{logs}; the VMM has one for each of {classes} classes of threads"),
                )
            }
            Err(error) => Check::warn(
                "seccomp",
                format!("filters that kill{logs}, and none for the VMM's threads"),
                error.to_string(),
            ),
        }
    } else {
        let remedy = JailLayer::Calls.remedy(JailOutcome::KernelLacks);
        Check::fail("seccomp", "the kernel has no filters", remedy)
    }
}

/// A ring is made and restricted, as device processes do.
fn ring() -> Check {
    match restricted_ring() {
        Ok(()) => Check::ok("io_uring", "rings can be made, and restricted to what a device needs"),
        Err((step, error)) => Check::warn(
            "io_uring",
            format!("a ring cannot be {step} ({error})"),
            "sysctl kernel.io_uring_disabled=0, or a container that allows it, and Linux 6.1 or newer: all devices but \
             the second serial port need it",
        ),
    }
}

fn restricted_ring() -> Result<(), (&'static str, io::Error)> {
    // IORING_SETUP_R_DISABLED; IORING_REGISTER_RESTRICTIONS; `struct io_uring_restriction` for an opcode (1): NOP (0).
    const DISABLED: u32 = 1 << 6;
    const RESTRICT: libc::c_uint = 11;
    let restriction = [1_u32, 0, 0, 0];
    let mut parameters = [0_u32; 30];
    if let Some(flags) = parameters.get_mut(2) {
        *flags = DISABLED;
    }
    // SAFETY: `struct io_uring_params` has 120 bytes, which are there and zero but for the flags.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, parameters.as_mut_ptr()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(|| ("made", io::Error::last_os_error()))?;
    // SAFETY: the descriptor was just made and nobody else has it.
    let ring = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: one restriction of 16 bytes is there.
    let restricted =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), RESTRICT, restriction.as_ptr(), 1_u32) };
    if restricted == 0 { Ok(()) } else { Err(("restricted", io::Error::last_os_error())) }
}

fn user_namespaces() -> Check {
    match unshared(libc::CLONE_NEWUSER) {
        Ok(()) => Check::ok("user namespaces", "this user can make one (passt and virtiofsd want that, too)"),
        Err(error) => Check::warn(
            "user namespaces",
            format!("this user cannot make one ({error})"),
            JailLayer::Mounts.remedy(JailOutcome::NotPermitted),
        ),
    }
}

fn namespaces() -> Check {
    let missing: Vec<String> = NAMESPACES
        .iter()
        .filter_map(|(name, flag)| {
            // Whoever may have them gets them; others have to be somebody in a user namespace first.
            let error = unshared(*flag).or_else(|_| unshared(libc::CLONE_NEWUSER | *flag)).err()?;
            Some(format!("{name} ({error})"))
        })
        .collect();
    if missing.is_empty() {
        let names: Vec<_> = NAMESPACES.iter().map(|(name, _)| *name).collect();
        Check::ok("namespaces", names.join(", "))
    } else {
        let remedy = JailLayer::Mounts.remedy(JailOutcome::NotPermitted);
        Check::warn("namespaces", format!("cannot be had: {}", missing.join(", ")), remedy)
    }
}

/// A process of no use that begins namespaces.
fn unshared(flags: libc::c_int) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let enter = move || {
        // SAFETY: it takes no pointer, and the process has one thread here.
        if unsafe { libc::unshare(flags) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: it makes one system call and allocates nothing.
    unsafe { command.pre_exec(enter) };
    command.status().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An older kernel: what is missing is named, and what to boot for all of it.
    #[test]
    fn an_older_landlock_is_told_apart() {
        assert!(landlock(7).is_ok());
        let old = format!("{:?}", landlock(4));
        assert!(old.contains("version 4 lacks landlock-files, landlock-scopes") && old.contains("6.12"), "{old}");
        assert!(format!("{:?}", landlock(0)).contains("lsm="));
    }
}
