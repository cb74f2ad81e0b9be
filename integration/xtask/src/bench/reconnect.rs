//! How long a guest of QEMU feels the death of its disk's process, beside `cargo xtask bench stall`: a vhost-user disk whose
//! chardev reconnects as fast as it can be told to, with `atoll-blk` behind it and with qemu-storage-daemon. Beside them
//! the same guest and load on Atoll.
//!
//! Whoever kills the process starts the next one at once. The guest's own history tells how long each request took; those
//! that overlap and took far longer than others are one stall. A guest whose load does not end has lost a request.

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::images::{self, Guest};
use crate::laden::Ending;
use crate::progress::commit;
use crate::verify::{self, Load};
use crate::{place, processes, yardstick};
use anyhow::{Context, Result, ensure};
use atoll_verify::blk::{Event, History};
use atoll_verify::dice::mix;
use rustix::process::Signal;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(60);
/// Between two kills: longer than any of these takes to come back.
const BETWEEN_KILLS: Duration = Duration::from_millis(2500);
/// What a request takes without a kill, at most, as a guess: what takes longer is a stall.
const USUAL_US_MAX: u64 = 5_000;
/// How long a guest may take to end its load and to print its history, after which a request of it is lost.
const END_MAX: Duration = Duration::from_secs(60);
/// A guest's history comes over an emulated serial line, and is to be short: so many kills, and then another guest.
const KILLS_A_GUEST: u32 = 5;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Stand {
    /// A guest of ours.
    Atoll,
    /// A guest of QEMU's whose disk is served by `atoll-blk`.
    QemuWithAtollBlk,
    /// One whose disk is served by QEMU's own daemon.
    QemuWithStorageDaemon,
}

impl Stand {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Atoll, Self::QemuWithAtollBlk, Self::QemuWithStorageDaemon];

    fn name(self) -> &'static str {
        match self {
            Self::Atoll => "atoll",
            Self::QemuWithAtollBlk => "QEMU, atoll-blk",
            Self::QemuWithStorageDaemon => "QEMU, qemu-storage-daemon",
        }
    }
}

/// What a guest felt.
#[derive(Clone, Debug, Serialize)]
pub struct Felt {
    /// Who.
    pub stand: &'static str,
    /// Kills.
    pub kills: u32,
    /// The slowest request of each stall, in milliseconds, shortest first: of the longest ones, as many as there were kills,
    /// so that a busy host's own hiccups count only where nothing was worse.
    pub stalls_ms: Vec<f64>,
    /// Requests that were answered.
    pub requests: usize,
    /// The load did not end: requests were lost.
    pub hung: bool,
}

/// The fastest reconnect setting that this QEMU has.
fn reconnect() -> Result<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split("version ").nth(1).unwrap_or_default();
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u32>().ok());
    let version = (numbers.next().context("QEMU says no version")?, numbers.next().unwrap_or(0));
    // In milliseconds since 9.2; in seconds before.
    Ok(if version >= (9, 2) { "reconnect-ms=1".into() } else { "reconnect=1".into() })
}

fn backend(stand: Stand, socket: &Path, scratch: &Path) -> Result<Ending> {
    let mut command = if stand == Stand::QemuWithAtollBlk {
        let mut command = Command::new(place::program("atoll-blk")?);
        command.arg("--socket").arg(socket).arg("--path").arg(scratch).args(["--num-queues", "1"]);
        command
    } else {
        // One that was killed leaves its socket, and a lock that falls with its last I/O.
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=d,filename={},locking=off,discard=unmap", scratch.display()));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on",
            socket.display()
        ));
        command
    };
    Ok(Ending(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
}

fn command(stand: Stand, guest: &Guest, disk: &Path, scratch: &Path, socket: &Path) -> Result<Command> {
    if stand == Stand::Atoll {
        let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
        let mut command = demo.command(guest)?;
        for disk in [disk, scratch] {
            command.arg("--disk").arg(format!("path={}", disk.display()));
        }
        return Ok(command);
    }
    let mut command = yardstick::qemu(&guest.vmlinux, guest, "console=ttyS0 cryptomgr.notests");
    command.args(["-object", "memory-backend-memfd,id=m,size=512M,share=on", "-machine", "memory-backend=m"]);
    command.arg("-drive").arg(format!("file={},if=none,id=root,format=raw", disk.display()));
    command.args(["-device", "virtio-blk-pci,drive=root"]);
    command.arg("-chardev").arg(format!("socket,id=c,path={},{}", socket.display(), reconnect()?));
    command.args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=1"]);
    Ok(command)
}

/// The slowest request of each group of slow ones that overlap, in milliseconds; and how many requests there were.
fn stalls(history: &History) -> (Vec<f64>, usize) {
    let (mut begun, mut slow, mut requests) = (BTreeMap::new(), Vec::new(), 0);
    for record in &history.records {
        match &record.event {
            Event::Invoke(operation) => drop(begun.insert(operation.id, record.at_us)),
            Event::Complete(id, ..) => {
                let Some(since) = begun.remove(id) else { continue };
                requests += 1;
                if record.at_us.saturating_sub(since) > USUAL_US_MAX {
                    slow.push((since, record.at_us));
                }
            }
            _ => {}
        }
    }
    slow.sort_unstable();
    let mut groups: Vec<(u64, u64)> = Vec::new();
    for (since, until) in slow {
        match groups.last_mut() {
            Some((end, longest)) if since < *end => (*end, *longest) = (until.max(*end), (until - since).max(*longest)),
            _ => groups.push((until, until - since)),
        }
    }
    let mut stalls: Vec<f64> = groups.into_iter().map(|(_, longest)| longest as f64 / 1e3).collect();
    stalls.sort_unstable_by(f64::total_cmp);
    (stalls, requests)
}

/// One guest after the other, until the kills are done.
fn measure_in_parts(stand: Stand, kills: u32, seed: u64) -> Result<Felt> {
    let mut all = Felt { stand: stand.name(), kills: 0, stalls_ms: Vec::new(), requests: 0, hung: false };
    for part in 0..kills.div_ceil(KILLS_A_GUEST) {
        let size = KILLS_A_GUEST.min(kills - part * KILLS_A_GUEST);
        let felt = measure(stand, size, mix(seed, part.into()))?;
        all.kills += felt.kills;
        all.requests += felt.requests;
        all.hung |= felt.hung;
        all.stalls_ms.extend(felt.stalls_ms);
    }
    all.stalls_ms.sort_unstable_by(f64::total_cmp);
    Ok(all)
}

fn measure(stand: Stand, kills: u32, seed: u64) -> Result<Felt> {
    let guest = images::guest("6.1")?;
    let folder = crate::laden::fast_folder()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    verify::install(&disk)?;
    let (scratch, socket) = (folder.path().join("scratch"), folder.path().join("disk.sock"));
    std::fs::File::create(&scratch)?.set_len(4 << 20)?;
    let mut serving = None;
    if stand != Stand::Atoll {
        serving = Some(backend(stand, &socket, &scratch)?);
        let deadline = Instant::now() + STEP;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "{}: nobody listens", stand.name());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let mut console = Console::spawn(&mut command(stand, &guest, &disk, &scratch, &socket)?)?;
    console.prompt(BOOT_LIMIT)?;
    let seconds = (BETWEEN_KILLS * (kills + 1)).as_secs() + 1;
    let (vmm, load, over) = (console.pid(), Load::new(seed, seconds), &AtomicBool::new(false));
    let said = std::thread::scope(|scope| {
        let killer = scope.spawn(move || -> Result<u32> {
            let mut killed = 0;
            for _ in 0..kills {
                std::thread::sleep(BETWEEN_KILLS);
                if let Some(mut old) = serving.take() {
                    old.0.kill()?;
                    old.0.wait()?;
                    serving = Some(backend(stand, &socket, &scratch)?);
                    killed += 1;
                } else if let Some(pid) = processes::children_named(vmm, "atoll-blk").last() {
                    killed += u32::from(processes::signal(*pid, Signal::KILL).is_ok());
                }
            }
            while !over.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(20));
            }
            drop(serving);
            Ok(killed)
        });
        let said = console.run(&load.command(0), Duration::from_secs(seconds) + END_MAX);
        over.store(true, Ordering::Release);
        (said, killer.join().map_err(|_| anyhow::anyhow!("the killer panicked")))
    });
    let (said, killed) = said;
    let hung = said.is_err();
    let text = said.unwrap_or_else(|_| console.transcript.clone());
    let (mut stalls_ms, requests) = stalls(&History::parse(&text));
    let kills = killed??;
    stalls_ms.drain(..stalls_ms.len().saturating_sub(kills as usize));
    Ok(Felt { stand: stand.name(), kills, stalls_ms, requests, hung })
}

/// Measures some stands; prints a table and one line of JSON.
pub fn run(stands: &[Stand], kills: u32, seed: u64) -> Result<()> {
    let reconnect = reconnect()?;
    let mut all = Vec::new();
    println!(
        "| guest on | kills | requests | stalls | slowest ms, median | at most | hung |\n|---|---|---|---|---|---|---|"
    );
    for &stand in stands {
        let felt = measure_in_parts(stand, kills, seed).with_context(|| stand.name())?;
        let at = |index: usize| felt.stalls_ms.get(index).copied().unwrap_or_default();
        let (count, middle) = (felt.stalls_ms.len(), at(felt.stalls_ms.len() / 2));
        let most = at(count.saturating_sub(1));
        let Felt { stand, kills, requests, hung, .. } = &felt;
        println!("| {stand} | {kills} | {requests} | {count} | {middle:.0} | {most:.0} | {hung} |");
        all.push(felt);
    }
    println!(
        "{}",
        serde_json::json!({ "bench": "reconnect", "commit": commit(), "reconnect": reconnect, "seed": seed, "guests": all })
    );
    Ok(())
}
