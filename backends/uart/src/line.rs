//! The host's end of the line: a file, or a terminal. Nothing here makes the guest wait: what a terminal does not take
//! is kept for a while, then dropped, as on a real line without anybody at the other end.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use thiserror::Error;

/// The most output that waits for a terminal, in bytes.
const BACKLOG_MAX: usize = 64 << 10;

/// Why the line cannot be had.
#[derive(Debug, Error)]
pub(crate) enum LineError {
    /// The file cannot be opened.
    #[error("the serial port's output {} cannot be opened (give it a folder that can be written)", .path.display())]
    Output {
        /// Which file.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// No pseudo-terminal.
    #[error("no pseudo-terminal for the serial port: {0}; give it a file instead")]
    Pty(#[source] Errno),
    /// Not something that can be written to.
    #[error("the serial port's output descriptor cannot be used: {0}")]
    Descriptor(#[source] Errno),
}

/// The line.
#[derive(Debug)]
pub(crate) struct Line {
    end: OwnedFd,
    /// Our own hold on a pseudo-terminal's other side: without one, it would hang up whenever nobody is looking.
    _other_side: Option<OwnedFd>,
    /// A terminal that hung up gives no more input.
    has_input: bool,
    backlog: VecDeque<u8>,
    lost: u64,
}

impl Line {
    /// Appends to a file.
    pub(crate) fn file(path: &Path) -> Result<Self, LineError> {
        let opened = OpenOptions::new().append(true).create(true).open(path);
        let file: File = opened.map_err(|source| LineError::Output { path: path.to_owned(), source })?;
        Self::descriptor(file.into())
    }

    /// Writes to something that is open; reads from it too if it is a terminal.
    pub(crate) fn descriptor(end: OwnedFd) -> Result<Self, LineError> {
        let is_terminal = isatty(&end);
        if is_terminal {
            let flags = fcntl_getfl(&end).map_err(LineError::Descriptor)?;
            fcntl_setfl(&end, flags | OFlags::NONBLOCK).map_err(LineError::Descriptor)?;
        }
        let backlog = VecDeque::new();
        Ok(Self { end, _other_side: None, has_input: is_terminal, backlog, lost: 0 })
    }

    /// A new pseudo-terminal in raw mode, and the name of its other side.
    pub(crate) fn pty() -> Result<(Self, String), LineError> {
        let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(LineError::Pty)?;
        grantpt(&end).map_err(LineError::Pty)?;
        unlockpt(&end).map_err(LineError::Pty)?;
        let name = ptsname(&end, Vec::new()).map_err(LineError::Pty)?.to_string_lossy().into_owned();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let other = rustix::fs::open(name.as_str(), flags, rustix::fs::Mode::empty()).map_err(LineError::Pty)?;
        let mut attributes = tcgetattr(&other).map_err(LineError::Pty)?;
        attributes.make_raw();
        tcsetattr(&other, OptionalActions::Now, &attributes).map_err(LineError::Pty)?;
        let line = Self { _other_side: Some(other), ..Self::descriptor(end)? };
        Ok((line, name))
    }

    /// Takes what the guest sent.
    pub(crate) fn send(&mut self, characters: impl Iterator<Item = u8>) {
        self.backlog.extend(characters);
        self.flush();
    }

    /// Hands on what waits. What cannot be written (the disk is full, nobody reads the terminal) is lost, and that is
    /// logged once until something can be written again: the guest is not told, and does not write the log.
    pub(crate) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (bytes, _) = self.backlog.as_slices();
            match rustix::io::write(&self.end, bytes) {
                Ok(written) => {
                    self.backlog.drain(..written);
                    self.lost = 0;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => {
                    self.lose(self.backlog.len(), errno);
                    break;
                }
            }
        }
        if let Some(excess) = self.backlog.len().checked_sub(BACKLOG_MAX).filter(|excess| *excess > 0) {
            self.lose(excess, Errno::AGAIN);
        }
    }

    /// Drops the oldest characters.
    fn lose(&mut self, count: usize, why: Errno) {
        if self.lost == 0 {
            tracing::warn!(error = %why, "the guest's output is lost");
        }
        self.lost = self.lost.saturating_add(count as u64);
        self.backlog.drain(..count);
    }

    /// Whether output waits for the terminal.
    pub(crate) fn is_backed_up(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Where input comes from, if there is any.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.has_input.then(|| self.end.as_fd())
    }

    /// Where to wait for room.
    pub(crate) fn output(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Reads at most `room` characters that were typed.
    pub(crate) fn receive(&mut self, room: usize) -> Vec<u8> {
        let mut typed = vec![0; room];
        match rustix::io::read(&self.end, &mut typed) {
            Ok(0) => self.has_input = false,
            Ok(read) => {
                typed.truncate(read);
                return typed;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The other side of a pseudo-terminal that was passed has gone.
            Err(_) => self.has_input = false,
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is typed at the pseudo-terminal arrives as it was typed, what is sent is not echoed back as input, and a
    /// guest that writes a megabyte that nobody reads waits for nothing.
    #[test]
    fn pty_carries_both_ways_and_never_blocks() {
        let (mut line, name) = Line::pty().expect("a pseudo-terminal");
        let seat = OpenOptions::new().read(true).write(true).open(name).expect("its other side");
        line.send(b"login: \x03\n".iter().copied());
        let mut shown = [0; 9];
        std::io::Read::read_exact(&mut &seat, &mut shown).expect("shown");
        assert_eq!(&shown, b"login: \x03\n");
        assert!(line.receive(64).is_empty(), "no echo");
        std::io::Write::write_all(&mut &seat, b"root\r\x04").expect("typed");
        assert_eq!(line.receive(3), b"roo");
        assert_eq!(line.receive(64), b"t\r\x04");
        for _ in 0..1024 {
            line.send(std::iter::repeat_n(b'x', 1024));
        }
        assert!(line.is_backed_up() && line.backlog.len() <= BACKLOG_MAX);
        assert!(line.lost > 0);
    }

    /// A full disk costs the guest's output and nothing else; once there is room, output goes on.
    #[test]
    fn full_disk_is_no_end() {
        let full = OpenOptions::new().write(true).open("/dev/full").expect("there is one");
        let mut line = Line::descriptor(full.into()).expect("a line");
        line.send(b"abc".iter().copied());
        assert_eq!((line.lost, line.is_backed_up()), (3, false));
    }

    /// A second incarnation goes on where the first one stopped: the file is appended to.
    #[test]
    fn file_is_appended_to() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("serial");
        for words in [b"one ", b"two "] {
            let mut line = Line::file(&path).expect("opened");
            assert!(line.input().is_none());
            line.send(words.iter().copied());
        }
        assert_eq!(std::fs::read(&path).expect("read"), b"one two ");
        let error = Line::file(folder.path()).expect_err("a folder").to_string();
        assert!(error.contains("give it a folder that can be written"), "{error}");
    }
}
