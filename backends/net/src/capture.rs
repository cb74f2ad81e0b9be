//! Frames written to a file that Wireshark and tcpdump open: pcap with nanoseconds.
//!
//! A capture never stops a card. What cannot be written, because the disk is full, is counted and left out; the file is
//! cut back to its last whole record, so that it can always be opened. Everything is handed to the kernel at the end of
//! each batch: who reads the file sees all but the present moment.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
/// Longest record that is announced: more than any frame has.
const SNAP_BYTES: u32 = 262_144;
/// What is gathered before it goes to the kernel in the middle of a batch.
const BATCH_BYTES: usize = 64 << 10;

/// Why a capture cannot be made.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The file cannot be made.
    #[error("cannot write the capture {name}: {source}; choose a file in a folder that this user may write")]
    Open {
        /// Its path.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pipe would stop the card when nobody reads it.
    #[error("the capture {0} is no regular file: choose another path")]
    Kind(String),
}

#[derive(Debug)]
struct Pen {
    file: File,
    name: String,
    /// Length of the file: whole records only.
    written: u64,
    pending: Vec<u8>,
    records: u64,
    lost: u64,
}

/// An open capture, shared by all queues of a card.
#[derive(Debug)]
pub struct Capture {
    pen: Mutex<Pen>,
}

impl Capture {
    /// Makes the file, or empties it.
    pub fn create(path: &Path) -> Result<Self, CaptureError> {
        let name = path.display().to_string();
        let failed = |source| CaptureError::Open { name: name.clone(), source };
        // Not blocking, for the moment in which a pipe is opened that nobody reads.
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(CaptureError::Kind(name));
        }
        file.set_len(0).map_err(failed)?;
        let mut header = Vec::with_capacity(24);
        header.extend_from_slice(&MAGIC_NANOSECONDS.to_le_bytes());
        header.extend_from_slice(&[2, 0, 4, 0]);
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&SNAP_BYTES.to_le_bytes());
        header.extend_from_slice(&ETHERNET.to_le_bytes());
        (&file).write_all(&header).map_err(failed)?;
        let written = header.len() as u64;
        Ok(Self { pen: Mutex::new(Pen { file, name, written, pending: Vec::new(), records: 0, lost: 0 }) })
    }

    /// Writes down a frame that was seen now.
    pub fn frame(&self, bytes: &[u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut pen = self.pen.lock().unwrap_or_else(PoisonError::into_inner);
        let len = (bytes.len() as u32).to_le_bytes();
        pen.pending.extend_from_slice(&(now.as_secs() as u32).to_le_bytes());
        pen.pending.extend_from_slice(&now.subsec_nanos().to_le_bytes());
        pen.pending.extend_from_slice(&len);
        pen.pending.extend_from_slice(&len);
        pen.pending.extend_from_slice(bytes);
        pen.records += 1;
        if pen.pending.len() >= BATCH_BYTES {
            pen.flush();
        }
    }

    /// Hands over what was gathered.
    pub fn flush(&self) {
        self.pen.lock().unwrap_or_else(PoisonError::into_inner).flush();
    }

    /// Frames that could not be written.
    pub fn lost(&self) -> u64 {
        self.pen.lock().unwrap_or_else(PoisonError::into_inner).lost
    }
}

impl Pen {
    fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        match self.file.write_all_at(&self.pending, self.written) {
            Ok(()) => self.written += self.pending.len() as u64,
            Err(error) => {
                let before = self.lost;
                self.lost += self.records;
                // A part may have been written.
                let _ = self.file.set_len(self.written);
                if self.lost.next_power_of_two() != before.next_power_of_two() {
                    tracing::warn!(file = self.name, %error, lost = self.lost, "frames are missing in the capture");
                }
            }
        }
        self.records = 0;
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a capture as strictly as a viewer would: the frames in it.
    fn frames(bytes: &[u8]) -> Vec<Vec<u8>> {
        assert_eq!(bytes[..8], [0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(bytes[20..24], [1, 0, 0, 0], "Ethernet");
        let mut rest = &bytes[24..];
        let mut all = Vec::new();
        while !rest.is_empty() {
            let field = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert!(field(4) < 1_000_000_000 && field(8) == field(12));
            let len = field(8) as usize;
            all.push(rest[16..16 + len].to_vec());
            rest = &rest[16 + len..];
        }
        all
    }

    #[test]
    fn frames_are_there_after_each_flush() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pcap");
        let capture = Capture::create(&path).unwrap();
        assert!(frames(&std::fs::read(&path).unwrap()).is_empty());
        capture.frame(&[1; 60]);
        capture.frame(&[2; 1514]);
        capture.flush();
        assert_eq!(frames(&std::fs::read(&path).unwrap()), [vec![1; 60], vec![2; 1514]]);
    }

    /// A file that may not grow stands for a disk that is full.
    #[test]
    fn a_full_disk_leaves_whole_records_and_a_card_that_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pcap");
        let capture = Capture::create(&path).unwrap();
        capture.frame(&[1; 60]);
        capture.flush();
        // Written at an end that no file can have: EFBIG, as ENOSPC would be.
        capture.pen.lock().unwrap().written = i64::MAX as u64 - 10;
        capture.frame(&[2; 60]);
        capture.flush();
        assert_eq!(capture.lost(), 1);
        capture.pen.lock().unwrap().written = 24 + 76;
        capture.frame(&[3; 60]);
        capture.flush();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(frames(&bytes[..24 + 76 + 76]), [vec![1; 60], vec![3; 60]]);
    }

    #[test]
    fn what_is_no_file_or_cannot_be_made_is_refused_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Capture::create(&folder.path().join("no/a.pcap")).unwrap_err().to_string();
        assert!(missing.contains("no/a.pcap") && missing.contains("choose"), "{missing}");
        assert!(matches!(Capture::create(Path::new("/dev/null")), Err(CaptureError::Kind(_))));
    }
}
