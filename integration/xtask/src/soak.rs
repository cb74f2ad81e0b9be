//! Long counts that the test run has no time for; resumable, with seed and position in a state file.

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::{images, lives, packages, place};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::process::Command;
use std::time::Duration;

/// Differential cases of the software CPU against its oracles.
pub fn cpu(arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["qemu-x86_64"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("cpu-oracle")?).args(arguments))
}

/// Devices that come and go.
pub fn plugs(arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("plug-soak")?).args(arguments))
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

/// `cargo xtask soak pauses`: prints one JSON line.
pub fn pauses(count: u32, seed: u64) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    let outcome = lives::pauses(count, seed)?;
    println!("{}", serde_json::json!({ "soak": "pauses", "outcome": outcome }));
    if !outcome.ok {
        bail!("a pause took more than 50 ms beyond its slowest request, or the guest's clock was wrong");
    }
    Ok(())
}

/// `cargo xtask soak reboots`: prints one JSON line.
pub fn reboots(count: u32) -> Result<()> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    println!("{}", serde_json::json!({ "soak": "reboots", "outcome": lives::reboots(count)? }));
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
