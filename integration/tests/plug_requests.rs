//! What an operator may ask of a machine whose devices come and go, and what is answered. The guest is asleep and lets
//! nothing go, so each state lasts as long as the test wants.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_integration::guests::idle;
use atoll_integration::processes;
use atoll_vmm::actor::RealClock;
use atoll_vmm::backend::Household;
use atoll_vmm::config::{
    CpuChoice, DeviceConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig, PlatformConfig, VmConfig,
};
use atoll_vmm::lifecycle::{
    Controller, DeviceState, Ended, ErrorKind, Heard, Home, Settings, Story, StoryEvent, Subscription, VmControl,
    VmError, VmState,
};
use xtask::place;

const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what is asked while a device is on its way, short enough to wait for its end.
const UNPLUG_LIMIT: Duration = Duration::from_millis(700);

struct Rig {
    controller: Arc<Controller>,
    ended: Option<Ended>,
    household: Arc<Household>,
    events: Subscription,
    folder: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// One test after the other: child processes are counted.
static ALONE: Mutex<()> = Mutex::new(());

impl Rig {
    fn new() -> Result<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("idle.elf"), idle::halt()?)?;
        let story = Story::default();
        let events = story.subscribe();
        let household = Arc::new(Household::new(Arc::new(RealClock::new()))?);
        let home = Home { name: "plugs".into(), runtime_dir: folder.path().into() };
        let settings = Settings { unplug_limit: UNPLUG_LIMIT, ..Settings::new(home, story, Arc::clone(&household)) };
        let (controller, ended) = Controller::start(settings)?;
        let rig = Self { controller, ended: Some(ended), household, events, folder, _alone: alone };
        let program = place::program("atoll-blk")?;
        rig.controller.create(VmConfig {
            memory: MemoryConfig { size: 32 << 20, ..MemoryConfig::default() },
            payload: PayloadConfig { kernel: Some(rig.path("idle.elf")), ..PayloadConfig::default() },
            platform: PlatformConfig {
                cpu: CpuChoice::Soft,
                backend_dir: program.parent().map(Path::to_owned),
                ..PlatformConfig::default()
            },
            ..VmConfig::default()
        })?;
        Ok(rig)
    }
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
    /// A disk of its own.
    fn disk(&self, id: Option<&str>, image: &str) -> Result<DeviceConfig> {
        let path = self.path(image);
        std::fs::File::create(&path)?.set_len(1 << 20)?;
        Ok(DeviceConfig::Disk(DiskConfig { id: id.map(str::to_owned), path: Some(path), ..DiskConfig::default() }))
    }
    fn ids(&self) -> Vec<String> {
        let info = self.controller.info().map(|info| info.config.devices()).unwrap_or_default();
        info.iter().filter_map(|device| device.id().map(str::to_owned)).collect()
    }
    fn state_of(&self, id: &str) -> Result<DeviceState> {
        let devices = self.controller.devices()?;
        let device = devices.into_iter().find(|device| device.id == id);
        Ok(device.ok_or_else(|| anyhow::anyhow!("no report of {id}"))?.state)
    }
    fn children(&self) -> usize {
        processes::children(std::process::id()).len()
    }
    /// The next event of that name.
    fn hear(&self, name: &str) -> Result<StoryEvent> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.events.next(deadline.saturating_duration_since(Instant::now())) {
                Heard::Event(event) if event.event == name => return Ok(event),
                Heard::Event(_) => {}
                other => anyhow::bail!("no {name} within {PATIENCE:?}: {other:?}"),
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.controller.shutdown_vmm();
        if let Some(ended) = self.ended.take() {
            ended.wait();
        }
        self.household.shutdown(Duration::from_secs(2));
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T, VmError>) -> (ErrorKind, String) {
    let error = result.unwrap_err();
    (error.kind, error.text)
}

/// One story, from a configuration to the end of the machine: what is told of a device at each point of its life.
#[test]
fn every_request_has_its_answer() -> Result<()> {
    let rig = Rig::new()?;
    let vm = Arc::clone(&rig.controller);

    // Before boot a device is a line of the configuration.
    assert_eq!(vm.add_device(rig.disk(None, "first")?)?, None);
    assert_eq!(vm.add_device(rig.disk(Some("data"), "data")?)?, None);
    assert_eq!(kind(vm.add_device(rig.disk(Some("data"), "x")?)).0, ErrorKind::Duplicate);
    vm.remove_device("data")?;
    assert_eq!(kind(vm.remove_device("data")).0, ErrorKind::NotFound);
    vm.boot()?;
    assert_eq!((rig.ids(), rig.children()), (vec!["_disk0".into()], 1));

    // In: named by us or by the user, each with its place and its process.
    let plugged = vm.add_device(rig.disk(None, "second")?)?.ok_or_else(|| anyhow::anyhow!("no place"))?;
    assert_eq!((plugged.id.as_str(), plugged.bdf.as_str()), ("_disk1", "0000:00:02.0"));
    let event = rig.hear("device-added")?;
    assert_eq!(event.properties.get("bdf").map(String::as_str), Some("0000:00:02.0"));
    let plugged = vm.add_device(rig.disk(Some("data"), "data")?)?.ok_or_else(|| anyhow::anyhow!("no place"))?;
    assert_eq!(plugged.bdf, "0000:00:03.0");
    assert_eq!((rig.ids().len(), rig.children()), (3, 3));

    // What does not work leaves nothing: a name that is taken, an image that is not there, a backend that is not there.
    assert_eq!(kind(vm.add_device(rig.disk(Some("_disk1"), "x")?)).0, ErrorKind::Duplicate);
    let missing = DiskConfig { path: Some(rig.path("missing")), ..DiskConfig::default() };
    let (_, text) = kind(vm.add_device(DeviceConfig::Disk(missing)));
    assert!(text.contains("missing"), "{text}");
    let nobody = Some(rig.path("nobody.sock"));
    let deaf = NetConfig { vhost_user: true, vhost_socket: nobody, ..NetConfig::default() };
    let (_, text) = kind(vm.add_device(DeviceConfig::Net(deaf)));
    assert!(text.contains("nobody.sock"), "{text}");
    assert_eq!((rig.ids().len(), rig.children()), (3, 3));

    // Out: asked for, and again. The name is taken until the device has gone.
    vm.pause()?;
    vm.remove_device("data")?;
    vm.remove_device("data")?;
    assert_eq!(rig.state_of("data")?, DeviceState::Unplugging);
    assert_eq!(kind(vm.add_device(rig.disk(Some("data"), "x")?)).0, ErrorKind::Duplicate);
    assert_eq!(kind(vm.remove_device("nothing")).0, ErrorKind::NotFound);
    assert_eq!(kind(vm.remove_device("rtc")).0, ErrorKind::NotFound, "what is on the board is nobody's device");
    // Time in which the guest stands does not count; then it does not answer, and keeps the device.
    std::thread::sleep(UNPLUG_LIMIT + Duration::from_millis(100));
    assert_eq!(rig.state_of("data")?, DeviceState::Unplugging);
    vm.resume()?;
    let event = rig.hear("device-remains")?;
    assert_eq!(event.properties.get("id").map(String::as_str), Some("data"));
    assert_ne!(rig.state_of("data")?, DeviceState::Unplugging);
    assert_eq!(rig.ids(), ["_disk0", "_disk1", "data"]);

    // A guest that is reset has let go what it was asked for; the others stay where they are.
    vm.remove_device("_disk1")?;
    vm.reset()?;
    let event = rig.hear("device-removed")?;
    assert_eq!(event.properties.get("id").map(String::as_str), Some("_disk1"));
    assert_eq!(rig.ids(), ["_disk0", "data"]);
    let places: Vec<_> = vm.devices()?.into_iter().filter_map(|device| device.bdf).collect();
    assert_eq!(places, ["0000:00:01.0", "0000:00:03.0"]);
    assert_eq!(rig.children(), 2);
    let plugged = vm.add_device(rig.disk(None, "second")?)?.ok_or_else(|| anyhow::anyhow!("no place"))?;
    assert_eq!((plugged.id.as_str(), plugged.bdf.as_str()), ("_disk1", "0000:00:02.0"));

    // So has one that is switched off.
    vm.remove_device("data")?;
    vm.shutdown()?;
    assert_eq!((rig.ids(), rig.children()), (vec!["_disk0".into(), "_disk1".into()], 0));
    assert_eq!(vm.info()?.state, VmState::Shutdown);
    vm.delete()?;
    assert_eq!(kind(vm.add_device(rig.disk(None, "x")?)).0, ErrorKind::NotFound);
    Ok(())
}

/// All slots taken: the next device is refused by name, and no process was started for it.
#[test]
fn beyond_the_last_slot() -> Result<()> {
    let rig = Rig::new()?;
    rig.controller.boot()?;
    for number in 1..32 {
        let plugged = rig.controller.add_device(rig.disk(None, &format!("image{number}"))?)?;
        ensure!(plugged.is_some_and(|plugged| plugged.bdf == format!("0000:00:{number:02x}.0")));
    }
    let before = rig.children();
    let (_, text) = kind(rig.controller.add_device(rig.disk(None, "one too many")?));
    assert!(text.contains("hotplug beyond the last slot"), "{text}");
    assert_eq!((rig.children(), rig.ids().len()), (before, 31));
    Ok(())
}
