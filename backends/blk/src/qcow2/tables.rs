//! Where the tables of an image lie, checked when it is opened: each within the file, no two in one place.
//!
//! An image whose tables overlap could be made to rewrite its own tables by what a guest writes. What is known here is
//! also where guest data may never go, and how [`TableStore`](super::store::TableStore) tells one table from another.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;

use super::file::{Align, read_at};
use super::header::{Header, HeaderError};

/// Bits of an entry of the first-level table that hold an offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry of the refcount table that do not.
pub(super) const REFCOUNT_RESERVED: u64 = 0x1ff;

/// Tables of an image, by the offset of their first byte. All are one cluster long but those named apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Second-level tables.
    pub second_level: BTreeSet<u64>,
    /// Refcount blocks.
    pub refcount_blocks: BTreeSet<u64>,
    /// Start and end of the first-level table.
    pub first_level: (u64, u64),
    /// Start and end of the refcount table.
    pub refcount_table: (u64, u64),
    /// Bytes of a cluster.
    pub cluster: u64,
}

fn overlaps(range: (u64, u64), start: u64, end: u64) -> bool {
    start < range.1 && range.0 < end
}

impl Tables {
    /// Finds and checks the tables of an image; of one that is only read, the refcounts are left alone.
    ///
    /// # Errors
    /// What the file says; [`HeaderError::Damaged`].
    pub fn read(
        (file, align): (&File, Align),
        file_bytes: u64,
        header: &Header,
        writable: bool,
    ) -> io::Result<Result<Self, HeaderError>> {
        let cluster = header.cluster();
        let first_level_end = header.l1.0 + u64::from(header.l1.1) * 8;
        let refcount_end = header.refcount_table.0 + u64::from(header.refcount_table.1) * cluster;
        let mut out = Self {
            first_level: (header.l1.0, first_level_end.next_multiple_of(cluster)),
            refcount_table: (header.refcount_table.0, refcount_end),
            cluster,
            ..Self::default()
        };
        let limit = file_bytes.next_multiple_of(cluster);
        let mut bad = None;
        let mut take = |kind: &str, offset: u64, set: &mut BTreeSet<u64>| {
            if !offset.is_multiple_of(cluster) || offset.checked_add(cluster).is_none_or(|end| end > limit) {
                bad.get_or_insert_with(|| format!("a {kind} at {offset:#x} is not within the file"));
            } else if !set.insert(offset) {
                bad.get_or_insert_with(|| format!("two {kind}s at {offset:#x}"));
            }
        };
        each_entry((file, align), header.l1.0, first_level_end, |entry| match entry & OFFSET_MASK {
            0 => {}
            offset => take("second-level table", offset, &mut out.second_level),
        })?;
        if writable {
            each_entry((file, align), header.refcount_table.0, refcount_end, |entry| match entry {
                0 => {}
                entry if entry & REFCOUNT_RESERVED != 0 => take("refcount block", u64::MAX, &mut out.refcount_blocks),
                offset => take("refcount block", offset, &mut out.refcount_blocks),
            })?;
        }
        let places = out.second_level.iter().chain(&out.refcount_blocks);
        let fixed = |at: u64| {
            at < cluster
                || overlaps(out.first_level, at, at + cluster)
                || overlaps(out.refcount_table, at, at + cluster)
        };
        if bad.is_none()
            && let Some(at) = places.clone().find(|at| fixed(**at))
        {
            bad = Some(format!("a table at {at:#x} lies in another one"));
        }
        if bad.is_none()
            && let Some(at) = out.second_level.intersection(&out.refcount_blocks).next()
        {
            bad = Some(format!("two tables at {at:#x}"));
        }
        if bad.is_none() && writable && overlaps(out.first_level, out.refcount_table.0, out.refcount_table.1) {
            bad = Some("its first-level table and its refcount table overlap".to_owned());
        }
        Ok(bad.map_or(Ok(out), |what| Err(HeaderError::Damaged(what))))
    }

    /// Whether the byte at `at` is in a refcount block.
    pub(super) fn counts(&self, at: u64) -> bool {
        self.refcount_blocks.contains(&(at - at % self.cluster))
    }

    /// Whether a table, or the header, lies within these bytes.
    pub fn within(&self, start: u64, end: u64) -> bool {
        let from = start.saturating_sub(self.cluster - 1);
        start < self.cluster
            || overlaps(self.first_level, start, end)
            || overlaps(self.refcount_table, start, end)
            || self.second_level.range(from..end).next().is_some()
            || self.refcount_blocks.range(from..end).next().is_some()
    }
}

/// Calls `f` with each entry of a table of big-endian words.
fn each_entry((file, align): (&File, Align), mut at: u64, end: u64, mut f: impl FnMut(u64)) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while at < end {
        let part = buffer.get_mut(..(end - at).min(64 << 10) as usize).unwrap_or_default();
        read_at(file, part, at, align)?;
        for word in part.as_chunks::<8>().0 {
            f(u64::from_be_bytes(*word));
        }
        at += part.len() as u64;
    }
    Ok(())
}
