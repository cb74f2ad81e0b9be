//! Devices are killed at random and at every named step, and nobody notices; and what does wrong on purpose is found.

use anyhow::{Context, Result, ensure};
use atoll_integration::chaos::disk::DiskLoad;
use atoll_integration::chaos::load::Load;
use atoll_integration::chaos::rig::House;
use atoll_kit::step::Sabotage;
use atoll_vmm::config::DeviceConfig;
use atoll_vmm::vhost::Fault;
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
    for device in ["blk", "nvme", "rng", "console", "net"] {
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
    for zero in ["lost", "stale", "torn", "duplicated", "corrupted", "failed", "uncalled", "hung", "leaked"] {
        ensure!(outcome[zero] == 0, "{zero}: {outcome}");
    }
    // Four of five is for a campaign of hundreds: in so few, chance has its part.
    ensure!(outcome["kills_in_flight"].as_u64() >= Some(20), "{outcome}");
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

/// What an operator's `atoll fault` does to a disk under load: it goes on, and nothing is lost.
#[test]
fn a_disk_survives_what_may_happen_to_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    std::fs::File::create(&image)?.set_len(DiskLoad::IMAGE)?;
    let house = House::new(&place::release())?;
    let mut rig = house.device(&DeviceConfig::Disk(DiskLoad::config(&image)), DiskLoad::MEMORY)?;
    let mut load = DiskLoad::start(&mut rig, 8, 1)?;
    let go_on = |load: &mut DiskLoad| -> Result<()> {
        let until = load.completed() + 300;
        while load.completed() < until && !load.is_stuck() {
            load.turn()?;
        }
        Ok(())
    };
    go_on(&mut load)?;
    for (seed, fault) in [Fault::Kill, Fault::Stop, Fault::Disconnect, Fault::Garbage].into_iter().enumerate() {
        let lost = rig.lost();
        rig.device()?.inject(fault, seed as u64).with_context(|| fault.name())?;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while fault != Fault::Stop && rig.lost() == lost {
            ensure!(std::time::Instant::now() < deadline, "{}: nobody notices", fault.name());
            load.turn()?;
        }
        go_on(&mut load)?;
    }
    let findings = Box::new(load).finish()?;
    ensure!(findings.broken() == 0, "{findings:?}");
    Ok(())
}
