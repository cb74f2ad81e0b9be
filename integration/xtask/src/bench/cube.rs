//! The part of `cargo xtask bench gpu` that is in 3D: `kmscube` of a stock guest, `atoll-gpu` with a viewer at `atoll-display`, beside
//! QEMU's own `virtio-gpu-gl` with its window on an X server in memory. Both draw with this host's processors, by the same library.
//!
//! QEMU shows what is drawn in 3D to no viewer of its own VNC server without a render node, which a host without a GPU has not: hence
//! the window. What the X server does with it is not counted, and neither is the viewer.

use super::gpu::{SIZE, STEP, beside_the_guest_ms};
use super::spread::Spread;
use crate::console::Console;
use crate::demo::BOOT_LIMIT;
use crate::viewer::Viewer;
use crate::{graphics_land, packages, painting};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Frames whose rate and cost are told.
const FRAMES: u32 = 600;
/// Frames before that: what is compiled once is compiled then.
const FIRST: u32 = 60;

/// What it comes to.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    atoll_per_s: Spread,
    qemu_per_s: Spread,
    /// Of those, what the viewer saw in a second.
    atoll_seen_per_s: Spread,
    atoll_frame_cpu_ms: Spread,
    qemu_frame_cpu_ms: Spread,
    pub(super) frame_cpu: Spread,
}

/// What one guest's cube did.
#[derive(Clone, Copy, Debug)]
struct Figures {
    per_s: f64,
    seen_per_s: f64,
    frame_cpu_ms: f64,
}

/// An X server in memory.
struct XServer {
    process: Child,
    display: String,
}

impl XServer {
    fn start() -> Result<Self> {
        let screen = format!("{}x{}x24", SIZE.0, SIZE.1 + 200);
        let mut command = Command::new("Xvfb");
        command.args(["-displayfd", "1", "-screen", "0", &screen, "-nolisten", "tcp"]);
        let process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("cannot start Xvfb")?;
        let mut server = Self { process, display: String::new() };
        let said = server.process.stdout.take().context("its output was piped")?;
        let (sender, number) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            // It says its number when it is ready, or ends.
            let _ = BufReader::new(said).read_line(&mut line);
            let _ = sender.send(line);
        });
        let number = number.recv_timeout(STEP).unwrap_or_default();
        ensure!(!number.trim().is_empty(), "Xvfb does not start: is there no room in /tmp?");
        server.display = format!(":{}", number.trim());
        Ok(server)
    }
}

impl Drop for XServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Somebody who looks at the screen, in a thread.
struct Looker {
    over: Arc<AtomicBool>,
    seen: Arc<AtomicU32>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Looker {
    fn begin(vnc: &Path) -> Result<Self> {
        let mut viewer = Viewer::connect(vnc, SIZE)?;
        let mut picture = viewer.look(SIZE)?;
        let (over, seen) = (Arc::<AtomicBool>::default(), Arc::<AtomicU32>::default());
        let (told, count) = (Arc::clone(&over), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                if viewer.update(&mut picture, Duration::from_millis(100))? {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        Ok(Self { over, seen, thread })
    }

    fn end(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the viewer's thread has died"))?
    }
}

/// The seconds that `kmscube` says it took for so many frames.
fn cube(console: &mut Console, frames: u32) -> Result<f64> {
    let said = console.run(&format!("HOME=/tmp kmscube -c {frames} 2>&1 | tail -1"), STEP)?;
    // One frame more than it was told to is drawn and not timed.
    let seconds = said.split(" frames in ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    seconds.filter(|seconds| *seconds > 0.0).with_context(|| format!("kmscube says: {said}"))
}

fn measure(mut console: Console, vnc: Option<PathBuf>) -> Result<Figures> {
    console.prompt(BOOT_LIMIT)?;
    let looker = vnc.map(|vnc| Looker::begin(&vnc)).transpose()?;
    let seen = |looker: &Option<Looker>| looker.as_ref().map_or(0, |looker| looker.seen.load(Ordering::Relaxed));
    cube(&mut console, FIRST)?;
    let (before, seen_before) = (beside_the_guest_ms(console.pid()), seen(&looker));
    let seconds = cube(&mut console, FRAMES)?;
    let figures = Figures {
        per_s: f64::from(FRAMES - 1) / seconds,
        seen_per_s: f64::from(seen(&looker) - seen_before) / seconds,
        frame_cpu_ms: (beside_the_guest_ms(console.pid()) - before) / f64::from(FRAMES),
    };
    looker.map(Looker::end).transpose()?;
    painting::nobody_complains(&mut console)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    ensure!(status.success(), "it ended with {status}: {errors}");
    Ok(figures)
}

/// Rounds of it, if this host can draw.
pub(super) struct Bench {
    initramfs: PathBuf,
    can_draw: bool,
    rounds: Vec<(Figures, Figures)>,
}

impl Bench {
    /// Installs what is missing, where that is allowed; says so where it is not there.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let peers = [packages::RENDERER_PEERS, packages::QEMU_GL_PEERS].concat();
        let there = packages::ensure_peers(&peers);
        if let Err(missing) = &there {
            eprintln!("nothing is measured in 3D: {missing:#}");
        }
        let place = folder.join("cube");
        std::fs::create_dir_all(&place)?;
        let initramfs = graphics_land::initramfs(&place, &[])?;
        Ok(Self { initramfs, can_draw: there.is_ok(), rounds: Vec::new() })
    }

    /// One pair.
    ///
    /// # Errors
    /// A guest does not come so far.
    pub(super) fn round(&mut self) -> Result<()> {
        if !self.can_draw {
            return Ok(());
        }
        let place = tempfile::tempdir()?;
        let vnc = place.path().join("vnc");
        let mut command = graphics_land::atoll(&self.initramfs, "virgl=on", &format!("vnc=unix:{}", vnc.display()))?;
        let atoll = measure(Console::spawn(&mut command)?, Some(vnc)).context("Atoll")?;
        let server = XServer::start()?;
        let mut command = graphics_land::qemu(&self.initramfs, "virtio-gpu-gl-pci")?;
        command.args(["-display", "sdl,gl=on"]).env("DISPLAY", &server.display).env("LIBGL_ALWAYS_SOFTWARE", "1");
        let qemu = measure(Console::spawn(&mut command)?, None).context("QEMU")?;
        eprintln!("  in 3D: atoll {atoll:.2?}\n  QEMU {qemu:.2?}");
        self.rounds.push((atoll, qemu));
        Ok(())
    }

    /// All of it.
    pub(super) fn line(&self) -> Option<Line> {
        let all = |of: &dyn Fn(&(Figures, Figures)) -> f64| Spread::of(self.rounds.iter().map(of).collect());
        (!self.rounds.is_empty()).then(|| Line {
            atoll_per_s: all(&|(atoll, _)| atoll.per_s),
            qemu_per_s: all(&|(_, qemu)| qemu.per_s),
            atoll_seen_per_s: all(&|(atoll, _)| atoll.seen_per_s),
            atoll_frame_cpu_ms: all(&|(atoll, _)| atoll.frame_cpu_ms),
            qemu_frame_cpu_ms: all(&|(_, qemu)| qemu.frame_cpu_ms),
            frame_cpu: all(&|(atoll, qemu)| atoll.frame_cpu_ms / qemu.frame_cpu_ms),
        })
    }
}
