//! A guest that is stopped and let go, and one that starts again, in the middle of its work; the full counts are
//! `cargo xtask soak pauses` and `cargo xtask soak reboots`.

use anyhow::Result;
use xtask::lives;

/// The disk's contents and the guest's clock are right after each pause, and its log is clean. How long a pause may take is
/// judged by the soak alone: other tests run beside this one.
#[test]
fn pauses_are_not_noticed() -> Result<()> {
    let outcome = lives::pauses(20, 0x5eed, |_, _| {})?;
    assert!(outcome.judged.ok() && outcome.judged.frames() > 100, "{:?}", outcome.judged);
    assert!(outcome.clock_drift_us_max < lives::CLOCK_DRIFT_US_MAX, "{outcome:?}");
    Ok(())
}

/// By itself and by the operator: the same device processes serve it, nothing is left open.
#[test]
fn reboots_leave_nothing_behind() -> Result<()> {
    let outcome = lives::reboots(3, 0x5eed)?;
    assert_eq!(outcome.by_guest + outcome.by_operator, 3);
    // Two disks and a console; the cards are the switch's.
    assert_eq!(outcome.belongings.children.len(), 3);
    assert!(outcome.judged.ok() && outcome.judged.blk.counts.resets == 3, "{:?}", outcome.judged);
    Ok(())
}

/// The button reaches a stock kernel's driver, as often as it is pressed.
#[test]
fn the_power_button_reaches_the_guest() -> Result<()> {
    lives::power_button()
}

/// Twenty machines, one after the other, in one process.
#[test]
fn machines_leave_nothing_behind() -> Result<()> {
    lives::machines(20).map(drop)
}
