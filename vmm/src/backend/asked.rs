//! A short-lived child that answers one question on its standard output and ends: what must not be decoded in this
//! process is decoded there, in its jail.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use thiserror::Error;

use super::event::SpawnError;
use super::launch::start;
use super::spec::PassedFd;
use crate::lasted::Lasted;

/// Most bytes of an answer.
const ANSWER_BYTES_MAX: usize = 8 << 10;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum AskError {
    /// It did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It said why it has none.
    #[error("{0}")]
    Refused(String),
    /// It did not answer in time, or too much.
    #[error("{} gave no answer that could be used: {reason}", .exe.display())]
    Silent {
        /// The program.
        exe: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// Runs `exe` with nothing but `args` and one descriptor behind its flag; gives the line that it prints.
///
/// # Errors
/// [`AskError`]; what it prints when it fails is taken for its reason, without its name in front.
pub fn ask(name: &str, exe: &PathBuf, args: &[OsString], fd: PassedFd, within: Duration) -> Result<String, AskError> {
    let silent = |reason: String| AskError::Silent { exe: exe.clone(), reason };
    let mut command = Command::new(exe);
    command.args(args).env_clear();
    let mut child = start(name, command, vec![fd])?;
    let deadline = Instant::now() + within;
    let mut answer = Vec::new();
    let heard = loop {
        let mut part = [0; 1024];
        match rustix::io::read(&child.output, &mut part) {
            Ok(0) => break Ok(()),
            Ok(n) => answer.extend_from_slice(part.get(..n).unwrap_or_default()),
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
                let mut watched = [PollFd::from_borrowed_fd(child.output.as_fd(), PollFlags::IN)];
                if left.is_zero() || matches!(poll(&mut watched, Some(&timeout)), Ok(0)) {
                    break Err(format!("nothing within {}", Lasted(within)));
                }
            }
            Err(Errno::INTR) => {}
            Err(errno) => break Err(errno.to_string()),
        }
        if answer.len() > ANSWER_BYTES_MAX {
            break Err("it said too much".to_owned());
        }
    };
    if heard.is_err() {
        let _ = child.process.kill();
    }
    // It has closed its output, which it does by ending, or was killed.
    let status = child.process.wait().map_err(|error| silent(error.to_string()))?;
    heard.map_err(silent)?;
    let text = String::from_utf8(answer).map_err(|_| silent("its answer is no text".to_owned()))?;
    let line = text.lines().last().unwrap_or_default().trim();
    if status.success() {
        return Ok(line.to_owned());
    }
    let program = exe.file_name().unwrap_or_default().to_string_lossy().into_owned() + ": ";
    let reason: String = line.strip_prefix(&program).unwrap_or(line).chars().filter(|c| !c.is_control()).collect();
    Err(if reason.is_empty() { silent(status.to_string()) } else { AskError::Refused(reason) })
}
