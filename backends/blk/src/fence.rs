//! The fence of a disk: locks on all its files, and only behind them its tables are read.

use std::sync::Arc;
use std::time::Duration;

use atoll_kit::fence::{Fence, FenceError, FileFence};

use crate::storage::Storage;

/// Waits for a predecessor, keeps others away, and then reads what a qcow2 image says.
#[derive(Debug)]
pub struct ImageFence {
    /// What is fenced.
    pub storage: Arc<Storage>,
    /// Names this device among those on the same image.
    pub device: Option<u32>,
    /// Names it among those on what the image stands on, whose reads end in guest memory too.
    pub beneath: Option<u32>,
}

impl Fence for ImageFence {
    fn raise(&self, wait: Duration) -> Result<(), FenceError> {
        let Some(file) = self.storage.file() else { return Ok(()) };
        let name = |name: &str| format!("image {name}");
        let (file, read_only) = (Arc::clone(file), self.storage.read_only());
        FileFence { file, name: name(self.storage.name()), read_only, device: self.device }.raise(wait)?;
        for (layer, read_only) in self.storage.beneath() {
            let device = self.beneath;
            FileFence { file: Arc::clone(&layer.file), name: name(&layer.name), read_only, device }.raise(wait)?;
        }
        self.storage.read_tables().map_err(|e| FenceError::Unfit(e.to_string()))
    }

    fn skip(&self) -> Result<(), FenceError> {
        self.storage.read_tables().map_err(|e| FenceError::Unfit(e.to_string()))
    }

    fn glance(&self) -> Result<(), FenceError> {
        // The size is in its header, which nobody changes while it is served.
        self.storage.read_header().map_err(|e| FenceError::Unfit(e.to_string()))
    }
}
