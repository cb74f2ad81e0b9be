//! `qemu-img`, the yardstick for images.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Runs it in `folder`; its output.
pub(crate) fn qemu_img(folder: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new("qemu-img").args(args).current_dir(folder).output();
    let out = out.context("qemu-img does not start: install the package qemu-utils")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "qemu-img {args:?}: {}\n{text}", out.status);
    Ok(text)
}

/// How many clusters of an image are counted and not used. Anything worse is an error. Locks are not minded: the process
/// that held them is dead.
pub(crate) fn check(folder: &Path, image: &str) -> Result<u64> {
    let out = Command::new("qemu-img").args(["check", "-U", "--output=json", image]).current_dir(folder).output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    // 0: sound, 3: leaks and nothing else.
    let code = out.status.code();
    ensure!(matches!(code, Some(0 | 3)), "{image}: {code:?}\n{text}{}", String::from_utf8_lossy(&out.stderr));
    let leaks = text.lines().find_map(|line| line.trim().strip_prefix("\"leaks\": "));
    Ok(leaks.and_then(|number| number.trim_end_matches(',').parse().ok()).unwrap_or(0))
}

/// What is on the disk of an image.
pub(crate) fn contents(folder: &Path, image: &str) -> Result<Vec<u8>> {
    qemu_img(folder, &["convert", "-U", "-O", "raw", image, "contents.raw"])?;
    Ok(std::fs::read(folder.join("contents.raw"))?)
}
