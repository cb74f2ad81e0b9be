//! A card under load: two numbered streams, between the guest's rings and the host's end of a TAP.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_kit::driver::net::{HEADER_BYTES, NetGuest, NetOptions};
use atoll_kit::driver::queue::Woken;
use atoll_verify::net::packet::Socket;
use atoll_verify::net::{Promise, Talker};

use super::disk::REQUEST_MAX;
use super::load::{Findings, Load};
use super::rig::Rig;
use super::stall::StallWatch;
use super::tap::Tap;

/// Frames beyond what the other end has heard.
const WINDOW: u64 = 48;
/// How long the ends may take to hear each other's last word.
const CLOSE_MAX: Duration = Duration::from_secs(10);
const TRANSMIT: u16 = 1;

/// The guest and the host.
pub struct NetLoad {
    guest: NetGuest,
    talkers: [Talker; 2],
    wire: Socket,
    start: Instant,
    seed: u64,
    stashed: Option<Vec<u8>>,
    taken: u64,
    /// When the transmit ring moved last.
    moved: Instant,
    stall: StallWatch,
    stuck: bool,
    deaths: u64,
    findings: Findings,
    _tap: Arc<OwnedFd>,
}

fn options() -> NetOptions {
    NetOptions { size: 128, ..NetOptions::default() }
}

impl NetLoad {
    /// Guest memory that such a load needs, in bytes.
    pub const MEMORY: u64 = 32 << 20;

    /// Starts the streams of `seed`.
    pub fn start(rig: &mut Rig, seed: u64, tap: &Tap) -> Result<Self> {
        let mut guest = NetGuest::over(rig.start(options().driver())?, options());
        guest.fill_all()?;
        let talker = |me| Talker::new(seed, me, Talker::address(me), WINDOW);
        Ok(Self {
            guest,
            talkers: [talker(0), talker(1)],
            wire: Socket::open(tap.name())?,
            start: Instant::now(),
            seed,
            stashed: None,
            taken: 0,
            moved: Instant::now(),
            stall: StallWatch::default(),
            stuck: false,
            deaths: 0,
            findings: Findings::default(),
            _tap: tap.descriptor(),
        })
    }

    fn now_ms(&self) -> Result<u64> {
        Ok(u64::try_from(self.start.elapsed().as_millis())?)
    }

    /// Says what there is to say; whether there was anything.
    fn say(&mut self) -> Result<bool> {
        let now_ms = self.now_ms()?;
        let mut busy = false;
        let [guest, _] = &mut self.talkers;
        while let Some(frame) = self.stashed.take().or_else(|| guest.speak(now_ms)) {
            if !self.guest.add(0, &[0; HEADER_BYTES], &frame)? {
                self.stashed = Some(frame);
                break;
            }
            busy = true;
        }
        self.guest.publish(0)?;
        if self.stall.waiting() > 0 {
            // To make room the guest takes completions by itself.
            let heads = self.guest.queue(TRANSMIT)?.0.heads_in_flight();
            self.stall.keep(|(_, head)| heads.contains(head));
        }
        Ok(busy)
    }

    /// Says what there is to say and hears what has come; whether there was anything.
    fn step(&mut self) -> Result<bool> {
        let mut busy = self.say()?;
        let now_ms = self.now_ms()?;
        let [guest, host] = &mut self.talkers;
        let (queue, memory) = self.guest.queue(TRANSMIT)?;
        while let Some((head, _)) = queue.take(memory) {
            self.stall.completed((1, head));
            self.taken += 1;
            self.moved = Instant::now();
            busy = true;
        }
        if queue.outstanding() == 0 {
            self.moved = Instant::now();
        }
        // A frame too long for the guest's view of its ring ends the run: nothing of it can be believed.
        while let Some(received) = self.guest.poll(0)? {
            guest.listen(&received.frame, now_ms);
            busy = true;
        }
        while let Some(frame) = host.speak(now_ms) {
            self.wire.send(&frame)?;
            busy = true;
        }
        let mut frame = [0; 2048];
        while let Some(len) = self.wire.receive(&mut frame)? {
            host.listen(frame.get(..len).context("a frame fits")?, now_ms);
            busy = true;
        }
        Ok(busy)
    }

    fn wait(&mut self) -> Result<()> {
        let (queue, memory) = self.guest.queue(TRANSMIT)?;
        let waits = queue.outstanding() > 0;
        if waits && queue.wait_for_call(memory, Duration::from_millis(1))? == Woken::Uncalled {
            self.findings.uncalled += 1;
            self.findings.say("the transmit queue: completed, and nobody was interrupted");
        }
        if !waits {
            std::thread::sleep(Duration::from_micros(200));
        }
        if waits && self.moved.elapsed() > REQUEST_MAX && !std::mem::replace(&mut self.stuck, true) {
            let (queue, _) = self.guest.queue(TRANSMIT)?;
            self.findings.lost += u64::from(queue.outstanding());
            self.findings.say("the transmit queue stands still");
        }
        Ok(())
    }
}

impl Load for NetLoad {
    fn turn(&mut self) -> Result<()> {
        if self.step()? { Ok(()) } else { self.wait() }
    }
    fn push(&mut self) -> Result<()> {
        self.say().map(drop)
    }
    fn poll(&mut self) -> Result<()> {
        self.step().map(drop)
    }
    fn pending(&mut self) -> Result<u32> {
        let (queue, guest) = self.guest.queue(TRANSMIT)?;
        let transmit = super::requests::pending(queue.avail, queue.used_index(guest), guest);
        // The other way frames are on their way that the guest has not heard.
        let [guest, host] = &self.talkers;
        Ok(transmit + u32::try_from(host.sent().saturating_sub(guest.heard().up_to())).unwrap_or(u32::MAX))
    }
    fn used(&mut self) -> Result<u64> {
        let (queue, guest) = self.guest.queue(TRANSMIT)?;
        Ok(queue.used_index(guest).into())
    }
    fn completed(&self) -> u64 {
        self.taken
    }
    fn issued(&self) -> u64 {
        self.talkers.iter().map(Talker::sent).sum()
    }
    fn killed(&mut self, at: Instant) {
        self.deaths += 1;
        let heads = self.guest.queue(TRANSMIT).map(|(queue, _)| queue.heads_in_flight()).unwrap_or_default();
        self.stall.killed(at, heads.into_iter().map(|head| (1, head)));
    }
    fn stall(&self) -> &StallWatch {
        &self.stall
    }
    fn is_stuck(&self) -> bool {
        self.stuck
    }
    fn begin_anew(&mut self, rig: &mut Rig) -> Result<()> {
        self.deaths += 1;
        self.stall = StallWatch::default();
        self.guest = NetGuest::over(rig.start(options().driver())?, options());
        self.guest.fill_all()
    }
    fn is_broken(&mut self) -> Result<bool> {
        Ok(self.stuck || self.findings.broken() > 0 || self.talkers.iter().any(|talker| talker.heard().corrupted > 0))
    }
    fn accuse(&mut self, words: String) {
        self.findings.corrupted += 1;
        self.findings.say(words);
    }
    fn finish(mut self: Box<Self>) -> Result<Findings> {
        self.talkers.iter_mut().for_each(Talker::close);
        let deadline = Instant::now() + CLOSE_MAX;
        while !self.talkers.iter().all(Talker::is_done) && Instant::now() < deadline && !self.stuck {
            self.turn()?;
        }
        let drained = Instant::now() + CLOSE_MAX;
        while self.guest.queue(TRANSMIT)?.0.outstanding() > 0 && Instant::now() < drained {
            self.turn()?;
        }
        let mut findings = self.findings;
        findings.requests = self.taken;
        // What the kernel keeps for the host's end may be lost with its reader, too.
        let promise = Promise::with_deaths(self.deaths, 2 * WINDOW);
        let (mut lost, mut repeated) = (0, 0);
        for talker in self.talkers {
            let verdict = talker.verdict(&promise);
            let heard = &verdict.heard;
            (lost, repeated) = (lost + heard.lost, repeated + heard.repeated);
            findings.corrupted += heard.corrupted;
            if !verdict.ok && heard.corrupted == 0 {
                findings.stale += 1;
            }
            if !verdict.ok {
                findings.say(format!("seed {:#x}: {}", self.seed, verdict.json()));
            }
        }
        (findings.frames_lost, findings.frames_repeated) = (Some(lost), Some(repeated));
        Ok(findings)
    }
}
