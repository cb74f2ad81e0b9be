//! The campaign: a device under load is killed, at random and at named steps, and again while it recovers.
//!
//! A round plays the load for a while, kills, and plays on until everything that was in flight has been completed. Which
//! round aims at what follows from the seed. With a test build ([`Page`]) a process dies by itself at a step, at its first,
//! second or later occurrence; without one all kills come from outside, some of them while a successor starts.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_kit::step::{Sabotage, Step};
use atoll_verify::dice::{Dice, mix};
use atoll_vmm::config::Isolation;
use atoll_vmm::vhost::DeviceState;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use xtask::processes;

use super::census::Census;
use super::outcome::{Frame, Outcome, Tally};
use super::page::Page;
use super::rig::await_answer;
use super::scene::{Image, Plan, Scene};
use super::scheduling;
use super::victim::{copy_of_descriptor, ended, stop};

/// Fewer kills than this cannot be expected to hit every step with work in flight.
const STEPS_KILLS_MIN: u64 = 200;
/// How often a step is aimed at again that nobody died at with work in flight.
const AIMS_AGAIN: u32 = 12;
/// How often a kill waits for work to be in flight.
const ATTEMPTS: u32 = 16;
/// How long a killed process may take to go, an aimed kill to come, and a device to go on.
const REAP_MAX: Duration = Duration::from_secs(5);
const AIM_MAX: Duration = Duration::from_secs(2);
const RECOVER_MAX: Duration = Duration::from_secs(30);
/// How long a message from the front end may take to a backend's socket.
const MESSAGE: Duration = Duration::from_millis(15);
/// Requests before the first kill that counts, and after it.
const WARM_UP: u64 = 4000;
/// How much longer the I/O of the dead goes on where a successor is expected not to wait for it.
const LINGER_MORE: Duration = Duration::from_millis(150);
/// How long requests are handed over without a wait before an aimed kill.
const CROWD: Duration = Duration::from_millis(2);

/// What a round does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// A kill at any moment.
    Random,
    /// A kill, after which the dead process's I/O goes on for a while.
    Linger,
    /// A kill, and another one while the successor starts.
    Start,
    /// The process dies at this step, at this occurrence.
    Step(Step, u64),
}

impl Aim {
    /// The process dies while it negotiates, recovers or is reset, and not in the middle of its work.
    fn is_at_start(self) -> bool {
        matches!(self, Self::Start | Self::Step(Step::Handshake | Step::Replay | Step::Reset, _))
    }
}

/// Occurrences of a step at which a process dies.
const DEPTHS: [u64; 6] = [1, 2, 3, 7, 16, 45];
/// Messages of a conversation are fewer.
const FEW: [u64; 6] = [1, 2, 3, 5, 9, 14];

/// Runs a campaign; `page` belongs to a test build, whose programs are used.
pub struct Campaign<'a> {
    plan: &'a Plan,
    page: Option<&'a Page>,
    scene: Scene,
    dice: Dice,
    tally: Tally,
    round: u64,
    /// The last kill left I/O behind for longer than the kernel does.
    lingered: bool,
    /// Requests issued when the process that is to die by itself was last seen alive.
    issued_alive: u64,
}

impl<'a> Campaign<'a> {
    /// Sets the scene.
    pub fn new(plan: &'a Plan, page: Option<&'a Page>, programs: &Path) -> Result<Self> {
        let programs = page.map_or(programs, Page::programs);
        if let (Some(page), Some((sabotage, period))) = (page, plan.sabotage) {
            page.sabotage(sabotage, period);
        }
        let scene = Scene::open(plan, programs)?;
        let dice = Dice::new(mix(plan.seed, 0x6b69_6c6c));
        Ok(Self { plan, page, scene, dice, tally: Tally::default(), round: 0, lingered: false, issued_alive: 0 })
    }

    /// Until the kills are done, or something hangs.
    pub fn run(mut self) -> Result<Outcome> {
        let began = Instant::now();
        // Everything that is made once has been made after the first recovery.
        self.play(WARM_UP)?;
        self.round(Aim::Random)?;
        self.play(WARM_UP)?;
        let before = Census::take()?;
        while self.tally.kills < self.plan.kills && !self.is_over() {
            let aim = self.aim();
            self.round(aim)?;
            self.round += 1;
            if self.plan.sabotage.is_some() && !self.is_over() && self.scene.load.is_broken()? {
                break;
            }
        }
        self.aim_again()?;
        self.play(50)?;
        // A successor that is still settling down has descriptors on their way.
        std::thread::sleep(Duration::from_millis(100));
        let census = [before, Census::take()?];
        if self.plan.sabotage.is_none() {
            self.check_steps();
        }
        let Scene { rig, load, house, image, _folder, _tap } = self.scene;
        let status = rig.status();
        if rig.needs_reset() > 0 {
            self.tally.words.push(format!("the driver was told to reset the device: {status:?}"));
        }
        let findings = load.finish()?;
        drop(rig);
        drop(house);
        let mut images_checked = None;
        if let (Image::Qcow2, Some(image)) = (self.plan.image, &image) {
            super::power::check_image(image, &mut self.tally.words)?;
            images_checked = Some(1);
        }
        let frame = Frame {
            device: self.plan.name(),
            seed: self.plan.seed,
            restarts: status.generation.saturating_sub(1),
            census,
            took: began.elapsed(),
            images_checked,
        };
        Ok(Outcome::new(frame, self.tally, findings))
    }

    fn is_over(&mut self) -> bool {
        self.scene.load.is_stuck() || self.tally.hung > 0
    }

    /// A step that is to be hit and never was, with work in flight, fails the campaign; a short one cannot hit all.
    fn check_steps(&mut self) {
        for step in self.missed() {
            self.tally.words.push(format!("nobody died at {} with work in flight", step.name()));
        }
    }

    fn missed(&self) -> Vec<Step> {
        if self.page.is_none() || self.plan.kills < STEPS_KILLS_MIN {
            return Vec::new();
        }
        let was_hit = |step: &Step| self.tally.steps.get(step.name()).is_some_and(|[_, busy]| *busy > 0);
        self.plan.steps().into_iter().filter(|step| !was_hit(step)).collect()
    }

    /// Whether work is in flight at a step is partly the scheduler's doing, on a busy machine more so: a step that was never
    /// hit like that is aimed at some times more before it counts as missed.
    fn aim_again(&mut self) -> Result<()> {
        for _ in 0..AIMS_AGAIN {
            for step in self.missed() {
                if self.is_over() || self.plan.sabotage.is_some() {
                    return Ok(());
                }
                let depth = self.depth(step);
                self.round(Aim::Step(step, depth))?;
                self.tally.aimed_again += 1;
            }
        }
        Ok(())
    }

    fn aim(&mut self) -> Aim {
        let roll = self.dice.below(10);
        if self.page.is_none() || roll < 3 {
            if roll == 1 && self.scene.image.is_some() || matches!(self.plan.sabotage, Some((Sabotage::SkipFence, _))) {
                return Aim::Linger;
            }
            return if roll == 0 || self.page.is_none() && roll < 3 { Aim::Start } else { Aim::Random };
        }
        let steps = self.plan.steps();
        // In turn, so that none is forgotten; the depth is chance.
        let step = steps.get((self.round % steps.len() as u64) as usize).copied().unwrap_or(Step::Fetch);
        let depth = self.depth(step);
        Aim::Step(step, depth)
    }

    /// At which occurrence of a step the process dies.
    fn depth(&mut self, step: Step) -> u64 {
        let depths = if step == Step::Handshake { FEW } else { DEPTHS };
        match step {
            // As many as there are for certain.
            Step::Reset | Step::ConfigWrite => 1,
            Step::Replay => 1 + self.dice.below(4),
            _ => depths.get(self.dice.below(depths.len() as u64) as usize).copied().unwrap_or(1),
        }
    }

    /// Plays until so many more requests have been completed.
    fn play(&mut self, requests: u64) -> Result<()> {
        let until = self.scene.load.completed() + requests;
        let deadline = Instant::now() + RECOVER_MAX;
        while self.scene.load.completed() < until && !self.is_over() {
            self.scene.load.turn()?;
            if Instant::now() > deadline {
                self.hung("nothing is completed any more");
            }
        }
        Ok(())
    }

    fn hung(&mut self, what: &str) {
        self.tally.hung += 1;
        self.tally.words.push(format!("{what}: {:?}", self.scene.rig.status()));
    }

    fn round(&mut self, aim: Aim) -> Result<()> {
        let some = self.dice.below(120);
        self.play(1 + some)?;
        if self.is_over() {
            return Ok(());
        }
        // Most of them find a long queue; some the usual one.
        let long = self.dice.below(4) > 0;
        self.scene.load.lengthen(long);
        match aim {
            Aim::Random => self.kill(false)?,
            Aim::Linger => self.kill_lingering()?,
            Aim::Start => {
                self.kill(true)?;
                self.kill_successor()?;
            }
            Aim::Step(step, depth) => self.kill_at(step, depth)?,
        }
        self.scene.load.lengthen(false);
        if !self.is_over() {
            self.lingered = aim == Aim::Linger;
            self.recover(aim.is_at_start())?;
        }
        Ok(())
    }

    /// A kill from outside while the device runs, soon after requests were handed over. Begins the stall.
    fn kill(&mut self, and_again: bool) -> Result<()> {
        let process = self.scene.running()?;
        self.be_busy(&process)?;
        self.strike(&process, if and_again { "first-of-two" } else { "random" })
    }

    /// Returns when requests are in flight: more than will be done by the time at which a signal arrives. Most of the time
    /// the process is stopped then, and looked at: what is unanswered now is unanswered when it is killed.
    fn be_busy(&mut self, process: &OwnedFd) -> Result<()> {
        let window = Duration::from_nanos(self.dice.below(60_000));
        let held = self.dice.below(4) > 0;
        for left in (0..ATTEMPTS).rev() {
            self.scene.load.turn()?;
            // A process that stands still while they are handed over is not through with the first before the last is there.
            let held = held && stop(process);
            self.scene.load.poll()?;
            self.scene.load.push()?;
            if held {
                let _ = pidfd_send_signal(process, Signal::CONT);
            }
            // The last attempts take what they get.
            let moment = Instant::now() + window * left / ATTEMPTS;
            while Instant::now() < moment {
                std::hint::spin_loop();
            }
            if self.scene.load.pending()? <= left {
                continue;
            }
            if !held || !stop(process) || self.scene.load.pending()? > 0 {
                break;
            }
            let _ = pidfd_send_signal(process, Signal::CONT);
        }
        Ok(())
    }

    fn strike(&mut self, process: &OwnedFd, step: &'static str) -> Result<()> {
        let now = Instant::now();
        self.scene.load.killed(now);
        // It fails when the process has ended by itself, which the front end has noticed.
        if pidfd_send_signal(process, Signal::KILL).is_err() {
            return Ok(());
        }
        if !ended(process, REAP_MAX) {
            bail!("a killed process does not end");
        }
        let pending = self.scene.load.pending()?;
        self.tally.kill(pending, step);
        Ok(())
    }

    /// A kill of a process whose I/O on its image outlives it, played by a copy of its descriptor: it holds the lock as
    /// the kernel's requests do. Meanwhile nothing may be completed.
    fn kill_lingering(&mut self) -> Result<()> {
        let process = self.scene.running()?;
        let image = self.scene.image.clone().context("an image")?;
        let copy = copy_of_descriptor(&process, self.scene.rig.status().pid.unwrap_or_default(), &image);
        self.be_busy(&process)?;
        let Some(copy) = copy else { return self.strike(&process, "random") };
        let lost = self.scene.rig.status().lost;
        self.strike(&process, "linger")?;
        // What the dead process had completed in rings that are not the driver's comes to the driver with its burial.
        let buried = Instant::now() + REAP_MAX;
        while self.plan.isolation == Isolation::Copy && self.scene.rig.status().lost == lost && Instant::now() < buried
        {
            self.scene.load.push()?;
            std::thread::sleep(Duration::from_micros(100));
        }
        let used = self.scene.load.used()?;
        let mut lingers = Duration::from_micros(2000 + self.dice.below(12_000));
        if self.plan.sabotage.is_some() {
            // A successor on a busy machine is to have its time to do wrong.
            lingers += LINGER_MORE;
        }
        let until = Instant::now() + lingers;
        while Instant::now() < until {
            self.scene.load.push()?;
            if self.scene.load.used()? != used {
                self.scene.load.accuse("requests were completed while I/O of the dead process could still land".into());
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        drop(copy);
        Ok(())
    }

    /// A kill of the process that is being started.
    fn kill_successor(&mut self) -> Result<()> {
        let moment = Instant::now() + Duration::from_micros(self.dice.below(8000));
        while Instant::now() < moment {
            self.scene.load.turn()?;
        }
        let deadline = Instant::now() + AIM_MAX;
        while Instant::now() < deadline {
            let child = processes::children_named(std::process::id(), self.plan.program()).into_iter().next();
            let pid = child.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
            if let Some(process) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
                && !ended(&process, Duration::ZERO)
            {
                if self.scene.rig.status().pid.is_some() {
                    self.be_busy(&process)?;
                }
                return self.strike(&process, "start");
            }
            self.scene.load.turn()?;
        }
        Ok(())
    }

    /// Has the process die at a step, by itself.
    fn kill_at(&mut self, step: Step, depth: u64) -> Result<()> {
        let page = self.page.context("steps need a test build")?;
        let lost = self.scene.rig.lost();
        let process = self.scene.running()?;
        match step {
            Step::Handshake => {
                // Only a successor gets there.
                page.arm(step, depth);
                self.be_busy(&process)?;
                self.strike(&process, "first-of-two")?;
            }
            Step::Replay => {
                // There is something to replay when the first one dies with requests in its hand.
                page.arm(Step::Done, 1 + self.dice.below(12));
                self.await_death(page, Step::Done, lost)?;
                page.arm(step, depth);
            }
            Step::ConfigWrite | Step::Reset => {
                page.arm(step, depth);
                return self.die_of_message(page, step);
            }
            _ if self.dice.below(4) > 0 => self.arm_before_a_heap(page, &process, step, depth)?,
            _ => page.arm(step, depth),
        }
        self.await_death(page, step, lost)
    }

    /// Arms the step in front of a stopped process and a heap of requests: what it has not taken when it dies it could see,
    /// however quick it is beside the driver.
    fn arm_before_a_heap(&mut self, page: &Page, process: &OwnedFd, step: Step, depth: u64) -> Result<()> {
        self.scene.load.poll()?;
        let stopped = stop(process);
        self.scene.load.lengthen(true);
        self.scene.load.push()?;
        self.look(page);
        page.arm(step, depth);
        if stopped {
            let _ = pidfd_send_signal(process, Signal::CONT);
        }
        Ok(())
    }

    /// A successor serves, and has completed what its predecessor left.
    fn is_through(&self, lost: u64) -> bool {
        let status = self.scene.rig.status();
        status.lost > lost && status.state == DeviceState::Running && self.scene.load.stall().over().is_some()
    }

    /// Plays until a process dies at the step that it was told; `lost` backends were lost before.
    fn await_death(&mut self, page: &Page, step: Step, lost: u64) -> Result<()> {
        let deadline = Instant::now() + AIM_MAX;
        let mut died = self.look(page);
        while died.is_none() && Instant::now() < deadline && !self.is_over() {
            // The successor is through: it will not die there any more.
            if matches!(step, Step::Replay | Step::Handshake) && self.is_through(lost) {
                break;
            }
            // Seldom a wait: the death shall be seen before a successor has completed anything. But interrupts are only
            // asked for in a wait.
            died = if step == Step::Call { None } else { self.crowd(page)? };
            if died.is_none() {
                self.scene.load.push()?;
                died = self.look(page);
            }
            if died.is_none() {
                self.scene.load.turn()?;
                died = self.look(page);
            }
        }
        page.disarm();
        if died.is_some() {
            let now = Instant::now();
            let pending = self.pending_at_death(step)?;
            self.tally.kill(pending, step.name());
            self.scene.load.poll()?;
            if !matches!(step, Step::Replay | Step::Handshake) {
                self.scene.load.killed(now);
            }
        }
        Ok(())
    }

    /// Hands over requests one after the other as there is room, so that there is always one behind those under way.
    fn crowd(&mut self, page: &Page) -> Result<Option<Step>> {
        let moment = Instant::now() + CROWD;
        while Instant::now() < moment && self.look(page).is_none() {
            self.scene.load.push()?;
            // What it could see while it lived counts, even if it dies of that.
            if self.look(page).is_none() {
                self.scene.load.poll()?;
            }
        }
        Ok(self.look(page))
    }

    /// Whether the process has died at its step. What was issued before it was seen alive, it could see.
    fn look(&mut self, page: &Page) -> Option<Step> {
        let issued = self.scene.load.issued();
        let died = page.died_at();
        if died.is_none() {
            self.issued_alive = issued;
        }
        died
    }

    /// Requests that were unanswered when it died: what was issued since it was last seen alive does not count, unless the
    /// step says that it died with a request in its hand.
    fn pending_at_death(&mut self, step: Step) -> Result<u32> {
        let since = self.scene.load.issued().saturating_sub(self.issued_alive);
        let (pending, since) = (self.scene.load.pending()?, u32::try_from(since).unwrap_or(u32::MAX));
        let in_hand = match step {
            Step::Fetch | Step::Mark | Step::Submit | Step::Done | Step::Status | Step::UsedElement => 1,
            Step::Replay | Step::Flush => 1,
            Step::UsedIndex | Step::Counted | Step::Unmarked | Step::Call => 0,
            Step::Handshake | Step::Reset | Step::ConfigWrite => 0,
        };
        Ok(pending.saturating_sub(since).max(pending.min(in_hand)))
    }

    /// The guest resets the device, or writes its configuration, in the middle of its work, and it dies of that message.
    fn die_of_message(&mut self, page: &Page, step: Step) -> Result<()> {
        self.scene.load.turn()?;
        // Its threads find the message and the requests at the same moment, and those with the requests come second.
        let process = self.scene.running()?;
        stop(&process);
        scheduling::queues_last(self.scene.rig.status().pid.unwrap_or_default())?;
        self.scene.load.poll()?;
        self.scene.load.push()?;
        let answer = match step {
            Step::Reset => Some(self.scene.rig.begin_reset()?),
            _ => self.scene.load.write_config(&mut self.scene.rig),
        };
        let killed = Instant::now();
        std::thread::sleep(MESSAGE);
        let _ = pidfd_send_signal(&process, Signal::CONT);
        let deadline = Instant::now() + AIM_MAX;
        while page.died_at().is_none() && Instant::now() < deadline {
            std::hint::spin_loop();
        }
        page.disarm();
        let pending = self.scene.load.pending()?;
        let died = page.died_at().is_some();
        if !died {
            // Its queues would stand still on a busy machine.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
        answer.map_or(Ok(()), await_answer)?;
        if step == Step::Reset {
            self.scene.load.begin_anew(&mut self.scene.rig)?;
        } else {
            self.scene.load.killed(killed);
        }
        if died {
            self.tally.kill(pending, step.name());
        }
        Ok(())
    }

    /// Plays until all that was in flight at the last kill is completed.
    fn recover(&mut self, at_start: bool) -> Result<()> {
        let deadline = Instant::now() + RECOVER_MAX;
        loop {
            if let Some(stall) = self.scene.load.stall().over() {
                let stalls = if at_start { &mut self.tally.start_stalls } else { &mut self.tally.stalls };
                if !stall.is_zero() && !self.lingered {
                    stalls.push(stall);
                }
                return Ok(());
            }
            if Instant::now() > deadline {
                let waiting = self.scene.load.stall().waiting();
                self.hung(&format!("{waiting} requests were not completed after a kill"));
                return Ok(());
            }
            if self.is_over() {
                return Ok(());
            }
            self.scene.load.turn()?;
        }
    }
}
