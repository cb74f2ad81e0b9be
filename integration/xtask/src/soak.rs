//! Long counts that the test run has no time for; resumable, with seed and position in a state file.

use crate::{packages, place};
use anyhow::Result;
use std::process::Command;

/// Differential cases of the software CPU against its oracles.
pub fn cpu(arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["qemu-x86_64"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("cpu-oracle")?).args(arguments))
}
