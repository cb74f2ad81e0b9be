//! Any vhost-user device, by the number of its virtio device type.

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::INPUT;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;

use super::{Host, Kind, KindError};
use crate::config::GenericVhostUserConfig;
use crate::vhost::class::{ConfigWish, DeviceClass, config_lengths, too_few_queues};
use crate::vhost::error::ConversationError;
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendSource, ExternalSocket};

/// A device as it is configured, and its type as the transport wants it.
pub(in crate::vhost) struct Generic {
    pub(in crate::vhost) config: GenericVhostUserConfig,
    pub(in crate::vhost) device_type: u16,
}

impl Kind for Generic {
    fn shown(&self) -> String {
        format!("--generic-vhost-user {}", self.config.socket.display())
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(GenericClass { device_type: self.device_type, queue_sizes: self.config.queue_sizes.clone() })
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Other(u32::from(self.device_type))
    }
    fn source(&self, _host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        Ok(Box::new(ExternalSocket::new(&self.config.socket)))
    }
}

/// What the user says of the queues, and the backend of everything else.
struct GenericClass {
    device_type: u16,
    queue_sizes: Vec<u16>,
}

impl DeviceClass for GenericClass {
    fn device_type(&self) -> u16 {
        self.device_type
    }
    fn config(&self) -> ConfigWish {
        match self.device_type {
            INPUT => ConfigWish::Pages,
            other => ConfigWish::AnyOf(config_lengths(other)),
        }
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        // Without MQ a backend cannot say how many queues it has: the user says it.
        if let Some(has) = backend.queues.filter(|has| usize::from(*has) < self.queue_sizes.len()) {
            return Err(too_few_queues(self.queue_sizes.len(), has));
        }
        Ok(DeviceOffer {
            device_type: self.device_type,
            features: backend.features,
            queue_sizes: self.queue_sizes.clone(),
            config: backend.config.clone(),
            pages: backend.pages.clone(),
        })
    }
}
