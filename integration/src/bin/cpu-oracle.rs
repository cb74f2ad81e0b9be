//! Compares the software CPU with the host processor, case by numbered case, for as long as wanted: `cargo xtask soak
//! cpu`. Prints progress on standard error and one JSON line at the end.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

use anyhow::{Context, bail};
use atoll_integration::cpu_emulator::Emulator;
use atoll_softcpu::oracle::{self, Family, Mismatch, OracleError};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Differential test of the software CPU. Cases are numbered: seed, family and number make one again.
#[derive(Parser)]
struct Arguments {
    /// Family: integer, vector, x87 or all.
    #[arg(long, default_value = "all")]
    family: String,
    /// Seed of the generator.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Cases in each family.
    #[arg(long, default_value_t = 100_000_000)]
    cases: u64,
    /// First case.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// File that keeps the number of the next case, so that an interrupted run goes on where it was.
    #[arg(long)]
    state: Option<PathBuf>,
    /// Go on after mismatches and print one for each group of instructions.
    #[arg(long)]
    survey: bool,
    /// Compare with this emulator of x86-64 programs (qemu-x86_64) instead of the host.
    #[arg(long)]
    emulator: Option<PathBuf>,
    /// Run cases and write their outcomes to standard output: what the emulator is given to do.
    #[arg(long, hide = true)]
    answer: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let families = match arguments.family.as_str() {
        "all" => Family::ALL.to_vec(),
        name => vec![
            Family::named(name)
                .with_context(|| format!("there is no family '{name}': choose one of integer, vector, x87, all"))?,
        ],
    };
    if arguments.answer {
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        for family in families {
            oracle::answer(arguments.seed, family, arguments.range(), &mut out)?;
        }
        return Ok(());
    }
    if let Some(emulator) = &arguments.emulator {
        return emulated(&arguments, emulator, &families);
    }
    if arguments.survey {
        return survey(&arguments, &families);
    }
    let mut report = Vec::new();
    for family in families {
        let first = resume(&arguments, family)?.unwrap_or(arguments.from);
        let end = arguments.from.saturating_add(arguments.cases);
        let begun = Instant::now();
        let mut next = first;
        let mut told = Instant::now();
        let outcome = oracle::soak(arguments.seed, family, first..end, |case| {
            next = case;
            if told.elapsed().as_secs() >= 10 {
                told = Instant::now();
                let rate = (case - first) as f64 / begun.elapsed().as_secs_f64();
                eprintln!("{}: {case} of {end} cases, {:.2} M/s", family.name(), rate / 1e6);
                if let Err(error) = keep(&arguments, family, case) {
                    eprintln!("{error:#}");
                }
            }
            true
        });
        keep(&arguments, family, next)?;
        match outcome {
            Ok(()) => {}
            Err(OracleError::Mismatch(mismatch)) => bail!("{mismatch}"),
            Err(error) => return Err(error.into()),
        }
        let seconds = begun.elapsed().as_secs_f64();
        report.push(serde_json::json!({
            "family": family.name(),
            "encodings": oracle::encodings(family),
            "from": first,
            "to": next,
            "seconds": (seconds * 10.0).round() / 10.0,
            "cases_per_s": ((next - first) as f64 / seconds).round(),
        }));
    }
    println!("{}", serde_json::json!({ "soak": "cpu", "seed": arguments.seed, "mismatches": 0, "families": report }));
    Ok(())
}

impl Arguments {
    fn range(&self) -> std::ops::Range<u64> {
        self.from..self.from.saturating_add(self.cases)
    }
}

fn emulated(arguments: &Arguments, emulator: &Path, families: &[Family]) -> anyhow::Result<()> {
    let own = std::env::current_exe().context("where is this program?")?;
    let mut report = Vec::new();
    for &family in families {
        let emulator = Emulator { program: emulator, runner: &own };
        let mut known: Vec<Mismatch> = Vec::new();
        let compared = emulator.compare(arguments.seed, family, arguments.range(), |mismatch| {
            if !known.iter().any(|earlier| earlier.alike(&mismatch)) {
                println!("{mismatch}");
                known.push(mismatch);
            }
            arguments.survey
        })?;
        anyhow::ensure!(known.is_empty(), "{} groups of instructions disagree with the emulator", known.len());
        report.push(serde_json::json!({ "family": family.name(), "compared": compared }));
    }
    println!("{}", serde_json::json!({ "soak": "cpu", "seed": arguments.seed, "mismatches": 0, "families": report }));
    Ok(())
}

fn survey(arguments: &Arguments, families: &[Family]) -> anyhow::Result<()> {
    let mut count = 0;
    for &family in families {
        for mismatch in oracle::survey(arguments.seed, family, arguments.range())? {
            count += 1;
            println!("{mismatch}");
        }
    }
    anyhow::ensure!(count == 0, "{count} groups of instructions disagree with the host");
    Ok(())
}

/// The kept number, if the file is there and belongs to this seed.
fn resume(arguments: &Arguments, family: Family) -> anyhow::Result<Option<u64>> {
    let Some(path) = &arguments.state else { return Ok(None) };
    let state = read(path)?;
    let kept = &state[arguments.seed.to_string()][family.name()];
    Ok(kept.as_u64())
}

fn keep(arguments: &Arguments, family: Family, next: u64) -> anyhow::Result<()> {
    let Some(path) = &arguments.state else { return Ok(()) };
    let mut state = read(path)?;
    state[arguments.seed.to_string()][family.name()] = next.into();
    let draft = path.with_extension("draft");
    std::fs::write(&draft, state.to_string()).with_context(|| format!("cannot write {}", draft.display()))?;
    std::fs::rename(&draft, path).with_context(|| format!("cannot replace {}", path.display()))
}

fn read(path: &Path) -> anyhow::Result<serde_json::Value> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .with_context(|| format!("{} is not a state file of this tool: delete it to begin anew", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(serde_json::json!({})),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
