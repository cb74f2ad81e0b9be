//! Waiting for a descriptor that tokio has no type for.

#![allow(unsafe_code, reason = "tokio is promised that a descriptor stays the same")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Waits for what is inside. To be called inside a runtime.
///
/// # Errors
/// The kernel's, and for a file, which is always ready.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same number and open until it is dropped, and nobody is lent it mutably.
    Ok(unsafe { AsyncFd::register(fd) }?)
}
