//! A guest and a screen that mean harm: they are answered or hung up on, and nothing else comes of it.

mod guest;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::display;
use atoll_protocol::display::{Features, Header, REPLY_MAX, Rect, Reply};
use guest::{Guest, OK, OUT_OF_MEMORY, PARAMETER, PATIENCE, UNSPECIFIED, listen, picture, words};

/// Descriptors: where and how long.
type Parts<'a> = &'a [(u64, u32)];

const WHOLE: Rect = Rect { x: 0, y: 0, width: 640, height: 480 };

/// Requests that are too short, answers that have no room, memory that is none, more pictures than there is memory for: each
/// is answered, and the next picture is shown.
#[test]
fn a_hostile_guest_is_answered() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &["--memory", "8"], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    ensure!(guest.status(0x10c, &[0; 12])? == UNSPECIFIED, "a blob");
    ensure!(guest.status(0x101, &[1])? == UNSPECIFIED);
    ensure!(guest.status(0x101, &[1, 2, 16_384, 16_384])? == OUT_OF_MEMORY);
    let made = (100..).take_while(|id| guest.create(*id, 2, 640, 480).is_ok()).count();
    ensure!(made == 6, "{made} pictures of 1.2 MiB");
    let made = made as u32;
    ensure!((100..100 + made).all(|id| guest.done(0x102, &[id, 0]).is_ok()));
    guest.create(1, 2, 640, 480)?;
    for entry in [(64 << 20, 4096), (u64::MAX - 10, 4096), ((64 << 20) - 8, 16), (1 << 60, u32::MAX)] {
        ensure!(guest.attach(1, &[(0, 16), entry])? == PARAMETER, "{entry:?}");
    }
    guest.done(0x102, &[1, 0])?;
    // Requests that the queue's own rules allow and the device's do not.
    let (queue, memory) = guest.driver.queue(0)?;
    let (said, heard) = (1 << 20, (1 << 20) + 4096);
    memory.write(said, &words(&[0x100, 0, 0, 0, 0, 0]));
    let odd: [(Parts, Parts, u32); 6] = [
        (&[(said, 24)], &[], 0),
        (&[(said, 24)], &[(heard, 23)], 0),
        (&[(said, 24)], &[(heard, 30)], 24),
        (&[(said, 3)], &[(heard, 408)], 24),
        (&[], &[(heard, 408)], 24),
        (&[(64 << 20, 24)], &[(64 << 20, 408)], 0),
    ];
    for (readable, writable, written) in odd {
        queue.add(memory, readable, writable).context("a full queue")?;
        queue.publish(memory)?;
        let (_, len) = queue.take_within(memory, PATIENCE)?;
        ensure!(len == written, "{readable:?} {writable:?}: {len}");
    }
    for body in [&[99, 0, 0, 0, 1, 0, 0, 0][..], &[0, 0, 0, 0, 55, 0, 0, 0], &[0], &[u32::MAX; 20]] {
        guest.cursor(0x300, body)?;
        guest.cursor(0x301, body)?;
        guest.cursor(0x100, body)?;
    }
    let pixels = guest.show(0, 1, 640, 480)?;
    screen.shows(0, 640, 480, &pixels)
}

/// A screen that never reads, or answers nothing, keeps nobody waiting; it is exchanged for one that does.
#[test]
fn a_screen_that_does_not_read_stops_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let (_silent, theirs) = UnixStream::pair()?;
    ensure!(display::hand_over(guest.driver.talk()?, theirs.as_fd())?);
    guest.show(0, 2, 640, 480)?;
    // Asked what it wants, the guest does without its word.
    ensure!(guest.ask(0x100, &[])?.0 == 0x1101);
    let screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    for frame in 0..40 {
        guest.lay(2, &picture(640, 480, frame))?;
        ensure!(guest.transfer(2, WHOLE, 0)? == OK && guest.flush(2, WHOLE)? == OK);
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut other = guest.screen(Features::CHANGES, &[(640, 480)])?;
    other.shows(0, 640, 480, &picture(640, 480, 39))?;
    drop(screen);
    guest.flush(2, WHOLE).map(drop)
}

/// Whatever a screen says that it was not asked, or that cannot be right, ends its conversation and nothing else.
#[test]
fn a_screen_that_says_nonsense_is_hung_up_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = listen(folder.path(), &[], &[])?;
    let mut guest = Guest::connected(&mut process)?;
    let mut unasked = Vec::new();
    Reply::DisplayInfo(Box::default()).put(&mut unasked);
    let mut changed = Vec::new();
    Reply::Changed.put(&mut changed);
    let mut taken = Vec::new();
    Reply::Taken.put(&mut taken);
    let head = |code, reply, payload| Header { code, reply, payload }.encode().to_vec();
    let nonsense: [(&str, Vec<u8>); 7] = [
        ("noise", vec![0xa5; 4096]),
        ("a long message", head(3, true, REPLY_MAX + 1)),
        ("a long nothing", head(1, true, 8)),
        ("a wrong answer", unasked),
        ("a question", head(1, false, 0)),
        ("a change that was not agreed on", changed),
        ("the taking of nothing", taken),
    ];
    for (name, bytes) in nonsense {
        let (mut ours, theirs) = UnixStream::pair()?;
        ensure!(display::hand_over(guest.driver.talk()?, theirs.as_fd())?);
        drop(theirs);
        ours.write_all(&bytes)?;
        ours.shutdown(std::net::Shutdown::Write)?;
        ours.set_read_timeout(Some(PATIENCE))?;
        std::io::copy(&mut ours, &mut std::io::sink()).or_else(|error| {
            // What was not read there is a reset here.
            let reset = error.kind() == std::io::ErrorKind::ConnectionReset;
            if reset { Ok(0) } else { Err(error) }
        })?;
        ensure!(guest.ask(0x100, &[])?.0 == 0x1101, "{name}");
    }
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    let pixels = guest.show(0, 1, 640, 480)?;
    screen.shows(0, 640, 480, &pixels)?;
    // One that wants what cannot be gets the nearest that can.
    screen.wanted.screens[0].rect = Rect { x: u32::MAX, y: 0, width: u32::MAX, height: 1 };
    screen.say(&Reply::Changed)?;
    let asked = screen.asked;
    screen.until(|screen| screen.asked > asked)?;
    for _ in 0..1000 {
        screen.say(&Reply::Changed)?;
    }
    screen.until(|screen| screen.asked > asked + 1)?;
    let (status, body) = guest.ask(0x100, &[])?;
    ensure!(status == 0x1101 && body[8..16] == words(&[4095, 64]), "{:?}", &body[..24]);
    Ok(())
}
