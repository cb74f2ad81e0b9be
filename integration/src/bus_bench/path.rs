//! The ways that are measured, each a whole round trip of the thread that asks.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_devices::{Answer, RegisterDevice, Wire, WireSink};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{DeviceId, RegionIndex};
use atoll_vmm::actor::{Actor, ActorDevice, Flow, Mail, RealClock, RegisterAccess, StopSignal, Supervision, WhenFull};
use atoll_vmm::backend::{Household, RegisterBackend, UartBuilder, UartLine, UartOutput};
use atoll_vmm::cpu::{ANSWER_BUDGET, AddressSpace, GuestBus, SharedDevice, Space, Stall, StallSink, VcpuBus};
use atoll_vmm::doorbell::DoorbellTable;

use super::Sample;
use super::floor::{Processes, Threads};
use crate::blk_bench::placement::{Placement, Processors};
use crate::cpu_clock::processor_time;
use crate::processes;

const STEP: Duration = Duration::from_secs(20);
const NOW: u64 = 0x100;
const LATER: u64 = 0x200;
const ELSEWHERE: u64 = 0x300;
/// The scratch register of a 16550.
const SCRATCH: u64 = 7;
const TOKEN: u8 = 0xa5;

/// Registers that keep what is written, answered now.
struct Scratch(u8);

impl RegisterDevice for Scratch {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Answer {
        data.fill(self.0);
        Answer::Now
    }
    fn write(&mut self, _offset: u64, data: &[u8]) -> Answer {
        self.0 = data.first().copied().unwrap_or(0);
        Answer::Now
    }
}

/// The same as an actor.
struct ScratchActor;

struct Access(RegisterAccess);

impl Mail for Access {
    fn when_full(&self) -> WhenFull {
        WhenFull::Refuse
    }
}

impl Actor for ScratchActor {
    type Message = Access;
    async fn handle(&mut self, message: Access) -> Flow {
        message.0.token.complete(u64::from(TOKEN));
        Flow::Continue
    }
}

/// Who is late answers all ones, which the asker sees for itself.
struct Unheard;

impl StallSink for Unheard {
    fn device_stalled(&self, _stall: Stall) {}
}

impl Supervision for Unheard {
    fn report(&self, _event: LifecycleEvent) {}
}

struct Nowhere;

impl WireSink for Nowhere {
    fn set_level(&self, _line: u32, _high: bool) {}
}

/// The thread of a vCPU on a board with three devices.
pub(super) struct Vcpu {
    bus: VcpuBus,
    backend: Option<RegisterBackend>,
    household: Arc<Household>,
    pid: u32,
    _folder: tempfile::TempDir,
}

impl Vcpu {
    fn new() -> Result<Self> {
        let household = Arc::new(Household::new(Arc::new(RealClock::new()))?);
        let folder = tempfile::tempdir()?;
        let space = Arc::new(AddressSpace::new(Arc::new(DoorbellTable::new(None))));
        let place = |at: u64, device: SharedDevice| space.insert(Space::Pio, at, 8, device);
        place(NOW, Arc::new(Mutex::new(Scratch(TOKEN))))?;
        let actor = household.tree().start("scratch", 8, ScratchActor);
        let mut surroundings = household.surroundings(STEP);
        surroundings.supervision = Arc::new(Unheard);
        let device = ActorDevice::new(DeviceId(1), actor, Access, surroundings);
        place(LATER, Arc::new(Mutex::new(device)))?;
        let line = Arc::new(UartLine::open(&UartOutput::File(folder.path().join("serial")))?);
        let builder = UartBuilder::new(line, Arc::clone(&household)).binary(xtask::place::program("atoll-uart")?);
        let backend = RegisterBackend::start(builder.process(Wire::new(Arc::new(Nowhere), 3))?, &household)?;
        let start = Instant::now();
        while !backend.remote().is_attached() {
            ensure!(start.elapsed() < STEP, "atoll-uart was not attached");
            std::thread::sleep(Duration::from_millis(1));
        }
        let registers = backend.remote().region(RegionIndex(0)).context("a port has registers")?;
        place(ELSEWHERE, Arc::new(Mutex::new(registers)))?;
        let bus = VcpuBus {
            vcpu: 0,
            space,
            stop: StopSignal::new(),
            stalls: Arc::new(Unheard),
            clock: Arc::clone(household.clock()),
            budget: ANSWER_BUDGET,
            counters: household.metrics().vcpu(0),
        };
        let pid = processes::child_named(std::process::id(), "atoll-uart", STEP)?;
        let mut this = Self { bus, backend: Some(backend), household, pid, _folder: folder };
        this.bus.write(Space::Pio, ELSEWHERE + SCRATCH, &[TOKEN]);
        Ok(this)
    }

    fn trip(&mut self, address: u64) -> Result<()> {
        let mut data = [0];
        self.bus.read(Space::Pio, address, &mut data);
        ensure!(data == [TOKEN], "the device at {address:#x} answered {data:02x?}");
        Ok(())
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if let Some(mut backend) = self.backend.take() {
            backend.stop(Instant::now() + STEP);
        }
        self.household.shutdown(Duration::from_secs(2));
    }
}

enum Kind {
    FloorThreads(Threads),
    FloorProcesses(Processes),
    Board(u64),
}

/// One way.
pub(super) struct Way {
    name: &'static str,
    kind: Kind,
    /// Shared by the three ways of a board.
    vcpu: Option<Arc<Mutex<Vcpu>>>,
}

impl Way {
    /// All of them: floors first.
    pub(super) fn all() -> Result<Vec<Self>> {
        let vcpu = Arc::new(Mutex::new(Vcpu::new()?));
        let board = |name, address| Self { name, kind: Kind::Board(address), vcpu: Some(Arc::clone(&vcpu)) };
        Ok(vec![
            Self { name: "floor: two threads", kind: Kind::FloorThreads(Threads::new()?), vcpu: None },
            Self { name: "floor: two processes", kind: Kind::FloorProcesses(Processes::new()?), vcpu: None },
            board("now", NOW),
            board("later", LATER),
            board("elsewhere", ELSEWHERE + SCRATCH),
        ])
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    fn pid(&self) -> Option<u32> {
        match &self.kind {
            Kind::FloorProcesses(processes) => Some(processes.pid()),
            Kind::FloorThreads(_) => None,
            Kind::Board(_) => {
                self.vcpu.as_ref().map(|vcpu| vcpu.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pid)
            }
        }
    }

    /// Puts the asking thread on one processor and everybody else who takes part on the other, or all on one.
    pub(super) fn place(&self, processors: &Processors, placement: Placement) -> Result<()> {
        processors.place_others(placement, std::process::id())?;
        if let Some(pid) = self.pid() {
            processors.place_others(placement, pid)?;
        }
        processors.place_driver(placement)
    }

    fn trip(&mut self) -> Result<()> {
        match &self.kind {
            Kind::FloorThreads(threads) => {
                threads.trip();
                Ok(())
            }
            Kind::FloorProcesses(processes) => processes.trip(),
            Kind::Board(address) => {
                let vcpu = self.vcpu.as_ref().context("a way of the board has a board")?;
                vcpu.lock().unwrap_or_else(std::sync::PoisonError::into_inner).trip(*address)
            }
        }
    }

    /// Measures `trips` round trips after a few to warm up.
    pub(super) fn measure(&mut self, trips: u32) -> Result<Sample> {
        for _ in 0..trips / 10 {
            self.trip()?;
        }
        let other = self.pid();
        let busy = || -> Result<f64> {
            let mut total = processor_time(std::process::id())?;
            if let Some(pid) = other {
                total += processor_time(pid)?;
            }
            Ok(total.as_secs_f64() * 1e6)
        };
        let before = busy()?;
        let mut times = Vec::with_capacity(trips as usize);
        for _ in 0..trips {
            let start = Instant::now();
            self.trip()?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        let cpu_us = (busy()? - before) / f64::from(trips);
        times.sort_by(f64::total_cmp);
        let p50_us = times.get(times.len() / 2).copied().context("no round trips")?;
        Ok(Sample { p50_us, cpu_us })
    }
}
