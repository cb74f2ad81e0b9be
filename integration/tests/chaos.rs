//! Devices are killed at random and at every named step, and nobody notices; and what does wrong on purpose is found.

use anyhow::{Context, Result, ensure};
use atoll_kit::step::Sabotage;
use serde_json::Value;
use std::process::Command;
use xtask::place;

/// The campaign is a program of its own: it counts descriptors, threads and children, and moves to another network.
fn campaign(arguments: &[&str]) -> Result<Value> {
    let output = Command::new(place::program("chaos")?).args(arguments).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(serde_json::from_str(last)?)
}

#[test]
fn killed_devices_lose_nothing_and_complete_nothing_twice() -> Result<()> {
    for device in ["blk", "rng", "console", "net"] {
        let outcome = campaign(&["--device", device, "--kills", "40", "--seed", "4"])?;
        for zero in ["lost", "stale", "torn", "duplicated", "corrupted", "failed", "uncalled", "hung", "leaked"] {
            ensure!(outcome[zero] == 0, "{device}: {zero}: {outcome}");
        }
        ensure!(outcome["kills"].as_u64() >= Some(40), "{device}: {outcome}");
    }
    Ok(())
}

/// The policy as it is shipped, and the programs.
#[test]
fn the_shipped_programs_are_killed_too() -> Result<()> {
    let outcome = campaign(&["--device", "blk", "--kills", "40", "--seed", "5", "--shipped"])?;
    ensure!(outcome["ok"] == true, "{outcome}");
    Ok(())
}

#[test]
fn what_a_flush_covered_survives_the_loss_of_power() -> Result<()> {
    let outcome = campaign(&["--power-loss", "--kills", "20", "--seed", "6"])?;
    ensure!(outcome["ok"] == true && outcome["flushes"].as_u64() > Some(20), "{outcome}");
    Ok(())
}

#[test]
fn every_sabotage_is_caught() -> Result<()> {
    let outcome = campaign(&["--sabotage", "all", "--kills", "60", "--seed", "7"])?;
    let faults = outcome["faults"].as_array().context("faults")?;
    ensure!(faults.len() == Sabotage::ALL.len() && outcome["ok"] == true, "{outcome}");
    Ok(())
}
