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
use vhost::VhostBackend;
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

/// Programs that a guest brings are translated in the jail, whose compiler was never asked for these.
#[test]
fn a_triangle_is_translated_in_the_jail() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut process = start(folder.path(), &["--jail=strict"], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::EDID, &[(800, 600)])?;
    for (context, blue) in [(1, 0.25), (2, 0.75)] {
        ensure!(guest.begin(context)? == OK);
        guest.canvas(context, 256, 64)?;
        let stream = Stream::default().onto(1, context).clear([0.0, 1.0, 0.0, 1.0]).triangle(256, 64, blue);
        ensure!(guest.submit(&stream)? == OK);
        let whole = Rect { x: 0, y: 0, width: 256, height: 64 };
        ensure!(guest.set_scanout(0, context, whole)? == OK && guest.flush(context, whole)? == OK);
        screen.until(|screen| screen.shown.get(&0).is_some_and(|shown| shown.2[1] == 0 && shown.2[3] == 255))?;
        for (at, pixel) in screen.shown[&0].2.as_chunks::<4>().0.iter().enumerate() {
            let (red, wanted) = (i32::from(pixel[2]), (at % 256) as i32);
            let right = (red - wanted).abs() <= 1 && i32::from(pixel[0]).abs_diff((blue * 255.0) as i32) <= 1;
            ensure!(right && pixel[1] == 0 && pixel[3] == 255, "pixel {at} is {pixel:?}");
        }
        ensure!(guest.set_scanout(0, 0, whole)? == OK);
        screen.until(|screen| screen.shown.is_empty())?;
    }
    Ok(())
}

fn record() -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create("record", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, 64 << 20)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// A pointer that a context has drawn is the screen's cursor, and a picture of 2D is what a context copies from, as it is when the
/// stream comes.
#[test]
fn both_kinds_meet() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut process = start(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::EDID, &[(800, 600)])?;
    ensure!(guest.begin(1)? == OK);
    guest.canvas(1, 64, 64)?;
    ensure!(guest.submit(&Stream::default().onto(1, 1).clear([0.0, 0.0, 1.0, 1.0]))? == OK);
    guest.cursor(0x300, &[0, 5, 6, 0, 1, 2, 3, 0])?;
    screen.until(|screen| screen.cursor.is_some())?;
    ensure!(screen.cursor_picture == pixels((64, 64), [255, 0, 0, 255]) && screen.hot == (2, 3));
    ensure!(screen.cursor_picture.len() == CURSOR_BYTES);
    // A picture of 2D, which is shown; then a context has a part of it on a canvas of its own.
    let drawn = guest.show(0, 2, 320, 240)?;
    screen.shows(0, 320, 240, &drawn)?;
    guest.done(0x202, &[2, 0])?;
    guest.canvas(3, 320, 240)?;
    let copy = Stream::default().copy(3, (0, 0), 2, (320, 240));
    ensure!(guest.submit(&copy)? == OK);
    ensure!(guest.set_scanout(0, 3, WHOLE)? == OK && guest.flush(3, WHOLE)? == OK);
    screen.shows(0, 320, 240, &drawn)?;
    // It is drawn on, in 2D's way and in 3D's.
    let other = picture(320, 240, 9);
    guest.lay(2, &other)?;
    ensure!(guest.transfer(2, Rect { height: 100, ..WHOLE }, 0)? == OK);
    ensure!(guest.transfer_3d(true, 2, [0, 100, 320, 140], 320 * 100 * 4)? == OK);
    ensure!(guest.transfer_3d(false, 2, [0, 0, 320, 240], 0)? == OK, "there is nothing to be done");
    ensure!(guest.submit(&copy)? == OK && guest.flush(3, WHOLE)? == OK);
    screen.shows(0, 320, 240, &other)?;
    // The picture of 2D goes while a context may use it.
    guest.done(0x102, &[2, 0])?;
    ensure!(guest.submit(&Stream::default().onto(4, 3).clear([0.0; 4]))? == OK && guest.flush(3, WHOLE)? == OK);
    screen.shows(0, 320, 240, &pixels((320, 240), [0; 4]))
}

/// Nothing that a guest says in 3D ends the process: words without sense, streams that are none, bombs.
#[test]
fn a_hostile_guest_is_answered() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut process = start(folder.path(), &["--jail=strict", "--memory", "16"], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::EDID, &[(800, 600)])?;
    // Ids that are none, or are taken.
    ensure!(guest.begin(0)? == NO_CONTEXT && guest.begin(1)? == OK && guest.begin(1)? == NO_CONTEXT);
    ensure!(guest.status(0x202, &[9, 0])? == NO_RESOURCE && guest.create_3d(0, canvas(8, 8))? == NO_RESOURCE);
    guest.canvas(1, 64, 64)?;
    ensure!(guest.create_3d(1, canvas(8, 8))? == NO_RESOURCE && guest.status(0x101, &[1, 1, 8, 8])? == NO_RESOURCE);
    guest.context = 5;
    ensure!(guest.submit(&Stream::default())? == NO_CONTEXT && guest.status(0x202, &[1, 0])? == NO_CONTEXT);
    ensure!(guest.transfer_3d(true, 1, [0, 0, 1, 1], 0)? == NO_CONTEXT && guest.status(0x203, &[1, 0])? == NO_CONTEXT);
    guest.context = 1;
    // Shapes that nothing has, and more than there is memory for.
    let absurd = [[9, 1, 2, 8, 8, 1, 1, 0, 0, 0], [2, 1, 2, 0, 8, 1, 1, 0, 0, 0], [2, 1, 2, 8, 8, 1, 1, 99, 0, 0]];
    for shape in absurd {
        ensure!(guest.create_3d(2, shape)? == PARAMETER, "{shape:?}");
    }
    ensure!(guest.create_3d(2, canvas(16_384, 16_384))? == OUT_OF_MEMORY);
    ensure!(guest.create_3d(2, [0, 64, 1 << 4, u32::MAX, 1, 1, 1, 0, 0, 0])? == OUT_OF_MEMORY);
    ensure!(guest.create_3d(2, [3, 1, 8, 1024, 1024, 1024, 1, 0, 0, 0])? == OUT_OF_MEMORY);
    // What the renderer does not make: a format that there is not.
    ensure!(guest.create_3d(2, [2, 400, 8, 64, 64, 1, 1, 0, 0, 0])? == UNSPECIFIED);
    let mut made = 0;
    while guest.create_3d(100 + made, canvas(512, 512))? == OK {
        made += 1;
    }
    ensure!((12..=16).contains(&made), "{made} of a mebibyte each");
    for id in 100..100 + made {
        guest.done(0x102, &[id, 0])?;
    }
    let begun = (2..200).take_while(|id| guest.begin(*id).is_ok_and(|status| status == OK)).count();
    ensure!(begun == 95, "{begun} contexts besides the first");
    for context in 2..97 {
        guest.context = context;
        guest.done(0x201, &[])?;
    }
    guest.context = 1;
    // Backings: none, memory that is none, offsets and boxes beyond the end.
    ensure!(guest.transfer_3d(true, 1, [0, 0, 64, 64], 0)? == UNSPECIFIED, "it has none");
    ensure!(guest.attach(1, &[(1 << 40, 4096)])? == PARAMETER);
    ensure!(guest.attach(1, &[(guest::PICTURES, 8192), (guest::PICTURES, 0), (guest::PICTURES, 8192)])? == OK);
    ensure!(guest.transfer_3d(true, 1, [0, 0, 65, 64], 0)? == PARAMETER);
    ensure!(guest.transfer_3d(true, 1, [1, u32::MAX, 1, 2], 0)? == PARAMETER);
    ensure!(guest.transfer_3d(true, 1, [0, 0, 64, 64], 4)? == UNSPECIFIED, "the renderer looks where it ends");
    ensure!(guest.transfer_3d(false, 1, [0, 0, 64, 64], u32::MAX)? == UNSPECIFIED);
    ensure!(guest.transfer_3d(false, 1, [0, 0, 64, 64], 0)? == OK);
    // What is no picture is not shown.
    ensure!(guest.create_3d(2, [0, 64, 1 << 4, 4096, 1, 1, 1, 0, 0, 0])? == OK);
    ensure!(guest.set_scanout(0, 2, Rect { x: 0, y: 0, width: 1, height: 1 })? == PARAMETER);
    // Streams: shorter than they say, no whole words, unknown commands, objects that are not there, any numbers.
    ensure!(guest.status(0x207, &[64, 0, 1])? == UNSPECIFIED && guest.status(0x207, &[5, 0, 1, 2])? == PARAMETER);
    ensure!(guest.status(0x207, &[u32::MAX - 3, 0])? == PARAMETER);
    let mut word = 0x9e37_79b9_u32;
    for round in 0..600 {
        let context = 10 + round;
        ensure!(guest.begin(context)? == OK);
        guest.done(0x202, &[1, 0])?;
        let mut stream = Stream::default();
        if round % 2 == 0 {
            stream = stream.onto(1, 1).clear([1.0; 4]);
        }
        for _ in 0..8 {
            let mut next = || {
                word ^= word << 13;
                word ^= word >> 17;
                word ^= word << 5;
                word
            };
            let (code, object, len) = (next() % 50, next() % 11, next() % 14);
            let numbers: Vec<u32> = (0..len).map(|_| if next() % 3 == 0 { next() } else { next() % 5 }).collect();
            stream = stream.command(code, object, &numbers);
        }
        let status = guest.submit(&stream)?;
        ensure!([OK, UNSPECIFIED].contains(&status), "{status:#x}");
        guest.done(0x201, &[])?;
    }
    // The next one draws as if nothing had been.
    ensure!(guest.begin(1000)? == OK);
    guest.canvas(7, 320, 240)?;
    ensure!(guest.submit(&Stream::default().onto(1, 7).clear([0.0, 1.0, 0.0, 0.0]))? == OK);
    ensure!(guest.set_scanout(0, 7, WHOLE)? == OK && guest.flush(7, WHOLE)? == OK);
    screen.shows(0, 320, 240, &pixels((320, 240), [0, 255, 0, 0]))?;
    // A driver that has not agreed to 3D has none.
    let mut plain = Guest::with(Options { without: guest::options().without | 1, ..guest::options() })?;
    guest.driver.disconnect();
    plain.driver.connect(process.connect()?)?;
    ensure!(plain.begin(1)? == UNSPECIFIED && plain.status(0x108, &[0, 0])? == UNSPECIFIED);
    Ok(())
}

/// The process dies while a guest draws. Its successor shows the last picture, answers everything of the lost context as done, so that
/// the guest's kernel has nothing to say, and draws for the next context, on the same resources.
#[test]
fn a_context_is_lost_and_the_guest_goes_on() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let record = record()?;
    let mut process = start(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    ensure!(guest.begin(1)? == OK);
    guest.canvas(1, 320, 240)?;
    let entries = guest.lay(1, &picture(320, 240, 4))?;
    ensure!(guest.attach(1, &entries)? == OK);
    let draw = Stream::default().onto(1, 1).clear([1.0, 0.0, 0.0, 1.0]);
    ensure!(guest.submit(&draw)? == OK);
    ensure!(guest.set_scanout(0, 1, WHOLE)? == OK && guest.flush(1, WHOLE)? == OK);
    let red = pixels((320, 240), [0, 0, 255, 255]);
    screen.shows(0, 320, 240, &red)?;
    // Commands are under way when it dies.
    let stream = words(&[&[draw.0.len() as u32 * 4, 0], draw.0.as_slice()].concat());
    for _ in 0..8 {
        guest.add(0x207, &stream)?;
    }
    process.child.kill()?;
    let began = Instant::now();
    process.end()?;
    let mut process = start(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    guest.driver.connect(process.connect()?)?;
    for left in (1..=8).rev() {
        ensure!(guest.hear(left)?.0 == OK, "{left} before the end");
    }
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    screen.shows(0, 320, 240, &red)?;
    println!("killed, and on the screen again after {:?}", began.elapsed());
    // The program knows nothing of it, and goes on: what it says is done, and what was shown stays.
    let onwards = Stream::default().clear([0.0, 1.0, 0.0, 1.0]);
    ensure!(guest.submit(&onwards)? == OK && guest.flush(1, WHOLE)? == OK);
    ensure!(guest.create_3d(2, canvas(16, 16))? == OK);
    guest.done(0x202, &[2, 0])?;
    guest.done(0x203, &[2, 0])?;
    guest.done(0x102, &[2, 0])?;
    ensure!(guest.begin(1)? == NO_CONTEXT, "it is still there");
    guest.done(0x201, &[])?;
    ensure!(guest.submit(&onwards)? == NO_CONTEXT, "and now it is not");
    // The next one may use the same resource, which is black, and its backing.
    ensure!(guest.begin(2)? == OK);
    guest.done(0x202, &[1, 0])?;
    ensure!(guest.flush(1, WHOLE)? == OK);
    screen.shows(0, 320, 240, &pixels((320, 240), [0; 4]))?;
    ensure!(guest.transfer_3d(true, 1, [0, 0, 320, 240], 0)? == OK && guest.flush(1, WHOLE)? == OK);
    screen.shows(0, 320, 240, &picture(320, 240, 4))?;
    ensure!(guest.submit(&draw)? == OK && guest.flush(1, WHOLE)? == OK);
    screen.shows(0, 320, 240, &red)?;
    // A reset leaves nothing of it.
    guest.driver.front()?.reset_device()?;
    guest.driver.disconnect();
    let mut guest = Guest::connected(&mut process)?;
    ensure!(guest.flush(1, WHOLE)? == NO_RESOURCE && guest.begin(2)? == OK);
    Ok(())
}

/// Guest memory is exchanged under a backing that the renderer has been lent: it goes by the new one.
#[test]
fn memory_is_exchanged_under_a_backing() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut process = start(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    ensure!(guest.begin(1)? == OK);
    guest.canvas(1, 320, 240)?;
    let drawn = picture(320, 240, 1);
    let entries = guest.lay(1, &drawn)?;
    ensure!(guest.attach(1, &entries)? == OK);
    ensure!(guest.set_scanout(0, 1, WHOLE)? == OK);
    let region = guest.driver.region();
    for _ in 0..20 {
        guest.driver.front()?.set_mem_table(&[region])?;
    }
    ensure!(guest.transfer_3d(true, 1, [0, 0, 320, 240], 0)? == OK && guest.flush(1, WHOLE)? == OK);
    screen.shows(0, 320, 240, &drawn)?;
    // Half of it is gone: what cannot be reached is not, and the device goes on.
    let less = vhost::VhostUserMemoryRegionInfo { memory_size: guest::PICTURES, ..region };
    guest.driver.front()?.set_mem_table(&[less])?;
    ensure!(guest.transfer_3d(true, 1, [0, 0, 320, 240], 0)? == UNSPECIFIED);
    guest.driver.front()?.set_mem_table(&[region])?;
    ensure!(guest.transfer_3d(true, 1, [0, 0, 320, 240], 0)? == OK);
    // Behind an IOMMU nothing is lent: 2D serves, and 3D without backings.
    guest.driver.disconnect();
    let mut guest = Guest::with(Options { iommu: true, ..guest::options() })?;
    guest.driver.connect(process.connect()?)?;
    let len = guest::options().memory as u64;
    let rights = iommu::READ | iommu::WRITE;
    ensure!(iommu::update(guest.driver.talk()?, 0, len, atoll_kit::driver::USER_OFFSET, rights)?);
    ensure!(guest.begin(1)? == OK);
    guest.canvas(1, 320, 240)?;
    ensure!(guest.attach(1, &[(guest::PICTURES, 320 * 240 * 4)])? == UNSPECIFIED);
    guest.show(0, 2, 320, 240).map(drop)
}
