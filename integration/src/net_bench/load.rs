//! The load: frames of one length, as many as get through.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_kit::driver::queue::WRITE;
use atoll_kit::driver::{Driver, Guest};

use super::backend::{Pair, QUEUE_SIZE};

/// Guest address of the frames, one slot for each entry of a queue.
const DATA: u64 = 4 << 20;
/// Bytes of a slot: a frame and its header fit in.
const SLOT: u64 = 2048;
const HEADER_BYTES: u32 = 12;
/// How long the driver looks for something new before it sleeps until it is called.
const LOOK: Duration = Duration::from_micros(50);

/// What one measurement gave.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Frames that arrived, per second.
    pub frames_per_second: f64,
    /// Processor time of the switch per frame, in nanoseconds.
    pub cpu_ns: f64,
    /// Processor time of the driver per frame, in nanoseconds.
    pub driver_ns: f64,
    /// Share of what was sent that did not arrive.
    pub lost: f64,
}

/// One queue of a driver, as a loop over slots that stay as they are.
struct Loop<'a> {
    driver: &'a mut Driver,
    index: usize,
    moved: u64,
}

impl Loop<'_> {
    /// Describes all slots, of which the device has none, and makes them available.
    fn fill(&mut self, bytes: u32, flags: u16) -> Result<()> {
        let (queue, guest) = self.driver.queue(self.index)?;
        for slot in 0..QUEUE_SIZE {
            queue.describe(guest, slot, DATA + SLOT * u64::from(slot), bytes, flags, 0);
            queue.add_head(guest, slot);
        }
        queue.publish(guest)
    }

    /// Takes what is done and, unless it is the end, makes it available again; how much it was.
    fn turn(&mut self, again: bool) -> Result<u64> {
        let (queue, guest) = self.driver.queue(self.index)?;
        let mut count = 0;
        while let Some((head, _)) = queue.take(guest) {
            if again {
                queue.add_head(guest, head);
            }
            count += 1;
        }
        if count > 0 && again {
            queue.publish(guest)?;
        }
        self.moved += count;
        Ok(count)
    }

    fn outstanding(&mut self) -> Result<u16> {
        Ok(self.driver.queue(self.index)?.0.outstanding())
    }
}

/// Writes a frame into each slot.
fn frames(guest: &Guest, bytes: u32) {
    for slot in 0..u64::from(QUEUE_SIZE) {
        let at = DATA + SLOT * slot;
        guest.write(at, &[0; HEADER_BYTES as usize]);
        let frame: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
        guest.write(at + u64::from(HEADER_BYTES), &frame);
        // To the receiver, which has sent before; a type that nobody knows.
        guest.write(at + u64::from(HEADER_BYTES), &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    }
}

/// Sends frames of `bytes` for about `ms` milliseconds.
pub fn measure(pair: &mut Pair, bytes: u32, ms: u64) -> Result<Sample> {
    frames(pair.sender.guest(), bytes);
    introduce(&mut pair.receiver)?;
    let before = pair.cpu_time()?;
    let (sent, arrived, elapsed, driver) = {
        let mut receive = Loop { driver: &mut pair.receiver, index: 0, moved: 0 };
        if !std::mem::replace(&mut pair.primed, true) {
            receive.fill(SLOT as u32, WRITE)?;
        }
        let mut send = Loop { driver: &mut pair.sender, index: 1, moved: 0 };
        send.fill(HEADER_BYTES + bytes, 0)?;
        let (start, driver_before) = (Instant::now(), thread_time());
        let end = start + Duration::from_millis(ms);
        let mut busy = start;
        loop {
            let moved = send.turn(true)? + receive.turn(true)?;
            let now = Instant::now();
            if now >= end {
                break;
            }
            if moved > 0 {
                busy = now;
            } else if now - busy > LOOK {
                let (queue, guest) = receive.driver.queue(0)?;
                queue.wait(guest, Duration::from_millis(1))?;
                ensure!(now - busy < Duration::from_secs(5), "nothing has come for five seconds");
            } else {
                std::hint::spin_loop();
            }
        }
        let (sent, arrived, elapsed) = (send.moved, receive.moved, start.elapsed());
        let driver = thread_time().saturating_sub(driver_before);
        // Let the sender's queue run empty; the receiver's buffers stay with the switch.
        let limit = Instant::now() + Duration::from_secs(5);
        while send.outstanding()? > 0 {
            ensure!(Instant::now() < limit, "frames are not taken");
            send.turn(false)?;
            receive.turn(true)?;
        }
        let quiet = Instant::now() + Duration::from_millis(5);
        while Instant::now() < quiet {
            receive.turn(true)?;
        }
        (sent, arrived, elapsed, driver)
    };
    let cpu = pair.cpu_time()? - before;
    ensure!(arrived > 0, "no frame has arrived");
    Ok(Sample {
        frames_per_second: arrived as f64 / elapsed.as_secs_f64(),
        cpu_ns: cpu.as_secs_f64() * 1e9 / arrived as f64,
        driver_ns: driver.as_secs_f64() * 1e9 / arrived as f64,
        lost: 1.0 - (arrived as f64 / sent.max(1) as f64).min(1.0),
    })
}

/// Processor time of this thread so far.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// The receiver sends a frame, so that a switch knows where it is.
fn introduce(receiver: &mut Driver) -> Result<()> {
    let (queue, guest) = receiver.queue(1)?;
    let at = DATA + SLOT * u64::from(QUEUE_SIZE);
    guest.write(at, &[0; HEADER_BYTES as usize]);
    let frame = [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5][..], &[0; 46]].concat();
    guest.write(at + u64::from(HEADER_BYTES), &frame);
    queue.add(guest, &[(at, HEADER_BYTES + frame.len() as u32)], &[]);
    queue.publish(guest)?;
    queue.take_within(guest, Duration::from_secs(5))?;
    Ok(())
}
