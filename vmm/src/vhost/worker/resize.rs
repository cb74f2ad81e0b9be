//! A disk gets another size while its guest runs.
//!
//! The VMM changes the image, the backend is told to look, and only then the guest learns of it, so that a request to what
//! is new never meets a backend that does not know it. A backend that dies or keeps silent on the way is replaced, and its
//! successor shows the new size: the one thing that may differ from what the guest was shown.

use thiserror::Error;

use super::Worker;
use crate::backend::ImageError;
use crate::machine::NewSize;
use crate::vhost::device::lock;
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::patience::Patience;
use atoll_devices::virtio::device_class;

/// Bytes of a virtio sector.
const SECTOR: u64 = 512;
/// Where the configuration space has the block size (virtio 1.2, 5.2.4).
const BLOCK_SIZE_AT: usize = 20;
/// Writes that were under way can make an image longer again that was just cut; that often it is cut once more.
const TRIES: u32 = 3;

/// Why a device keeps its size.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// It is no disk.
    #[error("the device has no size that could be changed")]
    NoSize,
    /// Somebody else's backend has the image.
    #[error("somebody else's backend serves the disk: resize its image there, and the backend tells the guest")]
    NotOurs,
    /// Its size is in its header, which a process that serves it does not change.
    #[error("the disk's image is qcow2: change its size with `qemu-img resize` while no VM uses it")]
    Qcow2,
    /// No whole number of blocks.
    #[error("a size of {bytes} bytes is not possible: it must be a multiple of {unit}, and not zero")]
    Unit {
        /// What was asked for.
        bytes: u64,
        /// Block size.
        unit: u64,
    },
    /// It would be cut, and nobody has said that it may be.
    #[error(
        "the disk has {is} bytes, and what lies behind the first {asked} would be gone: if that is meant, say allow_shrink (atoll \
         resize-disk --shrink)"
    )]
    Smaller {
        /// What was asked for.
        asked: u64,
        /// What it has.
        is: u64,
    },
    /// The image cannot be changed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A block device keeps its size.
    #[error("the disk's block device has {is} bytes: give it {asked} bytes first, then ask again")]
    Fixed {
        /// What was asked for.
        asked: u64,
        /// What it has.
        is: u64,
    },
    /// The backend sees another size.
    #[error("the backend sees {is} bytes where {asked} were asked for: look at its log")]
    Seen {
        /// What was asked for.
        asked: u64,
        /// What it sees.
        is: u64,
    },
    /// The device's thread is busy with something that takes longer than anything of its own may.
    #[error("no answer within {} s; see with `atoll info` whether the size has changed, and try again", .0.as_secs())]
    Late(std::time::Duration),
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}

impl ResizeError {
    /// Whether asking for something else would do.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::NoSize
            | Self::NotOurs
            | Self::Qcow2
            | Self::Unit { .. }
            | Self::Smaller { .. }
            | Self::Fixed { .. } => true,
            Self::Image(_) | Self::Seen { .. } | Self::Late(_) | Self::Stopped => false,
        }
    }
}

impl Worker {
    pub(super) fn resize(&mut self, size: NewSize) -> Result<(), ResizeError> {
        let bytes = size.bytes;
        let shown = &self.past.shown;
        if shown.device_type != device_class::BLOCK {
            return Err(ResizeError::NoSize);
        }
        let word = |at: usize| shown.config.get(at..).and_then(|rest| rest.first_chunk::<4>());
        let unit = word(BLOCK_SIZE_AT).map_or(SECTOR, |bytes| u64::from(u32::from_le_bytes(*bytes)).max(SECTOR));
        if bytes == 0 || !bytes.is_multiple_of(unit) {
            return Err(ResizeError::Unit { bytes, unit });
        }
        let before = shown.config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)).saturating_mul(SECTOR);
        if bytes < before && !size.allow_shrink {
            return Err(ResizeError::Smaller { asked: bytes, is: before });
        }
        self.change_image(bytes)?;
        let device = &self.shared.name;
        if bytes < before {
            tracing::warn!(device, before, bytes, "the disk was cut: what lay behind is gone");
        } else {
            tracing::info!(device, before, bytes, "the disk has another size");
        }
        // From here on the new size is the truth, whoever serves it.
        self.past.capacity = Some(bytes / SECTOR);
        self.outdate_spare();
        for _ in 0..TRIES {
            let Some(session) = &mut self.past.session else { return Ok(()) };
            let Some(process) = &mut session.process else { return Err(ResizeError::NotOurs) };
            let mut patience = Patience::new(self.parts.limits.step, &self.shared.ending);
            match process.measure(&mut patience) {
                Ok(is) if is == bytes => {
                    self.config_is_stale = true;
                    self.update_config();
                    return Ok(());
                }
                Ok(is) if is < bytes => return Err(ResizeError::Seen { asked: bytes, is }),
                Ok(_) => self.change_image(bytes)?,
                Err(reason) => {
                    self.lose(&ConversationError::Gone { step: Step::Measure, reason });
                    return Ok(());
                }
            }
        }
        Err(ResizeError::Seen { asked: bytes, is: before })
    }

    fn change_image(&mut self, bytes: u64) -> Result<(), ResizeError> {
        let is = lock(&self.parts.makers.source).resize(bytes)?;
        if is == bytes { Ok(()) } else { Err(ResizeError::Fixed { asked: bytes, is }) }
    }
}
