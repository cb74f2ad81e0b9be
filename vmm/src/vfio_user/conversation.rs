//! Words with one server: each question has an answer, or an end, within a time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use atoll_protocol::vfio_user::{
    Capabilities, Channel, ChannelError, Command, DATA_MAX, DESCRIPTORS_MAX, Header, Kind, Message, RegionAccess,
    Request, Version, WireError, reply,
};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::GuestMemory;
use crate::vhost::Ending;

/// How closely a wait is watched.
const SLICE: Duration = Duration::from_millis(20);
/// Questions of the server's own that are answered while one of ours is not.
const FOREIGN_MAX: u32 = 10_000;

/// Why a server did not answer as it has to.
#[derive(Debug, Error)]
pub enum TalkError {
    /// It is gone.
    #[error("{command:?}: {source}")]
    Channel {
        /// What was asked.
        command: Command,
        /// What happened.
        #[source]
        source: ChannelError,
    },
    /// It says nothing.
    #[error(
        "{command:?} was not answered within {waited:?}: if the server is stopped (SIGSTOP, a debugger), let it go on; if it \
         serves another client, end that one; else end it and start it again"
    )]
    Late {
        /// What was asked.
        command: Command,
        /// How long it had.
        waited: Duration,
    },
    /// It says no.
    #[error("{command:?} was refused: {}", std::io::Error::from_raw_os_error(.errno.cast_signed()))]
    Refused {
        /// What was asked.
        command: Command,
        /// Its reason.
        errno: u32,
    },
    /// What it says cannot be right.
    #[error("the server's answer to {command:?} cannot be right: {what}")]
    Absurd {
        /// What was asked.
        command: Command,
        /// What is wrong.
        what: String,
    },
    /// The device is being stopped.
    #[error("the device is being stopped")]
    Ending,
}

impl TalkError {
    /// Whether another server would do the same.
    pub fn is_hopeless(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Absurd { .. })
    }
}

/// A connection to a server.
pub(super) struct Conversation {
    channel: Channel,
    next_id: u16,
    limit: Duration,
    ending: Ending,
    theirs: Capabilities,
    memory: Option<GuestMemory>,
    answered: u64,
}

fn absurd(command: Command, error: &WireError) -> TalkError {
    TalkError::Absurd { command, what: error.to_string() }
}

impl Conversation {
    pub(super) fn new(socket: UnixStream, limit: Duration, ending: &Ending) -> Self {
        Self {
            channel: Channel::new(socket),
            next_id: 0,
            limit,
            ending: ending.clone(),
            theirs: Capabilities::default(),
            memory: None,
            answered: 0,
        }
    }

    /// The socket, to be watched.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
    /// Ends it.
    pub(super) fn hang_up(&self) {
        self.channel.hang_up();
    }
    /// From now on waits end when that is raised.
    pub(super) fn obey(&mut self, ending: &Ending) {
        self.ending = ending.clone();
    }
    /// What the server may ask of, where it reaches nothing by itself.
    pub(super) fn lend(&mut self, memory: Option<GuestMemory>) {
        self.memory = memory;
    }
    /// Questions that were answered.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }
    /// Descriptors that it takes beside a message.
    pub(super) fn descriptors_max(&self) -> usize {
        self.theirs.descriptors().clamp(1, DESCRIPTORS_MAX)
    }

    /// The first words.
    ///
    /// # Errors
    /// [`TalkError`].
    pub(super) fn greet(&mut self) -> Result<(), TalkError> {
        let capabilities = Capabilities {
            max_msg_fds: Some(DESCRIPTORS_MAX as u32),
            max_data_xfer_size: Some(DATA_MAX),
            pgsizes: Some(4096),
            max_dma_maps: None,
        };
        let ours = Version { major: Version::MAJOR, minor: Version::MINOR, capabilities };
        let (payload, _) = self.ask(&Request::Version(ours), &[])?;
        let theirs = Version::decode(&payload).map_err(|error| absurd(Command::Version, &error))?;
        if theirs.major != Version::MAJOR {
            let what =
                format!("it speaks version {}.{}, and {}.x is spoken here", theirs.major, theirs.minor, Version::MAJOR);
            return Err(TalkError::Absurd { command: Command::Version, what });
        }
        self.theirs = theirs.capabilities;
        Ok(())
    }

    /// Asks, and gives what was answered.
    ///
    /// # Errors
    /// [`TalkError`].
    pub(super) fn ask(
        &mut self,
        request: &Request,
        beside: &[BorrowedFd<'_>],
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), TalkError> {
        self.ask_within(request, beside, self.limit)
    }

    /// The same with another limit.
    ///
    /// # Errors
    /// [`TalkError`].
    pub(super) fn ask_within(
        &mut self,
        request: &Request,
        beside: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), TalkError> {
        let command = request.command();
        let gone = |source| TalkError::Channel { command, source };
        self.next_id = self.next_id.wrapping_add(1);
        let header =
            Header { id: self.next_id, command: command as u16, payload: 0, kind: Kind::Command { reply: true } };
        self.channel.send(header, &request.encode(), beside, limit).map_err(|error| match error {
            // It does not even read.
            ChannelError::Timeout(_) => TalkError::Late { command, waited: limit },
            other => gone(other),
        })?;
        let deadline = Instant::now() + limit;
        let mut theirs = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = match self.channel.receive(left.min(SLICE)) {
                Ok(message) => message,
                Err(ChannelError::Timeout(_)) if self.ending.load(Ordering::Relaxed) => return Err(TalkError::Ending),
                Err(ChannelError::Timeout(_)) if left.is_zero() => {
                    return Err(TalkError::Late { command, waited: limit });
                }
                Err(ChannelError::Timeout(_)) => continue,
                Err(source) => return Err(gone(source)),
            };
            match message.header.kind {
                Kind::Command { reply } => {
                    theirs += 1;
                    if theirs > FOREIGN_MAX {
                        let what = "it asks and asks, and does not answer".into();
                        return Err(TalkError::Absurd { command, what });
                    }
                    self.serve(&message, reply).map_err(gone)?;
                }
                _ if (message.header.id, message.header.command) != (header.id, header.command) => {
                    let what = format!(
                        "it has the number {} of command {}, and {} of {} was asked",
                        message.header.id, message.header.command, header.id, header.command
                    );
                    return Err(TalkError::Absurd { command, what });
                }
                Kind::Failed(errno) => return Err(TalkError::Refused { command, errno }),
                Kind::Reply => {
                    self.answered += 1;
                    return Ok((message.payload, message.descriptors));
                }
            }
        }
    }

    /// Answers what the server asks by itself while nothing is asked of it. Says whether it may stay.
    ///
    /// # Errors
    /// [`TalkError`].
    pub(super) fn hear(&mut self) -> Result<(), TalkError> {
        let command = Command::DmaRead;
        let gone = |source| TalkError::Channel { command, source };
        for _ in 0..64 {
            let Some(message) = self.channel.try_receive().map_err(gone)? else { return Ok(()) };
            let Kind::Command { reply } = message.header.kind else {
                return Err(TalkError::Absurd { command, what: "it answers what was not asked".into() });
            };
            self.serve(&message, reply).map_err(gone)?;
        }
        Ok(())
    }

    /// A question of the server's: memory, within RAM.
    fn serve(&mut self, message: &Message, reply: bool) -> Result<(), ChannelError> {
        let outcome = match Request::decode(message.header.command, &message.payload) {
            Ok(Request::DmaRead { address, count }) => self.read_memory(address, count),
            Ok(Request::DmaWrite { address, data }) => self.write_memory(address, &data),
            _ => Err(libc::EINVAL),
        };
        if !reply {
            return Ok(());
        }
        let (kind, payload) = match outcome {
            Ok(payload) => (Kind::Reply, payload),
            Err(errno) => (Kind::Failed(errno.cast_unsigned()), Vec::new()),
        };
        self.channel.send(Header { kind, ..message.header }, &payload, &[], self.limit)
    }

    fn read_memory(&self, address: u64, count: u32) -> Result<Vec<u8>, i32> {
        let memory = self.memory.as_ref().ok_or(libc::EFAULT)?;
        let mut data = vec![0; count as usize];
        memory.mapped().read_slice(&mut data, GuestAddress(address)).map_err(|_| libc::EFAULT)?;
        let mut payload = Request::DmaRead { address, count }.encode();
        payload.extend(data);
        Ok(payload)
    }

    fn write_memory(&self, address: u64, data: &[u8]) -> Result<Vec<u8>, i32> {
        let memory = self.memory.as_ref().ok_or(libc::EFAULT)?;
        memory.mapped().write_slice(data, GuestAddress(address)).map_err(|_| libc::EFAULT)?;
        Ok(Request::DmaRead { address, count: data.len() as u32 }.encode())
    }

    /// Reads registers.
    ///
    /// # Errors
    /// [`TalkError`].
    pub(super) fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), TalkError> {
        let asked = RegionAccess { region, offset, count: data.len() as u32 };
        let (payload, _) = self.ask(&Request::RegionRead(asked), &[])?;
        let read = reply::decode_read(&asked, &payload).map_err(|error| absurd(Command::RegionRead, &error))?;
        data.copy_from_slice(read);
        Ok(())
    }

    /// Writes registers.
    ///
    /// # Errors
    /// [`TalkError`].
    pub(super) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), TalkError> {
        let asked = RegionAccess { region, offset, count: data.len() as u32 };
        let (payload, _) = self.ask(&Request::RegionWrite(asked, data.to_vec()), &[])?;
        reply::decode_written(&asked, &payload).map_err(|error| absurd(Command::RegionWrite, &error))
    }
}
