//! What a screen answers, and the one thing that it says unasked. Display information and EDID are the structures of virtio-gpu
//! (virtio 1.2, 5.7.6.8): the device hands the same bytes to its guest.

use super::{Features, Fields, HEADER_LEN, Header, Put, Rect, WireError, code};

/// Scanouts of any device (VIRTIO_GPU_MAX_SCANOUTS).
pub const SCANOUTS_MAX: usize = 16;
/// Most bytes of an EDID.
pub const EDID_MAX: usize = 1024;

/// VIRTIO_GPU_RESP_OK_DISPLAY_INFO.
const OK_DISPLAY_INFO: u32 = 0x1101;
/// VIRTIO_GPU_RESP_OK_EDID.
const OK_EDID: u32 = 0x1104;
/// Bytes of a control header (virtio 1.2, 5.7.6.7), all zero here but for the type.
const CONTROL_HEADER: usize = 24;

/// What is asked of one scanout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Screen {
    /// Where it is beside the others, and how large it should be.
    pub rect: Rect,
    /// Somebody looks at it.
    pub enabled: bool,
    /// Nothing is defined yet.
    pub flags: u32,
}

/// What is asked of all scanouts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DisplayInfo {
    /// One after the other; those that a device does not have are zero.
    pub screens: [Screen; SCANOUTS_MAX],
}

impl DisplayInfo {
    /// Bytes of what follows the control header.
    pub const LEN: usize = SCANOUTS_MAX * 24;

    /// Appends what follows the control header.
    pub fn put(&self, out: &mut Vec<u8>) {
        for screen in &self.screens {
            out.rect(screen.rect);
            out.words(&[u32::from(screen.enabled), screen.flags]);
        }
    }
    fn take(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        let mut info = Self::default();
        for screen in &mut info.screens {
            let (rect, enabled, flags) = (fields.rect()?, fields.u32()?, fields.u32()?);
            *screen = Screen { rect, enabled: enabled != 0, flags };
        }
        Ok(info)
    }
}

/// An EDID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edid(Vec<u8>);

impl Edid {
    /// Bytes of what follows the control header.
    pub const LEN: usize = 8 + EDID_MAX;

    /// One of at most [`EDID_MAX`] bytes; what is beyond is cut.
    #[must_use]
    pub fn new(mut bytes: Vec<u8>) -> Self {
        bytes.truncate(EDID_MAX);
        Self(bytes)
    }
    /// The same with zeroes behind it up to [`EDID_MAX`] bytes. So large is what QEMU says on the wire, whatever its blocks are, and
    /// a backend (vhost-device-gpu 0.1) takes nothing else; how many blocks count is in the EDID itself.
    #[must_use]
    pub fn filled(mut self) -> Self {
        self.0.resize(EDID_MAX, 0);
        self
    }
    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
    /// Appends what follows the control header.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.words(&[self.0.len() as u32, 0]);
        out.extend(&self.0);
        out.resize(out.len() + EDID_MAX - self.0.len(), 0);
    }
    fn take(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        let (size, _padding) = (fields.u32()?, fields.u32()?);
        let bytes = fields.chunk::<EDID_MAX>()?;
        let bytes = bytes.get(..size as usize).ok_or(fields.wrong("size", size))?;
        Ok(Self(bytes.to_vec()))
    }
}

/// A message of a screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To GET_PROTOCOL_FEATURES.
    Features(Features),
    /// To GET_DISPLAY_INFO.
    DisplayInfo(Box<DisplayInfo>),
    /// To GET_EDID.
    Edid(Edid),
    /// Unasked: what GET_DISPLAY_INFO would be answered is not what it was.
    Changed,
    /// The frame was read from memory: there may be another one.
    Taken,
}

impl Reply {
    /// Its number.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::Features(_) => code::GET_FEATURES,
            Self::DisplayInfo(_) => code::GET_DISPLAY_INFO,
            Self::Edid(_) => code::GET_EDID,
            Self::Changed => code::CHANGED,
            Self::Taken => code::TAKEN,
        }
    }

    /// Appends the whole message to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        match self {
            Self::Features(features) => payload.extend(features.0.to_le_bytes()),
            Self::DisplayInfo(info) => {
                put_control(&mut payload, OK_DISPLAY_INFO);
                info.put(&mut payload);
            }
            Self::Edid(edid) => {
                put_control(&mut payload, OK_EDID);
                edid.put(&mut payload);
            }
            Self::Changed | Self::Taken => {}
        }
        let reply = !matches!(self, Self::Changed | Self::Taken);
        out.reserve(HEADER_LEN + payload.len());
        out.extend(Header { code: self.code(), reply, payload: payload.len() as u32 }.encode());
        out.extend(payload);
    }

    /// From a message's header and what follows it.
    ///
    /// # Errors
    /// [`WireError`]: nothing that cannot be right gets past here.
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(header.code, payload);
        let reply = match (header.code, header.reply) {
            (code::GET_FEATURES, true) => Self::Features(Features(fields.u64()?)),
            (code::GET_DISPLAY_INFO, true) => {
                control(&mut fields, OK_DISPLAY_INFO)?;
                Self::DisplayInfo(Box::new(DisplayInfo::take(&mut fields)?))
            }
            (code::GET_EDID, true) => {
                control(&mut fields, OK_EDID)?;
                Self::Edid(Edid::take(&mut fields)?)
            }
            (code::CHANGED, false) => Self::Changed,
            (code::TAKEN, false) => Self::Taken,
            (other, _) => return Err(WireError::Code(other)),
        };
        fields.end()?;
        Ok(reply)
    }
}

fn put_control(out: &mut Vec<u8>, kind: u32) {
    out.words(&[kind]);
    out.resize(out.len() + CONTROL_HEADER - 4, 0);
}

/// Takes a control header; what is not the type has no meaning here.
fn control(fields: &mut Fields<'_>, kind: u32) -> Result<(), WireError> {
    let found = fields.u32()?;
    fields.chunk::<{ CONTROL_HEADER - 4 }>()?;
    if found == kind { Ok(()) } else { Err(fields.wrong("type", found)) }
}
