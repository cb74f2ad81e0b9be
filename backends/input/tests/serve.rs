//! `atoll-input` as a process: the test is the guest's driver on one side and whoever types on the other.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_devices::virtio::input_config::{self, Pages, select};
use atoll_kit::driver::process::{self, Process};
use atoll_kit::driver::{Driver, Options};
use atoll_protocol::input::{Event, Frame, InputKind, Report, Speaker, Spoken, code};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const PATIENCE: Duration = Duration::from_secs(60);
const PROGRAM: &str = env!("CARGO_BIN_EXE_atoll-input");
/// Where buffers are in the guest's memory.
const DATA: u64 = 4 << 20;
const EVENTS: usize = 0;
const STATUS: usize = 1;
const SYN: (u16, u16, i32) = (0, 0, 0);

fn options() -> Options {
    Options { queues: 2, size: 64, ..Options::default() }
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn start(folder: &Path, kind: &str, events: &OwnedFd) -> Result<Process> {
    let args = ["--kind", kind, "--serial", "seat 1", "--jail=strict"];
    Process::listen(PROGRAM, folder, &args, &[("--events-fd", events.try_clone()?)])
}

fn key(key: u16, down: bool) -> Result<Event> {
    Ok(Event::key(key, down)?)
}

fn report(events: Vec<Event>) -> Result<Frame> {
    Ok(Frame::Report(Report::new(events)?))
}

/// Makes `count` buffers available for events.
fn offer(driver: &mut Driver, count: u64, len: u32) -> Result<()> {
    let (queue, guest) = driver.queue(EVENTS)?;
    for _ in 0..count {
        let head = queue.next_head().context("a full queue")?;
        queue.add(guest, &[], &[(DATA + 64 * u64::from(head), len)]);
    }
    queue.publish(guest)
}

/// The next event, whose buffer is given back to the device if it is to be.
fn event(driver: &mut Driver, again: bool) -> Result<(u16, u16, i32)> {
    let (queue, guest) = driver.queue(EVENTS)?;
    let (head, written) = queue.take_within(guest, PATIENCE)?;
    ensure!(written == 8, "{written} bytes");
    let mut bytes = [0; 8];
    guest.read(DATA + 64 * u64::from(head), &mut bytes);
    if again {
        offer(driver, 1, 8)?;
    }
    let [a, b, c, d, e, f, g, h] = bytes;
    Ok((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]), i32::from_le_bytes([e, f, g, h])))
}

fn events(driver: &mut Driver, count: usize) -> Result<Vec<(u16, u16, i32)>> {
    (0..count).map(|_| event(driver, true)).collect()
}

/// A driver finds the pages as the specification has them, and what is said reaches it, whole, in order.
#[test]
fn a_guest_hears_what_is_said() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, theirs) = pair()?;
    let mut process = start(folder.path(), "tablet", &theirs)?;
    let mut driver = process.driver(options())?;
    let pages = Pages::ask(|select, subsel| {
        driver.front()?.set_config(0, VhostUserConfigFlags::WRITABLE, &[select, subsel])?;
        driver.config(input_config::LEN as u32)
    })?;
    ensure!(pages.page(select::ID_NAME, 0) == b"Atoll tablet" && pages.page(select::ID_SERIAL, 0) == b"seat 1");
    ensure!(pages.page(select::ID_DEVIDS, 0) == [6, 0, 0xf4, 0x1a, 2, 0, 1, 0]);
    ensure!(pages.page(select::ABS_INFO, 1)[4..8] == [0xff, 0x7f, 0, 0]);
    ensure!(pages == atoll_input::shape::pages(InputKind::Tablet, "seat 1"));

    offer(&mut driver, 32, 8)?;
    let mut speaker = Speaker::new(ours);
    let at = |x: u16| -> Result<Frame> {
        report(vec![
            Event::absolute(code::X, x)?,
            Event::absolute(code::Y, 7)?,
            key(code::BTN_LEFT, true)?,
            key(30, true)?,
        ])
    };
    for x in 0..100 {
        ensure!(speaker.say(&at(x)?)? == Spoken::Sent);
        let told = events(&mut driver, 4)?;
        ensure!(told == [(3, 0, x.into()), (3, 1, 7), (1, code::BTN_LEFT, 1), SYN], "a tablet has no keys: {told:?}");
    }
    // Lights are taken.
    let (queue, guest) = driver.queue(STATUS)?;
    guest.write(DATA - 64, &[0x11, 0, 1, 0, 1, 0, 0, 0]);
    queue.add(guest, &[(DATA - 64, 8)], &[]).context("a full queue")?;
    queue.publish(guest)?;
    ensure!(queue.take_within(guest, PATIENCE)?.1 == 0);
    // Another one speaks: the button comes up.
    ensure!(Speaker::new(speaker.as_fd().try_clone_to_owned()?).begin()? == Spoken::Sent);
    ensure!(events(&mut driver, 2)? == [(1, code::BTN_LEFT, 0), SYN]);
    Ok(())
}

/// The pair of sockets outlives processes at both ends: a successor goes on with what is said, and no key stays down.
#[test]
fn a_successor_lets_go_of_all_keys() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, theirs) = pair()?;
    let mut first = start(folder.path(), "mouse", &theirs)?;
    let mut driver = first.driver(options())?;
    offer(&mut driver, 32, 8)?;
    let mut speaker = Speaker::new(ours);
    speaker.say(&report(vec![Event::relative(code::X, -3)?, key(code::BTN_RIGHT, true)?])?)?;
    ensure!(events(&mut driver, 3)? == [(2, 0, -3), (1, code::BTN_RIGHT, 1), SYN]);
    drop(first);
    speaker.say(&report(vec![Event::relative(code::Y, 4)?])?)?;
    let mut second = start(folder.path(), "mouse", &theirs)?;
    driver.connect(second.connect()?)?;
    let up = |button: u16| (1, button, 0);
    let all =
        [up(code::BTN_LEFT), up(code::BTN_RIGHT), up(code::BTN_MIDDLE), up(code::BTN_SIDE), up(code::BTN_EXTRA), SYN];
    ensure!(events(&mut driver, 6)? == all);
    ensure!(events(&mut driver, 2)? == [(2, 1, 4), SYN], "what was said meanwhile");
    speaker.say(&report(vec![key(code::BTN_LEFT, true)?])?)?;
    ensure!(events(&mut driver, 2)? == [(1, code::BTN_LEFT, 1), SYN]);
    // Nobody has the wire any more.
    drop((speaker, theirs));
    ensure!(events(&mut driver, 2)? == [(1, code::BTN_LEFT, 0), SYN]);
    Ok(())
}

/// A guest without buffers misses reports as a whole, and nothing that came long ago reaches it; a key comes up all the
/// same. Buffers that are too small are given back empty.
#[test]
fn reports_are_never_halved() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, theirs) = pair()?;
    let mut process = start(folder.path(), "keyboard", &theirs)?;
    let mut driver = process.driver(options())?;
    let mut speaker = Speaker::new(ours);
    offer(&mut driver, 3, 8)?;
    speaker.say(&report(vec![key(30, true)?])?)?;
    ensure!([event(&mut driver, false)?, event(&mut driver, false)?] == [(1, 30, 1), SYN]);
    // One buffer is left: it is not enough.
    speaker.say(&report(vec![key(30, false)?, key(31, true)?])?)?;
    std::thread::sleep(Duration::from_millis(1500));
    let (queue, guest) = driver.queue(EVENTS)?;
    ensure!(queue.take(guest).is_none(), "half a report");
    let mut lost = 0;
    while speaker.say(&report(vec![key(32, true)?])?)? == Spoken::Sent {
        lost += 1;
    }
    ensure!(lost > 10);
    offer(&mut driver, 20, 8)?;
    ensure!(events(&mut driver, 2)? == [(1, 30, 0), SYN]);
    let deadline = Instant::now() + PATIENCE;
    while speaker.say(&report(vec![key(33, true)?])?)? == Spoken::Lost {
        ensure!(Instant::now() < deadline, "it listens no more");
    }
    ensure!(events(&mut driver, 2)? == [(1, 33, 1), SYN]);
    Ok(())
}

/// Nonsense on the wire ends the wire and not the device; mistakes on the command line are named.
#[test]
fn nonsense_is_contained() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, theirs) = pair()?;
    let mut process = start(folder.path(), "keyboard", &theirs)?;
    let mut driver = process.driver(options())?;
    offer(&mut driver, 16, 8)?;
    let mut speaker = Speaker::new(ours);
    speaker.say(&report(vec![key(30, true)?])?)?;
    ensure!(events(&mut driver, 2)? == [(1, 30, 1), SYN]);
    send(&speaker, &[7; 100], SendFlags::empty())?;
    ensure!(events(&mut driver, 2)? == [(1, 30, 0), SYN]);
    ensure!(speaker.say(&report(vec![key(31, true)?])?).is_err(), "hung up");
    ensure!(driver.config(8)?.len() == 8, "the device is there");

    let file = tempfile::tempfile()?;
    let fd: OwnedFd = file.into();
    let mut command = process::command(PROGRAM);
    command.args(["--socket", "x", "--kind", "mouse"]).stderr(std::process::Stdio::piped());
    let output = process::with_fds(&mut command, &[("--events-fd", fd)]).spawn()?.wait_with_output()?;
    let text = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && text.contains("pass one end of a pair of sockets"), "{text}");
    let (status, text) = process::fails(PROGRAM, &["--socket", "x", "--events-fd", "9", "--kind", "pen"]);
    ensure!(status.code() == Some(2) && text.contains("there are keyboard, tablet and mouse"), "{text}");
    Ok(())
}
