//! One connection: a stream of the host's, and what both sides know of each other's room.
//!
//! Nothing here waits. What the guest sent and the host does not take yet is kept, as much as the guest was told that
//! there is room for; what the host sent stays in its socket until the guest has room.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;

use crate::header::{HEARS_NO_MORE, SAYS_NO_MORE};

/// What the guest may send before the host has taken it.
pub(crate) const ROOM: u32 = 256 << 10;
/// The guest hears of room that has become free when it is this much.
const WORTH_TELLING: u32 = ROOM / 4;

/// The connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The guest has been asked, on behalf of a client of the host's.
    Asked,
    /// Bytes flow.
    Open,
}

/// Packets that the guest is owed, in the order in which they are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Owed {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) credit: bool,
    pub(crate) credit_request: bool,
    pub(crate) shutdown: bool,
}

impl Owed {
    pub(crate) fn any(self) -> bool {
        self != Self::default()
    }
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    pub(crate) stage: Stage,
    pub(crate) owed: Owed,
    /// It stands in the list of those that owe something.
    pub(crate) listed: bool,
    /// What the epoll set waits for on its behalf, if it is in there.
    pub(crate) watched: Option<EventFlags>,
    /// Room that the guest has told of, and how much of it was used and freed so far.
    peer_room: u32,
    peer_taken: u32,
    sent: u32,
    /// From the guest, not yet taken by the host.
    waiting: VecDeque<u8>,
    taken: u32,
    taken_told: u32,
    /// The host's end says no more; and is gone altogether.
    pub(crate) host_silent: bool,
    pub(crate) host_gone: bool,
    guest_silent: bool,
    guest_deaf: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            owed: Owed::default(),
            listed: false,
            watched: None,
            peer_room: 0,
            peer_taken: 0,
            sent: 0,
            waiting: VecDeque::new(),
            taken: 0,
            taken_told: 0,
            host_silent: false,
            host_gone: false,
            guest_silent: false,
            guest_deaf: false,
        }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The guest says what room it has.
    pub(crate) fn room_of_guest(&mut self, room: u32, taken: u32) {
        (self.peer_room, self.peer_taken) = (room, taken);
    }

    /// What may be sent to the guest now.
    pub(crate) fn credit(&self) -> usize {
        self.peer_room.saturating_sub(self.sent.wrapping_sub(self.peer_taken)) as usize
    }

    /// What has been taken from the guest, ever; it knows then.
    pub(crate) fn tell_taken(&mut self) -> u32 {
        self.taken_told = self.taken;
        self.taken
    }

    /// A line for the client itself, before any byte of the guest's.
    pub(crate) fn greet(&mut self, line: &str) -> Result<(), Broken> {
        // A socket that has just been made holds a line.
        match self.stream.write(line.as_bytes()) {
            Ok(len) if len == line.len() => Ok(()),
            _ => Err(Broken),
        }
    }

    /// Bytes of the guest's.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let held = self.waiting.len() + bytes.len();
        if self.stage != Stage::Open || self.guest_silent || held > ROOM as usize {
            return Err(Broken);
        }
        let at_once = if self.waiting.is_empty() { self.write(bytes)? } else { 0 };
        self.waiting.extend(bytes.get(at_once..).unwrap_or_default());
        Ok(())
    }

    /// Hands the host what waits for it.
    pub(crate) fn flush(&mut self) -> Result<(), Broken> {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            let front = front.to_vec();
            let written = self.write(&front)?;
            self.waiting.drain(..written);
            if written < front.len() {
                break;
            }
        }
        if self.waiting.is_empty() && self.guest_silent {
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(Broken),
                Ok(len) => written += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(Broken),
            }
        }
        // At most the room, which is far below 2^32.
        self.taken = self.taken.wrapping_add(written as u32);
        if self.taken.wrapping_sub(self.taken_told) >= WORTH_TELLING {
            self.owed.credit = true;
        }
        Ok(written)
    }

    /// Bytes for the guest, as many as it has room for and `bytes` holds; 0 when there are none now.
    pub(crate) fn give(&mut self, bytes: &mut [u8]) -> Result<usize, Broken> {
        let most = bytes.len().min(self.credit());
        if self.host_silent || self.guest_deaf || self.stage != Stage::Open {
            return Ok(0);
        }
        let Some(room) = bytes.get_mut(..most).filter(|room| !room.is_empty()) else {
            self.owed.credit_request = true;
            return Ok(0);
        };
        match self.stream.read(room) {
            Ok(0) => {
                self.host_silent = true;
                self.owed.shutdown = true;
                Ok(0)
            }
            Ok(len) => {
                self.sent = self.sent.wrapping_add(len as u32);
                Ok(len)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            Err(_) => Err(Broken),
        }
    }

    /// The host's end has closed, or shut both ways. What it has said before is still read.
    pub(crate) fn hung_up(&mut self) {
        if self.host_silent && !self.host_gone {
            self.host_gone = true;
            self.owed.shutdown = true;
        }
    }

    /// What the guest is told that the host will do no more.
    pub(crate) fn shutdown_flags(&self) -> u32 {
        (if self.host_silent { SAYS_NO_MORE } else { 0 }) | if self.host_gone { HEARS_NO_MORE } else { 0 }
    }

    /// The guest will do no more of this.
    pub(crate) fn guest_shuts(&mut self, flags: u32) -> Result<(), Broken> {
        self.guest_silent |= flags & SAYS_NO_MORE != 0;
        self.guest_deaf |= flags & HEARS_NO_MORE != 0;
        self.flush()
    }

    /// Both sides of the guest are shut, and the host has all that was sent: nothing is left to do.
    pub(crate) fn is_over(&self) -> bool {
        self.guest_silent && self.guest_deaf && self.waiting.is_empty()
    }

    /// What to wait for; `None`: nothing, not even a hang-up.
    pub(crate) fn interest(&self) -> Option<EventFlags> {
        let reads = self.stage == Stage::Open && !self.host_silent && !self.guest_deaf && self.credit() > 0;
        let writes = !self.waiting.is_empty();
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, reads);
        flags.set(EventFlags::OUT, writes);
        // Of one that was asked for on a client's behalf it is of interest whether that client is still there; of one
        // that is silent, whether it is gone. Where bytes wait for room a hang-up would be told over and over.
        let hang_up = self.stage == Stage::Asked || (self.host_silent && !self.host_gone);
        (reads || writes || hang_up).then_some(flags)
    }
}
