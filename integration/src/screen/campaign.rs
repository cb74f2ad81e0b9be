//! Kills of the processes of a screen while the guest paints and somebody types.
//!
//! A stock guest paints one picture after the other in an endless round; each pixel tells which picture it is of. What an operator
//! sees after a death must be made of these pictures only, it must be there soon, and it must go on. Of keys the guest prints
//! what it hears: pressed and let go in turn, none twice, and none stays down. The guest's kernel has nothing to say of its GPU.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_verify::dice::Dice;
use serde::Serialize;
use xtask::operated::Belongings;
use xtask::painting::{self, Painting};
use xtask::picture::Picture;
use xtask::viewer::Viewer;

use super::guest::{Screen, operator, screenshot};
use crate::chaos::stall::Spread;

/// What is painted: small, so that a picture is soon looked at.
const PAINTING: Painting = Painting { width: 640, height: 480, frames: 8 };
/// A picture must be back by then.
const PICTURE_MAX: Duration = Duration::from_millis(200);
/// What has not come by then does not come.
const HUNG: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_secs(60);
/// Letters that are typed: as VNC and as the guest's kernel know them.
const LETTERS: [(u32, u16); 4] = [(0x61, 30), (0x62, 48), (0x63, 46), (0x64, 32)];

/// Which process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Victim {
    /// `atoll-gpu`.
    Gpu,
    /// `atoll-display`.
    Display,
    /// An `atoll-input`, the keyboard's or the tablet's.
    Input,
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Display => "display",
            Self::Input => "input",
        }
    }
    fn program(self) -> &'static str {
        match self {
            Self::Gpu => "atoll-gpu",
            Self::Display => "atoll-display",
            Self::Input => "atoll-input",
        }
    }
}

/// What the campaign came to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// Always "process-death".
    pub chaos: &'static str,
    /// Every promise was kept.
    pub ok: bool,
    /// Which process was killed.
    pub device: &'static str,
    /// What the moments follow from.
    pub seed: u64,
    /// SIGKILLs.
    pub kills: u64,
    /// Those while the guest's command, an operator's question or a key was under way.
    pub kills_in_flight: u64,
    /// Requests that were never completed: the guest's rendering stands still.
    pub lost: u64,
    /// Old pictures that came back for good.
    pub stale: u64,
    /// Nobody can say: a guest's kernel copies what is painted while more is painted.
    pub torn: Option<u64>,
    /// Keys that were heard twice.
    pub duplicated: u64,
    /// Pictures with pixels of no picture.
    pub corrupted: u64,
    /// Kills after which nothing went on.
    pub hung: u64,
    /// Keys that stayed down; descriptors, threads and processes that were not there before.
    pub leaked: u64,
    /// Processes started beyond the first.
    pub restarts: u64,
    /// Kills after which it took longer than 200 ms.
    pub late: u64,
    /// From a kill until the picture was there and went on, or the next key was heard.
    pub stall_ms: Spread,
    /// Kills during negotiation are not aimed at here.
    pub stall_start_ms: Spread,
    /// Pictures that were looked at.
    pub pictures: u64,
    /// How long it took.
    pub seconds: f64,
    /// What went wrong, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<String>,
}

/// The campaign while it runs.
struct Campaign {
    screen: Screen,
    place: PathBuf,
    victim: Victim,
    dice: Dice,
    outcome: Outcome,
    stalls: Vec<Duration>,
    /// Keys that are down in the guest, as it says.
    down: BTreeSet<u16>,
    viewer: Option<Viewer>,
}

/// Kills `victim` so often; the moments follow from `seed`.
///
/// # Errors
/// The guest cannot be had, or the campaign itself breaks.
pub fn run(victim: Victim, kills: u64, seed: u64) -> Result<Outcome> {
    let begin = Instant::now();
    let folder = tempfile::tempdir()?;
    let place = folder.path().join("vnc");
    let screen = Screen::painted(PAINTING, &format!("vnc=unix:{}", place.display()))?;
    screen.shows(0)?;
    let outcome = Outcome { chaos: "process-death", device: victim.name(), seed, kills, ..Outcome::default() };
    let dice = Dice::new(seed);
    let mut campaign =
        Campaign { screen, place, victim, dice, outcome, stalls: Vec::new(), down: BTreeSet::new(), viewer: None };
    campaign.start()?;
    let before = Belongings::of(campaign.screen.machine.console.pid())?;
    for kill in 0..kills {
        let gone_on = match victim {
            Victim::Gpu | Victim::Display => campaign.kill_a_picture(),
            Victim::Input => campaign.kill_a_key(kill),
        };
        gone_on.with_context(|| format!("kill {kill}"))?;
    }
    campaign.finish(&before, begin)
}

impl Campaign {
    /// The guest paints without end, or tells what is typed.
    fn start(&mut self) -> Result<()> {
        if self.victim == Victim::Input {
            let keyboard = self.screen.input("keyboard")?;
            let console = self.screen.console();
            // Each event as twelve numbers on a line: the time, then type, code and value. The echo of what is typed has none.
            console.send(&format!("od -A n -t u2 -w24 -v {keyboard} &\n"))?;
        } else {
            let frames = (0..PAINTING.frames).map(|frame| frame.to_string()).collect::<Vec<_>>().join(" ");
            let paint = format!("(while :; do for F in {frames}; do cat /frame$F > /dev/fb0; done; done) &\n");
            self.screen.console().send(&paint)?;
        }
        self.screen.console().prompt(STEP)
    }

    /// A picture that is made of the guest's only.
    fn judged(&mut self, (size, pixels): &Picture) {
        let frames: Vec<u8> = (0..PAINTING.frames).collect();
        let bad = PAINTING.none_of(&frames, *size, pixels);
        self.outcome.pictures += 1;
        if bad > 0 {
            self.outcome.corrupted += 1;
            self.outcome.words.push(format!("{bad} pixels of no picture, of {}x{}", size.0, size.1));
        }
    }

    /// Something is under way for the process that is about to die.
    fn is_busy(&self) -> Result<bool> {
        let device = self.screen.device(self.victim.name())?;
        let queues = device["queues"].as_array().cloned().unwrap_or_default();
        Ok(queues.iter().any(|queue| queue["in_flight"].as_u64().is_some_and(|count| count > 0)))
    }

    fn kill_a_picture(&mut self) -> Result<()> {
        let mut client = operator(&self.screen.api)?;
        let before = screenshot(&mut client)?;
        self.judged(&before);
        std::thread::sleep(Duration::from_micros(self.dice.below(30_000)));
        if self.victim == Victim::Gpu {
            // The moment is chosen by what the guest does: in the middle of a command, when one is seen.
            let looked = Instant::now();
            while !self.is_busy()? && looked.elapsed() < Duration::from_millis(100) {}
            self.outcome.kills_in_flight += u64::from(looked.elapsed() < Duration::from_millis(100));
        }
        // An operator asks for pictures all the time, from another thread.
        let (api, begun) = (self.screen.api.clone(), Arc::new(AtomicBool::new(false)));
        let asked = Arc::clone(&begun);
        let asking = std::thread::spawn(move || {
            asked.store(true, Ordering::Relaxed);
            operator(&api).and_then(|mut client| screenshot(&mut client)).is_ok()
        });
        while !begun.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
        let (at, _) = self.screen.strike(self.victim.program())?;
        if self.victim == Victim::Display {
            self.outcome.kills_in_flight += u64::from(!asking.is_finished());
        }
        loop {
            if let Ok(picture) = operator(&self.screen.api).and_then(|mut client| screenshot(&mut client)) {
                self.judged(&picture);
                // What shows keeps the last picture; another one says that who draws is back.
                if self.victim == Victim::Display || picture != before {
                    break;
                }
            }
            if at.elapsed() > HUNG {
                self.outcome.hung += 1;
                self.outcome.words.push("no picture came any more".into());
                break;
            }
        }
        self.stalled(at.elapsed());
        let _ = asking.join();
        Ok(())
    }

    fn stalled(&mut self, stall: Duration) {
        self.outcome.late += u64::from(stall > PICTURE_MAX);
        self.stalls.push(stall);
    }

    /// Presses or lets go of a key; the viewer connects where it is not connected.
    fn key(&mut self, symbol: u32, down: bool) -> Result<()> {
        if self.viewer.is_none() {
            self.viewer = Some(Viewer::connect(&self.place, (PAINTING.width, PAINTING.height))?);
        }
        if let Some(viewer) = &mut self.viewer {
            viewer.key(symbol, down)?;
        }
        Ok(())
    }

    /// Hears what the guest says until a key is as wanted, at most `within`.
    fn hears(&mut self, wanted: (u16, bool), within: Duration) -> Result<bool> {
        let deadline = Instant::now() + within;
        while self.down.contains(&wanted.0) != wanted.1 {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.screen.console().expect("\n", left) else { return Ok(false) };
            let numbers: Vec<u16> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
            // EV_KEY is 1.
            let [.., 1, code, value, 0] = numbers[..] else { continue };
            if numbers.len() != 12 {
                continue;
            }
            let fresh = match value {
                1 => self.down.insert(code),
                0 => self.down.remove(&code),
                // The guest's own repetition.
                _ => true,
            };
            if !fresh {
                self.outcome.duplicated += 1;
                self.outcome.words.push(format!("key {code} was heard twice with {value}"));
            }
        }
        Ok(true)
    }

    /// The process dies between a key's going down and its coming up, or beside it.
    fn kill_a_key(&mut self, kill: u64) -> Result<()> {
        let (symbol, code) = LETTERS[kill as usize % LETTERS.len()];
        self.key(symbol, true)?;
        if self.dice.below(2) == 0 {
            ensure!(self.hears((code, true), HUNG)?, "a key is not heard");
        }
        std::thread::sleep(Duration::from_micros(self.dice.below(5_000)));
        let (at, _) = self.screen.strike(self.victim.program())?;
        self.outcome.kills_in_flight += 1;
        self.key(symbol, false)?;
        // The next letter comes through, whatever has become of this one.
        let (next, next_code) = LETTERS[(kill as usize + 1) % LETTERS.len()];
        let mut heard = false;
        while !heard && at.elapsed() < HUNG {
            self.key(next, true)?;
            heard = self.hears((next_code, true), Duration::from_millis(40))?;
            if !heard {
                self.key(next, false)?;
            }
        }
        if !heard {
            self.outcome.hung += 1;
            self.outcome.words.push("no key came any more".into());
        }
        self.stalled(at.elapsed());
        self.key(next, false)?;
        ensure!(self.hears((next_code, false), HUNG)?, "key {next_code} stays down");
        if !self.hears((code, false), STEP)? {
            self.outcome.leaked += 1;
            self.outcome.words.push(format!("key {code} stays down"));
        }
        Ok(())
    }

    fn finish(mut self, before: &Belongings, begin: Instant) -> Result<Outcome> {
        self.outcome.restarts = self.screen.restarts(self.victim.name())?;
        self.viewer = None;
        if self.victim != Victim::Input {
            // The last word of the guest is what is seen in the end.
            self.screen.console().send("kill $!; wait\n")?;
            self.screen.console().run("true", STEP)?;
            painting::paint(self.screen.console(), 3)?;
            if let Err(error) = self.screen.shows(3) {
                self.outcome.stale += 1;
                self.outcome.words.push(format!("{error:#}"));
            }
        }
        let settled = Instant::now();
        let leaked = loop {
            let now = Belongings::of(self.screen.machine.console.pid())?;
            let more = |now: usize, then: usize| now.saturating_sub(then) as u64;
            let leaked = more(now.descriptors, before.descriptors)
                + more(now.threads, before.threads)
                + more(now.children.len(), before.children.len());
            if leaked == 0 || settled.elapsed() > Duration::from_secs(5) {
                break leaked;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        self.outcome.leaked += leaked;
        if let Err(error) = self.screen.end() {
            self.outcome.lost += 1;
            self.outcome.words.push(format!("{error:#}"));
        }
        let mut outcome = self.outcome;
        outcome.stall_ms = Spread::of(&self.stalls);
        outcome.seconds = begin.elapsed().as_secs_f64();
        let Outcome { lost, stale, duplicated, corrupted, hung, leaked, late, .. } = outcome;
        outcome.ok = [lost, stale, duplicated, corrupted, hung, leaked, late].iter().all(|count| *count == 0);
        Ok(outcome)
    }
}
