//! Entropy, served by `atoll-rng` (virtio 1.2, 5.4).

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::ENTROPY;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;

use super::{Host, Kind, KindError};
use crate::backend::PassedFd;
use crate::config::RngConfig;
use crate::vhost::class::{ConfigWish, DeviceClass};
use crate::vhost::error::ConversationError;
use crate::vhost::session::Capabilities;
use crate::vhost::source::BackendSource;

const QUEUE_SIZE: u16 = 256;

/// A source of entropy as it is configured.
pub(in crate::vhost) struct Rng(pub(in crate::vhost) RngConfig);

impl Kind for Rng {
    fn shown(&self) -> String {
        format!("--rng {}", self.0.src.display())
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(RngClass)
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Other(u32::from(ENTROPY))
    }
    fn own_queues(&self) -> Option<u16> {
        Some(1)
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        let path = self.0.src.clone();
        let unusable = |what: String| format!("{}: {what}; use src=/dev/urandom", path.display());
        let kind = std::fs::metadata(&path).map_err(|error| unusable(error.to_string()))?.file_type();
        if !kind.is_char_device() && !kind.is_file() {
            return Err(unusable("neither a device nor a file".into()).into());
        }
        open(&path).map_err(|error| unusable(error.to_string()))?;
        let descriptors = move || Ok(vec![PassedFd { flag: "--fd".into(), fd: open(&path)?.into() }]);
        host.process("atoll-rng", self.sidecar(), Vec::new(), Box::new(descriptors))
    }
}

fn open(path: &PathBuf) -> std::io::Result<File> {
    File::open(path)
}

struct RngClass;

impl DeviceClass for RngClass {
    fn device_type(&self) -> u16 {
        ENTROPY
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Nothing
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        Ok(DeviceOffer {
            device_type: ENTROPY,
            features: backend.features,
            queue_sizes: vec![QUEUE_SIZE],
            config: Vec::new(),
            pages: Pages::default(),
        })
    }
    fn in_order(&self) -> bool {
        true
    }
}
