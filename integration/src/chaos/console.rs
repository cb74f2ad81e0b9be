//! A console under load: numbered lines that the guest prints, and the file where they end up.
//!
//! Around a death of the process lines may be lost or repeated; none may be damaged, and each death may set the numbers
//! back once.

use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::Result;
use atoll_kit::driver::{Guest, Queue};

use super::load::Findings;
use super::one_queue::Trade;
use super::requests::Completed;

/// What a guest prints, and where it ends up.
pub struct Printing {
    output: PathBuf,
    /// Kills and resets: as often the numbers may go back.
    breaks: u64,
}

/// A line that says whether it is whole. Quickly made: the process that prints it is quick, and shall be found with a heap of
/// them.
fn line(number: u64) -> String {
    let filling = "abcdefghijklmnopqrstuvwxyz".get(..(number % 27) as usize).unwrap_or_default();
    let mut line = format!("{number:x} {filling}");
    let check = crc(line.as_bytes());
    let _ = writeln!(line, " {check:08x}");
    line
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

impl Printing {
    /// What the guest prints ends up in `output`.
    pub fn into(output: PathBuf) -> Self {
        Self { output, breaks: 0 }
    }
}

impl Trade for Printing {
    /// Receive and transmit queue of the port, and of control messages.
    const QUEUES: u16 = 4;
    const QUEUE: usize = 1;
    const SIZE: u16 = 128;
    const BYTES: u64 = 256;

    fn ask(&mut self, queue: &mut Queue, guest: &Guest, at: u64, number: u64) -> Option<u16> {
        let text = line(number);
        guest.write(at, text.as_bytes());
        queue.add(guest, &[(at, text.len() as u32)], &[])
    }

    fn look(&mut self, _guest: &Guest, _at: u64, _done: &Completed<u64>, _findings: &mut Findings) {}

    fn broke(&mut self) {
        self.breaks += 1;
    }

    fn judge(&mut self, made: u64, findings: &mut Findings) -> Result<()> {
        let file = File::open(&self.output)?;
        let mut text = vec![0; usize::try_from(file.metadata()?.len())?];
        file.read_exact_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text);
        let (mut last, mut back) = (None, 0);
        for line in text.lines() {
            let Some(number) = number(line) else {
                findings.torn += 1;
                findings.say(format!("a line that nobody printed: {line:?}"));
                continue;
            };
            if last.is_some_and(|last| number <= last) {
                back += 1;
            }
            last = Some(number);
        }
        if back > self.breaks {
            findings.stale += back - self.breaks;
            findings.say(format!("numbers went back {back} times over {} deaths", self.breaks));
        }
        let Some(last) = last else {
            findings.corrupted += 1;
            findings.say("nothing was printed");
            return Ok(());
        };
        // What was printed and taken after the last death is there.
        if last + 1 != made {
            findings.corrupted += 1;
            findings.say(format!("the last line is {last:#x}, printed were {made:#x}"));
        }
        Ok(())
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
