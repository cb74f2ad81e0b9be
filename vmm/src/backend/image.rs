//! A disk image as the VMM holds it: by an O_PATH descriptor, which names the file over renames and restarts, and can
//! hold no lock. Each incarnation of a backend gets a description of its own, so that a lock falls with the incarnation
//! and with nothing else.
#![allow(unsafe_code, reason = "open file description locks have no safe wrapper")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, SeekFrom, fstat, ftruncate, openat, seek};
use rustix::io::Errno;
use thiserror::Error;

/// What a backend may do with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageAccess {
    /// Read only.
    Read,
    /// Read and write.
    Write,
}

/// Why an image cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ImageError {
    /// Not there.
    #[error("there is no image {}: check the disk's path", .0.display())]
    Missing(PathBuf),
    /// Not something with sectors.
    #[error("{} is a {found}: an image is a file or a block device", .path.display())]
    NotAnImage {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Not for writing.
    #[error("{} cannot be written ({errno}): make it writable, or give the disk readonly=on", .path.display())]
    ReadOnly {
        /// Which.
        path: PathBuf,
        /// The kernel's error.
        errno: Errno,
    },
    /// Another size is not to be had.
    #[error("{} cannot have {bytes} bytes: {errno}", .path.display())]
    Resize {
        /// Which.
        path: PathBuf,
        /// What was asked for.
        bytes: u64,
        /// The kernel's error.
        errno: Errno,
    },
    /// Anything else.
    #[error("the image {} cannot be opened: {errno}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// The kernel's error.
        errno: Errno,
    },
}

/// An image, held for as long as the VM lives.
#[derive(Debug)]
pub struct ImageHandle {
    path: PathBuf,
    handle: OwnedFd,
    access: ImageAccess,
}

impl ImageHandle {
    /// Takes hold of an image and checks that it can be opened as asked.
    ///
    /// # Errors
    /// All of [`ImageError`].
    pub fn open(path: &Path, access: ImageAccess) -> Result<Self, ImageError> {
        let named = |errno| match errno {
            Errno::NOENT | Errno::NOTDIR => ImageError::Missing(path.to_owned()),
            errno => ImageError::Open { path: path.to_owned(), errno },
        };
        let handle = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(named)?;
        let kind = FileType::from_raw_mode(fstat(&handle).map_err(named)?.st_mode);
        let found = match kind {
            FileType::RegularFile | FileType::BlockDevice => None,
            FileType::Directory => Some("folder"),
            FileType::Fifo => Some("pipe"),
            FileType::Socket => Some("socket"),
            FileType::CharacterDevice => Some("character device"),
            _ => Some("special file"),
        };
        if let Some(found) = found {
            return Err(ImageError::NotAnImage { path: path.to_owned(), found });
        }
        let image = Self { path: path.to_owned(), handle, access };
        image.reopen()?;
        Ok(image)
    }

    /// A description of its own for one incarnation: a new one each time, close-on-exec.
    ///
    /// # Errors
    /// [`ImageError::ReadOnly`] and [`ImageError::Open`].
    pub fn reopen(&self) -> Result<OwnedFd, ImageError> {
        self.open_for(self.access)
    }

    /// A description that can only be read.
    ///
    /// # Errors
    /// [`ImageError::Open`].
    pub fn reopen_to_read(&self) -> Result<OwnedFd, ImageError> {
        self.open_for(ImageAccess::Read)
    }

    fn open_for(&self, access: ImageAccess) -> Result<OwnedFd, ImageError> {
        let flags = match access {
            ImageAccess::Read => OFlags::RDONLY,
            ImageAccess::Write => OFlags::RDWR,
        };
        // Through /proc, so that it is the file that was checked, whatever its name points to by now.
        let link = format!("/proc/self/fd/{}", self.handle.as_raw_fd());
        openat(CWD, link, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            let path = self.path.clone();
            match errno {
                Errno::ROFS | Errno::ACCESS | Errno::PERM if access == ImageAccess::Write => {
                    ImageError::ReadOnly { path, errno }
                }
                errno => ImageError::Open { path, errno },
            }
        })
    }

    /// Gives a file another size: what is new reads as zeroes and takes no space, what is cut is gone. A block device keeps
    /// its own. Gives the size that it has afterwards, in bytes.
    ///
    /// # Errors
    /// All of [`ImageError`]; an image that is only read is not resized either.
    pub fn resize(&self, bytes: u64) -> Result<u64, ImageError> {
        let failed = |errno| ImageError::Resize { path: self.path.clone(), bytes, errno };
        let file = self.reopen()?;
        if self.access == ImageAccess::Read {
            return Err(failed(Errno::ROFS));
        }
        if FileType::from_raw_mode(fstat(&file).map_err(failed)?.st_mode) == FileType::RegularFile {
            ftruncate(&file, bytes).map_err(failed)?;
        }
        seek(&file, SeekFrom::End(0)).map_err(failed)
    }

    /// Whether somebody holds a lock on the byte at `offset`, by an open file description; `None` where that cannot be seen.
    #[must_use]
    pub fn is_locked_at(&self, offset: i64) -> Option<bool> {
        let file = self.reopen().ok()?;
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: offset,
            l_len: 1,
            // Must be zero for open file description locks.
            l_pid: 0,
        };
        // SAFETY: the descriptor is open, and `lock` is a valid structure that the call may write.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, std::ptr::from_mut(&mut lock)) };
        (done == 0).then_some(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    /// What a backend may do with it.
    #[must_use]
    pub fn access(&self) -> ImageAccess {
        self.access
    }

    /// Device and number of the file: what it is under any name.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        fstat(&self.handle).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino))
    }

    /// Its path when it was opened, for errors.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// The image is renamed and another file takes its name while the VM runs: a successor still gets the first one.
    /// Each opening is a description of its own: reading through one does not move the other.
    #[test]
    fn reopened_is_the_same_file_in_a_new_description() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        std::fs::write(&path, b"first").expect("written");
        let image = ImageHandle::open(&path, ImageAccess::Write).expect("opened");
        std::fs::rename(&path, folder.path().join("moved")).expect("renamed");
        std::fs::write(&path, b"other").expect("written");
        let (mut one, mut two) =
            (std::fs::File::from(image.reopen().expect("one")), std::fs::File::from(image.reopen().expect("two")));
        let mut text = String::new();
        one.read_to_string(&mut text).expect("read");
        two.read_to_string(&mut text).expect("read");
        assert_eq!(text, "firstfirst");
        one.write_all(b"!").expect("it is writable");
    }

    /// The lock of one incarnation is seen from here, and falls with its description.
    #[test]
    fn locks_are_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        std::fs::write(&path, b"bytes").expect("written");
        let image = ImageHandle::open(&path, ImageAccess::Write).expect("opened");
        let other = image.reopen().expect("a description");
        assert_eq!(image.is_locked_at(1 << 40), Some(false));
        rustix::fs::fcntl_lock(&other, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("locked");
        let by_process = image.is_locked_at(0);
        assert_eq!(by_process, Some(true), "a process' lock is seen like a description's");
        drop(other);
        assert_eq!(image.is_locked_at(0), Some(false));
    }

    #[test]
    fn what_is_no_image_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        assert_eq!(ImageHandle::open(&path, ImageAccess::Read).err(), Some(ImageError::Missing(path)));
        let open = ImageHandle::open(folder.path(), ImageAccess::Read);
        let error = open.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.ends_with("is a folder: an image is a file or a block device"), "{error}");
        let null = ImageHandle::open(Path::new("/dev/null"), ImageAccess::Read);
        assert!(matches!(null, Err(ImageError::NotAnImage { found: "character device", .. })), "{null:?}");
        // Root may write to a file without write permission, so the read-only case is one that binds root too.
        let exe = ImageHandle::open(Path::new("/proc/self/exe"), ImageAccess::Write);
        assert!(matches!(exe, Err(ImageError::Open { errno: Errno::TXTBSY, .. })), "{exe:?}");
    }
}
