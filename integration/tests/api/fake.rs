//! A machine without a machine: the states, the refusals and the bookkeeping of devices, behind a socket in a folder of
//! its own.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use atoll_vmm::api::{Api, ApiServer, ListenAt};
use atoll_vmm::config::{DeviceConfig, VmConfig};
use atoll_vmm::lifecycle::{
    DeviceReport, DeviceState, ErrorKind, Plugged, RecoveryClass, Story, VmControl, VmError, VmInfo, VmState,
};
use atoll_vmm::machine::{LinkState, NewSize};
use atoll_vmm::screen::WhereToLook;
use atoll_vmm::vhost::{Fault, UpgradeOrder};

/// What the machine was asked and what it has.
#[derive(Default)]
pub(crate) struct Book {
    pub(crate) config: Option<VmConfig>,
    pub(crate) state: Option<VmState>,
    pub(crate) devices: Vec<(String, DeviceConfig)>,
    /// Names of what was carried out, in order.
    pub(crate) done: Vec<&'static str>,
    /// The next request fails in this way.
    pub(crate) fault: Option<ErrorKind>,
    /// Machines made so far.
    pub(crate) made: u32,
    next: u32,
}

/// The machine.
#[derive(Default)]
pub(crate) struct Fake {
    book: Mutex<Book>,
}

fn error(kind: ErrorKind, text: &str) -> VmError {
    VmError::new(kind, text)
}

impl Fake {
    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails as asked for, else notes the request.
    fn begin(&self, name: &'static str) -> Result<MutexGuard<'_, Book>, VmError> {
        let mut book = self.book();
        match book.fault.take() {
            Some(kind) => Err(error(kind, "it went wrong, as the test wanted")),
            None => {
                book.done.push(name);
                Ok(book)
            }
        }
    }

    fn created(&self, name: &'static str) -> Result<MutexGuard<'_, Book>, VmError> {
        let book = self.begin(name)?;
        if book.config.is_none() {
            return Err(error(ErrorKind::NotFound, "there is no virtual machine: create one first"));
        }
        Ok(book)
    }

    fn step(&self, name: &'static str, from: &[VmState], to: VmState) -> Result<(), VmError> {
        let mut book = self.created(name)?;
        if !book.state.is_some_and(|state| from.contains(&state)) {
            return Err(error(ErrorKind::WrongState, &format!("{name} does not fit the state {:?}", book.state)));
        }
        book.state = Some(to);
        Ok(())
    }
}

impl VmControl for Fake {
    fn create(&self, config: VmConfig) -> Result<(), VmError> {
        let mut book = self.begin("create")?;
        if book.config.is_some() {
            return Err(error(ErrorKind::WrongState, "there is a virtual machine already: delete it first"));
        }
        for device in config.devices() {
            book.next += 1;
            let id = device.id().map_or_else(|| format!("_{}{}", device.kind().name(), book.next), String::from);
            book.devices.push((id, device));
        }
        book.made += 1;
        book.config = Some(config);
        book.state = Some(VmState::Created);
        Ok(())
    }
    fn boot(&self) -> Result<(), VmError> {
        self.step("boot", &[VmState::Created, VmState::Shutdown], VmState::Running)
    }
    fn pause(&self) -> Result<(), VmError> {
        self.step("pause", &[VmState::Running], VmState::Paused)
    }
    fn resume(&self) -> Result<(), VmError> {
        self.step("resume", &[VmState::Paused], VmState::Running)
    }
    fn reset(&self) -> Result<(), VmError> {
        self.step("reset", &[VmState::Running, VmState::Paused], VmState::Running)
    }
    fn power_button(&self) -> Result<(), VmError> {
        self.step("power_button", &[VmState::Running], VmState::Running)
    }
    fn shutdown(&self) -> Result<(), VmError> {
        self.step("shutdown", &[VmState::Running, VmState::Paused], VmState::Shutdown)
    }
    fn delete(&self) -> Result<(), VmError> {
        let mut book = self.begin("delete")?;
        book.config = None;
        book.state = None;
        book.devices.clear();
        Ok(())
    }
    fn nmi(&self) -> Result<(), VmError> {
        self.step("nmi", &[VmState::Running], VmState::Running)
    }
    fn add_device(&self, device: DeviceConfig) -> Result<Option<Plugged>, VmError> {
        let mut book = self.created("add_device")?;
        if device.id().is_some_and(|id| book.devices.iter().any(|(other, _)| other == id)) {
            return Err(error(ErrorKind::Duplicate, "there is a device of that id: choose another one"));
        }
        book.next += 1;
        let id = device.id().map_or_else(|| format!("_{}{}", device.kind().name(), book.next), String::from);
        book.devices.push((id.clone(), device));
        let bdf = format!("0000:00:{:02x}.0", book.devices.len() + 1);
        Ok((book.state != Some(VmState::Created)).then_some(Plugged { id, bdf }))
    }
    fn remove_device(&self, id: &str) -> Result<(), VmError> {
        let mut book = self.created("remove_device")?;
        let before = book.devices.len();
        book.devices.retain(|(other, _)| other != id);
        if book.devices.len() == before {
            return Err(error(ErrorKind::NotFound, &format!("there is no device '{id}'")));
        }
        Ok(())
    }
    fn resize_disk(&self, id: &str, _: NewSize) -> Result<(), VmError> {
        let book = self.created("resize_disk")?;
        match book.devices.iter().find(|(other, _)| other == id) {
            Some((_, DeviceConfig::Disk(_))) => Ok(()),
            Some(_) => Err(error(ErrorKind::Bad, &format!("'{id}' is no disk"))),
            None => Err(error(ErrorKind::NotFound, &format!("there is no device '{id}'"))),
        }
    }
    fn fault_device(&self, id: &str, _fault: Fault, _seed: u64) -> Result<(), VmError> {
        self.revive_device(id)
    }
    fn upgrade_device(&self, id: &str, _order: UpgradeOrder) -> Result<u64, VmError> {
        self.revive_device(id).map(|()| 2)
    }
    fn set_link(&self, id: &str, _link: LinkState) -> Result<(), VmError> {
        self.revive_device(id)
    }
    fn revive_device(&self, id: &str) -> Result<(), VmError> {
        let book = self.created("revive_device")?;
        match book.devices.iter().any(|(other, _)| other == id) {
            true => Ok(()),
            false => Err(error(ErrorKind::NotFound, &format!("there is no device '{id}'"))),
        }
    }
    fn where_to_look(&self) -> Result<WhereToLook, VmError> {
        self.created("where_to_look")
            .map(|_| WhereToLook { vnc: Some("127.0.0.1:5900".into()), ..WhereToLook::default() })
    }
    fn screenshot(&self, _head: u32) -> Result<Vec<u8>, VmError> {
        self.created("screenshot").map(|_| b"a picture".to_vec())
    }
    fn resize_display(&self, _head: u32, _width: u32, _height: u32) -> Result<(), VmError> {
        self.created("resize_display").map(drop)
    }
    fn record(&self, _head: u32, _file: OwnedFd) -> Result<(), VmError> {
        self.created("record").map(drop)
    }
    fn stop_record(&self, _head: u32) -> Result<u32, VmError> {
        self.created("stop_record").map(|_| 7)
    }
    fn info(&self) -> Result<VmInfo, VmError> {
        let book = self.created("info")?;
        let config = book.config.clone().unwrap_or_default();
        let memory_actual_size = config.memory.size;
        Ok(VmInfo { config, state: book.state.unwrap_or(VmState::Created), memory_actual_size })
    }
    fn devices(&self) -> Result<Vec<DeviceReport>, VmError> {
        let book = self.created("devices")?;
        let report = |(id, device): &(String, DeviceConfig)| DeviceReport {
            id: id.clone(),
            kind: device.kind(),
            bdf: None,
            state: DeviceState::Idle,
            reason: None,
            generation: 1,
            failed_starts: 0,
            upgrade: None,
            link: None,
            restarts: 0,
            recovery: RecoveryClass::Full,
            counted: None,
            pid: None,
            exe: None,
            standby: None,
            last_exit: None,
            last_lines: Vec::new(),
            jail: BTreeMap::new(),
            queues: Vec::new(),
        };
        Ok(book.devices.iter().map(report).collect())
    }
    fn counters(&self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, VmError> {
        drop(self.created("counters")?);
        Ok([("_disk0".to_owned(), [("read_ops".to_owned(), 7)].into())].into())
    }
    fn inspect(&self, path: &str) -> Result<serde_json::Value, VmError> {
        drop(self.created("inspect")?);
        match path {
            "" => Ok(serde_json::json!({ "devices": { "grün/1": { "generation": 1 } } })),
            "devices/grün/1" => Ok(serde_json::json!({ "generation": 1 })),
            _ => Err(error(ErrorKind::NotFound, &format!("there is nothing at '{path}'"))),
        }
    }
    fn shutdown_vmm(&self) -> Result<(), VmError> {
        self.begin("shutdown_vmm").map(drop)
    }
}

/// The machine behind its socket.
pub(crate) struct House {
    pub(crate) fake: Arc<Fake>,
    pub(crate) story: Story,
    pub(crate) server: ApiServer,
    folder: tempfile::TempDir,
}

impl House {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (fake, story) = (Arc::new(Fake::default()), Story::default());
        let api = Api {
            control: Arc::clone(&fake) as Arc<dyn VmControl>,
            story: story.clone(),
            metrics: Arc::new(|| "# TYPE atoll_up gauge\natoll_up 1\n".to_owned()),
        };
        let listener = ListenAt::Path(folder.path().join("api.sock")).open().expect("a socket");
        let server = ApiServer::start(listener, api).expect("a server");
        Self { fake, story, server, folder }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    /// Ends the server, which must not need force.
    pub(crate) fn close(self) {
        self.server.stop(Duration::from_secs(5));
        assert!(!Path::exists(&self.folder.path().join("api.sock")), "the socket's file goes with the server");
    }
}

/// A configuration that can be created.
pub(crate) fn config() -> serde_json::Value {
    serde_json::json!({ "payload": { "kernel": "/boot/vmlinux" }, "cpus": { "boot_vcpus": 2, "max_vcpus": 2 } })
}
