//! A person in front of a machine: pictures, keys, and the death of each process in between.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::processes;
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::BOOT_LIMIT;
use xtask::operated::Operated;
use xtask::painting::{self, HEIGHT, WIDTH};
use xtask::{full_kernel, place};

const STEP: Duration = Duration::from_secs(60);
/// A picture is there this soon after what brings it.
const PICTURE_LIMIT: Duration = Duration::from_secs(10);

struct Screen {
    machine: Operated,
    api: PathBuf,
    folder: tempfile::TempDir,
}

impl Screen {
    /// A guest with Debian's full kernel, which has painted its screen.
    fn painted(more: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(place::program("atoll")?);
        command
            .arg("--kernel")
            .arg(full_kernel::image()?)
            .arg("--initramfs")
            .arg(painting::initramfs(folder.path())?)
            .args(["--cmdline", "console=ttyS0 panic=-1 quiet", "--memory", "size=512M", "--cpu", "soft"])
            .args(["--gpu", "on"])
            .args(more);
        let mut machine = Operated::spawn(&mut command, folder.path())?;
        machine.console.prompt(BOOT_LIMIT)?;
        painting::ready(&mut machine.console)?;
        painting::paint(&mut machine.console)?;
        Ok(Self { machine, api: folder.path().join("api.sock"), folder })
    }

    fn console(&mut self) -> &mut Console {
        &mut self.machine.console
    }

    /// The pixels of a screenshot.
    fn picture(&self) -> Result<(usize, usize, Vec<u8>)> {
        let out = self.folder.path().join("out.png");
        let mut shoot = Command::new(place::program("atoll")?);
        place::run(shoot.arg("screenshot").arg(&self.api).arg(&out))?;
        let file = std::io::BufReader::new(std::fs::File::open(&out)?);
        let mut reader = png::Decoder::new(file).read_info()?;
        let mut pixels = vec![0; reader.output_buffer_size().context("a picture has a size")?];
        let info = reader.next_frame(&mut pixels)?;
        ensure!(info.color_type == png::ColorType::Rgb, "the picture is {:?}", info.color_type);
        Ok((info.width as usize, info.height as usize, pixels))
    }

    /// Waits until the whole picture is there.
    fn shows_it(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            let left = self.picture().map(|(width, height, pixels)| painting::wrong(width, height, &pixels));
            match left {
                Ok(0) => return Ok(()),
                other => {
                    ensure!(begin.elapsed() < PICTURE_LIMIT, "pixels that are wrong: {other:?} of {}", WIDTH * HEIGHT);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&self, program: &str) -> Result<()> {
        let victim = processes::child_named(self.machine.console.pid(), program, STEP)?;
        processes::signal(victim, Signal::KILL)?;
        let deadline = Instant::now() + STEP;
        while processes::child_named(self.machine.console.pid(), program, STEP)? == victim {
            ensure!(Instant::now() < deadline, "{program} has no successor");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        painting::nobody_complains(self.console())?;
        self.console().send("poweroff -f\n")?;
        let (status, errors) = self.machine.console.wait(STEP)?;
        ensure!(status.success(), "{status}: {errors}");
        Ok(())
    }
}

/// As little of a viewer as presses keys (RFB 3.8 without a password).
struct Viewer(UnixStream);

impl Viewer {
    fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + STEP;
        let mut stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error.into()),
            }
        };
        stream.set_read_timeout(Some(STEP))?;
        let mut version = [0; 12];
        stream.read_exact(&mut version)?;
        stream.write_all(b"RFB 003.008\n")?;
        let mut count = [0];
        stream.read_exact(&mut count)?;
        let mut kinds = vec![0; count[0].into()];
        stream.read_exact(&mut kinds)?;
        ensure!(kinds.contains(&1), "a password is asked for at a UNIX socket: {kinds:?}");
        stream.write_all(&[1])?;
        let mut result = [0; 4];
        stream.read_exact(&mut result)?;
        ensure!(result == [0; 4], "the viewer is not let in");
        stream.write_all(&[1])?;
        let mut init = [0; 24];
        stream.read_exact(&mut init)?;
        let (width, height) = (u16::from_be_bytes([init[0], init[1]]), u16::from_be_bytes([init[2], init[3]]));
        ensure!((usize::from(width), usize::from(height)) == (WIDTH, HEIGHT), "the screen is {width}x{height}");
        let mut name = vec![0; u32::from_be_bytes([init[20], init[21], init[22], init[23]]) as usize];
        stream.read_exact(&mut name)?;
        Ok(Self(stream))
    }

    fn key(&mut self, symbol: u32) -> Result<()> {
        for down in [1, 0] {
            let mut message = vec![4, down, 0, 0];
            message.extend(symbol.to_be_bytes());
            self.0.write_all(&message)?;
        }
        Ok(())
    }

    fn point(&mut self, x: u16, y: u16, buttons: u8) -> Result<()> {
        let mut message = vec![5, buttons];
        message.extend(x.to_be_bytes());
        message.extend(y.to_be_bytes());
        Ok(self.0.write_all(&message)?)
    }
}

/// Kill what draws, what shows, and both: the picture is there again without a word of the guest's, and the next one too.
#[test]
fn a_picture_outlives_who_draws_and_who_shows_it() -> Result<()> {
    let mut screen = Screen::painted(&["--display", "on"])?;
    screen.shows_it()?;
    for victims in [&["atoll-gpu"][..], &["atoll-display"], &["atoll-display", "atoll-gpu"]] {
        victims.iter().try_for_each(|victim| screen.kill(victim))?;
        screen.shows_it().with_context(|| format!("after the death of {victims:?}"))?;
    }
    screen.console().run("dd if=/dev/zero of=/dev/fb0 bs=4096000 count=1 2>/dev/null", STEP)?;
    let deadline = Instant::now() + PICTURE_LIMIT;
    while screen.picture()?.2.iter().any(|byte| *byte != 0) {
        ensure!(Instant::now() < deadline, "the screen does not go black");
    }
    painting::paint(screen.console())?;
    screen.shows_it()?;
    screen.end()
}

/// What a viewer types and points at comes to the guest, whichever of the processes in between has died before.
#[test]
fn what_is_typed_comes_to_the_guest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = folder.path().join("vnc");
    let mut screen = Screen::painted(&["--display", &format!("vnc=unix:{}", place.display())])?;
    screen.shows_it()?;
    let names = screen.console().run("cat /sys/class/input/event*/device/name", STEP)?;
    ensure!(names.to_lowercase().contains("keyboard") && names.to_lowercase().contains("tablet"), "{names}");
    let find =
        "for E in /sys/class/input/event*; do grep -qi $K $E/device/name && echo /dev/input/${E##*/}; done; true";
    for (round, victim) in [None, Some("atoll-input"), Some("atoll-display")].into_iter().enumerate() {
        if let Some(victim) = victim {
            screen.kill(victim)?;
        }
        let keyboard = screen.console().run(&format!("K=keyboard; {find}"), STEP)?;
        let tablet = screen.console().run(&format!("K=tablet; {find}"), STEP)?;
        // One report of a key and its end: 24 bytes an event, key and SYN.
        screen
            .console()
            .send(&format!("dd if={keyboard} bs=24 count=4 of=/keys{round} 2>/dev/null; echo key\"\"s{round}\n"))?;
        std::thread::sleep(Duration::from_millis(500));
        let mut viewer = Viewer::connect(&place)?;
        let deadline = Instant::now() + STEP;
        while screen.console().expect(&format!("keys{round}\r"), Duration::from_millis(500)).is_err() {
            ensure!(Instant::now() < deadline, "no key has come to the guest");
            viewer.key(u32::from(b'a'))?;
        }
        let code = screen.console().run(&format!("od -A n -t u2 -j 18 -N 2 /keys{round}"), STEP)?;
        ensure!(code.trim() == "30", "KEY_A is 30, and the guest has {code}");
        screen
            .console()
            .send(&format!("dd if={tablet} bs=24 count=3 of=/at{round} 2>/dev/null; echo point\"\"ed{round}\n"))?;
        std::thread::sleep(Duration::from_millis(500));
        let deadline = Instant::now() + STEP;
        let mut x = 0;
        while screen.console().expect(&format!("pointed{round}\r"), Duration::from_millis(500)).is_err() {
            ensure!(Instant::now() < deadline, "no pointer has come to the guest");
            x += 10;
            viewer.point(x, x / 2, 0)?;
        }
        let kind = screen.console().run(&format!("od -A n -t u2 -j 16 -N 2 /at{round}"), STEP)?;
        ensure!(kind.trim() == "3", "EV_ABS is 3, and the guest has {kind}");
    }
    screen.end()
}
