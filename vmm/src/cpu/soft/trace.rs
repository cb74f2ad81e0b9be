//! A fingerprint of a deterministic run: the registers at each millionth retired instruction, and at the end.

use atoll_softcpu::Cpu;

/// Instructions between two samples.
const INTERVAL: u64 = 1_000_000;
/// FNV-1a: a published hash that is the same everywhere, which is all that is asked of it.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// The hash so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct TraceHash {
    hash: u64,
    sampled: u64,
}

impl TraceHash {
    pub(super) fn new() -> Self {
        Self { hash: FNV_OFFSET, sampled: 0 }
    }
    /// Instructions from `retired` to the next sample.
    pub(super) fn until_sample(retired: u64) -> u64 {
        INTERVAL - retired % INTERVAL
    }
    /// Takes a sample when it is time for one.
    pub(super) fn sample(&mut self, cpu: &Cpu) {
        let retired = cpu.retired();
        if retired.is_multiple_of(INTERVAL) && retired != self.sampled {
            self.sampled = retired;
            self.take(cpu);
        }
    }
    /// The hash with the present state in it.
    pub(super) fn finish(mut self, cpu: &Cpu) -> u64 {
        self.take(cpu);
        self.hash
    }
    fn take(&mut self, cpu: &Cpu) {
        let words = [cpu.regs.rip, cpu.regs.rflags].into_iter().chain(cpu.regs.gpr);
        for byte in words.flat_map(u64::to_le_bytes) {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
        }
    }
}
