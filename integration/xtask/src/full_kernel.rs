//! Debian 12's own kernel with all drivers, of which the cloud kernels have few: its image, and drivers with all that they
//! depend on as an archive behind a guest's initramfs.

use crate::archive::Archive;
use crate::packages::{self, FULL_KERNEL};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The image, as it is packaged.
///
/// # Errors
/// The package cannot be had.
pub fn image() -> Result<PathBuf> {
    let boot = packages::unpacked(&FULL_KERNEL)?.join("boot");
    let files = std::fs::read_dir(&boot)?.flatten().map(|entry| entry.path());
    let is_kernel = |path: &PathBuf| path.to_string_lossy().contains("/vmlinuz-");
    files.into_iter().find(is_kernel).with_context(|| format!("no kernel in {}", boot.display()))
}

/// Drivers by their names in the kernel: where each lies.
fn drivers(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            drivers(&path, found)?;
        } else if let Some(name) =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".ko"))
        {
            found.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Names that a driver says it depends on (`depends=` in its `.modinfo`).
fn depends(driver: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let at = driver.windows(KEY.len()).position(|window| window == KEY);
    let value = at.and_then(|at| driver[at + KEY.len()..].split(|byte| *byte == 0).next()).unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

fn load(name: &str, found: &BTreeMap<String, PathBuf>, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if order.iter().any(|(loaded, _)| loaded == name) {
        return Ok(());
    }
    let path = found.get(name).with_context(|| format!("{} has no driver {name}", FULL_KERNEL.name))?;
    let bytes = std::fs::read(path)?;
    for needed in depends(&bytes) {
        load(&needed, found, order)?;
    }
    order.push((name.to_owned(), bytes));
    Ok(())
}

/// Adds these drivers and what they need to an archive as `modules/full/NN-NAME.ko`, in the order in which they are loaded.
///
/// # Errors
/// The package cannot be had, or has no such driver.
pub fn add(archive: &mut Archive<Vec<u8>>, names: &[&str]) -> Result<()> {
    let mut found = BTreeMap::new();
    drivers(&packages::unpacked(&FULL_KERNEL)?.join("lib/modules"), &mut found)?;
    let mut order = Vec::new();
    for name in names {
        load(name, &found, &mut order)?;
    }
    archive.folder("modules/full")?;
    for (position, (name, driver)) in order.iter().enumerate() {
        archive.file(&format!("modules/full/{position:02}-{name}.ko"), driver)?;
    }
    Ok(())
}

/// An archive with these drivers, and with `files` besides.
///
/// # Errors
/// As above.
pub fn archive(names: &[&str], files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut archive = Archive::behind(Vec::new(), 1);
    add(&mut archive, names)?;
    for (name, contents) in files {
        archive.file(name, contents)?;
    }
    archive.end()
}
