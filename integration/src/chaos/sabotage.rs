//! Does the campaign find what it is there to find? Test builds that do wrong on purpose, one fault at a time.

use std::path::Path;

use anyhow::Result;
use atoll_kit::step::{Sabotage, word};
use atoll_vmm::config::Isolation;
use serde::Serialize;

use super::campaign::Campaign;
use super::page::Page;
use super::power;
use super::scene::{Class, Image, Plan};

/// What became of one fault.
#[derive(Debug, Clone, Serialize)]
pub struct Caught {
    /// The fault.
    pub sabotage: &'static str,
    /// The class that committed it.
    pub device: String,
    /// The campaign has found it.
    pub caught: bool,
    /// Kills, or losses of power, until it was found.
    pub kills: u64,
    /// How often it was committed until then.
    pub strikes: u64,
    /// What was found.
    pub found: Vec<String>,
}

/// The class in which a fault can be seen, and how often it is committed. The order in which requests are carried out
/// again is nobody's business on a disk, whose requests have no order; on a console they do. On qcow2 a write is
/// acknowledged too early when its mapping is only in memory: no longer than until the next one is settled.
fn stage(sabotage: Sabotage, image: Image) -> (Class, u64) {
    match sabotage {
        Sabotage::ReplayOutOfOrder => (Class::Console, 1),
        Sabotage::ReplayElsewhere | Sabotage::SkipFence | Sabotage::ForgetCall => (Class::Blk, 1),
        Sabotage::LoseFlush | Sabotage::WriteLate => (Class::Blk, 1),
        Sabotage::AcknowledgeFirst if image == Image::Qcow2 => (Class::Blk, 1),
        Sabotage::CompleteTwice | Sabotage::AcknowledgeFirst | Sabotage::SwapSectors => (Class::Blk, 500),
    }
}

/// The faults that an NVMe controller can commit, and how often.
fn stage_of_nvme(sabotage: Sabotage) -> Option<u64> {
    match sabotage {
        Sabotage::CompleteTwice | Sabotage::AcknowledgeFirst | Sabotage::SwapSectors => Some(500),
        Sabotage::ReplayElsewhere | Sabotage::SkipFence | Sabotage::ForgetCall => Some(1),
        Sabotage::LoseFlush | Sabotage::ReplayOutOfOrder | Sabotage::WriteLate => None,
    }
}

/// Whether a device of this class can commit a fault; the others are committed where they can be seen.
pub fn is_committed_by(sabotage: Sabotage, class: Class) -> bool {
    class != Class::Nvme || stage_of_nvme(sabotage).is_some()
}

/// Lets one fault loose, for at most `kills` kills.
pub fn commit(
    sabotage: Sabotage,
    programs: &Path,
    device: Class,
    image: Image,
    kills: u64,
    seed: u64,
) -> Result<Caught> {
    let (class, period) = match stage_of_nvme(sabotage).filter(|_| device == Class::Nvme) {
        Some(period) => (device, period),
        None => stage(sabotage, image),
    };
    let fault = Some((sabotage, period));
    let plan =
        Plan { class, kills, seed, image, direct: false, isolation: Isolation::Shared, folder: None, sabotage: fault };
    let device = plan.name();
    let (page, kills, words, broken);
    if sabotage == Sabotage::LoseFlush {
        page = power::page(programs, image)?;
        page.sabotage(sabotage, period);
        let outcome = power::campaign(&page, image, plan.kills, seed)?;
        (kills, broken, words) = (outcome.losses, !outcome.ok, outcome.words);
    } else {
        page = Page::new(programs, None)?;
        let outcome = Campaign::new(&plan, Some(&page), programs)?.run()?;
        let found = outcome.lost + outcome.stale + outcome.torn + outcome.duplicated + outcome.corrupted;
        broken = found + outcome.failed + outcome.uncalled + outcome.hung > 0;
        (kills, words) = (outcome.kills, outcome.words);
    }
    let found = words.into_iter().take(2).collect();
    let strikes = page.get(word::STRIKES);
    Ok(Caught { sabotage: sabotage.name(), device, caught: broken && strikes > 0, kills, strikes, found })
}
