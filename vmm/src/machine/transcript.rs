//! A file that gets what a guest prints.
//!
//! It is opened early, because one that cannot be written is a mistake that no machine should be built for, and emptied
//! late, when the machine has been built: a run that is refused leaves the folder, and what the last guest printed, as they
//! were.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// An output file.
#[derive(Debug)]
pub struct Transcript {
    path: PathBuf,
    file: File,
    /// It was not there before.
    made: bool,
    begun: AtomicBool,
}

impl Transcript {
    /// Opens the file, or makes it. Everybody who writes to it goes on at its end.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let made = match OpenOptions::new().append(true).create_new(true).open(path) {
            Ok(file) => Ok((file, true)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                OpenOptions::new().append(true).create(true).open(path).map(|file| (file, false))
            }
            Err(error) => Err(error),
        };
        let (file, made) = made?;
        Ok(Self { path: path.into(), file, made, begun: AtomicBool::new(false) })
    }

    /// A guest begins to print: what is in the file goes, the first time.
    pub fn begin(&self) {
        if !self.begun.swap(true, Ordering::Relaxed) {
            // A pipe or a terminal has nothing that could go.
            let _ = self.file.set_len(0);
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for Transcript {
    fn drop(&mut self) {
        if !self.made || self.begun.load(Ordering::Relaxed) {
            return;
        }
        let same = |ours: std::fs::Metadata, there: std::fs::Metadata| {
            (ours.dev(), ours.ino(), ours.len()) == (there.dev(), there.ino(), 0)
        };
        if self.file.metadata().and_then(|ours| Ok(same(ours, self.path.symlink_metadata()?))).unwrap_or(false) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_refused_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        drop(Transcript::open(&path).unwrap());
        assert!(!path.exists());
        let kept = Transcript::open(&path).unwrap();
        kept.begin();
        kept.file().write_all(b"one").unwrap();
        kept.begin();
        drop(kept);
        drop(Transcript::open(&path).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"one", "refused: as it was");
        let next = Transcript::open(&path).unwrap();
        next.begin();
        assert_eq!(next.file().metadata().unwrap().len(), 0);
        assert!(Transcript::open(&folder.path().join("none/log")).is_err());
    }
}
