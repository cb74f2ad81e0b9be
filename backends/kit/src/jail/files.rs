//! Descriptors, capabilities and paths.

use std::ffi::OsString;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use atoll_protocol::jail::{JailLayer, JailOutcome};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::folder_of;
use super::ledger::Ledger;

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

/// No capability at all, for this thread and those that it starts.
pub(super) fn drop_capabilities() -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// A bound socket's name, which can be removed from a root that it is not in any more.
#[derive(Debug)]
pub struct SocketFile {
    folder: OwnedFd,
    name: OsString,
}

impl SocketFile {
    /// The socket at `path`.
    ///
    /// # Errors
    /// Its folder cannot be opened.
    pub fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder_of(path), flags, Mode::empty())?;
        Ok(Self { folder, name: path.file_name().unwrap_or_default().to_owned() })
    }

    /// Removes it. One that is gone already is no error, and for others it is too late.
    pub fn remove(&self) {
        let _ = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
    }
}

/// The newest rules that are asked for; a kernel that knows fewer applies those.
const NEWEST: ABI = ABI::V9;

/// No path, no TCP port, no abstract socket and no signal outside; as much of it as the kernel knows.
pub(super) fn landlock(socket: Option<&SocketFile>, ledger: &mut Ledger) -> Result<(), RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    if let Some(socket) = socket {
        rules = rules.add_rule(PathBeneath::new(&socket.folder, AccessFs::RemoveFile))?;
    }
    let known = match rules.restrict_self()?.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => ABI::Unsupported,
    };
    // Since when all that is meant by the name is there: truncation and ioctls of devices came later than opening.
    for (layer, since) in [(JailLayer::Files, ABI::V5), (JailLayer::Ports, ABI::V4), (JailLayer::Scopes, ABI::V6)] {
        let outcome = if known >= since { JailOutcome::Applied } else { JailOutcome::KernelLacks };
        ledger.note(layer, outcome);
    }
    Ok(())
}
