//! Which processors the driver and a back end get.
//!
//! With one request in flight, what a request costs hangs on this more than on the back end. Two sides that share a
//! processor hand over to each other in a few microseconds; two that have one each wake each other by interrupts, at
//! ten times the price. Left alone, the scheduler changes from one to the other within a measurement, and not alike for
//! both back ends: the faster one does more of its requests in the dear placement, and looks dearer for it while it is
//! cheaper in each. So each placement is measured apart from the other, and the scheduler's choice beside them.

use std::io;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

/// Where the driver and the back end run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Where the scheduler puts them.
    Free,
    /// On a processor each.
    Apart,
    /// On one processor.
    Together,
}

impl Placement {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Free, Self::Apart, Self::Together];
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Free => "free",
            Self::Apart => "apart",
            Self::Together => "together",
        })
    }
}

/// The processors that this process may use.
#[derive(Debug)]
pub struct Processors {
    all: CpuSet,
    first: CpuSet,
    second: CpuSet,
}

impl Processors {
    /// To be asked before anything is placed.
    pub fn of_this_process() -> Result<Self> {
        let all = sched_getaffinity(None).context("the processors of this process")?;
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu));
        let mut next = || allowed.next().context("two processors are needed: the driver and a back end take one each");
        let (first, second) = (only(next()?), only(next()?));
        Ok(Self { all, first, second })
    }

    /// Places the calling thread, which drives, and all threads of the back end `pid`.
    pub fn place(&self, placement: Placement, pid: u32) -> Result<()> {
        self.place_others(placement, pid)?;
        self.place_driver(placement)
    }

    /// Places the calling thread.
    pub fn place_driver(&self, placement: Placement) -> Result<()> {
        let driver = if placement == Placement::Free { &self.all } else { &self.first };
        sched_setaffinity(None, driver).context("cannot place the driver")
    }

    /// Places all threads of `pid` where those that the driver drives belong.
    pub fn place_others(&self, placement: Placement, pid: u32) -> Result<()> {
        let backend = match placement {
            Placement::Free => &self.all,
            Placement::Apart => &self.second,
            Placement::Together => &self.first,
        };
        for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let name = entry?.file_name();
            let thread =
                name.to_str().and_then(|n| n.parse().ok()).and_then(Pid::from_raw).context("a thread's number")?;
            match sched_setaffinity(Some(thread), backend) {
                // A worker of the kernel keeps its place, and a thread may end meanwhile.
                Ok(()) | Err(Errno::INVAL | Errno::SRCH) => {}
                Err(e) => return Err(io::Error::from(e)).context("cannot place the back end"),
            }
        }
        Ok(())
    }
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}
