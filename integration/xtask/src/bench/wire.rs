//! `cargo xtask bench wire`: TCP and round trips between a guest and the host over a TAP: `atoll-net` with the software CPU
//! beside QEMU's in-process virtio-net with TCG, the same guest, kernel and host's end, in turn.
//!
//! The processor, not our device, must be the limit: what is asked for is no worse than the ratio of the two emulated
//! processors on cold code, which is `bench cpu`'s loop "wide", run here in each round. If ours is R times as fast there,
//! the guest must get at least R times QEMU's throughput, and its round trips may take 1/R of QEMU's. R is mostly more
//! than 1, so that equal is not enough.

use super::spread::Spread;
use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::{images, packages, place, processes, userland, yardstick};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fmt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const TAP: &str = "atollwire0";
const HOST: &str = "10.77.0.1";
const CMDLINE: &str = "console=ttyS0 quiet atoll.load=net";
const STEP: Duration = Duration::from_secs(60);
const PINGS: u32 = 200;
/// Length of the stream in seconds.
const STREAM_S: u32 = 4;

#[derive(Serialize)]
struct Line {
    bench: &'static str,
    rounds: usize,
    /// Speed of our processor to QEMU's on cold code: the least that is asked of `throughput`; its inverse is the most that
    /// is asked of `round_trip`.
    cold_code: Spread,
    round_trip_limit: f64,
    atoll_mbits: Spread,
    qemu_mbits: Spread,
    throughput: Spread,
    atoll_round_trip_ms: Spread,
    qemu_round_trip_ms: Spread,
    round_trip: Spread,
    /// Processor time of all processes for one, the 10 ms of waiting before it included.
    atoll_round_trip_cpu_us: Spread,
    qemu_round_trip_cpu_us: Spread,
    atoll_megabyte_cpu_us: Spread,
    qemu_megabyte_cpu_us: Spread,
    ok: bool,
}

/// The host's end, gone with its owner.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("a TAP interface with an address needs root: run `sudo cargo xtask bench wire`");
        }
        let ip = |line: &str| place::run(Command::new("ip").args(line.split(' ')));
        // One that a run left behind which was killed.
        let _ = Command::new("ip").args(["link", "del", TAP]).stderr(Stdio::null()).status();
        ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr"))?;
        let tap = Self;
        ip(&format!("addr add {HOST}/24 dev {TAP}"))?;
        ip(&format!("link set {TAP} up"))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", TAP]).status();
    }
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn field(text: &str, number: usize) -> Result<f64> {
    let field = text.split_whitespace().nth(number).with_context(|| format!("{text} has no field {number}"))?;
    field.parse().with_context(|| format!("{field} in {text} is no number"))
}

/// What one guest did.
#[derive(Clone, Copy)]
struct Figures {
    /// From guest to host.
    mbits: f64,
    /// The mean.
    round_trip_ms: f64,
    /// Processor time of the VMM and its processes for a round trip, the 10 ms of waiting before it included.
    round_trip_cpu_us: f64,
    /// And for a megabyte.
    megabyte_cpu_us: f64,
}

impl fmt::Display for Figures {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mbits, round_trip_ms, round_trip_cpu_us, megabyte_cpu_us } = self;
        write!(formatter, "{mbits} Mbit/s ({megabyte_cpu_us:.0} us CPU/MB), ")?;
        write!(formatter, "{round_trip_ms} ms ({round_trip_cpu_us:.0} us CPU)")
    }
}

/// Measures one guest from its boot to its end.
fn measure(command: &mut Command) -> Result<Figures> {
    let mut console = Console::spawn(command)?;
    console.prompt(BOOT_LIMIT)?;
    console.run("ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up; sleep 1", STEP)?;
    let busy_us = |console: &Console| processes::processor_ns(console.pid()) as f64 / 1000.0;
    let before = busy_us(&console);
    let ping = console.run(&format!("ping -q -c {PINGS} -i 0.01 {HOST} | tail -1"), STEP)?;
    let round_trip_cpu_us = (busy_us(&console) - before) / f64::from(PINGS);
    let average = ping.split('/').nth(4).with_context(|| format!("{ping} tells no mean"))?;
    let before = busy_us(&console);
    let iperf = console.run(&format!("iperf3 -c {HOST} -t {STREAM_S} -f m | grep receiver"), STEP)?;
    let stream_us = busy_us(&console) - before;
    let rate = iperf.split("Bytes").nth(1).with_context(|| format!("{iperf} tells no rate"))?;
    console.send("poweroff -f\n")?;
    console.wait(STEP)?;
    let mbits = field(rate, 0)?;
    let megabytes = mbits * f64::from(STREAM_S) / 8.0;
    let round_trip_ms = average.parse()?;
    Ok(Figures { mbits, round_trip_ms, round_trip_cpu_us, megabyte_cpu_us: stream_us / megabytes })
}

/// Speed of our processor to QEMU's on cold code, once.
fn cold_code() -> Result<f64> {
    let bench = Command::new(place::program("cpu-bench")?)
        .args(["--loop", "wide", "--rounds", "1"])
        .stderr(Stdio::null())
        .output()
        .context("cannot start cpu-bench")?;
    let text = String::from_utf8_lossy(&bench.stdout);
    // Its exit status is its own verdict.
    let report =
        text.lines().rev().find(|line| line.starts_with('{')).with_context(|| format!("no report in {text}"))?;
    let report: serde_json::Value = serde_json::from_str(report)?;
    report["rows"][0]["ratio_to_qemu"][1].as_f64().with_context(|| format!("{report} tells no ratio"))
}

/// Runs `rounds` pairs; `false` if a figure is missed.
pub fn run(rounds: usize) -> Result<bool> {
    packages::ensure_peers(&["qemu-system-x86_64", "mkfs.ext4"])?;
    packages::ensure_installed("iperf3", &["iperf3"])?;
    let guest = images::guest("6.1")?;
    let pristine = userland::disk()?;
    place::build_programs()?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk.ext4");
    let _tap = Tap::new()?;
    let server = Command::new("iperf3").args(["-s", "-B", HOST]).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let _server = Server(server);
    let (mut ours, mut theirs, mut cold) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds {
        let fresh = || place::run(Command::new("cp").arg("--sparse=always").arg(&pristine).arg(&disk));
        fresh()?;
        let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
        let mut atoll = demo.command(&guest)?;
        atoll.args(["--cmdline", CMDLINE, "--net", &format!("tap={TAP}")]);
        atoll.arg("--disk").arg(format!("path={}", disk.display()));
        let atoll = measure(&mut atoll)?;
        fresh()?;
        let mut qemu = yardstick::qemu(&guest.vmlinux, &guest, CMDLINE);
        qemu.args(["-drive", &format!("file={},if=none,id=d,format=raw", disk.display())])
            .args(["-device", "virtio-blk-pci,drive=d"])
            .args(["-netdev", &format!("tap,id=n,ifname={TAP},script=no,downscript=no")])
            .args(["-device", "virtio-net-pci,netdev=n"]);
        let qemu = measure(&mut qemu)?;
        let speed = cold_code()?;
        eprintln!("round {round}/{rounds}: atoll {atoll}; QEMU {qemu}; cold code {speed}");
        cold.push(speed);
        ours.push(atoll);
        theirs.push(qemu);
    }
    let ratio = |of: fn(&Figures) -> f64| {
        Spread::of(ours.iter().zip(&theirs).map(|(ours, theirs)| of(ours) / of(theirs)).collect())
    };
    let (throughput, round_trip) = (ratio(|guest| guest.mbits), ratio(|guest| guest.round_trip_ms));
    let cold_code = Spread::of(cold);
    let round_trip_limit = 1.0 / cold_code.median;
    eprintln!(
        "throughput {throughput}, at least {:.2}; round trip {round_trip}, at most {round_trip_limit:.2}",
        cold_code.median
    );
    let all = |of: fn(&Figures) -> f64, guests: &[Figures]| Spread::of(guests.iter().map(of).collect());
    let line = Line {
        bench: "wire",
        rounds,
        cold_code,
        round_trip_limit,
        atoll_mbits: all(|guest| guest.mbits, &ours),
        qemu_mbits: all(|guest| guest.mbits, &theirs),
        throughput,
        atoll_round_trip_ms: all(|guest| guest.round_trip_ms, &ours),
        qemu_round_trip_ms: all(|guest| guest.round_trip_ms, &theirs),
        round_trip,
        atoll_round_trip_cpu_us: all(|guest| guest.round_trip_cpu_us, &ours),
        qemu_round_trip_cpu_us: all(|guest| guest.round_trip_cpu_us, &theirs),
        atoll_megabyte_cpu_us: all(|guest| guest.megabyte_cpu_us, &ours),
        qemu_megabyte_cpu_us: all(|guest| guest.megabyte_cpu_us, &theirs),
        ok: throughput.median >= cold_code.median && round_trip.median <= round_trip_limit,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(line.ok)
}
