//! `atoll-gpu` as a process: the test is the guest's driver on one side and the screen on the other.

mod guest;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_kit::driver::{Options, USER_OFFSET, display, iommu};
use atoll_protocol::display::{CURSOR_BYTES, Features, Rect, Reply};
use guest::{Guest, OK, listen, picture, words};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const WHOLE: Rect = Rect { x: 0, y: 0, width: 640, height: 480 };

/// What the guest draws is what the screen has: as a whole, in part, from another picture, and nothing in the end.
#[test]
fn a_picture_reaches_the_screen() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &["--jail=strict"], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    ensure!(guest.driver.features() & 0xffff == 1 << 1, "EDID and nothing else: {:#x}", guest.driver.features());
    ensure!(guest.driver.config(16)? == words(&[0, 0, 1, 0]));
    let mut screen = guest.screen(Features::EDID, &[(800, 600)])?;
    let mut pixels = guest.show(0, 1, 640, 480)?;
    screen.shows(0, 640, 480, &pixels)?;
    // A part of it changes.
    let part = Rect { x: 100, y: 50, width: 37, height: 20 };
    let drawn = picture(640, 480, 9);
    guest.lay(1, &drawn)?;
    ensure!(guest.transfer(1, part, (50 * 640 + 100) * 4)? == OK);
    ensure!(guest.flush(1, part)? == OK);
    for row in 50..70 {
        let at = (row * 640 + 100) * 4;
        pixels[at..at + 37 * 4].copy_from_slice(&drawn[at..at + 37 * 4]);
    }
    screen.shows(0, 640, 480, &pixels)?;
    // Another resource, of another format, of which the lower right is shown.
    guest.create(2, 67, 100, 80)?;
    let red_first = picture(100, 80, 3);
    let entries = guest.lay(2, &red_first)?;
    ensure!(guest.attach(2, &entries)? == OK);
    ensure!(guest.transfer(2, Rect { x: 0, y: 0, width: 100, height: 80 }, 0)? == OK);
    let corner = Rect { x: 60, y: 40, width: 40, height: 40 };
    ensure!(guest.set_scanout(0, 2, corner)? == OK);
    ensure!(guest.flush(2, Rect { x: 0, y: 0, width: 100, height: 80 })? == OK);
    let mut seen = Vec::new();
    for row in 40..80 {
        seen.extend(
            red_first[(row * 100 + 60) * 4..(row * 100 + 100) * 4]
                .as_chunks::<4>()
                .0
                .iter()
                .flat_map(|[red, green, blue, x]| [*blue, *green, *red, *x]),
        );
    }
    screen.shows(0, 40, 40, &seen)?;
    // It goes, and with it what is shown.
    guest.done(0x102, &[2, 0])?;
    screen.until(|screen| screen.shown.is_empty())?;
    guest.done(0x107, &[1, 0])?;
    guest.done(0x102, &[1, 0])
}

/// Two screens; the guest learns of a change as it happens, and draws what was asked for.
#[test]
fn screens_are_resized_and_the_guest_follows() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &["--scanouts", "2", "--mode", "1024x768"], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let (fronts, backs) = UnixStream::pair()?;
    fronts.set_read_timeout(Some(guest::PATIENCE))?;
    guest.driver.front()?.set_backend_request_fd(&backs)?;
    let modes = |guest: &mut Guest| -> Result<Vec<[u32; 3]>> {
        let (status, body) = guest.ask(0x100, &[])?;
        ensure!(status == 0x1101 && body.len() == 16 * 24, "{status:#x}");
        let word = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        Ok((0..2).map(|screen| [8, 12, 16].map(|at| word(24 * screen + at))).collect())
    };
    ensure!(modes(&mut guest)? == [[1024, 768, 1], [1280, 800, 0]], "before there is a screen");
    let mut screen = guest.screen(Features::CHANGES, &[(1024, 768), (800, 600)])?;
    let mut told = [0; 12];
    (&fronts).read_exact(&mut told)?;
    ensure!(told.to_vec() == words(&[2, 1, 0]), "the configuration has changed");
    ensure!(guest.driver.config(16)? == words(&[1, 0, 2, 0]));
    guest.driver.front()?.set_config(4, VhostUserConfigFlags::WRITABLE, &words(&[1]))?;
    ensure!(guest.driver.config(16)? == words(&[0, 0, 2, 0]));
    ensure!(modes(&mut guest)? == [[1024, 768, 1], [800, 600, 1]]);
    let pixels = [guest.show(0, 1, 1024, 768)?, guest.show(1, 2, 800, 600)?];
    screen.shows(0, 1024, 768, &pixels[0])?;
    screen.shows(1, 800, 600, &pixels[1])?;
    screen.wanted.screens[1].rect.width = 640;
    screen.wanted.screens[1].rect.height = 480;
    screen.say(&Reply::Changed)?;
    let asked = screen.asked;
    screen.until(|screen| screen.asked > asked)?;
    (&fronts).read_exact(&mut told)?;
    ensure!(modes(&mut guest)?[1] == [640, 480, 1]);
    let (status, edid) = guest.ask(0x10a, &words(&[1, 0]))?;
    ensure!(status == 0x1104 && edid[..4] == words(&[128]) && edid[8..16] == [0, 255, 255, 255, 255, 255, 255, 0]);
    ensure!(u32::from(edid[8 + 56]) | u32::from(edid[8 + 58] >> 4) << 8 == 640, "the preferred mode");
    ensure!(guest.status(0x10a, &[2, 0])? == guest::NO_SCANOUT);
    let pixels = guest.show(1, 3, 640, 480)?;
    screen.shows(1, 640, 480, &pixels)
}

/// A screen that takes frames by memory is told large updates so, one at a time: one that it has not taken is followed by no other,
/// and when it has, by what is newest. The next screen is shown everything.
#[test]
fn large_updates_come_by_memory() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::CHANGES | Features::FRAMES, &[(640, 480)])?;
    let pixels = guest.show(0, 1, 640, 480)?;
    screen.shows(0, 640, 480, &pixels)?;
    ensure!(screen.framed > 0, "it came in messages");
    screen.takes = false;
    screen.framed = 0;
    guest.show(0, 2, 640, 480)?;
    screen.until(|screen| screen.framed == 1)?;
    let newest = guest.show(0, 3, 640, 480)?;
    ensure!(screen.channel.try_receive()?.is_none(), "a frame before the one before it was taken");
    screen.takes = true;
    screen.say(&Reply::Taken)?;
    screen.shows(0, 640, 480, &newest)?;
    // One that goes without having taken its frame holds nobody up.
    screen.takes = false;
    screen.framed = 0;
    guest.show(0, 4, 640, 480)?;
    screen.until(|screen| screen.framed == 1)?;
    let newest = guest.show(0, 5, 640, 480)?;
    let mut next = guest.screen(Features::FRAMES, &[(640, 480)])?;
    next.shows(0, 640, 480, &newest)?;
    ensure!(next.framed > 0, "memory is there for each screen");
    Ok(())
}

/// A screen that cannot say that it changed is asked when the guest asks.
#[test]
fn a_screen_of_the_documents_is_asked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::EDID, &[(800, 600)])?;
    let deadline = Instant::now() + guest::PATIENCE;
    // Its first word may still be under way.
    while guest.ask(0x100, &[])?.1[8..12] != words(&[800]) {
        ensure!(Instant::now() < deadline, "it is never told");
    }
    screen.wanted.screens[0].rect.width = 1000;
    // The answer may come after the guest's patience has ended: it is the next one that has it then.
    loop {
        guest.add(0x100, &[])?;
        let asked = screen.asked;
        screen.until(|screen| screen.asked > asked)?;
        let (_, body) = guest.hear(1)?;
        if body[8..12] == words(&[1000]) {
            break;
        }
        ensure!(Instant::now() < deadline, "it is never told");
    }
    ensure!(guest.driver.config(4)? == words(&[0]), "its front end has events of its own");
    Ok(())
}

/// The cursor is drawn, moved, hidden and seen again; another screen is shown it, too.
#[test]
fn the_cursor_is_shown() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features(0), &[(800, 600)])?;
    let arrow = picture(64, 64, 5);
    ensure!(arrow.len() == CURSOR_BYTES);
    guest.create(7, 1, 64, 64)?;
    let entries = guest.lay(7, &arrow)?;
    ensure!(guest.attach(7, &entries)? == OK);
    ensure!(guest.transfer(7, Rect { x: 0, y: 0, width: 64, height: 64 }, 0)? == OK);
    guest.cursor(0x300, &[0, 10, 20, 0, 7, 3, 4, 0])?;
    screen.until(|screen| screen.cursor.is_some_and(|(at, shown)| shown && (at.x, at.y) == (10, 20)))?;
    ensure!(screen.cursor_picture == arrow && screen.hot == (3, 4));
    guest.cursor(0x301, &[0, 30, 40, 0, 7, 0, 0, 0])?;
    screen.until(|screen| screen.cursor.is_some_and(|(at, shown)| shown && (at.x, at.y) == (30, 40)))?;
    let mut other = guest.screen(Features(0), &[(800, 600)])?;
    ensure!(screen.until(|_| false).is_err(), "the first one is hung up on");
    other.until(|screen| screen.cursor_picture == arrow)?;
    guest.cursor(0x300, &[0, 30, 40, 0, 0, 0, 0, 0])?;
    other.until(|screen| screen.cursor.is_some_and(|(_, shown)| !shown))?;
    // One that comes while it is hidden is told what it looks like once it is seen again.
    let mut last = guest.screen(Features(0), &[(800, 600)])?;
    last.until(|screen| screen.cursor.is_some_and(|(_, shown)| !shown))?;
    guest.cursor(0x301, &[0, 50, 60, 0, 7, 0, 0, 0])?;
    last.until(|screen| screen.cursor.is_some_and(|(at, shown)| shown && (at.x, at.y) == (50, 60)))?;
    ensure!(last.cursor_picture == arrow && last.hot == (3, 4));
    Ok(())
}

/// However much the guest draws, the screen gets sixty frames a second at most, and the last of them in the end.
#[test]
fn frames_are_paced_and_the_newest_wins() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    guest.show(0, 1, 640, 480)?;
    let began = Instant::now();
    let mut last = Vec::new();
    let mut drawn = 0_u32;
    while began.elapsed() < Duration::from_millis(500) {
        last = picture(640, 480, 100 + drawn);
        guest.lay(1, &last)?;
        ensure!(guest.transfer(1, WHOLE, 0)? == OK && guest.flush(1, WHOLE)? == OK);
        drawn += 1;
    }
    screen.shows(0, 640, 480, &last)?;
    let most = (began.elapsed().as_secs_f64() * 60.0) as u32 + 3;
    ensure!(screen.updates <= most, "{} updates for {drawn} flushes, at most {most}", screen.updates);
    Ok(())
}

/// A front end that hands over what is no socket is refused; without a screen everything works.
#[test]
fn without_a_screen_everything_works() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    guest.show(0, 1, 640, 480)?;
    let file = tempfile::tempfile()?;
    ensure!(display::hand_over(guest.driver.talk()?, file.as_fd()).is_err(), "no socket");
    // That ended the conversation, and the device is as no driver has touched it for the next.
    let mut guest = Guest::connected(&mut process)?;
    guest.show(0, 1, 640, 480).map(drop)
}

/// Behind an IOMMU the guest's addresses are those that its front end tells; one that was not told is refused when it is used.
#[test]
fn pictures_lie_behind_an_iommu() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::with(Options { iommu: true, ..guest::options() })?;
    guest.driver.connect(process.connect()?)?;
    // Commands and answers where they are, pictures elsewhere than they seem.
    let seen_at = 1 << 40;
    let talk = guest.driver.talk()?;
    ensure!(iommu::update(talk, guest::SAID, 2 << 20, USER_OFFSET + guest::SAID, iommu::READ | iommu::WRITE)?);
    ensure!(iommu::update(talk, seen_at, 60 << 20, USER_OFFSET + guest::PICTURES, iommu::READ)?);
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    let pixels = picture(640, 480, 1);
    let entries = guest.lay(1, &pixels)?;
    let moved: Vec<_> = entries.iter().map(|(addr, len)| (addr - guest::PICTURES + seen_at, *len)).collect();
    guest.create(1, 2, 640, 480)?;
    ensure!(guest.attach(1, &entries)? == OK && guest.transfer(1, WHOLE, 0)? == guest::PARAMETER, "not told");
    guest.done(0x107, &[1, 0])?;
    ensure!(guest.attach(1, &moved)? == OK && guest.transfer(1, WHOLE, 0)? == OK);
    ensure!(guest.set_scanout(0, 1, WHOLE)? == OK && guest.flush(1, WHOLE)? == OK);
    screen.shows(0, 640, 480, &pixels)
}
