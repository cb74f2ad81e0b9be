//! `cargo xtask bench gpu`: what a guest's screen costs and how soon a viewer sees it, `atoll-gpu` and `atoll-display` beside QEMU's own
//! virtio-gpu and VNC server: the same kernel, user land, program and viewer, in turn.
//!
//! A program in the guest scrolls a picture of 1280 by 800 and tells the GPU all of it for each frame. In its first row of pixels is the
//! frame's number, which the viewer reads; before a frame is told, the program says its number on the serial port, so that the time
//! from there to the viewer is that of the device and the display, whichever processor is emulated. Processor time is that of all threads
//! but those that run the guest, for each frame told, at a rate that both keep up with.
//!
//! What is drawn in 3D is measured by [`super::cube`].

use super::cube;
use super::spread::Spread;
use crate::console::Console;
use crate::demo::BOOT_LIMIT;
use crate::viewer::Viewer;
use crate::{graphics_land, packages, painting, place, processes};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(super) const SIZE: (usize, usize) = (1280, 800);
pub(super) const STEP: Duration = Duration::from_secs(120);
/// Processor time for a frame, in parts of QEMU's, at most.
const CPU_RATIO_MAX: f64 = 1.2;
/// Pixels of the first row that carry the number of a frame, and bytes of each.
const NUMBER_BITS: usize = 32;
const PIXEL: usize = 4;
/// Numbers of the frames begin here, so that nothing else on the screen is taken for one.
const SOON_FROM: u32 = 0x5a00_0001;
const PACED_FROM: u32 = 0x5a01_0001;
const FREE_FROM: u32 = 0x5a02_0001;
/// Frames whose way to the viewer is timed, and how many of them in a second.
const SOON: (u32, u32) = (300, 10);
/// Frames whose cost is counted, and how many of them in a second.
const PACED: (u32, u32) = (200, 20);
/// Frames as fast as they go.
const FREE: u32 = 300;

#[derive(Serialize)]
struct Line {
    bench: &'static str,
    rounds: usize,
    pixels: usize,
    /// From the word on the serial port to the viewer.
    atoll_visible_ms: Visible,
    qemu_visible_ms: Visible,
    /// Processor time of a frame with a viewer who sees it.
    atoll_frame_cpu_ms: Spread,
    qemu_frame_cpu_ms: Spread,
    frame_cpu: Spread,
    frame_cpu_limit: f64,
    /// The same without a viewer.
    atoll_unseen_cpu_ms: Spread,
    qemu_unseen_cpu_ms: Spread,
    unseen_cpu: Spread,
    /// Parts of the frames that the viewer saw at the paced rate.
    atoll_seen: Spread,
    qemu_seen: Spread,
    /// Frames in a second as fast as they go: what the guest told, and what the viewer saw.
    atoll_scroll_per_s: Spread,
    qemu_scroll_per_s: Spread,
    atoll_scroll_seen_per_s: Spread,
    qemu_scroll_seen_per_s: Spread,
    /// Frames in a second of `kmscube`, and processor time of one; nothing where this host cannot draw.
    cube: Option<cube::Line>,
    ok: bool,
}

/// Medians and spreads over rounds of two percentiles.
#[derive(Serialize)]
struct Visible {
    p50: Spread,
    p99: Spread,
}

/// What one guest's screen did.
#[derive(Clone, Debug)]
struct Figures {
    visible_p50_ms: f64,
    visible_p99_ms: f64,
    frame_cpu_ms: f64,
    unseen_cpu_ms: f64,
    seen: f64,
    scroll_per_s: f64,
    scroll_seen_per_s: f64,
}

/// A guest with a screen that a viewer can look at.
struct Machine {
    console: Console,
    vnc: PathBuf,
}

fn atoll(folder: &Path, initramfs: &Path) -> Result<Machine> {
    let vnc = folder.join("vnc");
    let mut command = graphics_land::atoll(initramfs, "on", &format!("vnc=unix:{}", vnc.display()))?;
    Ok(Machine { console: Console::spawn(&mut command)?, vnc })
}

fn qemu(folder: &Path, initramfs: &Path) -> Result<Machine> {
    let vnc = folder.join("vnc");
    let mut command = graphics_land::qemu(initramfs, "virtio-gpu-pci")?;
    command.arg("-vnc").arg(format!("unix:{}", vnc.display()));
    Ok(Machine { console: Console::spawn(&mut command)?, vnc })
}

/// Who looks at the screen, in a thread, and writes down which frame was seen first when.
struct Watch {
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<Vec<(u32, Instant)>>>,
}

fn number(pixels: &[u8]) -> u32 {
    let bits = pixels.chunks_exact(PIXEL).take(NUMBER_BITS);
    bits.fold(0, |number, pixel| number << 1 | u32::from(pixel[0] > 127))
}

impl Watch {
    fn begin(vnc: &Path) -> Result<Self> {
        let mut viewer = Viewer::connect(vnc, SIZE)?;
        let mut seen = viewer.look(SIZE)?;
        ensure!(viewer.update(&mut seen, STEP)?, "the viewer is shown nothing");
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut sightings: Vec<(u32, Instant)> = Vec::new();
            while !told.load(Ordering::Relaxed) {
                if viewer.update(&mut seen, Duration::from_millis(100))? {
                    let (frame, now) = (number(&seen.pixels), Instant::now());
                    if sightings.last().is_none_or(|(last, _)| *last != frame) {
                        sightings.push((frame, now));
                    }
                }
            }
            Ok(sightings)
        });
        Ok(Self { over, thread })
    }

    fn end(self) -> Result<Vec<(u32, Instant)>> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the viewer's thread has died"))?
    }
}

/// Processor time so far of everything but the guest's own processor.
pub(super) fn beside_the_guest_ms(pid: u32) -> f64 {
    let counts = |name: &str| !name.starts_with("vcpu") && !name.starts_with("CPU ");
    processes::processor_ns_of(pid, &counts) as f64 / 1e6
}

impl Machine {
    /// Scrolls; what the program says of it.
    fn scroll(&mut self, first: u32, frames: u32, more: &str) -> Result<serde_json::Value> {
        let said = self.console.run(&format!("/mnt/scroll --first {first} --frames {frames} {more}"), STEP)?;
        let line = said.lines().last().and_then(|line| line.find('{').map(|at| &line[at..]));
        Ok(serde_json::from_str(line.with_context(|| format!("scroll says nothing: {said}"))?)?)
    }

    /// Milliseconds from the word of each frame until it, or a later one, is seen.
    fn visible(&mut self) -> Result<Vec<f64>> {
        let watch = Watch::begin(&self.vnc)?;
        self.scroll(SOON_FROM, SOON.0, &format!("--rate {} --mark", SOON.1))?;
        let sightings = watch.end()?;
        let ours = SOON_FROM..SOON_FROM + SOON.0;
        let mut times = Vec::new();
        for frame in ours.clone() {
            let told = self.console.arrival(&format!("F{frame};")).context("a frame's word has not come")?;
            let seen = sightings.iter().find(|(number, _)| ours.contains(number) && *number >= frame);
            let (_, seen) = seen.with_context(|| format!("frame {} was not seen", frame - SOON_FROM))?;
            times.push(seen.saturating_duration_since(told).as_secs_f64() * 1000.0);
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    }

    /// Processor time for each frame at a rate that is kept.
    fn frame_cpu_ms(&mut self) -> Result<f64> {
        let before = beside_the_guest_ms(self.console.pid());
        self.scroll(PACED_FROM, PACED.0, &format!("--rate {}", PACED.1))?;
        Ok((beside_the_guest_ms(self.console.pid()) - before) / f64::from(PACED.0))
    }

    fn measure(mut self) -> Result<Figures> {
        self.console.prompt(BOOT_LIMIT)?;
        let visible = self.visible()?;
        let watch = Watch::begin(&self.vnc)?;
        let frame_cpu_ms = self.frame_cpu_ms()?;
        let count = |sightings: &[(u32, Instant)], first: u32, frames: u32| {
            sightings.iter().filter(|(number, _)| (first..first + frames).contains(number)).count() as f64
        };
        let seen = count(&watch.end()?, PACED_FROM, PACED.0) / f64::from(PACED.0);
        let watch = Watch::begin(&self.vnc)?;
        let free = self.scroll(FREE_FROM, FREE, "")?;
        let (per_s, seconds) = (free["per_second"].as_f64(), free["seconds"].as_f64());
        let (scroll_per_s, seconds) = per_s.zip(seconds).context("scroll tells no rate")?;
        let scroll_seen_per_s = count(&watch.end()?, FREE_FROM, FREE) / seconds;
        let unseen_cpu_ms = self.frame_cpu_ms()?;
        painting::nobody_complains(&mut self.console)?;
        self.console.send("poweroff -f\n")?;
        let (status, errors) = self.console.wait(STEP)?;
        ensure!(status.success(), "it ended with {status}: {errors}");
        let at = |part: usize| visible.get(visible.len() * part / 100).copied().unwrap_or_default();
        Ok(Figures {
            visible_p50_ms: at(50),
            visible_p99_ms: at(99),
            frame_cpu_ms,
            unseen_cpu_ms,
            seen,
            scroll_per_s,
            scroll_seen_per_s,
        })
    }
}

/// Runs `rounds` pairs; `false` if the limit is missed.
///
/// # Errors
/// A guest does not come so far.
pub fn run(rounds: usize) -> Result<bool> {
    packages::ensure_peers(&["qemu-system-x86_64", "mkfs.ext4"])?;
    place::build_programs()?;
    let folder = tempfile::tempdir()?;
    let scroll = place::program("scroll")?;
    let initramfs = graphics_land::initramfs(folder.path(), &[&scroll])?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut cubes = cube::Bench::new(folder.path())?;
    for round in 1..=rounds {
        let place = tempfile::tempdir()?;
        let atoll = atoll(place.path(), &initramfs)?.measure().context("Atoll")?;
        let place = tempfile::tempdir()?;
        let qemu = qemu(place.path(), &initramfs)?.measure().context("QEMU")?;
        eprintln!("round {round}/{rounds}: atoll {atoll:.2?}\n  QEMU {qemu:.2?}");
        ours.push(atoll);
        theirs.push(qemu);
        cubes.round().with_context(|| format!("the cubes of round {round}"))?;
    }
    let cube = cubes.line();
    let all = |of: fn(&Figures) -> f64, guests: &[Figures]| Spread::of(guests.iter().map(of).collect());
    let ratio = |of: fn(&Figures) -> f64| {
        Spread::of(ours.iter().zip(&theirs).map(|(ours, theirs)| of(ours) / of(theirs)).collect())
    };
    let visible = |guests: &[Figures]| Visible {
        p50: all(|guest| guest.visible_p50_ms, guests),
        p99: all(|guest| guest.visible_p99_ms, guests),
    };
    let frame_cpu = ratio(|guest| guest.frame_cpu_ms);
    eprintln!("processor time of a frame that is seen: {frame_cpu} of QEMU's, at most {CPU_RATIO_MAX}");
    let cube_is_ok = cube.as_ref().is_none_or(|cube| cube.frame_cpu.median <= CPU_RATIO_MAX);
    if let Some(cube) = &cube {
        eprintln!("processor time of a frame in 3D: {} of QEMU's, at most {CPU_RATIO_MAX}", cube.frame_cpu);
    }
    let line = Line {
        bench: "gpu",
        rounds,
        pixels: SIZE.0 * SIZE.1,
        atoll_visible_ms: visible(&ours),
        qemu_visible_ms: visible(&theirs),
        atoll_frame_cpu_ms: all(|guest| guest.frame_cpu_ms, &ours),
        qemu_frame_cpu_ms: all(|guest| guest.frame_cpu_ms, &theirs),
        frame_cpu,
        frame_cpu_limit: CPU_RATIO_MAX,
        atoll_unseen_cpu_ms: all(|guest| guest.unseen_cpu_ms, &ours),
        qemu_unseen_cpu_ms: all(|guest| guest.unseen_cpu_ms, &theirs),
        unseen_cpu: ratio(|guest| guest.unseen_cpu_ms),
        atoll_seen: all(|guest| guest.seen, &ours),
        qemu_seen: all(|guest| guest.seen, &theirs),
        atoll_scroll_per_s: all(|guest| guest.scroll_per_s, &ours),
        qemu_scroll_per_s: all(|guest| guest.scroll_per_s, &theirs),
        atoll_scroll_seen_per_s: all(|guest| guest.scroll_seen_per_s, &ours),
        qemu_scroll_seen_per_s: all(|guest| guest.scroll_seen_per_s, &theirs),
        cube,
        ok: frame_cpu.median <= CPU_RATIO_MAX && cube_is_ok,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(line.ok)
}
