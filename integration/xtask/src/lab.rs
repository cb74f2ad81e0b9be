//! `cargo xtask lab`: stock guests on real KVM, in an emulated machine that has it; see `integration/lab`.

use crate::{packages, place, tied, verify};
use anyhow::{Context, Result};
use std::process::Command;

/// Where the verifier's program for guests is, among the programs.
pub const GUEST_VERIFIER: &str = "guest/atoll-verify";
/// The tests of the CPU seam with tiny guests, among the programs.
pub const TINY_GUESTS: &str = "tiny-guests";
/// The scenarios that are part of `cargo xtask test`.
pub const TESTED: &str = "test";

/// Programs of the host that the lab needs.
pub const PEERS: [&str; 3] = ["qemu-system-x86_64", "mkfs.ext4", "e2fsck"];

/// Whether the lab goes on, now that what it needs from elsewhere is `had`, or not. If not, and ATOLL_ALLOW_SKIP=1 says that this
/// is known, a JSON line on standard output says what was skipped and why.
///
/// # Errors
/// When something is missing, and that is not known.
pub fn goes_on(what: &str, had: Result<()>) -> Result<bool> {
    let Err(missing) = had else { return Ok(true) };
    if std::env::var_os("ATOLL_ALLOW_SKIP").is_none_or(|value| value != "1") {
        return Err(missing.context("no lab (set ATOLL_ALLOW_SKIP=1 to go on without)"));
    }
    println!("{}", serde_json::json!({ "lab": what, "skipped": format!("{missing:#}") }));
    Ok(false)
}

/// Builds what goes in, and runs scenarios; their reports go to standard output, one JSON object a line. Where something that
/// comes from elsewhere cannot be had, that is a failure, unless ATOLL_ALLOW_SKIP=1 says that it is known.
///
/// # Errors
/// When one is not well.
pub fn run(what: &str, arguments: &[String]) -> Result<()> {
    // Before minutes of building; the program looks for packages itself, because it knows which its scenarios need.
    if !goes_on(what, packages::ensure_peers(&PEERS))? {
        return Ok(());
    }
    place::build_programs()?;
    place::build_test("tiny_guests")?;
    let verifier = place::release().join(GUEST_VERIFIER);
    std::fs::create_dir_all(verifier.parent().context("it lies in a folder")?)?;
    std::fs::copy(verify::program()?, &verifier).with_context(|| format!("no {}", verifier.display()))?;
    let mut command = Command::new(place::program("lab")?);
    command.arg(what).args(arguments);
    // It ends its machines in order when it is told to; and it is told when this process ends.
    place::run(tied::to_this_thread(&mut command))
}
