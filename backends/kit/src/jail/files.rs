//! Descriptors, namespaces, capabilities and paths.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

/// Closes every descriptor from 3 on that is not in `keep`.
pub(super) fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut from = 3_u32;
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd >= 3).collect();
    keep.sort_unstable();
    keep.dedup();
    for fd in keep {
        if fd > from {
            close_range(from, fd - 1)?;
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    #[allow(unsafe_code, reason = "descriptors are closed by number")]
    // SAFETY: called before this process has opened anything, so that nobody here owns what is closed.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Network, IPC and host name of its own, where permitted: nothing here needs them, and the other walls stand
/// without.
pub(super) fn leave_namespaces() {
    let flags = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
    #[allow(unsafe_code, reason = "unshare is unsafe for flags that concern descriptors")]
    // SAFETY: none of these flags touches the table of descriptors or memory, and there is one thread.
    let left = unsafe { rustix::thread::unshare_unsafe(flags) };
    if let Err(e) = left {
        tracing::debug!(error = %e, "no namespaces of its own");
    }
}

/// No capability at all, for this thread and those that it starts.
pub(super) fn drop_capabilities() -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// No path, no TCP port, no abstract socket and no signal outside; as much of it as the kernel knows.
pub(super) fn landlock(socket: Option<&Path>) -> Result<(), RulesetError> {
    let abi = ABI::V6;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    if let Some(folder) = socket.map(|path| path.parent().filter(|p| !p.as_os_str().is_empty()))
        && let Ok(folder) = PathFd::new(folder.unwrap_or(Path::new(".")))
    {
        rules = rules.add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?;
    }
    rules.restrict_self().map(drop)
}
