//! The virtio-blk device (virtio 1.2, section 5.2): features, configuration space, and what its queues share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use atoll_kit::device_state::StateError;
use atoll_kit::limit::Limiter;
use atoll_kit::{ConfigError, Device, QueueLayout};
use atoll_protocol::saved::{self, Saved, SavedType};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::request::BlkQueue;
use crate::storage::{SECTOR_BYTES, Storage};

/// Most entries of a queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most data segments of a request that the guest should make.
pub const SEG_MAX: u32 = 126;
/// Most sectors of one discard or write-zeroes range: 1 GiB.
pub const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Most ranges in one discard or write-zeroes request.
pub const RANGES_MAX: u32 = 32;
/// Bytes of the identification string.
pub const SERIAL_BYTES: usize = 20;

const CONFIG_LEN: usize = 60;
const WRITEBACK_AT: u32 = 32;

/// What all queues of a disk share.
#[derive(Debug)]
pub struct Shared {
    /// The image.
    pub storage: Arc<Storage>,
    /// The identification string, padded with zeroes.
    pub serial: [u8; SERIAL_BYTES],
    write_through: AtomicBool,
}

impl Shared {
    /// True when each write must be durable before it completes.
    pub fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }
}

/// What a disk tells its successor.
#[derive(Debug, Serialize, Deserialize)]
struct DiskState {
    /// Its size, for a successor that sees another one.
    bytes: u64,
    /// The cache mode that the driver has chosen.
    writeback: bool,
}

impl Saved for DiskState {
    const TYPE: SavedType = SavedType(0x0001_0002);
    const VERSION: u16 = 1;
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    queues: u16,
    acked: u64,
    writeback: bool,
    limiter: Option<Arc<Limiter>>,
}

impl Disk {
    /// A disk on `storage`. A serial longer than 20 bytes is cut.
    pub fn new(storage: impl Into<Arc<Storage>>, queues: u16, serial: &str) -> Self {
        let mut padded = [0; SERIAL_BYTES];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let shared = Shared { storage: storage.into(), serial: padded, write_through: AtomicBool::new(false) };
        Self { shared: Arc::new(shared), queues, acked: 0, writeback: true, limiter: None }
    }

    /// Limits the rate of all queues together.
    #[must_use]
    pub fn limited(mut self, limiter: Option<Arc<Limiter>>) -> Self {
        self.limiter = limiter;
        self
    }

    /// A driver that cannot flush must find every completed write durable; one that can choose, chooses.
    fn choose_cache(&self) {
        let can_flush = self.acked & bit(VIRTIO_BLK_F_FLUSH) != 0;
        let chooses = self.acked & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        let write_through = !can_flush || chooses && !self.writeback;
        self.shared.write_through.store(write_through, Ordering::Relaxed);
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let storage = &self.shared.storage;
        let mut out = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(to) = out.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        put(0, &(storage.bytes() / SECTOR_BYTES).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &storage.block_bytes().to_le_bytes());
        // Topology: physical block = logical block, aligned; best I/O size is left open.
        put(26, &1_u16.to_le_bytes());
        put(WRITEBACK_AT as usize, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        let alignment = (storage.clear_bytes() / SECTOR_BYTES) as u32;
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
        out
    }
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

impl Device for Disk {
    type Queue = BlkQueue;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: self.queues, size_max: QUEUE_SIZE_MAX }
    }

    fn features(&self) -> u64 {
        let always = bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE)
            | bit(VIRTIO_BLK_F_MQ);
        if self.shared.storage.read_only() {
            always | bit(VIRTIO_BLK_F_RO)
        } else {
            always | bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)
        }
    }

    fn features_acked(&mut self, features: u64) {
        self.acked = features;
        self.choose_cache();
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config = self.config();
        for (to, at) in out.iter_mut().zip(offset as usize..) {
            *to = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        // The cache mode is the only field that a driver may write. Some front ends send the whole structure back.
        let at = WRITEBACK_AT.checked_sub(offset).map(|at| at as usize);
        let value = at.and_then(|at| data.get(at)).ok_or(ConfigError { offset })?;
        self.writeback = *value != 0;
        self.choose_cache();
        Ok(())
    }

    fn reset(&mut self) {
        self.acked = 0;
        self.writeback = true;
        self.choose_cache();
    }

    fn measure(&mut self) -> Option<u64> {
        let storage = &self.shared.storage;
        let before = storage.bytes();
        match storage.measure() {
            Ok(bytes) if bytes < before => {
                tracing::warn!(image = storage.name(), before, bytes, "the image was cut: what lay behind is gone");
            }
            Ok(bytes) => tracing::info!(image = storage.name(), before, bytes, "the image was measured"),
            Err(error) => tracing::error!(%error, "the disk keeps its size"),
        }
        Some(storage.bytes())
    }

    fn save(&self, state: Vec<u8>) -> Result<Vec<u8>, StateError> {
        let disk = DiskState { bytes: self.shared.storage.bytes(), writeback: self.writeback };
        Ok(saved::save(&disk, state)?)
    }

    fn restore<'a>(&mut self, state: &'a [u8]) -> Result<&'a [u8], StateError> {
        let (disk, rest) = saved::restore::<DiskState>(state)?;
        let bytes = self.shared.storage.bytes();
        if disk.bytes != bytes {
            return Err(StateError::Other(format!("served {} bytes, the image has {bytes} here", disk.bytes)));
        }
        self.writeback = disk.writeback;
        self.choose_cache();
        Ok(rest)
    }

    fn limiter(&self, _index: u16) -> Option<Arc<Limiter>> {
        self.limiter.clone()
    }

    fn queue(&mut self, _index: u16) -> BlkQueue {
        BlkQueue::new(Arc::clone(&self.shared))
    }
}

#[cfg(test)]
mod tests {
    use atoll_kit::Device as _;
    use atoll_kit::device_state::StateError;

    use super::*;
    use crate::storage::Source;

    fn disk(bytes: u64) -> Disk {
        Disk::new(Storage::open(&Source::Null(bytes), false, false).unwrap(), 1, "")
    }

    /// A successor has the cache mode that the driver has chosen; one that sees another size says no, and so does one that
    /// is given anything else.
    #[test]
    fn a_successor_goes_on_with_what_is_true() {
        let mut old = disk(1 << 20);
        old.write_config(WRITEBACK_AT, &[0]).unwrap();
        let state = old.save(vec![7]).unwrap();
        let state = state.strip_prefix(&[7]).unwrap();
        let mut new = disk(1 << 20);
        assert!(new.restore(state).unwrap().is_empty());
        assert!(!new.writeback && disk(1 << 20).writeback);
        assert!(matches!(disk(2 << 20).restore(state), Err(StateError::Other(_))));
        for at in 0..state.len() {
            let mut damaged = state.to_vec();
            damaged[at] ^= 1;
            assert!(disk(1 << 20).restore(&damaged).is_err(), "byte {at}");
            assert!(disk(1 << 20).restore(&state[..at]).is_err(), "cut at {at}");
        }
    }
}
