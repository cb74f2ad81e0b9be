//! `atoll-gpu` behind QEMU's vhost-user-gpu front end, and QEMU's own device in its place: a stock guest's picture, pixel by pixel.

use crate::console::Console;
use crate::painting::Painting;
use crate::qemu::Qemu;
use crate::{full_kernel, graphics_land, packages, painting, place};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::monitor::Monitor;
use super::{BOOT_LIMIT, Device, STEP_LIMIT, machine};

/// What is painted.
const PICTURE: Painting = Painting::USUAL;
/// How long a picture may take to be there.
const PICTURE_LIMIT: Duration = Duration::from_secs(60);

/// A guest on QEMU paints; milliseconds until all of the picture is there.
fn painted(qemu: &Qemu, ours: bool) -> Result<u64> {
    let folder = tempfile::tempdir()?;
    let (socket, monitor) = (folder.path().join("gpu.sock"), folder.path().join("qmp.sock"));
    let _device = if ours { Some(Device::start("atoll-gpu", &socket, &[])?) } else { None };
    let archive = PICTURE.initramfs(folder.path())?;
    let mut command = machine(qemu);
    command
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .args(Monitor::arguments(&monitor))
        .arg("-kernel")
        .arg(full_kernel::image()?)
        .arg("-initrd")
        .arg(&archive);
    if ours {
        command
            .args(["-chardev", &format!("socket,id=gpu,path={}", socket.display())])
            .args(["-device", "vhost-user-gpu-pci,chardev=gpu"]);
    } else {
        command.args(["-device", "virtio-gpu-pci"]);
    }
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    PICTURE.ready(&mut console)?;
    let begin = Instant::now();
    painting::paint(&mut console, 0)?;
    let mut monitor = Monitor::connect(&monitor)?;
    let file = folder.path().join("screen.ppm");
    let shown = loop {
        let ((width, height), pixels) = monitor.picture(&file)?;
        let left = PICTURE.wrong(0, (width, height), &pixels);
        if left == 0 {
            break begin.elapsed();
        }
        ensure!(begin.elapsed() < PICTURE_LIMIT, "{left} pixels of {width}x{height} are not the guest's");
        std::thread::sleep(Duration::from_millis(20));
    };
    painting::nobody_complains(&mut console)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "QEMU ended with {status}: {errors}");
    Ok(shown.as_millis() as u64)
}

/// A guest on QEMU whose Mesa has 3D by `atoll-gpu`: what its renderer is called, and how many colours QEMU's screen shows while a
/// cube turns on it. A triangle of the guest's is the host's, byte for byte.
fn in_3d(qemu: &Qemu) -> Result<(String, usize)> {
    let folder = tempfile::tempdir()?;
    let (socket, monitor) = (folder.path().join("gpu.sock"), folder.path().join("qmp.sock"));
    let triangle = place::program("triangle")?;
    let here = folder.path().join("triangle.rgba");
    place::run(Command::new(&triangle).arg(&here).env("LIBGL_ALWAYS_SOFTWARE", "1").stdout(Stdio::null()))?;
    let _device = Device::start("atoll-gpu", &socket, &["--virgl"])?;
    let initramfs = graphics_land::initramfs(folder.path(), &[&triangle])?;
    let mut command = machine(qemu);
    command
        .args(["-append", graphics_land::CMDLINE])
        .args(Monitor::arguments(&monitor))
        .arg("-kernel")
        .arg(full_kernel::image()?)
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-drive", &format!("file={},if=none,id=d,format=raw,readonly=on", graphics_land::disk()?.display())])
        .args(["-device", "virtio-blk-pci,drive=d"])
        .args(["-chardev", &format!("socket,id=gpu,path={}", socket.display())])
        .args(["-device", "vhost-user-gpu-pci,chardev=gpu"]);
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    let renderer = console.run("HOME=/tmp /mnt/triangle /tmp/triangle.rgba 2>/tmp/errors", STEP_LIMIT)?;
    ensure!(renderer.to_lowercase().starts_with("virgl"), "the guest's renderer is {renderer}");
    let there = console.run("sha256sum < /tmp/triangle.rgba", STEP_LIMIT)?;
    ensure!(there.starts_with(&packages::sha256(&here)?), "the guest's triangle is another: {there}");
    graphics_land::turn_cube(&mut console)?;
    let mut monitor = Monitor::connect(&monitor)?;
    let begin = Instant::now();
    let colours = loop {
        let (_, pixels) = monitor.picture(&folder.path().join("screen.ppm"))?;
        let colours = pixels.chunks(3).collect::<BTreeSet<_>>().len();
        if colours >= graphics_land::CUBE_COLOURS_MIN {
            break colours;
        }
        ensure!(begin.elapsed() < PICTURE_LIMIT, "no cube is shown: {colours} colours");
        std::thread::sleep(Duration::from_millis(100));
    };
    painting::nobody_complains(&mut console)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "QEMU ended with {status}: {errors}");
    Ok((renderer, colours))
}

/// A stock guest with Debian's full kernel paints its frame buffer; QEMU's screen is that picture, with QEMU's own device and with
/// `atoll-gpu`; then another one's Mesa draws in 3D by `atoll-gpu`. One line of JSON.
///
/// # Errors
/// When it is not so, or QEMU cannot be had.
pub fn run() -> Result<()> {
    let qemu = Qemu::newest()?;
    place::build_programs()?;
    let theirs = painted(&qemu, false).context("QEMU's own device")?;
    let ours = painted(&qemu, true).context("atoll-gpu")?;
    packages::ensure_peers(packages::RENDERER_PEERS)?;
    let (renderer, colours) = in_3d(&qemu).context("atoll-gpu in 3D")?;
    let report = json!({
        "interop": "gpu", "ok": true, "front_end": format!("QEMU {} vhost-user-gpu-pci", qemu.version()?),
        "pixels": PICTURE.width * PICTURE.height, "wrong": 0, "shown_ms": { "atoll-gpu": ours, "qemu": theirs },
        "in_3d": { "renderer": renderer, "triangle": "the host's", "colours_of_a_cube": colours },
    });
    println!("{report}");
    Ok(())
}
