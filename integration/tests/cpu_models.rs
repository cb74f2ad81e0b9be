//! Which processor a guest is shown: a named model on both CPUs, the host's own only where the host's own runs it.

use anyhow::Result;
use atoll_integration::guests::prologue::{kernel, power_off, print};
use std::process::{Command, Output};
use xtask::place;

/// Runs a guest that says a word and switches itself off.
fn run(arguments: &[&str]) -> Result<Output> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("guest.elf");
    let guest = kernel(|code| {
        print(code, "alive\n")?;
        power_off(code)
    })?;
    std::fs::write(&path, guest)?;
    let mut command = Command::new(place::program("atoll")?);
    command.args(["run", "--memory", "size=64M", "--serial", "tty", "--kernel"]).arg(path).args(arguments);
    Ok(command.stdin(std::process::Stdio::null()).output()?)
}

#[test]
fn named_models_run() -> Result<()> {
    for model in ["atoll-v1", "atoll-v2"] {
        let ended = run(&["--cpu", "soft", "--cpu-model", model])?;
        assert!(ended.status.success() && ended.stdout.starts_with(b"alive"), "{model}: {ended:?}");
    }
    Ok(())
}

#[test]
fn the_host_model_is_kvm_only() -> Result<()> {
    let refused = run(&["--cpu", "soft", "--cpu-model", "host"])?;
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("atoll-v1"), "{told}");
    let unknown = run(&["--cpu", "soft", "--cpu-model", "z80"])?;
    let told = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(!unknown.status.success() && told.contains("z80"), "{told}");
    if !std::path::Path::new("/dev/kvm").exists() {
        let allowed = std::env::var_os("ATOLL_ALLOW_SKIP").is_some_and(|value| value == "1");
        assert!(allowed, "/dev/kvm is missing; set ATOLL_ALLOW_SKIP=1 to leave its tests out");
        return Ok(());
    }
    let ended = run(&["--cpu", "kvm", "--cpu-model", "host"])?;
    assert!(ended.status.success() && ended.stdout.starts_with(b"alive"), "{ended:?}");
    Ok(())
}
