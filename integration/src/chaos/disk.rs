//! A disk under the verifier's load: [`Player`] on the rings of a [`Rig`].

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use atoll_devices::Answer;
use atoll_verify::blk::workload::Mix;
use atoll_verify::blk::{Verdict, Violation, Workload};
use atoll_vmm::config::DiskConfig;

use super::load::{Findings, Load};
use super::rig::Rig;
use super::stall::StallWatch;
use crate::verify::disk_queues::DiskQueues;
use crate::verify::player::{Player, Style};

/// Where the configuration space has the cache mode (virtio 1.2, 5.2.4).
const WRITEBACK_AT: u32 = 32;
/// Requests between two settlements: what the judge remembers shall not hide a leak.
const SEGMENT: u64 = 4000;
/// Requests in flight.
const DEPTH: usize = 64;
/// And in a long queue.
const DEPTH_LONG: usize = 320;

/// How long a request may take before it counts as lost.
pub const REQUEST_MAX: Duration = Duration::from_secs(20);

/// A disk and its guest.
pub struct DiskLoad {
    player: Player<Box<dyn DiskQueues>>,
    style: Style,
    load: Workload,
    accused: Vec<String>,
    write_through: bool,
}

impl DiskLoad {
    /// Guest memory that such a load needs, in bytes.
    pub const MEMORY: u64 = 16 << 20;
    /// Entries of each queue.
    pub const QUEUE_SIZE: u16 = 1024;
    /// Bytes of the image, which must hold zeroes.
    pub const IMAGE: u64 = 1 << 20;

    /// A disk for such a load, on the raw image at `path`.
    pub fn config(path: &Path) -> DiskConfig {
        DiskConfig { path: Some(path.to_owned()), queue_size: Some(Self::QUEUE_SIZE), ..DiskConfig::default() }
    }

    /// Starts the load of `seed` on a disk of `queues` queues.
    pub fn start(rig: &mut Rig, seed: u64, queues: u16) -> Result<Self> {
        let style = Style {
            queues,
            queue_size: Self::QUEUE_SIZE,
            depth: DEPTH,
            depth_long: DEPTH_LONG,
            deadline: REQUEST_MAX,
            segment: SEGMENT,
        };
        let load = Workload { sectors: Self::IMAGE / 512, mix: Mix::FULL, ..Workload::new(seed) };
        let driver = rings(rig, style, &load)?;
        let player = Player::over(load, style, driver, Some(rig.deaths()));
        Ok(Self { player, style, load, accused: Vec::new(), write_through: false })
    }

    /// The power fails; the same load goes on with a device whose image holds what was durable.
    pub fn lose_power(&mut self, rig: &mut Rig) -> Result<()> {
        let driver = rings(rig, self.style, &self.load)?;
        self.player.lose_power(driver)?;
        self.player.watch(rig.deaths());
        Ok(())
    }
}

fn rings(rig: &mut Rig, style: Style, load: &Workload) -> Result<Box<dyn DiskQueues>> {
    rig.start_disk(style.options(load))
}

impl Load for DiskLoad {
    fn turn(&mut self) -> Result<()> {
        self.player.turn()
    }
    fn push(&mut self) -> Result<()> {
        self.player.push()
    }
    fn poll(&mut self) -> Result<()> {
        self.player.collect().map(drop)
    }
    fn pending(&mut self) -> Result<u32> {
        self.player.pending()
    }
    fn used(&mut self) -> Result<u64> {
        self.player.used()
    }
    fn completed(&self) -> u64 {
        self.player.completed()
    }
    fn issued(&self) -> u64 {
        self.player.issued()
    }
    fn lengthen(&mut self, long: bool) {
        self.player.lengthen(long);
    }
    fn killed(&mut self, at: Instant) {
        self.player.killed(at);
    }
    fn stall(&self) -> &StallWatch {
        self.player.stall()
    }
    fn is_stuck(&self) -> bool {
        self.player.is_stuck()
    }
    fn begin_anew(&mut self, rig: &mut Rig) -> Result<()> {
        let driver = rings(rig, self.style, &self.load)?;
        self.player.begin_anew(driver)
    }
    fn write_config(&mut self, rig: &mut Rig) -> Option<Answer> {
        self.write_through = !self.write_through;
        rig.begin_write_config(WRITEBACK_AT, &[u8::from(!self.write_through)])
    }
    fn is_broken(&mut self) -> Result<bool> {
        self.player.settle()?;
        Ok(self.player.is_stuck()
            || !self.player.is_ok_so_far()
            || self.player.uncalled() > 0
            || !self.accused.is_empty())
    }
    fn accuse(&mut self, words: String) {
        self.accused.push(words);
    }
    fn finish(self: Box<Self>) -> Result<Findings> {
        let uncalled = self.player.uncalled();
        let mut findings = findings(&self.player.finish()?, uncalled);
        findings.corrupted += self.accused.len() as u64;
        self.accused.into_iter().for_each(|words| findings.say(words));
        Ok(findings)
    }
}

fn findings(verdict: &Verdict, uncalled: u64) -> Findings {
    use Violation::{
        CompletedTwice, Corrupt, Failed, GuestLog, History, LateWrite, Lost, Misplaced, NeverCompleted, Rings, Stale,
        Torn, Unfilled,
    };
    let sum = |kinds: &[Violation]| kinds.iter().map(|kind| verdict.count(*kind)).sum();
    let counts = &verdict.counts;
    Findings {
        requests: counts.reads + counts.writes + counts.flushes + counts.discards + counts.zeroes,
        lost: sum(&[NeverCompleted, Rings]),
        stale: sum(&[Lost, Stale]),
        torn: sum(&[Torn]),
        duplicated: sum(&[CompletedTwice]),
        corrupted: sum(&[Misplaced, Corrupt, Unfilled, LateWrite, GuestLog, History]),
        failed: sum(&[Failed]),
        uncalled,
        words: verdict.findings.clone(),
        ..Findings::default()
    }
}
