//! `atoll-gpu --virgl` as a process: what a guest draws by the renderer of the host is what the screen shows, byte for byte.
//!
//! The renderer is a library of the host's (libvirglrenderer1 and Mesa); `cargo xtask` sees to it. Where it is missing these tests
//! fail, unless ATOLL_ALLOW_SKIP=1 says that it is known.

#![allow(clippy::print_stdout, reason = "figures, and what is left out")]

mod guest;

use std::os::fd::OwnedFd;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::process::{Process, fails};
use atoll_kit::driver::{Options, iommu};
use atoll_protocol::display::{CURSOR_BYTES, Features, Rect};
use guest::scene::{Stream, canvas};
use guest::{Guest, NO_CONTEXT, NO_RESOURCE, OK, OUT_OF_MEMORY, PARAMETER, UNSPECIFIED, listen, picture, words};
use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::VhostUserFrontend;

const WHOLE: Rect = Rect { x: 0, y: 0, width: 320, height: 240 };

/// Whether the host has the renderer. Without it the program says what to install.
fn has_renderer() -> Result<bool> {
    let there = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
        .iter()
        .any(|folder| std::path::Path::new(folder).join("libvirglrenderer.so.1").exists());
    if there {
        return Ok(true);
    }
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("gpu.sock");
    let (status, said) = fails(guest::PROGRAM, &["--virgl", "--socket", socket.to_str().context("a path")?]);
    ensure!(!status.success() && said.contains("libvirglrenderer1") && said.lines().count() == 1, "{said}");
    let allowed = std::env::var_os("ATOLL_ALLOW_SKIP").is_some_and(|value| value == "1");
    ensure!(allowed, "{}; set ATOLL_ALLOW_SKIP=1 to leave tests of 3D out", said.trim_end());
    println!("left out: {}", said.trim_end());
    Ok(false)
}

fn start(folder: &std::path::Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Process> {
    listen(folder, &[&["--virgl"], args].concat(), fds)
}

fn pixels(rect: (u32, u32), bgra: [u8; 4]) -> Vec<u8> {
    bgra.repeat((rect.0 * rect.1) as usize)
}

/// Capability sets are told; a context clears a picture and copies into it; the screen has it byte for byte, the right way up;
/// so has the guest, who asks for it.
#[test]
fn what_a_context_draws_is_shown() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let began = Instant::now();
    let mut process = start(folder.path(), &["--jail=strict"], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    println!("served {:?} after its start", began.elapsed());
    ensure!(guest.driver.features() & 0xffff == 0b11, "VIRGL and EDID: {:#x}", guest.driver.features());
    ensure!(guest.driver.config(16)? == words(&[0, 0, 1, 2]));
    let mut names = Vec::new();
    for index in 0..2 {
        let (status, info) = guest.ask(0x108, &words(&[index, 0]))?;
        ensure!(status == 0x1102 && info.len() == 16, "{status:#x}");
        let word = |at: usize| u32::from_le_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        ensure!(word(0) == index + 1);
        let (status, said) = guest.ask(0x109, &words(&[word(0), word(4)]))?;
        ensure!(status == 0x1103 && said.len() as u32 == word(8), "{status:#x}");
        names.push(said);
        ensure!(guest.status(0x109, &[word(0), word(4) + 1])? == PARAMETER, "a version of the future");
    }
    ensure!(guest.status(0x108, &[2, 0])? == PARAMETER && guest.status(0x109, &[4, 0])? == PARAMETER);
    let renderer: Vec<u8> = names[1][696..760].iter().copied().take_while(|byte| *byte != 0).collect();
    let renderer = String::from_utf8(renderer)?;
    ensure!(
        renderer.contains("llvmpipe") || renderer.contains("LLVMPIPE") || renderer.contains("virgl"),
        "{renderer:?}"
    );
    let mut screen = guest.screen(Features::EDID, &[(800, 600)])?;
    ensure!(guest.begin(7)? == OK);
    guest.canvas(3, 320, 240)?;
    guest.canvas(4, 16, 8)?;
    ensure!(guest.set_scanout(0, 3, WHOLE)? == OK);
    // A small one in another colour is copied to where the picture is not symmetric.
    let stream = Stream::default().onto(1, 3).clear([1.0, 0.0, 0.5, 1.0]).onto(2, 4).clear([0.0, 1.0, 0.0, 1.0]).copy(
        3,
        (40, 10),
        4,
        (16, 8),
    );
    ensure!(guest.submit(&stream)? == OK);
    ensure!(guest.flush(3, WHOLE)? == OK);
    let mut expected = pixels((320, 240), [128, 0, 255, 255]);
    let rows = 10..18;
    for row in rows {
        let at = (row * 320 + 40) * 4;
        expected[at..at + 64].copy_from_slice(&pixels((16, 1), [0, 255, 0, 255]));
    }
    screen.shows(0, 320, 240, &expected)?;
    // A resource that says that its first row is the upper one has them the other way round where OpenGL has it, and goes by
    // what it has when it copies; it is shown as it says.
    let upright = [canvas(320, 240).as_slice()[..9].to_vec(), vec![1]].concat();
    ensure!(guest.create_3d(5, *upright.first_chunk().context("ten words")?)? == OK);
    guest.done(0x202, &[5, 0])?;
    ensure!(guest.submit(&Stream::default().copy(5, (0, 0), 3, (320, 240)))? == OK);
    ensure!(guest.set_scanout(0, 5, WHOLE)? == OK && guest.flush(5, WHOLE)? == OK);
    let turned: Vec<u8> = expected.rchunks(320 * 4).flatten().copied().collect();
    screen.shows(0, 320, 240, &turned)?;
    ensure!(guest.set_scanout(0, 3, WHOLE)? == OK && guest.flush(3, WHOLE)? == OK);
    screen.shows(0, 320, 240, &expected)?;
    // The guest has it read back into its own memory, in pieces.
    let entries = guest.lay(3, &vec![0; 320 * 240 * 4])?;
    ensure!(guest.attach(3, &entries)? == OK && guest.attach(3, &entries)? == UNSPECIFIED);
    ensure!(guest.transfer_3d(false, 3, [0, 0, 320, 240], 0)? == OK);
    let mut had = Vec::new();
    for (addr, len) in &entries {
        let mut piece = vec![0; *len as usize];
        guest.driver.guest().read(*addr, &mut piece);
        had.extend(piece);
    }
    ensure!(had == expected, "what the guest has read back");
    // And draws by its own memory: a part of it, which alone is flushed.
    let drawn = picture(320, 240, 5);
    guest.lay(3, &drawn)?;
    let part = Rect { x: 100, y: 50, width: 37, height: 20 };
    let offset = (50 * 320 + 100) * 4;
    ensure!(guest.transfer_3d(true, 3, [100, 50, 37, 20], offset)? == OK && guest.flush(3, part)? == OK);
    for row in 50..70 {
        let at = (row * 320 + 100) * 4;
        expected[at..at + 37 * 4].copy_from_slice(&drawn[at..at + 37 * 4]);
    }
    screen.shows(0, 320, 240, &expected)?;
    // As does a driver that knows 2D only.
    ensure!(guest.transfer(3, WHOLE, 0)? == OK && guest.flush(3, WHOLE)? == OK);
    screen.shows(0, 320, 240, &drawn)?;
    guest.done(0x107, &[3, 0])?;
    guest.done(0x203, &[3, 0])?;
    guest.done(0x102, &[3, 0])?;
    screen.until(|screen| screen.shown.is_empty())?;
    guest.done(0x201, &[])?;
    ensure!(guest.status(0x201, &[])? == NO_CONTEXT);
    // 2D is what it was.
    guest.context = 0;
    let pixels = guest.show(0, 9, 640, 480)?;
    screen.shows(0, 640, 480, &pixels)
}
