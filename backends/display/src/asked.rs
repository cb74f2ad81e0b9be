//! Sizes that somebody has asked for, by an order or at a viewer: they are written into memory that outlives the process, so that its
//! successor asks the guest for what the one before has asked for, and not for what stood on the command line.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use atoll_protocol::display::SCANOUTS_MAX;
use thiserror::Error;

use crate::stage::{SIDE_MAX, SIDE_MIN};

/// Columns and rows of a head, little endian; zero where nobody has asked.
const ENTRY: usize = 8;
const BYTES: usize = SCANOUTS_MAX * ENTRY;

/// Why there is no such memory.
#[derive(Debug, Error)]
pub enum AskedError {
    /// It cannot be read.
    #[error("--asked-fd cannot be read: {0}; pass a memfd of {BYTES} bytes")]
    Read(#[from] io::Error),
}

/// The memory.
#[derive(Debug)]
pub struct Asked(File);

/// A size for each head for which there is one.
pub type Sizes = [Option<(u32, u32)>; SCANOUTS_MAX];

impl Asked {
    /// The memory, and what predecessors have written there; what cannot be right is nothing.
    ///
    /// # Errors
    /// It is too short, or no memory.
    pub fn read(fd: OwnedFd) -> Result<(Self, Sizes), AskedError> {
        let file = File::from(fd);
        let mut bytes = [0; BYTES];
        file.read_exact_at(&mut bytes, 0)?;
        let mut sizes = Sizes::default();
        for (size, entry) in sizes.iter_mut().zip(bytes.as_chunks::<ENTRY>().0) {
            let [a, b, c, d, e, f, g, h] = *entry;
            let sides = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            let fits = [sides.0, sides.1].iter().all(|side| (SIDE_MIN..=SIDE_MAX).contains(side));
            *size = fits.then_some(sides);
        }
        Ok((Self(file), sizes))
    }

    /// Writes down what is asked for; it goes on without where that cannot be.
    pub fn note(&self, head: usize, (width, height): (u32, u32)) {
        let mut entry = [0; ENTRY];
        let (columns, rows) = entry.split_at_mut(ENTRY / 2);
        columns.copy_from_slice(&width.to_le_bytes());
        rows.copy_from_slice(&height.to_le_bytes());
        if let Err(error) = self.0.write_all_at(&entry, (head * ENTRY) as u64) {
            tracing::warn!(%error, head, "a size is forgotten if this process dies: its memory takes nothing");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one has noted the next one reads; what no head can have is left out, and so is a file that is too short.
    #[test]
    fn sizes_outlive_who_notes_them() {
        let file = tempfile::tempfile().unwrap();
        assert!(Asked::read(file.try_clone().unwrap().into()).is_err(), "an empty file");
        file.set_len(BYTES as u64).unwrap();
        let (asked, sizes) = Asked::read(file.try_clone().unwrap().into()).unwrap();
        assert_eq!(sizes, Sizes::default());
        asked.note(1, (640, 480));
        asked.note(SCANOUTS_MAX - 1, (SIDE_MAX, SIDE_MIN));
        file.write_all_at(&[0xff; ENTRY], 2 * ENTRY as u64).unwrap();
        let (_, sizes) = Asked::read(file.into()).unwrap();
        let there: Vec<_> = sizes.iter().enumerate().filter_map(|(head, size)| Some((head, (*size)?))).collect();
        assert_eq!(there, [(1, (640, 480)), (SCANOUTS_MAX - 1, (SIDE_MAX, SIDE_MIN))]);
    }
}
