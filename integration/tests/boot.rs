//! Debian's kernels, unmodified, to a shell whose root is an ext4 disk in another process, and off again.
//!
//! Each case writes a file, reads it back after dropping caches, powers off, and finds the same bytes in the image.

use anyhow::Result;
use xtask::demo::{Demo, KernelForm};
use xtask::images;

fn boots(series: &str, form: KernelForm) -> Result<()> {
    let guest = images::guest(series)?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let demo = Demo { series: series.to_owned(), form, cpu: "soft".to_owned() };
    let outcome = demo.check_on(&guest, &disk, folder.path())?;
    assert!(outcome.ok, "{outcome:?}");
    assert!(outcome.kernel.starts_with(series), "{outcome:?}");
    assert!(outcome.instructions > 100_000_000, "the report counts too few instructions: {outcome:?}");
    Ok(())
}

#[test]
fn debian_6_1_by_pvh() -> Result<()> {
    boots("6.1", KernelForm::Pvh)
}

#[test]
fn debian_6_1_by_bzimage() -> Result<()> {
    boots("6.1", KernelForm::Bzimage)
}

#[test]
fn debian_6_12_by_pvh() -> Result<()> {
    boots("6.12", KernelForm::Pvh)
}

#[test]
fn debian_6_12_by_bzimage() -> Result<()> {
    boots("6.12", KernelForm::Bzimage)
}
