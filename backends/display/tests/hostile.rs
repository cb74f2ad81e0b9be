//! Viewers, browsers and GPUs that mean no good: each is given up, and nobody else notices.

mod screen;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::process::{command, with_fds};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::display::{Features, Rect, Reply, Request};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use screen::{Gpu, PATIENCE, PROGRAM, Screen, picture};

const SIZE: (u32, u32) = (640, 480);

/// It has hung up on us.
fn is_given_up(stream: &mut (impl Read + Write)) -> Result<bool> {
    let mut bytes = vec![0; 1 << 16];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => return Ok(false),
            Err(_) => return Ok(true),
        }
    }
}

fn memory_kib(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = text.split_whitespace().nth(1).context("resident pages")?.parse()?;
    Ok(pages * 4)
}

/// Noise at every stage of the conversation; the others go on looking.
#[test]
fn viewers_that_talk_nonsense_are_given_up() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let pixels = picture(640, 480, 1);
    screen.gpu.show(0, SIZE, &pixels)?;
    let mut good = screen.viewer()?;
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"RFB 003.003\n", b"RFB 003.008\n\x10", &[0xff; 4096]] {
        let mut stream = UnixStream::connect(&screen.unix)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // It may have hung up before all of it is said.
        let _ = stream.write_all(noise);
        ensure!(is_given_up(&mut stream)?, "{noise:?}");
    }
    let said: [&[u8]; 5] = [
        &[7],
        &[0, 0, 0, 0, 24, 24, 0, 1, 0, 255, 0, 255, 0, 255, 0, 8, 16, 0, 0, 0],
        &[6, 0, 0, 0, 255, 255, 255, 255],
        &[255, 9],
        &[250, 0, 0, 0],
    ];
    for said in said {
        let mut viewer = screen.viewer()?;
        viewer.stream.write_all(said)?;
        ensure!(is_given_up(&mut viewer.stream)?, "{said:?}");
    }
    good.sees(SIZE, &pixels)
}

/// Sixteen viewers that ask and never read cost little, and are gone after ten seconds; then there is room for others.
#[test]
fn viewers_that_never_read_are_given_up() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    screen.gpu.show(0, SIZE, &picture(640, 480, 2))?;
    let mut good = screen.viewer()?;
    let mut lazy = (0..15).map(|_| screen.viewer()).collect::<Result<Vec<_>>>()?;
    let before = memory_kib(screen.child.id())?;
    ensure!(screen.viewer().is_err(), "there is no place left");
    for viewer in &mut lazy {
        viewer.stream.set_write_timeout(Some(Duration::from_millis(50)))?;
        for _ in 0..50 {
            if viewer.request(false).is_err() {
                break;
            }
        }
    }
    let begun = Instant::now();
    for seed in 3..30 {
        let pixels = picture(640, 480, seed);
        screen.gpu.show(0, SIZE, &pixels)?;
        let asked = Instant::now();
        good.sees(SIZE, &pixels)?;
        ensure!(asked.elapsed() < Duration::from_secs(5), "others wait: {:?}", asked.elapsed());
    }
    let grown = memory_kib(screen.child.id())?.saturating_sub(before);
    ensure!(grown < 64 << 10, "{grown} KiB more");
    loop {
        ensure!(begun.elapsed() < PATIENCE, "the lazy ones stay");
        let (report, _) = screen.ask(&DisplayOrder::Info, None)?;
        if matches!(&report, DisplayReport::Info { heads, .. } if heads[0].viewers == 1) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    screen.viewer()?;
    Ok(())
}

/// A viewer that says ten thousand things a second is heard more slowly, and others type as before.
#[test]
fn viewers_that_flood_are_slowed_down() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let mut flood = screen.viewer()?;
    flood.stream.set_write_timeout(Some(Duration::from_millis(100)))?;
    let noise = [5, 0, 0, 1, 0, 1].repeat(1000);
    let begun = Instant::now();
    let mut sent = 0;
    while begun.elapsed() < Duration::from_secs(2) {
        match flood.stream.write(&noise) {
            Ok(count) => sent += count / 6,
            Err(_) => break,
        }
    }
    let pixels = picture(640, 480, 3);
    let asked = Instant::now();
    screen.gpu.show(0, SIZE, &pixels)?;
    screen.viewer()?.sees(SIZE, &pixels)?;
    ensure!(asked.elapsed() < Duration::from_secs(2), "others wait: {:?}", asked.elapsed());
    // What a socket holds, and what is heard in two seconds and a bit.
    ensure!(sent < 120_000, "{sent} heard");
    Ok(())
}

/// A viewer that goes on flooding is hung up on; one that asks for many sizes and leaves has asked for the last of them.
#[test]
fn what_a_viewer_has_said_does_not_outlive_it() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    screen.gpu.greet(Features::CHANGES)?;
    let mut many = screen.viewer()?;
    for width in 300..800_u16 {
        let mut bytes = vec![251, 0];
        bytes.extend(width.to_be_bytes());
        bytes.extend([1, 0, 1, 0]);
        bytes.extend([0; 16]);
        many.stream.write_all(&bytes)?;
    }
    let wanted = |screen: &mut Screen| -> Result<u32> {
        match screen.ask(&DisplayOrder::Info, None)?.0 {
            DisplayReport::Info { heads, .. } => Ok(heads[0].wanted_width),
            other => anyhow::bail!("{other:?}"),
        }
    };
    let begun = Instant::now();
    while wanted(&mut screen)? != 799 {
        ensure!(begun.elapsed() < Duration::from_secs(5), "{} is asked for", wanted(&mut screen)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut flood = screen.viewer()?;
    flood.stream.set_write_timeout(Some(Duration::from_millis(100)))?;
    let (noise, begun) = ([5, 0, 0, 1, 0, 1].repeat(1000), Instant::now());
    loop {
        ensure!(begun.elapsed() < PATIENCE, "it is heard for ever");
        match flood.stream.write(&noise) {
            Err(error) if !matches!(error.kind(), std::io::ErrorKind::WouldBlock) => break,
            _ => {}
        }
    }
    screen.viewer().map(drop)
}

/// A hundred who arrive and say nothing keep nobody out.
#[test]
fn who_says_nothing_keeps_nobody_out() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let pixels = picture(640, 480, 7);
    screen.gpu.show(0, SIZE, &pixels)?;
    let silent = (0..100).map(|_| UnixStream::connect(&screen.unix)).collect::<std::io::Result<Vec<_>>>()?;
    screen.viewer()?.sees(SIZE, &pixels)?;
    drop(silent);
    Ok(())
}

/// GPUs that say what cannot be are hung up on; the picture stays, and the next one is heard.
#[test]
fn gpus_that_talk_nonsense_are_given_up() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let pixels = picture(640, 480, 4);
    screen.gpu.show(0, SIZE, &pixels)?;
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let noises = [
        words(&[99, 0, 0]),
        words(&[8, 0, u32::MAX]),
        words(&[8, 0, 24, 0, 0, 0, 9, 9, 0]),
        words(&[9, 0, 8, 0, 0]),
        words(&[7, 4, 12, 16, 1, 1]),
        words(&[2, 0, 8, 2, 0]),
        vec![0xff; 64],
    ];
    for noise in noises {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ensure!(screen.ask(&DisplayOrder::NewDisplay, Some(theirs.into()))?.0 == DisplayReport::Done);
        ours.write_all(&noise)?;
        ensure!(is_given_up(&mut ours)?, "{noise:?}");
        screen.viewer()?.sees(SIZE, &pixels)?;
    }
    let (ours, theirs) = UnixStream::pair()?;
    ensure!(screen.ask(&DisplayOrder::NewDisplay, Some(theirs.into()))?.0 == DisplayReport::Done);
    screen.gpu = Gpu::new(ours);
    screen.gpu.greet(Features::CHANGES)?;
    // Far outside, and larger than anything that is shown.
    let rect = Rect { x: 1 << 31, y: 1 << 31, width: 2, height: 2 };
    screen.gpu.say(Request::Update { scanout: 0, rect, pixels: &[1; 16] })?;
    screen.gpu.say(Request::Scanout { scanout: 1, width: 0xffff_ffff, height: 0xffff_ffff })?;
    screen.gpu.settle()?;
    screen.viewer()?.sees(SIZE, &pixels)?;
    for scanout in 0..16 {
        screen.gpu.say(Request::Scanout { scanout, width: 8192, height: 8192 })?;
    }
    screen.gpu.settle()?;
    ensure!(memory_kib(screen.child.id())? < 700 << 10);
    Ok(())
}

/// Memory for frames that is none, that could be cut, that is too short, that nobody agreed on: each ends its conversation, and the
/// picture stays. What is right is shown.
#[test]
fn memory_that_is_none_is_refused() -> Result<()> {
    let mut screen = Screen::start_with(false, &[], Vec::new())?;
    let rect = Rect { x: 0, y: 0, width: SIZE.0, height: SIZE.1 };
    let pixels = [5, 6].map(|seed| picture(SIZE.0, SIZE.1, seed));
    screen.gpu.show(0, SIZE, &pixels[0])?;
    let memfd = |bytes: &[u8], seals: SealFlags| -> Result<OwnedFd> {
        let memfd = memfd_create("frames", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::io::write(&memfd, bytes)?;
        fcntl_add_seals(&memfd, seals)?;
        Ok(memfd)
    };
    let (pipe, _end) = rustix::pipe::pipe()?;
    let cases = [
        ("nothing", Features::FRAMES, None, false),
        ("a pipe", Features::FRAMES, Some(pipe), false),
        ("a file", Features::FRAMES, Some(tempfile::tempfile()?.into()), false),
        ("no seal", Features::FRAMES, Some(memfd(&pixels[1], SealFlags::GROW)?), false),
        ("half of it", Features::FRAMES, Some(memfd(&pixels[1][..600_000], SealFlags::SHRINK)?), false),
        ("not agreed on", Features::CHANGES, Some(memfd(&pixels[1], SealFlags::SHRINK)?), false),
        ("memory", Features::FRAMES, Some(memfd(&pixels[1], SealFlags::SHRINK)?), true),
    ];
    for (name, features, memory, is_right) in cases {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ensure!(screen.ask(&DisplayOrder::NewDisplay, Some(theirs.into()))?.0 == DisplayReport::Done);
        screen.gpu = Gpu::new(ours.try_clone()?);
        screen.gpu.greet(features)?;
        let mut offer = Vec::new();
        Request::FrameMemory { len: 4 }.put(&mut offer);
        match &memory {
            Some(memory) => screen.gpu.channel.send_beside(&offer, memory.as_fd(), PATIENCE)?,
            None => screen.gpu.channel.send(&offer, PATIENCE)?,
        }
        // It may have hung up by then.
        let _ = screen.gpu.say(Request::Scanout { scanout: 0, width: SIZE.0, height: SIZE.1 });
        let _ = screen.gpu.say(Request::Frame { scanout: 0, rect });
        if is_right {
            ensure!(matches!(screen.gpu.hear()?, Reply::Taken), "{name}");
        } else {
            ensure!(is_given_up(&mut ours)?, "{name}");
        }
        let shown = &pixels[usize::from(is_right)];
        screen.viewer()?.sees(SIZE, shown).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// Browsers that do not finish their request, say too much, or speak no WebSocket where one belongs.
#[test]
fn browsers_that_talk_nonsense_are_given_up() -> Result<()> {
    let screen = Screen::start(&[], Vec::new())?;
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(40_000));
    for noise in
        [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], long.as_bytes(), b"GET / HTTP/1.1\r\nHost: x\r\n"]
    {
        let mut stream = TcpStream::connect(screen.web)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let _ = stream.write_all(noise);
        ensure!(is_given_up(&mut stream)?, "{}", String::from_utf8_lossy(noise.get(..20).unwrap_or_default()));
    }
    Ok(())
}

/// What cannot be right on the command line is a line that says what would be.
#[test]
fn mistakes_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fails = |args: &[&str], fds: Vec<(&str, OwnedFd)>| -> Result<String> {
        let mut command = command(PROGRAM);
        command.args(args).stderr(std::process::Stdio::piped());
        let output = with_fds(&mut command, &fds).spawn()?.wait_with_output()?;
        ensure!(!output.status.success());
        Ok(String::from_utf8(output.stderr)?)
    };
    let port = || -> Result<OwnedFd> { Ok(std::net::TcpListener::bind("127.0.0.1:0")?.into()) };
    let text = fails(&[], vec![("--vnc-fd", port()?)])?;
    ensure!(text.contains("--vnc-fd is a port that everybody on this host can reach: give a secret"), "{text}");
    let text = fails(&[], vec![("--web-fd", port()?)])?;
    ensure!(text.contains("--web-fd is a port"), "{text}");
    let (connected, _other) = UnixStream::pair()?;
    let text = fails(&[], vec![("--vnc-fd", connected.into())])?;
    ensure!(text.contains("--vnc-fd is no listening socket"), "{text}");
    let path = folder.path().join("secret");
    for (secret, words) in
        [("", "0 bytes"), ("a b", "characters that an address cannot carry"), (&"x".repeat(999), "1 to 256")]
    {
        std::fs::write(&path, secret)?;
        let text = fails(&[], vec![("--secret-fd", std::fs::File::open(&path)?.into())])?;
        ensure!(text.contains(words), "{text}");
    }
    let place: OwnedFd = UnixListener::bind(folder.path().join("s"))?.into();
    let text = fails(&["--vnc-fd", "16:9"], vec![("--vnc-fd", place)])?;
    ensure!(text.contains("there are heads 0 to 15"), "{text}");
    let text = fails(&["--events-fd", "pen:9", "--size", "1x1"], Vec::new())?;
    ensure!(text.contains("there are keyboard, tablet and mouse"), "{text}");
    Ok(())
}
