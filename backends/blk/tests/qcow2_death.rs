//! A process that serves a qcow2 image is killed under load: its successor finds a sound image in which everything is
//! that was acknowledged, and finishes what was in flight.

mod process;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::Kind;
use atoll_kit::driver::{Driver, Options};
use process::guesses::{BLOCK, Guesses};
use process::qemu_img::{check, contents, qemu_img};
use process::{DATA, Process, listen, listen_with, run};

const BLOCKS: u64 = 2048;

/// Most clusters that one death may leave counted and unused: those of one round of a queue.
const LEAKS_PER_KILL: u64 = 64;

struct Campaign<'a> {
    make: &'a [&'a [&'a str]],
    args: &'a [&'a str],
    base: bool,
    /// Bytes between blocks: each has a cluster of its own, and some a second-level table.
    stride: u64,
    kills: u64,
}

fn killed_many_times(folder: &Path, campaign: &Campaign<'_>) -> Result<()> {
    for args in campaign.make {
        qemu_img(folder, args)?;
    }
    let path = folder.join("disk");
    let mut all = vec!["--path", path.to_str().context("a path")?, "--image-type", "qcow2"];
    all.extend_from_slice(campaign.args);
    let start = || -> Result<Process> {
        let base = || -> Result<(&str, OwnedFd)> { Ok(("--backing-raw", File::open(folder.join("base"))?.into())) };
        let fds = campaign.base.then(base).transpose()?;
        listen_with(folder, &all, fds.as_slice())
    };
    let mut blk = start()?;
    let mut driver = Driver::new(Options { memory: 16 << 20, ..Options::default() })?;
    driver.connect(blk.connect()?)?;
    let mut guesses = Guesses::new(BLOCKS, campaign.stride);
    guesses.zeroes = true;
    let (mut in_flight, mut leaks) = (0, 0);
    for round in 0..campaign.kills {
        let enough = guesses.completed + round * 13 % 90;
        loop {
            guesses.submit(&mut driver, round)?;
            if guesses.completed >= enough {
                break;
            }
            guesses.collect(&mut driver, Duration::from_secs(20))?;
        }
        let pause = Instant::now() + Duration::from_micros(round * 37 % 700);
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        drop(blk);
        in_flight += u64::from(!guesses.waiting.is_empty());
        // What the successor will find, once the last I/O of the dead has landed: qemu-img minds no lock.
        if round % 2 == 0 {
            let now = check(folder, "disk").with_context(|| format!("after kill {round}"))?;
            ensure!(now <= leaks + 2 * LEAKS_PER_KILL, "kill {round}: {leaks} leaks before, now {now}");
            leaks = now;
        }
        blk = start()?;
        driver.connect(blk.connect()?)?;
    }
    while !guesses.waiting.is_empty() {
        guesses.collect(&mut driver, Duration::from_secs(20))?;
    }
    ensure!(in_flight * 10 >= campaign.kills * 8, "only {in_flight} of {} kills met a request", campaign.kills);
    driver.stop(0)?;
    drop(blk);
    let leaks = check(folder, "disk")?;
    let on_disk = contents(folder, "disk")?;
    for (block, seeds) in &guesses.seeds {
        let at = (*block * campaign.stride) as usize;
        let is = on_disk.get(at..at + BLOCK as usize).context("inside")?;
        ensure!(seeds.len() == 1 && is == Guesses::content(seeds[0]), "block {block} lost an acknowledged write");
    }
    // Leaks are given back by what the README says.
    qemu_img(folder, &["check", "-r", "leaks", "disk"])?;
    ensure!(check(folder, "disk")? == 0 && contents(folder, "disk")? == on_disk, "repaired {leaks} leaks");
    Ok(())
}

const PLAIN: Campaign<'_> = Campaign {
    make: &[&["create", "-f", "qcow2", "disk", "1G"]],
    args: &[],
    base: false,
    stride: 256 << 10,
    kills: 80,
};

#[test]
fn nothing_acknowledged_is_lost_in_memory() -> Result<()> {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return Ok(()) };
    killed_many_times(folder.path(), &PLAIN)?;
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let make: &[&[&str]] = &[
        &["create", "-f", "raw", "base", "1G"],
        &["create", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "raw", "disk"],
    ];
    killed_many_times(folder.path(), &Campaign { make, base: true, ..PLAIN })
}

#[test]
fn nothing_acknowledged_is_lost_on_a_disk() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    killed_many_times(folder.path(), &Campaign { kills: 20, ..PLAIN })?;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    killed_many_times(folder.path(), &Campaign { kills: 20, args: &["--direct"], ..PLAIN })
}

/// The image must not grow beyond a limit (as on a full disk): writes that need room fail, all others go on, and those
/// that failed succeed once there is room.
#[test]
fn a_full_disk_fails_requests_and_nothing_else() -> Result<()> {
    for place in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
        let Ok(folder) = tempfile::tempdir_in(place) else { continue };
        let folder = folder.path();
        qemu_img(folder, &["create", "-f", "qcow2", "disk", "64M"])?;
        let path = folder.join("disk");
        let mut blk = listen(folder, &["--path", path.to_str().context("a path")?, "--image-type", "qcow2"])?;
        let mut driver = blk.driver(Options { memory: 32 << 20, ..Options::default() })?;
        let write = |driver: &mut Driver, cluster: u64, byte: u8| -> Result<u8> {
            driver.guest().write(DATA, &vec![byte; 64 << 10]);
            Ok(run(driver, Kind::Out, cluster * 128, &[(DATA, 64 << 10)])?.0)
        };
        for cluster in 0..8 {
            ensure!(write(&mut driver, cluster, 1)? == 0, "with room");
        }
        let limit = |bytes: Option<u64>| {
            let pid = rustix::process::Pid::from_raw(blk.child.id().cast_signed());
            let limit = rustix::process::Rlimit { current: bytes, maximum: None };
            rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit)
        };
        limit(Some(std::fs::metadata(&path)?.len() + 3 * 65536))?;
        let failed: Vec<u64> =
            (8..24).filter(|cluster| write(&mut driver, *cluster, 2).is_ok_and(|status| status == 1)).collect();
        ensure!((10..16).contains(&failed.len()), "{failed:?}");
        ensure!(write(&mut driver, 3, 3)? == 0, "what is allocated can be written");
        ensure!(run(&mut driver, Kind::Flush, 0, &[])?.0 == 0, "a flush finds nothing amiss");
        limit(None)?;
        for cluster in &failed {
            ensure!(write(&mut driver, *cluster, 4)? == 0, "with room again");
        }
        driver.stop(0)?;
        drop(blk);
        check(folder, "disk")?;
        let is = contents(folder, "disk")?;
        for cluster in 0..24 {
            let byte = match cluster {
                3 => 3,
                0..8 => 1,
                cluster if failed.contains(&cluster) => 4,
                _ => 2,
            };
            let at = cluster as usize * 65536;
            ensure!(is[at..at + 65536].iter().all(|is| *is == byte), "cluster {cluster}");
        }
    }
    Ok(())
}
