//! Upgrades under load: two builds take turns, each verified, and builds that will not do are refused or taken back.
//!
//! Two copies of the test build in two folders are two builds; which of them serves is seen in the pages beside them, where
//! each counts the requests that it takes. A third folder has builds that fail in every way that there is
//! ([`Bad`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_kit::bad_build::Bad;
use atoll_kit::step::Step;
use atoll_vmm::vhost::{DeviceState, Fault, SWITCH_STEP, UpgradeError, UpgradeOrder};
use serde::Serialize;

use super::load::Findings;
use super::page::Page;
use super::scene::{Plan, Scene};
use super::stall::Spread;

/// Requests between two upgrades.
const BETWEEN: u64 = 200;
/// How long an upgrade, or what follows from one that fails, may take: a build that hangs is given ten seconds twice.
const UPGRADE_MAX: Duration = Duration::from_secs(60);
/// A machine that is busy with something else makes an honest build late; then it is tried again.
const TRIES: u32 = 5;
/// After so many upgrades the backend is killed: its successor is of the build that it must be of.
const KILL_EVERY: u64 = 25;

/// What a run of upgrades came to.
#[derive(Debug, Clone, Serialize)]
pub struct Upgrades {
    /// Always "upgrades".
    pub chaos: &'static str,
    /// Nothing was lost, nothing broken, every upgrade was what was said of it.
    pub ok: bool,
    /// The class.
    pub device: String,
    /// Reproduces the load.
    pub seed: u64,
    /// Upgrades that were done, each verified.
    pub upgrades: u64,
    /// Honest builds that were taken back because they were late, and tried again.
    pub late: u64,
    /// Backends that were killed between upgrades; each successor was of the newest build, or of the one before it where the
    /// newest was on probation.
    pub kills: u64,
    /// The longest time without a completion around each upgrade.
    pub silence_ms: Spread,
    /// The same around builds that were refused or taken back.
    pub refused_silence_ms: Spread,
    /// Each build that will not do: what the operator was told, and the longest silence around it.
    pub refused: BTreeMap<String, Refused>,
    /// Requests that were completed.
    pub requests: u64,
    /// What the load found.
    pub findings: Findings,
}

/// How a build was refused or taken back.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    /// What the operator was told.
    pub why: String,
    /// The longest time without a completion around it, in milliseconds.
    pub silence_ms: f64,
}

/// What came of one attempt.
struct Attempt {
    outcome: Result<u64, UpgradeError>,
    silence: Duration,
}

/// A device under load, and its builds.
pub struct Builds {
    scene: Scene,
    pages: [Page; 2],
    bad: Page,
    program: &'static str,
    /// Which of the pages serves.
    serves: usize,
    name: String,
    seed: u64,
    upgrades: u64,
    late: u64,
    kills: u64,
    silences: Vec<Duration>,
    refused_silences: Vec<Duration>,
    refused: BTreeMap<String, Refused>,
}

impl Builds {
    /// Starts the device of a plan with the test build in `programs`.
    pub fn open(plan: &Plan, programs: &Path) -> Result<Self> {
        let pages = [Page::new(programs, None)?, Page::new(programs, None)?];
        let scene = Scene::open(plan, pages[0].programs())?;
        Ok(Self {
            scene,
            pages,
            bad: Page::new(programs, None)?,
            program: plan.program(),
            serves: 0,
            name: plan.name(),
            seed: plan.seed,
            upgrades: 0,
            late: 0,
            kills: 0,
            silences: Vec::new(),
            refused_silences: Vec::new(),
            refused: BTreeMap::new(),
        })
    }

    fn exe(&self, page: usize) -> PathBuf {
        self.pages[page].programs().join(self.program)
    }

    fn play(&mut self, requests: u64) -> Result<()> {
        let until = self.scene.load.completed() + requests;
        let deadline = Instant::now() + UPGRADE_MAX;
        while self.scene.load.completed() < until {
            ensure!(!self.scene.load.is_stuck(), "a request is late: {:?}", self.scene.rig.status());
            ensure!(Instant::now() < deadline, "nothing is completed any more: {:?}", self.scene.rig.status());
            self.scene.load.turn()?;
        }
        Ok(())
    }

    /// Plays on while an upgrade goes on, and until something more was completed.
    fn attempt(&mut self, exe: PathBuf) -> Result<Attempt> {
        let order = UpgradeOrder { exe, step: SWITCH_STEP };
        let coming = self.scene.rig.device()?.begin_upgrade(order)?;
        let began = Instant::now();
        let (mut outcome, mut left) = (None, 2);
        let (mut done, mut last, mut silence) = (self.scene.load.used()?, Instant::now(), Duration::ZERO);
        // The last word may come before the last silence is over.
        while left > 0 {
            ensure!(began.elapsed() < UPGRADE_MAX, "an upgrade does not end: {:?}", self.scene.rig.status());
            ensure!(!self.scene.load.is_stuck(), "a request is late: {:?}", self.scene.rig.status());
            self.scene.load.turn()?;
            let used = self.scene.load.used()?;
            if used != done {
                silence = silence.max(last.elapsed());
                (done, last) = (used, Instant::now());
                left -= u32::from(outcome.is_some());
            }
            if outcome.is_none() {
                outcome = match coming.try_recv() {
                    Ok(outcome) => Some(outcome),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => bail!("nobody says what became of an upgrade"),
                };
            }
        }
        let outcome = outcome.context("an upgrade without an outcome")?;
        Ok(Attempt { outcome, silence })
    }

    /// Which build takes requests now is seen in its page.
    fn verify_serving(&mut self, page: usize) -> Result<()> {
        let before = [0, 1].map(|at| self.pages[at].passed(Step::Fetch));
        // What is completed first may have been taken before.
        let deadline = Instant::now() + UPGRADE_MAX;
        while self.pages[page].passed(Step::Fetch) == before[page] {
            ensure!(Instant::now() < deadline, "the build that was said to serve takes no request");
            self.play(20)?;
        }
        let after = [0, 1].map(|at| self.pages[at].passed(Step::Fetch));
        ensure!(after[1 - page] == before[1 - page], "the build that was said to be gone takes requests");
        let status = self.scene.rig.status();
        ensure!(status.exe.as_ref() == Some(&self.exe(page)), "{status:?}");
        Ok(())
    }

    /// The other build takes the place of this one.
    pub fn upgrade(&mut self) -> Result<()> {
        self.play(BETWEEN)?;
        let (to, before) = (1 - self.serves, self.scene.rig.status());
        for _ in 0..TRIES {
            let Attempt { outcome, silence } = self.attempt(self.exe(to))?;
            match outcome {
                Ok(generation) => {
                    ensure!(generation > before.generation, "generation {generation} after {before:?}");
                    self.serves = to;
                    self.upgrades += 1;
                    self.silences.push(silence);
                    return self.verify_serving(to);
                }
                Err(error) => {
                    let words = error.to_string();
                    ensure!(words.contains("did not answer"), "an honest build was refused: {words}");
                    self.late += 1;
                    self.verify_serving(self.serves)?;
                }
            }
        }
        bail!("{TRIES} attempts in a row were late")
    }

    /// A build that will not do is tried: the one that serves carries on, or is back, and the operator hears why.
    pub fn refuse(&mut self, bad: Bad) -> Result<()> {
        self.play(BETWEEN)?;
        self.bad.spoil(Some(bad));
        let attempt = self.attempt(self.bad.programs().join(self.program));
        self.bad.spoil(None);
        let Attempt { outcome, silence } = attempt?;
        let Err(error) = outcome else { bail!("{bad:?}: it was taken") };
        let silence_ms = (silence.as_secs_f64() * 1e4).round() / 10.0;
        self.refused.insert(format!("{bad:?}"), Refused { why: error.to_string(), silence_ms });
        self.refused_silences.push(silence);
        self.verify_serving(self.serves).with_context(|| format!("after {bad:?}: {error}"))
    }

    /// The backend is killed: the next one is of the build that served, or of the one before it, where that is what is told
    /// of a build on probation.
    pub fn kill(&mut self) -> Result<()> {
        let lost = self.scene.rig.lost();
        self.scene.rig.device()?.inject(Fault::Kill, 0)?;
        let deadline = Instant::now() + UPGRADE_MAX;
        while self.scene.rig.lost() == lost || self.scene.rig.status().state != DeviceState::Running {
            ensure!(Instant::now() < deadline, "{:?}", self.scene.rig.status());
            self.scene.load.turn()?;
        }
        self.kills += 1;
        let told = self.scene.rig.status().upgrade;
        if told.is_some_and(|told| told.starts_with("rolled back")) {
            self.serves = 1 - self.serves;
        }
        self.verify_serving(self.serves)
    }

    /// So many upgrades in a row, with a kill now and then.
    pub fn run(&mut self, count: u64) -> Result<()> {
        for number in 1..=count {
            self.upgrade().with_context(|| format!("upgrade {number}"))?;
            if number % KILL_EVERY == 0 {
                self.kill().with_context(|| format!("the kill after upgrade {number}"))?;
            }
        }
        Ok(())
    }

    /// What was told of each build that was refused.
    pub fn refused(&self) -> &BTreeMap<String, Refused> {
        &self.refused
    }

    /// Awaits everything and judges.
    pub fn finish(self) -> Result<Upgrades> {
        let findings = self.scene.finish()?;
        Ok(Upgrades {
            chaos: "upgrades",
            ok: findings.broken() == 0,
            device: self.name,
            seed: self.seed,
            upgrades: self.upgrades,
            late: self.late,
            kills: self.kills,
            silence_ms: Spread::of(&self.silences),
            refused_silence_ms: Spread::of(&self.refused_silences),
            refused: self.refused,
            requests: findings.requests,
            findings,
        })
    }
}
