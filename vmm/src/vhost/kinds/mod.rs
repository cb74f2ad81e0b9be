//! The kinds of devices: for each, what the guest is offered on top of a backend ([`DeviceClass`]) and where the backend
//! comes from.

mod chain;
mod console;
mod disk;
mod fs;
mod generic;
mod gpu;
mod input;
mod limits;
mod net;
mod rng;
mod tap;
mod user;
mod vsock;

use std::error::Error as StdError;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use atoll_protocol::DeviceId;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;

pub use chain::ChainError;
pub use disk::DiskError;
pub(crate) use disk::open_image;

pub use console::ConsoleError;
pub(super) use console::{Console, ConsoleLine};
pub(super) use disk::Disk;
pub(super) use fs::Fs;
pub(super) use generic::Generic;
pub(super) use gpu::Gpu;
pub(super) use input::Input;
pub use net::{NetError, switch_socket};
pub use tap::TapError;
pub use user::UserError;

pub(super) use net::Net;
pub(super) use rng::Rng;
pub(super) use vsock::Vsock;

use super::class::DeviceClass;
use super::source::{BackendSource, Build};
use super::spawned::{MakeDescriptors, SpawnedBackend};
use super::upgrade::Lone;
use crate::backend::{Spawner, beside_this_binary};
use crate::metrics::DeviceMeter;
use crate::screen::Joint;

/// An error of a kind's own; it names the thing and the remedy.
pub(super) type KindError = Box<dyn StdError + Send + Sync>;

/// One kind of device with its configuration, before anything is opened.
pub(super) trait Kind: Send {
    /// How the user knows it: `--disk /images/a.raw`.
    fn shown(&self) -> String;
    /// What the guest is offered.
    fn class(&self) -> Box<dyn DeviceClass>;
    /// What a process that serves it says that it is.
    fn sidecar(&self) -> SidecarClass;
    /// How many queues the process has that we start for it; `None` when somebody else runs the backend.
    fn own_queues(&self) -> Option<u16> {
        None
    }
    /// Why two processes of ours cannot have what it stands on at a time, even while only one of them touches it.
    fn lone(&self) -> Option<Lone> {
        None
    }
    /// Where its pictures go, when it draws.
    fn joint(&self) -> Option<Arc<Joint>> {
        None
    }
    /// Opens what the device needs and says where its backends come from.
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError>;
}

/// What a device's own processes are started with.
pub(super) struct Host {
    pub(super) spawner: Spawner,
    /// Where the binaries are, if not beside the VMM's.
    pub(super) backend_dir: Option<PathBuf>,
    /// The device's number among all of this VMM.
    pub(super) number: DeviceId,
    /// The device's name.
    pub(super) name: String,
    /// Counts what the process does.
    pub(super) meter: Option<Arc<DeviceMeter>>,
    /// Why two processes cannot have what the device stands on at a time, if they cannot.
    pub(super) lone: Option<Lone>,
}

impl Host {
    /// Where a program of ours is.
    fn program(&self, program: &str) -> Result<PathBuf, KindError> {
        match &self.backend_dir {
            Some(folder) => Ok(folder.join(program)),
            None => Ok(beside_this_binary(program)
                .map_err(|error| format!("cannot find {program}: {error}; mount /proc, or give --backend-dir"))?),
        }
    }

    /// How to start `program` for this device.
    fn process(
        &self,
        program: &str,
        class: SidecarClass,
        args: Vec<OsString>,
        descriptors: MakeDescriptors,
    ) -> Result<Box<dyn BackendSource>, KindError> {
        let build = Build::new(self.program(program)?);
        Ok(Box::new(SpawnedBackend {
            name: self.name.clone(),
            device: self.number,
            class,
            build,
            lone: self.lone,
            args,
            descriptors,
            meter: self.meter.clone(),
            spawner: self.spawner.clone(),
        }))
    }
}

/// The size of a queue that the user may have chosen.
fn queue_size(chosen: Option<u16>, usual: u16) -> u16 {
    chosen.unwrap_or(usual)
}
