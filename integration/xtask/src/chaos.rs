//! `cargo xtask chaos`: the campaign of kills, on a test build of the device processes beside the shipped ones.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use atoll_verify::dice::mix;
use serde_json::{Map, Value, json};

use crate::progress::Progress;
use crate::{packages, place};

/// Kills of one campaign of a long run.
const KILLS_A_PART: u32 = 1000;

/// Builds what is needed and runs the campaign with these arguments; its failure is ours.
pub fn run(arguments: &[String]) -> Result<()> {
    place::build_programs()?;
    place::build_steps()?;
    place::run(Command::new(place::program("chaos")?).args(arguments))
}

/// `cargo xtask bench stall`: how long a kill is felt, beside the floor of the same run.
pub fn stall(kills: u32, seed: u64, standby: bool) -> Result<()> {
    packages::ensure_peers(&["qemu-system-x86_64", "qemu-storage-daemon", "mkfs.ext4"])?;
    place::build_programs()?;
    place::build_steps()?;
    if kills == 0 {
        return Ok(());
    }
    let folder = tempfile::tempdir_in(place::release())?;
    let (kills, seed) = (kills.to_string(), seed.to_string());
    let command = &mut Command::new(place::program("chaos")?);
    command.args(["--stall", "--kills", &kills, "--seed", &seed, "--folder"]).arg(folder.path());
    place::run(command.args(standby.then_some("--standby")))
}

/// `cargo xtask soak chaos`: a campaign in parts, which goes on where it was broken off; prints one JSON line.
pub fn soak(kills: u32, seed: u64, arguments: &[String], state: Option<&Path>) -> Result<()> {
    place::build_programs()?;
    place::build_steps()?;
    let mut progress: Progress<Value> = Progress::open(&format!("chaos {}", arguments.join(" ")), state, seed, kills)?;
    let parts = kills.div_ceil(KILLS_A_PART);
    for part in progress.parts.len() as u32..parts {
        let count = KILLS_A_PART.min(kills - part * KILLS_A_PART);
        let mut command = Command::new(place::program("chaos")?);
        command.args(arguments).args(["--kills", &count.to_string()]);
        command.args(["--seed", &mix(seed, part.into()).to_string()]);
        let output = command.stderr(Stdio::inherit()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = said.lines().last().context("the campaign says nothing")?;
        if !output.status.success() {
            bail!("part {part}: {last}");
        }
        progress.add(serde_json::from_str(last)?)?;
        eprintln!("part {} of {parts}", part + 1);
    }
    let commit = progress.commit().to_owned();
    let sums = sums(&progress.finish());
    let done = sums.get("kills").and_then(Value::as_u64).unwrap_or_default();
    // The rule of three: none in N leaves less than 3/N at 95 %.
    let bound = 3.0 / done.max(1) as f64;
    println!("| killed at | kills | with work in flight |\n|---|---|---|");
    for (step, counts) in sums.get("steps").and_then(Value::as_object).into_iter().flatten() {
        println!("| {step} | {} | {} |", counts[0], counts[1]);
    }
    println!("{}", json!({ "soak": "chaos", "commit": commit, "seed": seed, "bound_95": bound, "sums": sums }));
    Ok(())
}

/// Upgrades of one device of a long run.
const UPGRADES_A_PART: u32 = 50;

/// `cargo xtask soak upgrades`: two builds take turns under load, of a disk and of a card alternately; prints one JSON line.
pub fn upgrades(count: u32, seed: u64, state: Option<&Path>) -> Result<()> {
    place::build_programs()?;
    place::build_steps()?;
    let mut progress: Progress<Value> = Progress::open("upgrades", state, seed, count)?;
    let parts = count.div_ceil(UPGRADES_A_PART);
    for part in progress.parts.len() as u32..parts {
        let size = UPGRADES_A_PART.min(count - part * UPGRADES_A_PART);
        let device = if part % 2 == 0 { "blk" } else { "net" };
        let mut command = Command::new(place::program("chaos")?);
        command.args(["--device", device, "--upgrades", &size.to_string()]);
        command.args(["--seed", &mix(seed, part.into()).to_string()]);
        // Once for each class.
        command.args((part < 2).then_some("--bad-builds"));
        let output = command.stderr(Stdio::inherit()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = said.lines().last().with_context(|| format!("part {part} ends without a word"))?;
        if !output.status.success() {
            bail!("part {part}: {last}");
        }
        progress.add(serde_json::from_str(last)?)?;
        eprintln!("part {} of {parts}", part + 1);
    }
    let commit = progress.commit().to_owned();
    let of = |device: &str, parts: &[Value]| {
        let of: Vec<Value> = parts
            .iter()
            .filter(|part| part["device"].as_str().is_some_and(|name| name.starts_with(device)))
            .cloned()
            .collect();
        let mut sums = sums(&of);
        sums.remove("chaos");
        Value::Object(sums)
    };
    let all = progress.finish();
    let (blk, net) = (of("blk", &all), of("net", &all));
    println!(
        "{}",
        json!({ "soak": "upgrades", "commit": commit, "seed": seed, "count": count, "blk": blk, "net": net })
    );
    Ok(())
}

/// Counts of all parts added up, tables too; of durations and other fractions the largest.
fn sums(parts: &[Value]) -> Map<String, Value> {
    let mut sums = Map::new();
    for (key, value) in parts.iter().filter_map(Value::as_object).flatten() {
        match (sums.get(key).cloned(), value) {
            (None, value) => drop(sums.insert(key.clone(), value.clone())),
            (Some(before), value) => drop(sums.insert(key.clone(), add(&before, value))),
        }
    }
    ["seed", "census", "seconds"].iter().for_each(|key| drop(sums.remove(*key)));
    sums
}

fn add(a: &Value, b: &Value) -> Value {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => match (a.as_u64(), b.as_u64()) {
            (Some(a), Some(b)) => json!(a + b),
            _ => json!(a.as_f64().unwrap_or_default().max(b.as_f64().unwrap_or_default())),
        },
        (Value::Array(a), Value::Array(b)) => a.iter().zip(b).map(|(a, b)| add(a, b)).collect(),
        (Value::Object(a), Value::Object(b)) => {
            let mut both = a.clone();
            for (key, value) in b {
                let sum = a.get(key).map_or_else(|| value.clone(), |before| add(before, value));
                both.insert(key.clone(), sum);
            }
            Value::Object(both)
        }
        (a, _) => a.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_added_up() {
        let part = |kills: u64, p99: f64| json!({ "kills": kills, "stall_ms": { "p99": p99 }, "steps": { "mark": [1, kills] } });
        let sums = sums(&[part(3, 1.5), part(4, 0.5)]);
        assert_eq!(Value::Object(sums), json!({ "kills": 7, "stall_ms": { "p99": 1.5 }, "steps": { "mark": [2, 7] } }));
    }
}
