//! A disk on a board without a CPU: the test is the driver, by register accesses as a vCPU would make them, and the
//! backend is the real one. What breaks here is not the CPU's fault.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_devices::pci::DevFn;
use atoll_devices::{GuestClock, MsiMessage, MsiSink, PowerEvent, PowerSink, WireSink};
use atoll_integration::{peers, processes};
use atoll_vmm::actor::{RealClock, StopSignal};
use atoll_vmm::backend::Household;
use atoll_vmm::config::{DeviceConfig, DiskConfig};
use atoll_vmm::cpu::{
    ANSWER_BUDGET, CpuError, DoorbellWatch, GuestBus, Processor, Space, Stall, StallSink, Vcpu, VcpuBus,
};
use atoll_vmm::doorbell::Relay;
use atoll_vmm::irq::{EventRoute, InterruptFabric, IrqError};
use atoll_vmm::lifecycle::Story;
use atoll_vmm::machine::layout::{MMIO64, ram};
use atoll_vmm::machine::{Board, BoardParts, BuiltDevice, EventSender, EventSink, MachineEvent, NewSize};
use atoll_vmm::memory::GuestMemory;
use atoll_vmm::vhost::{DeviceFactory, FactoryParts};
use rustix::process::Signal;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// A processor that runs nothing; it keeps the eventfds that devices interrupt by.
#[derive(Default)]
struct Nobody {
    connected: Mutex<Vec<EventFd>>,
}

struct Fabric(Arc<Nobody>);
struct Route;
struct Now;
struct Deaf;

impl WireSink for Fabric {
    fn set_level(&self, _line: u32, _high: bool) {}
}
impl MsiSink for Fabric {
    fn fire(&self, _message: MsiMessage) {}
}
impl InterruptFabric for Fabric {
    fn connect(&self, event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
        self.0.connected.lock().unwrap().push(event.try_clone().map_err(IrqError::Event)?);
        Ok(Box::new(Route))
    }
}
impl EventRoute for Route {
    fn set(&self, _message: Option<MsiMessage>) -> Result<(), IrqError> {
        Ok(())
    }
}
impl GuestClock for Now {
    fn now_ns(&self) -> u64 {
        0
    }
}
impl PowerSink for Deaf {
    fn power_event(&self, _event: PowerEvent) {}
}
impl EventSink for Deaf {
    fn happened(&self, _event: MachineEvent) {}
}
impl StallSink for Deaf {
    fn device_stalled(&self, stall: Stall) {
        panic!("{stall:?}");
    }
}

struct Bare(Arc<Nobody>);

impl Processor for Bare {
    fn name(&self) -> &'static str {
        "nobody"
    }
    fn create_vcpu(&self, _index: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        Err(CpuError::Unsupported("there is no CPU here".into()))
    }
    fn interrupts(&self) -> Arc<dyn InterruptFabric> {
        Arc::new(Fabric(Arc::clone(&self.0)))
    }
    fn clock(&self) -> Arc<dyn GuestClock> {
        Arc::new(Now)
    }
    fn doorbells(&self) -> Option<Arc<dyn DoorbellWatch>> {
        None
    }
}

const QUEUE_SIZE: u16 = 64;
/// Requests use descriptors 3 n to 3 n + 2.
const SLOTS: u16 = QUEUE_SIZE / 3;
const RING: u64 = 0x10_0000;
const HEADERS: u64 = 0x20_0000;
const DATA: u64 = 0x40_0000;
const BLOCK: u32 = 4096;

/// The driver of a disk in slot 0.
struct Driver {
    board: Board,
    disk: Option<BuiltDevice>,
    household: Arc<Household>,
    processor: Arc<Nobody>,
    bus: VcpuBus,
    available: u16,
    seen: u16,
}

impl Driver {
    fn new(config: DiskConfig) -> Result<Self> {
        let program = xtask::place::program("atoll-blk")?;
        Self::served_from(config, program.parent().context("a folder of programs")?)
    }
    /// With the backends' binaries in `folder`.
    fn served_from(config: DiskConfig, folder: &std::path::Path) -> Result<Self> {
        let processor = Arc::new(Nobody::default());
        let mut board = Board::new(BoardParts {
            processor: Arc::new(Bare(Arc::clone(&processor))),
            memory: GuestMemory::new(&ram(32 << 20)?)?,
            relay: Relay::new()?,
            power: Arc::new(Deaf),
            events: EventSender::new(Arc::new(Deaf)),
            wall_base_ns: 0,
        });
        let household = Arc::new(Household::new(Arc::new(RealClock::new()))?);
        let factory = DeviceFactory::new(FactoryParts {
            household: Arc::clone(&household),
            backend_dir: Some(folder.to_owned()),
            runtime_dir: folder.to_owned(),
            vm: "test".into(),
            story: Story::default(),
        });
        let disk = factory.builder(&DeviceConfig::Disk(config))?.build(&mut board)?;
        let bus = VcpuBus {
            vcpu: 0,
            space: Arc::clone(board.space()),
            stop: StopSignal::new(),
            stalls: Arc::new(Deaf),
            clock: Arc::new(RealClock::new()),
            budget: ANSWER_BUDGET,
            counters: Arc::default(),
        };
        let driver = Self { board, disk: Some(disk), household, processor, bus, available: 0, seen: 0 };
        // Memory decoding and bus mastering.
        let slot = DevFn::new(0, 0).context("slot 0")?;
        let function = driver.board.pci().lock().unwrap().function(slot).context("nothing in slot 0")?;
        let _ = function.lock().unwrap().config_write(4, &6_u16.to_le_bytes());
        Ok(driver)
    }
    fn memory(&self) -> &GuestMemoryMmap {
        self.board.memory().mapped()
    }
    fn get(&mut self, offset: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.bus.read(Space::Mmio, MMIO64.start + offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }
    fn put(&mut self, offset: u64, width: usize, value: u64) {
        self.bus.write(Space::Mmio, MMIO64.start + offset, &value.to_le_bytes()[..width]);
    }
    fn features(&mut self) -> u64 {
        self.put(0, 4, 1);
        let high = self.get(4, 4);
        self.put(0, 4, 0);
        high << 32 | self.get(4, 4)
    }
    fn capacity(&mut self) -> u64 {
        self.get(0x2000, 8)
    }
    /// Initialisation as of virtio 1.2, 3.1.1, with one queue.
    fn start(&mut self) -> Result<()> {
        self.put(20, 1, 0);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.get(20, 1) != 0 {
            ensure!(Instant::now() < deadline, "the reset takes too long");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.put(20, 1, 3);
        let features = self.features() & ((1 << 32) | (1 << 9));
        self.put(8, 4, 0);
        self.put(12, 4, features & 0xffff_ffff);
        self.put(8, 4, 1);
        self.put(12, 4, features >> 32);
        self.put(20, 1, 11);
        ensure!(self.get(20, 1) == 11, "features were not accepted");
        self.memory().write_slice(&vec![0; 0x3000], GuestAddress(RING))?;
        (self.available, self.seen) = (0, 0);
        self.put(22, 2, 0);
        self.put(24, 2, u64::from(QUEUE_SIZE));
        self.put(26, 2, 0);
        for (offset, address) in [(32, RING), (40, RING + 0x1000), (48, RING + 0x2000)] {
            self.put(offset, 8, address);
        }
        self.put(28, 2, 1);
        self.put(20, 1, 15);
        ensure!(self.get(20, 1) == 15, "DRIVER_OK was not accepted: status {:#x}", self.get(20, 1));
        Ok(())
    }
    /// Puts a request into slot `slot` (0 read, 1 write, 4 flush) and rings.
    fn submit(&mut self, slot: u16, kind: u32, sector: u64) -> Result<()> {
        let memory = self.board.memory().mapped();
        let header = HEADERS + 64 * u64::from(slot);
        memory.write_obj(kind, GuestAddress(header))?;
        memory.write_obj(sector, GuestAddress(header + 8))?;
        memory.write_obj(0xff_u8, GuestAddress(header + 32))?;
        let data = DATA + u64::from(slot) * u64::from(BLOCK);
        let first = 3 * slot;
        let parts: &[(u64, u32, u16)] = match kind {
            0 => &[(header, 16, 1), (data, BLOCK, 3), (header + 32, 1, 2)],
            1 => &[(header, 16, 1), (data, BLOCK, 1), (header + 32, 1, 2)],
            _ => &[(header, 16, 1), (header + 32, 1, 2)],
        };
        for (index, (address, len, flags)) in (first..).zip(parts) {
            let descriptor = RING + 16 * u64::from(index);
            memory.write_obj(*address, GuestAddress(descriptor))?;
            memory.write_obj(*len, GuestAddress(descriptor + 8))?;
            memory.write_obj(*flags, GuestAddress(descriptor + 12))?;
            memory.write_obj(index + 1, GuestAddress(descriptor + 14))?;
        }
        let ring = RING + 0x1000;
        memory.write_obj(first, GuestAddress(ring + 4 + 2 * u64::from(self.available % QUEUE_SIZE)))?;
        self.available = self.available.wrapping_add(1);
        memory.store(self.available, GuestAddress(ring + 2), Ordering::SeqCst)?;
        self.put(0x3000, 2, 0);
        Ok(())
    }
    /// Waits for `count` completions, by interrupt; gives their slots.
    fn complete(&mut self, count: usize) -> Result<Vec<u16>> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut slots = Vec::new();
        while slots.len() < count {
            ensure!(Instant::now() < deadline, "{} of {count} requests completed", slots.len());
            let used: u16 = self.memory().load(GuestAddress(RING + 0x2002), Ordering::SeqCst)?;
            if used == self.seen {
                // Vector 0 is the queue's; nothing but its eventfd says that there is something new.
                while self.processor.connected.lock().unwrap()[0].read().is_err() {
                    ensure!(Instant::now() < deadline, "no interrupt after {} of {count}", slots.len());
                    std::thread::sleep(Duration::from_micros(200));
                }
                continue;
            }
            let entry = RING + 0x2004 + 8 * u64::from(self.seen % QUEUE_SIZE);
            let head: u32 = self.memory().read_obj(GuestAddress(entry))?;
            self.seen = self.seen.wrapping_add(1);
            let slot = u16::try_from(head)? / 3;
            let status: u8 = self.memory().read_obj(GuestAddress(HEADERS + 64 * u64::from(slot) + 32))?;
            ensure!(status == 0, "request {slot} failed with status {status}");
            slots.push(slot);
        }
        Ok(slots)
    }
    fn run(&mut self, kind: u32, sector: u64) -> Result<()> {
        self.submit(0, kind, sector)?;
        ensure!(self.complete(1)? == [0]);
        Ok(())
    }
    fn fill(&self, slot: u16, byte: u8) -> Result<()> {
        let data = GuestAddress(DATA + u64::from(slot) * u64::from(BLOCK));
        Ok(self.memory().write_slice(&[byte; BLOCK as usize], data)?)
    }
    fn holds(&self, slot: u16) -> Result<u8> {
        let mut block = [0; BLOCK as usize];
        self.memory().read_slice(&mut block, GuestAddress(DATA + u64::from(slot) * u64::from(BLOCK)))?;
        ensure!(block.iter().all(|byte| *byte == block[0]), "a torn block");
        Ok(block[0])
    }
    fn stop(mut self) -> Result<()> {
        let mut disk = self.disk.take().context("stopped twice")?;
        disk.life.stop(Instant::now() + Duration::from_secs(5))?;
        self.household.shutdown(Duration::from_secs(5));
        Ok(())
    }
}

fn image(bytes: u64) -> Result<(tempfile::TempDir, std::path::PathBuf)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    std::fs::File::create(&path)?.set_len(bytes)?;
    Ok((folder, path))
}

fn own(path: &std::path::Path) -> DiskConfig {
    DiskConfig { path: Some(path.to_owned()), ..DiskConfig::default() }
}

fn foreign(socket: &std::path::Path) -> DiskConfig {
    DiskConfig { vhost_user: true, vhost_socket: Some(socket.to_owned()), ..DiskConfig::default() }
}

/// The process that serves this test's disk; other tests of this program have theirs.
fn backend_of(image: &std::path::Path) -> Result<u32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for pid in processes::children(std::process::id()) {
            // Before its exec, every child of this process shows all our descriptors.
            let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
            if !exe.is_ok_and(|exe| exe.ends_with("atoll-blk")) {
                continue;
            }
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            if open.into_iter().any(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link == image)) {
                return Ok(pid);
            }
        }
        ensure!(Instant::now() < deadline, "no process serves {}", image.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The whole way of a request: registers, doorbell, ring, backend, file, used ring, interrupt. The driver resets the
/// device and starts again; in the end nothing is left.
#[test]
fn requests_reach_the_image() -> Result<()> {
    let (_folder, path) = image(8 << 20)?;
    let mut config = own(&path);
    config.num_queues = Some(2);
    let mut driver = Driver::new(config)?;
    ensure!(driver.capacity() == (8 << 20) / 512);
    ensure!(driver.get(18, 2) == 2, "two queues");
    for life in 0..3 {
        driver.start()?;
        driver.fill(0, 0x40 + life)?;
        driver.run(1, 8 * u64::from(life))?;
        driver.run(4, 0)?;
        driver.fill(0, 0)?;
        driver.run(0, 8 * u64::from(life))?;
        ensure!(driver.holds(0)? == 0x40 + life);
    }
    let backend = backend_of(&path)?;
    driver.stop()?;
    processes::wait_gone(backend, Duration::from_secs(5))?;
    let bytes = std::fs::read(&path)?;
    ensure!(bytes[..4096] == [0x40; 4096] && bytes[8192..12288] == [0x42; 4096]);
    Ok(())
}

/// Again and again the backend is killed in the middle of a batch of writes: each request completes exactly once, and
/// what completed is in the image.
#[test]
fn killed_backend_loses_nothing() -> Result<()> {
    let (_folder, path) = image(8 << 20)?;
    let mut driver = Driver::new(own(&path))?;
    driver.start()?;
    for round in 0..12_u8 {
        let victim = backend_of(&path)?;
        for slot in 0..SLOTS {
            driver.fill(slot, round ^ slot as u8)?;
            driver.submit(slot, 1, 8 * u64::from(slot))?;
            if slot == u16::from(round) {
                processes::signal(victim, Signal::KILL)?;
            }
        }
        let mut slots = driver.complete(usize::from(SLOTS))?;
        slots.sort_unstable();
        ensure!(slots == (0..SLOTS).collect::<Vec<_>>(), "round {round}: {slots:?}");
        for slot in 0..SLOTS {
            driver.fill(slot, 0xee)?;
            driver.submit(slot, 0, 8 * u64::from(slot))?;
        }
        driver.complete(usize::from(SLOTS))?;
        for slot in 0..SLOTS {
            ensure!(driver.holds(slot)? == round ^ slot as u8, "round {round}, slot {slot}");
        }
    }
    driver.stop()
}

/// Somebody else's backend behind a socket: the same driver, the same requests. It announces many queues and has one.
#[test]
fn qemu_storage_daemon_serves_the_disk() -> Result<()> {
    let (folder, path) = image(8 << 20)?;
    let peer = peers::storage_daemon(&path, folder.path())?;
    let mut config = foreign(&peer.socket);
    config.num_queues = Some(4);
    let mut driver = Driver::new(config)?;
    ensure!(driver.capacity() == (8 << 20) / 512);
    ensure!(driver.get(18, 2) == 1, "one queue");
    for life in 0..2 {
        driver.start()?;
        for slot in 0..SLOTS {
            driver.fill(slot, slot as u8 + life)?;
            driver.submit(slot, 1, 8 * u64::from(slot))?;
        }
        driver.complete(usize::from(SLOTS))?;
        driver.run(4, 0)?;
    }
    driver.stop()?;
    drop(peer);
    let bytes = std::fs::read(&path)?;
    ensure!((0..usize::from(SLOTS)).all(|slot| bytes[slot * 4096] as usize == slot + 1));
    Ok(())
}

/// Waits until the thread of this name is gone, which has the conversation with a backend.
fn conversation_ends(name: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let threads = std::fs::read_dir("/proc/self/task")?.flatten();
        let named = |path: std::path::PathBuf| std::fs::read_to_string(path).is_ok_and(|comm| comm.trim() == name);
        if !threads.into_iter().any(|thread| named(thread.path().join("comm"))) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{name} is still there");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The operator of foreign backends kills one and starts another on the same socket. The guest goes on: with
/// qemu-storage-daemon when nothing was under way, with `atoll-blk` at any moment.
#[test]
fn external_backends_are_reached_again() -> Result<()> {
    type Start = fn(&std::path::Path, &std::path::Path) -> Result<peers::Peer>;
    for (start, keeps_record) in [(peers::storage_daemon as Start, false), (peers::atoll_blk, true)] {
        let (folder, path) = image(8 << 20)?;
        let mut peer = start(&path, folder.path())?;
        let mut config = foreign(&peer.socket);
        config.id = Some(if keeps_record { "kept" } else { "lost" }.into());
        let mut driver = Driver::new(config)?;
        driver.start()?;
        for round in 0..3 {
            driver.fill(0, round)?;
            driver.run(1, 8).with_context(|| format!("round {round}, record kept: {keeps_record}"))?;
            let socket = peer.socket.clone();
            drop(peer);
            std::fs::remove_file(&socket)?;
            if !keeps_record {
                // What is submitted before the death is noticed might have been taken.
                conversation_ends("talk-lost")?;
            }
            if keeps_record {
                // Nobody is there: the kick waits in the doorbell.
                driver.submit(1, 0, 8)?;
            }
            peer = start(&path, folder.path())?;
            if keeps_record {
                ensure!(driver.complete(1).context("while nobody was there")? == [1] && driver.holds(1)? == round);
            }
        }
        driver.run(4, 0)?;
        driver.stop()?;
    }
    Ok(())
}

/// Each mistake is one line that names the disk and the remedy.
#[test]
fn bad_disks_are_named() -> Result<()> {
    let (folder, path) = image(8 << 20)?;
    let odd = folder.path().join("odd");
    std::fs::write(&odd, [0; 700])?;
    let empty = folder.path().join("empty");
    std::fs::write(&empty, [])?;
    let silent = folder.path().join("silent");
    let listener = std::os::unix::net::UnixListener::bind(&silent)?;
    let holder = peers::atoll_blk(&path, folder.path())?;
    let nowhere = std::path::Path::new("/nowhere");
    std::os::unix::fs::symlink("/bin/false", folder.path().join("atoll-blk"))?;
    let program = xtask::place::program("atoll-blk")?;
    let programs = program.parent().context("a folder of programs")?;
    let cases = [
        (own(&folder.path().join("nothing")), programs, "there is no image"),
        (own(folder.path()), programs, "is a folder"),
        (own(&odd), programs, "truncate -s %512"),
        (own(&empty), programs, "is empty"),
        (own(&path), programs, "locked by another program"),
        (own(&path), folder.path(), "ended with exit status 1 before it was ready"),
        (own(&path), nowhere, "install it beside atoll"),
        (foreign(&folder.path().join("gone")), programs, "nobody listens"),
        (foreign(&silent), programs, "did not answer GET_FEATURES within 5 s"),
    ];
    for (config, programs, expected) in cases {
        let shown = format!("{config:?}");
        let error = match Driver::served_from(config, programs) {
            Ok(_) => anyhow::bail!("{shown} was accepted"),
            Err(error) => error.to_string(),
        };
        ensure!(error.contains(expected) && error.contains("--disk"), "{shown}: {error}");
        ensure!(!error.contains('\n'), "{error}");
    }
    drop((holder, listener));
    Ok(())
}

/// The operator makes the disk larger while its driver runs: the driver is interrupted, sees the new capacity and writes
/// behind the old end. A successor of the backend shows the new size too. Then the disk is cut; what lies behind the end
/// fails, and sizes that no disk can have are refused with nothing changed.
#[test]
fn a_disk_gets_another_size_under_its_driver() -> Result<()> {
    let (_folder, path) = image(8 << 20)?;
    let mut driver = Driver::new(own(&path))?;
    driver.start()?;
    driver.run(1, 0)?;
    let resize = |driver: &mut Driver, bytes: u64| {
        driver
            .disk
            .as_mut()
            .context("a disk")?
            .life
            .resize(NewSize { bytes, allow_shrink: true })
            .map_err(anyhow::Error::from)
    };
    let generation = driver.get(21, 1);
    resize(&mut driver, 16 << 20)?;
    ensure!(driver.capacity() == (16 << 20) / 512 && driver.get(21, 1) != generation, "the driver sees it");
    driver.fill(0, 0x77)?;
    driver.run(1, (16 << 20) / 512 - 8)?;
    ensure!(std::fs::metadata(&path)?.len() == 16 << 20);
    for (bytes, why) in [(0, "not zero"), (1000, "multiple of 512")] {
        let refused = format!("{:#}", resize(&mut driver, bytes).expect_err("no such size"));
        ensure!(refused.contains(why), "{refused}");
    }
    let killed = backend_of(&path)?;
    processes::signal(killed, Signal::KILL)?;
    driver.fill(0, 0)?;
    driver.run(0, (16 << 20) / 512 - 8)?;
    ensure!(driver.holds(0)? == 0x77 && driver.capacity() == (16 << 20) / 512, "after its backend's death");
    // While there is no backend at all: the next one brings the news.
    let killed = backend_of(&path)?;
    processes::signal(killed, Signal::KILL)?;
    resize(&mut driver, 4 << 20)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while driver.capacity() != (4 << 20) / 512 {
        ensure!(Instant::now() < deadline, "the driver was not told: {} sectors", driver.capacity());
        std::thread::sleep(Duration::from_millis(2));
    }
    driver.run(1, (4 << 20) / 512 - 8)?;
    driver.submit(0, 0, (4 << 20) / 512)?;
    let beyond = driver.complete(1).expect_err("behind the end").to_string();
    ensure!(beyond.contains("status 1"), "{beyond}");
    driver.stop()
}
