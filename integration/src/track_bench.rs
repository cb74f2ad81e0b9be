//! What it costs when the VMM stands between a guest and its backend: it keeps account of requests (`track=shadow`), or
//! copies them (`isolation=copy`). The same backend twice behind the shipped front end, on an image in memory, once with
//! that and once with the guest's own rings. A batch is made available at once and awaited as a whole; the two sides are
//! measured in turn, round by round, so that a busy host meets both.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};
use atoll_vmm::config::{DeviceConfig, DiskConfig, Isolation, Track};
use serde::Serialize;
use xtask::laden::Ending;
use xtask::place;

use crate::chaos::rig::{House, Rig};

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 1024;
/// Batches that are measured: requests and bytes of each.
const BATCHES: [(usize, u32); 5] = [(1, BLOCK), (8, BLOCK), (32, BLOCK), (1, 1 << 17), (8, 1 << 17)];
const MEMORY: u64 = 16 << 20;
/// Where the buffers are.
const BUFFERS: u64 = 1 << 20;
const SIZE: u16 = 256;
/// How long a request may take.
const REQUEST_MAX: Duration = Duration::from_secs(20);

/// What stands between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// Rings that the VMM copies.
    Shadow,
    /// Requests that it copies.
    Copies,
}

impl Between {
    fn name(self) -> &'static str {
        match self {
            Self::Shadow => "shadow",
            Self::Copies => "copy",
        }
    }
}

/// One batch size.
#[derive(Debug, Clone, Serialize)]
pub struct Depth {
    /// Requests of a batch.
    pub requests: usize,
    /// Bytes of each.
    pub bytes: u32,
    /// A batch on the guest's own rings, in microseconds: the median of all rounds.
    pub shared_us: f64,
    /// The same with the VMM between.
    pub between_us: f64,
    /// The difference.
    pub cost_us: f64,
    /// The median of the rounds' ratios.
    pub ratio: f64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What stands between: "shadow" or "copy".
    pub bench: &'static str,
    /// Rounds.
    pub rounds: usize,
    /// By batch size.
    pub batches: Vec<Depth>,
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mut table = format!(
            "| requests a batch | bytes of each | shared us | {} us | cost us | ratio |\n|---|---|---|---|---|---|\n",
            self.bench
        );
        for one in &self.batches {
            let Depth { requests, bytes, shared_us, between_us, cost_us, ratio } = one;
            table +=
                &format!("| {requests} | {bytes} | {shared_us:.1} | {between_us:.1} | {cost_us:.1} | {ratio:.2} |\n");
        }
        table
    }
}

struct Side {
    driver: Driver,
    _rig: Rig,
    _backend: Ending,
    _folder: tempfile::TempDir,
}

impl Side {
    fn start(house: &House, between: Option<Between>) -> Result<Self> {
        let (track, isolation) = match between {
            None => (Track::Auto, Isolation::Shared),
            Some(Between::Shadow) => (Track::Shadow, Isolation::Shared),
            Some(Between::Copies) => (Track::Auto, Isolation::Copy),
        };
        let folder = tempfile::tempdir_in(crate::chaos::scene::memory())?;
        let (image, socket) = (folder.path().join("image"), folder.path().join("disk.sock"));
        std::fs::write(&image, vec![0x5a; (BLOCKS * u64::from(BLOCK)) as usize])?;
        // Rings are copied only for backends behind a socket: those of the VMM's own keep the record themselves.
        let mut command = Command::new(place::program("atoll-blk")?);
        command.arg("--socket").arg(&socket).arg("--path").arg(&image).stdin(Stdio::null());
        let backend = Ending(command.spawn()?);
        let deadline = Instant::now() + REQUEST_MAX;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "the backend does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        let config =
            DiskConfig { vhost_user: true, vhost_socket: Some(socket), track, isolation, ..DiskConfig::default() };
        let mut rig = house.device(&DeviceConfig::Disk(config), MEMORY)?;
        let options = Options { queues: 1, size: SIZE, memory: MEMORY as usize, ..Options::default() };
        Ok(Self { driver: rig.start(options)?, _rig: rig, _backend: backend, _folder: folder })
    }

    /// The mean time of a batch of reads of so many bytes, in microseconds.
    fn measure(&mut self, (requests, bytes): (usize, u32), time: Duration) -> Result<f64> {
        let (queue, guest) = self.driver.queue(0)?;
        let (began, mut batches) = (Instant::now(), 0_u32);
        while began.elapsed() < time {
            for number in 0..requests as u64 {
                let blocks = BLOCKS * u64::from(BLOCK) / u64::from(bytes);
                let sector = (u64::from(batches) * 37 + number) % blocks * u64::from(bytes) / 512;
                let at = BUFFERS + number * u64::from(bytes);
                disk::add(queue, guest, Kind::In, sector, &[(at, bytes)]).context("a free descriptor")?;
            }
            queue.publish(guest)?;
            for _ in 0..requests {
                let (head, _) = queue.take_within(guest, REQUEST_MAX)?;
                ensure!(disk::status(queue, guest, head) == 0, "a request failed");
            }
            batches += 1;
        }
        Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(batches.max(1)))
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_unstable_by(f64::total_cmp);
    let middle = all.get(all.len() / 2).copied().unwrap_or_default();
    (middle * 100.0).round() / 100.0
}

/// Measures `rounds` rounds of `time` for each side and batch size.
pub fn run(between: Between, rounds: usize, time: Duration) -> Result<Report> {
    let house = House::new(&place::release())?;
    let mut shared = Side::start(&house, None)?;
    let mut other = Side::start(&house, Some(between))?;
    let mut batches = Vec::new();
    for (requests, bytes) in BATCHES {
        let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds.max(1) {
            let (one, two) = (shared.measure((requests, bytes), time)?, other.measure((requests, bytes), time)?);
            without.push(one);
            with.push(two);
            ratios.push(two / one);
        }
        let (shared_us, between_us) = (median(without), median(with));
        let cost_us = ((between_us - shared_us) * 100.0).round() / 100.0;
        batches.push(Depth { requests, bytes, shared_us, between_us, cost_us, ratio: median(ratios) });
    }
    Ok(Report { bench: between.name(), rounds, batches })
}
