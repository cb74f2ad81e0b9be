//! `atoll-display` as a process: the test is the GPU on one side and viewers on the other.

mod screen;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Result, bail, ensure};
use atoll_display::rfb::encoding;
use atoll_kit::driver::process::{command, with_fds};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::display::{CURSOR_BYTES, CursorPosition, Features, Rect, Reply, Request};
use atoll_protocol::input::{Frame, Hearer, InputKind};
use atoll_protocol::jail::JailLayer;
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason, SidecarOrder, SidecarReport};
use atoll_protocol::{FrameSocket, Generation};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use screen::{Gpu, PATIENCE, SECRET, Screen, decode_png, picture, rgb, text};

const SIZE: (u32, u32) = (640, 480);

/// What the GPU shows is what viewers see, as a whole and in part, in each encoding, and what a picture of it says.
#[test]
fn viewers_see_what_is_shown() -> Result<()> {
    let mut screen = Screen::start_with(false, &["--size", "640x480"], Vec::new())?;
    let (mut raw, mut tight) = (screen.viewer()?, screen.viewer()?);
    ensure!((raw.size, raw.name.as_str()) == (SIZE, "Atoll"));
    tight.encodings(&[encoding::TIGHT, encoding::RAW])?;
    let pictures = [
        picture(640, 480, 1),
        text(640, 480, 2),
        text(640, 480, 200),
        text(640, 480, 1),
        text(640, 480, 3),
        text(640, 480, 257),
        picture(640, 480, 2),
    ];
    for pixels in &pictures {
        screen.gpu.show(0, SIZE, pixels)?;
        raw.sees(SIZE, pixels)?;
        tight.sees(SIZE, pixels)?;
        ensure!(screen.screenshot(0)? == (SIZE, rgb(pixels)));
    }
    // A part of it, which is all that is told.
    let mut pixels = pictures[6].clone();
    let rect = Rect { x: 100, y: 50, width: 3, height: 2 };
    screen.gpu.say(Request::Update { scanout: 0, rect, pixels: &text(3, 2, 5) })?;
    for (row, from) in text(3, 2, 5).chunks(12).enumerate() {
        let at = ((50 + row) * 640 + 100) * 4;
        pixels[at..at + 12].copy_from_slice(from);
    }
    for viewer in [&mut raw, &mut tight] {
        viewer.request(true)?;
        ensure!(viewer.update()?.rects == 1);
        ensure!(rgb(&viewer.pixels) == rgb(&pixels));
    }
    Ok(())
}

/// The guest changes its mode, a viewer asks for one: all who understand are told, the others see what fits.
#[test]
fn sizes_go_both_ways() -> Result<()> {
    let mut screen = Screen::start_with(false, &["--size", "640x480", "--size", "800x600"], Vec::new())?;
    let (mut new, mut old, mut oldest) = (screen.viewer()?, screen.viewer()?, screen.viewer()?);
    new.encodings(&[encoding::RAW, encoding::EXTENDED_DESKTOP_SIZE, encoding::QEMU_KEY])?;
    old.encodings(&[encoding::RAW, encoding::DESKTOP_SIZE])?;
    new.request(true)?;
    let told = new.update()?;
    ensure!(told.sizes == [(0, 0, 640, 480)] && told.keys, "it knows that it may: {told:?}");
    let pixels = picture(800, 600, 3);
    screen.gpu.show(0, (800, 600), &pixels)?;
    new.sees((800, 600), &pixels)?;
    old.sees((800, 600), &pixels)?;
    let corner: Vec<u8> = pixels.chunks(800 * 4).take(480).flat_map(|row| &row[..640 * 4]).copied().collect();
    oldest.sees(SIZE, &corner)?;
    // A viewer asks for another one, the GPU hears of it.
    let mut bytes = vec![251, 0, 4, 0, 3, 0, 1, 0];
    bytes.extend([0; 16]);
    new.stream.write_all(&bytes)?;
    ensure!(matches!(screen.gpu.hear()?, Reply::Changed));
    let Reply::DisplayInfo(info) = screen.gpu.ask(Request::GetDisplayInfo)? else { bail!("no information") };
    let rect = |x, width, height| Rect { x, y: 0, width, height };
    ensure!(info.screens[0].rect == rect(0, 1024, 768) && info.screens[1].rect == rect(1024, 800, 600));
    let Reply::Edid(edid) = screen.gpu.ask(Request::GetEdid { scanout: 0 })? else { bail!("no EDID") };
    ensure!(u32::from(edid.bytes()[56]) | u32::from(edid.bytes()[58] >> 4) << 8 == 1024);
    new.request(true)?;
    ensure!(new.update()?.sizes == [(1, 4, 800, 600)], "handed on, not yet done");
    let pixels = picture(1024, 768, 4);
    screen.gpu.show(0, (1024, 768), &pixels)?;
    new.sees((1024, 768), &pixels)?;
    // One that cannot be.
    new.stream.write_all(&[251, 0, 0, 1, 0, 1, 0, 0])?;
    new.request(true)?;
    ensure!(new.update()?.sizes == [(1, 3, 1024, 768)]);
    let (report, _) = screen.ask(&DisplayOrder::Resize { head: 1, width: 1280, height: 1024 }, None)?;
    ensure!(report == DisplayReport::Done && matches!(screen.gpu.hear()?, Reply::Changed));
    Ok(())
}

/// Sizes that an operator or a viewer has asked for are what a successor asks for: a death does not switch a head off again.
#[test]
fn sizes_outlive_the_process() -> Result<()> {
    let memory = tempfile::tempfile()?;
    memory.set_len(128)?;
    let start = || -> Result<Screen> {
        Screen::start_with(false, &["--size", "1024x768"], vec![("--asked-fd", memory.try_clone()?.into())])
    };
    let screens = |screen: &mut Screen| -> Result<Vec<(u32, u32, u32)>> {
        let Reply::DisplayInfo(info) = screen.gpu.ask(Request::GetDisplayInfo)? else { bail!("no information") };
        let enabled = info.screens.iter().filter(|screen| screen.enabled);
        Ok(enabled.map(|screen| (screen.rect.x, screen.rect.width, screen.rect.height)).collect())
    };
    let mut screen = start()?;
    ensure!(screens(&mut screen)? == [(0, 1024, 768)]);
    let (report, _) = screen.ask(&DisplayOrder::Resize { head: 2, width: 800, height: 600 }, None)?;
    ensure!(report == DisplayReport::Done && matches!(screen.gpu.hear()?, Reply::Changed));
    drop(screen);
    let mut screen = start()?;
    ensure!(screens(&mut screen)? == [(0, 1024, 768), (1024, 800, 600)]);
    // And by a viewer.
    let mut viewer = screen.viewer()?;
    let mut bytes = vec![251, 0, 2, 128, 1, 224, 1, 0];
    bytes.extend([0; 16]);
    viewer.stream.write_all(&bytes)?;
    ensure!(matches!(screen.gpu.hear()?, Reply::Changed));
    drop(screen);
    ensure!(screens(&mut start()?)? == [(0, 640, 480), (640, 800, 600)]);
    Ok(())
}

/// The pointer's picture is the viewer's to draw; one that is hidden is nothing.
#[test]
fn pointers_are_told_apart_from_pictures() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let mut viewer = screen.viewer()?;
    viewer.encodings(&[encoding::RAW, encoding::CURSOR])?;
    viewer.request(true)?;
    ensure!(viewer.update()?.cursors.iter().all(|cursor| cursor.2.is_empty()), "none yet");
    let mut looks = [0; CURSOR_BYTES];
    looks[..8].copy_from_slice(&[1, 2, 3, 255, 4, 5, 6, 0]);
    let position = CursorPosition { scanout: 0, x: 9, y: 9 };
    screen.gpu.say(Request::CursorUpdate { position, hot_x: 3, hot_y: 4, picture: &looks })?;
    viewer.request(true)?;
    let told = viewer.update()?;
    let (x, y, pixels, mask) = &told.cursors[0];
    ensure!((*x, *y, &pixels[..], mask[0]) == (3, 4, &looks[..], 0x80) && mask[1..].iter().all(|bits| *bits == 0));
    screen.gpu.say(Request::CursorHide(position))?;
    viewer.request(true)?;
    ensure!(viewer.update()?.cursors[0].2.is_empty());
    Ok(())
}

/// The GPU's process dies: what it showed stays, also for who comes later; its successor goes on.
#[test]
fn a_picture_outlives_its_gpu() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let pixels = picture(640, 480, 5);
    screen.gpu.show(0, SIZE, &pixels)?;
    let mut early = screen.viewer()?;
    early.sees(SIZE, &pixels)?;
    let (ours, theirs) = UnixStream::pair()?;
    let old = std::mem::replace(&mut screen.gpu, Gpu::new(ours));
    drop(old);
    screen.viewer()?.sees(SIZE, &pixels)?;
    ensure!(screen.screenshot(0)?.1 == rgb(&pixels));
    ensure!(screen.ask(&DisplayOrder::NewDisplay, None)?.0 != DisplayReport::Done, "a descriptor is missing");
    ensure!(screen.ask(&DisplayOrder::NewDisplay, Some(theirs.into()))?.0 == DisplayReport::Done);
    screen.gpu.greet(Features::CHANGES)?;
    screen.gpu.say(Request::Scanout { scanout: 0, width: 640, height: 480 })?;
    screen.gpu.settle()?;
    ensure!(screen.screenshot(0)?.1 == rgb(&pixels), "until it paints");
    let pixels = picture(640, 480, 6);
    screen.gpu.show(0, SIZE, &pixels)?;
    early.sees(SIZE, &pixels)?;
    let (report, _) = screen.ask(&DisplayOrder::Info, None)?;
    let DisplayReport::Info { heads, connected: true } = report else { bail!("{report:?}") };
    ensure!(heads.len() == 1 && (heads[0].width, heads[0].viewers) == (640, 1), "{heads:?}");
    Ok(())
}

fn device(option: &str) -> Result<((&str, OwnedFd), Hearer)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok(((option, theirs), Hearer::new(ours)))
}

fn hear(hearer: &mut Hearer, count: usize) -> Result<Vec<(u16, u16, i32)>> {
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut heard = Vec::new();
    while heard.len() < count {
        ensure!(std::time::Instant::now() < deadline, "only {heard:?}");
        match hearer.try_hear()? {
            Some(Frame::Begin) => heard.push((99, 0, 0)),
            Some(Frame::Report(report)) => {
                heard.extend(report.events().iter().map(|event| (event.kind(), event.code(), event.value())));
            }
            None => std::thread::sleep(std::time::Duration::from_millis(2)),
        }
    }
    Ok(heard)
}

/// What is typed and pointed at arrives, by print and by number; who goes lets go of all keys.
#[test]
fn keys_and_pointers_arrive() -> Result<()> {
    let (keys, mut keyboard) = device("--events-fd=keyboard:")?;
    let (pointer, mut tablet) = device("--events-fd=tablet:")?;
    let mut screen = Screen::start_with(false, &["--size", "1001x501"], vec![keys, pointer])?;
    let mut viewer = screen.viewer()?;
    viewer.stream.write_all(&[4, 1, 0, 0, 0, 0, 0, b'a'])?;
    viewer.stream.write_all(&[4, 0, 0, 0, 0, 0, 0, b'a'])?;
    viewer.stream.write_all(&[255, 0, 0, 1, 0, 0, 255, 0x52, 0, 0, 0, 0xc8])?;
    viewer.stream.write_all(&[5, 1, 0x03, 0xe8, 0, 250])?;
    ensure!(hear(&mut keyboard, 4)? == [(99, 0, 0), (1, 30, 1), (1, 30, 0), (1, 103, 1)]);
    ensure!(hear(&mut tablet, 4)? == [(99, 0, 0), (3, 0, 0x7fff), (3, 1, 0x3fff), (1, 0x110, 1)]);
    drop(viewer);
    ensure!(hear(&mut keyboard, 1)? == [(1, 103, 0)]);
    ensure!(hear(&mut tablet, 1)? == [(1, 0x110, 0)]);
    // The keyboard's process was started again.
    let (ours, theirs) = UnixStream::pair()?;
    let order = DisplayOrder::NewInput { kind: InputKind::Keyboard };
    ensure!(screen.ask(&order, Some(theirs.into()))?.0 == DisplayReport::Done);
    let mut keyboard = Hearer::new(ours);
    screen.viewer()?.stream.write_all(&[4, 1, 0, 0, 0, 0, 0xff, 0x0d])?;
    ensure!(hear(&mut keyboard, 3)? == [(99, 0, 0), (1, 28, 1), (1, 28, 0)]);
    Ok(())
}

/// A wrong password is refused after a while, a right one is let in; what is behind the eighth character does not count.
#[test]
fn a_password_is_asked_for() -> Result<()> {
    let mut screen = Screen::start(&[], Vec::new())?;
    let pixels = picture(640, 480, 7);
    screen.gpu.show(0, SIZE, &pixels)?;
    for wrong in ["", "s3cret", "S3CRET-A"] {
        let error = screen.viewer_with(wrong).err().map(|error| error.to_string());
        ensure!(error.as_deref() == Some("refused: wrong password"), "{error:?}");
    }
    screen.viewer_with(SECRET)?.sees(SIZE, &pixels)?;
    screen.viewer_with(&SECRET[..8])?.sees(SIZE, &pixels)
}

/// A recording has every change, for as long as it was to be seen; it ends when it is told to.
#[test]
fn a_head_is_recorded() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let path = screen.folder.path().join("film.png");
    let file = || std::fs::File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let record = DisplayOrder::Record { head: 0 };
    let refused = screen.ask(&record, Some(file()?.into()))?.0;
    ensure!(matches!(&refused, DisplayReport::Refused { reason } if reason.contains("shows nothing")), "{refused:?}");
    let first = picture(640, 480, 8);
    screen.gpu.show(0, SIZE, &first)?;
    ensure!(screen.ask(&record, Some(file()?.into()))?.0 == DisplayReport::Done);
    ensure!(screen.ask(&record, Some(file()?.into()))?.0 != DisplayReport::Done, "it is being recorded");
    std::thread::sleep(std::time::Duration::from_millis(200));
    let rect = Rect { x: 10, y: 20, width: 30, height: 40 };
    let second = text(30, 40, 9);
    screen.gpu.say(Request::Update { scanout: 0, rect, pixels: &second })?;
    screen.gpu.settle()?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    // All of it, behind a part that was not at the origin.
    let third = picture(640, 480, 12);
    screen.gpu.say(Request::Update {
        scanout: 0,
        rect: Rect { x: 0, y: 0, width: 640, height: 480 },
        pixels: &third,
    })?;
    screen.gpu.settle()?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let (report, _) = screen.ask(&DisplayOrder::StopRecord { head: 0 }, None)?;
    ensure!(report == DisplayReport::Recorded { head: 0, frames: 3 }, "{report:?}");
    let bytes = std::fs::read(&path)?;
    ensure!(decode_png(&bytes)? == (SIZE, rgb(&first)), "for who knows no animation, the first picture");
    let mut reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info()?;
    ensure!(reader.info().animation_control().map(|control| control.num_frames) == Some(3));
    let mut pixels = vec![0; 640 * 480 * 3];
    reader.next_frame(&mut pixels)?;
    let shown = reader.info().frame_control().map(|frame| frame.delay_num).unwrap_or_default();
    ensure!((150..5000).contains(&shown), "{shown} ms");
    reader.next_frame(&mut pixels)?;
    let frame = *reader.info().frame_control().unwrap_or(&png::FrameControl::default());
    ensure!((frame.x_offset, frame.y_offset, frame.width, frame.height) == (10, 20, 30, 40));
    ensure!(pixels[..30 * 40 * 3] == rgb(&second));
    reader.next_frame(&mut pixels)?;
    ensure!(pixels == rgb(&third));
    Ok(())
}

/// A process that is killed leaves a recording that is whole: it has all of its frames up to the last change, and ends as one does.
#[test]
fn a_recording_outlives_its_process() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let path = screen.folder.path().join("film.png");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    let first = picture(640, 480, 8);
    screen.gpu.show(0, SIZE, &first)?;
    ensure!(screen.ask(&DisplayOrder::Record { head: 0 }, Some(file.into()))?.0 == DisplayReport::Done);
    let rect = Rect { x: 10, y: 20, width: 30, height: 40 };
    let second = text(30, 40, 9);
    // Each is written when the next one comes.
    let frames = || -> Result<u32> {
        let bytes = std::fs::read(&path)?;
        let reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info()?;
        Ok(reader.info().animation_control().map_or(0, |control| control.num_frames))
    };
    let begin = std::time::Instant::now();
    while !(2..1000).contains(&frames().unwrap_or(0)) {
        ensure!(begin.elapsed() < PATIENCE, "no frames");
        screen.gpu.say(Request::Update { scanout: 0, rect, pixels: &second })?;
        screen.gpu.settle()?;
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    screen.child.kill()?;
    screen.child.wait()?;
    let bytes = std::fs::read(&path)?;
    let mut reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info()?;
    let count = frames()?;
    let mut pixels = vec![0; 640 * 480 * 3];
    reader.next_frame(&mut pixels)?;
    ensure!(pixels == rgb(&first));
    for _ in 1..count {
        reader.next_frame(&mut pixels)?;
        ensure!(pixels[..30 * 40 * 3] == rgb(&second));
    }
    Ok(reader.finish()?)
}

/// Two heads are two pictures, each with its own place to arrive at.
#[test]
fn heads_are_apart() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let second = folder.path().join("second.sock");
    let place = std::os::unix::net::UnixListener::bind(&second)?;
    let fds = vec![("--vnc-fd=1:", OwnedFd::from(place))];
    let mut screen = Screen::start_with(false, &["--size", "640x480", "--size", "320x200"], fds)?;
    let pixels = [picture(640, 480, 10), picture(320, 200, 11)];
    screen.gpu.show(0, SIZE, &pixels[0])?;
    screen.gpu.show(1, (320, 200), &pixels[1])?;
    screen.viewer()?.sees(SIZE, &pixels[0])?;
    let stream = UnixStream::connect(&second)?;
    let mut viewer = screen::Viewer::open(stream, None)?;
    ensure!(viewer.name == "Atoll, head 1");
    viewer.sees((320, 200), &pixels[1])?;
    ensure!(screen.screenshot(1)? == ((320, 200), rgb(&pixels[1])));
    let (report, _) = screen.ask(&DisplayOrder::Screenshot { head: 16 }, None)?;
    ensure!(
        matches!(&report, DisplayReport::Refused { reason } if reason.contains("there is no head 16")),
        "{report:?}"
    );
    let mut rest = Vec::new();
    drop(screen);
    viewer.stream.read_to_end(&mut rest).ok();
    Ok(())
}

/// Under a supervisor it says who it is and how its jail came out, waits to be told to start, and ends when it is told to.
#[test]
fn a_supervisor_is_obeyed() -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = command(screen::PROGRAM);
    let mut child = with_fds(&mut command, &[("--sidecar-fd", theirs.into())]).spawn()?;
    let mut sidecar = FrameSocket::new(ours.into());
    let hear = |sidecar: &mut FrameSocket| sidecar.reader.receive_message::<SidecarReport>(Some(PATIENCE));
    ensure!(matches!(hear(&mut sidecar)?, SidecarReport::Hello { class: DeviceClass::Display, .. }));
    let SidecarReport::Jailed { layers } = hear(&mut sidecar)? else { bail!("not a word about its jail") };
    let stands = |wanted| layers.iter().any(|jailed| jailed.layer == wanted && jailed.stands());
    ensure!(stands(JailLayer::Calls) && stands(JailLayer::Capabilities), "{layers:?}");
    let generation = Generation(3);
    sidecar.writer.send(&SidecarOrder::Start { generation, progress_ms: 0 }, &[], PATIENCE)?;
    ensure!(hear(&mut sidecar)? == SidecarReport::Ready { generation });
    sidecar.writer.send(&SidecarOrder::Ping { nonce: 5 }, &[], PATIENCE)?;
    ensure!(hear(&mut sidecar)? == SidecarReport::Pong { nonce: 5 });
    sidecar.writer.send(&SidecarOrder::Exit, &[], PATIENCE)?;
    ensure!(hear(&mut sidecar)? == SidecarReport::Goodbye { reason: GoodbyeReason::Asked });
    ensure!(child.wait()?.success());
    Ok(())
}
