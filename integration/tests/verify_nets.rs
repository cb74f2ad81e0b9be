//! A switch under the verifier: two streams over two of its ports, and what its deaths cost.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use atoll_integration::verify::device_process::DeviceProcess;
use atoll_integration::verify::talk::talk;
use xtask::place;

fn switch(folder: &Path) -> Result<DeviceProcess> {
    DeviceProcess::start(&place::program("atoll-net")?, folder, &["--switch", "--ports", "2"])
}

/// Alive, it loses nothing. Killed, it loses no more than was under way, and both streams go on.
#[test]
fn a_switch_loses_only_what_its_deaths_cost() -> Result<()> {
    for (kill_every_ms, least) in [(0, 0), (300, 2)] {
        let folder = tempfile::tempdir()?;
        let outcome = talk(&mut switch(folder.path())?, 31, Duration::from_secs(2), kill_every_ms)?;
        let json = serde_json::to_string(&outcome)?;
        ensure!(outcome.ok && outcome.deaths >= least, "{json}");
        ensure!(outcome.ends.iter().all(|end| end.heard.frames > 100), "too little was said: {json}");
    }
    Ok(())
}

/// Two guests with stock drivers, two cards, one switch.
#[test]
fn two_guests_hear_all_that_the_other_says() -> Result<()> {
    let verdicts = xtask::verify::on_two_guests(&xtask::verify::Guests::default(), 32, 3)?;
    let json = serde_json::to_string(&verdicts)?;
    ensure!(verdicts.iter().all(|verdict| verdict.ok && verdict.heard.frames > 100), "{json}");
    Ok(())
}
