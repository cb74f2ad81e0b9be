//! A guest with Mesa on a GPU of ours with 3D: what it draws is what the host's own renderer draws, to the last bit.
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::screen::guest::{operator, screenshot};
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::BOOT_LIMIT;
use xtask::{graphics_land, packages, painting, place, processes};

const STEP: Duration = Duration::from_secs(180);
/// Finds the cube's program, or fails.
const CUBE: &str = "grep -lx kmscube /proc/[0-9]*/comm";

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

/// A triangle of the guest's: what it says of its renderer, and its picture's sum.
fn triangle(console: &mut Console) -> Result<(String, String)> {
    let renderer = console.run("HOME=/tmp /mnt/triangle /tmp/triangle.rgba 2>/tmp/errors", STEP)?;
    let sum = console.run("sha256sum < /tmp/triangle.rgba; rm /tmp/triangle.rgba", STEP)?;
    Ok((renderer, sum.split_whitespace().next().unwrap_or_default().to_owned()))
}

/// The screen shows a shaded cube, soon.
fn shows_a_cube(api: &Path) -> Result<()> {
    let begin = Instant::now();
    loop {
        let picture = operator(api).and_then(|mut client| screenshot(&mut client));
        let colours = picture.as_ref().map(|(_, pixels)| pixels.chunks(3).collect::<BTreeSet<_>>().len());
        if colours.as_ref().is_ok_and(|colours| *colours >= graphics_land::CUBE_COLOURS_MIN) {
            return Ok(());
        }
        ensure!(begin.elapsed() < STEP, "no cube is shown, but {colours:?} colours");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One shaded triangle, by the same program here and in a stock guest, where Mesa's virgl hands it through to the renderer of this
/// host; then a cube that turns on the guest's screen, and the death of who draws it: that cube's context is lost, and nothing else.
/// The program goes on, new ones draw as before, and the guest's kernel has no word about it.
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
    let api = folder.path().join("api.sock");
    let mut atoll = graphics_land::atoll(&initramfs, "virgl=on", "on")?;
    let mut console = Console::spawn(atoll.arg("--api-socket").arg(&api))?;
    console.prompt(BOOT_LIMIT)?;
    let here = packages::sha256(&here)?;
    let (said, there) = triangle(&mut console)?;
    ensure!(said.to_lowercase().starts_with("virgl (llvmpipe"), "the guest's renderer is {said}");
    ensure!(there == here, "the guest's triangle is another: {there}");

    graphics_land::turn_cube(&mut console)?;
    shows_a_cube(&api)?;
    for death in 1..=3 {
        processes::signal(processes::child_named(console.pid(), "atoll-gpu", STEP)?, Signal::KILL)?;
        let (said, there) = triangle(&mut console)?;
        ensure!(there == here, "after {death} deaths the guest's triangle is another: {said}, {there}");
        console.run(CUBE, STEP).with_context(|| format!("the cube's program is gone after {death} deaths"))?;
    }
    console.run(&format!("kill $({CUBE} | cut -d / -f 3)"), STEP)?;
    let cube = console.run("sleep 1; HOME=/tmp kmscube -c 60 2>&1 | tail -1", STEP)?;
    ensure!(cube.contains("Rendered"), "no cube: {cube}");
    graphics_land::turn_cube(&mut console)?;
    shows_a_cube(&api)?;
    painting::nobody_complains(&mut console)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    Ok(())
}
