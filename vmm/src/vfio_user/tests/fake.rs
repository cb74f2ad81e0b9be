//! A server on a thread, which answers as it should until it is to lie.

use std::collections::VecDeque;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use atoll_protocol::vfio_user::reply::{DeviceInfo, IrqInfo, RegionInfo, encode_access};
use atoll_protocol::vfio_user::{Capabilities, Channel, Command, Header, Kind, Request, Version, irq, region};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::vhost::{BackendSource, EndIsEnough, Fence, Incarnation, Patience, SourceError};

/// How long a server waits for a client that says nothing.
const CLIENT: Duration = Duration::from_secs(60);
/// Bytes of BAR 0, and where its table of vectors is.
pub(super) const BAR: u64 = 0x4000;
const TABLE: u32 = 0x2000;
const PENDING: u32 = 0x3000;
/// Vectors.
const VECTORS: u16 = 4;

/// What is done to a true answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lie {
    /// It has the number of another question.
    OtherNumber,
    /// It is the answer to another command.
    OtherCommand,
    /// It is a question.
    Question,
    /// It has flags that do not exist.
    Flags,
    /// Its header says that it is this long.
    Long(u32),
    /// It is one byte shorter than it has to be, and says so.
    Short,
    /// It comes twice.
    Twice,
    /// It ends in the middle of its header, and nothing follows.
    HalfHeader,
    /// It ends in the middle of what follows the header, and nothing follows.
    HalfBody,
    /// Something comes before it.
    Noise,
    /// It has more descriptors with it than a message has.
    Descriptors,
    /// It says no.
    No,
    /// There is none: the connection ends.
    HangUp,
    /// There is none, and no end either.
    Silence,
    /// Instead of it come questions, as many as there is room for.
    Flood,
}

pub(super) const LIES: [Lie; 18] = [
    Lie::OtherNumber,
    Lie::OtherCommand,
    Lie::Question,
    Lie::Flags,
    Lie::Long(0),
    Lie::Long(15),
    Lie::Long(0x0100_0000),
    Lie::Long(u32::MAX),
    Lie::Short,
    Lie::Twice,
    Lie::HalfHeader,
    Lie::HalfBody,
    Lie::Noise,
    Lie::Descriptors,
    Lie::No,
    Lie::HangUp,
    Lie::Silence,
    Lie::Flood,
];

impl Lie {
    /// Whether a client may go on as if nothing had been: it has an answer.
    pub(super) fn is_harmless_at(self, command: Command) -> bool {
        match self {
            // The second one is noticed by whoever asks or listens next.
            Self::Twice => true,
            // Doorbells are not for everybody.
            Self::No | Self::Short => command == Command::RegionIoFds,
            _ => false,
        }
    }

    /// Answers with it. Whether the conversation goes on.
    fn tell(self, socket: &UnixStream, header: Header, payload: &[u8]) -> bool {
        let payload = if self == Self::Short { payload.get(1..).unwrap_or_default() } else { payload };
        let header = Header { payload: payload.len() as u32, ..header };
        let mut bytes = header.encode().to_vec();
        match self {
            Self::OtherNumber => bytes[0] ^= 0x40,
            Self::OtherCommand => bytes[2] ^= 1,
            Self::Question => bytes[8] &= !0xf,
            Self::Flags => bytes[9] |= 0x80,
            Self::Long(len) => bytes[4..8].copy_from_slice(&len.to_le_bytes()),
            Self::No => {
                let refused = Header { kind: Kind::Failed(libc::EPERM.unsigned_abs()), payload: 0, ..header };
                return (&*socket).write_all(&refused.encode()).is_ok();
            }
            _ => {}
        }
        bytes.extend(payload);
        let whole = bytes.clone();
        match self {
            Self::Twice => bytes.extend(whole),
            Self::HalfHeader => bytes.truncate(9),
            Self::HalfBody => bytes.truncate(bytes.len().saturating_sub(1).min(20)),
            Self::Noise => bytes.splice(..0, [0xff; 5]).for_each(drop),
            Self::HangUp => return false,
            Self::Silence => bytes.clear(),
            Self::Flood => {
                let ask = Request::DmaRead { address: 0, count: 4 };
                let header = Header { kind: Kind::Command { reply: false }, command: ask_number(), ..header };
                let body = ask.encode();
                let mut question = Header { payload: body.len() as u32, ..header }.encode().to_vec();
                question.extend(body);
                // Ends when the client has had enough.
                while (&*socket).write_all(&question).is_ok() {}
                return false;
            }
            _ => {}
        }
        if self == Self::Descriptors {
            return with_descriptors(socket, &bytes);
        }
        (&*socket).write_all(&bytes).is_ok()
    }
}

fn ask_number() -> u16 {
    Command::DmaRead as u16
}

fn with_descriptors(socket: &UnixStream, bytes: &[u8]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let many = vec![socket.as_fd(); 200];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).is_ok()
}

/// Where a server lies: at this command, for a BAR if it is an access; or nowhere.
pub(super) type Character = Option<(Command, Lie)>;

/// Configuration space of a function with one BAR and a table of vectors.
pub(super) fn config() -> [u8; 256] {
    let mut config = [0; 256];
    config[..4].copy_from_slice(&[0x4d, 0x41, 0x01, 0x00]);
    config[0x06] = 0x10;
    config[0x0b] = 0xff;
    config[0x10] = 4;
    config[0x34] = 0x40;
    config[0x40] = 0x11;
    config[0x42..0x44].copy_from_slice(&(VECTORS - 1).to_le_bytes());
    config[0x44..0x48].copy_from_slice(&TABLE.to_le_bytes());
    config[0x48..0x4c].copy_from_slice(&PENDING.to_le_bytes());
    config
}

/// What stands in every register of a BAR.
pub(super) fn register(generation: u64) -> u32 {
    0x5a5a_0000 | generation as u32
}

fn answer(request: &Request, generation: u64) -> Result<Vec<u8>, i32> {
    Ok(match request {
        Request::Version(_) => {
            let capabilities = Capabilities { max_msg_fds: Some(8), ..Capabilities::default() };
            Version { major: Version::MAJOR, minor: Version::MINOR, capabilities }.encode()
        }
        Request::DeviceInfo => {
            DeviceInfo { resets: true, pci: true, regions: region::COUNT, irqs: irq::COUNT }.encode()
        }
        Request::RegionInfo { index, room } => {
            let size = if *index == region::BAR_0 { BAR } else { 0 };
            RegionInfo { index: *index, readable: true, writable: true, size, ..RegionInfo::default() }.encode(*room)
        }
        Request::IrqInfo { index } => IrqInfo { index: *index, eventfd: true, count: VECTORS.into() }.encode(),
        Request::RegionRead(access) if access.region == region::CONFIG => {
            let from = access.offset as usize;
            encode_access(access, &config()[from..from + access.count as usize])
        }
        Request::RegionRead(access) => {
            let words: Vec<u8> = register(generation).to_le_bytes().repeat(2);
            encode_access(access, &words[..access.count as usize])
        }
        Request::RegionWrite(access, _) => encode_access(access, &[]),
        Request::DmaUnmap(unmap) => Request::DmaUnmap(*unmap).encode(),
        Request::SetIrqs(_) | Request::DmaMap(_) | Request::Reset => Vec::new(),
        Request::RegionIoFds { .. } => return Err(libc::EINVAL),
        Request::DmaRead { .. } | Request::DmaWrite { .. } => return Err(libc::EINVAL),
    })
}

/// Serves until the client goes.
pub(super) fn serve(socket: UnixStream, generation: u64, character: Character, resets: &AtomicU32) {
    let raw = socket.try_clone().unwrap();
    let mut channel = Channel::new(socket);
    while let Ok(message) = channel.receive(CLIENT) {
        // A question of ours is answered, with a refusal as a rule.
        if !matches!(message.header.kind, Kind::Command { .. }) {
            continue;
        }
        let request = Request::decode(message.header.command, &message.payload).unwrap();
        resets.fetch_add(u32::from(request == Request::Reset), Ordering::SeqCst);
        let outcome = answer(&request, generation);
        let of_config = matches!(&request, Request::RegionRead(access) if access.region == region::CONFIG);
        let lie = character.filter(|(command, _)| *command as u16 == message.header.command);
        // While it is greeted only configuration space is read, and later only a BAR.
        let asked = character.is_some_and(|(command, _)| command == Command::RegionRead) && of_config;
        let header = |kind| Header { kind, ..message.header };
        let goes_on = match (lie.filter(|_| !asked), &outcome) {
            (Some((_, lie)), outcome) => {
                let payload = outcome.clone().unwrap_or_else(|_| vec![0; 32]);
                lie.tell(&raw, header(Kind::Reply), &payload)
            }
            (None, Ok(payload)) => channel.send(header(Kind::Reply), payload, &[], CLIENT).is_ok(),
            (None, Err(errno)) => channel.send(header(Kind::Failed(errno.unsigned_abs())), &[], &[], CLIENT).is_ok(),
        };
        if !goes_on {
            break;
        }
    }
    channel.hang_up();
}

/// One server after the other; those behind the list are honest. And how often they were reset.
pub(super) struct Servers(pub(super) VecDeque<Character>, pub(super) Arc<AtomicU32>);

impl BackendSource for Servers {
    fn connect(&mut self, generation: u64, _patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let character = self.0.pop_front().flatten();
        // It ends with its connection.
        let resets = Arc::clone(&self.1);
        std::thread::spawn(move || serve(theirs, generation, character, &resets));
        Ok(Incarnation { socket: ours, process: None })
    }
    fn describe(&self) -> String {
        "a thread".into()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(EndIsEnough)
    }
    fn is_foreign(&self) -> bool {
        true
    }
}
