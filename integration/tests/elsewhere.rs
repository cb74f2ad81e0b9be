//! A device elsewhere: a serial port in a process of its own, asked over the bus by the thread of a vCPU.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_devices::{Answer, RegisterDevice, Wire, WireSink};
use atoll_integration::processes;
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{Generation, RegionIndex};
use atoll_vmm::actor::remote::RemoteRegion;
use atoll_vmm::actor::{Parked, RealClock, StopSignal, park_access};
use atoll_vmm::backend::{Household, RegisterBackend, UartBuilder, UartLine, UartOutput};
use rustix::process::Signal;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;
use xtask::operated::Operated;

const STEP: Duration = Duration::from_secs(20);
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_STATUS: u64 = 5;
const SCRATCH: u64 = 7;

/// The level of the board's wire, as it changed.
#[derive(Default)]
struct Levels(Mutex<Vec<bool>>);

impl WireSink for Levels {
    fn set_level(&self, _line: u32, high: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(high);
    }
}

impl Levels {
    fn now(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last().copied().unwrap_or(false)
    }
}

/// A vCPU's thread, as far as the bus can tell.
struct Vcpu {
    registers: RemoteRegion,
    clock: RealClock,
    stop: StopSignal,
}

impl Vcpu {
    fn wait(&self, answer: Answer) -> Option<u64> {
        let Answer::Later(later) = answer else { return None };
        match park_access(later, &self.clock, STEP, &self.stop) {
            Parked::Done(value) => value,
            Parked::Late | Parked::Stopped => panic!("the device's own deadline comes first"),
        }
    }

    /// IN: what nobody answers is all ones.
    fn read(&mut self, register: u64) -> u8 {
        let answer = self.registers.read(register, &mut [0]);
        self.wait(answer).map_or(0xff, |value| value as u8)
    }

    /// OUT.
    fn write(&mut self, register: u64, value: u8) {
        let answer = self.registers.write(register, &[value]);
        let _ = self.wait(answer);
    }
}

/// Children are found by their name, so one test at a time has any.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Bench {
    household: Arc<Household>,
    backend: RegisterBackend,
    vcpu: Vcpu,
    levels: Arc<Levels>,
    story: heard::Story,
    folder: tempfile::TempDir,
    /// Let go of last.
    _turn: std::sync::MutexGuard<'static, ()>,
}

/// The supervisor's story with a deadline.
mod heard {
    use super::*;

    pub(super) struct Story(Box<dyn FnMut() -> Option<LifecycleEvent>>);

    impl Story {
        pub(super) fn of(household: &Household) -> Self {
            let mut receiver = household.story();
            Self(Box::new(move || receiver.try_recv().ok()))
        }

        /// Waits until it is told.
        pub(super) fn until(&mut self, wanted: impl Fn(&LifecycleEvent) -> bool) -> Result<LifecycleEvent> {
            let start = Instant::now();
            let mut heard = Vec::new();
            while start.elapsed() < STEP {
                match (self.0)() {
                    Some(event) if wanted(&event) => return Ok(event),
                    Some(event) => heard.push(event),
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            bail!("the supervisor only heard {heard:?}")
        }
    }
}

impl Bench {
    fn new() -> Result<Self> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let household = Arc::new(Household::new(Arc::new(RealClock::new()))?);
        let story = heard::Story::of(&household);
        let folder = tempfile::tempdir()?;
        let levels = Arc::new(Levels::default());
        let line = UartLine::open(&UartOutput::File(folder.path().join("serial")))?;
        let builder =
            UartBuilder::new(Arc::new(line), Arc::clone(&household)).binary(xtask::place::program("atoll-uart")?);
        let process = builder.process(Wire::new(Arc::clone(&levels) as Arc<dyn WireSink>, 3))?;
        let backend = RegisterBackend::start(process, &household)?;
        let registers = backend.remote().region(RegionIndex(0)).context("a port has registers")?;
        let vcpu = Vcpu { registers, clock: RealClock::new(), stop: StopSignal::new() };
        Ok(Self { _turn, household, backend, vcpu, levels, story, folder })
    }

    fn process(&self) -> Result<u32> {
        processes::child_named(std::process::id(), "atoll-uart", STEP)
    }

    fn printed(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder.path().join("serial"))?)
    }

    fn wait_serving(&mut self, generation: u64) -> Result<()> {
        let generation = Generation(generation);
        self.story.until(
            |event| matches!(event, LifecycleEvent::DeviceReady { generation: ready, .. } if *ready == generation),
        )?;
        let start = Instant::now();
        while !self.backend.remote().is_attached() {
            ensure!(start.elapsed() < STEP, "{generation} was not attached");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The whole round trip and everything that can happen to it. Registers are read and written, a character gets out, the
/// transmitter interrupts. The process is killed in the middle of an access: the access reads all ones at once, the
/// wire goes low, a successor serves. It is stopped in the middle of another one: all ones by the deadline, the
/// supervisor hears of the stall, a successor serves. In the end nobody is left.
#[test]
fn a_serial_port_elsewhere_lives_through_everything() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.wait_serving(1)?;
    assert_eq!(bench.vcpu.read(LINE_STATUS), 0x60, "the transmitter is empty");
    bench.vcpu.write(SCRATCH, 0xa5);
    assert_eq!(bench.vcpu.read(SCRATCH), 0xa5);
    for character in *b"one " {
        bench.vcpu.write(DATA, character);
    }
    assert_eq!(bench.printed()?, "one ");
    assert!(!bench.levels.now());
    bench.vcpu.write(INTERRUPT_ENABLE, 2);
    assert!(bench.levels.now(), "the interrupt is there when the access is done");
    assert_eq!(bench.vcpu.read(INTERRUPT_ID) & 0x0f, 2);
    assert!(!bench.levels.now());
    bench.vcpu.write(DATA, b'!');
    assert!(bench.levels.now());

    // Stopped first, so that the access is certainly in its hands when it is killed.
    let victim = bench.process()?;
    processes::signal(victim, Signal::STOP)?;
    let asked = Instant::now();
    let answer = bench.vcpu.registers.read(LINE_STATUS, &mut [0]);
    processes::signal(victim, Signal::KILL)?;
    assert_eq!(bench.vcpu.wait(answer), None, "all ones");
    assert!(asked.elapsed() < Duration::from_millis(900), "a death is seen at once, not at the deadline");
    bench.story.until(|event| matches!(event, LifecycleEvent::DeviceDied { generation: Generation(1), .. }))?;
    bench.wait_serving(2)?;
    assert!(!bench.levels.now(), "a dead device holds no wire");
    assert_eq!((bench.vcpu.read(SCRATCH), bench.vcpu.read(LINE_STATUS)), (0, 0x60), "registers after power-on");

    let victim = bench.process()?;
    processes::signal(victim, Signal::STOP)?;
    let asked = Instant::now();
    assert_eq!(bench.vcpu.read(LINE_STATUS), 0xff);
    assert!(asked.elapsed() >= Duration::from_millis(900), "it had its second");
    bench.story.until(|event| matches!(event, LifecycleEvent::DeviceStalled { generation: Generation(2), .. }))?;
    bench.wait_serving(3)?;
    for character in *b"two" {
        bench.vcpu.write(DATA, character);
    }
    assert_eq!(bench.printed()?, "one !two", "the successor goes on at the end");

    let last = bench.process()?;
    bench.backend.stop(Instant::now() + STEP);
    processes::wait_gone(last, STEP)?;
    let start = Instant::now();
    assert_eq!(bench.vcpu.read(LINE_STATUS), 0xff);
    assert!(start.elapsed() < STEP);
    bench.household.shutdown(STEP);
    Ok(())
}

/// Accesses that are asked between two incarnations wait for the successor: a guest that writes while the process is
/// killed again and again is never kept for longer than a restart.
#[test]
fn accesses_wait_for_the_successor() -> Result<()> {
    let mut bench = Bench::new()?;
    for generation in 1..=5 {
        bench.wait_serving(generation)?;
        bench.vcpu.write(SCRATCH, 1);
        processes::signal(bench.process()?, Signal::KILL)?;
        bench.story.until(|event| matches!(event, LifecycleEvent::DeviceDied { .. }))?;
        assert_eq!(bench.vcpu.read(SCRATCH), 0, "answered by the successor, whose registers are new");
    }
    let counts = bench.backend.remote().counts();
    assert_eq!((counts.stalled, counts.stale), (0, 0), "{counts:?}");
    bench.household.shutdown(STEP);
    Ok(())
}

/// A reset of the guest takes the machine down and builds it again, with the same household. The end of the old process
/// was once judged as that of the new one, which then was never restarted: both were generation 1.
#[test]
fn a_reset_is_no_crash_and_crashes_after_it_count() -> Result<()> {
    let mut bench = Bench::new()?;
    for round in 0..3 {
        bench.backend.stop(Instant::now() + STEP);
        let line = UartLine::open(&UartOutput::File(bench.folder.path().join("serial")))?;
        let process = UartBuilder::new(Arc::new(line), Arc::clone(&bench.household))
            .binary(xtask::place::program("atoll-uart")?)
            .process(Wire::new(Arc::clone(&bench.levels) as Arc<dyn WireSink>, 3))?;
        bench.backend = RegisterBackend::start(process, &bench.household)?;
        bench.vcpu.registers = bench.backend.remote().region(RegionIndex(0)).context("a port has registers")?;
        bench.wait_serving(2 + 2 * round)?;
        processes::signal(bench.process()?, Signal::KILL)?;
        bench.wait_serving(3 + 2 * round)?;
        // An access may be answered too late on a busy machine, as all ones; the port is there all the same.
        let deadline = Instant::now() + STEP;
        while bench.vcpu.read(LINE_STATUS) != 0x60 {
            ensure!(Instant::now() < deadline, "round {round}: the port does not answer");
        }
    }
    bench.household.shutdown(STEP);
    Ok(())
}

/// The same as a guest sees it: Linux finds the port, prints to it, and goes on printing while its process is killed.
#[test]
fn a_guest_prints_to_a_port_elsewhere() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let printed = folder.path().join("ttyS1");
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--serial2").arg(format!("file={}", printed.display()));
    let mut vm = Operated::spawn(&mut command, folder.path())?;
    let console = &mut vm.console;
    console.prompt(BOOT_LIMIT)?;
    let found = console.run("dmesg | grep ttyS1", STEP)?;
    ensure!(found.contains("is a 16550A"), "{found}");
    let mut expected = String::new();
    for round in 0..3 {
        console.run(&format!("echo round {round} > /dev/ttyS1"), STEP)?;
        expected.push_str(&format!("round {round}\r\n"));
        processes::signal(processes::child_named(console.pid(), "atoll-uart", STEP)?, Signal::KILL)?;
    }
    // The operator hears of it as of any device that is a process.
    let deadline = Instant::now() + STEP;
    loop {
        let devices = vm.get("devices")?;
        let port = devices.as_array().and_then(|all| all.iter().find(|device| device["id"] == "serial1"));
        let port = port.with_context(|| format!("it is not listed: {devices}"))?;
        ensure!(port["kind"] == "uart" && port["recovery"] == "idle-only", "{port}");
        if port["restarts"] == 3 && port["state"] == "running" && port["pid"].is_u64() {
            ensure!(port["last_exit"].as_str().is_some_and(|exit| exit.contains("signal 9")), "{port}");
            break;
        }
        ensure!(Instant::now() < deadline, "it stays {port}");
        std::thread::sleep(Duration::from_millis(5));
    }
    // A reset makes a new board, and keeps the process like those of all other devices.
    let before = processes::child_named(vm.console.pid(), "atoll-uart", STEP)?;
    vm.put("vm.reboot", None)?;
    vm.console.prompt(BOOT_LIMIT)?;
    vm.console.run("echo after > /dev/ttyS1", STEP)?;
    expected.push_str("after\r\n");
    assert_eq!(processes::child_named(vm.console.pid(), "atoll-uart", STEP)?, before);
    vm.console.send("poweroff -f\n")?;
    let (status, errors) = vm.console.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    assert_eq!(std::fs::read_to_string(&printed)?, expected);
    Ok(())
}
