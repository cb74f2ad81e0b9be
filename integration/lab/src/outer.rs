//! The lab's machine: QEMU's software emulation of an AMD processor with SVM, a console and a line for reports.
//!
//! One processor: the emulation of several has been seen to break the kernel inside. The kernel is told how fast the
//! counter runs, because calibrating it on a busy host goes wrong.
//!
//! The emulator (QEMU 7.2) sometimes forgets that its local APIC has an interrupt for a processor that runs a guest: the
//! interrupt stands in the APIC's request register, the guest runs on, and if it waits with interrupts off for another vCPU,
//! it does so for ever. Any other interrupt reminds the emulator; so a key is pressed twenty times a second.
#![allow(unsafe_code, reason = "reading the processor's time stamp counter; a child that ends with its parent")]

use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::freight::Freight;
use crate::report::{Line, Report};
use crate::{ending, hardware};

/// A word on the console when all scenarios have been run.
const DONE: &str = "lab: the agent ended with 0";
/// Lines of the console that are shown when something is wrong.
const QUOTED_LINES: usize = 60;

/// How long the machine may say nothing at all: its kernel gives every process its turn each second, whatever Atoll does.
const STILL_LIMIT: Duration = Duration::from_secs(90);

/// What is wrong with the lab itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The machine has stopped altogether, its kernel included.
    #[error("the lab's machine has stood still for {} s: its emulator has lost an interrupt", .0.as_secs())]
    Still(Duration),
    /// A scenario has not come to its end, though the machine runs.
    #[error("no scenario has ended within {} s", .0.as_secs())]
    Late(Duration),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// What came of one outer machine.
pub struct Outcome {
    /// What its scenarios said.
    pub reports: Vec<Report>,
    /// What is wrong with the lab itself.
    pub fault: Option<Fault>,
    /// The end of its console.
    pub console: String,
}

/// How many thousand times a second the host's time stamp counter ticks.
fn counter_khz() -> u64 {
    let read = || {
        // SAFETY: the instruction reads a counter; every x86-64 processor has it.
        unsafe { std::arch::x86_64::_rdtsc() }
    };
    // Both clocks at the same moment: of many pairs the one with the least between its two readings of the counter.
    let pair = || {
        let one = || {
            let (before, now) = (read(), Instant::now());
            (read().wrapping_sub(before), before, now)
        };
        (0..1000).map(|_| one()).min_by_key(|(between, ..)| *between).unwrap_or_else(one)
    };
    let (_, first, begin) = pair();
    std::thread::sleep(Duration::from_millis(200));
    let (_, last, end) = pair();
    let elapsed = end - begin;
    u64::try_from(u128::from(last.wrapping_sub(first)) * 1_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// Has the kernel end this process with the thread that has started it, in case that one is killed.
fn end_with_parent() -> std::io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

struct Machine(Child);

/// Reminds the emulator of pending interrupts.
struct Reminder(Option<UnixStream>);

impl Reminder {
    /// Presses a key that types nothing.
    fn remind(&mut self, monitor: &Path) {
        if self.0.is_none() {
            // The emulator may not listen yet; then the next time.
            self.0 = UnixStream::connect(monitor).ok().filter(|stream| stream.set_nonblocking(true).is_ok());
        }
        let Some(stream) = &mut self.0 else { return };
        let mut answer = [0; 4096];
        while matches!(stream.read(&mut answer), Ok(1..)) {}
        // A full socket means that reminders are on their way.
        let _ = stream.write(b"sendkey shift 1\n");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn monitor_beside(console: &Path) -> PathBuf {
    console.with_file_name("monitor")
}

fn start(freight: &Freight, scenarios: &[String], console: &Path, reports: &Path, errors: &Path) -> Result<Machine> {
    let monitor = monitor_beside(console);
    let khz = counter_khz();
    let passes = hardware::wanted(scenarios);
    let passed = if passes { hardware::CMDLINE } else { "" };
    let devices = match (passes, console.parent()) {
        (true, Some(folder)) => hardware::arguments(folder)?,
        _ => Vec::new(),
    };
    let cmdline = format!(
        "console=ttyS0 no_timer_check nokaslr mitigations=off tsc=reliable tsc_early_khz={khz} panic=-1 quiet reboot=t \
         {passed} lab.run={}",
        scenarios.join(",")
    );
    let disk = |path: &Path, id: &str| {
        let path = path.display();
        [
            "-drive".to_owned(),
            format!("file={path},format=raw,readonly=on,if=none,id={id}"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={id}"),
        ]
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=multi,tb-size=512",
            "-cpu",
            "EPYC-Rome,+svm",
            "-smp",
            "1",
            "-m",
            "3G",
        ])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", &format!("file:{}", console.display()), "-serial", &format!("file:{}", reports.display())])
        .args(["-monitor", &format!("unix:{},server,nowait", monitor.display())])
        .args(disk(&freight.tools, "tools"))
        .args(disk(&freight.programs, "programs"))
        .args(devices)
        .arg("-kernel")
        .arg(&freight.kernel)
        .arg("-initrd")
        .arg(&freight.initramfs)
        .args(["-append", &cmdline])
        .stdin(Stdio::null())
        // It warns of each feature of the processor that it does not emulate.
        .stderr(std::fs::File::create(errors)?);
    // SAFETY: it makes one system call and allocates nothing.
    unsafe { command.pre_exec(end_with_parent) };
    Ok(Machine(command.spawn().context("cannot start qemu-system-x86_64")?))
}

/// Runs the scenarios in one machine, of which each has `within`, and its boot too; `heard` is told of each report as it comes.
///
/// # Errors
/// When the machine cannot be started, or a signal ends the lab.
pub fn run(
    freight: &Freight,
    scenarios: &[String],
    folder: &Path,
    within: Duration,
    mut heard: impl FnMut(&Report),
) -> Result<Outcome> {
    let (console, lines, errors) = (folder.join("console"), folder.join("reports"), folder.join("errors"));
    for path in [&console, &lines] {
        std::fs::File::create(path)?;
    }
    let mut deadline = Instant::now() + within;
    let mut heard_last = Instant::now();
    let mut machine = start(freight, scenarios, &console, &lines, &errors)?;
    let mut reader = BufReader::new(std::fs::File::open(&lines)?);
    let mut line = String::new();
    let mut reports = Vec::new();
    let mut reminder = Reminder(None);
    let mut fault = None;
    loop {
        ending::check()?;
        let ended = machine.0.try_wait()?;
        // What was written before the end is read after it was seen.
        while reader.read_line(&mut line)? > 0 {
            if !line.ends_with('\n') {
                break;
            }
            heard_last = Instant::now();
            match Line::read(&line) {
                Ok(Line::Pulse) => {}
                Ok(Line::Report(report)) => {
                    heard(&report);
                    deadline = Instant::now() + within;
                    reports.push(report);
                }
                Err(error) => fault = Some(Fault::Other(format!("{error:#}"))),
            }
            line.clear();
        }
        if let Some(status) = ended {
            if !status.success() {
                let said = std::fs::read_to_string(&errors).unwrap_or_default();
                let last = said.lines().rfind(|line| !line.contains("TCG doesn't support"));
                fault = Some(Fault::Other(format!("QEMU ended with {status}: {}", last.unwrap_or_default())));
            }
            break;
        }
        if heard_last.elapsed() >= STILL_LIMIT {
            fault = Some(Fault::Still(STILL_LIMIT));
            break;
        }
        if Instant::now() >= deadline {
            fault = Some(Fault::Late(within));
            break;
        }
        reminder.remind(&monitor_beside(&console));
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(machine);
    let said = tail(&console)?;
    if fault.is_none() && !said.contains(DONE) {
        fault = Some(Fault::Other("the lab's agent did not come to its end".into()));
    }
    let missing: Vec<&str> = scenarios
        .iter()
        .filter(|name| !reports.iter().any(|report| report.scenario == **name))
        .map(String::as_str)
        .collect();
    if fault.is_none() && !missing.is_empty() {
        fault = Some(Fault::Other(format!("no report of {}", missing.join(", "))));
    }
    Ok(Outcome { reports, fault, console: said })
}

fn tail(path: &Path) -> Result<String> {
    const MOST: u64 = 64 << 10;
    let mut file = std::fs::File::open(path)?;
    let from = file.metadata()?.len().saturating_sub(MOST);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    if lines.is_empty() {
        bail!("the lab's machine said nothing at all");
    }
    Ok(lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n"))
}
