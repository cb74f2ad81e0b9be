//! The words of the control and the cursor queue (virtio 1.2, 5.7.6): commands are read as hostile input, answers are written.
//!
//! What stands here is what 2D needs, and what is answered; what 3D adds is in [`command3d`](crate::command3d). Everything else
//! (blobs, UUIDs) belongs to features that are not offered and is refused as unknown.

use std::sync::Arc;

use atoll_protocol::display::{CursorPosition, DisplayInfo, Edid, Rect};
use thiserror::Error;

use crate::render::Failed;

/// Bytes of a control header.
pub const HEADER_LEN: usize = 24;
/// Bytes of the longest command; the entries of ATTACH_BACKING follow the command.
pub const COMMAND_LEN_MAX: usize = 96;
/// Bytes of ATTACH_BACKING before its entries.
pub const ATTACH_LEN: u64 = 32;
/// Bytes of an entry of it.
pub const ENTRY_LEN: usize = 16;

const GET_DISPLAY_INFO: u32 = 0x0100;
const RESOURCE_CREATE_2D: u32 = 0x0101;
const RESOURCE_UNREF: u32 = 0x0102;
const SET_SCANOUT: u32 = 0x0103;
const RESOURCE_FLUSH: u32 = 0x0104;
const TRANSFER_TO_HOST_2D: u32 = 0x0105;
const RESOURCE_ATTACH_BACKING: u32 = 0x0106;
const RESOURCE_DETACH_BACKING: u32 = 0x0107;
const GET_EDID: u32 = 0x010a;
const UPDATE_CURSOR: u32 = 0x0300;
const MOVE_CURSOR: u32 = 0x0301;

const OK_DISPLAY_INFO: u32 = 0x1101;
const OK_CAPSET_INFO: u32 = 0x1102;
const OK_CAPSET: u32 = 0x1103;
const OK_EDID: u32 = 0x1104;

/// VIRTIO_GPU_FLAG_FENCE: who asks wants its number back.
pub const FENCE: u32 = 1;

/// What stands before every command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Which command.
    pub kind: u32,
    /// [`FENCE`] and others.
    pub flags: u32,
    /// The number that is wanted back.
    pub fence: u64,
    /// Comes back beside it.
    pub context: u32,
}

/// A command of the control queue. Ids, sizes and rectangles are numbers that were not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// What modes the screens want.
    GetDisplayInfo,
    /// A picture is made.
    Create {
        /// Its id.
        id: u32,
        /// Number of its format.
        format: u32,
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// It goes.
    Unref {
        /// Its id.
        id: u32,
    },
    /// A part of it is what a screen shows from now on; with id 0 the screen shows nothing.
    SetScanout {
        /// Which part.
        rect: Rect,
        /// Which screen.
        scanout: u32,
        /// Whose.
        id: u32,
    },
    /// A part of it is to be seen now.
    Flush {
        /// Which part.
        rect: Rect,
        /// Whose.
        id: u32,
    },
    /// A part of it is taken over from the guest's memory.
    Transfer {
        /// Which part.
        rect: Rect,
        /// Where its first pixel is in that memory; rows are as far from each other as in the whole picture.
        offset: u64,
        /// Whose.
        id: u32,
    },
    /// This is the guest's memory of it.
    Attach {
        /// Its id.
        id: u32,
        /// How many entries follow.
        entries: u32,
    },
    /// It has no memory in the guest any more.
    Detach {
        /// Its id.
        id: u32,
    },
    /// What a screen says of itself.
    GetEdid {
        /// Which screen.
        scanout: u32,
    },
}

/// A command of the cursor queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CursorCommand {
    /// The cursor's picture, which is a resource's (0: none), its place, and the pixel of it that points.
    Update {
        /// Where.
        position: CursorPosition,
        /// The picture.
        id: u32,
        /// Column that points.
        hot_x: u32,
        /// Row that points.
        hot_y: u32,
    },
    /// The cursor's place; with id 0 it is not shown.
    Move {
        /// Where.
        position: CursorPosition,
        /// Its picture, which stays.
        id: u32,
    },
}

/// Why a command is refused; what the guest hears of it is [`Refusal::status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Belongs to a feature that was not offered, or to nothing.
    #[error("command {0:#x} is unknown")]
    Command(u32),
    /// Ends before its last field.
    #[error("a command of {0} bytes is too short")]
    Short(u64),
    /// It, or what it points to, is outside guest memory.
    #[error("memory outside the guest's")]
    Memory,
    /// No such resource.
    #[error("there is no resource {0}")]
    NoResource(u32),
    /// There is one already, or it may not be called so.
    #[error("a resource cannot be called {0}")]
    Name(u32),
    /// No such format.
    #[error("format {0} is unknown")]
    Format(u32),
    /// No picture has that size.
    #[error("{0} by {1} pixels are too many or too few")]
    Size(u32, u32),
    /// All that a guest may have is in use.
    #[error("the memory for pictures, {0} MiB, is used up")]
    Budget(u64),
    /// There are as many as there can be.
    #[error("there are {0} already")]
    Count(usize),
    /// No such screen.
    #[error("there is no scanout {0}")]
    Scanout(u32),
    /// A rectangle that does not lie within its resource.
    #[error("{0:?} is not within its resource")]
    Rect(Rect),
    /// More than one memory.
    #[error("resource {0} has a backing already")]
    Backed(u32),
    /// No memory to take pixels from.
    #[error("resource {0} has no backing")]
    Unbacked(u32),
    /// Pixels beyond the end of it.
    #[error("the backing of resource {0} ends before the rectangle does")]
    Beyond(u32),
    /// More entries than one resource has.
    #[error("{0} entries are too many")]
    Entries(u32),
    /// A cursor of another size.
    #[error("a cursor of {0} by {1} pixels")]
    CursorSize(u32, u32),
    /// No such context.
    #[error("there is no context {0}")]
    NoContext(u32),
    /// There is one already, or it may not be called so.
    #[error("a context cannot be called {0}")]
    ContextName(u32),
    /// No resource is so.
    #[error("no resource has that target, size or number of levels, elements or samples")]
    Shape,
    /// A box that does not lie within its level.
    #[error("the box is not within level {level} of resource {id}")]
    Box {
        /// The resource.
        id: u32,
        /// Its level.
        level: u32,
    },
    /// Longer than any stream, or no whole number of words.
    #[error("a stream of {0} bytes")]
    Stream(u32),
    /// No such set of abilities.
    #[error("there is no capability set {0}")]
    Capset(u32),
    /// Memory that comes and goes cannot be lent to a renderer.
    #[error("the backing of resource {0} is not in memory that can be lent to a renderer")]
    Lent(u32),
    /// What a 2D resource is not for, or a 3D one.
    #[error("resource {0} is not of the kind that this is for")]
    Kind(u32),
    /// The renderer said no.
    #[error(transparent)]
    Renderer(#[from] Failed),
}

/// What the guest hears: VIRTIO_GPU_RESP_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0x1100,
    /// Not done.
    Unspecified = 0x1200,
    /// No memory for it.
    OutOfMemory = 0x1201,
    /// No such scanout.
    Scanout = 0x1202,
    /// No such resource.
    Resource = 0x1203,
    /// No such context.
    Context = 0x1204,
    /// A number that cannot be right.
    Parameter = 0x1205,
}

impl Status {
    /// By its number.
    pub fn from_number(number: u32) -> Option<Self> {
        let errors = [Self::OutOfMemory, Self::Scanout, Self::Resource, Self::Context, Self::Parameter];
        [Self::Ok, Self::Unspecified].into_iter().chain(errors).find(|status| *status as u32 == number)
    }
}

impl Refusal {
    /// What the guest hears.
    pub fn status(&self) -> Status {
        match self {
            Self::Command(_) | Self::Short(_) | Self::Backed(_) | Self::Unbacked(_) | Self::Lent(_) => {
                Status::Unspecified
            }
            Self::Renderer(_) => Status::Unspecified,
            Self::NoContext(_) | Self::ContextName(_) => Status::Context,
            Self::Budget(_) | Self::Count(_) | Self::Entries(_) => Status::OutOfMemory,
            Self::Scanout(_) => Status::Scanout,
            Self::NoResource(_) | Self::Name(_) => Status::Resource,
            Self::Memory
            | Self::Format(_)
            | Self::Size(..)
            | Self::Rect(_)
            | Self::Beyond(_)
            | Self::Shape
            | Self::Box { .. }
            | Self::Stream(_)
            | Self::Capset(_)
            | Self::Kind(_)
            | Self::CursorSize(..) => Status::Parameter,
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A word.
    Status(Status),
    /// To [`Command::GetDisplayInfo`].
    DisplayInfo(Box<DisplayInfo>),
    /// To [`Command::GetEdid`].
    Edid(Edid),
    /// What a capability set is: its number, its newest version, its bytes.
    CapsetInfo([u32; 3]),
    /// What it says.
    Capset(Arc<[u8]>),
}

impl Answer {
    /// The number that stands first in it.
    pub fn kind(&self) -> u32 {
        match self {
            Self::Status(status) => *status as u32,
            Self::DisplayInfo(_) => OK_DISPLAY_INFO,
            Self::Edid(_) => OK_EDID,
            Self::CapsetInfo(_) => OK_CAPSET_INFO,
            Self::Capset(_) => OK_CAPSET,
        }
    }

    /// As bytes, for who has room for so many. What does not fit becomes the word that it was not done; nothing, where not
    /// even that fits.
    pub fn encode(&self, asked: &Header, room: u64) -> Vec<u8> {
        let whole = HEADER_LEN
            + match self {
                Self::Status(_) => 0,
                Self::DisplayInfo(_) => DisplayInfo::LEN,
                Self::Edid(_) => Edid::LEN,
                Self::CapsetInfo(_) => 16,
                Self::Capset(bytes) => bytes.len(),
            };
        if room < HEADER_LEN as u64 {
            return Vec::new();
        }
        if room < whole as u64 {
            return Self::Status(Status::Unspecified).encode(asked, HEADER_LEN as u64);
        }
        let mut out = Vec::with_capacity(whole);
        out.extend(self.kind().to_le_bytes());
        if asked.flags & FENCE == 0 {
            out.resize(HEADER_LEN, 0);
        } else {
            out.extend(FENCE.to_le_bytes());
            out.extend(asked.fence.to_le_bytes());
            out.extend(asked.context.to_le_bytes());
            out.extend([0; 4]);
        }
        match self {
            Self::Status(_) => {}
            Self::DisplayInfo(info) => info.put(&mut out),
            Self::Edid(edid) => edid.put(&mut out),
            Self::CapsetInfo(words) => {
                out.extend([words.as_slice(), &[0]].concat().iter().flat_map(|w| w.to_le_bytes()));
            }
            Self::Capset(bytes) => out.extend_from_slice(bytes),
        }
        out
    }
}

/// A cursor over a command's bytes.
pub(crate) struct Fields<'a> {
    whole: u64,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Over what follows a header.
    pub(crate) fn of(body: &'a [u8]) -> Self {
        Self { whole: (HEADER_LEN + body.len()) as u64, rest: body }
    }
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>().ok_or(Refusal::Short(self.whole))?;
        self.rest = rest;
        Ok(*bytes)
    }
    pub(crate) fn u32(&mut self) -> Result<u32, Refusal> {
        self.take().map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self) -> Result<u64, Refusal> {
        self.take().map(u64::from_le_bytes)
    }
    fn rect(&mut self) -> Result<Rect, Refusal> {
        Ok(Rect { x: self.u32()?, y: self.u32()?, width: self.u32()?, height: self.u32()? })
    }
}

impl Header {
    /// The header of a command, and what follows it.
    ///
    /// # Errors
    /// [`Refusal::Short`].
    pub fn read(bytes: &[u8]) -> Result<(Self, &[u8]), Refusal> {
        let mut fields = Fields { whole: bytes.len() as u64, rest: bytes };
        let (kind, flags, fence, context) = (fields.u32()?, fields.u32()?, fields.u64()?, fields.u32()?);
        // Index of a ring of a context, which nobody has, and padding.
        fields.take::<4>()?;
        Ok((Self { kind, flags, fence, context }, fields.rest))
    }
}

impl Command {
    /// Reads what follows a header.
    ///
    /// # Errors
    /// [`Refusal::Command`] and [`Refusal::Short`].
    pub fn read(header: &Header, body: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Fields::of(body);
        Ok(match header.kind {
            GET_DISPLAY_INFO => Self::GetDisplayInfo,
            RESOURCE_CREATE_2D => {
                Self::Create { id: fields.u32()?, format: fields.u32()?, width: fields.u32()?, height: fields.u32()? }
            }
            RESOURCE_UNREF => Self::Unref { id: fields.u32()? },
            SET_SCANOUT => Self::SetScanout { rect: fields.rect()?, scanout: fields.u32()?, id: fields.u32()? },
            RESOURCE_FLUSH => Self::Flush { rect: fields.rect()?, id: fields.u32()? },
            TRANSFER_TO_HOST_2D => Self::Transfer { rect: fields.rect()?, offset: fields.u64()?, id: fields.u32()? },
            RESOURCE_ATTACH_BACKING => Self::Attach { id: fields.u32()?, entries: fields.u32()? },
            RESOURCE_DETACH_BACKING => Self::Detach { id: fields.u32()? },
            GET_EDID => Self::GetEdid { scanout: fields.u32()? },
            other => return Err(Refusal::Command(other)),
        })
    }
}

impl CursorCommand {
    /// Reads what follows a header.
    ///
    /// # Errors
    /// [`Refusal::Command`] and [`Refusal::Short`].
    pub fn read(header: &Header, body: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Fields::of(body);
        if !matches!(header.kind, UPDATE_CURSOR | MOVE_CURSOR) {
            return Err(Refusal::Command(header.kind));
        }
        let position = CursorPosition { scanout: fields.u32()?, x: fields.u32()?, y: fields.u32()? };
        fields.u32()?;
        let (id, hot_x, hot_y) = (fields.u32()?, fields.u32()?, fields.u32()?);
        Ok(match header.kind {
            UPDATE_CURSOR => Self::Update { position, id, hot_x, hot_y },
            _ => Self::Move { position, id },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn command(kind: u32, body: &[u32]) -> Result<Command, Refusal> {
        Command::read(&Header { kind, ..Header::default() }, &bytes(body))
    }

    #[test]
    fn commands_are_read_as_the_specification_lays_them_out() {
        let rect = Rect { x: 1, y: 2, width: 3, height: 4 };
        assert_eq!(command(0x100, &[]), Ok(Command::GetDisplayInfo));
        assert_eq!(
            command(0x101, &[7, 2, 640, 480]),
            Ok(Command::Create { id: 7, format: 2, width: 640, height: 480 })
        );
        assert_eq!(command(0x102, &[7, 0]), Ok(Command::Unref { id: 7 }));
        assert_eq!(command(0x103, &[1, 2, 3, 4, 5, 7]), Ok(Command::SetScanout { rect, scanout: 5, id: 7 }));
        assert_eq!(command(0x104, &[1, 2, 3, 4, 7, 0]), Ok(Command::Flush { rect, id: 7 }));
        let offset = 6 << 32 | 5;
        assert_eq!(command(0x105, &[1, 2, 3, 4, 5, 6, 7, 0]), Ok(Command::Transfer { rect, offset, id: 7 }));
        assert_eq!(command(0x106, &[7, 1]), Ok(Command::Attach { id: 7, entries: 1 }));
        assert_eq!(command(0x107, &[7, 0]), Ok(Command::Detach { id: 7 }));
        assert_eq!(command(0x10a, &[1, 0]), Ok(Command::GetEdid { scanout: 1 }));
        for unknown in [0, 0xff, 0x108, 0x10b, 0x10c, 0x200, 0x300, u32::MAX] {
            assert_eq!(command(unknown, &[0; 8]), Err(Refusal::Command(unknown)));
        }
        assert_eq!(command(0x101, &[7, 2, 640]), Err(Refusal::Short(36)));
        let cursor = |kind, body: &[u32]| CursorCommand::read(&Header { kind, ..Header::default() }, &bytes(body));
        let position = CursorPosition { scanout: 1, x: 2, y: 3 };
        let update = CursorCommand::Update { position, id: 4, hot_x: 5, hot_y: 6 };
        assert_eq!(cursor(0x300, &[1, 2, 3, 0, 4, 5, 6, 0]), Ok(update));
        assert_eq!(cursor(0x301, &[1, 2, 3, 0, 4, 5, 6, 0]), Ok(CursorCommand::Move { position, id: 4 }));
        assert_eq!(cursor(0x301, &[1, 2, 3, 0]), Err(Refusal::Short(40)));
    }

    #[test]
    fn a_fence_comes_back_and_what_does_not_fit_is_not_done() {
        let asked = Header { kind: 0x100, flags: 1, fence: 0x1_0000_0002, context: 3 };
        let done = Answer::Status(Status::Ok).encode(&asked, 24);
        assert_eq!(done, bytes(&[0x1100, 1, 2, 1, 3, 0]));
        assert_eq!(Answer::Status(Status::Ok).encode(&Header::default(), 99), bytes(&[0x1100, 0, 0, 0, 0, 0]));
        let info = Answer::DisplayInfo(Box::default());
        assert_eq!(info.encode(&asked, 408).len(), 408);
        assert_eq!(info.encode(&asked, 407), bytes(&[0x1200, 1, 2, 1, 3, 0]));
        assert!(info.encode(&asked, 23).is_empty());
        assert_eq!(Answer::Edid(Edid::new(vec![1; 128])).encode(&asked, 2000).len(), 24 + 8 + 1024);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_command_or_an_error(data in prop::collection::vec(any::<u8>(), 0..80), kind in 0x100_u32..0x110) {
            let _ = Header::read(&data).map(|(header, body)| (Command::read(&header, body), CursorCommand::read(&header, body)));
            let _ = Command::read(&Header { kind, ..Header::default() }, &data);
        }
    }
}
