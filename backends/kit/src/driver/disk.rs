//! Requests of a virtio-blk driver.

use std::time::Duration;

use anyhow::{Context, Result};

use super::guest::Guest;
use super::queue::Queue;

/// A request's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Read.
    In = 0,
    /// Write.
    Out = 1,
    /// Make durable.
    Flush = 4,
    /// Identify.
    GetId = 8,
    /// Forget.
    Discard = 11,
    /// Zero.
    WriteZeroes = 13,
}

/// How long a request may take in a test.
pub const REQUEST_MAX: Duration = Duration::from_secs(20);

/// Adds a request with data in guest memory at `data`; its head.
pub fn add(queue: &mut Queue, guest: &Guest, kind: Kind, sector: u64, data: &[(u64, u32)]) -> Option<u16> {
    // The header lies in the 32 bytes of the entry that will be the head: the next one on the free list.
    let entry = queue.next_head()?;
    let header = queue.small + 32 * u64::from(entry);
    let status = header + 16;
    guest.store(header, kind as u32);
    guest.store(header + 4, 0_u32);
    guest.store(header + 8, sector);
    guest.store(status, 0xff_u8);
    let into_guest = matches!(kind, Kind::In | Kind::GetId);
    let mut readable = vec![(header, 16)];
    let mut writable = Vec::new();
    if into_guest {
        writable.extend_from_slice(data);
    } else {
        readable.extend_from_slice(data);
    }
    writable.push((status, 1));
    let head = queue.add(guest, &readable, &writable)?;
    debug_assert_eq!(head, entry);
    Some(head)
}

/// The status byte of the request with this head.
pub fn status(queue: &Queue, guest: &Guest, head: u16) -> u8 {
    guest.load(queue.small + 32 * u64::from(head) + 16)
}

/// One request from beginning to end: its status and the bytes written.
pub fn run(queue: &mut Queue, guest: &Guest, kind: Kind, sector: u64, data: &[(u64, u32)]) -> Result<(u8, u32)> {
    let head = add(queue, guest, kind, sector, data).context("no free descriptors")?;
    queue.publish(guest)?;
    let (done, len) = queue.take_within(guest, REQUEST_MAX)?;
    anyhow::ensure!(done == head, "completed {done}, waited for {head}");
    Ok((status(queue, guest, head), len))
}
