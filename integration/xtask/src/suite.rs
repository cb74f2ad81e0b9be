//! `cargo xtask test`: set everything up, then every test.

use crate::{full_kernel, images, lab, packages, place, screen_demo, tidy};
use anyhow::Result;
use std::process::Command;
use std::time::Instant;

/// Sets up images and peers; after this everything runs offline.
pub fn set_up() -> Result<()> {
    let wanted: Vec<&str> = packages::PEERS.iter().map(|(program, _)| *program).collect();
    packages::ensure_peers(&wanted)?;
    eprintln!("user land: {}", crate::userland::disk()?.display());
    eprintln!("user land with graphics: {}", crate::graphics_land::disk()?.display());
    eprintln!("QEMU's GPU: {}", packages::unpacked(&packages::QEMU_GUI)?.display());
    eprintln!("passt with vhost-user: {}", crate::passt::with_vhost_user()?.display());
    eprintln!("kernel with all drivers: {}", full_kernel::image()?.display());
    eprintln!("VNC in a browser: {}", screen_demo::novnc()?.display());
    for guest in images::all()? {
        eprintln!("guest {}: {}", guest.series, guest.bzimage.display());
    }
    Ok(())
}

/// The whole test run. Extra arguments go to `cargo test`; with any there is no lab, whose scenarios they do not choose.
pub fn run(arguments: &[String]) -> Result<()> {
    let started = Instant::now();
    let step = |name: &str| eprintln!("[{:>4} s] {name}", started.elapsed().as_secs());
    step("guest images and peers");
    set_up()?;
    step("tidy");
    tidy::run()?;
    step("building the programs");
    place::build_programs()?;
    place::build_steps()?;
    step("tests");
    // One test program at a time, but its tests in parallel: whole-VM tests share two cores. All of them, also after a failure:
    // a long run that stops at the first says too little.
    place::run(
        Command::new(place::cargo())
            .args(["test", "--release", "--workspace", "--no-fail-fast"])
            .args(arguments)
            .current_dir(place::repository()),
    )?;
    if arguments.is_empty() {
        step("stock guests on real KVM, in an emulated machine that has it");
        lab::run(lab::TESTED, &[])?;
    }
    step("all passed");
    Ok(())
}
