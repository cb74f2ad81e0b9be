//! One build in the place of another under load, and builds that will not do: the guest notices neither.

use anyhow::{Context, Result, ensure};
use atoll_integration::chaos::scene::{Class, Image, Plan};
use atoll_integration::chaos::upgrades::Builds;
use atoll_kit::bad_build::Bad;
use atoll_vmm::config::Isolation;
use xtask::place;

fn plan(image: Image, seed: u64) -> Plan {
    Plan {
        class: Class::Blk,
        kills: 0,
        seed,
        image,
        direct: false,
        isolation: Isolation::Shared,
        folder: None,
        sabotage: None,
    }
}

/// Two builds of a disk take turns, with a kill in between that brings back the build before the newest, which is on probation; nothing
/// is lost.
#[test]
fn builds_take_turns_under_load() -> Result<()> {
    let mut builds = Builds::open(&plan(Image::Raw, 11), &place::steps())?;
    builds.run(10)?;
    builds.kill()?;
    builds.run(10)?;
    let outcome = builds.finish()?;
    ensure!(outcome.ok && outcome.upgrades == 20 && outcome.findings.broken() == 0, "{outcome:?}");
    Ok(())
}

/// The tables of a qcow2 image are read by the new build when the old one has ended.
#[test]
fn builds_of_a_qcow2_disk_take_turns() -> Result<()> {
    let mut builds = Builds::open(&plan(Image::Qcow2, 12), &place::steps())?;
    builds.run(4)?;
    let outcome = builds.finish()?;
    ensure!(outcome.ok && outcome.upgrades == 4 && outcome.findings.broken() == 0, "{outcome:?}");
    Ok(())
}

/// Whatever is wrong with a new build: the old one carries on, or is back at once, and the operator hears what it was.
#[test]
fn builds_that_will_not_do_are_refused() -> Result<()> {
    let mut builds = Builds::open(&plan(Image::Raw, 13), &place::steps())?;
    for bad in Bad::ALL {
        builds.refuse(bad).with_context(|| format!("{bad:?}"))?;
        let told = builds.refused().get(&format!("{bad:?}")).context("a reason")?;
        let expected: &[&str] = match bad {
            Bad::DiesAtStart | Bad::DiesAtFirstRequest | Bad::DiesAtSwitch => &[""],
            // Whoever starts it and whoever waits for it have the same patience.
            Bad::HangsBeforeHello => &["said nothing", "ready in time"],
            Bad::HangsBeforeReady => &["was not ready", "ready in time"],
            Bad::HangsAfterHandshake => &["SET_MEM_TABLE"],
            Bad::OffersLess => &["VIRTIO_F_INDIRECT_DESC"],
            Bad::RefusesState => &["refuses the old one's state"],
            Bad::HangsAtSwitch => &["SET_VRING_KICK"],
        };
        ensure!(expected.iter().any(|words| told.why.contains(words)), "{bad:?}: {told:?}");
    }
    // The device is as it was: an honest build is taken.
    builds.run(1)?;
    let outcome = builds.finish()?;
    ensure!(outcome.ok && outcome.findings.broken() == 0, "{outcome:?}");
    Ok(())
}
