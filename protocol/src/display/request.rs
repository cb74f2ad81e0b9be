//! What a device asks and tells.

use super::{Features, Fields, HEADER_LEN, Header, PIXEL_BYTES, PIXELS_MAX, Put, REQUEST_MAX, Rect, WireError, code};

/// Side of a cursor's square, in pixels.
pub const CURSOR_SIDE: u32 = 64;
/// Bytes of a cursor's picture: blue, green, red, alpha for each pixel.
pub const CURSOR_BYTES: usize = (CURSOR_SIDE * CURSOR_SIDE) as usize * PIXEL_BYTES;

/// Where a cursor is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CursorPosition {
    /// On which scanout.
    pub scanout: u32,
    /// Column; a driver that has its cursor beyond the left edge wraps around.
    pub x: u32,
    /// Row, likewise.
    pub y: u32,
}

/// A message of a device. Pictures are borrowed from the buffer that they were received in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// GET_PROTOCOL_FEATURES, answered.
    GetFeatures,
    /// SET_PROTOCOL_FEATURES.
    SetFeatures(Features),
    /// GET_DISPLAY_INFO, answered.
    GetDisplayInfo,
    /// CURSOR_POS: the cursor is shown there.
    CursorPosition(CursorPosition),
    /// CURSOR_POS_HIDE: it is there and not shown.
    CursorHide(CursorPosition),
    /// CURSOR_UPDATE: what it looks like.
    CursorUpdate {
        /// Where it is.
        position: CursorPosition,
        /// The column of the picture that points.
        hot_x: u32,
        /// The row of it.
        hot_y: u32,
        /// The picture.
        picture: &'a [u8; CURSOR_BYTES],
    },
    /// SCANOUT: how large a picture is; 0 by 0 when there is none any more.
    Scanout {
        /// Which.
        scanout: u32,
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// UPDATE: a part of a picture.
    Update {
        /// Of which.
        scanout: u32,
        /// Where.
        rect: Rect,
        /// Row by row, no gaps.
        pixels: &'a [u8],
    },
    /// GET_EDID, answered.
    GetEdid {
        /// Of which scanout.
        scanout: u32,
    },
    /// Beside it comes a memfd of so many bytes, sealed against being cut, for frames from now on.
    FrameMemory {
        /// Its length in bytes, [`PIXELS_MAX`] at most.
        len: u64,
    },
    /// A part of a picture, whose pixels are at the beginning of that memory; answered by [`Reply::Taken`](super::Reply::Taken).
    Frame {
        /// Of which.
        scanout: u32,
        /// Where.
        rect: Rect,
    },
}

/// Bytes of the pixels of a rectangle.
#[must_use]
pub fn pixel_bytes(rect: Rect) -> usize {
    (rect.width as usize).saturating_mul(rect.height as usize).saturating_mul(PIXEL_BYTES)
}

/// Bytes of an update's message between its header and its pixels.
pub const UPDATE_HEAD: usize = 20;

/// Begins an update's message in `out`, header included; the pixels of `rect` are to be appended, no more and no less.
pub fn begin_update(out: &mut Vec<u8>, scanout: u32, rect: Rect) {
    let payload = u32::try_from(pixel_bytes(rect).saturating_add(UPDATE_HEAD)).unwrap_or(u32::MAX).min(REQUEST_MAX);
    out.reserve(HEADER_LEN + payload as usize);
    out.extend(Header { code: code::UPDATE, reply: false, payload }.encode());
    out.words(&[scanout]);
    out.rect(rect);
}

impl<'a> Request<'a> {
    /// Its number.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::GetFeatures => code::GET_FEATURES,
            Self::SetFeatures(_) => code::SET_FEATURES,
            Self::GetDisplayInfo => code::GET_DISPLAY_INFO,
            Self::CursorPosition(_) => code::CURSOR_POS,
            Self::CursorHide(_) => code::CURSOR_POS_HIDE,
            Self::CursorUpdate { .. } => code::CURSOR_UPDATE,
            Self::Scanout { .. } => code::SCANOUT,
            Self::Update { .. } => code::UPDATE,
            Self::GetEdid { .. } => code::GET_EDID,
            Self::FrameMemory { .. } => code::FRAME_MEMORY,
            Self::Frame { .. } => code::FRAME,
        }
    }

    /// Appends the whole message to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        if let Self::Update { scanout, rect, pixels } = *self {
            begin_update(out, scanout, rect);
            out.extend(pixels);
            return;
        }
        let at = out.len();
        out.resize(at + HEADER_LEN, 0);
        match *self {
            Self::GetFeatures | Self::GetDisplayInfo | Self::Update { .. } => {}
            Self::SetFeatures(features) => out.extend(features.0.to_le_bytes()),
            Self::CursorPosition(position) | Self::CursorHide(position) => put_position(out, position),
            Self::CursorUpdate { position, hot_x, hot_y, picture } => {
                put_position(out, position);
                out.words(&[hot_x, hot_y]);
                out.extend(picture);
            }
            Self::Scanout { scanout, width, height } => out.words(&[scanout, width, height]),
            Self::GetEdid { scanout } => out.words(&[scanout]),
            Self::FrameMemory { len } => out.extend(len.to_le_bytes()),
            Self::Frame { scanout, rect } => {
                out.words(&[scanout]);
                out.rect(rect);
            }
        }
        let payload = (out.len() - at - HEADER_LEN) as u32;
        let header = Header { code: self.code(), reply: false, payload }.encode();
        if let Some(to) = out.get_mut(at..at + HEADER_LEN) {
            to.copy_from_slice(&header);
        }
    }

    /// From a message's number and what follows its header.
    ///
    /// # Errors
    /// [`WireError`]: nothing that cannot be right gets past here.
    pub fn decode(code: u32, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(code, payload);
        let request = match code {
            code::GET_FEATURES => Self::GetFeatures,
            code::SET_FEATURES => Self::SetFeatures(Features(fields.u64()?)),
            code::GET_DISPLAY_INFO => Self::GetDisplayInfo,
            code::CURSOR_POS => Self::CursorPosition(position(&mut fields)?),
            code::CURSOR_POS_HIDE => Self::CursorHide(position(&mut fields)?),
            code::CURSOR_UPDATE => {
                let position = position(&mut fields)?;
                let (hot_x, hot_y) = (fields.u32()?, fields.u32()?);
                Self::CursorUpdate { position, hot_x, hot_y, picture: fields.chunk()? }
            }
            code::SCANOUT => {
                let (scanout, width, height) = (fields.scanout()?, fields.u32()?, fields.u32()?);
                if (width == 0) != (height == 0) {
                    return Err(fields.wrong("height", height));
                }
                Self::Scanout { scanout, width, height }
            }
            code::UPDATE => return update(fields),
            code::GET_EDID => Self::GetEdid { scanout: fields.scanout()? },
            code::FRAME_MEMORY => {
                let len = fields.u64()?;
                if len > PIXELS_MAX as u64 {
                    return Err(fields.wrong("length", u32::try_from(len).unwrap_or(u32::MAX)));
                }
                Self::FrameMemory { len }
            }
            code::FRAME => {
                let (scanout, rect) = (fields.scanout()?, part(&mut fields)?);
                Self::Frame { scanout, rect }
            }
            code::DMABUF_SCANOUT | code::DMABUF_UPDATE | code::DMABUF_SCANOUT2 => return Err(WireError::Dmabuf(code)),
            other => return Err(WireError::Code(other)),
        };
        fields.end()?;
        Ok(request)
    }
}

fn put_position(out: &mut Vec<u8>, position: CursorPosition) {
    out.words(&[position.scanout, position.x, position.y]);
}

fn position(fields: &mut Fields<'_>) -> Result<CursorPosition, WireError> {
    Ok(CursorPosition { scanout: fields.scanout()?, x: fields.u32()?, y: fields.u32()? })
}

fn update(mut fields: Fields<'_>) -> Result<Request<'_>, WireError> {
    let (scanout, rect) = (fields.scanout()?, part(&mut fields)?);
    Ok(Request::Update { scanout, rect, pixels: fields.exactly(pixel_bytes(rect))? })
}

/// A part of a picture that can be, with pixels that one update may have.
fn part(fields: &mut Fields<'_>) -> Result<Rect, WireError> {
    let rect = fields.rect()?;
    if rect.width == 0 || rect.x.checked_add(rect.width).is_none() {
        return Err(fields.wrong("width", rect.width));
    }
    if rect.height == 0 || rect.y.checked_add(rect.height).is_none() || pixel_bytes(rect) > PIXELS_MAX {
        return Err(fields.wrong("height", rect.height));
    }
    Ok(rect)
}
