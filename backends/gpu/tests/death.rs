//! `atoll-gpu` is killed while the guest draws: the successor has the pictures, the commands that were under way are answered
//! once and right, and the screen shows the picture again.

#![allow(clippy::print_stdout, reason = "figures")]

mod guest;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_protocol::display::{Features, Rect};
use guest::{Guest, NO_RESOURCE, OK, listen, picture, words};
use rustix::fs::{MemfdFlags, SealFlags};

const WHOLE: Rect = Rect { x: 0, y: 0, width: 320, height: 240 };

const ROUNDS: u32 = 75;

/// How many commands are completed, modulo 2^16.
fn used(guest: &mut Guest) -> Result<u16> {
    let (queue, memory) = guest.driver.queue(0)?;
    Ok(queue.used_index(memory))
}

fn record() -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create("record", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, 64 << 20)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// The picture is back on a new screen without a word of the guest's, as it was when it was taken over last.
#[test]
fn the_picture_comes_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let record = record()?;
    let mut first = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    let mut guest = Guest::connected(&mut first)?;
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    let pixels = guest.show(0, 1, 320, 240)?;
    screen.shows(0, 320, 240, &pixels)?;
    // What the guest draws now is in its own memory only.
    guest.lay(1, &picture(320, 240, 77))?;
    first.child.kill()?;
    let began = Instant::now();
    first.end()?;
    let mut second = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    guest.driver.connect(second.connect()?)?;
    let mut screen = guest.screen(Features::CHANGES, &[(640, 480)])?;
    screen.shows(0, 320, 240, &pixels)?;
    println!("killed, and on the screen again after {:?}", began.elapsed());
    ensure!(guest.status(0x101, &[1, 2, 8, 8])? == NO_RESOURCE, "it is still there");
    ensure!(guest.transfer(1, WHOLE, 0)? == OK && guest.flush(1, WHOLE)? == OK);
    screen.shows(0, 320, 240, &picture(320, 240, 77))?;
    // Without a record nothing is left, and the driver is told so.
    second.child.kill()?;
    second.end()?;
    let mut third = listen(folder.path(), &[], &[])?;
    guest.driver.connect(third.connect()?)?;
    ensure!(guest.transfer(1, WHOLE, 0)? == NO_RESOURCE);
    Ok(())
}

/// Killed at any moment of a long row of commands none of which may be executed twice for the guest's eyes.
#[test]
fn commands_are_answered_once_over_many_deaths() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let record = record()?;
    let mut guest = Guest::new()?;
    let mut in_the_middle = 0;
    for round in 0..ROUNDS {
        let mut process = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
        guest.driver.connect(process.connect()?)?;
        // Create, attach, detach, unref, four times: each is an error the second time.
        let expected = 16;
        let before = used(&mut guest)?;
        for id in 1..=4 {
            guest.add(0x101, &words(&[id, 2, 64, 64]))?;
            guest.add(0x106, &Guest::attach_body(id, &[(guest::PICTURES, 16_384)]))?;
            guest.add(0x107, &words(&[id, 0]))?;
            guest.add(0x102, &words(&[id, 0]))?;
        }
        std::thread::sleep(Duration::from_micros(u64::from(round % 25) * 10));
        process.child.kill()?;
        process.end()?;
        in_the_middle += u32::from(used(&mut guest)?.wrapping_sub(before) < expected);
        let mut next = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
        guest.driver.connect(next.connect()?)?;
        for left in (1..=u64::from(expected)).rev() {
            let (status, _) = guest.hear(left)?;
            ensure!(status == OK, "round {round}, {left} before the end: {status:#x}");
        }
        // Nothing is left of it.
        for id in 1..=4 {
            ensure!(guest.status(0x102, &[id, 0])? == NO_RESOURCE);
        }
        next.child.kill()?;
        next.end()?;
    }
    println!("{in_the_middle} of {ROUNDS} deaths before all was completed");
    Ok(())
}

/// A guest that was reset finds nothing, though the record is kept.
#[test]
fn a_reset_empties_the_record() -> Result<()> {
    use vhost::vhost_user::VhostUserFrontend;
    let folder = tempfile::tempdir()?;
    let record = record()?;
    let mut first = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    let mut guest = Guest::connected(&mut first)?;
    guest.show(0, 1, 320, 240)?;
    // A front end that only goes leaves everything for the next.
    guest.driver.disconnect();
    guest.driver.connect(first.connect()?)?;
    ensure!(guest.flush(1, WHOLE)? == OK);
    guest.driver.front()?.reset_device()?;
    guest.driver.disconnect();
    first.child.kill()?;
    first.end()?;
    let mut second = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    let mut guest = Guest::connected(&mut second)?;
    ensure!(guest.flush(1, WHOLE)? == NO_RESOURCE);
    guest.show(0, 1, 320, 240)?;
    guest.driver.disconnect();
    // So does one whose front end has cleared its record of requests in flight, also while there is no process.
    let mut guest = Guest::connected(&mut second)?;
    ensure!(guest.flush(1, WHOLE)? == NO_RESOURCE);
    guest.show(0, 1, 320, 240)?;
    second.child.kill()?;
    second.end()?;
    let mut third = listen(folder.path(), &[], &[("--record-fd", record.try_clone()?)])?;
    let mut guest = Guest::connected(&mut third)?;
    ensure!(guest.flush(1, WHOLE)? == NO_RESOURCE);
    guest.show(0, 1, 320, 240).map(drop)
}
