//! `top`: vCPUs and devices at work. A frame is text, so that `--once` prints just what the screen shows.

use std::fmt::Write;
use std::io::{IsTerminal, Read, stdin, stdout};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use atoll_vmm::config::DeviceKind;
use atoll_vmm::lifecycle::{DeviceReport, QueueReport, VmInfo, VmState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::tcgetwinsize;
use serde::Deserialize;

use crate::figures::Figures;
use crate::operate::print;
use crate::table::{bytes, rate, table, time_us};
use crate::target::{self, Aftermath, Machine, named_or_only};
use crate::terminal::{self, RawTerminal};

/// Time between two frames.
const INTERVAL: Duration = Duration::from_secs(1);

/// A vCPU as the live tree shows it.
#[derive(Debug, Default, Deserialize)]
struct Vcpu {
    #[serde(default)]
    phase: String,
    #[serde(default)]
    instructions: u64,
}

/// The part of the live tree that is shown.
#[derive(Debug, Default, Deserialize)]
struct Tree {
    #[serde(default)]
    cpu: Option<String>,
    #[serde(default)]
    vcpus: std::collections::BTreeMap<String, Vcpu>,
}

/// Everything at one moment.
struct Reading {
    at: Instant,
    info: VmInfo,
    tree: Tree,
    devices: Vec<DeviceReport>,
    figures: Figures,
}

impl Reading {
    fn take(machine: &mut Machine) -> anyhow::Result<Self> {
        Ok(Self {
            info: machine.info()?,
            tree: serde_json::from_value(machine.get("inspect")?)?,
            devices: machine.devices()?,
            figures: Figures::read(&machine.text("/metrics")?),
            at: Instant::now(),
        })
    }

    /// Growth of a figure a second since `earlier`.
    fn rate(&self, earlier: &Self, family: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let now = self.figures.sum(family, labels)?;
        let then = earlier.figures.sum(family, labels).unwrap_or(0.0);
        // A figure that went back belongs to something new of the same name.
        Some((now - if then > now { 0.0 } else { then }) / self.seconds(earlier))
    }

    fn seconds(&self, earlier: &Self) -> f64 {
        self.at.duration_since(earlier.at).as_secs_f64().max(1e-3)
    }
}

fn cells<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

fn vcpu_rows(now: &Reading, then: &Reading) -> Vec<Vec<String>> {
    let mut rows = vec![cells(["VCPU", "PHASE", "EXITS/S", "DOORBELLS/S", "STALLS", "MIPS"])];
    for (name, vcpu) in &now.tree.vcpus {
        let index = name.trim_start_matches("vcpu");
        let of = [("vcpu", index)];
        let before = then.tree.vcpus.get(name).map_or(0, |vcpu| vcpu.instructions);
        let retired = vcpu.instructions.saturating_sub(before) as f64 / now.seconds(then);
        let exits = now.rate(then, "atoll_vcpu_exits_total", &of);
        let bells = now.rate(then, "atoll_vcpu_doorbells_total", &of);
        rows.push(vec![
            name.clone(),
            vcpu.phase.clone(),
            or_dash(exits.map(|exits| rate(exits + bells.unwrap_or(0.0)))),
            or_dash(bells.map(rate)),
            or_dash(now.figures.sum("atoll_vcpu_stalls_total", &of).map(|stalls| format!("{stalls:.0}"))),
            if vcpu.instructions > 0 { format!("{:.0}", retired / 1e6) } else { "-".into() },
        ]);
    }
    rows
}

/// Whether what is in a queue waits for the device; in others are buffers that wait for the world.
fn holds_requests(kind: DeviceKind, queue: u16) -> bool {
    match kind {
        DeviceKind::Net | DeviceKind::Console | DeviceKind::Vsock => queue % 2 == 1,
        _ => true,
    }
}

fn device_rows(now: &Reading, then: &Reading) -> Vec<Vec<String>> {
    let heading = [
        "DEVICE",
        "STATE",
        "RECOVERY",
        "REQ/S",
        "READ/S",
        "WRITE/S",
        "P50",
        "P99",
        "IN FLIGHT",
        "PID",
        "GENERATION",
        "RESTARTS",
    ];
    // A column that most machines have nothing for, and terminals are narrow.
    let spares = now.devices.iter().any(|device| device.standby.is_some());
    let mut heading = cells(heading);
    heading.extend(spares.then(|| "SPARE".to_owned()));
    let mut rows = vec![heading];
    for device in &now.devices {
        let id = device.id.as_str();
        let requests = now.rate(then, "atoll_device_requests_total", &[("device", id)]);
        let moved = |direction| {
            let per_second = now.rate(then, "atoll_device_bytes_total", &[("device", id), ("direction", direction)]);
            or_dash(per_second.map(|per_second| format!("{}B", bytes(per_second as u64))))
        };
        let latency = |share| or_dash(now.figures.latency_us(&then.figures, id, share).map(time_us));
        let holds = |queue: &&QueueReport| holds_requests(device.kind, queue.index);
        let in_flight: u64 = device.queues.iter().filter(holds).map(|queue| u64::from(queue.in_flight)).sum();
        let word = |value: serde_json::Result<serde_json::Value>| {
            value.ok().as_ref().and_then(|value| value.as_str()).unwrap_or("?").to_owned()
        };
        let mut row = vec![
            device.id.clone(),
            word(serde_json::to_value(device.state)),
            word(serde_json::to_value(device.recovery)),
            or_dash(requests.map(rate)),
            moved("read"),
            moved("write"),
            latency(0.5),
            latency(0.99),
            in_flight.to_string(),
            or_dash(device.pid.map(|pid| pid.to_string())),
            device.generation.to_string(),
            device.restarts.to_string(),
        ];
        row.extend(spares.then(|| or_dash(device.standby.map(|spare| word(serde_json::to_value(spare))))));
        rows.push(row);
    }
    rows
}

/// One frame: what happened between two readings.
fn frame(name: &str, now: &Reading, then: &Reading) -> String {
    let state = match now.info.state {
        VmState::Created => "created",
        VmState::Running => "running",
        VmState::Shutdown => "switched off",
        VmState::Paused => "paused",
    };
    let mut text = format!("{name}: {state}");
    if let Some(cpu) = &now.tree.cpu {
        let _ = write!(text, ", cpu {cpu}");
    }
    let _ = writeln!(text, ", memory {}", bytes(now.info.memory_actual_size));
    if !now.tree.vcpus.is_empty() {
        let _ = write!(text, "\n{}", table(&vcpu_rows(now, then), &[2, 3, 4, 5]));
    }
    if !now.devices.is_empty() {
        let _ = write!(text, "\n{}", table(&device_rows(now, then), &[3, 4, 5, 6, 7, 8, 9, 10, 11]));
    }
    let reasons = now.devices.iter().filter_map(|device| {
        let reason = device.reason.clone().or_else(|| device.last_exit.clone())?;
        Some(format!("{}: {reason}\n", device.id))
    });
    let reasons: String = reasons.collect();
    if !reasons.is_empty() {
        let _ = write!(text, "\n{reasons}");
    }
    text
}

/// Waits for the next frame's time; whether the user wants to leave before it.
fn left(limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let rest = until.saturating_duration_since(Instant::now());
        let Ok(rest_spec) = Timespec::try_from(rest) else { return true };
        let input = stdin();
        let mut fds = [PollFd::from_borrowed_fd(input.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&rest_spec)) {
            Ok(0) => return false,
            Ok(_) => {
                let mut keys = [0; 64];
                let count = stdin().read(&mut keys).unwrap_or(0);
                let typed = keys.get(..count).unwrap_or_default();
                // q, Ctrl-C, Escape alone, or no terminal any more.
                if count == 0 || typed.iter().any(|key| b"q\x03".contains(key)) || typed == b"\x1b" {
                    return true;
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

/// The frame as a terminal of this size shows it, over what was there.
fn on_screen(frame: &str, columns: usize, rows: usize) -> String {
    let mut text = String::from("\x1b[H");
    for line in frame.lines().take(rows.saturating_sub(2)) {
        text.extend(line.chars().take(columns));
        text.push_str("\x1b[K\n");
    }
    text.push_str("\x1b[K\nq ends\x1b[K\x1b[J");
    text
}

/// What to say of a machine that answers no more: nothing, when it has ended as it should.
fn end(name: &str, socket: &Path, error: anyhow::Error) -> anyhow::Result<()> {
    terminal::restore();
    match target::aftermath(socket) {
        Aftermath::Ended => print(&format!("{name} has ended\n")),
        Aftermath::Runs => Err(error),
        Aftermath::Vanished => Err(target::vanished(name)),
    }
}

/// `top`.
pub(crate) fn top(name: Option<&str>, once: bool) -> anyhow::Result<()> {
    let name = named_or_only(name)?;
    let socket = target::socket(&name)?;
    let mut machine = Machine::at(&socket)?;
    let mut then = Reading::take(&mut machine)?;
    if once {
        std::thread::sleep(INTERVAL);
        let now = Reading::take(&mut machine)?;
        return print(&frame(&name, &now, &then));
    }
    anyhow::ensure!(
        stdin().is_terminal() && stdout().is_terminal(),
        "top needs a terminal; atoll top --once prints one frame as text"
    );
    terminal::restore_on_signals();
    let _raw = RawTerminal::enter();
    terminal::take_screen();
    let mut shown = frame(&name, &then, &then);
    loop {
        let size = tcgetwinsize(stdout()).map(|size| (usize::from(size.ws_col), usize::from(size.ws_row)));
        let (columns, rows) = size.ok().filter(|(columns, rows)| *columns > 0 && *rows > 0).unwrap_or((80, 24));
        print(&on_screen(&shown, columns, rows))?;
        if left(INTERVAL) {
            return Ok(());
        }
        let now = match Reading::take(&mut machine) {
            Ok(now) => now,
            Err(error) => return end(&name, &socket, error),
        };
        shown = frame(&name, &now, &then);
        then = now;
    }
}

#[cfg(test)]
mod tests {
    use atoll_vmm::config::VmConfig;
    use atoll_vmm::lifecycle::{DeviceState, RecoveryClass};

    use super::*;

    fn reading(at: Instant, requests: u64, instructions: u64) -> Reading {
        let text = format!(
            "atoll_device_requests_total{{device=\"_disk0\",queue=\"0\"}} {requests}\n\
             atoll_device_bytes_total{{device=\"_disk0\",queue=\"0\",direction=\"read\"}} {}\n\
             atoll_device_bytes_total{{device=\"_disk0\",queue=\"0\",direction=\"write\"}} 0\n\
             atoll_device_latency_seconds_bucket{{device=\"_disk0\",queue=\"0\",le=\"0.000064\"}} {requests}\n\
             atoll_vcpu_exits_total{{vcpu=\"0\",access=\"pio_read\",answer=\"inline\"}} {requests}\n",
            requests * 4096
        );
        let device = DeviceReport {
            id: "_disk0".into(),
            kind: DeviceKind::Disk,
            bdf: None,
            state: DeviceState::Running,
            reason: None,
            generation: 2,
            restarts: 1,
            failed_starts: 0,
            upgrade: None,
            link: None,
            recovery: RecoveryClass::Full,
            counted: None,
            pid: Some(77),
            exe: None,
            standby: None,
            jail: std::collections::BTreeMap::new(),
            last_exit: Some("signal 9".into()),
            last_lines: Vec::new(),
            queues: vec![QueueReport { index: 0, size: 128, in_flight: 3, kicks: None, calls: None }],
        };
        let vcpu = Vcpu { phase: "guest".into(), instructions };
        Reading {
            at,
            info: VmInfo { config: VmConfig::default(), state: VmState::Running, memory_actual_size: 512 << 20 },
            tree: Tree { cpu: Some("soft".into()), vcpus: [("vcpu0".to_owned(), vcpu)].into() },
            devices: vec![device],
            figures: Figures::read(&text),
        }
    }

    /// Rates are of the time between the readings, whatever it was.
    #[test]
    fn a_frame_tells_what_happened_since_the_last_one() {
        let start = Instant::now();
        let (then, now) = (reading(start, 1000, 5_000_000), reading(start + 2 * INTERVAL, 5000, 1_300_000_000));
        let text = frame("web", &now, &then);
        let line = |word: &str| {
            let line = text.lines().find(|line| line.starts_with(word)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(line("web"), ["web:", "running,", "cpu", "soft,", "memory", "512M"]);
        assert_eq!(line("vcpu0"), ["vcpu0", "guest", "2.0k", "-", "-", "648"]);
        let disk = ["_disk0", "running", "full", "2.0k", "7.8MB", "0B", "32", "us", "63", "us", "3", "77", "2", "1"];
        assert_eq!(line("_disk0 "), disk);
        assert!(text.ends_with("_disk0: signal 9\n"), "{text}");
        assert!(on_screen(&text, 10, 24).lines().all(|line| line.chars().filter(|c| !c.is_control()).count() < 20));
    }
}
