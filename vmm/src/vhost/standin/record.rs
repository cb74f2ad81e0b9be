//! Reading the record of requests in flight that a dead backend left (vhost-user, "Inflight I/O tracking", split
//! virtqueues), and mending it for the backend that may follow.
//!
//! | offset | field |
//! |---|---|
//! | 0 | features: u64 |
//! | 8 | version: u16, 0 before the first use |
//! | 10 | desc_num: u16 |
//! | 12 | last_batch_head: u16 |
//! | 14 | used_idx: u16 |
//! | 16 + 16 n | inflight: u8, padding: 5 bytes, next: u16, counter: u64 |
//!
//! It is hostile input: the process may have been stopped anywhere, or have gone wrong long before. Every index is checked
//! and every walk is bounded by the size of the ring.

use thiserror::Error;

/// Bytes before the descriptors' states, and of each of these.
const HEADER: usize = 16;
const ENTRY: usize = 16;
const VERSION_AT: usize = 8;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
/// Within an entry.
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;
/// The version that there is.
const VERSION: u16 = 1;

/// A record that says what cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// Shorter than its queue needs.
    #[error("the record of requests in flight is too short")]
    Short,
    /// None that is known.
    #[error("the record of requests in flight has version {0}")]
    Version(u16),
    /// A request beyond the ring.
    #[error("the record of requests in flight names descriptor {0}, which the ring has not")]
    Head(u16),
    /// Its used index and the ring's have nothing to do with each other.
    #[error("the record of requests in flight is {0} completions behind the ring")]
    Behind(u16),
}

fn word(bytes: &[u8], at: usize) -> Result<u16, RecordError> {
    let chunk = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()).ok_or(RecordError::Short)?;
    Ok(u16::from_le_bytes(*chunk))
}

fn entry(head: u16) -> usize {
    HEADER + ENTRY * usize::from(head)
}

/// The heads that were taken from a ring of `size` entries and not completed, in the order in which they were taken, by
/// `bytes`, the ring's part of a region. `used` is the index of its used ring.
///
/// # Errors
/// When the record cannot be right.
pub fn unfinished(bytes: &[u8], size: u16, used: u16) -> Result<Vec<u16>, RecordError> {
    match word(bytes, VERSION_AT)? {
        0 => return Ok(Vec::new()),
        VERSION => {}
        other => return Err(RecordError::Version(other)),
    }
    if bytes.len() < entry(size) {
        return Err(RecordError::Short);
    }
    let states = bytes.get(HEADER..).unwrap_or_default().chunks_exact(ENTRY);
    let mut open: Vec<bool> = states.map(|state| state.first().is_some_and(|mark| *mark != 0)).collect();
    if let Some(beyond) = open.iter().skip(usize::from(size)).position(|open| *open) {
        return Err(RecordError::Head(size.saturating_add(u16::try_from(beyond).unwrap_or(u16::MAX))));
    }
    open.truncate(usize::from(size));
    let behind = used.wrapping_sub(word(bytes, USED_AT)?);
    if behind != 0 && open.contains(&true) {
        // The last batch has reached the used ring, and the process died before it wrote that down.
        if behind > size {
            return Err(RecordError::Behind(behind));
        }
        let mut head = word(bytes, LAST_BATCH_AT)?;
        for _ in 0..behind {
            *open.get_mut(usize::from(head)).ok_or(RecordError::Head(head))? = false;
            head = word(bytes, entry(head) + NEXT_AT)?;
        }
    }
    let mut taken = Vec::new();
    for (head, _) in (0..size).zip(&open).filter(|(_, open)| **open) {
        let counter = bytes.get(entry(head) + COUNTER_AT..).and_then(|rest| rest.first_chunk::<8>());
        taken.push((u64::from_le_bytes(*counter.ok_or(RecordError::Short)?), head));
    }
    taken.sort_unstable();
    Ok(taken.into_iter().map(|(_, head)| head).collect())
}

/// Writes into `bytes` that nothing is in flight and the used index is `used`. A record that was never used stays so.
pub(in crate::vhost) fn settle(bytes: &mut [u8], used: u16) {
    if word(bytes, VERSION_AT) == Ok(0) {
        return;
    }
    if let Some(field) = bytes.get_mut(USED_AT..USED_AT + 2) {
        field.copy_from_slice(&used.to_le_bytes());
    }
    if let Some(states) = bytes.get_mut(HEADER..) {
        states.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u16 = 8;

    /// What a backend that does as the specification says keeps, step by step.
    struct Keeper {
        bytes: Vec<u8>,
        counter: u64,
        used: u16,
    }

    impl Keeper {
        fn new(used: u16) -> Self {
            let mut bytes = vec![0; entry(SIZE)];
            bytes[VERSION_AT] = 1;
            bytes[USED_AT..USED_AT + 2].copy_from_slice(&used.to_le_bytes());
            Self { bytes, counter: 0, used }
        }
        fn take(&mut self, head: u16) {
            let at = entry(head);
            self.bytes[at + COUNTER_AT..at + COUNTER_AT + 8].copy_from_slice(&self.counter.to_le_bytes());
            self.counter += 1;
            self.bytes[at] = 1;
        }
        /// Completes a batch and dies after so many steps; gives what of it the driver has seen completed.
        fn complete(&mut self, batch: &[u16], steps: usize) -> Vec<u16> {
            let mut budget = steps;
            let mut step = || {
                budget = budget.saturating_sub(1);
                budget > 0
            };
            for head in batch {
                let last = word(&self.bytes, LAST_BATCH_AT).unwrap();
                let next = entry(*head) + NEXT_AT;
                self.bytes[next..next + 2].copy_from_slice(&last.to_le_bytes());
                self.bytes[LAST_BATCH_AT..LAST_BATCH_AT + 2].copy_from_slice(&head.to_le_bytes());
                if !step() {
                    return Vec::new();
                }
            }
            self.used = self.used.wrapping_add(batch.len() as u16);
            for head in batch {
                if !step() {
                    return batch.to_vec();
                }
                self.bytes[entry(*head)] = 0;
            }
            if step() {
                self.bytes[USED_AT..USED_AT + 2].copy_from_slice(&self.used.to_le_bytes());
            }
            batch.to_vec()
        }
    }

    proptest! {
        /// A backend that dies at any step of any batch: what it had taken and the driver has not seen completed is
        /// unfinished, in the order of taking, and nothing else is.
        #[test]
        fn a_death_at_any_step_is_understood(
            taken in Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle(),
            count in 1_usize..=8, batch in 0_usize..=8, steps in 1_usize..=18, used: u16,
        ) {
            let mut keeper = Keeper::new(used);
            let taken = &taken[..count];
            taken.iter().for_each(|head| keeper.take(*head));
            let batch: Vec<u16> = taken.iter().rev().copied().take(batch.min(count)).collect();
            let seen = if batch.is_empty() { Vec::new() } else { keeper.complete(&batch, steps) };
            let expected: Vec<u16> = taken.iter().copied().filter(|head| !seen.contains(head)).collect();
            prop_assert_eq!(unfinished(&keeper.bytes, SIZE, keeper.used), Ok(expected));
            settle(&mut keeper.bytes, keeper.used);
            prop_assert_eq!(unfinished(&keeper.bytes, SIZE, keeper.used), Ok(Vec::new()));
            prop_assert_eq!(word(&keeper.bytes, USED_AT), Ok(keeper.used));
        }

        /// Whatever is in it: an error, or distinct heads of the ring.
        #[test]
        fn anything_may_be_there(mut bytes in prop::collection::vec(any::<u8>(), 0..300), order in 0_u16..5, used: u16) {
            if let Some(version) = bytes.get_mut(VERSION_AT..VERSION_AT + 2) {
                version.copy_from_slice(&[1, 0]);
            }
            if let Ok(mut heads) = unfinished(&bytes, 1 << order, used) {
                prop_assert!(heads.iter().all(|head| *head < 1 << order));
                let count = heads.len();
                heads.sort_unstable();
                heads.dedup();
                prop_assert_eq!(heads.len(), count);
            }
        }
    }

    #[test]
    fn what_cannot_be_right_is_named() {
        let mut keeper = Keeper::new(10);
        keeper.take(3);
        assert_eq!(unfinished(&keeper.bytes, SIZE, 40), Err(RecordError::Behind(30)));
        assert_eq!(unfinished(&keeper.bytes, 2, 10), Err(RecordError::Head(3)));
        assert_eq!(unfinished(&keeper.bytes[..40], SIZE, 10), Err(RecordError::Short));
        keeper.bytes[VERSION_AT] = 9;
        assert_eq!(unfinished(&keeper.bytes, SIZE, 10), Err(RecordError::Version(9)));
        keeper.bytes[VERSION_AT] = 0;
        assert_eq!(unfinished(&keeper.bytes, SIZE, 10), Ok(Vec::new()), "never used");
    }
}
