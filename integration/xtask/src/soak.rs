//! Long counts that the test run has no time for; resumable, with seed and position in a state file.

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::laden::Judged;
use crate::progress::Progress;
use crate::{images, lives, packages, place};
use anyhow::{Context, Result, bail};
use atoll_verify::dice::mix;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Differential cases of the software CPU against its oracles.
pub fn cpu(arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["qemu-x86_64"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("cpu-oracle")?).args(arguments))
}

/// Cycles of one machine. Its memory is judged where there are at least a hundred.
const PLUGS_A_MACHINE: u32 = 100;

/// `cargo xtask soak plugs`: devices that come and go; prints one JSON line.
pub fn plugs(count: u32, seed: u64, kernel: &str, state: Option<&Path>) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    let mut progress: Progress<Value> = Progress::open(&format!("plugs-{kernel}"), state, seed, count)?;
    for (part, size) in parts(count, PLUGS_A_MACHINE).enumerate().skip(progress.parts.len()) {
        let mut command = Command::new(place::program("plug-soak")?);
        command.args(["--kernel", kernel, "--count", &size.to_string()]);
        command.args(["--seed", &mix(seed, part as u64).to_string()]);
        let output = command.stderr(std::process::Stdio::inherit()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = said.lines().last().context("plug-soak says nothing")?;
        if !output.status.success() {
            bail!("plug-soak ended with {}: {last}", output.status);
        }
        progress.add(serde_json::from_str(last)?)?;
    }
    let commit = progress.commit().to_owned();
    let machines = progress.finish();
    println!("{}", json!({ "soak": "plugs", "commit": commit, "seed": seed, "count": count, "machines": machines }));
    Ok(())
}

/// Restarts of one program.
const RESTARTS_A_PROGRAM: u32 = 1000;

/// `cargo xtask soak restarts`: an idle disk's process dies and dies; prints one JSON line.
pub fn restarts(count: u32, state: Option<&Path>) -> Result<()> {
    place::build_programs()?;
    let mut progress: Progress<Value> = Progress::open("restarts", state, 0, count)?;
    for size in parts(count, RESTARTS_A_PROGRAM).skip(progress.parts.len()) {
        let mut command = Command::new(place::program("restart-soak")?);
        let output = command.args(["--count", &size.to_string()]).stderr(std::process::Stdio::inherit()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = said.lines().last().context("restart-soak says nothing")?;
        if !output.status.success() {
            bail!("restart-soak ended with {}: {last}", output.status);
        }
        progress.add(serde_json::from_str(last)?)?;
    }
    let commit = progress.commit().to_owned();
    let programs = progress.finish();
    println!("{}", json!({ "soak": "restarts", "commit": commit, "count": count, "programs": programs }));
    Ok(())
}

/// A small generator (xorshift64*): the seed alone says when a run stops its VMM.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// `cargo xtask soak boots`: prints one JSON line.
pub fn boots(count: u32, seed: u64) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    let survived = stopped_boots(count, seed)?;
    println!("{}", serde_json::json!({ "soak": "boots", "seed": seed, "boots": count, "survived": survived }));
    if survived != count {
        bail!("{} of {count} boots failed", count - survived);
    }
    Ok(())
}

/// Pauses of one machine before the next one is booted.
const PAUSES_A_MACHINE: u32 = 250;
/// Reboots of one machine.
const REBOOTS_A_MACHINE: u32 = 25;

/// The counts of the parts of a run of `count`.
fn parts(count: u32, most: u32) -> impl Iterator<Item = u32> {
    (0..count.div_ceil(most)).map(move |part| most.min(count - part * most))
}

/// The middle one, and the largest.
fn middle_and_most(mut all: Vec<u64>) -> (u64, u64) {
    all.sort_unstable();
    (all.get(all.len() / 2).copied().unwrap_or_default(), all.last().copied().unwrap_or_default())
}

/// What the verifier says of all parts: nothing but counts where all is well.
fn judged<'a>(all: &(impl Iterator<Item = &'a Judged> + Clone)) -> Value {
    let sum = |count: fn(&Judged) -> u64| all.clone().map(count).sum::<u64>();
    let bad: Vec<&Judged> = all.clone().filter(|judged| !judged.ok()).collect();
    json!({
        "ok": bad.is_empty(),
        "reads": sum(|judged| judged.blk.counts.reads),
        "writes": sum(|judged| judged.blk.counts.writes),
        "flushes": sum(|judged| judged.blk.counts.flushes),
        "discards_and_zeroes": sum(|judged| judged.blk.counts.discards + judged.blk.counts.zeroes),
        "sectors_read": sum(|judged| judged.blk.counts.sectors_read),
        "slowest_request_ms": all.clone().map(|judged| judged.blk.slowest_ms).fold(0.0, f64::max),
        "frames": sum(Judged::frames),
        "frames_lost": sum(|judged| judged.net.iter().map(|end| end.heard.lost).sum()),
        "silence_ms_max": all.clone().flat_map(|judged| &judged.net).map(|end| end.heard.silence_ms_max).max(),
        "bad": bad,
    })
}

/// `cargo xtask soak pauses`: prints one JSON line.
pub fn pauses(count: u32, seed: u64, state: Option<&Path>) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    let mut progress: Progress<lives::Pauses> = Progress::open("pauses", state, seed, count)?;
    for (part, size) in parts(count, PAUSES_A_MACHINE).enumerate().skip(progress.parts.len()) {
        let before = part as u32 * PAUSES_A_MACHINE;
        let told = |number: u32, pause: &lives::Pause| eprintln!("{:>4}: {pause}", before + number);
        progress.add(lives::pauses(size, mix(seed, part as u64), told)?)?;
        eprintln!("machine {} of {}", part + 1, count.div_ceil(PAUSES_A_MACHINE));
    }
    let commit = progress.commit().to_owned();
    let all = progress.finish();
    let of = |figure: fn(&lives::Pause) -> u64| {
        middle_and_most(all.iter().flat_map(|part| &part.pauses).map(figure).collect())
    };
    let (pause_us_p50, pause_us_max) = of(|pause| pause.whole_us);
    let (request_us_p50, request_us_max) = of(|pause| pause.slowest_request_us);
    let (_, vcpus_us_max) = of(|pause| pause.vcpus_us);
    let (_, drain_us_max) = of(|pause| pause.drain_us);
    let (_, interrupts_us_max) = of(|pause| pause.interrupts_us);
    let over_50_ms = all.iter().flat_map(|part| &part.pauses).filter(|pause| pause.whole_us >= lives::PAUSE_US_MAX);
    let late: Vec<_> = all.iter().flat_map(|part| &part.pauses).filter(|pause| !pause.in_time()).collect();
    let (answer_us_p50, answer_us_max) = of(|pause| pause.answer_us);
    let drift = all.iter().map(|part| part.clock_drift_us_max).max().unwrap_or_default();
    let verdict = judged(&all.iter().map(|part| &part.judged));
    let ok = late.is_empty() && drift < lives::CLOCK_DRIFT_US_MAX && verdict["ok"] == true;
    println!(
        "{}",
        json!({
            "soak": "pauses", "ok": ok, "commit": commit, "seed": seed, "count": count, "machines": all.len(),
            "pause_us_p50": pause_us_p50, "pause_us_max": pause_us_max,
            "slowest_request_us_p50": request_us_p50, "slowest_request_us_max": request_us_max,
            "over_50_ms": over_50_ms.count(), "late": late,
            "vcpus_us_max": vcpus_us_max, "drain_us_max": drain_us_max, "interrupts_us_max": interrupts_us_max,
            "answer_us_p50": answer_us_p50, "answer_us_max": answer_us_max,
            "clock_drift_us_max": drift, "verifier": verdict,
        })
    );
    if !ok {
        bail!(
            "a pause took 50 ms or more and longer than its slowest request, the guest's clock was wrong, or the verifier found something"
        );
    }
    Ok(())
}

/// `cargo xtask soak reboots`: prints one JSON line.
pub fn reboots(count: u32, seed: u64, state: Option<&Path>) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    let mut progress: Progress<lives::Reboots> = Progress::open("reboots", state, seed, count)?;
    for (part, size) in parts(count, REBOOTS_A_MACHINE).enumerate().skip(progress.parts.len()) {
        progress.add(lives::reboots(size, mix(seed, part as u64))?)?;
        eprintln!("machine {} of {}", part + 1, count.div_ceil(REBOOTS_A_MACHINE));
    }
    let commit = progress.commit().to_owned();
    let all = progress.finish();
    let (prompt_ms_p50, prompt_ms_max) =
        middle_and_most(all.iter().flat_map(|part| &part.prompt_ms).copied().collect());
    let verdict = judged(&all.iter().map(|part| &part.judged));
    let belongings = all.first().map(|part| &part.belongings);
    println!(
        "{}",
        json!({
            "soak": "reboots", "ok": verdict["ok"], "commit": commit, "seed": seed, "count": count, "machines": all.len(),
            "by_guest": all.iter().map(|part| part.by_guest).sum::<u32>(),
            "by_operator": all.iter().map(|part| part.by_operator).sum::<u32>(),
            "descriptors": belongings.map(|all| all.descriptors), "threads": belongings.map(|all| all.threads),
            "processes": belongings.map(|all| all.children.len()),
            "clock_error_us_max": all.iter().map(|part| part.clock_error_us_max).max(),
            "prompt_ms_p50": prompt_ms_p50, "prompt_ms_max": prompt_ms_max, "verifier": verdict,
        })
    );
    if verdict["ok"] != true {
        bail!("the verifier found something");
    }
    Ok(())
}

/// Boots `count` guests, each of which has its VMM stopped three times at random moments; gives how many reached a
/// prompt, answered and powered off.
pub fn stopped_boots(count: u32, seed: u64) -> Result<u32> {
    let guest = images::guest("6.1")?;
    let mut dice = Dice(seed | 1);
    let mut survived = 0;
    for boot in 0..count {
        let folder = tempfile::tempdir()?;
        let disk = images::copy_of_disk(&guest, folder.path())?;
        let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
        let mut command = demo.command(&guest)?;
        command.arg("--disk").arg(format!("path={}", disk.display()));
        let mut console = Console::spawn(&mut command)?;
        let vmm = Pid::from_raw(i32::try_from(console.pid())?).context("process ids are positive")?;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(dice.below(1500)));
            kill_process(vmm, Signal::STOP)?;
            std::thread::sleep(Duration::from_millis(20 + dice.below(1200)));
            kill_process(vmm, Signal::CONT)?;
        }
        let outcome = (|| -> Result<()> {
            console.prompt(BOOT_LIMIT)?;
            console.run("grep -q ' / ext4 ' /proc/mounts && sleep 0.1 && mount -o remount,ro /", BOOT_LIMIT)?;
            console.send("poweroff -f\n")?;
            let (status, errors) = console.wait(BOOT_LIMIT)?;
            if !status.success() {
                bail!("atoll ended with {status}: {errors}");
            }
            Ok(())
        })();
        match outcome {
            Ok(()) => survived += 1,
            Err(error) => eprintln!("boot {boot} of seed {seed:#x}: {error:#}"),
        }
    }
    Ok(survived)
}
