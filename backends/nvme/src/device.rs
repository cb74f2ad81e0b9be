//! The controller as a PCI function: configuration space, the BAR with registers and doorbells, vectors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use atoll_blk::storage::Storage;
use atoll_devices::pci::config_space::{BarKind, ConfigSpace, Identity};
use atoll_kit::memory::GuestRam;
use atoll_kit::step::{Sabotage, Step, step, strikes};
use atoll_kit::vfio_user::{DeviceError, Nowhere, PciDevice, Ways};
use atoll_protocol::vfio_user::reply::{IoFd, IoFdKind};
use rustix::event::EventfdFlags;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use crate::controller::{Controller, Io, NO_COMMAND};
use crate::engine::Engine;
use crate::identify::{DEVICE, Namespace, VENDOR};
use crate::prp::Dma;
use crate::record::{DOORBELLS_AT, QUEUES_MAX, Record};
use crate::spec::CSTS_READY;
use crate::spec::register::DOORBELLS;

/// Bytes of BAR 0: registers, doorbells, the table of vectors, what of them is pending.
const BAR_LEN: u64 = 0x4000;
const TABLE_AT: u32 = 0x2000;
const PENDING_AT: u32 = 0x3000;
/// Mass storage, non-volatile memory, NVMe.
const CLASS: u32 = 0x0001_0802;
const MSIX_ID: u8 = 0x11;

/// Guest memory, as the controller reaches it.
struct Reach<'a>(&'a GuestRam);

impl Dma for Reach<'_> {
    fn read(&self, address: u64, out: &mut [u8]) -> bool {
        self.0.read_slice(out, GuestAddress(address)).is_ok()
    }
    fn write(&self, address: u64, data: &[u8]) -> bool {
        self.0.write_slice(data, GuestAddress(address)).is_ok()
    }
    fn publish(&self, address: u64, word: u32) -> bool {
        self.0.store(word.to_le(), GuestAddress(address), Ordering::Release).is_ok()
    }
    fn covers(&self, address: u64, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|len| self.0.check_range(GuestAddress(address), len, Permissions::ReadWrite))
    }
}

/// An NVMe controller.
pub struct Nvme {
    config: ConfigSpace,
    storage: Arc<Storage>,
    namespace: Namespace,
    record: Arc<Record>,
    queues: u16,
    /// There once nothing of a predecessor is under way.
    controller: Option<Controller>,
    engine: Option<Engine>,
    doorbell: OwnedFd,
    vectors: Vec<Option<OwnedFd>>,
    memory: Option<Arc<GuestRam>>,
    client_spoke: bool,
    /// A predecessor had brought the controller up.
    continued: bool,
}

impl Nvme {
    /// A controller with at most so many I/O queues, which goes on where `record` says.
    ///
    /// # Errors
    /// In words.
    pub fn new(storage: Arc<Storage>, record: Record, queues: u16, serial: &str) -> Result<Self, DeviceError> {
        let failed = |error: &dyn std::fmt::Display| DeviceError::Other(error.to_string());
        let queues = queues.clamp(1, QUEUES_MAX as u16);
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE,
            revision: 1,
            class: CLASS,
            subsystem_vendor: VENDOR,
            subsystem: DEVICE,
        };
        let mut config = ConfigSpace::new(identity, Arc::new(Nowhere));
        config.add_bar(0, BarKind::Memory64 { prefetchable: false }, BAR_LEN).map_err(|error| failed(&error))?;
        let mut table = queues.to_le_bytes().to_vec();
        table.extend(TABLE_AT.to_le_bytes());
        table.extend(PENDING_AT.to_le_bytes());
        config.add_capability(MSIX_ID, &table, &[0, 0xc0]).map_err(|error| failed(&error))?;
        let serial: String = serial.chars().filter(char::is_ascii_graphic).take(20).collect();
        let namespace = Namespace { bytes: storage.bytes(), read_only: storage.read_only(), serial };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let doorbell = rustix::event::eventfd(0, flags).map_err(|error| failed(&error))?;
        Ok(Self {
            config,
            storage,
            namespace,
            record: Arc::new(record),
            queues,
            controller: None,
            engine: None,
            doorbell,
            vectors: (0..=queues).map(|_| None).collect(),
            memory: None,
            client_spoke: false,
            continued: false,
        })
    }

    fn parts(&mut self) -> Result<(&mut Controller, &mut Engine), DeviceError> {
        match (&mut self.controller, &mut self.engine) {
            (Some(controller), Some(engine)) => Ok((controller, engine)),
            _ => Err(DeviceError::Other("the controller was not prepared".into())),
        }
    }

    /// Looks what the medium has done.
    fn look(&mut self, wait: bool) -> Result<(), DeviceError> {
        let memory = self.memory.clone();
        let (controller, engine) = self.parts()?;
        let found = engine.look(wait, memory.as_deref())?;
        let reach = memory.as_deref().map(Reach);
        for (token, outcome) in found.done {
            controller.done(token, outcome, reach.as_ref().map(|reach| reach as &dyn Dma));
        }
        self.client_spoke |= found.client;
        self.signal();
        Ok(())
    }

    /// Fetches, answers, and gives the medium what it has to do. Says whether there is more to do at once.
    fn run(&mut self) -> Result<bool, DeviceError> {
        let memory = self.memory.clone();
        let (controller, engine) = self.parts()?;
        let mut out: Vec<Io> = Vec::new();
        let reach = memory.as_deref().map(Reach);
        let more = controller.run(reach.as_ref().map(|reach| reach as &dyn Dma), &mut out);
        for io in out {
            match &memory {
                Some(memory) if io.token != NO_COMMAND => engine.start(io, memory)?,
                _ => engine.flush(io.token)?,
            }
        }
        self.signal();
        Ok(more)
    }

    fn signal(&mut self) {
        let vectors = self.controller.as_mut().map(Controller::take_vectors).unwrap_or_default();
        vectors.into_iter().for_each(|vector| self.raise(vector));
    }
}

impl PciDevice for Nvme {
    fn prepare(&mut self) -> Result<(), DeviceError> {
        self.engine = Some(Engine::new(Arc::clone(&self.storage), self.doorbell.as_fd())?);
        Ok(())
    }
    fn begin(&mut self) -> Result<(), DeviceError> {
        self.continued = self.record.csts().load(Ordering::Acquire) & CSTS_READY != 0;
        self.controller = Some(Controller::new(Arc::clone(&self.record), self.namespace.clone(), self.queues));
        Ok(())
    }
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn bar(&self, bar: u8) -> u64 {
        if bar == 0 { BAR_LEN } else { 0 }
    }
    fn ways(&self, bar: u8) -> Ways<'_> {
        if bar != 0 {
            return Ways::default();
        }
        let way = |number: u64| IoFd {
            offset: DOORBELLS + 4 * number,
            size: 4,
            event: 0,
            how: IoFdKind::Shadow { memory: 1, offset: DOORBELLS_AT + 4 * number },
        };
        let ways = (0..2 * (u64::from(self.queues) + 1)).map(way).collect();
        Ways { ways, descriptors: vec![self.doorbell.as_fd(), self.record.as_fd()] }
    }
    fn vectors(&self) -> u16 {
        self.queues + 1
    }
    fn set_vector(&mut self, vector: u16, event: Option<OwnedFd>) {
        if let Some(to) = self.vectors.get_mut(usize::from(vector)) {
            *to = event;
        }
    }
    fn raise(&mut self, vector: u16) {
        if self.continued && strikes(Sabotage::ForgetCall) {
            return;
        }
        if let Some(Some(event)) = self.vectors.get(usize::from(vector)) {
            // One that is full is raised already.
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
            step(Step::Call);
        }
    }
    fn read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        match &self.controller {
            Some(controller) if offset < u64::from(TABLE_AT) => controller.read(offset, data),
            // The client has the table of vectors.
            _ => data.fill(0),
        }
    }
    fn write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        if let Some(controller) = self.controller.as_mut().filter(|_| offset < u64::from(TABLE_AT)) {
            controller.write(offset, data);
        }
    }
    fn quiesce(&mut self) -> Result<(), DeviceError> {
        while self.controller.as_ref().is_some_and(|controller| controller.out() > 0) {
            self.look(true)?;
        }
        Ok(())
    }
    fn set_memory(&mut self, memory: Option<Arc<GuestRam>>) {
        self.memory = memory;
    }
    fn reset(&mut self) {
        if let Some(controller) = &mut self.controller {
            controller.reset();
        }
    }
    fn attend(&mut self, client: BorrowedFd<'_>) -> Result<(), DeviceError> {
        let (_, engine) = self.parts()?;
        Ok(engine.attend(client)?)
    }
    fn turn(&mut self) -> Result<(), DeviceError> {
        loop {
            let more = self.run()?;
            if std::mem::take(&mut self.client_spoke) {
                return Ok(());
            }
            self.look(!more)?;
        }
    }
}
