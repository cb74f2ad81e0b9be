//! The software CPU beside an emulator of x86-64 programs, which runs the case runner `cpu-oracle --answer`.

use anyhow::Context;
use atoll_softcpu::oracle::{self, Family, Mismatch};
use std::io::BufReader;
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Name of QEMU's emulator of programs, with Debian's package for who lacks it.
pub const PROGRAM: &str = "qemu-x86_64";

/// An emulator and what it runs.
#[derive(Clone, Copy, Debug)]
pub struct Emulator<'a> {
    /// The emulator: a path, or a name to be looked up.
    pub program: &'a Path,
    /// The program `cpu-oracle`.
    pub runner: &'a Path,
}

/// Ends the process with its owner.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended already; either way it is reaped here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Emulator<'_> {
    /// Compares `range` of a family; `found` hears of mismatches and says whether to go on. Returns how many cases were
    /// compared: those that fault on neither side.
    pub fn compare(
        &self,
        seed: u64,
        family: Family,
        range: Range<u64>,
        found: impl FnMut(Mismatch) -> bool,
    ) -> anyhow::Result<u64> {
        let mut child = Guard(
            Command::new(self.program)
                // Everything that the CPU models offer and more.
                .args(["-cpu", "max"])
                .arg(self.runner)
                .args(["--answer", "--family", family.name(), "--seed", &seed.to_string()])
                .args(["--from", &range.start.to_string(), "--cases", &(range.end - range.start).to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| {
                    format!("cannot run {}: install QEMU's user emulation (Debian: qemu-user)", self.program.display())
                })?,
        );
        let mut answers =
            BufReader::with_capacity(1 << 16, child.0.stdout.take().context("no pipe from the emulator")?);
        Ok(oracle::judge(seed, family, range, &mut answers, found)?)
    }
}
