//! A guest under a load that is judged: a disk in memory, so that nothing but Atoll is slow, and two network cards on one
//! switch, with the verifier on all of them. The disk's history goes out over a virtio console into a file of the host's;
//! the network's two ends, both in the guest, say what they have heard.

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::images::{self, Guest};
use crate::operated::Operated;
use crate::place;
use crate::verify::{self, Load, PROGRAM};
use anyhow::{Context, Result, ensure};
use atoll_verify::blk::{Event, History, Outcome, Verdict, Violation};
use atoll_verify::net::TalkVerdict;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One step in the guest's shell.
pub const STEP: Duration = Duration::from_secs(60);
/// Bytes of the disk under load.
const DISK_BYTES: u64 = 64 << 20;
/// Threads of the load on the disk.
const THREADS: usize = 4;
/// Longer than any part of a run: the load is told when to end.
const SECONDS: u64 = 24 * 60 * 60;
/// What of the console is told of a guest that does not start again.
const QUOTED_BYTES: usize = 8 << 10;
/// Complaints of the guest's log besides those of the verifier: of a clock that is not believed.
const CLOCK_COMPLAINTS: [&str; 3] = ["Clocksource", "clocksource: timekeeping watchdog", "hung_task"];

/// What the verifier says of a load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Judged {
    /// Of the disk, and of the guest's log.
    pub blk: Verdict,
    /// Of the network, in both directions.
    pub net: Vec<TalkVerdict>,
}

impl Judged {
    /// Nothing was found.
    pub fn ok(&self) -> bool {
        self.blk.ok && self.net.len() == 2 && self.net.iter().all(|end| end.ok)
    }
    /// Frames that came, both ways.
    pub fn frames(&self) -> u64 {
        self.net.iter().map(|end| end.heard.frames).sum()
    }
}

/// A process that ends with its owner.
pub struct Ending(pub Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder in memory, where there is one.
pub fn fast_folder() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? })
}

/// A switch with two ports.
pub fn switch(socket: &Path) -> Result<Ending> {
    let mut command = Command::new(place::program("atoll-net")?);
    command.arg("--socket").arg(socket).args(["--switch", "--ports", "2"]).stdin(Stdio::null());
    let switch = Ending(command.spawn()?);
    let deadline = Instant::now() + STEP;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "the switch does not listen at {}", socket.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(switch)
}

/// Takes failures at the end of the lives `own_ends` for what they are: of the guest's kernel, which answers that way what it
/// has not handed to the device. Those requests have happened or not. A request that fails while others still succeed is
/// judged.
fn forgive(history: &mut History, own_ends: &BTreeSet<u64>) {
    // By epoch: how many requests have succeeded since.
    let mut since: BTreeMap<u64, usize> = BTreeMap::new();
    let mut keep = Vec::new();
    for record in std::mem::take(&mut history.records).into_iter().rev() {
        if let Event::Complete(op, outcome, _) = &record.event {
            let since = since.entry(op >> 32).or_default();
            match outcome {
                Outcome::Done => *since += 1,
                // Threads tell of their requests in any order.
                Outcome::Failed(_) if *since < THREADS && own_ends.contains(&(op >> 32)) => continue,
                Outcome::Failed(_) => {}
            }
        }
        keep.push(record);
    }
    keep.reverse();
    history.records = keep;
}

/// What the guest runs on.
#[derive(Clone, Debug)]
pub struct Ground {
    /// Its images.
    pub guest: Guest,
    /// `--cpu` of `atoll run`.
    pub cpu: String,
    /// vCPUs.
    pub vcpus: u32,
    /// The verifier's program for guests.
    pub verifier: PathBuf,
    /// What the guest's kernel is told besides what the load needs.
    pub cmdline: String,
    /// The TAP interfaces of the two cards, between which somebody else has to carry frames; a switch by default.
    pub taps: Option<[String; 2]>,
    /// More arguments of `atoll run`.
    pub more: Vec<String>,
}

impl Ground {
    /// The software CPU of this host.
    pub fn here() -> Result<Self> {
        Ok(Self {
            guest: images::guest("6.1")?,
            cpu: "soft".to_owned(),
            vcpus: 1,
            verifier: verify::program()?,
            cmdline: String::new(),
            taps: None,
            more: Vec::new(),
        })
    }
}

/// The guest.
pub struct Laden {
    /// Its console and its operator's socket.
    pub vm: Operated,
    load: Load,
    history: PathBuf,
    /// How often the cards will be stopped one after the other.
    interruptions: u32,
    /// How often the guest has started again.
    epoch: u32,
    /// The lives that the guest has ended itself.
    own_ends: BTreeSet<u64>,
    /// Complaints of logs of lives that are over.
    complaints: Vec<String>,
    _switch: Option<Ending>,
    _folder: tempfile::TempDir,
}

impl Laden {
    /// Boots the guest; no load yet. A pause stops one card before the other, and a switch has nowhere to put frames for a card
    /// that is stopped: of each of so many `interruptions` a window of frames may be lost, as of a card whose process dies.
    pub fn boot(seed: u64, interruptions: u32) -> Result<Self> {
        Self::boot_on(&Ground::here()?, seed, interruptions)
    }

    /// The same on another CPU, or in another place.
    pub fn boot_on(ground: &Ground, seed: u64, interruptions: u32) -> Result<Self> {
        let guest = &ground.guest;
        let folder = fast_folder()?;
        let root = images::copy_of_disk(guest, folder.path())?;
        verify::put(&ground.verifier, &root)?;
        let disk = folder.path().join("load.img");
        std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
        let socket = folder.path().join("switch.sock");
        let switch = if ground.taps.is_none() { Some(switch(&socket)?) } else { None };
        let history = folder.path().join("history");
        let demo = Demo { series: guest.series.to_owned(), form: KernelForm::Pvh, cpu: ground.cpu.clone() };
        let mut command = demo.command(guest)?;
        for disk in [root, disk] {
            command.arg("--disk").arg(format!("path={}", disk.display()));
        }
        for card in 0..2 {
            let wire = match ground.taps.as_ref().and_then(|taps| taps.get(card)) {
                Some(tap) => format!("tap={tap}"),
                None => format!("switch={}", socket.display()),
            };
            command.arg("--net").arg(format!("{wire},mac=52:54:00:00:00:0{}", card + 1));
        }
        command.arg("--console").arg(format!("file={}", history.display()));
        command.args(["--cmdline", &format!("console=ttyS0 atoll.load=net,console {}", ground.cmdline)]);
        command.args(["--cpus", &format!("boot={}", ground.vcpus)]).args(&ground.more);
        let vm = Operated::spawn(&mut command, folder.path())?;
        let mut load = Load::new(seed, SECONDS);
        load.out = "/dev/hvc0".to_owned();
        let mut laden = Self {
            vm,
            load,
            history,
            interruptions,
            epoch: 0,
            own_ends: BTreeSet::new(),
            complaints: Vec::new(),
            _switch: switch,
            _folder: folder,
        };
        laden.console().prompt(BOOT_LIMIT)?;
        Ok(laden)
    }

    /// The guest's serial port.
    pub fn console(&mut self) -> &mut Console {
        &mut self.vm.console
    }

    fn run(&mut self, command: &str) -> Result<String> {
        self.vm.console.run(command, STEP)
    }

    /// Starts the load in this life of the guest, and waits until it is under way.
    pub fn begin(&mut self) -> Result<()> {
        self.run("mkdir -p /run; mount -t tmpfs none /run; cd /run; ip link set eth0 up; ip link set eth1 up")?;
        let seed = self.load.seed;
        let words = self.load.command(self.epoch);
        self.run(&format!("({words} stop=stop >blk 2>&1; echo $? >blk.over) & true"))?;
        for end in 0..2 {
            let words = format!(
                "{PROGRAM} net interface=eth{end} seed={seed} seconds={SECONDS} me={end} stop=stop deaths={}",
                self.interruptions
            );
            self.run(&format!(
                "({words} >net{end} 2>&1 & echo $! >net{end}.pid; wait $!; echo $? >net{end}.over) & true"
            ))?;
        }
        let before = self.history_bytes();
        let deadline = Instant::now() + STEP;
        while self.history_bytes() == before {
            ensure!(Instant::now() < deadline, "the load tells nothing: {}", self.run("cat blk; dmesg | tail -n 5")?);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// How much has been told of the disk.
    pub fn history_bytes(&self) -> u64 {
        std::fs::metadata(&self.history).map_or(0, |file| file.len())
    }

    /// Takes down what the guest's log has to complain of: before it is gone.
    pub fn listen(&mut self) -> Result<()> {
        let log = self.run("dmesg")?;
        let clock = log.lines().filter(|line| CLOCK_COMPLAINTS.iter().any(|word| line.contains(word)));
        self.complaints.extend(clock.map(str::to_owned));
        self.complaints.extend(verify::quoted_complaints(&log));
        Ok(())
    }

    /// Prepares for a restart by the guest itself. When its kernel shuts down, it breaks the rings under its drivers, and what
    /// is asked of a disk then fails without that disk's having heard of it. So failures at the very end of this life are the
    /// kernel's. The network's load ends before: a driver of the network that is asked to send after that, with frames of before still unreclaimed, looks for
    /// them for ever, with the processor's only thread (Linux 6.1.192: `virtio_dev_shutdown`, `start_xmit`). No device can help
    /// that. Disks go on.
    pub fn hush(&mut self) -> Result<()> {
        self.own_ends.insert(self.epoch.into());
        self.run("kill $(cat net0.pid net1.pid)").map(drop)
    }

    /// The guest starts again: waits for its prompt.
    pub fn reborn(&mut self) -> Result<()> {
        let heard = self.vm.console.expect("Linux version", BOOT_LIMIT).map(drop);
        heard.and_then(|()| self.vm.console.prompt(BOOT_LIMIT)).map_err(|error| {
            let said = &self.vm.console.transcript;
            let from = said.floor_char_boundary(said.len().saturating_sub(QUOTED_BYTES));
            error.context(format!("the guest does not start again; its console: {}", &said[from..]))
        })?;
        self.epoch += 1;
        Ok(())
    }

    /// Ends the load and the machine, and judges all that was told.
    pub fn finish(self) -> Result<Judged> {
        self.finish_after(0)
    }

    /// The same after so many `deaths` of the disk's process.
    pub fn finish_after(mut self, deaths: u64) -> Result<Judged> {
        self.run("touch stop; for end in blk net0 net1; do while [ ! -e $end.over ]; do usleep 20000; done; done")?;
        let mut net = Vec::new();
        for end in 0..2 {
            let said = self.run(&format!("cat net{end}"))?;
            let line = said.lines().find(|line| line.starts_with('{'));
            net.push(serde_json::from_str(line.with_context(|| format!("end {end} gave no verdict: {said}"))?)?);
        }
        let said = self.run("cat blk blk.over")?;
        ensure!(said.trim() == "0", "the load on the disk ended with {said}");
        self.listen()?;
        self.run("mount -o remount,ro /")?;
        self.vm.console.send("poweroff -f\n")?;
        let Self { vm, load, history, complaints, own_ends, .. } = self;
        let (status, errors) = vm.console.wait(STEP)?;
        ensure!(status.success(), "atoll ended with {status}: {errors}");
        let mut history = History::parse(&String::from_utf8_lossy(&std::fs::read(&history)?));
        forgive(&mut history, &own_ends);
        let mut blk = load.judge_history(&history, "", deaths);
        for complaint in complaints {
            blk.find(Violation::GuestLog, format!("the guest's log: {complaint}"));
        }
        Ok(Judged { blk, net })
    }
}

#[cfg(test)]
mod tests {
    use atoll_verify::blk::Record;

    use super::*;

    /// Only failures that nothing has succeeded after, and only in lives that the guest has ended itself.
    #[test]
    fn failures_are_forgiven_at_the_end_of_a_life_only() {
        let done = |op| Record { at_us: 0, event: Event::Complete(op, Outcome::Done, Vec::new()) };
        let failed = |op| Record { at_us: 0, event: Event::Complete(op, Outcome::Failed(5), Vec::new()) };
        let mut records = vec![failed(0)];
        records.extend((1..=4).map(done));
        records.extend([failed(5), failed(1 << 32)]);
        let mut history = History { records, ..History::default() };
        forgive(&mut history, &BTreeSet::from([0]));
        assert!(history.records.contains(&failed(0)), "others have succeeded since");
        assert!(!history.records.contains(&failed(5)));
        assert!(history.records.contains(&failed(1 << 32)), "the operator has ended this life");
    }
}
