//! A device with its server and no board: for who drives its registers without a guest, as campaigns of faults do. Server,
//! record, supervision and the way of a register access are those of a machine.

use std::sync::{Arc, Mutex, Weak};

use atoll_devices::pci::{BarMapping, BarSpace, SharedFunction};

use super::builder::Described;
use super::device::{Request, Shared, UserDevice};
use super::function::UserFunction;
use crate::irq::{InterruptFabric, VectorTable};
use crate::machine::Ground;
use crate::vhost::{DeviceStatus, Ending};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A function whose BARs are nowhere: its registers are reached by its own methods.
struct Nowhere;

impl BarMapping for Nowhere {
    fn map(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
    fn unmap(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
}

/// A running device without a board. Its process ends with it.
pub struct Bare {
    device: UserDevice,
    function: SharedFunction,
    vectors: Arc<VectorTable>,
}

/// Asks what a device is at, and does not keep it.
pub struct StatusWatch(Weak<Shared>);

impl StatusWatch {
    /// None when there is no such device any more.
    pub fn status(&self) -> Option<DeviceStatus> {
        self.0.upgrade().map(|shared| shared.status())
    }
}

impl Described {
    /// Reaches the first server and starts the device, its vectors connected to `fabric`.
    ///
    /// # Errors
    /// When there is no server, it is no PCI device, or there is no thread or descriptor for it.
    pub fn bare(self, ground: &Ground, fabric: &dyn InterruptFabric) -> Result<Bare, Cause> {
        let connected = self.connect(ground, Ending::default())?;
        let shape = connected.shape().clone();
        let vectors = Arc::new(VectorTable::new(fabric, shape.vectors)?);
        let device = connected.attach(Arc::clone(&vectors))?;
        let function =
            UserFunction::new(&shape, Arc::new(Nowhere), Arc::clone(&vectors) as _, Arc::clone(&device.shared))?;
        Ok(Bare { device, function: Arc::new(Mutex::new(function)), vectors })
    }
}

impl Bare {
    /// What it is at.
    pub fn status(&self) -> DeviceStatus {
        self.device.shared.status()
    }
    /// Asks that later.
    pub fn watch(&self) -> StatusWatch {
        StatusWatch(Arc::downgrade(&self.device.shared))
    }
    /// What the guest would see of it.
    pub fn function(&self) -> SharedFunction {
        Arc::clone(&self.function)
    }
    /// Its vectors.
    pub fn vectors(&self) -> &VectorTable {
        &self.vectors
    }
    /// Breaks the connection to the server, as `atoll fault disconnect` does. False when the device has been stopped.
    pub fn disconnect(&self) -> bool {
        self.device.shared.send(Request::Break)
    }
}
