//! A picture as a file: PNG, without the fourth byte of each pixel, which means nothing.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use png::{BitDepth, ColorType, Compression, Encoder};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use thiserror::Error;

use crate::picture::Picture;

/// Why there is no picture.
#[derive(Debug, Error)]
pub enum ShotError {
    /// Nothing is shown.
    #[error("head {0} shows nothing: wait until its guest does, or choose another")]
    Dark(usize),
    /// It cannot be written down.
    #[error("the picture cannot be encoded: {0}")]
    Encode(#[from] png::EncodingError),
    /// Without memory or descriptors.
    #[error("the picture cannot be kept: {0}")]
    Io(#[from] io::Error),
}

/// Red, green and blue of each pixel.
#[must_use]
pub fn rgb(pixels: &[u8]) -> Vec<u8> {
    pixels.as_chunks::<4>().0.iter().flat_map(|[blue, green, red, _]| [*red, *green, *blue]).collect()
}

/// A picture as PNG.
///
/// # Errors
/// [`ShotError`].
pub fn png(picture: &Picture) -> Result<Vec<u8>, ShotError> {
    let (width, height) = picture.size();
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb(picture.pixels()))?;
    writer.finish()?;
    Ok(bytes)
}

/// Bytes in a memfd that nobody can change any more.
///
/// # Errors
/// [`ShotError::Io`].
pub fn sealed(bytes: &[u8]) -> Result<OwnedFd, ShotError> {
    let fd = memfd_create("screenshot", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(io::Error::from)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
    Ok(file.into())
}
