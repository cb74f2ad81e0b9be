//! How long a kill is felt, stratum by stratum: reads and writes, one request at a time and 32, an image in memory and one
//! past the page cache. Apart for requests that were in flight at the kill and those that were issued after it.
//!
//! Beside it, in the same run, the floor: what it takes to start an empty backend and to shake hands with it.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};
use atoll_verify::dice::Dice;
use atoll_vmm::config::{DeviceConfig, DiskConfig};
use atoll_vmm::vhost::Spare;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;

use super::page::Page;
use super::rig::{House, Rig};
use super::stall::Spread;

/// Bytes of a request.
const BLOCK: u32 = 4096;
/// Blocks of the image.
const BLOCKS: u64 = 4096;
const SIZE: u16 = 256;
const MEMORY: u64 = 16 << 20;
/// Where the buffers are.
const BUFFERS: u64 = 1 << 20;
/// How long a request may take.
const REQUEST_MAX: Duration = Duration::from_secs(20);
/// What QD1 may take, and what a kill at QD32 may take beyond its fence.
const QD1_P50_MS_MAX: f64 = 10.0;
const QD1_P99_MS_MAX: f64 = 50.0;
const BEYOND_FENCE_MS_MAX: f64 = 50.0;
/// With a spare: what half of the kills may take beyond the fence.
const STANDBY_P50_MS_MAX: f64 = 3.0;

/// One stratum.
#[derive(Debug, Clone, Serialize)]
pub struct Stratum {
    /// `read` or `write`.
    pub kind: &'static str,
    /// Requests at a time.
    pub depth: usize,
    /// Where the image is.
    pub image: &'static str,
    /// Kills.
    pub kills: u64,
    /// From the kill to the completion, of requests that were in flight at it.
    pub in_flight_ms: Spread,
    /// From issue to completion, of requests that were issued after it.
    pub issued_after_ms: Spread,
    /// What was waited for the fence: by the successor; with a spare, from the kill until nothing of the dead process was seen
    /// to be under way.
    pub fence_ms: Spread,
    /// The slowest request of each kill beyond that kill's fence.
    pub beyond_fence_ms: Spread,
    /// The middle one of what was in flight, as a multiple of the floor's.
    pub of_floor: f64,
    /// The kill that was felt longest beyond its fence.
    pub slowest: Trace,
    /// A spare process waited.
    pub standby: bool,
    /// Within what is promised.
    pub ok: bool,
}

/// What happened after one kill, each in milliseconds from it.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Trace {
    /// The process was seen to end.
    pub ended_ms: f64,
    /// The successor was seen behind the fence.
    pub fenced_ms: f64,
    /// Of that, what it waited for the fence.
    pub fence_ms: f64,
    /// The first completion.
    pub first_ms: f64,
    /// The last one of what was in flight at the kill, and of what was asked for right after it.
    pub last_ms: f64,
}

impl Trace {
    fn beyond_fence_ms(&self) -> f64 {
        self.last_ms - self.fence_ms
    }
}

/// All strata, and the floor.
#[derive(Debug, Clone, Serialize)]
pub struct Strata {
    /// Always "stall".
    pub bench: &'static str,
    /// Each stratum is within what is promised.
    pub ok: bool,
    /// Start and handshake of an empty backend.
    pub floor_ms: Spread,
    /// The strata.
    pub strata: Vec<Stratum>,
}

/// Measures all strata with `kills` kills each; images past the page cache are in `folder`.
pub fn measure(programs: &Path, folder: &Path, kills: u64, seed: u64, standby: bool) -> Result<Strata> {
    let page = Page::new(programs, None)?;
    let floor_ms = floor(page.programs(), kills.max(20))?;
    let mut strata = Vec::new();
    for (image, direct, place) in [("tmpfs", false, super::scene::memory()), ("O_DIRECT", true, folder)] {
        for kind in [Kind::In, Kind::Out] {
            for depth in [1, 32] {
                let name = if kind == Kind::In { "read" } else { "write" };
                let measured = stratum(&page, place, direct, (kind, depth), (kills, seed), standby);
                let mut measured = measured.with_context(|| format!("{name} at depth {depth} on {image}"))?;
                (measured.kind, measured.image) = (name, image);
                measured.of_floor = (measured.in_flight_ms.p50 / floor_ms.p50 * 100.0).round() / 100.0;
                strata.push(measured);
            }
        }
    }
    Ok(Strata { bench: "stall", ok: strata.iter().all(|stratum| stratum.ok), floor_ms, strata })
}

impl Strata {
    /// The table, for people.
    pub fn table(&self) -> String {
        let spread = |spread: &Spread| format!("{:.1} / {:.1} / {:.1}", spread.p50, spread.p99, spread.max);
        let mut table = String::from(
            "| stratum | kills | in flight ms | of the floor | issued after ms | fence ms | beyond fence ms | slowest: \
             ended, fenced, first, last | ok |\n|---|---|---|---|---|---|---|---|---|\n",
        );
        for one in &self.strata {
            let Trace { ended_ms, fenced_ms, first_ms, last_ms, .. } = one.slowest;
            table += &format!(
                "| {} QD{} {} | {} | {} | {:.1} | {} | {} | {} | {ended_ms:.1}, {fenced_ms:.1}, {first_ms:.1}, {last_ms:.1} | {} |\n",
                one.kind,
                one.depth,
                one.image,
                one.kills,
                spread(&one.in_flight_ms),
                one.of_floor,
                spread(&one.issued_after_ms),
                spread(&one.fence_ms),
                spread(&one.beyond_fence_ms),
                one.ok
            );
        }
        table + &format!("floor (start and handshake of an empty backend): {} ms\n", spread(&self.floor_ms))
    }
}

/// Start and handshake of a backend that has nothing behind it.
fn floor(programs: &Path, count: u64) -> Result<Spread> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("floor.sock");
    let mut times = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        let mut child = Command::new(programs.join("atoll-blk"))
            .args(["--null", "16M", "--socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let stream = loop {
            match std::os::unix::net::UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => ensure!(began.elapsed() < REQUEST_MAX, "the empty backend does not listen: {error}"),
            }
            std::thread::sleep(Duration::from_micros(50));
        };
        let driver = Driver::connected(Options::default(), stream)?;
        times.push(began.elapsed());
        drop(driver);
        child.kill()?;
        child.wait()?;
    }
    Ok(Spread::of(&times))
}

struct Disk {
    driver: Driver,
    dice: Dice,
    kind: Kind,
    in_flight: HashMap<u16, Instant>,
}

impl Disk {
    fn issue(&mut self) -> Result<()> {
        let (queue, guest) = self.driver.queue(0)?;
        let head = queue.next_head().context("a free descriptor")?;
        let at = BUFFERS + u64::from(head) * u64::from(BLOCK);
        let sector = self.dice.below(BLOCKS) * u64::from(BLOCK) / 512;
        let head = disk::add(queue, guest, self.kind, sector, &[(at, BLOCK)]).context("a free descriptor")?;
        self.in_flight.insert(head, Instant::now());
        queue.publish(guest)
    }

    /// Takes what is completed: when it was issued.
    fn take(&mut self) -> Result<Option<Instant>> {
        let (queue, guest) = self.driver.queue(0)?;
        let Some((head, _)) = queue.take(guest) else { return Ok(None) };
        ensure!(disk::status(queue, guest, head) == 0, "a request failed");
        Ok(Some(self.in_flight.remove(&head).context("a request that was in flight")?))
    }

    /// Keeps `depth` requests going until so many are done.
    fn run(&mut self, depth: usize, requests: usize) -> Result<()> {
        let mut done = 0;
        let deadline = Instant::now() + REQUEST_MAX;
        while done < requests {
            while self.in_flight.len() < depth {
                self.issue()?;
            }
            while self.take()?.is_some() {
                done += 1;
            }
            ensure!(Instant::now() < deadline, "nothing is completed any more");
        }
        Ok(())
    }
}

fn stratum(
    page: &Page,
    folder: &Path,
    direct: bool,
    (kind, depth): (Kind, usize),
    (kills, seed): (u64, u64),
    standby: bool,
) -> Result<Stratum> {
    let folder = tempfile::tempdir_in(folder)?;
    let path = folder.path().join("image");
    // Written once: reads shall find blocks, not holes.
    std::fs::write(&path, vec![0x5a; (BLOCKS * u64::from(BLOCK)) as usize])?;
    let house = House::new(page.programs())?;
    let config = DeviceConfig::Disk(DiskConfig { path: Some(path), direct, standby, ..DiskConfig::default() });
    let mut rig = house.device(&config, MEMORY)?;
    let options = Options { queues: 1, size: SIZE, memory: MEMORY as usize, ..Options::default() };
    let mut disk = Disk { driver: rig.start(options)?, dice: Dice::new(seed), kind, in_flight: HashMap::new() };
    let (mut in_flight, mut after, mut fences) = (Vec::new(), Vec::new(), Vec::new());
    let (mut beyond, mut worst) = (Vec::new(), Trace::default());
    for number in 0..kills {
        disk.run(depth, 50 * depth.min(4))?;
        while standby && !matches!(rig.status().spare, Spare::Ready { .. }) {
            disk.run(depth, 1)?;
        }
        let before = page.fences();
        // A short request is over before a signal arrives: every other time the process is stopped when it gets them.
        if number % 2 == 0 {
            super::victim::stop(&process(&rig)?);
        }
        while disk.in_flight.len() < depth {
            disk.issue()?;
        }
        let (killed, mut slowest) = (kill(&rig)?, Duration::ZERO);
        let ended = killed.elapsed();
        while disk.take()?.is_some() {}
        // What the guest asks for while nobody is there; at least one, since none of the others may be left.
        for _ in 0..depth.min(8) {
            disk.issue()?;
        }
        let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
        let mut trace = Trace { ended_ms: ms(ended), ..Trace::default() };
        while !disk.in_flight.is_empty() {
            let issued = disk.take()?;
            if trace.fenced_ms == 0.0 && page.fences() > before {
                trace.fenced_ms = ms(killed.elapsed());
            }
            let Some(issued) = issued else {
                ensure!(killed.elapsed() < REQUEST_MAX, "nothing is completed any more");
                let (queue, guest) = disk.driver.queue(0)?;
                queue.wait(guest, Duration::from_millis(1))?;
                continue;
            };
            let now = killed.elapsed();
            trace.last_ms = ms(now);
            if trace.first_ms == 0.0 {
                trace.first_ms = trace.last_ms;
            }
            if issued < killed {
                in_flight.push(now);
            } else {
                after.push(issued.elapsed());
            }
            slowest = now;
        }
        ensure!(page.fences() > before, "no successor has passed its fence");
        // A successor that is started after the death waits by itself; for a spare the front end does, from the end of the
        // process on.
        let fence = if standby { ended + rig.status().fence_wait } else { page.fence() };
        trace.fence_ms = ms(fence);
        fences.push(fence);
        beyond.push(slowest.saturating_sub(fence));
        if trace.beyond_fence_ms() > worst.beyond_fence_ms() {
            worst = trace;
        }
    }
    let (in_flight_ms, issued_after_ms) = (Spread::of(&in_flight), Spread::of(&after));
    let beyond = Spread::of(&beyond);
    let spare_ok = !standby || beyond.p50 <= STANDBY_P50_MS_MAX;
    let ok = if depth == 1 {
        [in_flight_ms, issued_after_ms].iter().all(|it| it.p50 <= QD1_P50_MS_MAX && it.p99 <= QD1_P99_MS_MAX)
    } else {
        beyond.max <= BEYOND_FENCE_MS_MAX
    };
    let ok = ok && spare_ok;
    Ok(Stratum {
        kind: "",
        depth,
        image: "",
        kills,
        in_flight_ms,
        issued_after_ms,
        fence_ms: Spread::of(&fences),
        beyond_fence_ms: beyond,
        of_floor: 0.0,
        slowest: worst,
        standby,
        ok,
    })
}

/// The process that serves.
fn process(rig: &Rig) -> Result<OwnedFd> {
    let deadline = Instant::now() + REQUEST_MAX;
    loop {
        ensure!(Instant::now() < deadline, "no backend: {:?}", rig.status());
        let pid = rig.status().pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(process) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
            return Ok(process);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// SIGKILL, and the end of the process; when that was.
fn kill(rig: &Rig) -> Result<Instant> {
    let process = process(rig)?;
    let now = Instant::now();
    pidfd_send_signal(&process, Signal::KILL)?;
    let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
    ensure!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))? > 0, "a killed process does not end");
    Ok(now)
}
