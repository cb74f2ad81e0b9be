//! Sockets between guest and host, served by `atoll-vsock` or behind somebody else's vhost-user backend (virtio 1.2, 5.10).

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::VSOCK;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;

use super::{Host, Kind, KindError};
use crate::backend::PassedFd;
use crate::config::VsockConfig;
use crate::unix_socket::BoundSocket;
use crate::vhost::class::{ConfigWish, DeviceClass};
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendSource, ExternalSocket};

const QUEUE_SIZE: u16 = 256;
/// Receive, transmit, event: a driver wants all three.
const QUEUES: u16 = 3;
/// guest_cid.
const CONFIG_LEN: u32 = 8;

/// Sockets as they are configured.
pub(in crate::vhost) struct Vsock(pub(in crate::vhost) VsockConfig);

impl Kind for Vsock {
    fn shown(&self) -> String {
        format!("--vsock {}", self.0.socket.display())
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(VsockClass { cid: self.0.cid })
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Other(u32::from(VSOCK))
    }
    fn own_queues(&self) -> Option<u16> {
        (!self.0.vhost_user).then_some(QUEUES)
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        if self.0.vhost_user {
            return Ok(Box::new(ExternalSocket::new(&self.0.socket)));
        }
        // Ours from now on, over the deaths of whoever accepts on it: clients that come meanwhile wait.
        let socket = BoundSocket::bind(&self.0.socket)?;
        let path = std::path::absolute(&self.0.socket)?;
        let args = vec!["--cid".into(), self.0.cid.to_string().into(), "--path".into(), path.into()];
        let listener = move || {
            let fd = socket.listener().try_clone()?.into();
            Ok(vec![PassedFd { flag: "--listen-fd".into(), fd }])
        };
        host.process("atoll-vsock", self.sidecar(), args, Box::new(listener))
    }
}

struct VsockClass {
    cid: u64,
}

impl DeviceClass for VsockClass {
    fn device_type(&self) -> u16 {
        VSOCK
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::AnyOf(&[CONFIG_LEN])
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        if let Some(bytes) = backend.config.first_chunk::<8>() {
            let serves = u64::from_le_bytes(*bytes);
            if serves != self.cid {
                let what = format!("it serves the guest with cid {serves}, and cid={} was given", self.cid);
                return Err(ConversationError::Absurd { step: Step::GetConfig, what });
            }
        }
        Ok(DeviceOffer {
            device_type: VSOCK,
            features: backend.features,
            queue_sizes: vec![QUEUE_SIZE; usize::from(QUEUES)],
            config: self.cid.to_le_bytes().into(),
            pages: Pages::default(),
        })
    }
    fn served(&self, backend: &Capabilities) -> u16 {
        // Many backends know no event queue, which is for a migration's target only.
        backend.queues.unwrap_or(QUEUES - 1).min(QUEUES)
    }
    fn in_order(&self) -> bool {
        // Connections are lost with their backend; the device lives on.
        true
    }
}
