//! A verified load in a real guest, whose disk processes die meanwhile: history over the serial port, judged outside.

use anyhow::{Result, ensure};

#[test]
fn a_guest_under_load_loses_nothing_when_its_disks_die() -> Result<()> {
    let verdict = xtask::verify::on_a_guest(&xtask::verify::Guests::default(), 21, 4, 400)?;
    ensure!(verdict.ok, "{}", verdict.json());
    ensure!(verdict.counts.reads > 50 && verdict.counts.deaths > 1, "too little happened: {}", verdict.json());
    Ok(())
}
