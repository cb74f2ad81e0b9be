//! `cargo xtask lab`: stock guests on real KVM, in an emulated machine that has it; see `integration/lab`.

use crate::{packages, place};
use anyhow::Result;
use std::process::Command;

/// Builds what goes in, and runs scenarios; their reports go to standard output, one JSON object a line.
///
/// # Errors
/// When one is not well.
pub fn run(what: &str, arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["qemu-system-x86_64", "mkfs.ext4", "e2fsck"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("lab")?).arg(what).args(arguments))
}
