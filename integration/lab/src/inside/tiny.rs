//! The tests of the CPU seam with tiny guests (`vmm/tests/tiny_guests`) on real KVM: every mode, port and memory-mapped
//! I/O, interrupts, state in and out, doorbells, the log of dirty pages. Elsewhere they run on what KVM a host has, which may be
//! one that interprets.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::lab::TINY_GUESTS;
use xtask::place;

use super::boot::figures;

/// Tests of KVM that there are at least.
const TESTS_MIN: usize = 12;
/// The test of KVM's log of written pages.
const DIRTY_LOG: &str = "lifetimes::kvm_logs_dirty_pages";

/// Runs those of KVM.
pub(super) fn guests() -> Result<Map<String, Value>> {
    let program = place::program(TINY_GUESTS)?;
    // A deadline of its own: the tests have theirs, but what is tested may break them.
    let output = Command::new("timeout")
        .args(["-s", "KILL", "600"])
        .arg(program)
        .args(["kvm", "--test-threads", "1"])
        .stdin(Stdio::null())
        .output()
        .context("busybox has no timeout")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}{errors}", output.status);
    let passed: Vec<&str> = said.lines().filter(|line| line.starts_with("test ") && line.ends_with(" ok")).collect();
    ensure!(passed.len() >= TESTS_MIN, "only {} tests of KVM: {said}", passed.len());
    ensure!(passed.iter().any(|line| line.contains(DIRTY_LOG)), "the log of dirty pages was not tested: {said}");
    Ok(figures(json!({ "tests": passed.len() })))
}
