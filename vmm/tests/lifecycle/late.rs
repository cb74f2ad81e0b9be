//! Steps that are late: undone, named, and the machine runs on.

use std::error::Error as StdError;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_devices::{Answer, Completion, RegisterDevice, access};
use atoll_vmm::cpu::Space;
use atoll_vmm::machine::boot::BootSource;
use atoll_vmm::machine::layout::Span;
use atoll_vmm::machine::{
    Board, BuildError, BuiltDevice, CpuKind, DeviceBuilder, DeviceLife, EventSender, EventSink, LifeError, Machine,
    MachineConfig, MachineEvent, PauseLimits, chipset,
};
use iced_x86::code_asm::{CodeAssembler, al, dx, edx};

use super::bench::{PATIENCE, count};
use super::kernel::kernel;

/// A port that nobody else has.
const PORT: u16 = 0x500;
const SHORT: Duration = Duration::from_millis(200);
const LIMITS: PauseLimits = PauseLimits { vcpus: SHORT, device: SHORT, interrupts: PATIENCE };

struct Deaf;
impl EventSink for Deaf {
    fn happened(&self, _event: MachineEvent) {}
}

/// What a test knows of a device.
#[derive(Clone, Default)]
struct Known {
    drains: Arc<AtomicBool>,
    pauses: Arc<AtomicU32>,
    resumes: Arc<AtomicU32>,
}

struct Fake {
    name: &'static str,
    known: Known,
}

impl DeviceBuilder for Fake {
    fn name(&self) -> String {
        self.name.into()
    }
    fn build(self: Box<Self>, _board: &mut Board) -> Result<BuiltDevice, BuildError> {
        Ok(BuiltDevice { name: self.name.into(), place: None, life: self })
    }
}

impl DeviceLife for Fake {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        Ok(())
    }
    fn pause(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        if self.known.drains.load(Ordering::SeqCst) {
            self.known.pauses.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
        let source: Box<dyn StdError + Send + Sync> = "3 requests are in flight".into();
        Err(LifeError { device: self.name.into(), step: "pause", source })
    }
    fn resume(&mut self) -> Result<(), LifeError> {
        self.known.resumes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A register whose answer the test gives.
#[derive(Default)]
struct Slow(Arc<Mutex<Vec<Completion>>>);

impl RegisterDevice for Slow {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Answer {
        let (completion, deferred) = access::deferred();
        self.0.lock().unwrap().push(completion);
        Answer::Later(deferred)
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) -> Answer {
        Answer::Now
    }
}

struct SlowBuilder(Arc<Mutex<Vec<Completion>>>);

impl DeviceBuilder for SlowBuilder {
    fn name(&self) -> String {
        "slow".into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let span = Span { start: u64::from(PORT), len: 1 };
        board.add_registers("slow", Space::Pio, span, Slow(self.0)).map_err(|error| BuildError::new("slow", error))?;
        Ok(BuiltDevice { name: "slow".into(), place: None, life: Box::new(atoll_vmm::machine::Passive) })
    }
}

fn machine(builders: Vec<Box<dyn DeviceBuilder>>, write: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let folder = tempfile::tempdir().unwrap();
    let boot = BootSource { kernel: kernel(folder.path(), write), initramfs: None, command_line: String::new() };
    let config = MachineConfig {
        boot,
        memory_bytes: 32 << 20,
        irqchip: Default::default(),
        vcpus: 1,
        cpu: CpuKind::Soft,
        cpu_model: "atoll-v1".into(),
        deterministic: None,
        com1: false,
    };
    let mut all = chipset();
    all.extend(builders);
    let mut machine = Machine::build(&config, all, &EventSender::new(Arc::new(Deaf))).unwrap();
    machine.start().unwrap();
    machine
}

fn instructions(machine: &Machine) -> u64 {
    machine.vcpu_reports()[0].instructions
}

/// A device that does not drain is named. All that were asked are told to go on, and the guest does.
#[test]
fn a_device_that_does_not_drain_is_named() {
    let (quick, sloth) = (Known::default(), Known::default());
    quick.drains.store(true, Ordering::SeqCst);
    // Devices pause in the reverse order of their building.
    let builders: Vec<Box<dyn DeviceBuilder>> = vec![
        Box::new(Fake { name: "sloth", known: sloth.clone() }),
        Box::new(Fake { name: "quick", known: quick.clone() }),
    ];
    let mut machine = machine(builders, count);
    let error = machine.pause(LIMITS).unwrap_err().to_string();
    for word in ["pause: sloth did not drain within 0.2 s", "3 requests are in flight", "the machine runs on"] {
        assert!(error.contains(word), "{error}");
    }
    let counts = |known: &Known| (known.pauses.load(Ordering::SeqCst), known.resumes.load(Ordering::SeqCst));
    assert_eq!((counts(&quick), counts(&sloth)), ((1, 1), (0, 1)));
    let before = instructions(&machine);
    std::thread::sleep(Duration::from_millis(20));
    assert!(instructions(&machine) > before, "the guest does not run on");

    sloth.drains.store(true, Ordering::SeqCst);
    let figures = machine.pause(LIMITS).unwrap();
    assert_eq!(figures.devices.iter().map(|(name, _)| name.as_str()).take(2).collect::<Vec<_>>(), ["quick", "sloth"]);
    machine.resume().unwrap();
    assert_eq!((counts(&quick), counts(&sloth)), ((2, 2), (1, 2)));
}

/// A vCPU in the middle of an access is not torn out of it: the pause waits for the device, or is given up.
#[test]
fn an_access_is_never_half_done() {
    let asked = Arc::<Mutex<Vec<Completion>>>::default();
    let mut machine = machine(vec![Box::new(SlowBuilder(Arc::clone(&asked)))], |code| {
        code.mov(edx, u32::from(PORT)).unwrap();
        code.in_(al, dx).unwrap();
        count(code);
    });
    let deadline = Instant::now() + PATIENCE;
    while asked.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the guest does not ask");
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = machine.pause(LIMITS).unwrap_err().to_string();
    assert!(error.contains("vcpu0 did not stop within 0.2 s") && error.contains("runs on"), "{error}");
    let completion = asked.lock().unwrap().pop().unwrap();
    let answer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        completion.complete(7);
    });
    machine.pause(PauseLimits { vcpus: PATIENCE, ..LIMITS }).unwrap();
    answer.join().unwrap();
    machine.resume().unwrap();
    let before = instructions(&machine);
    std::thread::sleep(Duration::from_millis(20));
    assert!(instructions(&machine) > before);
}
