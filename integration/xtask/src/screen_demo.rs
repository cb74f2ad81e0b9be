//! `cargo xtask demo --gpu`: a guest with a screen, and the address of the page that shows it.
//!
//! The guest is Debian's full kernel, because the cloud kernels have no GPU's driver. Where this host can draw in 3D, a cube of the
//! guest's Mesa turns on the screen; else its console is there, with a shell that hears the page's keyboard.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::browser::Browser;
use crate::demo::BOOT_LIMIT;
use crate::operated::Operated;
use crate::packages::{self, NOVNC};
use crate::painting::Painting;
use crate::picture::{self, Picture};
use crate::{full_kernel, graphics_land, place, tied};
use anyhow::{Context, Result, ensure};

const STEP: Duration = Duration::from_secs(60);
/// Pixels that a line of letters lights, at least.
const LETTERS_MIN: usize = 500;
/// Size of the browser's window.
const WINDOW: (u32, u32) = (1360, 600);
/// What the shell on the screen says first.
const GREETING: &str = "This is the screen of a guest of Atoll. Type here.";

/// noVNC's folder, fetched once.
///
/// # Errors
/// The package cannot be had.
pub fn novnc() -> Result<PathBuf> {
    Ok(packages::unpacked(&NOVNC)?.join("usr/share/novnc"))
}

/// A guest with a page and a shell on its screen; `more` is said of its display besides.
///
/// # Errors
/// It cannot be had.
pub fn guest(folder: &Path, more: &str) -> Result<Operated> {
    let mut command = Command::new(place::program("atoll")?);
    command
        .arg("--kernel")
        .arg(full_kernel::image()?)
        .arg("--initramfs")
        .arg(Painting::USUAL.initramfs(folder)?)
        .args(["--cmdline", "console=tty0 console=ttyS0 panic=-1 quiet", "--memory", "size=512M", "--gpu", "on"])
        .arg("--display")
        .arg(format!("web=127.0.0.1:0,novnc={}{more}", novnc()?.display()));
    let mut machine = Operated::spawn(tied::to_this_thread(&mut command), folder)?;
    machine.console.prompt(BOOT_LIMIT)?;
    let console = &mut machine.console;
    console.run("for M in /modules/full/*.ko; do insmod $M || exit 1; done", STEP)?;
    console.run("until [ -e /sys/class/graphics/fb0 ]; do sleep 0.1; done; mdev -s; [ -c /dev/tty1 ]", STEP)?;
    let shell = format!("clear; echo '{GREETING}'; PS1='screen# ' exec sh");
    console.run(&format!("echo \"{shell}\" > /shell"), STEP)?;
    console.run("(setsid sh -c 'exec sh /shell </dev/tty1 >/dev/tty1 2>&1' &)", STEP)?;
    Ok(machine)
}

/// A guest with a page, and a cube that turns on its screen, drawn by `atoll-gpu` with the processors of this host.
fn cube(folder: &Path) -> Result<Operated> {
    let initramfs = graphics_land::initramfs(folder, &[])?;
    let display = format!("web=127.0.0.1:0,novnc={}", novnc()?.display());
    let mut command = graphics_land::atoll(&initramfs, "virgl=on", &display)?;
    let mut machine = Operated::spawn(tied::to_this_thread(&mut command), folder)?;
    machine.console.prompt(BOOT_LIMIT)?;
    graphics_land::turn_cube(&mut machine.console)?;
    Ok(machine)
}

/// Whether a picture has the colours of a cube, or more light than a cursor.
fn shows_something((_, pixels): &Picture, in_3d: bool) -> bool {
    if in_3d {
        return pixels.chunks(3).collect::<BTreeSet<_>>().len() >= graphics_land::CUBE_COLOURS_MIN;
    }
    pixels.chunks(3).filter(|pixel| **pixel != [0; 3]).count() >= LETTERS_MIN
}

/// What a browser shows of the page at `url`, after somebody has asked the guest for its name on the serial console.
fn page(url: &str) -> Result<Vec<u8>> {
    let mut browser = Browser::open(url, WINDOW)?;
    browser.until("document.getElementById('status').textContent === 'connected'", STEP)?;
    browser.evaluate("document.getElementById('lines').focus()")?;
    browser.enter("uname -srm\n")?;
    browser.until("document.getElementById('lines').textContent.includes('Linux ')", STEP)?;
    // So that the picture has come, too.
    std::thread::sleep(Duration::from_secs(2));
    browser.picture()
}

/// Shows it until the guest ends or the person does; with `check`, ends as soon as a picture is there, and writes what a browser
/// shows of the page to `page_picture`.
///
/// # Errors
/// It cannot be had, or shows nothing.
pub fn run(check: bool, page_picture: Option<&Path>) -> Result<()> {
    place::build_programs()?;
    let folder = tempfile::tempdir()?;
    let missing = packages::missing_peers(packages::RENDERER_PEERS);
    let in_3d = missing.is_empty();
    let mut machine = if in_3d { cube(folder.path())? } else { guest(folder.path(), "")? };
    let place = machine.get("vm.display")?;
    let url = place["url"].as_str().context("the display has no page")?.to_owned();
    let out = folder.path().join("screen.png");
    let begin = Instant::now();
    loop {
        let mut shoot = Command::new(place::program("atoll")?);
        shoot.arg("screenshot").arg(folder.path().join("api.sock")).arg(&out);
        if shoot.output()?.status.success() && shows_something(&picture::of_png(&std::fs::read(&out)?)?, in_3d) {
            break;
        }
        ensure!(begin.elapsed() < STEP, "the screen shows nothing of what it should");
        std::thread::sleep(Duration::from_millis(100));
    }
    let size = std::fs::metadata(&out)?.len();
    let mut said = std::io::stdout();
    if let Some(path) = page_picture {
        std::fs::write(path, page(&url)?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if check {
        machine.console.send("poweroff -f\n")?;
        let (status, errors) = machine.console.wait(STEP)?;
        ensure!(status.success(), "{status}: {errors}");
        writeln!(
            said,
            "{}",
            serde_json::json!({ "demo": "gpu", "ok": true, "cube": in_3d, "screenshot_bytes": size })
        )?;
        return Ok(());
    }
    writeln!(said, "The guest's screen: {url}")?;
    if in_3d {
        writeln!(said, "A cube of the guest's turns there. Press Ctrl-C here to end it.")?;
    } else {
        writeln!(said, "It is in 2D; with {} installed a cube would turn there.", missing.join(", "))?;
        writeln!(said, "Type `poweroff -f` there, or press Ctrl-C here, to end it.")?;
    }
    // The guest says nothing more on its serial port; the VMM's end is the end.
    while crate::processes::alive(machine.console.pid()) {
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
