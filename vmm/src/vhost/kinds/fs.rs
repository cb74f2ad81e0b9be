//! Shared folders: virtio-fs in front, virtiofsd or another vhost-user backend behind (virtio 1.2, 5.11).

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::FS;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;

use super::{Host, Kind, KindError, queue_size};
use crate::config::FsConfig;
use crate::vhost::class::{ConfigWish, DeviceClass, too_few_queues};
use crate::vhost::error::ConversationError;
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendSource, ExternalSocket};

/// Bytes of the tag, padded with zeroes.
const TAG_BYTES: usize = 36;
/// The queue of high priority comes before the request queues.
const HIPRIO: u16 = 1;
/// VIRTIO_FS_F_NOTIFICATION: one more queue, which nobody here has.
const NOTIFICATION: u64 = 1 << 0;
const QUEUE_SIZE: u16 = 1024;
/// The same behind the IOMMU, where only pages are known to be in one piece.
const QUEUE_SIZE_BEHIND: u16 = crate::config::QUEUE_SIZE_BEHIND_MAX;

/// A shared folder as it is configured.
pub(in crate::vhost) struct Fs(pub(in crate::vhost) FsConfig);

impl Kind for Fs {
    fn shown(&self) -> String {
        format!("--fs {}", self.0.socket.display())
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(FsClass {
            tag: self.0.tag.clone(),
            queues: self.0.num_queues.unwrap_or(1),
            size: queue_size(self.0.queue_size, if self.0.iommu { QUEUE_SIZE_BEHIND } else { QUEUE_SIZE }),
        })
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Other(u32::from(FS))
    }
    fn source(&self, _host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        Ok(Box::new(ExternalSocket::new(&self.0.socket)))
    }
}

/// What makes a shared folder of a vhost-user device. The configuration space is the front end's: the tag is the user's
/// choice, and the backends that exist do not know it.
struct FsClass {
    tag: String,
    queues: u16,
    size: u16,
}

impl DeviceClass for FsClass {
    fn device_type(&self) -> u16 {
        FS
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Nothing
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        let all = HIPRIO + self.queues;
        // Without MQ a backend cannot say more; one request queue is what the device type asks for.
        let has = backend.queues.unwrap_or(HIPRIO + 1);
        if has < all {
            return Err(too_few_queues(usize::from(all), has));
        }
        let mut config = vec![0; TAG_BYTES + 4];
        for (to, from) in config.iter_mut().zip(self.tag.bytes().take(TAG_BYTES)) {
            *to = from;
        }
        if let Some(field) = config.get_mut(TAG_BYTES..) {
            field.copy_from_slice(&u32::from(self.queues).to_le_bytes());
        }
        Ok(DeviceOffer {
            device_type: FS,
            features: backend.features & !NOTIFICATION,
            queue_sizes: vec![self.size; usize::from(all)],
            config,
            pages: Pages::default(),
        })
    }
}
