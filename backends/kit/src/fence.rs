//! The fence between an incarnation of a device and its successor.
//!
//! A process that was killed may still have I/O under way in the kernel: it can land in the image, or in guest
//! memory, after the process has been reaped. Each incarnation therefore holds a lock on an open file description
//! that nobody else has. The kernel drops the lock when the last reference to that description goes, and I/O under
//! way holds one: when the successor gets the lock, nothing of its predecessor can land any more.
//!
//! Until then a successor takes no request at all. (Design allows to start plain, non-overlapping requests earlier;
//! waiting is the simplest right thing, and costs what the dying I/O costs.)
//!
//! [`FileFence`] takes two kinds of locks. One byte of this device's own, far behind every image's end, tells an
//! incarnation from its predecessor and from nobody else. Besides it the byte ranges that QEMU and its tools use
//! tell other programs what we do with the image and what we cannot bear beside us.

#![allow(unsafe_code, reason = "open file description locks have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

/// Where the bytes of devices begin: 2^40, behind every image that is served.
const DEVICE_BYTES_AT: i64 = 1 << 40;
/// QEMU: a lock on 100 + n says "I use permission n", one on 200 + n says "nobody else may".
const QEMU_USES_AT: i64 = 100;
const QEMU_DENIES_AT: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Why a fence cannot be raised.
#[derive(Debug, Error)]
pub enum FenceError {
    /// The predecessor's I/O is not over, or another process serves the same device.
    #[error("{name} is still in use by another incarnation of this device after {waited:.1?}: is it served twice?")]
    Predecessor {
        /// What is fenced.
        name: String,
        /// How long we waited.
        waited: Duration,
    },
    /// Another program uses what we need, or we would disturb it.
    #[error("{name} is locked by another program ({what}): stop that program, or let both only read it")]
    Locked {
        /// What is fenced.
        name: String,
        /// What it does with it.
        what: &'static str,
    },
    /// What is behind the fence cannot be served.
    #[error("{0}")]
    Unfit(String),
    /// Locks do not work there.
    #[error("cannot lock {name}: {source}")]
    Lock {
        /// What is fenced.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Something that keeps an incarnation apart from its predecessor. Files, block devices and network storage
/// do it in different ways.
pub trait Fence: Send {
    /// Raises the fence, waiting at most `wait` for a predecessor. It falls by itself when the process has
    /// gone and its last I/O is over.
    fn raise(&self, wait: Duration) -> Result<(), FenceError>;

    /// Does everything of raising but the waiting, for a fault that is planted (feature `steps`).
    #[doc(hidden)]
    fn skip(&self) -> Result<(), FenceError> {
        Ok(())
    }

    /// Learns what a front end asks before there are rings, while a predecessor serves: nothing that it could change.
    fn glance(&self) -> Result<(), FenceError> {
        Ok(())
    }
}

/// Nothing is stored, so nothing can land late.
#[derive(Debug)]
pub struct NoFence;

impl Fence for NoFence {
    fn raise(&self, _wait: Duration) -> Result<(), FenceError> {
        Ok(())
    }
}

/// A fence on a file or block device.
#[derive(Debug)]
pub struct FileFence {
    /// The open image. Its description must not be shared with another process.
    pub file: Arc<File>,
    /// Its name, for messages.
    pub name: String,
    /// Nothing is written to it.
    pub read_only: bool,
    /// Names this device among those on the same image; none when a read-only device has no name.
    pub device: Option<u32>,
}

impl Fence for FileFence {
    fn raise(&self, wait: Duration) -> Result<(), FenceError> {
        if let Some(device) = self.device {
            self.raise_own(DEVICE_BYTES_AT + i64::from(device), wait)?;
        }
        self.share_with_others()
    }
}

impl FileFence {
    fn raise_own(&self, byte: i64, wait: Duration) -> Result<(), FenceError> {
        let start = Instant::now();
        loop {
            if self.try_own(byte)? {
                return Ok(());
            }
            if self.wholly_locked(byte)? {
                return Err(FenceError::Locked { name: self.name.clone(), what: "it locks all of it" });
            }
            let waited = start.elapsed();
            if waited >= wait {
                return Err(FenceError::Predecessor { name: self.name.clone(), waited });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn try_own(&self, byte: i64) -> Result<bool, FenceError> {
        if !self.read_only {
            return self.set(byte, libc::F_WRLCK);
        }
        // A read-only description can hold only read locks, which do not exclude each other: hold one, then
        // look whether somebody else does.
        self.set(byte, libc::F_RDLCK)?;
        self.free(byte)
    }

    /// Takes the byte ranges of QEMU, then checks that nobody uses what we deny or denies what we use.
    fn share_with_others(&self) -> Result<(), FenceError> {
        let uses: &[(i64, &str)] = if self.read_only {
            &[(CONSISTENT_READ, "it forbids others to read it")]
        } else {
            &[(CONSISTENT_READ, "it forbids others to read it"), (WRITE, "it forbids others to write it")]
        };
        let denies: &[(i64, &str)] = &[(WRITE, "it writes it"), (RESIZE, "it resizes it")];
        for (permission, _) in uses {
            self.hold(QEMU_USES_AT + permission)?;
        }
        for (permission, _) in denies {
            self.hold(QEMU_DENIES_AT + permission)?;
        }
        for (at, list) in [(QEMU_DENIES_AT, uses), (QEMU_USES_AT, denies)] {
            for (permission, what) in list {
                if !self.free(at + permission)? {
                    return Err(FenceError::Locked { name: self.name.clone(), what });
                }
            }
        }
        Ok(())
    }

    fn hold(&self, byte: i64) -> Result<(), FenceError> {
        if self.set(byte, libc::F_RDLCK)? {
            Ok(())
        } else {
            Err(FenceError::Locked { name: self.name.clone(), what: "it wants it for itself alone" })
        }
    }

    /// Takes a lock; false when somebody else's is in the way.
    fn set(&self, byte: i64, kind: i32) -> Result<bool, FenceError> {
        match self.fcntl(libc::F_OFD_SETLK, &mut one_byte(byte, kind)) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(source) => Err(FenceError::Lock { name: self.name.clone(), source }),
        }
    }

    /// True when a lock on `byte` covers its neighbours too: not a predecessor's, waiting is of no use.
    fn wholly_locked(&self, byte: i64) -> Result<bool, FenceError> {
        let mut lock = one_byte(byte, libc::F_WRLCK);
        self.fcntl(libc::F_OFD_GETLK, &mut lock)
            .map_err(|source| FenceError::Lock { name: self.name.clone(), source })?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK && lock.l_len != 1)
    }

    /// True when no other description holds any lock on `byte`.
    fn free(&self, byte: i64) -> Result<bool, FenceError> {
        let mut lock = one_byte(byte, libc::F_WRLCK);
        self.fcntl(libc::F_OFD_GETLK, &mut lock)
            .map_err(|source| FenceError::Lock { name: self.name.clone(), source })?;
        Ok(i32::from(lock.l_type) == libc::F_UNLCK)
    }

    fn fcntl(&self, command: i32, lock: &mut libc::flock) -> io::Result<()> {
        // SAFETY: the descriptor is open and `lock` is a valid structure that the call may write.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), command, std::ptr::from_mut(lock)) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn one_byte(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        // Must be zero for open file description locks.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_WAIT: Duration = Duration::ZERO;

    struct Image(tempfile::NamedTempFile);

    impl Image {
        fn fence(&self, read_only: bool, device: u32) -> FileFence {
            let file = File::options().read(true).write(!read_only).open(self.0.path()).unwrap();
            FileFence { file: Arc::new(file), name: "image".to_owned(), read_only, device: Some(device) }
        }
    }

    #[test]
    fn writers_exclude_everybody_and_readers_only_writers() {
        let image = Image(tempfile::NamedTempFile::new().unwrap());
        let writer = image.fence(false, 1);
        writer.raise(NO_WAIT).unwrap();
        assert!(matches!(image.fence(false, 2).raise(NO_WAIT), Err(FenceError::Locked { .. })));
        assert!(matches!(image.fence(true, 3).raise(NO_WAIT), Err(FenceError::Locked { .. })));
        drop(writer);
        let (one, two) = (image.fence(true, 1), image.fence(true, 2));
        one.raise(NO_WAIT).unwrap();
        two.raise(NO_WAIT).unwrap();
        assert!(matches!(image.fence(false, 3).raise(NO_WAIT), Err(FenceError::Locked { .. })));
    }

    /// Other monitors lock an image as a whole, also where a predecessor's byte lies. It was waited for, and the
    /// message spoke of a device that is served twice.
    #[test]
    fn a_lock_on_the_whole_image_is_not_a_predecessor() {
        let image = Image(tempfile::NamedTempFile::new().unwrap());
        let stranger = image.fence(false, 1);
        let mut whole = libc::flock { l_start: 0, l_len: 0, ..one_byte(0, libc::F_WRLCK) };
        stranger.fcntl(libc::F_OFD_SETLK, &mut whole).unwrap();
        for read_only in [false, true] {
            let error = image.fence(read_only, 1).raise(Duration::from_secs(60));
            assert!(matches!(error, Err(FenceError::Locked { .. })), "{error:?}");
        }
    }

    #[test]
    fn a_successor_waits_for_its_own_predecessor_also_when_both_only_read() {
        for read_only in [false, true] {
            let image = Image(tempfile::NamedTempFile::new().unwrap());
            let predecessor = image.fence(read_only, 1);
            predecessor.raise(NO_WAIT).unwrap();
            let successor = image.fence(read_only, 1);
            assert!(matches!(successor.raise(NO_WAIT), Err(FenceError::Predecessor { .. })));
            let dying = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                drop(predecessor);
            });
            successor.raise(Duration::from_secs(10)).unwrap();
            dying.join().unwrap();
        }
    }
}
