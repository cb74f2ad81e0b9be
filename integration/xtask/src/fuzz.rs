//! Fuzz targets: libfuzzer-sys on the stable toolchain, through RUSTFLAGS.

use crate::place;
use anyhow::{Context, Result};
use std::process::Command;

/// Coverage instrumentation that libFuzzer reads, which stable rustc passes on to LLVM. Debug assertions stay on, so
/// that an overflow is a finding.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Copt-level=3";

/// The names of all targets.
pub fn targets() -> Result<Vec<String>> {
    let folder = place::repository().join("integration/fuzz/fuzz_targets");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .flatten()
        .filter_map(|entry| entry.path().file_stem().and_then(|stem| stem.to_str()).map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

/// Runs one target, or all in turn, for some seconds each.
pub fn run(target: Option<&str>, seconds: u32) -> Result<()> {
    let wanted = target.map_or_else(targets, |name| Ok(vec![name.to_owned()]))?;
    let corpus = place::cache()?.join("corpus");
    for name in wanted {
        let inputs = corpus.join(&name);
        std::fs::create_dir_all(&inputs)?;
        eprintln!("fuzzing {name} for {seconds} s; inputs are kept in {}", inputs.display());
        place::run(
            Command::new(place::cargo())
                .args(["run", "--quiet", "--release", "--manifest-path"])
                .arg(place::repository().join("integration/fuzz/Cargo.toml"))
                .args(["--target", "x86_64-unknown-linux-gnu", "--bin", &name, "--"])
                .arg(&inputs)
                .arg(format!("-max_total_time={seconds}"))
                .arg("-timeout=10")
                .arg("-rss_limit_mb=2048")
                .arg(format!("-artifact_prefix={}/", inputs.display()))
                .env("RUSTFLAGS", FLAGS)
                .env("CARGO_TARGET_DIR", place::release().with_file_name("fuzz")),
        )?;
    }
    Ok(())
}
