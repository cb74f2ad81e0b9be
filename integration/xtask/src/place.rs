//! Where things are: the repository, the cache, the built programs.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root.
pub fn repository() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_path_buf()
}

/// The cache of packages and images: `$ATOLL_CACHE`, else `$XDG_CACHE_HOME/atoll`, else `~/.cache/atoll`.
pub fn cache() -> Result<PathBuf> {
    let path = if let Some(path) = std::env::var_os("ATOLL_CACHE") {
        PathBuf::from(path)
    } else if let Some(path) = std::env::var_os("XDG_CACHE_HOME") {
        PathBuf::from(path).join("atoll")
    } else {
        let home =
            std::env::var_os("HOME").context("neither ATOLL_CACHE nor HOME is set: set ATOLL_CACHE to a folder")?;
        PathBuf::from(home).join(".cache/atoll")
    };
    std::fs::create_dir_all(&path).with_context(|| format!("cannot make the cache folder {}", path.display()))?;
    Ok(path)
}

/// The folder of the release programs (`atoll`, `atoll-blk`, …).
pub fn release() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    target.join("release")
}

/// The folder of a test build of the device processes, which die at named steps when they are told to.
pub fn steps() -> PathBuf {
    release().join("steps")
}

/// Programs of which there is a test build.
const STEPPERS: [&str; 5] = ["atoll-blk", "atoll-nvme", "atoll-net", "atoll-rng", "atoll-console"];

/// Makes the test build of the device processes, and leaves the shipped ones where they are.
pub fn build_steps() -> Result<()> {
    let bins: Vec<&str> = STEPPERS.iter().flat_map(|name| ["--bin", name]).collect();
    let build = |more: &[&str]| {
        run(Command::new(cargo())
            .args(["build", "--release", "--workspace"])
            .args(&bins)
            .args(more)
            .current_dir(repository()))
    };
    build(&["--features", "atoll-kit/steps"])?;
    std::fs::create_dir_all(steps())?;
    for name in STEPPERS {
        // Not a link: cargo writes the next build over it.
        std::fs::copy(release().join(name), steps().join(name))?;
    }
    build(&[])
}

/// A program of the workspace, which must have been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = release().join(name);
    if !path.is_file() {
        bail!("{} is not built: run `cargo build --release --workspace`", path.display());
    }
    Ok(path)
}

/// Builds all programs of the workspace in release mode.
pub fn build_programs() -> Result<()> {
    run(Command::new(cargo()).args(["build", "--release", "--workspace", "--bins"]).current_dir(repository()))
}

/// Builds a test program of the workspace and puts it beside the programs, under its name; runs none of its tests.
pub fn build_test(name: &str) -> Result<PathBuf> {
    let output = Command::new(cargo())
        .args(["test", "--release", "--workspace", "--no-run", "--quiet", "--message-format=json", "--test", name])
        .current_dir(repository())
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("building the test {name} ended with {}", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let built = messages
        .filter(|message| message["target"]["name"] == name)
        .filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .next_back()
        .with_context(|| format!("cargo built no test {name}"))?;
    let kept = release().join(name.replace('_', "-"));
    std::fs::copy(&built, &kept).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(kept)
}

/// The cargo that runs us.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Runs a command to its end; its failure is ours.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// A program on PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}
