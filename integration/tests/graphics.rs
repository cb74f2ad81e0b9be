//! A guest with Mesa on a GPU of ours with 3D: what it draws is what the host's own renderer draws, to the last bit.
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::console::Console;
use xtask::demo::BOOT_LIMIT;
use xtask::{graphics_land, packages, painting, place};

const STEP: Duration = Duration::from_secs(180);

/// Whether this host can draw; a test that cannot says so, and may leave it at that only where that is allowed.
fn has_renderer() -> Result<bool> {
    let missing = packages::missing_peers(packages::RENDERER_PEERS);
    let there = missing.is_empty();
    ensure!(
        there || std::env::var_os("ATOLL_ALLOW_SKIP").is_some_and(|value| value == "1"),
        "no 3D here: run `cargo xtask setup`, which installs {missing:?}, or allow to skip with ATOLL_ALLOW_SKIP=1"
    );
    if !there {
        eprintln!("skipped: this host has no renderer");
    }
    Ok(there)
}

/// One shaded triangle, by the same program here and in a stock guest, where Mesa's virgl hands it through to the renderer of this
/// host; then a cube that turns on the guest's screen.
#[test]
fn a_triangle_of_the_guest_is_the_hosts() -> Result<()> {
    if !has_renderer()? {
        return Ok(());
    }
    let program = place::program("triangle")?;
    let folder = tempfile::tempdir()?;
    let here = folder.path().join("triangle.rgba");
    // Not a GPU that this host may have: the guest's renderer is the processor's, too.
    let output = Command::new(&program).arg(&here).env("LIBGL_ALWAYS_SOFTWARE", "1").output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let renderer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(renderer.starts_with("llvmpipe"), "the host's renderer is {renderer}");

    let initramfs = graphics_land::initramfs(folder.path(), &[Path::new(&program)])?;
    let mut console = Console::spawn(&mut graphics_land::atoll(&initramfs, "virgl=on", "on")?)?;
    console.prompt(BOOT_LIMIT)?;
    let said = console.run("HOME=/tmp /mnt/triangle /tmp/triangle.rgba 2>/tmp/errors", STEP)?;
    ensure!(said.to_lowercase().starts_with("virgl (llvmpipe"), "the guest's renderer is {said}");
    let there = console.run("sha256sum < /tmp/triangle.rgba", STEP)?;
    let there = there.split_whitespace().next().unwrap_or_default();
    ensure!(there == packages::sha256(&here)?, "the guest's triangle is another: {there}");

    let cube = console.run("kmscube -c 60 2>&1", STEP)?;
    ensure!(cube.contains("Rendered"), "no cube: {cube}");
    painting::nobody_complains(&mut console)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    Ok(())
}
