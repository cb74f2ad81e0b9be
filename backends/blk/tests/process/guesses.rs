//! A guest's view of its disk while the device process dies under it.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::Driver;
use atoll_kit::driver::disk::{self, Kind};

use super::{DATA, pattern};

/// Bytes of a block.
pub(crate) const BLOCK: u32 = 16 << 10;

/// What a guest knows of its disk: for each block the seed of the last write that was acknowledged or may have
/// happened, and the requests that wait for an answer.
pub(crate) struct Guesses {
    blocks: u64,
    /// Bytes from the start of a block to that of the next.
    stride: u64,
    /// Some blocks are zeroed rather than written.
    pub(crate) zeroes: bool,
    pub(crate) seeds: HashMap<u64, Vec<u64>>,
    pub(crate) waiting: HashMap<u16, (Kind, u64, u64)>,
    next_seed: u64,
    pub(crate) completed: u64,
}

impl Guesses {
    pub(crate) fn new(blocks: u64, stride: u64) -> Self {
        let seeds = (0..blocks).map(|b| (b, vec![0])).collect();
        Self { blocks, stride, zeroes: false, seeds, waiting: HashMap::new(), next_seed: 1, completed: 0 }
    }

    pub(crate) fn content(seed: u64) -> Vec<u8> {
        if seed == 0 { vec![0; BLOCK as usize] } else { pattern(seed, BLOCK as usize) }
    }

    /// Fills the queue with reads and writes, never two on one block.
    pub(crate) fn submit(&mut self, driver: &mut Driver, salt: u64) -> Result<()> {
        let (queue, guest) = driver.queue(0)?;
        for step in 0..64 {
            let block = (salt * 37 + step * 11 + self.completed) % self.blocks;
            if self.waiting.values().any(|(_, b, _)| *b == block) {
                continue;
            }
            let Some(entry) = queue.next_head() else { break };
            let at = DATA + u64::from(entry) * u64::from(BLOCK);
            let kind = match step {
                step if step % 3 == 0 => Kind::In,
                step if self.zeroes && step % 5 == 1 => Kind::WriteZeroes,
                _ => Kind::Out,
            };
            let seed = if kind == Kind::Out { self.next_seed } else { 0 };
            let sector = block * self.stride / 512;
            let mut data = (at, BLOCK);
            match kind {
                Kind::Out => guest.write(at, &Self::content(seed)),
                Kind::WriteZeroes => {
                    guest.store(at, sector);
                    guest.store(at + 8, BLOCK / 512);
                    guest.store(at + 12, u32::from(step % 2 == 0));
                    data.1 = 16;
                }
                _ => {}
            }
            let named = if kind == Kind::WriteZeroes { 0 } else { sector };
            let Some(head) = disk::add(queue, guest, kind, named, &[data]) else { break };
            if kind != Kind::In {
                self.next_seed += 1;
                self.seeds.entry(block).or_default().push(seed);
            }
            ensure!(self.waiting.insert(head, (kind, block, seed)).is_none(), "head {head} was given out twice");
        }
        queue.publish(guest)
    }

    /// Takes what is finished and checks it; waits for at least one.
    pub(crate) fn collect(&mut self, driver: &mut Driver, timeout: Duration) -> Result<()> {
        let (queue, guest) = driver.queue(0)?;
        let mut done = Some(queue.take_within(guest, timeout)?);
        while let Some((head, _)) = done {
            let (kind, block, seed) = self.waiting.remove(&head).context("completed twice, or never asked for")?;
            ensure!(disk::status(queue, guest, head) == 0, "request {head} failed");
            let seeds = self.seeds.get_mut(&block).context("a block")?;
            if kind != Kind::In {
                *seeds = vec![seed];
            } else {
                let mut read = vec![0; BLOCK as usize];
                guest.read(DATA + u64::from(head) * u64::from(BLOCK), &mut read);
                ensure!(seeds.iter().any(|seed| read == Self::content(*seed)), "block {block} is not what was written");
            }
            self.completed += 1;
            done = queue.take(guest);
        }
        Ok(())
    }
}
