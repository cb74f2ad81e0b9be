//! Two ends talk over two ports of a switch, each with a card's rings in its hands, while the switch is killed and started
//! again.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_kit::driver::net::{HEADER_BYTES, NetGuest, NetOptions};
use atoll_verify::dice::{Dice, mix};
use atoll_verify::net::{Promise, TalkVerdict, Talker};
use serde::Serialize;

use super::device_process::DeviceProcess;

/// Frames beyond what the other end has heard: fewer than there are receive buffers, so that no card has a reason to lose
/// one.
const WINDOW: u64 = 48;
/// How long the ends may take to hear each other's last word.
const CLOSE_MAX: Duration = Duration::from_secs(10);

/// What came of a conversation.
#[derive(Debug, Serialize)]
pub struct Talk {
    /// Always "net".
    pub verify: &'static str,
    /// Both streams kept their promise, and no request is left in a ring.
    pub ok: bool,
    /// Reproduces the streams and the moments of death.
    pub seed: u64,
    /// How often the switch died.
    pub deaths: u64,
    /// Frames that were handed to a card and not taken at the end.
    pub in_flight: u16,
    /// What each end heard.
    pub ends: [TalkVerdict; 2],
}

struct End {
    guest: NetGuest,
    talker: Talker,
    /// A frame that found no room.
    stashed: Option<Vec<u8>>,
}

impl End {
    fn new(seed: u64, me: u8) -> Result<Self> {
        let talker = Talker::new(seed, me, Talker::address(me), WINDOW);
        Ok(Self { guest: NetGuest::new(NetOptions::default())?, talker, stashed: None })
    }

    /// Says what there is to say and hears what has come; true when there was anything.
    fn step(&mut self, now_ms: u64) -> Result<bool> {
        let mut busy = false;
        while let Some(frame) = self.stashed.take().or_else(|| self.talker.speak(now_ms)) {
            if !self.guest.add(0, &[0; HEADER_BYTES], &frame)? {
                self.stashed = Some(frame);
                break;
            }
            busy = true;
        }
        self.guest.publish(0)?;
        while let Some(received) = self.guest.poll(0)? {
            self.talker.listen(&received.frame, now_ms);
            busy = true;
        }
        Ok(busy)
    }
}

/// Talks for `length` over the switch, which is killed every `kill_every_ms` milliseconds on average; 0: never.
pub fn talk(switch: &mut DeviceProcess, seed: u64, length: Duration, kill_every_ms: u64) -> Result<Talk> {
    let mut ends = [End::new(seed, 0)?, End::new(seed, 1)?];
    for end in &mut ends {
        end.guest.driver.connect(switch.connect()?)?;
        end.guest.fill_all()?;
    }
    let mut dice = Dice::new(mix(seed, 0x6b69_6c6c));
    let start = Instant::now();
    let close = start + length;
    let mut death = || match kill_every_ms {
        0 => close,
        every => (Instant::now() + Duration::from_micros(dice.below(2000 * every))).min(close),
    };
    let (mut next, mut deaths) = (death(), 0);
    while !ends.iter().all(|end| end.talker.is_done()) && Instant::now() < close + CLOSE_MAX {
        if Instant::now() >= close {
            ends.iter_mut().for_each(|end| end.talker.close());
        } else if Instant::now() >= next {
            switch.kill()?;
            deaths += 1;
            switch.restart()?;
            for end in &mut ends {
                end.guest.driver.disconnect();
                end.guest.driver.connect(switch.connect()?)?;
            }
            next = death();
        }
        let now_ms = u64::try_from(start.elapsed().as_millis())?;
        let busy = ends.iter_mut().map(|end| end.step(now_ms)).collect::<Result<Vec<_>>>()?;
        if !busy.contains(&true) {
            let (queue, guest) = ends[0].guest.queue(0)?;
            queue.wait(guest, Duration::from_micros(500))?;
        }
    }
    let mut in_flight = 0;
    for end in &mut ends {
        // What cannot be sent within its time is left in the ring, and told.
        let _ = end.guest.sent(0);
        let (queue, _) = end.guest.queue(1)?;
        in_flight += queue.outstanding();
        let (base, avail) = (end.guest.driver.stop(1)?, end.guest.queue(1)?);
        ensure!(
            base == u32::from(avail.0.used_index(avail.1)),
            "the transmit ring stops at {base} with frames behind it"
        );
    }
    let promise = Promise::with_deaths(deaths, WINDOW);
    let ends = ends.map(|end| end.talker.verdict(&promise));
    let ok = in_flight == 0 && ends.iter().all(|end| end.ok);
    Ok(Talk { verify: "net", ok, seed, deaths, in_flight, ends })
}
