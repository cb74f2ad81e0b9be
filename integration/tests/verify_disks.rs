//! The verifier of disks finds what it is there for, and finds nothing where nothing is wrong.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::verify::device_process::DeviceProcess;
use atoll_integration::verify::faulty::{Fault, FaultyDisk, Medium};
use atoll_integration::verify::player::{Player, Style};
use atoll_verify::blk::workload::Mix;
use atoll_verify::blk::{Verdict, Violation, Workload};
use xtask::place;

/// Plays a load on a disk with a fault: through two deaths, and a loss of power if the fault is about that.
fn played(fault: Fault, seed: u64) -> Result<Verdict> {
    let style = Style { deadline: Duration::from_secs(3), ..Style::default() };
    let queues = usize::from(style.queues);
    let medium = Arc::new(Mutex::new(Medium::default()));
    let mut player = Player::new(Workload { sectors: 512, sectors_max: 16, ..Workload::new(seed) }, style)?;
    let mut again = Vec::new();
    for incarnation in 0..4 {
        let disk = FaultyDisk::start(player.driver(), queues, &medium, fault, seed + incarnation, again)?;
        let until = player.operations() + 1500;
        player.play(|player| player.operations() >= until)?;
        if incarnation == 3 || player.is_stuck() {
            let verdict = player.finish();
            drop(disk);
            return verdict;
        }
        again = disk.die()?;
        if incarnation == 1 {
            medium.lock().unwrap_or_else(PoisonError::into_inner).lose_power();
            player.power_lost()?;
            again = Vec::new();
        } else {
            player.died()?;
        }
    }
    unreachable!("the last incarnation returns")
}

#[test]
fn a_good_disk_passes() -> Result<()> {
    for seed in 1..=3 {
        let verdict = played(Fault::None, seed)?;
        ensure!(verdict.ok, "seed {seed}: {}", verdict.json());
        ensure!(verdict.counts.reads > 1000 && verdict.counts.deaths == 2 && verdict.counts.power_losses == 1);
    }
    Ok(())
}

/// `atoll-blk` itself, in memory and past the page cache, alive and killed. Past the page cache the player's odd segments
/// go through bounce buffers, many at a time: giving their memory back once ended the process, because the allocator then
/// opened a file, which the jail forbids.
#[test]
fn the_disk_process_passes() -> Result<()> {
    let memory = std::path::Path::new("/dev/shm");
    let plain = tempfile::tempdir_in(if memory.is_dir() { memory } else { std::path::Path::new("/tmp") })?;
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    for (folder, more) in [(&plain, None), (&disk, Some("--direct"))] {
        let image = folder.path().join("disk.img");
        std::fs::File::create(&image)?.set_len(1 << 20)?;
        let mut arguments = vec!["--path", image.to_str().context("a name")?, "--num-queues", "2"];
        arguments.extend(more);
        let mut process = DeviceProcess::start(&place::program("atoll-blk")?, folder.path(), &arguments)?;
        let mut player = Player::new(Workload { mix: Mix::FULL, ..Workload::new(51) }, Style::default())?;
        for death in 0..12 {
            player.connect(process.connect()?)?;
            let until = player.operations() + 150;
            player.play(|player| player.operations() >= until)?;
            if death < 11 {
                process.kill()?;
                player.died()?;
                process.restart()?;
            }
        }
        let verdict = player.finish()?;
        ensure!(verdict.ok && verdict.counts.deaths == 11, "{more:?}: {}", verdict.json());
    }
    Ok(())
}

#[test]
fn every_planted_fault_is_found_and_named() -> Result<()> {
    use Violation::{CompletedTwice, Corrupt, LateWrite, Lost, Misplaced, NeverCompleted, Stale, Torn, Unfilled};
    let cases: &[(Fault, &[Violation])] = &[
        (Fault::LosesFlush, &[Lost, Stale]),
        (Fault::CompletesTwice, &[CompletedTwice]),
        (Fault::AcknowledgesEarly, &[Lost, Stale]),
        (Fault::SwapsSectors, &[Misplaced]),
        (Fault::Misses, &[Misplaced]),
        (Fault::WritesLate, &[LateWrite]),
        (Fault::FetchesLate, &[Corrupt]),
        (Fault::Tears, &[Torn]),
        (Fault::Forgets, &[NeverCompleted]),
        (Fault::DoesNotFill, &[Unfilled]),
        (Fault::ReturnsOld, &[Stale, Lost]),
        (Fault::NoStatus, &[CompletedTwice]),
        (Fault::ForgetsAtDeath, &[Lost, Stale]),
        (Fault::FlipsBit, &[Torn]),
        (Fault::Overruns, &[LateWrite]),
    ];
    for (fault, expected) in cases {
        let verdict = played(*fault, 11)?;
        let found = expected.iter().any(|violation| verdict.count(*violation) > 0);
        ensure!(!verdict.ok && found, "{fault:?} should be {expected:?}: {}", verdict.json());
    }
    Ok(())
}
