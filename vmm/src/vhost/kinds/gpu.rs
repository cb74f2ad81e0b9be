//! A GPU (virtio 1.2, 5.7), served by `atoll-gpu` or by somebody else's vhost-user backend.
//!
//! What survives the death of a process of ours is in a sealed memfd that is made once and passed to each incarnation.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::GPU;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;
use rustix::fs::{MemfdFlags, SealFlags};

use super::{Host, Kind, KindError};
use crate::backend::PassedFd;
use crate::config::{GpuConfig, Mode};
use crate::screen::Joint;
use crate::vhost::class::{ConfigWish, DeviceClass, too_few_queues};
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendSource, ExternalSocket};

/// Commands, cursor.
const QUEUES: u16 = 2;
const QUEUE_SIZES: [u16; 2] = [256, 16];
/// events_read, events_clear, num_scanouts, num_capsets.
const CONFIG_LEN: u32 = 16;
/// What the record holds beside pictures.
const RECORD_HEAD: u64 = 0x8_2000;

/// A GPU as it is configured, and where its pictures go.
pub(in crate::vhost) struct Gpu {
    pub(in crate::vhost) config: GpuConfig,
    pub(in crate::vhost) joint: Arc<Joint>,
}

impl Kind for Gpu {
    fn shown(&self) -> String {
        self.config.socket.as_ref().map_or_else(|| "--gpu".into(), |socket| format!("--gpu {}", socket.display()))
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(GpuClass { scanouts: self.config.scanouts(), ours: self.config.socket.is_none() })
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Gpu
    }
    fn own_queues(&self) -> Option<u16> {
        self.config.socket.is_none().then_some(QUEUES)
    }
    fn joint(&self) -> Option<Arc<Joint>> {
        Some(Arc::clone(&self.joint))
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        if let Some(socket) = &self.config.socket {
            return Ok(Box::new(ExternalSocket::new(socket)));
        }
        let record = record(self.config.memory()).map_err(|error| {
            format!("no memory for the pictures: {error}; give less than memory={}", self.config.memory())
        })?;
        let mut args = vec!["--scanouts".into(), self.config.scanouts().to_string().into()];
        args.extend(self.config.modes.iter().flat_map(|mode: &Mode| ["--mode".into(), mode.to_string().into()]));
        if self.config.virgl {
            args.push("--virgl".into());
        }
        let descriptors = move || Ok(vec![PassedFd { flag: "--record-fd".into(), fd: record.try_clone()? }]);
        host.process("atoll-gpu", self.sidecar(), args, Box::new(descriptors))
    }
}

/// What a successor goes on from. Pages that nobody uses take no memory.
fn record(pictures: u64) -> std::io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create("gpu-record", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(memfd);
    file.set_len(RECORD_HEAD + pictures)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

struct GpuClass {
    /// Screens that were asked for.
    scanouts: u16,
    /// A process of ours serves it, and was told how many.
    ours: bool,
}

/// Where the configuration space says how many screens there are.
const SCANOUTS_AT: std::ops::Range<usize> = 8..12;

impl DeviceClass for GpuClass {
    fn device_type(&self) -> u16 {
        GPU
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Needed(CONFIG_LEN)
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        if let Some(has) = backend.queues.filter(|has| *has < QUEUES) {
            return Err(too_few_queues(QUEUES.into(), has));
        }
        let absurd = |what: String| ConversationError::Absurd { step: Step::GetConfig, what };
        let mut config = backend.config.clone();
        let field = config.get_mut(SCANOUTS_AT).ok_or_else(|| absurd("a GPU's that is too short".into()))?;
        // To QEMU's backend screens are the front end's: it has none to tell.
        if !self.ours && field == [0; 4] {
            field.copy_from_slice(&u32::from(self.scanouts).to_le_bytes());
        }
        let has = field.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        let has = has.filter(|has| (1..=16).contains(has));
        let has = has.ok_or_else(|| absurd("a GPU without a screen, or with more than 16".into()))?;
        if self.ours && u32::from(self.scanouts) != has {
            return Err(absurd(format!("{has} screens, where {} were asked for", self.scanouts)));
        }
        Ok(DeviceOffer {
            device_type: GPU,
            features: backend.features,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config,
            pages: Pages::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

    fn offered(scanouts: u16, ours: bool, told: u32) -> Option<u32> {
        let mut config = vec![0; CONFIG_LEN as usize];
        config[SCANOUTS_AT].copy_from_slice(&told.to_le_bytes());
        let backend =
            Capabilities { features: 0, protocol: Protocol::empty(), queues: None, config, pages: Pages::default() };
        let offer = GpuClass { scanouts, ours }.offer(&backend).ok()?;
        offer.config[SCANOUTS_AT].first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
    }

    /// QEMU's vhost-user-gpu says in its configuration space that it has no screen, and leaves their number to who drives it. A
    /// guest that is shown that has no display: "num_scanouts is zero".
    #[test]
    fn a_foreign_backend_without_screens_gets_those_that_were_asked_for() {
        assert_eq!(offered(2, false, 0), Some(2));
        assert_eq!(offered(1, false, 3), Some(3), "one that knows better is believed");
        assert_eq!(offered(1, false, 17), None);
        assert_eq!(offered(2, true, 2), Some(2));
        assert_eq!(offered(2, true, 0), None, "ours was told");
    }
}
