//! The floor: two threads that hand frames over through a ring of slots, copying each in and out.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::load::Sample;

const SLOTS: usize = 256;
const SLOT_WORDS: usize = 256;

/// A counter on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Index(AtomicU64);

/// Copies frames of `bytes` for about `ms` milliseconds.
pub fn measure(bytes: u32, ms: u64) -> Result<Sample> {
    let words = (bytes as usize).div_ceil(8);
    let ring: Vec<AtomicU64> = (0..SLOTS * SLOT_WORDS).map(|_| AtomicU64::new(0)).collect();
    let (put, taken, stop) = (Index::default(), Index::default(), AtomicBool::new(false));
    let slot = |number: u64| {
        let start = (number as usize % SLOTS) * SLOT_WORDS;
        ring.get(start..start + words).unwrap_or_default()
    };
    let (frames, elapsed) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let frame = vec![0x55_u64; words];
            let mut next = 0;
            while !stop.load(Ordering::Relaxed) {
                if next - taken.0.load(Ordering::Acquire) >= SLOTS as u64 {
                    std::hint::spin_loop();
                    continue;
                }
                slot(next).iter().zip(&frame).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
                next += 1;
                put.0.store(next, Ordering::Release);
            }
        });
        let mut frame = vec![0_u64; words];
        let (mut next, start) = (0, Instant::now());
        let end = Duration::from_millis(ms);
        while start.elapsed() < end {
            for _ in 0..SLOTS {
                if next == put.0.load(Ordering::Acquire) {
                    break;
                }
                slot(next).iter().zip(&mut frame).for_each(|(from, to)| *to = from.load(Ordering::Relaxed));
                std::hint::black_box(&frame);
                next += 1;
                taken.0.store(next, Ordering::Release);
            }
        }
        stop.store(true, Ordering::Relaxed);
        (next, start.elapsed())
    });
    let frames_per_second = frames as f64 / elapsed.as_secs_f64();
    let ns = 1e9 / frames_per_second;
    Ok(Sample { frames_per_second, cpu_ns: ns, driver_ns: ns, lost: 0.0 })
}
