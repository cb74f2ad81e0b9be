//! `isolation=copy`: device processes that have nothing of the guest's memory serve stock guests all the same.

use anyhow::{Result, ensure};
use atoll_integration::canary::spy;
use atoll_vmm::config::Isolation;
use xtask::verify::{self, Guests};

/// The same spy twice, spawned and jailed as any device process is. Where memory is shared it finds the canary in every page
/// that no request has ever named; where requests are copied it holds a memory too, and finds it nowhere.
#[test]
fn copies_leave_a_spy_nothing_to_find() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let shared = spy(Isolation::Shared, folder.path())?;
    ensure!(shared.canaries > 900_000, "the spy sees nothing where it sees all: {shared:?}");
    let copied = spy(Isolation::Copy, folder.path())?;
    ensure!(copied.canaries == 0 && copied.bytes >= 16 << 20, "{copied:?}");
    Ok(())
}

/// A verified load on disks whose requests are copied, with guest-physical addresses and behind the IOMMU; their processes
/// are killed meanwhile. Nothing is lost, and nothing is done twice that the guest could see.
#[test]
fn a_load_by_copies_outlives_its_processes() -> Result<()> {
    let physical = Guests { keys: ",isolation=copy".to_owned(), ..Guests::default() };
    for (guests, seed) in [(physical, 51), (Guests::with("iommu=on,isolation=copy"), 52)] {
        let verdict = verify::on_a_guest(&guests, seed, 3, 500)?;
        ensure!(verdict.ok, "{guests:?}: {}", verdict.json());
        let enough = verdict.counts.reads > 20 && verdict.counts.deaths > 1;
        ensure!(enough, "too little happened: {guests:?}: {}", verdict.json());
    }
    Ok(())
}

/// Two guests, each with a card behind its IOMMU whose frames are copied, hear all that the other says.
#[test]
fn cards_by_copies() -> Result<()> {
    let verdicts = verify::on_two_guests(&Guests::with("iommu=on,isolation=copy"), 53, 2)?;
    let json = serde_json::to_string(&verdicts)?;
    ensure!(verdicts.iter().all(|verdict| verdict.ok && verdict.heard.frames > 20), "{json}");
    Ok(())
}
