//! A person in front of a machine: pictures, keys, and the death of each process in between.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::screen::guest::{Screen, operator, screenshot, screenshot_of};
use xtask::painting::{self, Painting};
use xtask::viewer::Viewer;
use xtask::{picture, place};

const STEP: Duration = Duration::from_secs(60);
const PICTURE: Painting = Painting::USUAL;

/// Kill what draws, what shows, and both: the picture is there again without a word of the guest's, and the next one too.
#[test]
fn a_picture_outlives_who_draws_and_who_shows_it() -> Result<()> {
    let mut screen = Screen::painted(PICTURE, "on")?;
    screen.shows(0)?;
    for victims in [&["atoll-gpu"][..], &["atoll-display"], &["atoll-display", "atoll-gpu"]] {
        victims.iter().try_for_each(|victim| screen.kill(victim))?;
        screen.shows(0).with_context(|| format!("after the death of {victims:?}"))?;
    }
    // Who asks while nobody is there waits for the successor, and gets the picture.
    screen.strike("atoll-display")?;
    let (size, seen) = screenshot(&mut operator(&screen.api)?).context("a picture, asked for in the middle")?;
    ensure!(PICTURE.wrong(0, size, &seen) == 0, "a picture that was asked for in the middle is another");
    screen.console().run("dd if=/dev/zero of=/dev/fb0 bs=4096000 count=1 2>/dev/null", STEP)?;
    let begin = Instant::now();
    while screenshot(&mut operator(&screen.api)?)?.1.iter().any(|byte| *byte != 0) {
        ensure!(begin.elapsed() < STEP, "the screen does not go black");
    }
    painting::paint(screen.console(), 0)?;
    screen.shows(0)?;

    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out.png");
    let mut shoot = Command::new(place::program("atoll")?);
    place::run(shoot.arg("screenshot").arg(&screen.api).arg(&out))?;
    let (size, seen) = picture::of_png(&std::fs::read(&out)?)?;
    ensure!(PICTURE.wrong(0, size, &seen) == 0, "`atoll screenshot` writes something else");
    screen.end()
}

/// What a viewer types and points at comes to the guest, whichever of the processes in between has died before.
#[test]
fn what_is_typed_comes_to_the_guest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = folder.path().join("vnc");
    let mut screen = Screen::painted(PICTURE, &format!("vnc=unix:{}", place.display()))?;
    screen.shows(0)?;
    for (round, victim) in [None, Some("atoll-input"), Some("atoll-display")].into_iter().enumerate() {
        if let Some(victim) = victim {
            screen.kill(victim)?;
        }
        let (keyboard, tablet) = (screen.input("keyboard")?, screen.input("tablet")?);
        // One report of a key and its end: 24 bytes an event, key and SYN.
        screen
            .console()
            .send(&format!("dd if={keyboard} bs=24 count=4 of=/keys{round} 2>/dev/null; echo key\"\"s{round}\n"))?;
        std::thread::sleep(Duration::from_millis(500));
        let mut viewer = Viewer::connect(&place, (PICTURE.width, PICTURE.height))?;
        let begin = Instant::now();
        while screen.console().expect(&format!("keys{round}\r"), Duration::from_millis(500)).is_err() {
            ensure!(begin.elapsed() < STEP, "no key has come to the guest");
            [true, false].into_iter().try_for_each(|down| viewer.key(u32::from(b'a'), down))?;
        }
        let code = screen.console().run(&format!("od -A n -t u2 -j 18 -N 2 /keys{round}"), STEP)?;
        ensure!(code.trim() == "30", "KEY_A is 30, and the guest has {code}");
        screen
            .console()
            .send(&format!("dd if={tablet} bs=24 count=3 of=/at{round} 2>/dev/null; echo point\"\"ed{round}\n"))?;
        std::thread::sleep(Duration::from_millis(500));
        let begin = Instant::now();
        let mut x = 0;
        while screen.console().expect(&format!("pointed{round}\r"), Duration::from_millis(500)).is_err() {
            ensure!(begin.elapsed() < STEP, "no pointer has come to the guest");
            x += 10;
            viewer.point(x, x / 2, 0)?;
        }
        let kind = screen.console().run(&format!("od -A n -t u2 -j 16 -N 2 /at{round}"), STEP)?;
        ensure!(kind.trim() == "3", "EV_ABS is 3, and the guest has {kind}");
    }
    screen.end()
}

/// Whether a head of this size shows the corner of the painting that the guest's frame buffer device tells of: as much as its
/// smallest screen has.
fn shows_corner(screen: &Screen, head: u32, size: (usize, usize), corner: (usize, usize)) -> Result<()> {
    let begin = Instant::now();
    loop {
        let seen = operator(&screen.api).and_then(|mut client| screenshot_of(&mut client, head));
        let right = seen.as_ref().is_ok_and(|(seen, pixels)| {
            let places = (0..size.1).flat_map(|y| (0..size.0).map(move |x| (x, y)));
            let mut inside = places.zip(pixels.chunks(3)).filter(|((x, y), _)| *x < corner.0 && *y < corner.1);
            *seen == size && inside.all(|((x, y), seen)| Painting::pixel(0, x, y) == *seen)
        });
        if right {
            return Ok(());
        }
        ensure!(begin.elapsed() < STEP, "head {head} shows something else: {:?}", seen.map(|(size, _)| size));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Two heads of different size show the guest's frame buffer, and go on doing so when what draws has died; a head that is
/// resized, also while its process is gone, is a new first choice among the guest's modes, and the other head's stay as they are.
/// A head without a mode is off until it is given a size, and on from then on.
#[test]
fn heads_are_told_apart_and_resized() -> Result<()> {
    const HEADS: [(u32, (usize, usize)); 2] = [(0, (1280, 800)), (1, (1024, 768))];
    const MODES: &str = "head -1 /sys/class/drm/card0-Virtual-1/modes /sys/class/drm/card0-Virtual-2/modes | xargs";
    const LAST: &str = "cat /sys/class/drm/card0-Virtual-3/status; head -1 /sys/class/drm/card0-Virtual-3/modes";
    let mut screen = Screen::painted_on("scanouts=3,modes=[1280x800,1024x768]", PICTURE, "on")?;
    for kill in [false, true] {
        if kill {
            screen.kill("atoll-gpu")?;
        }
        HEADS.iter().try_for_each(|(head, size)| shows_corner(&screen, *head, *size, HEADS[1].1))?;
    }

    let before = screen.console().run(MODES, STEP)?;
    ensure!(before.contains("1280x800") && before.contains("1024x768"), "the guest's first choices: {before}");
    let api = screen.api.clone();
    let resize = |mode: &str, head: &str| {
        let mut order = Command::new(place::program("atoll")?);
        order.arg("resize-display").arg(&api).arg(mode).args(["--head", head]);
        place::run(&mut order)
    };
    // No larger than the frame buffer device, whose owner in the kernel asks for modes that fit into it.
    for (mode, victims) in
        [("800x600", &[][..]), ("720x480", &["atoll-display"]), ("640x480", &["atoll-display", "atoll-gpu"])]
    {
        // Who asks while nobody is there is heard when somebody is.
        victims.iter().try_for_each(|victim| screen.strike(victim).map(drop))?;
        resize(mode, "1").with_context(|| format!("in the middle of the death of {victims:?}"))?;
        let begin = Instant::now();
        let mut now = String::new();
        while !now.contains(mode) {
            ensure!(begin.elapsed() < STEP, "the guest does not hear of {mode}: {now}");
            now = screen.console().run(MODES, STEP)?;
        }
        ensure!(now.contains("1280x800") && !now.contains("1024x768"), "the guest's first choices: {now}");
    }

    let last = screen.console().run(LAST, STEP)?;
    ensure!(last == "disconnected", "a head without a mode is {last}");
    resize("640x480", "2")?;
    let begin = Instant::now();
    while screen.console().run(LAST, STEP)? != "connected\n640x480" {
        ensure!(begin.elapsed() < STEP, "the head is not switched on: {}", screen.console().run(LAST, STEP)?);
    }
    shows_corner(&screen, 2, (640, 480), (640, 480)).context("switched on")?;
    for victim in ["atoll-gpu", "atoll-display"] {
        screen.kill(victim)?;
        // Were a size forgotten, the guest would hear of that in between.
        std::thread::sleep(Duration::from_secs(1));
        shows_corner(&screen, 2, (640, 480), (640, 480)).with_context(|| format!("after the death of {victim}"))?;
        let now = screen.console().run(MODES, STEP)?;
        ensure!(now.contains("640x480") && !now.contains("1024x768"), "after the death of {victim}: {now}");
    }
    screen.end()
}
