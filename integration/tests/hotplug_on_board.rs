//! Devices that come and go on a board whose guest is asleep: the test is the guest, by register accesses as its AML would
//! make them, so that it can also do what no kernel does.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_devices::pci::{DevFn, HostBridge, SharedFunction};
use atoll_integration::guests::idle;
use atoll_integration::processes;
use atoll_vmm::actor::{RealClock, StopSignal};
use atoll_vmm::backend::Household;
use atoll_vmm::config::{DeviceConfig, DiskConfig};
use atoll_vmm::cpu::{ANSWER_BUDGET, GuestBus, Space, Stall, StallSink, VcpuBus};
use atoll_vmm::lifecycle::Story;
use atoll_vmm::machine::boot::BootSource;
use atoll_vmm::machine::layout::{ACPI_HOTPLUG, ECAM};
use atoll_vmm::machine::{
    Board, BoardError, BuildError, BuiltDevice, CpuKind, DeviceBuilder, DeviceLife, EventSender, EventSink, LifeError,
    Machine, MachineConfig, MachineEvent, PauseLimits, PlugError, UnplugError, UnplugEvent, chipset,
};
use atoll_vmm::vhost::{DeviceFactory, FactoryParts};
use rustix::process::Signal;
use xtask::place;

const INSERTED: u64 = ACPI_HOTPLUG.start + 0x10;
const LEAVING: u64 = ACPI_HOTPLUG.start + 0x14;
const EJECT: u64 = ACPI_HOTPLUG.start + 0x18;
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than any test: a guest that is asked has all the time that it needs.
const NO_HURRY: Duration = Duration::from_secs(600);

struct Deaf;
impl EventSink for Deaf {
    fn happened(&self, _event: MachineEvent) {}
}
impl StallSink for Deaf {
    fn device_stalled(&self, stall: Stall) {
        panic!("{stall:?}");
    }
}

/// A machine whose only vCPU is halted, and the test's way to its registers.
struct Rig {
    machine: Machine,
    bus: VcpuBus,
    _alone: MutexGuard<'static, ()>,
}

/// One test after the other: open files are counted.
static ALONE: Mutex<()> = Mutex::new(());

impl Rig {
    fn new() -> Result<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir()?;
        let kernel = folder.path().join("idle.elf");
        std::fs::write(&kernel, idle::halt()?)?;
        let config = MachineConfig {
            boot: BootSource { kernel, initramfs: None, command_line: String::new() },
            memory_bytes: 32 << 20,
            irqchip: Default::default(),
            vcpus: 1,
            cpu: CpuKind::Soft,
            cpu_model: "atoll-v1".into(),
            deterministic: None,
            com1: false,
        };
        let mut machine = Machine::build(&config, chipset(), &EventSender::new(Arc::new(Deaf)))?;
        machine.start()?;
        let bus = VcpuBus {
            vcpu: 9,
            space: Arc::clone(machine.board().space()),
            stop: StopSignal::new(),
            stalls: Arc::new(Deaf),
            clock: Arc::new(RealClock::new()),
            budget: ANSWER_BUDGET,
            counters: Arc::default(),
        };
        Ok(Self { machine, bus, _alone: alone })
    }

    fn get(&mut self, port: u64) -> u32 {
        let mut bytes = [0; 4];
        self.bus.read(Space::Pio, port, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn put(&mut self, port: u64, value: u32) {
        self.bus.write(Space::Pio, port, &value.to_le_bytes());
    }
    /// What the guest reads as vendor and device of the function in a slot.
    fn identity(&mut self, slot: u8) -> u32 {
        let mut bytes = [0; 4];
        self.bus.read(Space::Mmio, ECAM.start + (u64::from(slot) << 15), &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn is_there(&mut self, slot: u8) -> bool {
        self.identity(slot) != u32::MAX
    }
    fn eject(&mut self, slot: u8) {
        self.put(EJECT, 1 << slot);
    }
    /// Waits until a device is gone or has been given up; no other is.
    fn settled(&mut self) -> Result<UnplugEvent> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut events = self.machine.settle();
            ensure!(events.len() < 2, "{events:?}");
            if let Some(event) = events.pop() {
                return Ok(event);
            }
            ensure!(Instant::now() < deadline, "nothing has come of it within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    fn gone(&mut self, expected: &str, by_request: bool) -> Result<()> {
        match self.settled()? {
            UnplugEvent::Gone { name, asked, error: None, .. } if name == expected && asked == by_request => Ok(()),
            other => anyhow::bail!("not the end of {expected}: {other:?}"),
        }
    }
}

/// What is to happen to a device.
#[derive(Clone, Default)]
struct Fate {
    does_not_start: bool,
    stops_after: Duration,
}

/// What has happened to all devices of a test.
#[derive(Clone, Default)]
struct Tally {
    built: Arc<AtomicUsize>,
    stopped: Arc<AtomicUsize>,
    seen_at_start: Arc<Mutex<Vec<bool>>>,
}

struct Dummy {
    name: String,
    fate: Fate,
    tally: Tally,
}

struct DummyLife {
    fate: Fate,
    tally: Tally,
    board: Arc<Mutex<atoll_devices::pci::PciRoot>>,
    place: DevFn,
}

impl DeviceBuilder for Dummy {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        self.tally.built.fetch_add(1, Ordering::Relaxed);
        let function: SharedFunction = Arc::new(Mutex::new(HostBridge::new()));
        let bars = board.bar_mapping();
        let place = board.add_pci(function, &bars).map_err(|error| BuildError::new(&self.name, error))?;
        let life = DummyLife { fate: self.fate, tally: self.tally, board: Arc::clone(board.pci()), place };
        Ok(BuiltDevice { name: self.name, place: Some(place), life: Box::new(life) })
    }
}

impl DeviceLife for DummyLife {
    fn start(&mut self) -> Result<(), LifeError> {
        let seen = self.board.lock().unwrap().function(self.place).is_some();
        self.tally.seen_at_start.lock().unwrap().push(seen);
        match self.fate.does_not_start {
            true => Err(LifeError { device: "dummy".into(), step: "start", source: "as the test wants it".into() }),
            false => Ok(()),
        }
    }
    fn stop(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        std::thread::sleep(self.fate.stops_after);
        self.tally.stopped.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Tally {
    fn device(&self, name: &str, fate: Fate) -> Box<dyn DeviceBuilder> {
        Box::new(Dummy { name: name.into(), fate, tally: self.clone() })
    }
    fn counts(&self) -> (usize, usize) {
        (self.built.load(Ordering::Relaxed), self.stopped.load(Ordering::Relaxed))
    }
}

/// In, asked, let go, and in again under the same name in the same slot; each wrong request on the way is refused by name.
#[test]
fn a_device_comes_goes_and_comes_again() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    for round in 1..=3 {
        let place = rig.machine.plug(tally.device("a", Fate::default()))?;
        assert_eq!((place.slot(), place.function()), (1, 0));
        assert_eq!(rig.get(INSERTED), 1 << 1);
        assert!(rig.is_there(1));
        rig.put(INSERTED, 1 << 1);
        let again = rig.machine.plug(tally.device("a", Fate::default()));
        assert!(matches!(again, Err(PlugError::Duplicate(name)) if name == "a"));
        assert_eq!(rig.machine.unplug("b", NO_HURRY), Err(UnplugError::Unknown("b".into())));
        assert_eq!(rig.machine.unplug("rtc", NO_HURRY), Err(UnplugError::Fixed("rtc".into())));

        rig.machine.unplug("a", NO_HURRY)?;
        assert_eq!(rig.get(LEAVING), 1 << 1);
        rig.put(LEAVING, 1 << 1);
        // A guest that had no driver yet for what it took up is asked once more.
        rig.machine.unplug("a", NO_HURRY)?;
        assert_eq!(rig.get(LEAVING), 1 << 1);
        rig.put(LEAVING, 1 << 1);
        assert!(rig.machine.settle().is_empty() && rig.is_there(1), "it stays until the guest lets it go");
        rig.eject(1);
        assert!(!rig.is_there(1), "gone with the very next access");
        rig.gone("a", true)?;
        assert_eq!(tally.counts(), (round, round));
    }
    assert!(
        tally.seen_at_start.lock().unwrap().iter().all(|seen| !seen),
        "the guest sees what has started, not before"
    );
    Ok(())
}

/// The 32nd device is refused before anything of it is made; when another has left there is room.
#[test]
fn beyond_the_last_slot() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    for slot in 1..32 {
        rig.machine.plug(tally.device(&format!("d{slot}"), Fate::default()))?;
    }
    let full = rig.machine.plug(tally.device("d32", Fate::default())).unwrap_err();
    assert!(matches!(full, PlugError::Full(BoardError::NoSlot)));
    assert!(full.to_string().contains("hotplug beyond the last slot"), "{full}");
    assert_eq!(tally.counts(), (31, 0));
    rig.machine.unplug("d17", NO_HURRY)?;
    rig.eject(17);
    rig.gone("d17", true)?;
    assert_eq!(rig.machine.plug(tally.device("d32", Fate::default()))?.slot(), 17);
    Ok(())
}

/// A device that does not start has never been seen, and what was built of it is undone.
#[test]
fn a_device_that_does_not_start_leaves_nothing() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    let failed = rig.machine.plug(tally.device("a", Fate { does_not_start: true, ..Fate::default() }));
    assert!(matches!(failed, Err(PlugError::Life(_))));
    assert_eq!(tally.counts(), (1, 1));
    assert_eq!(rig.get(INSERTED), 0);
    assert!(!rig.is_there(1) && !rig.machine.has_device("a"));
    assert_eq!(rig.machine.plug(tally.device("a", Fate::default()))?.slot(), 1);
    Ok(())
}

/// A guest without a driver for slots does not answer: the limit passes, the request is withdrawn, the device works on. A
/// guest that lets it go all the same, later, has done so by itself.
#[test]
fn a_guest_that_does_not_answer_keeps_the_device() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    rig.machine.plug(tally.device("a", Fate::default()))?;
    rig.machine.unplug("a", Duration::from_millis(50))?;
    assert!(rig.machine.unplug_deadline().is_some());
    assert!(matches!(rig.settled()?, UnplugEvent::Late { name } if name == "a"));
    assert!(rig.is_there(1) && rig.get(LEAVING) == 0 && !rig.machine.is_leaving("a"));
    assert_eq!(rig.machine.unplug_deadline(), None);
    // Asked again, and late again.
    rig.machine.unplug("a", Duration::ZERO)?;
    assert!(matches!(rig.settled()?, UnplugEvent::Late { .. }));
    rig.eject(1);
    rig.gone("a", false)?;
    assert_eq!(tally.counts(), (1, 1));
    Ok(())
}

/// A guest that was just coming up took the request, had nobody to give it to, and never let the device go. It is asked
/// again by itself within the limit; and what it has not taken yet stays the one request that it is.
#[test]
fn a_guest_that_has_lost_the_request_is_asked_again() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    rig.machine.plug(tally.device("a", Fate::default()))?;
    rig.machine.unplug("a", PATIENCE / 2)?;
    for _ in 0..2 {
        assert_eq!(rig.get(LEAVING), 1 << 1);
        rig.put(LEAVING, 1 << 1);
        while rig.get(LEAVING) == 0 {
            // As its thread does: it sleeps until the machine wants to be looked after.
            let next = rig.machine.unplug_deadline().context("nobody looks after it")?;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            assert!(rig.machine.settle().is_empty(), "within the limit");
        }
    }
    rig.eject(1);
    rig.gone("a", true)
}

/// Time in which the guest cannot answer does not count, and a device may come and be asked to go meanwhile.
#[test]
fn limits_do_not_run_while_the_machine_stands() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    rig.machine.plug(tally.device("a", Fate::default()))?;
    rig.machine.pause(PauseLimits::default())?;
    rig.machine.plug(tally.device("b", Fate::default()))?;
    rig.machine.unplug("a", Duration::from_millis(100))?;
    std::thread::sleep(Duration::from_millis(150));
    assert!(rig.machine.settle().is_empty() && rig.machine.unplug_deadline().is_none());
    rig.machine.resume()?;
    assert!(rig.machine.settle().is_empty(), "the limit begins with the resume");
    assert_eq!((rig.get(INSERTED), rig.get(LEAVING)), (1 << 1 | 1 << 2, 1 << 1));
    assert!(matches!(rig.settled()?, UnplugEvent::Late { name } if name == "a"));
    assert!(rig.is_there(2));
    Ok(())
}

/// A device that takes its time to stop holds up nobody: the machine goes on, other devices come and go, and only name and
/// slot are not given away before the end.
#[test]
fn a_slow_end_holds_up_nobody() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    let slow = Fate { stops_after: Duration::from_millis(800), ..Fate::default() };
    rig.machine.plug(tally.device("slow", slow))?;
    rig.machine.unplug("slow", NO_HURRY)?;
    rig.eject(1);
    let begin = Instant::now();
    assert!(rig.machine.settle().is_empty());
    assert_eq!(rig.machine.plug(tally.device("quick", Fate::default()))?.slot(), 2, "slot 1 is not free yet");
    rig.machine.unplug("quick", NO_HURRY)?;
    rig.eject(2);
    rig.gone("quick", true)?;
    assert_eq!(rig.machine.unplug("slow", NO_HURRY), Err(UnplugError::OnItsWay("slow".into())));
    assert!(matches!(rig.machine.plug(tally.device("slow", Fate::default())), Err(PlugError::Duplicate(_))));
    assert!(begin.elapsed() < Duration::from_millis(700), "{:?}", begin.elapsed());
    rig.gone("slow", true)?;
    assert_eq!(rig.machine.plug(tally.device("slow", Fate::default()))?.slot(), 1);
    // A machine that ends waits for what is ending.
    let begin = Instant::now();
    let slow = Fate { stops_after: Duration::from_millis(300), ..Fate::default() };
    rig.machine.plug(tally.device("last", slow))?;
    rig.eject(2);
    rig.machine.settle();
    rig.machine.stop();
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert_eq!(tally.counts(), (4, 4));
    Ok(())
}

/// Everything is let go at once, twice, absent slots and the host bridge too: what may leave leaves, once.
#[test]
fn hostile_ejects_are_contained() -> Result<()> {
    let mut rig = Rig::new()?;
    let tally = Tally::default();
    for name in ["a", "b", "c"] {
        rig.machine.plug(tally.device(name, Fate::default()))?;
    }
    rig.machine.unplug("b", NO_HURRY)?;
    for _ in 0..3 {
        rig.put(EJECT, u32::MAX);
    }
    assert!(rig.is_there(0), "the host bridge is fixed");
    assert_eq!((rig.get(INSERTED), rig.get(LEAVING)), (0, 0));
    let deadline = Instant::now() + PATIENCE;
    let mut gone = Vec::new();
    while gone.len() < 3 && Instant::now() < deadline {
        gone.extend(rig.machine.settle());
        rig.put(EJECT, u32::MAX);
    }
    let mut told: Vec<_> = gone
        .iter()
        .filter_map(|event| match event {
            UnplugEvent::Gone { name, asked, .. } => Some((name.as_str(), *asked)),
            UnplugEvent::Late { .. } => None,
        })
        .collect();
    told.sort_unstable();
    assert_eq!(told, [("a", false), ("b", true), ("c", false)]);
    assert_eq!(tally.counts(), (3, 3));
    assert!(rig.machine.settle().is_empty() && rig.machine.leaving().is_empty());
    Ok(())
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Real disks, one whose process has just been killed, one whose process stands still: name, slot, process, threads and
/// every descriptor come back.
#[test]
fn a_disk_leaves_nothing_whatever_its_process_does() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let mut rig = Rig::new()?;
    let household = Arc::new(Household::new(Arc::new(RealClock::new()))?);
    let programs = place::program("atoll-blk")?.parent().map(std::path::Path::to_owned);
    let factory = DeviceFactory::new(FactoryParts {
        household: Arc::clone(&household),
        backend_dir: programs,
        runtime_dir: folder.path().to_owned(),
        vm: "test".into(),
        story: Story::default(),
    });
    let me = std::process::id();
    let mut level = None;
    for misfortune in [None, Some(Signal::KILL), Some(Signal::STOP), None] {
        let config = DiskConfig { path: Some(image.clone()), ..DiskConfig::default() };
        let builder = factory.builder(&DeviceConfig::Disk(config))?;
        let name = builder.name();
        rig.machine.plug(builder)?;
        let pid = processes::child_named(me, "atoll-blk", PATIENCE)?;
        if let Some(signal) = misfortune {
            processes::signal(pid, signal)?;
        }
        rig.machine.unplug(&name, NO_HURRY)?;
        rig.eject(1);
        let UnplugEvent::Gone { .. } = rig.settled()? else { anyhow::bail!("{name} has not gone") };
        processes::wait_gone(pid, PATIENCE).context("its process")?;
        ensure!(!rig.is_there(1));
        let open = open_files();
        ensure!(level.is_none_or(|level| open <= level), "{open} open files after {misfortune:?}, {level:?} before");
        level = level.or(Some(open));
    }
    Ok(())
}
