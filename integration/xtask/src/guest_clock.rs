//! The guest's wall clock beside the host's, read over the guest's console.

use crate::console::Console;
use anyhow::{Context, Result};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long the guest may take to answer.
const STEP: Duration = Duration::from_secs(60);

/// Between which two values the guest's wall clock was ahead of the host's, in microseconds: one reading, in the time
/// that it takes to ask.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    least: i64,
    most: i64,
}

impl Ahead {
    /// One reading.
    pub fn ask(console: &mut Console) -> Result<Self> {
        let now = || -> Result<i64> { Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?) };
        let before = now()?;
        // What `date` of busybox shows are whole seconds.
        let told = console.run("busybox adjtimex", STEP)?;
        let after = now()?;
        let field = |name: &str| -> Result<i64> {
            let value = told.lines().find_map(|line| line.trim().strip_prefix(name));
            Ok(value.with_context(|| format!("no {name} in '{told}'"))?.trim().parse()?)
        };
        let guest = field("time.tv_sec:")? * 1_000_000 + field("time.tv_usec:")?;
        Ok(Self { least: guest - after, most: guest - before })
    }

    /// The sharpest of a few readings.
    pub fn sharp(console: &mut Console) -> Result<Self> {
        let mut best = Self::ask(console)?;
        for _ in 0..8 {
            let next = Self::ask(console)?;
            if next.most - next.least < best.most - best.least {
                best = next;
            }
        }
        Ok(best)
    }

    /// By how much two readings must differ.
    pub fn apart(self, other: Self) -> Duration {
        let gap = (self.least - other.most).max(other.least - self.most).max(0);
        Duration::from_micros(gap.unsigned_abs())
    }

    /// By how much the guest's clock must be wrong.
    pub fn wrong(self) -> Duration {
        self.apart(Self { least: 0, most: 0 })
    }
}
