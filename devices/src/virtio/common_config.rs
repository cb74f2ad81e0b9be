//! The registers between a driver and any virtio device (virtio 1.2, 4.1.4.3): status, features, queues, vectors.
//!
//! A state machine without a device behind it: a write tells what the driver wants, and the transport carries it out. Every
//! rule of chapters 2 and 3 that a driver could break is enforced here, so that what comes out as an [`Intent`] is sound.

use super::driver_intent::{DeviceOffer, Intent, QueueConfig};

/// Bytes of the register block, `queue_reset` included.
pub const LEN: usize = 0x3c;

/// Vector value that means "none".
pub const NO_VECTOR: u16 = 0xffff;

/// Most queues of a device.
pub const QUEUES_MAX: usize = 1024;

/// VIRTIO_F_VERSION_1: every driver must accept it.
pub const VERSION_1: u64 = 1 << 32;

/// Feature bits that a guest may see: those of devices (0 to 23), of rings (28, 29) and of the transport (32 to 36, 38), and
/// what is left for devices (50 to 63). Hidden are the bits of vhost and vhost-user (26, 30), what only legacy drivers know
/// (24, 27) and what this transport does not serve: SR-IOV (37), notification data of the device's choice (39), reset of a
/// single queue (40) and administration queues (41).
pub const SERVED_FEATURES: u64 = 0x00ff_ffff | 1 << 28 | 1 << 29 | 0x1f << 32 | 1 << 38 | 0x3fff << 50;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const FAILED: u8 = 0x80;

/// Registers of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Size that the driver chose; the offer until it does.
    pub size: u16,
    /// MSI-X vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// The driver has enabled it: from then on the rest is fixed.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest-physical address of the available ring.
    pub available_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
}

impl QueueState {
    fn new(size: u16) -> Self {
        Self { size, vector: NO_VECTOR, enabled: false, descriptor_table: 0, available_ring: 0, used_ring: 0 }
    }

    /// Whether a device could use the queue: a power of two of descriptors within the offer, rings aligned as 2.7 demands and
    /// not wrapping around. Whether there is RAM is for whoever owns it.
    fn usable(&self, offered: u16) -> bool {
        let size = u64::from(self.size);
        let ring =
            |base: u64, alignment: u64, len: u64| base.is_multiple_of(alignment) && base.checked_add(len).is_some();
        self.size.is_power_of_two()
            && self.size <= offered
            && ring(self.descriptor_table, 16, 16 * size)
            && ring(self.available_ring, 2, 6 + 2 * size)
            && ring(self.used_ring, 4, 6 + 8 * size)
    }
}

/// What a guest can see of the registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommonState {
    /// Device status.
    pub status: u8,
    /// Features that the driver has written.
    pub driver_features: u64,
    /// Which half of the device's features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is written.
    pub driver_feature_select: u32,
    /// Vector of configuration changes.
    pub config_vector: u16,
    /// Changes with the configuration space.
    pub config_generation: u8,
    /// Which queue the queue registers show.
    pub queue_select: u16,
    /// Queues.
    pub queues: Vec<QueueState>,
}

/// The registers of one device.
#[derive(Clone, Debug)]
pub struct CommonConfig {
    state: CommonState,
    offered: u64,
    offered_sizes: Vec<u16>,
    vectors: u16,
}

impl CommonConfig {
    /// As after a reset, for an offer that has been checked; `vectors` is the number of MSI-X vectors.
    pub fn new(offer: &DeviceOffer, vectors: u16) -> Self {
        let state = CommonState {
            status: 0,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            config_generation: 0,
            queue_select: 0,
            queues: offer.queue_sizes.iter().map(|size| QueueState::new(*size)).collect(),
        };
        Self { state, offered: offer.features & SERVED_FEATURES, offered_sizes: offer.queue_sizes.clone(), vectors }
    }

    /// What the guest can see.
    pub fn state(&self) -> &CommonState {
        &self.state
    }

    /// Puts a state back. What no driver could have brought about under this offer is refused with `false`.
    pub fn restore(&mut self, state: CommonState) -> bool {
        let sound = state.queues.len() == self.offered_sizes.len()
            && (state.status & FEATURES_OK == 0 || self.acceptable(state.driver_features))
            && state.queues.iter().zip(&self.offered_sizes).all(|(queue, size)| !queue.enabled || queue.usable(*size));
        if sound {
            self.state = state;
        }
        sound
    }

    /// Forgets everything that the driver has written.
    pub fn reset(&mut self) {
        let queues = self.offered_sizes.iter().map(|size| QueueState::new(*size)).collect();
        self.state = CommonState {
            status: 0,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues,
            config_generation: self.state.config_generation,
        };
    }

    /// Features that the driver is shown.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Features in force: what the driver wrote, once it has been accepted.
    pub fn accepted_features(&self) -> Option<u64> {
        (self.state.status & FEATURES_OK != 0).then_some(self.state.driver_features)
    }

    /// Whether the driver has said DRIVER_OK.
    pub fn running(&self) -> bool {
        self.state.status & DRIVER_OK != 0
    }

    /// Vector of queue `index`.
    pub fn queue_vector(&self, index: u16) -> Option<u16> {
        self.state.queues.get(usize::from(index)).map(|queue| queue.vector).filter(|vector| *vector != NO_VECTOR)
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> Option<u16> {
        Some(self.state.config_vector).filter(|vector| *vector != NO_VECTOR)
    }

    /// The configuration space has changed.
    pub fn config_changed(&mut self) {
        self.state.config_generation = self.state.config_generation.wrapping_add(1);
    }

    /// The device cannot go on; tells whether the driver must be interrupted for it.
    pub fn set_needs_reset(&mut self) -> bool {
        let news = self.running() && self.state.status & NEEDS_RESET == 0;
        self.state.status |= NEEDS_RESET;
        news
    }

    /// Reads at `offset`, any width: a driver that uses the wrong one still sees the bytes that are there.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let mut image = [0u8; LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let state = &self.state;
        put(0x00, &state.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, state.device_feature_select).to_le_bytes());
        put(0x08, &state.driver_feature_select.to_le_bytes());
        put(0x0c, &half(state.driver_features, state.driver_feature_select).to_le_bytes());
        put(0x10, &state.config_vector.to_le_bytes());
        put(0x12, &(state.queues.len() as u16).to_le_bytes());
        put(0x14, &[state.status, state.config_generation]);
        put(0x16, &state.queue_select.to_le_bytes());
        if let Some(queue) = state.queues.get(usize::from(state.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &state.queue_select.to_le_bytes());
            put(0x20, &queue.descriptor_table.to_le_bytes());
            put(0x28, &queue.available_ring.to_le_bytes());
            put(0x30, &queue.used_ring.to_le_bytes());
        } else {
            put(0x1a, &NO_VECTOR.to_le_bytes());
        }
        data.fill(0);
        if let Some(bytes) = image.get(offset..) {
            data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        }
    }

    /// Writes a register; only whole registers can be written (64-bit ones also by halves). Gives what the driver wants.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Option<Intent> {
        match *data {
            [value] if offset == 0x14 => return self.set_status(value),
            [a, b] => self.write16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        None
    }

    fn write16(&mut self, offset: usize, value: u16) {
        match offset {
            0x10 if !self.running() => self.state.config_vector = self.existing_vector(value),
            0x16 => self.state.queue_select = value,
            0x1a => {
                let vector = self.existing_vector(value);
                if let Some(queue) = self.open_queue() {
                    queue.vector = vector;
                }
            }
            0x18 => {
                if let Some(queue) = self.open_queue() {
                    queue.size = value;
                }
            }
            0x1c if value == 1 => self.enable_queue(),
            _ => {}
        }
    }

    fn write32(&mut self, offset: usize, value: u32) {
        match offset {
            0x00 => self.state.device_feature_select = value,
            0x08 => self.state.driver_feature_select = value,
            0x0c if self.state.status & FEATURES_OK == 0 => {
                let shift = match self.state.driver_feature_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let features = &mut self.state.driver_features;
                *features = *features & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            0x20..0x38 => {
                if let Some(queue) = self.open_queue() {
                    let address = match offset & !7 {
                        0x20 => &mut queue.descriptor_table,
                        0x28 => &mut queue.available_ring,
                        _ => &mut queue.used_ring,
                    };
                    match offset & 7 {
                        0 => *address = *address >> 32 << 32 | u64::from(value),
                        4 => *address = u64::from(value) << 32 | *address & 0xffff_ffff,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    /// The selected queue, while it may still be set up.
    fn open_queue(&mut self) -> Option<&mut QueueState> {
        if self.running() {
            return None;
        }
        self.state.queues.get_mut(usize::from(self.state.queue_select)).filter(|queue| !queue.enabled)
    }

    /// A vector that the function lacks cannot be mapped: the driver reads back "none" (4.1.5.1.2).
    fn existing_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn enable_queue(&mut self) {
        let offered = self.offered_sizes.get(usize::from(self.state.queue_select)).copied().unwrap_or(0);
        let usable = match self.open_queue() {
            Some(queue) => {
                queue.enabled = queue.usable(offered);
                queue.enabled
            }
            // Enabled already, or no such queue: nothing happens.
            None => true,
        };
        if !usable {
            self.state.status |= NEEDS_RESET;
        }
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & VERSION_1 != 0
    }

    fn set_status(&mut self, value: u8) -> Option<Intent> {
        if value == 0 {
            return Some(Intent::Reset);
        }
        // Bits are only ever added; taking one back is what reset is for.
        let mut added = value & !self.state.status & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED);
        if added & FEATURES_OK != 0 && !self.acceptable(self.state.driver_features) {
            added &= !FEATURES_OK;
        }
        if (self.state.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.state.status |= added;
        (added & DRIVER_OK != 0).then(|| self.activation())
    }

    /// What the device behind the transport must be told when the driver is ready.
    pub fn activation(&self) -> Intent {
        let queues =
            (0u16..).zip(&self.state.queues).filter(|(_, queue)| queue.enabled).map(|(index, queue)| QueueConfig {
                index,
                size: queue.size,
                descriptor_table: queue.descriptor_table,
                available_ring: queue.available_ring,
                used_ring: queue.used_ring,
                vector: self.queue_vector(index),
            });
        Intent::Activate {
            features: self.state.driver_features,
            queues: queues.collect(),
            config_vector: self.config_vector(),
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
