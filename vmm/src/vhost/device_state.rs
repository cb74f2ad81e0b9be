//! What a device knows beyond its rings, moved from one backend to the next by vhost-user's device-state transfer
//! (SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE).
//!
//! The bytes are the backend's; here they are only carried, and counted. A backend may name a channel of its own: only
//! memory is taken for one, because reading it never waits; through the channel that is offered it is read with a deadline.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase};
use vhost::vhost_user::{VhostUserFrontend as _, VhostUserProtocolFeatures as Protocol};

use super::error::{ConversationError, Step};
use super::features::protocol_feature_names;
use super::worker::Session;

/// The longest state of a device.
const STATE_MAX: usize = 1 << 20;

/// A state, or why the backend that was asked has said no; an error when it is to be taken for dead.
type Answer<T> = Result<Result<T, String>, ConversationError>;

/// Has a backend that has no rings say what it knows; `None` when it says that it knows nothing (it does not speak of
/// states).
///
/// # Errors
/// When it is to be taken for dead.
pub(super) fn save(session: &mut Session, limit: Duration) -> Answer<Option<Vec<u8>>> {
    if !session.capabilities.protocol.contains(Protocol::DEVICE_STATE) {
        return Ok(Ok(None));
    }
    let (ours, theirs) = match UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => return Ok(Err(format!("no channel for its state ({error}); raise ulimit -n"))),
    };
    let own = match open(session, Direction::SAVE, theirs.into())? {
        Ok(own) => own,
        Err(why) => return Ok(Err(why)),
    };
    let bytes = match own {
        Some(file) => read_memory(&file),
        None => read_channel(ours, Instant::now() + limit),
    };
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Err(format!("the old build's state cannot be read: {error}"))),
    };
    Ok(check(session)?.map_err(|()| "the old build could not say what it knows".to_owned()).map(|()| Some(bytes)))
}

/// Tells a backend that has no rings what its predecessor knew.
///
/// # Errors
/// When it is to be taken for dead.
pub(super) fn load(session: &mut Session, bytes: &[u8], limit: Duration) -> Answer<()> {
    if !session.capabilities.protocol.contains(Protocol::DEVICE_STATE) {
        let lacks = protocol_feature_names(Protocol::DEVICE_STATE.bits());
        return Ok(Err(format!("the new build lacks {lacks}, with which the old one gives its state on")));
    }
    let (ours, theirs) = match UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => return Ok(Err(format!("no channel for its state ({error}); raise ulimit -n"))),
    };
    let own = match open(session, Direction::LOAD, theirs.into())? {
        Ok(own) => own,
        Err(why) => return Ok(Err(why)),
    };
    let written = match own {
        Some(file) => file.write_all_at(bytes, 0),
        None => write_channel(ours, bytes, Instant::now() + limit),
    };
    if let Err(error) = written {
        return Ok(Err(format!("the new build does not take the old one's state: {error}")));
    }
    Ok(check(session)?.map_err(|()| "the new build refuses the old one's state".to_owned()))
}

/// A refusal leaves both as they are.
fn open(session: &mut Session, direction: Direction, theirs: OwnedFd) -> Answer<Option<File>> {
    let answer = session.conversation.perform(move |wire| {
        let step = Step::SetDeviceStateFd;
        match wire.ask(step, |frontend| frontend.set_device_state_fd(direction, Phase::STOPPED, theirs)) {
            Err(ConversationError::Refused { .. }) => Ok(None),
            answer => answer.map(Some),
        }
    })?;
    let Some(own) = answer else {
        return Ok(Err(format!("the backend refused {}", Step::SetDeviceStateFd)));
    };
    match own {
        // Only memory has seals.
        Some(file) if rustix::fs::fcntl_get_seals(&file).is_err() => {
            Ok(Err("the backend's channel for its state is no memory".to_owned()))
        }
        own => Ok(Ok(own)),
    }
}

fn check(session: &mut Session) -> Result<Result<(), ()>, ConversationError> {
    session.conversation.perform(|wire| {
        match wire.ask(Step::CheckDeviceState, |frontend| frontend.check_device_state()) {
            Err(ConversationError::Refused { .. }) => Ok(Err(())),
            answer => answer.map(Ok),
        }
    })
}

fn too_long() -> io::Error {
    io::Error::other(format!("it is longer than {STATE_MAX} bytes"))
}

fn read_memory(file: &File) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.metadata()?.len()).ok().filter(|len| *len <= STATE_MAX).ok_or_else(too_long)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn read_channel(mut channel: UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        channel.set_read_timeout(Some(left))?;
        match channel.read(&mut part)? {
            0 => return Ok(bytes),
            n => bytes.extend_from_slice(part.get(..n).unwrap_or_default()),
        }
        if bytes.len() > STATE_MAX {
            return Err(too_long());
        }
        if deadline <= Instant::now() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn write_channel(mut channel: UnixStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        channel.set_write_timeout(Some(left))?;
        let written = channel.write(bytes)?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}
