//! Namespaces of its own, all of them empty: no file system, no network, no neighbours.
//!
//! A process without rights begins a user namespace first, in which it may have the others; where that is forbidden
//! (a sysctl, a security policy, a chroot) the other walls stand without. A PID namespace is not among them: it would
//! begin with a *child*, so that each device would be two processes, the supervisor's pidfd and death signal would belong to the
//! wrong one, and what it would hide, the others' process ids, is of no use behind landlock's scopes and a filter
//! without `kill`, `ptrace` and `process_vm_readv`.

#![allow(unsafe_code, reason = "unshare, mount and pivot_root")]

use std::ffi::CStr;
use std::io;

use atoll_protocol::jail::{JailLayer, JailOutcome};
use rustix::thread::CapabilitySet;

use super::ledger::Ledger;

/// Folders that every host has, over one of which the new root is mounted before it becomes the root.
const PLACES: [&CStr; 4] = [c"/proc", c"/dev", c"/tmp", c"/"];

/// Leaves the host's namespaces, where permitted. There must be one thread, and whatever a path is needed for must be
/// open.
pub(super) fn leave(ledger: &mut Ledger) {
    let rights = rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    if !rights && let Err(error) = unshare(libc::CLONE_NEWUSER) {
        tracing::debug!(%error, "no user namespace");
    }
    let others = [
        (JailLayer::Network, libc::CLONE_NEWNET),
        (JailLayer::Ipc, libc::CLONE_NEWIPC),
        (JailLayer::HostName, libc::CLONE_NEWUTS),
        (JailLayer::Cgroup, libc::CLONE_NEWCGROUP),
    ];
    for (layer, flag) in others {
        ledger.note(layer, outcome(&unshare(flag)));
    }
    let mounts = unshare(libc::CLONE_NEWNS).and_then(|()| empty_root());
    if let Err(error) = &mounts {
        tracing::debug!(%error, "no empty root");
    }
    ledger.note(JailLayer::Mounts, outcome(&mounts));
}

fn outcome(done: &io::Result<()>) -> JailOutcome {
    match done.as_ref().map_err(io::Error::raw_os_error) {
        Ok(()) => JailOutcome::Applied,
        Err(Some(libc::EINVAL | libc::ENOSYS)) => JailOutcome::KernelLacks,
        Err(_) => JailOutcome::NotPermitted,
    }
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn unshare(flag: libc::c_int) -> io::Result<()> {
    // SAFETY: none of the flags used here touches the table of descriptors or memory, and there is one thread.
    done(unsafe { libc::unshare(flag) }.into())
}

/// A root that has nothing in it and takes nothing. What was mounted before is let go.
fn empty_root() -> io::Result<()> {
    let none = std::ptr::null();
    // Nothing done here may reach the host, nor the host's mounts come here.
    // SAFETY: the strings end with zero, and there are no other arguments.
    done(unsafe { libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) }.into())?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RDONLY;
    let mut last = Err(io::ErrorKind::NotFound.into());
    for place in PLACES {
        // SAFETY: the strings end with zero.
        last = done(
            unsafe {
                let (tmpfs, options) = (c"tmpfs".as_ptr(), c"size=4k,nr_inodes=1,mode=0555".as_ptr());
                libc::mount(tmpfs, place.as_ptr(), tmpfs, flags, options.cast())
            }
            .into(),
        )
        .and_then(|()| become_root(place));
        if last.is_ok() {
            break;
        }
    }
    last
}

/// Makes what is mounted at `place` the root.
fn become_root(place: &CStr) -> io::Result<()> {
    // SAFETY: the string ends with zero.
    done(unsafe { libc::chdir(place.as_ptr()) }.into())?;
    let here = c".".as_ptr();
    // SAFETY: the strings end with zero. The old root ends up over the new one, and the next call takes it away again.
    let pivoted = done(unsafe { libc::syscall(libc::SYS_pivot_root, here, here) }).and_then(|()| {
        // SAFETY: as above.
        done(unsafe { libc::umount2(here, libc::MNT_DETACH) }.into())
    });
    // A root that is no mount of its own (in a chroot, in an initramfs) cannot be exchanged, and is left by name.
    // SAFETY: as above.
    pivoted.or_else(|_| done(unsafe { libc::chroot(here) }.into()))?;
    // SAFETY: as above.
    done(unsafe { libc::chdir(c"/".as_ptr()) }.into())
}
