//! Loss of power: a claim of its own, and never mixed with the death of a process. What a flush covered is there
//! afterwards.
//!
//! The test build keeps a second image beside the first: what the file held when its last finished flush began. A loss of
//! power is then the worst that can happen: the process is killed, guest and memory are gone, and the disk comes back with
//! that second image. Everything that was not covered by a flush is lost, which is allowed; what was covered must be there.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use atoll_kit::step::word;
use atoll_verify::dice::{Dice, mix};
use atoll_vmm::config::{DeviceConfig, DiskConfig};
use serde::Serialize;

use super::disk::DiskLoad;
use super::load::Load;
use super::page::Page;
use super::rig::House;
use super::scene::{Image, disk, make_image};

/// What losses of power came to.
#[derive(Debug, Clone, Serialize)]
pub struct Losses {
    /// Always "power-loss".
    pub chaos: &'static str,
    /// What a flush covered was there each time.
    pub ok: bool,
    /// `raw` or `qcow2`; the latter is checked by `qemu-img check` after each loss.
    pub image: &'static str,
    /// Reproduces the load.
    pub seed: u64,
    /// Losses of power.
    pub losses: u64,
    /// Flushes that ended before them.
    pub flushes: u64,
    /// Requests that were completed.
    pub requests: u64,
    /// Old contents, or new ones that went though a flush covered them.
    pub stale: u64,
    /// Contents of two requests in one piece.
    pub torn: u64,
    /// Other bad contents.
    pub corrupted: u64,
    /// Anything else that broke.
    pub broken: u64,
    /// In words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<String>,
}

/// Room for a durable image that is qcow2: its tables, and clusters that are left behind.
const QCOW2_MAX: u64 = 8 << 20;

/// A test build that keeps a durable image.
pub fn page(programs: &Path, image: Image) -> Result<Page> {
    Page::new(programs, Some(if image == Image::Raw { DiskLoad::IMAGE } else { QCOW2_MAX }))
}

/// A disk that loses its power `losses` times.
pub fn campaign(page: &Page, kind: Image, losses: u64, seed: u64) -> Result<Losses> {
    let folder = tempfile::tempdir_in(super::scene::memory())?;
    let image = folder.path().join("image");
    make_image(kind, &image)?;
    let new = std::fs::read(&image)?;
    let house = House::new(page.programs())?;
    let config = DeviceConfig::Disk(DiskConfig { queue_size: Some(DiskLoad::QUEUE_SIZE), ..disk(kind, &image) });
    let mut words = Vec::new();
    let mut rig = house.device(&config, DiskLoad::MEMORY)?;
    let mut load = DiskLoad::start(&mut rig, seed, 1)?;
    let mut dice = Dice::new(mix(seed, 0x706f_7765));
    let mut lost = 0;
    while lost < losses && !load.is_stuck() {
        let until = load.completed() + 20 + dice.below(400);
        while load.completed() < until && !load.is_stuck() {
            load.turn()?;
        }
        load.push()?;
        // Whoever takes the power takes it from all.
        drop(rig);
        lost += 1;
        let durable = std::fs::read(page.durable())?;
        let bytes = usize::try_from(page.get(word::DURABLE_BYTES))?;
        ensure!(bytes <= durable.len(), "the durable image is longer than its file");
        ensure!((bytes as u64) < QCOW2_MAX, "a durable image that does not fit its file");
        // Before the first flush the disk was new; what a raw one has no word of is zero.
        let left = durable.get(..bytes).filter(|left| !left.is_empty()).unwrap_or(&new);
        std::fs::write(&image, left)?;
        if kind == Image::Raw {
            std::fs::File::options().write(true).open(&image)?.set_len(DiskLoad::IMAGE)?;
        } else {
            check_image(&image, &mut words)?;
        }
        rig = house.device(&config, DiskLoad::MEMORY)?;
        load.lose_power(&mut rig)?;
        if load.is_broken()? {
            break;
        }
    }
    let findings = Box::new(load).finish()?;
    drop(rig);
    Ok(Losses {
        chaos: "power-loss",
        ok: findings.broken() == 0 && words.is_empty(),
        image: kind.name(),
        seed,
        losses: lost,
        flushes: page.get(word::FLUSHES),
        requests: findings.requests,
        stale: findings.stale,
        torn: findings.torn,
        corrupted: findings.corrupted,
        broken: findings.broken(),
        words: [words, findings.words].concat(),
    })
}

/// Has `qemu-img` check an image; what it finds goes into `words`.
pub fn check_image(image: &Path, words: &mut Vec<String>) -> Result<()> {
    let output = Command::new("qemu-img").arg("check").arg(image).output().context("qemu-img is not installed")?;
    // 3: clusters that are counted and not used, which a kill may leave.
    if !matches!(output.status.code(), Some(0 | 3)) {
        words.push(format!("qemu-img check: {}", String::from_utf8_lossy(&output.stdout).trim()));
    }
    Ok(())
}
