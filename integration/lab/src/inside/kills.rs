//! Device processes are killed with SIGKILL under load, on real KVM: the verifier in the guest judges what became of its
//! requests and frames. Then `atoll fault` does, once each, what an operator may do to a disk on purpose.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Map, Value, json};
use xtask::lab::GUEST_VERIFIER;
use xtask::laden::{Ground, Laden};
use xtask::{place, processes};

use super::boot::{QUICK, STEP_LIMIT, figures};
use crate::freight::guest_inside;

/// Name of the machine, by which the command line finds it.
const NAME: &str = "kills";
/// Interfaces of its two cards, and what joins them.
const TAPS: [&str; 2] = ["kills0", "kills1"];
const BRIDGE: &str = "kills";
/// Rounds, in each of which a disk's process dies and a card's.
const ROUNDS: u32 = 10;
/// What `atoll fault` does to the disk under load.
const FAULTS: [&str; 5] = ["kill", "stop", "delay", "disconnect", "garbage"];
const SEED: u64 = 0x1ab;
/// Requests and frames that must have been judged; a fraction of what the slowest machine does.
const WORK_MIN: u64 = 10;

/// A bridge of the lab's kernel, over which the two cards reach each other.
struct Bridge;

impl Bridge {
    fn over(taps: [&str; 2]) -> Result<Self> {
        let run = |words: &[&str]| place::run(Command::new("brctl").args(words));
        run(&["addbr", BRIDGE])?;
        let bridge = Self;
        for tap in taps {
            run(&["addif", BRIDGE, tap])?;
        }
        place::run(Command::new("ip").args(["link", "set", BRIDGE, "up"]))?;
        Ok(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let down = place::run(Command::new("ip").args(["link", "set", BRIDGE, "down"]));
        if let Err(error) = down.and_then(|()| place::run(Command::new("brctl").args(["delbr", BRIDGE]))) {
            eprintln!("lab: a bridge stays behind: {error:#}");
        }
    }
}

/// Kills the process of the `index`th device of a kind, and waits until another one is in its place.
fn kill(vmm: u32, program: &str, index: usize, devices: usize) -> Result<()> {
    let deadline = Instant::now() + STEP_LIMIT;
    let all = |alive: &dyn Fn(&[u32]) -> bool| -> Result<Vec<u32>> {
        loop {
            let mut found = processes::children_named(vmm, program);
            found.sort_unstable();
            if found.len() == devices && alive(&found) {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "{} of {devices} processes {program} are there", found.len());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let victim = *all(&|_| true)?.get(index).context("there are that many devices")?;
    processes::signal(victim, Signal::KILL)?;
    all(&|found| !found.contains(&victim)).map(drop)
}

/// Has the command line do something to the disk under load, as soon as a process serves it.
fn inflict(fault: &str) -> Result<()> {
    /// What it answers in some words while the process, or the connection, that the last fault cost has no successor yet.
    const NOBODY: &str = "serves the device now";
    let deadline = Instant::now() + STEP_LIMIT;
    loop {
        let output = Command::new(place::program("atoll")?).args(["fault", NAME, "_disk1", fault]).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains(NOBODY) && Instant::now() < deadline, "atoll fault {fault}: {}", said.trim());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs the verifier under kills.
pub(super) fn of_devices() -> Result<Map<String, Value>> {
    let ground = Ground {
        guest: guest_inside("6.1"),
        cpu: "kvm".to_owned(),
        vcpus: 2,
        verifier: place::program(GUEST_VERIFIER)?,
        cmdline: format!("no_timer_check {QUICK}"),
        taps: Some(TAPS.map(str::to_owned)),
        more: ["--name", NAME, "--allow-faults"].map(str::to_owned).to_vec(),
    };
    let mut laden = Laden::boot_on(&ground, SEED, ROUNDS)?;
    let vmm = laden.vm.console.pid();
    let _bridge = Bridge::over(TAPS)?;
    laden.begin()?;
    for round in 0..ROUNDS {
        // Two of each: the root disk and the one under load, and both cards.
        for program in ["atoll-blk", "atoll-net"] {
            kill(vmm, program, (round % 2) as usize, 2).with_context(|| format!("round {round}"))?;
            std::thread::sleep(Duration::from_millis(u64::from(round * 37 % 100)));
        }
    }
    for fault in FAULTS {
        inflict(fault)?;
        // The load goes on after it.
        let told = laden.history_bytes();
        let deadline = Instant::now() + STEP_LIMIT;
        while laden.history_bytes() <= told {
            ensure!(Instant::now() < deadline, "the disk's load does not go on after {fault}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let deaths = u64::from(ROUNDS) + FAULTS.len() as u64;
    let judged = laden.finish_after(deaths)?;
    let (blk, frames) = (&judged.blk, judged.frames());
    ensure!(judged.ok(), "the verifier found: {} {}", blk.json(), serde_json::to_string(&judged.net)?);
    ensure!(blk.counts.reads >= WORK_MIN && blk.counts.writes >= WORK_MIN, "too little was done: {}", blk.json());
    ensure!(frames >= WORK_MIN, "only {frames} frames came");
    Ok(figures(json!({ "kills": 2 * ROUNDS, "faults": FAULTS, "reads": blk.counts.reads, "writes": blk.counts.writes,
        "frames": frames })))
}
