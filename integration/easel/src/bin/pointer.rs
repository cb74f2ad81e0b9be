//! A pointer on the first screen of `/dev/dri/card0`, as a desktop has one: the GPU shows it above the picture, which is grey here.
//!
//! What it does is typed, a line each: `show FILE X Y` (64 by 64 pixels of four bytes: blue, green, red and how much there is; and
//! which of them points), `move X Y`, `hide`. It says when that is done, and ends with its input.

#![allow(clippy::print_stdout, reason = "a program for a shell")]
#![allow(deprecated, reason = "a plane has no property for the pixel that points, in the kernels that are tested")]

use std::fs::{File, OpenOptions};
use std::io::BufRead as _;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail, ensure};
use drm::Device;
use drm::buffer::{Buffer as _, DrmFourcc};
use drm::control::dumbbuffer::DumbBuffer;
use drm::control::{Device as Screens, connector, crtc};

/// Columns and rows of a pointer that a virtio GPU has.
const SIDE: u32 = 64;
const BYTES: usize = 4;
/// What the picture is made of.
const GREY: u8 = 0x40;

struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl Device for Card {}
impl Screens for Card {}

impl Card {
    /// Lights the first screen.
    fn light(&self) -> Result<crtc::Handle> {
        let resources = self.resource_handles()?;
        let connectors = resources.connectors().iter().filter_map(|handle| self.get_connector(*handle, true).ok());
        let screen = { connectors }.find(|info| info.state() == connector::State::Connected).context("no screen")?;
        let mode = *screen.modes().first().context("the screen has no mode")?;
        let crtc = *resources.crtcs().first().context("the card has no CRTC")?;
        let (width, height) = mode.size();
        let mut buffer = self.create_dumb_buffer((width.into(), height.into()), DrmFourcc::Xrgb8888, 32)?;
        self.map_dumb_buffer(&mut buffer)?.fill(GREY);
        let framebuffer = self.add_framebuffer(&buffer, 24, 32)?;
        self.set_crtc(crtc, Some(framebuffer), (0, 0), &[screen.handle()], Some(mode))
            .context("the screen cannot be lit")?;
        Ok(crtc)
    }

    /// The picture of a pointer.
    fn picture(&self, path: &str) -> Result<DumbBuffer> {
        let pixels = std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
        let row = SIDE as usize * BYTES;
        ensure!(
            pixels.len() == SIDE as usize * row,
            "{path} has {} bytes and not {SIDE} by {SIDE} pixels",
            pixels.len()
        );
        let mut buffer = self.create_dumb_buffer((SIDE, SIDE), DrmFourcc::Argb8888, 32)?;
        let pitch = buffer.pitch() as usize;
        let mut map = self.map_dumb_buffer(&mut buffer)?;
        for (to, from) in map.chunks_exact_mut(pitch).zip(pixels.chunks_exact(row)) {
            to.get_mut(..row).context("a row is shorter than its pixels")?.copy_from_slice(from);
        }
        drop(map);
        Ok(buffer)
    }
}

fn place(x: &str, y: &str) -> Result<(i32, i32)> {
    let number = |word: &str| word.parse().with_context(|| format!("'{word}' is no number of pixels"));
    Ok((number(x)?, number(y)?))
}

fn main() -> Result<()> {
    let card = OpenOptions::new().read(true).write(true).open("/dev/dri/card0").context("no /dev/dri/card0")?;
    let card = Card(card);
    let crtc = card.light()?;
    // What is shown stays until something else is.
    let mut shown = None;
    println!("ready for a pointer");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["show", path, x, y] => {
                let buffer = card.picture(path)?;
                card.set_cursor2(crtc, Some(&buffer), place(x, y)?).context("the GPU shows no pointer")?;
                if let Some(before) = shown.replace(buffer) {
                    card.destroy_dumb_buffer(before)?;
                }
                println!("the pointer is {path}");
            }
            ["move", x, y] => {
                card.move_cursor(crtc, place(x, y)?).context("the pointer does not move")?;
                println!("the pointer is at {x},{y}");
            }
            ["hide"] => {
                card.set_cursor2(crtc, None::<&DumbBuffer>, (0, 0)).context("the pointer stays")?;
                println!("the pointer is hidden");
            }
            [] => {}
            _ => bail!("'{line}' is none of: show FILE X Y, move X Y, hide"),
        }
    }
    Ok(())
}
