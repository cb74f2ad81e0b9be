//! Resource limits: what a device process that has gone wrong, or over to the guest, can use up.
//!
//! Not among them: NPROC, which counts a user's processes on the whole host and would also keep the kernel from making
//! the ring's workers (the filter without `clone` is what forbids threads); a process without rings has it all the same.
//! And AS, which guest memory would count against: DATA is the ceiling, of everything private and writable.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::profile::Profile;

/// Descriptors of a process without queues: sockets, memory of a front end that sends many regions, clients.
const FILES: u64 = 256;
/// And of each queue: ring, wake-up, kick, call, error, and what a source of frames needs.
const FILES_PER_QUEUE: u64 = 10;
/// Most bytes that a process which writes no files may make a file long: in-flight regions are files, too.
const MEMFD_BYTES_MAX: u64 = 16 << 20;

/// Sets the limits of a process with `queues` queues; all its threads exist.
pub(super) fn set(profile: &Profile, queues: u64, writes_files: bool) -> rustix::io::Result<()> {
    lower(Resource::Nofile, FILES + queues.saturating_mul(FILES_PER_QUEUE))?;
    lower(Resource::Data, profile.heap_bytes_max)?;
    lower(Resource::Memlock, 0)?;
    lower(Resource::Msgqueue, 0)?;
    lower(Resource::Rtprio, 0)?;
    if !profile.has_rings() {
        lower(Resource::Nproc, 0)?;
    }
    if !writes_files {
        lower(Resource::Fsize, MEMFD_BYTES_MAX)?;
    }
    Ok(())
}

/// Both limits, soft and hard, are at most `most` afterwards.
fn lower(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let now = getrlimit(resource);
    let least = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    setrlimit(resource, Rlimit { current: least(now.current), maximum: least(now.maximum) })
}
