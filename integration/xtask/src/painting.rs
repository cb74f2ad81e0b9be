//! A stock guest with Debian's full kernel that paints its frame buffer: what every picture of a screen is compared with.

use crate::console::Console;
use crate::{full_kernel, images};
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The drivers of the guest.
const DRIVERS: [&str; 4] = ["virtio_pci", "virtio_gpu", "virtio_input", "evdev"];
/// What a screen is by default, in pixels.
pub const WIDTH: usize = 1280;
/// As above.
pub const HEIGHT: usize = 800;
/// How long a step of the guest may take.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// A picture in which no two places look alike by mistake: red, green and blue of each pixel.
pub fn pixel(x: usize, y: usize) -> [u8; 3] {
    [(x * 5 + y) as u8, (y * 3) as u8 ^ (x >> 2) as u8, (x * y / 64) as u8]
}

/// As the guest's frame buffer has it (XRGB8888, little endian).
fn frame() -> Vec<u8> {
    let places = (0..HEIGHT).flat_map(|y| (0..WIDTH).map(move |x| (x, y)));
    places
        .flat_map(|(x, y)| {
            let [red, green, blue] = pixel(x, y);
            [blue, green, red, 0]
        })
        .collect()
}

/// How many pixels are not as they should be.
pub fn wrong(width: usize, height: usize, pixels: &[u8]) -> usize {
    if (width, height) != (WIDTH, HEIGHT) || pixels.len() != 3 * WIDTH * HEIGHT {
        return WIDTH * HEIGHT;
    }
    let places = (0..HEIGHT).flat_map(|y| (0..WIDTH).map(move |x| (x, y)));
    places.zip(pixels.chunks(3)).filter(|((x, y), seen)| pixel(*x, *y) != **seen).count()
}

/// The initramfs of a guest with the drivers of screens and keyboards, and the picture as `/frame`, in `folder`.
///
/// # Errors
/// A package cannot be had.
pub fn initramfs(folder: &Path) -> Result<PathBuf> {
    let guest = images::guest("6.1")?;
    let mut bytes = std::fs::read(&guest.initramfs)?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend(full_kernel::archive(&DRIVERS, &[("frame", &frame())])?);
    let path = folder.join("initramfs");
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// Loads the drivers and waits for the frame buffer, which is nobody's then.
///
/// # Errors
/// The guest does not have it.
pub fn ready(console: &mut Console) -> Result<()> {
    console.run("for M in /modules/full/*.ko; do insmod $M || exit 1; done", STEP_LIMIT)?;
    console.run("until [ -e /sys/class/graphics/fb0 ]; do sleep 0.1; done; mdev -s; [ -c /dev/fb0 ]", STEP_LIMIT)?;
    let size = console.run("cat /sys/class/graphics/fb0/virtual_size", STEP_LIMIT)?;
    ensure!(size == format!("{WIDTH},{HEIGHT}"), "the guest's frame buffer has {size} pixels");
    // Nobody else paints.
    console.run("for C in /sys/class/vtconsole/*; do echo 0 > $C/bind; done; true", STEP_LIMIT)?;
    Ok(())
}

/// Paints, in one piece.
///
/// # Errors
/// The guest cannot.
pub fn paint(console: &mut Console) -> Result<()> {
    console.run("cat /frame > /dev/fb0", STEP_LIMIT).map(drop)
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
