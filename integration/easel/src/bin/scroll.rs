//! A picture that scrolls upwards on the first screen of `/dev/dri/card0`, as a terminal's does: moved within its buffer by the
//! processor, and all of it told to the GPU.
//!
//! The first row of pixels says which frame it is (thirty-two of them, white for a one, the highest bit first), so that who looks
//! at the screen from outside knows what he sees.

#![allow(clippy::print_stdout, reason = "a program for a shell")]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use drm::Device;
use drm::buffer::{Buffer as _, DrmFourcc};
use drm::control::{ClipRect, Device as Screens, connector};

const BYTES: usize = 4;
/// Rows that a frame moves by.
const STEP: usize = 16;
/// Pixels of the first row that carry the number of the frame.
const NUMBER_BITS: u32 = 32;

/// How long the last frame stays.
const LAST: Duration = Duration::from_millis(500);

/// Scrolls a picture on the first screen; prints one line of JSON.
#[derive(Parser)]
struct Arguments {
    /// How many frames.
    #[arg(long, default_value_t = 100)]
    frames: u32,
    /// The number of the first one.
    #[arg(long, default_value_t = 1)]
    first: u32,
    /// Frames in a second; 0: as many as go.
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Says `F<number>;` on the standard output, and waits until that is out, before a frame is told to the GPU.
    #[arg(long)]
    mark: bool,
}

struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl Device for Card {}
impl Screens for Card {}

/// A row of the endless picture.
fn paint(row: &mut [u8], y: usize) {
    for (x, pixel) in row.chunks_exact_mut(BYTES).enumerate() {
        let letter = (x / 8 * 31 + y / STEP * 17) % 97;
        let ink = (letter >> (x % 7)) & 1 == 1 && y % STEP > 2;
        let value = if ink { [(letter * 2) as u8, 220, 200, 0] } else { [24, 16, 16, 0] };
        pixel.copy_from_slice(&value);
    }
}

fn write_number(pixels: &mut [u8], frame: u32) {
    let bits = (0..NUMBER_BITS).rev().map(|bit| (frame >> bit) & 1);
    for (pixel, bit) in pixels.chunks_exact_mut(BYTES).zip(bits) {
        pixel.fill(if bit == 1 { 255 } else { 0 });
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.frames > 0, "--frames is at least 1");
    let card = OpenOptions::new().read(true).write(true).open("/dev/dri/card0").context("no /dev/dri/card0")?;
    let card = Card(card);
    let resources = card.resource_handles()?;
    let connectors = resources.connectors().iter().filter_map(|handle| card.get_connector(*handle, true).ok());
    let screen = { connectors }.find(|info| info.state() == connector::State::Connected).context("no screen")?;
    let mode = *screen.modes().first().context("the screen has no mode")?;
    let crtc = *resources.crtcs().first().context("the card has no CRTC")?;
    let (width, height) = mode.size();
    let mut buffer = card.create_dumb_buffer((width.into(), height.into()), DrmFourcc::Xrgb8888, 32)?;
    let framebuffer = card.add_framebuffer(&buffer, 24, 32)?;
    let pitch = buffer.pitch() as usize;
    let rows = usize::from(height);
    let mut map = card.map_dumb_buffer(&mut buffer)?;
    let pixels: &mut [u8] = &mut map;
    ensure!(pixels.len() >= pitch * rows && rows > STEP, "a buffer of {} bytes for {rows} rows", pixels.len());
    for (y, row) in pixels.chunks_exact_mut(pitch).take(rows).enumerate() {
        paint(row, y);
    }
    card.set_crtc(crtc, Some(framebuffer), (0, 0), &[screen.handle()], Some(mode))?;
    let all = [ClipRect::new(0, 0, width, height)];
    let mut out = std::io::stdout();
    let begin = Instant::now();
    for index in 0..arguments.frames {
        let frame = arguments.first.wrapping_add(index);
        // The GPU is still reading when it has been told: a frame is painted when it is due, and not before.
        if let Some(due) = (u64::from(index) * 1_000_000).checked_div(arguments.rate.into()) {
            std::thread::sleep(Duration::from_micros(due).saturating_sub(begin.elapsed()));
        }
        pixels.copy_within(STEP * pitch..rows * pitch, 0);
        for (y, row) in pixels.chunks_exact_mut(pitch).enumerate().take(rows).skip(rows - STEP) {
            paint(row, y + (index as usize + 1) * STEP);
        }
        write_number(pixels, frame);
        if arguments.mark {
            write!(out, "F{frame};")?;
            out.flush()?;
            rustix::termios::tcdrain(&out)?;
        }
        card.dirty_framebuffer(framebuffer, &all)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let rate = f64::from(arguments.frames) / seconds;
    // With the end of this program its picture is gone, and who looks now and then has not seen the last frame yet.
    std::thread::sleep(LAST);
    println!("{{\"frames\":{},\"seconds\":{seconds:.4},\"per_second\":{rate:.2}}}", arguments.frames);
    Ok(())
}
