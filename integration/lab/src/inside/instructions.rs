//! What the README tells a user to type, typed as it stands there: a device of the host in the guest, from the first look at it
//! until it is the host's again.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::console::Console;
use xtask::place;

use super::boot::{BOOT_LIMIT, STEP_LIMIT, figures};
use super::function::{Function, shell};
use super::passed::Setting;
use crate::freight::guest_inside;
use crate::hardware::PLAIN_DRIVE;

const README: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md"));
const HEADING: &str = "### A device of the host in the guest";
/// The device of the README.
const EXAMPLE: &str = "01:00.0";
/// Where a reader's shell finds programs.
const FOLDER: &str = "/tmp/typed";

/// The lines of shell below the heading, without comments and words that a root shell does not need.
fn lines(function: &Function) -> Result<Vec<String>> {
    let (_, section) = README.split_once(HEADING).context("the README has that heading")?;
    let (_, block) = section.split_once("```sh\n").context("there is something to type below it")?;
    let (block, _) = block.split_once("```").context("a block ends")?;
    let place = function.bdf.strip_prefix("0000:").unwrap_or(&function.bdf);
    let typed = |line: &str| {
        let line = line.split(" # ").next().unwrap_or_default().trim();
        line.trim_start_matches("sudo ").replace(EXAMPLE, place)
    };
    Ok(block.lines().map(typed).filter(|line| !line.is_empty()).collect())
}

/// Each line does what is said of it. Only the machine's own line is not a shell's: its console is the test's.
pub(super) fn of_the_readme() -> Result<Map<String, Value>> {
    let function = Function::drive(PLAIN_DRIVE)?;
    let guest = guest_inside(Setting::PLAIN.series);
    std::fs::create_dir_all(FOLDER)?;
    for (name, file) in [("vmlinuz", &guest.bzimage), ("initrd.img", &guest.initramfs)] {
        let link = format!("{FOLDER}/{name}");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(file, link)?;
    }
    let programs = place::program("atoll")?;
    let path = format!("{}:{}", programs.parent().context("a folder")?.display(), std::env::var("PATH")?);
    let mut machine: Option<Console> = None;
    let mut seen = Vec::new();
    for line in lines(&function)? {
        let type_it = |rest: &str| shell(&format!("cd {FOLDER} && PATH={path} {rest}")).with_context(|| line.clone());
        match (line.split_whitespace().nth(1).unwrap_or_default(), &mut machine) {
            ("run", None) => {
                let mut command = Command::new("/bin/sh");
                let line = format!("{line} --cpu kvm");
                command.args(["-c", &format!("exec {line}")]).current_dir(FOLDER).env("PATH", &path);
                let mut console = Console::spawn(&mut command)?;
                console.prompt(BOOT_LIMIT)?;
                console.run("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done", STEP_LIMIT)?;
                machine = Some(console);
            }
            ("remove", Some(console)) => {
                type_it(&line)?;
                console.run("while [ -e /dev/nvme0n1 ]; do sleep 0.1; done", STEP_LIMIT)?;
            }
            ("add-device", Some(console)) => {
                type_it(&line)?;
                console.run("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done", STEP_LIMIT)?;
            }
            ("vfio", running) => {
                // Given back when nobody has it any more.
                if line.contains("unbind") {
                    let mut console = running.take().context("a machine was started")?;
                    console.send("poweroff -f\n")?;
                    let (status, errors) = console.wait(STEP_LIMIT)?;
                    ensure!(status.success(), "atoll ended with {status}: {errors}");
                }
                if line.contains("check") {
                    // It is another driver's, and the next line is what helps.
                    let said = type_it(&format!("{line} || true"))?;
                    let helps = format!("sudo atoll vfio bind {}", function.bdf);
                    ensure!(said.contains(&helps), "`{line}` does not say `{helps}`: {said}");
                } else {
                    type_it(&line)?;
                }
            }
            (_, running) => anyhow::bail!("nobody knows what to expect of `{line}` ({})", running.is_some()),
        }
        seen.push(line);
    }
    ensure!(seen.len() >= 6, "the README tells {seen:?}");
    ensure!(Function::drive(PLAIN_DRIVE)?.disk()?.exists(), "the lab has its drive back");
    Ok(figures(json!({ "typed": seen })))
}
