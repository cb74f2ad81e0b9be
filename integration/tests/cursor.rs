//! A pointer that a guest shows above its picture: what a viewer is told of it, and who may die in between.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_integration::screen::guest::Screen;
use xtask::painting::Painting;
use xtask::viewer::{Pointer, Seen, Viewer};
use xtask::{graphics_land, images, place};

const STEP: Duration = Duration::from_secs(60);
/// A viewer that is told nothing for so long is told nothing.
const SILENCE: Duration = Duration::from_millis(500);
const SIZE: (usize, usize) = (Painting::USUAL.width, Painting::USUAL.height);
const SIDE: usize = 64;

/// A picture of a pointer as the guest has it: no two places look alike; there are pixels that are all there, some that are half
/// there, and some that are not.
fn picture(step: usize) -> Vec<[u8; 4]> {
    let places = (0..SIDE).flat_map(|y| (0..SIDE).map(move |x| (x, y)));
    let pixel = |(x, y): (usize, usize)| {
        let there = [0, 255, 127, 128, 255][(x * 3 + y + step) % 5];
        [(x * 4) as u8, (y * 4 + step) as u8, (x ^ y) as u8, there]
    };
    places.map(pixel).collect()
}

/// What a viewer has to be told of it.
fn told(picture: &[[u8; 4]], hot: (usize, usize)) -> Pointer {
    Pointer {
        size: (SIDE, SIDE),
        hot,
        colours: picture.iter().map(|[blue, green, red, _]| [*blue, *green, *red]).collect(),
        mask: picture.iter().map(|[.., there]| *there >= 128).collect(),
    }
}

/// Looks until the viewer is told of this pointer.
fn sees(viewer: &mut Viewer, seen: &mut Seen, wanted: &Pointer) -> Result<()> {
    let begin = Instant::now();
    while seen.pointer.as_ref() != Some(wanted) {
        let left = STEP.checked_sub(begin.elapsed()).filter(|left| !left.is_zero());
        let Some(left) = left else { bail!("the viewer sees {}", describe(seen.pointer.as_ref(), wanted)) };
        viewer.update(seen, left)?;
    }
    Ok(())
}

/// What differs, in a line.
fn describe(pointer: Option<&Pointer>, wanted: &Pointer) -> String {
    let Some(pointer) = pointer else { return "no pointer".into() };
    let mut line = format!("one of {:?} that points at {:?}", pointer.size, pointer.hot);
    let colours = pointer.colours.iter().zip(&wanted.colours).filter(|(one, other)| one != other).count();
    let mask = pointer.mask.iter().zip(&wanted.mask).filter(|(one, other)| one != other).count();
    let _ = write!(line, ", {colours} colours and {mask} places otherwise");
    line
}

/// Comes as somebody new and looks until there is this pointer; whoever is dead at the moment may come back meanwhile.
fn comes_and_sees(path: &Path, wanted: &Pointer) -> Result<(Viewer, Seen)> {
    let begin = Instant::now();
    loop {
        let look = || -> Result<(Viewer, Seen)> {
            let mut viewer = Viewer::connect(path, SIZE)?;
            let mut seen = viewer.look_with_pointer(SIZE)?;
            // Who comes is told of the pointer with the first picture, and what the picture is made of with it.
            ensure!(viewer.update(&mut seen, STEP)?, "nothing is told");
            ensure!(seen.pointer.as_ref() == Some(wanted), "{}", describe(seen.pointer.as_ref(), wanted));
            Ok((viewer, seen))
        };
        match look() {
            Ok(both) => return Ok(both),
            Err(error) => ensure!(begin.elapsed() < STEP, "a viewer who comes does not see the pointer: {error:#}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The same, and what is told a moment later, as by who has just come back himself, is no other.
fn comes_and_stays(path: &Path, wanted: &Pointer) -> Result<()> {
    let (mut viewer, mut seen) = comes_and_sees(path, wanted)?;
    while viewer.update(&mut seen, SILENCE)? {
        ensure!(seen.pointer.as_ref() == Some(wanted), "then {}", describe(seen.pointer.as_ref(), wanted));
    }
    Ok(())
}

/// The guest's program does what it is told.
fn order(screen: &mut Screen, line: &str, done: &str) -> Result<()> {
    screen.console().send(&format!("{line}\n"))?;
    screen.console().expect(&format!("the pointer is {done}\r"), STEP).map(drop)
}

/// A desktop's pointer comes to viewers as its guest has drawn it, to who is there and to who comes later; it is theirs to put where
/// their hand is, so that they are not told where the guest puts it. It is still there when who draws and who shows it have died,
/// and so is its absence.
#[test]
fn a_pointer_is_seen_as_the_guest_draws_it() -> Result<()> {
    const HOT: [(usize, usize); 2] = [(5, 9), (63, 0)];
    let pictures = [picture(0), picture(1)];
    let folder = tempfile::tempdir()?;
    let vnc = folder.path().join("vnc");
    let files = ["arrow", "hand"].map(|name| folder.path().join(name));
    for (file, picture) in files.iter().zip(&pictures) {
        std::fs::write(file, picture.as_flattened())?;
    }
    let initramfs = graphics_land::initramfs(folder.path(), &[&place::program("pointer")?, &files[0], &files[1]])?;
    let mut command = graphics_land::atoll(&initramfs, "on", &format!("vnc=unix:{}", vnc.display()))?;
    let mut screen = Screen::of(&mut command, folder, Painting::USUAL)?;
    screen.console().send("/mnt/pointer\n")?;
    screen.console().expect("ready for a pointer\r", STEP)?;
    let hidden = Pointer::default();
    let (mut viewer, mut seen) = comes_and_sees(&vnc, &hidden).context("before there is one")?;

    // Who is there sees it come, and another in its place.
    let [arrow, hand] = [0, 1].map(|number| told(&pictures[number], HOT[number]));
    order(&mut screen, "show /mnt/arrow 5 9", "/mnt/arrow")?;
    sees(&mut viewer, &mut seen, &arrow)?;
    order(&mut screen, "show /mnt/hand 63 0", "/mnt/hand")?;
    sees(&mut viewer, &mut seen, &hand)?;
    // It lies above the picture, and is no part of it.
    while viewer.update(&mut seen, SILENCE)? {}
    ensure!(seen.pixels.chunks(4).all(|pixel| pixel[..3] == [0x40; 3]), "the pointer is in the picture");

    // Where it is changes nothing, not even at the edge.
    for (x, y) in [(0, 0), (640, 400), (1279, 799), (-32, -20)] {
        order(&mut screen, &format!("move {x} {y}"), &format!("at {x},{y}"))?;
    }
    ensure!(!viewer.update(&mut seen, SILENCE)?, "a viewer is told that the pointer has moved");
    comes_and_sees(&vnc, &hand).context("who comes later")?;

    let all: [&[&str]; 3] = [&["atoll-gpu"], &["atoll-display"], &["atoll-display", "atoll-gpu"]];
    for victims in all {
        victims.iter().try_for_each(|victim| screen.kill(victim))?;
        comes_and_stays(&vnc, &hand).with_context(|| format!("after the death of {victims:?}"))?;
    }

    // The next one comes to who has seen the deaths, too.
    let (mut viewer, mut seen) = comes_and_sees(&vnc, &hand)?;
    order(&mut screen, "show /mnt/arrow 5 9", "/mnt/arrow")?;
    sees(&mut viewer, &mut seen, &arrow)?;
    order(&mut screen, "hide", "hidden")?;
    sees(&mut viewer, &mut seen, &hidden)?;
    for victims in all {
        victims.iter().try_for_each(|victim| screen.kill(victim))?;
        comes_and_stays(&vnc, &hidden).with_context(|| format!("hidden, after the death of {victims:?}"))?;
    }
    let (mut viewer, mut seen) = comes_and_sees(&vnc, &hidden)?;
    order(&mut screen, "show /mnt/hand 63 0", "/mnt/hand")?;
    sees(&mut viewer, &mut seen, &hand)?;

    // With the program its pointer goes.
    screen.console().send("\u{4}")?;
    screen.console().expect(images::PROMPT, STEP)?;
    sees(&mut viewer, &mut seen, &hidden)?;
    screen.end()
}
