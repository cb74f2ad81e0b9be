//! A keyboard, a tablet or a mouse (virtio 1.2, 5.8), served by `atoll-input` and fed by the display.

use std::sync::Arc;

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::INPUT;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;

use super::{Host, Kind, KindError};
use crate::backend::PassedFd;
use crate::config::InputConfig;
use crate::screen::Joint;
use crate::vhost::class::{ConfigWish, DeviceClass};
use crate::vhost::error::ConversationError;
use crate::vhost::session::Capabilities;
use crate::vhost::source::BackendSource;

/// Events, and lights.
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 64;

/// A device as it is configured, and where what is typed comes from.
pub(in crate::vhost) struct Input {
    pub(in crate::vhost) config: InputConfig,
    pub(in crate::vhost) joint: Arc<Joint>,
}

impl Kind for Input {
    fn shown(&self) -> String {
        format!("--input {}", self.config.kind.name())
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(InputClass)
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Other(u32::from(INPUT))
    }
    fn own_queues(&self) -> Option<u16> {
        Some(QUEUES)
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        let kind = self.config.kind;
        let mut args = vec!["--kind".into(), kind.name().into()];
        if let Some(id) = &self.config.id {
            args.extend(["--serial".into(), id.into()]);
        }
        let joint = Arc::clone(&self.joint);
        let descriptors = move || Ok(vec![PassedFd { flag: "--events-fd".into(), fd: joint.hearer(kind)? }]);
        host.process("atoll-input", self.sidecar(), args, Box::new(descriptors))
    }
}

struct InputClass;

impl DeviceClass for InputClass {
    fn device_type(&self) -> u16 {
        INPUT
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Pages
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        Ok(DeviceOffer {
            device_type: INPUT,
            features: backend.features,
            queue_sizes: vec![QUEUE_SIZE; QUEUES.into()],
            config: backend.config.clone(),
            pages: backend.pages.clone(),
        })
    }
}
