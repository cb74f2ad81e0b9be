//! `cargo xtask chaos`: the campaign of kills, on a test build of the device processes beside the shipped ones.

use std::process::Command;

use anyhow::Result;

use crate::place;

/// Builds what is needed and runs the campaign with these arguments; its failure is ours.
pub fn run(arguments: &[String]) -> Result<()> {
    place::build_programs()?;
    place::build_steps()?;
    place::run(Command::new(place::program("chaos")?).args(arguments))
}
