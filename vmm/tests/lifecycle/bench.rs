//! A controller, what it tells, and guests.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_vmm::actor::RealClock;
use atoll_vmm::backend::Household;
use atoll_vmm::config::{ConsoleConfig, ConsoleMode, CpuChoice, MemoryConfig, PayloadConfig, PlatformConfig, VmConfig};
use atoll_vmm::lifecycle::{Controller, Ended, Heard, Home, Settings, Story, Subscription, VmControl, VmmEnd};
use iced_x86::code_asm::{CodeAssembler, dword_ptr, eax, ebx};

use super::kernel::{kernel, power_off, print};

/// Nothing takes that long, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Where guests count: RAM that nobody loads anything to.
pub(crate) const COUNTER: u32 = 0x40_0000;

/// A machine monitor in this process.
pub(crate) struct Bench {
    pub(crate) control: Arc<Controller>,
    ended: Option<Ended>,
    story: Subscription,
    household: Arc<Household>,
    folder: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let story = Story::default();
        let heard = story.subscribe();
        let household = Arc::new(Household::new(Arc::new(RealClock::new())).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let home = Home { name: "bench".into(), runtime_dir: folder.path().into() };
        let settings = Settings::new(home, story, Arc::clone(&household));
        let (control, ended) = Controller::start(settings).unwrap();
        let bench = Self { control, ended: Some(ended), story: heard, household, folder };
        assert_eq!(bench.event(), "vmm starting");
        bench
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the guest's text goes.
    pub(crate) fn text(&self) -> PathBuf {
        self.folder().join("text")
    }

    /// A machine with this guest, without devices.
    pub(crate) fn config(&self, write: impl FnOnce(&mut CodeAssembler)) -> VmConfig {
        VmConfig {
            memory: MemoryConfig { size: 32 << 20, ..MemoryConfig::default() },
            payload: PayloadConfig { kernel: Some(kernel(self.folder(), write)), ..PayloadConfig::default() },
            serial: Some(ConsoleConfig {
                mode: ConsoleMode::File,
                file: Some(self.text()),
                ..ConsoleConfig::default()
            }),
            platform: PlatformConfig { cpu: CpuChoice::Soft, ..PlatformConfig::default() },
            ..VmConfig::default()
        }
    }

    /// Creates and boots it.
    pub(crate) fn boot(&self, config: VmConfig) {
        self.control.create(config).unwrap();
        self.control.boot().unwrap();
        assert_eq!([self.event(), self.event()], ["vm booting", "vm booted"]);
    }

    /// The next thing that happens.
    pub(crate) fn event(&self) -> String {
        match self.story.next(PATIENCE) {
            Heard::Event(event) => format!("{} {}", event.source, event.event),
            other => panic!("nothing happens: {other:?}"),
        }
    }

    /// Waits until the guest has printed at least so much; what it has printed.
    pub(crate) fn printed(&self, bytes: usize) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read_to_string(self.text()).unwrap_or_default();
            if text.len() >= bytes {
                return text;
            }
            assert!(Instant::now() < deadline, "the guest says no more than {text:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> VmmEnd {
        let end = self.ended.take().unwrap().wait();
        assert!(self.control.create(VmConfig::default()).is_err(), "nobody is left");
        self.household.shutdown(Duration::from_secs(1));
        end
    }

    /// Ends it.
    pub(crate) fn finish(self) -> VmmEnd {
        self.control.shutdown_vmm().unwrap();
        self.end()
    }
}

/// Counts in RAM for ever.
pub(crate) fn count(code: &mut CodeAssembler) {
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.inc(dword_ptr(COUNTER)).unwrap();
    code.jmp(again).unwrap();
}

/// Says hello and switches itself off.
pub(crate) fn farewell(code: &mut CodeAssembler) {
    print(code, "so long\n");
    power_off(code);
}

/// Prints for ever.
pub(crate) fn chatter(code: &mut CodeAssembler) {
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    print(code, ".");
    code.jmp(again).unwrap();
}

/// Executes so many times 1000 instructions, prints, switches itself off.
pub(crate) fn labour(code: &mut CodeAssembler, thousands: u32) {
    code.mov(ebx, thousands).unwrap();
    let (mut outer, mut inner) = (code.create_label(), code.create_label());
    code.set_label(&mut outer).unwrap();
    code.mov(eax, 500).unwrap();
    code.set_label(&mut inner).unwrap();
    code.dec(eax).unwrap();
    code.jne(inner).unwrap();
    code.dec(ebx).unwrap();
    code.jne(outer).unwrap();
    farewell(code);
}
