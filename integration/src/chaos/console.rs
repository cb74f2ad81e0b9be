//! A console under load: numbered lines that the guest prints, and the file where they end up.
//!
//! Around a death of the process lines may be lost or repeated; none may be damaged, and each death may set the numbers
//! back once.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use atoll_kit::driver::{Driver, Options};

use super::load::{Findings, Load};
use super::requests::{Requests, place};
use super::rig::Rig;
use super::stall::StallWatch;

const SIZE: u16 = 64;
const DEPTH: usize = 60;
/// Receive and transmit queue of the port, and of control messages.
const QUEUES: u16 = 4;
const TRANSMIT: usize = 1;
const BYTES: u64 = 256;

/// The guest.
pub struct ConsoleLoad {
    driver: Driver,
    requests: Requests<u64>,
    findings: Findings,
    next: u64,
    output: PathBuf,
    /// Kills and resets: as often the numbers may go back.
    breaks: u64,
}

fn options() -> Options {
    Options { queues: QUEUES, size: SIZE, memory: ConsoleLoad::MEMORY as usize, ..Options::default() }
}

/// A line that says whether it is whole.
fn line(number: u64) -> String {
    let filling = "abcdefghijklmnopqrstuvwxyz".repeat(8);
    let filling = filling.get(..(number % 150) as usize).unwrap_or_default();
    let body = format!("{number:x} {filling}");
    let check = crc(body.as_bytes());
    format!("{body} {check:08x}\n")
}

/// FNV-1a is enough: nobody forges lines here.
fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

fn number(line: &str) -> Option<u64> {
    let (body, check) = line.rsplit_once(' ')?;
    let (number, _) = body.split_once(' ')?;
    (u32::from_str_radix(check, 16).ok()? == crc(body.as_bytes())).then(|| u64::from_str_radix(number, 16).ok())?
}

impl ConsoleLoad {
    /// Guest memory that such a load needs, in bytes.
    pub const MEMORY: u64 = 16 << 20;

    /// Starts the load; what the guest prints ends up in `output`.
    pub fn start(rig: &mut Rig, output: &Path) -> Result<Self> {
        let driver = rig.start(options())?;
        let (requests, findings) = (Requests::new(TRANSMIT), Findings::default());
        Ok(Self { driver, requests, findings, next: 0, output: output.to_owned(), breaks: 0 })
    }

    fn print(&mut self) -> Result<bool> {
        let (queue, guest) = self.driver.queue(TRANSMIT)?;
        let Some(head) = queue.next_head() else { return Ok(false) };
        let (at, text) = (place(QUEUES, head, BYTES)?, line(self.next));
        guest.write(at, text.as_bytes());
        queue.add(guest, &[(at, text.len() as u32)], &[]).context("a free descriptor")?;
        self.requests.added(head, self.next, &mut self.findings);
        self.next += 1;
        Ok(true)
    }

    fn drain(&mut self) -> Result<()> {
        while !self.requests.is_empty() && !self.requests.is_stuck() {
            if !self.take()? {
                self.requests.wait(&mut self.driver, &mut self.findings)?;
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Result<bool> {
        let taken = self.requests.take(&mut self.driver, &mut self.findings)?.is_some();
        self.findings.requests += u64::from(taken);
        Ok(taken)
    }

    fn read_back(&mut self) -> Result<()> {
        let file = File::open(&self.output)?;
        let mut text = vec![0; usize::try_from(file.metadata()?.len())?];
        file.read_exact_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text);
        let (mut last, mut back) = (None, 0);
        for line in text.lines() {
            let Some(number) = number(line) else {
                self.findings.torn += 1;
                self.findings.say(format!("a line that nobody printed: {line:?}"));
                continue;
            };
            if last.is_some_and(|last| number <= last) {
                back += 1;
            }
            last = Some(number);
        }
        if back > self.breaks {
            self.findings.stale += back - self.breaks;
            self.findings.say(format!("numbers went back {back} times over {} deaths", self.breaks));
        }
        let Some(last) = last else {
            self.findings.corrupted += 1;
            self.findings.say("nothing was printed");
            return Ok(());
        };
        // What was printed and taken after the last death is there.
        if last + 1 != self.next {
            self.findings.corrupted += 1;
            self.findings.say(format!("the last line is {last:#x}, printed were {:#x}", self.next));
        }
        Ok(())
    }
}

impl Load for ConsoleLoad {
    fn push(&mut self) -> Result<()> {
        for _ in 0..self.requests.room(DEPTH, usize::from(SIZE)) {
            if !self.print()? {
                break;
            }
        }
        let (queue, guest) = self.driver.queue(TRANSMIT)?;
        queue.publish(guest)
    }
    fn turn(&mut self) -> Result<()> {
        self.push()?;
        let mut any = false;
        while self.take()? {
            any = true;
        }
        if any { Ok(()) } else { self.requests.wait(&mut self.driver, &mut self.findings) }
    }
    fn poll(&mut self) -> Result<()> {
        while self.take()? {}
        Ok(())
    }
    fn pending(&mut self) -> Result<u32> {
        self.requests.pending(&mut self.driver)
    }
    fn used(&mut self) -> Result<u64> {
        let (queue, guest) = self.driver.queue(TRANSMIT)?;
        Ok(queue.used_index(guest).into())
    }
    fn completed(&self) -> u64 {
        self.requests.completed()
    }
    fn issued(&self) -> u64 {
        self.requests.issued()
    }
    fn lengthen(&mut self, long: bool) {
        self.requests.lengthen(long);
    }
    fn killed(&mut self, at: Instant) {
        self.breaks += 1;
        self.requests.killed(at);
    }
    fn stall(&self) -> &StallWatch {
        self.requests.stall()
    }
    fn is_stuck(&self) -> bool {
        self.requests.is_stuck()
    }
    fn begin_anew(&mut self, rig: &mut Rig) -> Result<()> {
        self.breaks += 1;
        self.requests.forget();
        self.driver = rig.start(options())?;
        Ok(())
    }
    fn is_broken(&mut self) -> Result<bool> {
        self.drain()?;
        self.read_back()?;
        Ok(self.findings.broken() > 0)
    }
    fn accuse(&mut self, words: String) {
        self.findings.corrupted += 1;
        self.findings.say(words);
    }
    fn finish(mut self: Box<Self>) -> Result<Findings> {
        self.drain()?;
        self.read_back()?;
        Ok(self.findings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_whether_they_are_whole() {
        for value in [0, 1, 77, 4096] {
            let text = line(value);
            assert_eq!(number(text.trim_end()), Some(value));
            assert_eq!(number(text.get(1..).unwrap_or_default().trim_end()), None, "{text}");
        }
    }
}
