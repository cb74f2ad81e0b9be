//! A stock guest with Debian's full kernel that paints its frame buffer: what every picture of a screen is compared with.

use crate::console::Console;
use crate::{full_kernel, images};
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The drivers of the guest.
const DRIVERS: [&str; 4] = ["virtio_pci", "virtio_gpu", "virtio_input", "evdev"];
/// How long a step of the guest may take.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Pictures that the guest has as `/frame0`, `/frame1`, …
#[derive(Clone, Copy, Debug)]
pub struct Painting {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// How many there are.
    pub frames: u8,
}

impl Painting {
    /// One, as large as a screen is by default.
    pub const USUAL: Self = Self { width: 1280, height: 800, frames: 1 };

    /// Red, green and blue of a pixel; no two places look alike by mistake, nor two pictures at one place.
    #[must_use]
    pub fn pixel(frame: u8, x: usize, y: usize) -> [u8; 3] {
        let [red, green, blue] = [(x * 5 + y) as u8, (y * 3) as u8 ^ (x >> 2) as u8, (x * y / 64) as u8];
        let step = frame.wrapping_mul(29);
        [red.wrapping_add(step), green ^ frame, blue.wrapping_sub(step)]
    }

    fn places(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.height).flat_map(move |y| (0..self.width).map(move |x| (x, y)))
    }

    /// As the guest's frame buffer has it (XRGB8888, little endian).
    fn bytes(self, frame: u8) -> Vec<u8> {
        let pixel = |(x, y)| {
            let [red, green, blue] = Self::pixel(frame, x, y);
            [blue, green, red, 0]
        };
        self.places().flat_map(pixel).collect()
    }

    /// How many pixels (three bytes each) are not those of this picture.
    #[must_use]
    pub fn wrong(self, frame: u8, (width, height): (usize, usize), pixels: &[u8]) -> usize {
        self.none_of(&[frame], (width, height), pixels)
    }

    /// How many pixels are of none of these pictures.
    #[must_use]
    pub fn none_of(self, frames: &[u8], (width, height): (usize, usize), pixels: &[u8]) -> usize {
        if (width, height) != (self.width, self.height) || pixels.len() != 3 * width * height {
            return self.width * self.height;
        }
        let of_none = |((x, y), seen): &((usize, usize), &[u8])| {
            !frames.iter().any(|frame| Self::pixel(*frame, *x, *y) == **seen)
        };
        self.places().zip(pixels.chunks(3)).filter(of_none).count()
    }

    /// The initramfs of a guest with the drivers of screens and keyboards, and the pictures, in `folder`.
    ///
    /// # Errors
    /// A package cannot be had.
    pub fn initramfs(self, folder: &Path) -> Result<PathBuf> {
        let guest = images::guest("6.1")?;
        let mut bytes = std::fs::read(&guest.initramfs)?;
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let frames: Vec<(String, Vec<u8>)> =
            (0..self.frames).map(|frame| (format!("frame{frame}"), self.bytes(frame))).collect();
        let files: Vec<(&str, &[u8])> = frames.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        bytes.extend(full_kernel::archive(&DRIVERS, &files)?);
        let path = folder.join("initramfs");
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    /// Loads the drivers and waits for the frame buffer, which is nobody's then.
    ///
    /// # Errors
    /// The guest does not have it.
    pub fn ready(self, console: &mut Console) -> Result<()> {
        console.run("for M in /modules/full/*.ko; do insmod $M || exit 1; done", STEP_LIMIT)?;
        console
            .run("until [ -e /sys/class/graphics/fb0 ]; do sleep 0.1; done; mdev -s; [ -c /dev/fb0 ]", STEP_LIMIT)?;
        let size = console.run("cat /sys/class/graphics/fb0/virtual_size", STEP_LIMIT)?;
        ensure!(size == format!("{},{}", self.width, self.height), "the guest's frame buffer has {size} pixels");
        // Nobody else paints.
        console.run("for C in /sys/class/vtconsole/*; do echo 0 > $C/bind; done; true", STEP_LIMIT)?;
        Ok(())
    }
}

/// Paints, in one piece.
///
/// # Errors
/// The guest cannot.
pub fn paint(console: &mut Console, frame: u8) -> Result<()> {
    console.run(&format!("cat /frame{frame} > /dev/fb0"), STEP_LIMIT).map(drop)
}

/// Nothing in the guest's log is about its GPU.
///
/// # Errors
/// Something is.
pub fn nobody_complains(console: &mut Console) -> Result<()> {
    let bad = console.run("dmesg | grep -iE 'drm.*error|virtio_gpu.*(error|fail|response)' || true", STEP_LIMIT)?;
    ensure!(bad.is_empty(), "the guest's kernel complains: {bad}");
    Ok(())
}
