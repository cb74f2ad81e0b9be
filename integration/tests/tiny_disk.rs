//! A whole disk request, driven by a guest of a few dozen instructions, on both CPUs: registers, a BAR that moves, a
//! doorbell, the backend process, the file, and an MSI-X interrupt into a halted processor. On KVM the doorbell is an
//! ioeventfd and the interrupt an irqfd, so the VMM's code takes no part in the request.

use std::process::Command;

use anyhow::{Result, ensure};
use atoll_integration::guests::disk::{PATTERN, SECTOR, guest};
use xtask::place;

fn run(cpu: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (kernel, image) = (folder.path().join("guest"), folder.path().join("disk"));
    std::fs::write(&kernel, guest()?)?;
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let mut command = Command::new(place::program("atoll")?);
    command.args(["run", "--cpu", cpu, "--memory", "size=32M", "--kernel"]).arg(&kernel);
    command.arg("--disk").arg(format!("path={}", image.display())).stdin(std::process::Stdio::null());
    let output = command.output()?;
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && said == "disk ok\n", "{}: '{said}' {errors}", output.status);
    let bytes = std::fs::read(&image)?;
    let at = SECTOR as usize * 512;
    ensure!(bytes[at..at + 512].chunks(4).all(|word| word == PATTERN.to_le_bytes()), "the sector in the image differs");
    ensure!(bytes[..at].iter().chain(&bytes[at + 512..]).all(|byte| *byte == 0), "other sectors were written");
    Ok(())
}

#[test]
fn on_the_software_cpu() -> Result<()> {
    run("soft")
}

/// Where `/dev/kvm` is missing this fails, unless ATOLL_ALLOW_SKIP=1 says that it is known.
#[test]
fn on_kvm() -> Result<()> {
    if !std::path::Path::new("/dev/kvm").exists() {
        let allowed = std::env::var_os("ATOLL_ALLOW_SKIP").is_some_and(|value| value == "1");
        ensure!(allowed, "/dev/kvm is missing; set ATOLL_ALLOW_SKIP=1 to leave this test out");
        return Ok(());
    }
    run("kvm")
}
