//! `modetest`'s colour bars on some stands: QEMU with its own device, Atoll with `atoll-gpu`, and Atoll with the devices of others,
//! QEMU's `vhost-user-gpu` (in C) and `vhost-device-gpu` (in Rust). The same kernel, disk and user land throughout; what the screens
//! show must be one picture, byte for byte.
//!
//! `vhost-device-gpu` takes part where it is installed: no distribution has it, and it wants virglrenderer 1.0 or later.

use super::monitor::Monitor;
use super::{BOOT_LIMIT, STEP_LIMIT};
use crate::console::Console;
use crate::operated::Operated;
use crate::picture::{self, Picture};
use crate::{graphics_land, packages, painting, place};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A mode that is not the one that the guest's console has.
const SIZE: (usize, usize) = (1024, 768);
/// A picture with fewer colours is not the bars.
const COLOURS_MIN: usize = 12;
/// Two looks with this between them show the same: nothing is under way.
const PAUSE: Duration = Duration::from_millis(300);
/// How long the bars may take to be there.
const PICTURE_LIMIT: Duration = Duration::from_secs(60);
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// The program of others that is looked for.
const DEVICE_GPU: &str = "vhost-device-gpu";

/// A front end and a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// QEMU and its own device.
    Qemu,
    /// Atoll and `atoll-gpu`.
    Atoll,
    /// Atoll and QEMU's `vhost-user-gpu`.
    AtollAndC,
    /// Atoll and `vhost-device-gpu`.
    AtollAndRust,
}

impl Stand {
    const ALL: [Self; 4] = [Self::Qemu, Self::Atoll, Self::AtollAndC, Self::AtollAndRust];

    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU, virtio-gpu-pci",
            Self::Atoll => "Atoll, atoll-gpu",
            Self::AtollAndC => "Atoll, QEMU's vhost-user-gpu",
            Self::AtollAndRust => "Atoll, vhost-device-gpu",
        }
    }
}

/// A backend of others, which ends with its owner.
struct Backend(Child);

impl Backend {
    /// The backend that this stand has, if it is one of others.
    fn start(stand: Stand, socket: &Path) -> Result<Option<Self>> {
        let mut command = match stand {
            Stand::Qemu | Stand::Atoll => return Ok(None),
            Stand::AtollAndC => {
                Command::new(packages::unpacked(&packages::QEMU_GUI)?.join("usr/lib/qemu/vhost-user-gpu"))
            }
            Stand::AtollAndRust => {
                let mut command = Command::new(DEVICE_GPU);
                command.args(["--gpu-mode", "virglrenderer"]);
                command
            }
        };
        let backend = Self(command.arg("--socket-path").arg(socket).stdout(Stdio::null()).spawn()?);
        let deadline = Instant::now() + LISTEN_LIMIT;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "{} does not listen at {}", stand.name(), socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Some(backend))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What runs the guest, and how its screen is looked at.
enum Machine {
    Atoll(Operated, PathBuf),
    Qemu(Console, PathBuf),
}

impl Machine {
    fn start(stand: Stand, folder: &Path, backend: &Path) -> Result<Self> {
        let initramfs = graphics_land::initramfs(folder, &[])?;
        if stand == Stand::Qemu {
            let monitor = folder.join("qmp.sock");
            let mut command = graphics_land::qemu(&initramfs, "virtio-gpu-pci")?;
            command.args(["-display", "none"]).args(Monitor::arguments(&monitor));
            return Ok(Self::Qemu(Console::spawn(&mut command)?, monitor));
        }
        let gpu = if stand == Stand::Atoll { "on".to_owned() } else { format!("socket={}", backend.display()) };
        let mut command = graphics_land::atoll(&initramfs, &gpu, "on")?;
        Ok(Self::Atoll(Operated::spawn(&mut command, folder)?, folder.join("api.sock")))
    }

    fn console(&mut self) -> &mut Console {
        match self {
            Self::Atoll(machine, _) => &mut machine.console,
            Self::Qemu(console, _) => console,
        }
    }

    /// What the screen shows, by way of a file in `folder`.
    fn picture(&self, folder: &Path) -> Result<Picture> {
        match self {
            Self::Atoll(_, api) => {
                let out = folder.join("screen.png");
                place::run(Command::new(place::program("atoll")?).arg("screenshot").arg(api).arg(&out))?;
                picture::of_png(&std::fs::read(out)?)
            }
            Self::Qemu(_, monitor) => Monitor::connect(monitor)?.picture(&folder.join("screen.ppm")),
        }
    }

    fn end(self) -> Result<()> {
        let mut console = match self {
            Self::Atoll(machine, _) => machine.console,
            Self::Qemu(console, _) => console,
        };
        console.send("poweroff -f\n")?;
        let (status, errors) = console.wait(STEP_LIMIT)?;
        ensure!(status.success(), "it ended with {status}: {errors}");
        Ok(())
    }
}

/// The bars, as a guest on this stand shows them.
fn bars(stand: Stand) -> Result<Picture> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("gpu.sock");
    let _backend = Backend::start(stand, &socket)?;
    let mut machine = Machine::start(stand, folder.path(), &socket)?;
    machine.console().prompt(BOOT_LIMIT)?;
    graphics_land::show_bars(machine.console(), SIZE)?;
    let begin = Instant::now();
    let mut last = None;
    let shown = loop {
        let picture = machine.picture(folder.path())?;
        let colours: BTreeSet<&[u8]> = picture.1.chunks(3).collect();
        if picture.0 == SIZE && colours.len() >= COLOURS_MIN && last.as_ref() == Some(&picture) {
            break picture;
        }
        let seen = format!("{}x{} in {} colours", picture.0.0, picture.0.1, colours.len());
        ensure!(begin.elapsed() < PICTURE_LIMIT, "no bars are shown, but {seen}");
        last = Some(picture);
        std::thread::sleep(PAUSE);
    };
    painting::nobody_complains(machine.console())?;
    machine.end()?;
    Ok(shown)
}

/// All stands in turn; one line of JSON.
///
/// # Errors
/// The pictures differ, or a stand shows none.
pub fn run() -> Result<()> {
    packages::ensure_peers(&["qemu-system-x86_64", "mkfs.ext4"])?;
    packages::ensure_peers(packages::QEMU_GPU_PEERS)?;
    place::build_programs()?;
    let mut pictures = Vec::new();
    let has_device_gpu = place::on_path(DEVICE_GPU).is_some();
    if !has_device_gpu {
        eprintln!("{DEVICE_GPU} takes no part: it is not in PATH");
    }
    let stands = || Stand::ALL.into_iter().filter(|stand| *stand != Stand::AtollAndRust || has_device_gpu);
    for stand in stands() {
        let begin = Instant::now();
        pictures.push(bars(stand).context(stand.name())?);
        eprintln!("{}: {} s", stand.name(), begin.elapsed().as_secs());
    }
    let first = pictures.first().context("there are stands")?;
    let rows: Vec<_> = stands()
        .zip(&pictures)
        .map(|(stand, seen)| json!({ "stand": stand.name(), "differing": picture::differing(first, seen) }))
        .collect();
    let ok = pictures.iter().all(|picture| picture == first);
    println!("{}", json!({ "interop": "smpte", "ok": ok, "pixels": SIZE.0 * SIZE.1, "stands": rows }));
    ensure!(ok, "the pictures differ");
    Ok(())
}
