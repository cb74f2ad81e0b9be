//! A source of entropy under load: buffers that must come back once, filled, and nothing beside them.

use atoll_kit::driver::{Guest, Queue};
use atoll_verify::blk::sector::{is_poison, poison};

use super::load::Findings;
use super::one_queue::Trade;
use super::requests::Completed;

/// Bytes of a buffer, and of what lies between two.
const BYTES: u64 = 2048;
const GUARD: u64 = 2048;

/// Buffers to be filled.
pub struct Filling {
    scratch: Vec<u8>,
}

impl Default for Filling {
    fn default() -> Self {
        Self { scratch: vec![0; (BYTES + GUARD) as usize] }
    }
}

impl Trade for Filling {
    const QUEUES: u16 = 1;
    const QUEUE: usize = 0;
    const SIZE: u16 = 256;
    const BYTES: u64 = BYTES + GUARD;

    fn ask(&mut self, queue: &mut Queue, guest: &Guest, at: u64, number: u64) -> Option<u16> {
        poison(&mut self.scratch, number);
        guest.write(at, &self.scratch);
        queue.add(guest, &[], &[(at, BYTES as u32)])
    }

    fn look(&mut self, guest: &Guest, at: u64, done: &Completed<u64>, findings: &mut Findings) {
        guest.read(at, &mut self.scratch);
        let (filled, rest) = self.scratch.split_at((done.written as usize).min(BYTES as usize));
        // Eight bytes of chance are the poison once in 2^64 buffers.
        let untouched = filled.as_chunks::<8>().0.iter().filter(|word| is_poison(&word[..], done.request)).count();
        if filled.is_empty() || untouched > 0 || !is_poison(&rest[filled.len().wrapping_neg() % 8..], done.request) {
            findings.corrupted += 1;
            findings.say(format!("buffer {}: {} bytes, {untouched} words untouched", done.request, done.written));
        }
    }
}
