//! Fuzz targets: libfuzzer-sys on the stable toolchain, through RUSTFLAGS. libFuzzer itself is C++ and is compiled here.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::progress::commit;
use crate::{packages, place};

/// Coverage instrumentation that libFuzzer reads, which stable rustc passes on to LLVM. Debug assertions stay on, so
/// that an overflow is a finding.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Copt-level=3";
/// The flags are for targets alone, and not for what runs while they are built: so one is named.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What a target came to.
#[derive(Debug, Default, Serialize)]
struct Fuzzed {
    /// Inputs that were tried.
    runs: u64,
    /// How long.
    seconds: u64,
    /// Places of the program that were reached.
    coverage: u64,
    /// Inputs that are kept, because each reaches something that the others do not.
    corpus: usize,
    /// Inputs that broke it, before and now.
    findings: usize,
    /// It came to its end.
    ok: bool,
}

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

/// Where the targets are built: apart from everything else, because their flags differ.
fn built() -> PathBuf {
    place::release().with_file_name("fuzz")
}

fn build(target: Option<&str>) -> Result<()> {
    packages::ensure_installed("c++", &["g++"])?;
    let mut command = Command::new(place::cargo());
    command.args(["build", "--quiet", "--release", "--target", TARGET, "--manifest-path"]);
    command.arg(place::repository().join("integration/fuzz/Cargo.toml"));
    match target {
        Some(name) => command.args(["--bin", name]),
        None => command.arg("--bins"),
    };
    place::run(command.env("RUSTFLAGS", FLAGS).env("CARGO_TARGET_DIR", built()))
}

/// Runs one target, or all in turn, for some seconds each; prints a table and one line of JSON. Whether none was broken.
pub fn run(target: Option<&str>, seconds: u32) -> Result<bool> {
    let wanted = target.map_or_else(targets, |name| Ok(vec![name.to_owned()]))?;
    build(target)?;
    let corpus = place::cache()?.join("corpus");
    let mut all = BTreeMap::new();
    for name in wanted {
        let inputs = corpus.join(&name);
        std::fs::create_dir_all(&inputs)?;
        eprintln!("fuzzing {name} for {seconds} s; inputs are kept in {}", inputs.display());
        let fuzzed = fuzz(&name, &inputs, seconds).with_context(|| name.clone())?;
        all.insert(name, fuzzed);
    }
    println!("| target | inputs tried | seconds | places reached | inputs kept | broken |\n|---|---|---|---|---|---|");
    for (name, Fuzzed { runs, seconds, coverage, corpus, findings, .. }) in &all {
        println!("| {name} | {runs} | {seconds} | {coverage} | {corpus} | {findings} |");
    }
    let ok = all.values().all(|fuzzed| fuzzed.ok);
    println!("{}", json!({ "fuzz": "libfuzzer", "ok": ok, "commit": commit(), "targets": all }));
    Ok(ok)
}

fn fuzz(name: &str, inputs: &Path, seconds: u32) -> Result<Fuzzed> {
    let program = built().join(TARGET).join("release").join(name);
    let mut child = Command::new(&program)
        .arg(inputs)
        .arg(format!("-max_total_time={seconds}"))
        .args(["-timeout=10", "-rss_limit_mb=2048"])
        .arg(format!("-artifact_prefix={}/", inputs.display()))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut fuzzed = Fuzzed::default();
    let said = child.stderr.take().context("a pipe")?;
    let mut last = Vec::new();
    for line in BufReader::new(said).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        fuzzed.hear(&line);
        if !line.starts_with('#') {
            last.push(line);
            last.drain(..last.len().saturating_sub(60));
        }
    }
    fuzzed.ok = child.wait()?.success();
    if !fuzzed.ok {
        // What libFuzzer says of an input that breaks it, and where that input is.
        last.iter().for_each(|line| eprintln!("{line}"));
    }
    for entry in std::fs::read_dir(inputs)?.flatten() {
        let file = entry.file_name();
        let finding =
            ["crash-", "timeout-", "oom-", "leak-"].iter().any(|kind| file.to_string_lossy().starts_with(kind));
        *if finding { &mut fuzzed.findings } else { &mut fuzzed.corpus } += 1;
    }
    if fuzzed.ok && fuzzed.runs == 0 {
        bail!("libFuzzer does not say how many inputs it tried");
    }
    Ok(fuzzed)
}

impl Fuzzed {
    /// What libFuzzer says of its progress.
    fn hear(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        while let Some(word) = words.next() {
            match (word, words.clone().next().and_then(|number| number.parse().ok())) {
                ("cov:", Some(number)) => self.coverage = number,
                ("Done", Some(number)) => self.runs = number,
                ("in", Some(number)) if line.starts_with("Done") => self.seconds = number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let mut fuzzed = Fuzzed::default();
        for line in [
            "#4194304\tpulse  cov: 371 ft: 1210 corp: 152/9Kb lim: 4096 exec/s: 699050 rss: 391Mb",
            "#5000000\tDONE   cov: 372 ft: 1211 corp: 153/9Kb lim: 4096 exec/s: 699050 rss: 391Mb",
            "Done 5000000 runs in 61 second(s)",
        ] {
            fuzzed.hear(line);
        }
        assert_eq!((fuzzed.coverage, fuzzed.runs, fuzzed.seconds), (372, 5_000_000, 61));
    }
}
