//! House rules that no compiler knows, each with its reason.

use crate::place;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// A file has one subject; past this many lines it rarely has.
const LINES_MAX: usize = 700;
/// What may stand at the top level, besides dotfiles.
const TOP_LEVEL: [&str; 10] = [
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "LICENSE-APACHE",
    "LICENSE-BSD",
    "vmm",
    "devices",
    "protocol",
    "backends",
    "integration",
];
/// Names that say nothing.
const EMPTY_NAMES: [&str; 5] = ["util", "utils", "common", "helpers", "manager"];

/// Checks the tree; prints every finding.
pub fn run() -> Result<()> {
    let root = place::repository();
    let listing = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(&root)
        .output()?;
    let listing = String::from_utf8(listing.stdout).context("file names are UTF-8")?;
    let mut findings = Vec::new();
    for name in listing.lines().filter(|name| root.join(name).is_file()) {
        let top = name.split('/').next().unwrap_or(name);
        if !top.starts_with('.') && !TOP_LEVEL.contains(&top) {
            findings.push(format!("{name}: the top level is fixed; put it into the room it belongs to"));
        }
        if !name.ends_with(".rs") {
            continue;
        }
        let stem = name.rsplit('/').next().unwrap_or(name).trim_end_matches(".rs");
        if EMPTY_NAMES.contains(&stem) {
            findings.push(format!("{name}: name it after what is in it"));
        }
        let text = std::fs::read_to_string(root.join(name))?;
        let lines = text.lines().count();
        if lines > LINES_MAX {
            findings.push(format!("{name}: {lines} lines (at most {LINES_MAX}); split it by subject"));
        }
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        if !first.starts_with("//!") && !first.starts_with("#!") && !name.contains("/fuzz_targets/") {
            findings.push(format!("{name}: begin with a module doc that teaches the design in a few sentences"));
        }
        for (number, line) in text.lines().enumerate() {
            if line.contains(concat!("todo", "!(")) || line.contains(concat!("unimplemented", "!(")) {
                findings.push(format!("{name}:{}: a stub; say \"not supported\" with a typed error", number + 1));
            }
        }
    }
    for room in [
        "vmm",
        "vmm/softcpu",
        "devices",
        "protocol",
        "backends",
        "backends/kit",
        "backends/blk",
        "backends/net",
        "backends/uart",
        "integration",
    ] {
        if !root.join(room).join("README.md").is_file() {
            findings.push(format!("{room}: has no README.md of one screen"));
        }
    }
    if findings.is_empty() {
        return Ok(());
    }
    bail!("tidy:\n{}", findings.join("\n"))
}
