//! Disks and network cards that come and go under a running Debian guest, over the API, with I/O on each of them and on the
//! disk that stays, all of it judged by the verifier; then a look at what is left: names, descriptors, threads, processes,
//! memory.
//!
//! The history of the disk that stays goes out over a virtio console into a file. Of the one that comes and goes it comes
//! over the serial port, a piece in each cycle, and is judged as one: what a cycle has left behind the next one must find,
//! also when the disk's process was killed in between.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_verify::blk::Verdict;
use atoll_vmm::api::{Client, Events, Method};
use rustix::process::Signal;
use serde::Serialize;
use serde_json::{Value, json};
use xtask::console::Console;
use xtask::demo::BOOT_LIMIT;
use xtask::verify::{self, Load};
use xtask::{images, place, processes};

use crate::peers::Peer;

/// How long one step in the guest, or the way out of a device, may take.
const STEP: Duration = Duration::from_secs(60);
/// Cycles before the first look at what is there: caches and pools are warm then.
const WARM_UP: u32 = 5;
/// What of the plugged disk has a pattern of the host's.
const DISK_BYTES: usize = 2 << 20;
/// Sectors behind it for the verifier.
const JUDGED_SECTORS: u64 = 256;
/// Sectors of the disk that stays.
const STAYING_SECTORS: u64 = 2048;
/// Longer than any run: the load is told when to end.
const SECONDS: u64 = 24 * 60 * 60;
const BLOCK: usize = 4096;
/// What the VMM may grow by in each cycle of the second half, in KiB: less than a page. In the first half it grows by what
/// the CPU decodes of the guest for the first time, and what its allocator keeps.
const GROWTH_KIB_MAX: u64 = 4;
/// Fewer cycles say nothing about memory.
const CYCLES_FOR_MEMORY: u32 = 100;
/// In every such cycle the disk's process is killed just before the disk is pulled out.
const KILLED_EVERY: u32 = 5;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Kernel series.
    pub series: String,
    /// How often a disk and a card go in and out.
    pub count: u32,
    /// What the loads do follows from it.
    pub seed: u64,
}

/// What a VMM holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holdings {
    /// Devices in its configuration, by name.
    pub devices: BTreeSet<String>,
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Child processes.
    pub processes: usize,
    /// Memory of its own, without the guest's RAM and the code decoded from it, in KiB.
    pub memory_kib: u64,
}

/// Milliseconds of one kind of step.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Times {
    /// Half of them were quicker.
    pub median_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Nothing is left and nothing was wrong.
    pub ok: bool,
    /// Kernel in the guest.
    pub kernel: String,
    /// Cycles.
    pub count: u32,
    /// Of them with a backend that was killed first.
    pub killed: u32,
    /// From the request to the answer, disks and cards.
    pub plug: Times,
    /// From the request to the event that the device is gone.
    pub unplug: Times,
    /// What the verifier says of the disk that stayed.
    pub stayed: Verdict,
    /// And of the one that came and went.
    pub plugged: Verdict,
    /// After the warm-up.
    pub before: Holdings,
    /// The memory after half of the cycles, in KiB.
    pub halfway_kib: u64,
    /// After the last cycle.
    pub after: Holdings,
    /// What is wrong.
    pub complaints: Vec<String>,
}

fn times(mut all: Vec<Duration>) -> Times {
    all.sort_unstable();
    let ms = |at: Option<&Duration>| at.map_or(0.0, |time| (time.as_secs_f64() * 1e5).round() / 100.0);
    Times { median_ms: ms(all.get(all.len() / 2)), max_ms: ms(all.last()) }
}

/// A number of directory entries.
fn entries(path: &str) -> usize {
    std::fs::read_dir(path).map_or(0, Iterator::count)
}

/// A guest with its console, its API and its events.
struct Lab {
    console: Console,
    api: Client,
    events: Events,
    image: PathBuf,
    history: PathBuf,
    stayed: Load,
    plugged: Load,
    /// What was told of the disk that comes and goes.
    told: String,
    switch: Peer,
    plugs: Vec<Duration>,
    unplugs: Vec<Duration>,
}

impl Lab {
    fn start(plan: &Plan, folder: &Path) -> Result<Self> {
        let guest = images::guest(&plan.series)?;
        let root = images::copy_of_disk(&guest, folder)?;
        verify::install(&root)?;
        let stays = folder.join("stays.raw");
        File::create(&stays)?.set_len(STAYING_SECTORS * 512)?;
        let history = folder.join("history");
        let image = folder.join("plugged.raw");
        let mut file = File::create(&image)?;
        for block in 0..DISK_BYTES / BLOCK {
            file.write_all(&pattern(block as u64, 0))?;
        }
        file.set_len(DISK_BYTES as u64 + JUDGED_SECTORS * 512)?;
        let switch_socket = folder.join("switch.sock");
        let switch = Peer::start(
            Command::new(place::program("atoll-net")?).arg("--socket").arg(&switch_socket).arg("--switch"),
            &switch_socket,
        )?;
        let socket = folder.join("api.sock");
        let mut command = Command::new(place::program("atoll")?);
        // One heap: what the allocator keeps for each of the threads that come and go is no leak, and looks like one.
        command.env("MALLOC_ARENA_MAX", "1");
        command
            .args(["run", "--cpu", "soft", "--memory", "size=256M", "--serial", "tty"])
            .args(["--cmdline", "console=ttyS0 loglevel=1 cryptomgr.notests atoll.load=net,console"])
            .arg("--kernel")
            .arg(&guest.vmlinux)
            .arg("--initramfs")
            .arg(&guest.initramfs)
            .arg("--api-socket")
            .arg(&socket)
            .arg("--disk")
            .arg(format!("path={}", root.display()))
            .arg("--disk")
            .arg(format!("path={}", stays.display()))
            .arg("--console")
            .arg(format!("file={}", history.display()))
            .arg("--net")
            .arg(format!("vhost_user=true,socket={}", switch_socket.display()));
        let mut console = Console::spawn(&mut command)?;
        console.prompt(BOOT_LIMIT)?;
        let api = Client::connect(&socket)?;
        let events = Client::connect(&socket)?.events()?;
        let load = |seed, device: &str, sectors, out: &str| Load {
            device: device.to_owned(),
            sectors,
            out: out.to_owned(),
            ..Load::new(seed, 0)
        };
        let stayed = Load { seconds: SECONDS, ..load(plan.seed, "/dev/vdb", STAYING_SECTORS, "/dev/hvc0") };
        let plugged = load(plan.seed ^ 1, "/dev/vdc", JUDGED_SECTORS, "/dev/ttyS0");
        let (plugs, unplugs, told) = (Vec::new(), Vec::new(), String::new());
        Ok(Self { console, api, events, image, history, stayed, plugged, told, switch, plugs, unplugs })
    }

    fn run(&mut self, command: &str) -> Result<String> {
        self.console.run(command, STEP)
    }

    fn call(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let answer = self.api.call(method, &format!("/api/v1/{path}"), body);
        Ok(answer.with_context(|| format!("{path} {body:?}"))?.unwrap_or(Value::Null))
    }

    /// Plugs a device in; its name.
    fn plug(&mut self, path: &str, device: &Value) -> Result<String> {
        let begin = Instant::now();
        let answer = self.call(Method::Put, path, Some(device))?;
        self.plugs.push(begin.elapsed());
        let text = |key: &str| answer.get(key).and_then(Value::as_str).map(str::to_owned);
        let (id, bdf) = text("id").zip(text("bdf")).with_context(|| format!("{path} answers {answer}"))?;
        ensure!(bdf.starts_with("0000:00:") && bdf.ends_with(".0") && bdf.len() == 12, "{bdf} is no place on bus 0");
        Ok(id)
    }

    fn ask_to_leave(&mut self, id: &str) -> Result<Instant> {
        let begin = Instant::now();
        self.call(Method::Put, "vm.remove-device", Some(&json!({ "id": id })))?;
        Ok(begin)
    }

    /// Waits until devices are gone, in whatever order.
    fn gone(&mut self, mut waiting: Vec<(String, Instant)>) -> Result<()> {
        let deadline = Instant::now() + STEP;
        while !waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(event) = self.events.next(left)? else { bail!("{waiting:?} are not gone after {STEP:?}") };
            let id = event.properties.get("id").cloned().unwrap_or_default();
            let Some(at) = waiting.iter().position(|(other, _)| *other == id) else { continue };
            match event.event.as_str() {
                "device-removed" => self.unplugs.push(waiting.remove(at).1.elapsed()),
                "device-remains" => bail!("the guest keeps {id}: {:?}", event.properties),
                _ => {}
            }
        }
        Ok(())
    }

    /// The process of a device.
    fn process_of(&mut self, id: &str) -> Result<u32> {
        let devices = self.api.call(Method::Get, "/api/v1/devices", None)?.unwrap_or(Value::Null);
        let list = devices.as_array().cloned().unwrap_or_default();
        let device = list.iter().find(|device| device.get("id").and_then(Value::as_str) == Some(id));
        let pid = device.and_then(|device| device.get("pid")).and_then(Value::as_u64);
        Ok(u32::try_from(pid.with_context(|| format!("no process of {id} in {devices}"))?)?)
    }

    fn holdings(&mut self) -> Result<Holdings> {
        let info = self.call(Method::Get, "vm.info", None)?;
        let config = info.get("config").context("no configuration in vm.info")?;
        let named = |key: &str| {
            let list = config.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
            list.into_iter().filter_map(|device| Some(device.get("id")?.as_str()?.to_owned()))
        };
        let pid = self.console.pid();
        // What the software CPU has decoded grows with what the guest executes, and is bounded on its own.
        let counters = self.call(Method::Get, "vm.counters", None)?;
        let decoded = counters.get("vcpu0").and_then(|vcpu| vcpu.get("code_bytes")).and_then(Value::as_u64);
        let memory_kib = processes::pss_kib(pid, &["memfd:atoll-ram"])?;
        Ok(Holdings {
            devices: named("disks").chain(named("net")).collect(),
            descriptors: entries(&format!("/proc/{pid}/fd")),
            threads: entries(&format!("/proc/{pid}/task")),
            processes: processes::children(pid).len(),
            memory_kib: memory_kib.saturating_sub(decoded.unwrap_or(0) / 1024),
        })
    }

    /// A disk and a card in, I/O on both, and out again, the disk while it is read.
    fn cycle(&mut self, number: u32, killed: &mut u32) -> Result<()> {
        let (image, switch) = (self.image.clone(), self.switch.socket.clone());
        // Every other one is named by whoever plugs it in.
        let mut disk = json!({ "path": image });
        if number.is_multiple_of(2) {
            disk["id"] = json!("data");
        }
        let disk = self.plug("vm.add-disk", &disk)?;
        let net = self.plug("vm.add-net", &json!({ "vhost_user": true, "vhost_socket": switch }))?;
        // The guest reads what the host has written, and writes what the host finds afterwards.
        let at = u64::from(number) % (DISK_BYTES / BLOCK) as u64;
        let sum = self.run(
            "for try in $(seq 100); do [ -b /dev/vdc ] && [ -d /sys/class/net/eth1 ] && break; usleep 20000; done; \
             md5sum < /dev/vdc",
        )?;
        ensure!(sum.starts_with(&md5(&image)?), "the guest reads something else from the plugged disk: {sum}");
        self.run(&format!(
            "printf 'cycle %08d' {number} | dd of=/dev/vdc bs={BLOCK} seek={at} conv=notrunc,fsync 2>/dev/null"
        ))?;
        let mut block = [0; 14];
        File::open(&image)?.read_exact_at(&mut block, at * BLOCK as u64)?;
        let wanted = format!("cycle {number:08}");
        ensure!(block == wanted.as_bytes(), "a flushed write of cycle {number} is not in the image");
        let first = DISK_BYTES / 512;
        let words = self.plugged.command(number);
        let told = self.run(&format!("{words} first={first}"))?;
        self.told += &told;
        self.told.push('\n');
        // What one card sends, the other one receives, by way of the switch.
        let heard = self.run(
            "read before < /sys/class/net/eth0/statistics/rx_packets; ip link set eth1 up; \
             ip addr add 10.9.0.2/24 dev eth1; ping -q -c 1 -W 1 -I eth1 10.9.0.99 >/dev/null; \
             for try in $(seq 50); do read after < /sys/class/net/eth0/statistics/rx_packets; \
             [ $after -gt $before ] && break; usleep 20000; done; echo $((after - before))",
        )?;
        ensure!(heard.trim().parse::<i64>().is_ok_and(|heard| heard > 0), "eth0 hears nothing of eth1: {heard}");
        // Out, while the disk is read as fast as it goes.
        self.run("(while dd if=/dev/vdc of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done) & busy=$!")?;
        if number % KILLED_EVERY == KILLED_EVERY - 1 {
            processes::signal(self.process_of(&disk)?, Signal::KILL)?;
            *killed += 1;
        }
        let asked = [self.ask_to_leave(&net)?, self.ask_to_leave(&disk)?];
        self.gone([net, disk].into_iter().zip(asked).collect())?;
        self.run("wait $busy; [ ! -e /dev/vdc ] && [ ! -e /sys/class/net/eth1 ]")?;
        Ok(())
    }
}

/// A block that says where it is.
fn pattern(block: u64, salt: u64) -> Vec<u8> {
    let words = (0..BLOCK as u64 / 8).map(|word| (block << 32 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt);
    words.flat_map(u64::to_le_bytes).collect()
}

fn md5(path: &Path) -> Result<String> {
    let output = Command::new("md5sum").arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().map(str::to_owned).context("md5sum says nothing")
}

/// Does it all.
///
/// # Errors
/// When a step fails; what is left at the end is in the outcome.
pub fn run(plan: &Plan, progress: impl Fn(u32)) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let mut lab = Lab::start(plan, folder.path())?;
    let kernel = lab.run("uname -r")?;
    lab.run("ip link set eth0 up")?;
    let load = lab.stayed.command(0);
    lab.run(&format!("({load} stop=/end 2>/said; echo $? >/over; touch /told) & true"))?;
    let mut killed = 0;
    let warm_up = WARM_UP.min(plan.count / 2);
    let mut before = None;
    let (half, mut halfway_kib) = (plan.count / 2, 0);
    for number in 0..plan.count {
        if number == warm_up {
            before = Some(lab.holdings()?);
        }
        if number == half {
            halfway_kib = lab.holdings()?.memory_kib;
        }
        lab.cycle(number, &mut killed).with_context(|| format!("cycle {number}"))?;
        progress(number + 1);
    }
    let after = lab.holdings()?;
    let before = before.unwrap_or_else(|| after.clone());
    let ended =
        lab.run("touch /end; for try in $(seq 1500); do [ -e /told ] && break; usleep 20000; done; cat /said /over")?;
    let log = lab.run("dmesg")?;
    let mut complaints = Vec::new();
    if ended.trim() != "0" {
        complaints.push(format!("the load on the disk that stayed ended with {ended}"));
    }
    if after.devices != before.devices {
        complaints.push(format!("devices: {:?} before, {:?} after", before.devices, after.devices));
    }
    let counts = [
        ("descriptors", before.descriptors, after.descriptors),
        ("threads", before.threads, after.threads),
        ("processes", before.processes, after.processes),
    ];
    for (what, before, after) in counts {
        if after > before {
            complaints.push(format!("{what}: {before} before, {after} after"));
        }
    }
    // A leak shows in the whole and in the second half; pages that the host took back and gave again show in one of them.
    let grew = |from: u64, cycles| after.memory_kib.saturating_sub(from) >= GROWTH_KIB_MAX * u64::from(cycles);
    let leaks = grew(before.memory_kib, plan.count) && grew(halfway_kib, plan.count - half);
    if plan.count >= CYCLES_FOR_MEMORY && leaks {
        complaints.push(format!("memory: {halfway_kib} KiB after {half} cycles, {} KiB at the end", after.memory_kib));
    }
    lab.run("mount -o remount,ro /")?;
    lab.console.send("poweroff -f\n")?;
    let Lab { console, plugs, unplugs, history, stayed, plugged, told, .. } = lab;
    let (status, errors) = console.wait(STEP)?;
    if !status.success() {
        complaints.push(format!("atoll ended with {status}: {errors}"));
    }
    // A disk that is pulled out while it is read has failed the reader.
    let log: String = log.lines().filter(|line| !line.contains("dev vdc")).map(|line| format!("{line}\n")).collect();
    let stayed = stayed.judge(&String::from_utf8_lossy(&std::fs::read(&history)?), &log, 0);
    let plugged = plugged.judge(&told, "", killed.into());
    for (which, verdict) in [("stayed", &stayed), ("came and went", &plugged)] {
        if !verdict.ok {
            complaints.push(format!("the disk that {which}: {:?}", verdict.findings));
        }
    }
    Ok(Outcome {
        ok: complaints.is_empty(),
        kernel,
        count: plan.count,
        killed,
        plug: times(plugs),
        unplug: times(unplugs),
        stayed,
        plugged,
        before,
        halfway_kib,
        after,
        complaints,
    })
}
