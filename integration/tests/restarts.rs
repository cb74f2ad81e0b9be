//! A backend that dies while nothing is asked of it costs nothing that stays; the full count is `cargo xtask soak restarts`.

use anyhow::{Context, Result, ensure};
use std::process::Command;
use xtask::place;

/// Fifty idle restarts: descriptors, sockets, threads, processes and memory are as before. In a program of its own, whose
/// descriptors and children are nobody else's. The last process is then left alone for longer than a pool keeps an idle thread: one
/// that had been started by such a thread would die with it.
#[test]
fn idle_restarts_leave_nothing_behind() -> Result<()> {
    let output =
        Command::new(place::program("restart-soak")?).args(["--count", "50", "--idle-seconds", "12"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let outcome: serde_json::Value = serde_json::from_str(said.lines().last().context("it says nothing")?)?;
    ensure!(output.status.success() && outcome["leaked"] == 0 && outcome["restarts"] == 50, "{outcome}");
    Ok(())
}
