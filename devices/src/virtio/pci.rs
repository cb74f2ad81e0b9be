//! virtio over PCI (virtio 1.2, 4.1), modern drivers only: one memory BAR with all register blocks.
//!
//! The transport keeps everything that a driver can see; what it wants done goes to a [`VirtioFrontend`] as an
//! [`Intent`](super::Intent), under the function's lock: a frontend must not call the function from there. Queue interrupts do not pass through
//! here when MSI-X is on (eventfds go straight to the routes); without MSI-X the frontend's calls come back as
//! [`VirtioPci::signal_queue`].
//!
//! A reset may take its time behind the transport. The guest's write completes at once, and the status register keeps its
//! old value until the frontend is done, which is what the specification makes drivers wait for; meanwhile every other
//! write to the registers is ignored.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use thiserror::Error;

use super::common_config::{self, CommonConfig, CommonState, QUEUES_MAX, VERSION_1};
use super::device_class::{pci_class, writable_config, writable_value};
use super::driver_intent::{DeviceOffer, Intent, NotifyPlacement, VirtioFrontend};
use super::input_config::Pages;
use crate::access::{Answer, Deferred};
use crate::interrupt::{MsiMessage, MsixRoutes, Wire};
use crate::pci::config_space::{BarKind, CONFIG_LEN, CapabilityError, ConfigSpace, Identity};
use crate::pci::function::{BarError, BarMapping, PciFunction};
use crate::pci::msix::{ENTRY_LEN, Msix, MsixState, VectorCountError};

/// The BAR with the register blocks.
pub const BAR: u8 = 0;
/// Its length in bytes.
pub const BAR_LEN: u64 = 0x1_0000;
/// Where the notification addresses start in the BAR; a page of their own.
pub const NOTIFY_OFFSET: u64 = 0x3000;
/// Distance between the notification addresses of two queues.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Most bytes of device configuration.
pub const CONFIG_MAX: usize = 0x1000;

const COMMON_OFFSET: u64 = 0;
const ISR_OFFSET: u64 = 0x1000;
pub(super) const DEVICE_OFFSET: u64 = 0x2000;
const TABLE_OFFSET: u64 = 0x4000;
const PENDING_OFFSET: u64 = 0xc000;
const BLOCK_LEN: u64 = 0x1000;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
const CAPABILITY_VENDOR: u8 = 0x09;

const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// An offer that no transport can make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum OfferError {
    /// Modern devices must offer VIRTIO_F_VERSION_1.
    #[error("the device does not offer VIRTIO_F_VERSION_1 (bit 32); legacy-only devices are not supported")]
    Legacy,
    /// The type does not fit a PCI device id.
    #[error("virtio device type {0} has no PCI device id; types 1 to 63 do")]
    DeviceType(u16),
    /// A device has 1 to 1024 queues.
    #[error("the device has {0} queues; 1 to {QUEUES_MAX} are possible")]
    QueueCount(usize),
    /// A queue size that is not a power of two up to 32768.
    #[error("queue {index} has {size} descriptors; a power of two up to 32768 is needed")]
    QueueSize {
        /// The queue.
        index: usize,
        /// Its size.
        size: u16,
    },
    /// Configuration space is longer than its window.
    #[error("the device has {0} bytes of configuration space; at most {CONFIG_MAX} are possible")]
    ConfigLength(usize),
    /// A BAR was refused.
    #[error(transparent)]
    Bar(#[from] BarError),
    /// A capability was refused.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// The vectors were refused.
    #[error(transparent)]
    Vectors(#[from] VectorCountError),
}

impl DeviceOffer {
    /// Checks what a backend offers before a guest sees it.
    ///
    /// # Errors
    /// [`OfferError`] names what is wrong.
    pub fn check(&self) -> Result<(), OfferError> {
        if self.features & VERSION_1 == 0 {
            return Err(OfferError::Legacy);
        }
        if !(1..=63).contains(&self.device_type) {
            return Err(OfferError::DeviceType(self.device_type));
        }
        if !(1..=QUEUES_MAX).contains(&self.queue_sizes.len()) {
            return Err(OfferError::QueueCount(self.queue_sizes.len()));
        }
        let bad = |size: u16| !size.is_power_of_two();
        if let Some((index, size)) = self.queue_sizes.iter().enumerate().find(|(_, size)| bad(**size)) {
            return Err(OfferError::QueueSize { index, size: *size });
        }
        if self.config.len() > CONFIG_MAX {
            return Err(OfferError::ConfigLength(self.config.len()));
        }
        Ok(())
    }

    /// Number of MSI-X vectors of a function with this offer: one a queue and one for configuration changes.
    pub fn vectors(&self) -> u16 {
        self.queue_sizes.len().min(QUEUES_MAX) as u16 + 1
    }
}

/// What a virtio function is made of.
pub struct VirtioPciParts {
    /// What the guest is shown; frozen.
    pub offer: DeviceOffer,
    /// What stands behind the transport.
    pub frontend: Box<dyn VirtioFrontend>,
    /// Follows the BAR.
    pub mapping: Arc<dyn BarMapping>,
    /// Follows the addresses at which queues are rung.
    pub doorbells: Box<dyn NotifyPlacement>,
    /// Follows the vectors: [`DeviceOffer::vectors`] of them.
    pub routes: Arc<dyn MsixRoutes>,
    /// The interrupt for guests that do not use MSI-X.
    pub intx: Wire,
    /// Interrupt pin, 1 (INTA#) to 4.
    pub intx_pin: u8,
    /// What firmware would have written into the interrupt line register: the line's number.
    pub intx_line: u8,
}

/// What a guest can see of a virtio function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioPciState {
    /// PCI configuration space.
    pub pci: [u8; CONFIG_LEN],
    /// MSI-X table.
    pub msix: MsixState,
    /// Registers.
    pub common: CommonState,
    /// Device configuration.
    pub config: Vec<u8>,
    /// Interrupt status.
    pub isr: u8,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    pci: ConfigSpace,
    pci_cap: u8,
    msix: Msix,
    common: CommonConfig,
    device_type: u16,
    /// Device configuration as the guest reads it.
    config: Vec<u8>,
    /// What it may choose from there.
    pages: Pages,
    isr: u8,
    intx: Wire,
    intx_high: bool,
    frontend: Box<dyn VirtioFrontend>,
    doorbells: Box<dyn NotifyPlacement>,
    /// Where the BAR was when `doorbells` was last told.
    placed: Option<u64>,
    /// The frontend has queues to stop when the driver resets.
    active: bool,
    /// A reset that the frontend is still busy with.
    resetting: Option<Deferred>,
}

impl VirtioPci {
    /// Makes the function.
    ///
    /// # Errors
    /// [`OfferError`] for an offer that no guest could use.
    pub fn new(parts: VirtioPciParts) -> Result<Self, OfferError> {
        let VirtioPciParts { offer, frontend, mapping, doorbells, routes, intx, intx_pin, intx_line } = parts;
        offer.check()?;
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + offer.device_type,
            revision: 1,
            class: pci_class(offer.device_type),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let mut pci = ConfigSpace::new(identity, mapping);
        pci.add_bar(BAR, BarKind::Memory64 { prefetchable: false }, BAR_LEN)?;
        pci.set_interrupt(intx_pin, intx_line);
        let mut msix = Msix::new(offer.vectors(), routes)?;
        msix.add_capability(&mut pci, BAR, TABLE_OFFSET as u32, PENDING_OFFSET as u32)?;
        let notify_len = NOTIFY_MULTIPLIER * offer.queue_sizes.len() as u32;
        let config_len = offer.config.len() as u32;
        let blocks = [
            (CAP_COMMON, COMMON_OFFSET, common_config::LEN as u32),
            (CAP_ISR, ISR_OFFSET, 1),
            (CAP_DEVICE, DEVICE_OFFSET, config_len),
        ];
        for (kind, offset, len) in blocks.into_iter().filter(|block| block.2 != 0) {
            pci.add_capability(CAPABILITY_VENDOR, &capability(kind, offset as u32, len, &[]), &[])?;
        }
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        pci.add_capability(
            CAPABILITY_VENDOR,
            &capability(CAP_NOTIFY, NOTIFY_OFFSET as u32, notify_len, &multiplier),
            &[],
        )?;
        // BAR, offset, length and the data window belong to the driver.
        let window = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let pci_cap = pci.add_capability(CAPABILITY_VENDOR, &capability(CAP_PCI, 0, 0, &[0; 4]), &window)?;
        let common = CommonConfig::new(&offer, msix.vectors());
        Ok(Self {
            pci,
            pci_cap,
            msix,
            common,
            device_type: offer.device_type,
            config: offer.config,
            pages: offer.pages,
            isr: 0,
            intx,
            intx_high: false,
            frontend,
            doorbells,
            placed: None,
            active: false,
            resetting: None,
        })
    }

    /// Where queue `index` is notified, as an offset in BAR 0. A doorbell that listens there replaces
    /// [`VirtioFrontend::notify`].
    pub fn notify_address(index: u16) -> u64 {
        NOTIFY_OFFSET + u64::from(NOTIFY_MULTIPLIER) * u64::from(index)
    }

    /// What MSI-X vector `vector` sends now.
    pub fn vector_message(&self, vector: u16) -> Option<MsiMessage> {
        self.msix.message(vector)
    }

    /// The vector that queue `index` interrupts by.
    pub fn queue_vector(&self, index: u16) -> Option<u16> {
        self.common.queue_vector(index)
    }

    /// Whether queue interrupts go by MSI-X; if not they come through [`signal_queue`](Self::signal_queue).
    pub fn msix_enabled(&self) -> bool {
        self.msix.enabled()
    }

    /// Features that the driver has been accepted with.
    pub fn accepted_features(&self) -> Option<u64> {
        self.common.accepted_features()
    }

    /// Queue `index` has used buffers: interrupts the driver by vector or wire.
    pub fn signal_queue(&mut self, index: u16) {
        self.interrupt(self.common.queue_vector(index), ISR_QUEUE);
    }

    /// The device's configuration has changed. A new one of another length is cut or filled up: the length is frozen.
    pub fn config_changed(&mut self, config: &[u8]) {
        let mut changed = false;
        for (to, from) in self.config.iter_mut().zip(config) {
            changed |= *to != *from;
            *to = *from;
        }
        if changed {
            self.common.config_changed();
        }
        self.repeat_config_interrupt();
    }

    /// Tells the driver to look at configuration and status, for example because an interrupt may have been lost.
    pub fn repeat_config_interrupt(&mut self) {
        if self.common.running() {
            self.interrupt(self.common.config_vector(), ISR_CONFIG);
        }
    }

    /// The device cannot go on until the driver resets it.
    pub fn set_needs_reset(&mut self) {
        if self.common.set_needs_reset() {
            self.interrupt(self.common.config_vector(), ISR_CONFIG);
        }
    }

    fn interrupt(&mut self, vector: Option<u16>, isr: u8) {
        if self.msix.enabled() {
            if let Some(vector) = vector {
                self.msix.signal(vector);
            }
        } else {
            self.isr |= isr;
            self.update_intx();
        }
    }

    /// Tells the doorbells when the BAR has moved.
    fn place_doorbells(&mut self) {
        let base = self.pci.mapped(BAR);
        if base != self.placed {
            self.placed = base;
            for index in 0..self.common.state().queues.len() as u16 {
                self.doorbells.placed(index, base.map(|base| base.saturating_add(Self::notify_address(index))));
            }
        }
    }

    fn update_intx(&mut self) {
        let pending = self.isr != 0 && !self.msix.enabled();
        self.pci.set_interrupt_status(pending);
        let high = pending && !self.pci.intx_disabled();
        if high != self.intx_high {
            self.intx_high = high;
            self.intx.set(high);
        }
    }

    /// A copy of the state, for whoever saves it. To be taken while no reset is going on.
    pub fn state(&self) -> VirtioPciState {
        VirtioPciState {
            pci: *self.pci.bytes(),
            msix: self.msix.state().clone(),
            common: self.common.state().clone(),
            config: self.config.clone(),
            isr: self.isr,
        }
    }

    /// Puts a state back into a fresh function with the same offer and, when the driver was running, activates the
    /// frontend. `None` when the state does not belong to this offer; nothing has changed then.
    pub fn restore(&mut self, state: VirtioPciState) -> Option<Answer> {
        let fits = state.config.len() == self.config.len()
            && state.msix.entries.len() == usize::from(self.msix.vectors())
            && self.common.restore(state.common);
        if !fits || !self.msix.restore(state.msix) {
            return None;
        }
        self.pci.restore(&state.pci);
        self.place_doorbells();
        self.config = state.config;
        self.isr = state.isr;
        self.update_intx();
        self.active = self.common.running();
        Some(if self.active { self.frontend.intent(self.common.activation()) } else { Answer::Now })
    }

    /// Looks whether the frontend has finished a reset. A frontend that dropped its answer is gone: nothing of it is left to
    /// wait for.
    fn poll_reset(&mut self) {
        if let Some(deferred) = &mut self.resetting
            && let Poll::Ready(_) = Pin::new(deferred).poll(&mut Context::from_waker(Waker::noop()))
        {
            self.finish_reset();
        }
    }

    fn finish_reset(&mut self) {
        self.resetting = None;
        self.active = false;
        self.common.reset();
        self.isr = 0;
        self.update_intx();
        if !self.pages.is_empty() {
            self.turn_to(0, 0);
        }
    }

    fn reset_frontend(&mut self) {
        if !self.active {
            self.finish_reset();
            return;
        }
        match self.frontend.intent(Intent::Reset) {
            Answer::Now => self.finish_reset(),
            Answer::Later(deferred) => {
                self.resetting = Some(deferred);
                self.poll_reset();
            }
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.poll_reset();
        if self.resetting.is_some() {
            return Answer::Now;
        }
        match usize::try_from(offset).ok().and_then(|offset| self.common.write(offset, data)) {
            None => Answer::Now,
            Some(Intent::Reset) => {
                self.reset_frontend();
                Answer::Now
            }
            Some(intent) => {
                self.active = true;
                self.frontend.intent(intent)
            }
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.poll_reset();
        let features = self.common.accepted_features().unwrap_or(self.common.offered_features());
        let (Some(writable), Ok(start)) = (writable_config(self.device_type, features), usize::try_from(offset)) else {
            return Answer::Now;
        };
        let Some(end) = start.checked_add(data.len()).filter(|end| writable.start <= start && *end <= writable.end)
        else {
            return Answer::Now;
        };
        let (Some(bytes), None) = (self.config.get_mut(start..end), &self.resetting) else { return Answer::Now };
        if !writable_value(self.device_type, data) {
            return Answer::Now;
        }
        bytes.copy_from_slice(data);
        if !self.pages.is_empty() {
            // What is behind the transport knows the same pages, and nobody else turns them.
            if let [select, subsel, ..] = *self.config.as_slice() {
                self.turn_to(select, subsel);
            }
            return Answer::Now;
        }
        self.frontend.intent(Intent::ConfigWrite { offset: offset as u32, data: data.to_vec() })
    }

    fn turn_to(&mut self, select: u8, subsel: u8) {
        let page = self.pages.config(select, subsel);
        self.config.iter_mut().zip(page).for_each(|(to, byte)| *to = byte);
    }

    /// What the access capability's window says: offset and length of an access to the BAR (4.1.4.9).
    fn window(&self) -> Option<(u64, usize)> {
        let at = usize::from(self.pci_cap);
        let bytes = self.pci.bytes();
        let dword = |at: usize| bytes.get(at..at + 4)?.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        let (offset, len) = (u64::from(dword(at + 8)?), dword(at + 12)? as usize);
        let fits = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64) && offset + len as u64 <= BAR_LEN;
        (bytes[at + 4] == BAR && fits).then_some((offset, len))
    }

    /// Where the window's data is in configuration space.
    fn window_data(&self) -> u8 {
        self.pci_cap + 16
    }
}

/// A virtio capability (4.1.4) from its type on; the id and the link are put before it.
fn capability(kind: u8, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + extra.len() as u8, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra);
    body
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) -> Answer {
        if ConfigSpace::touches(offset, data.len(), self.window_data(), 4)
            && let Some((at, len)) = self.window()
        {
            let mut window = [0u8; 4];
            let _ = self.bar_read(BAR, at, &mut window[..len]);
            for (byte, to) in window.iter().zip(self.window_data()..) {
                self.pci.set_byte(to, *byte);
            }
        }
        self.pci.read(offset, data);
        Answer::Now
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Answer {
        self.pci.write(offset, data);
        self.msix.config_written(&self.pci, offset, data.len());
        self.place_doorbells();
        self.update_intx();
        if ConfigSpace::touches(offset, data.len(), self.window_data(), 4)
            && let Some((at, len)) = self.window()
        {
            let start = usize::from(self.window_data());
            let mut window = [0u8; 4];
            window.copy_from_slice(&self.pci.bytes()[start..start + 4]);
            return self.bar_write(BAR, at, &window[..len]);
        }
        Answer::Now
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0);
        if bar != BAR {
            data.fill(0xff);
            return Answer::Now;
        }
        let within = offset % BLOCK_LEN;
        match offset - within {
            COMMON_OFFSET => {
                self.poll_reset();
                self.common.read(within as usize, data);
            }
            ISR_OFFSET => {
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = std::mem::take(&mut self.isr);
                    self.update_intx();
                }
            }
            DEVICE_OFFSET => {
                let bytes = self.config.get(within as usize..).unwrap_or_default();
                data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
            TABLE_OFFSET..PENDING_OFFSET => self.msix.table_read(offset - TABLE_OFFSET, data),
            PENDING_OFFSET => self.msix.pending_read(within, data),
            _ => {}
        }
        Answer::Now
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) -> Answer {
        if bar != BAR {
            return Answer::Now;
        }
        let within = offset % BLOCK_LEN;
        match offset - within {
            COMMON_OFFSET => return self.write_common(within, data),
            DEVICE_OFFSET => return self.write_config(within, data),
            NOTIFY_OFFSET => {
                let index = (within / u64::from(NOTIFY_MULTIPLIER)) as u16;
                let exists = usize::from(index) < self.common.state().queues.len()
                    && within.is_multiple_of(NOTIFY_MULTIPLIER.into());
                // While a reset is going on the status still reads as running, but the queues are stopping.
                if exists && self.common.running() && self.resetting.is_none() {
                    self.frontend.notify(index);
                }
            }
            TABLE_OFFSET..PENDING_OFFSET => self.msix.table_write(offset - TABLE_OFFSET, data),
            _ => {}
        }
        Answer::Now
    }

    fn reset(&mut self) -> Answer {
        self.poll_reset();
        if self.resetting.is_none() {
            self.reset_frontend();
        }
        // Whoever resets the machine waits instead of the guest.
        let pending = self.resetting.take();
        self.finish_reset();
        self.pci.reset();
        self.place_doorbells();
        self.msix.reset();
        self.update_intx();
        pending.map_or(Answer::Now, Answer::Later)
    }

    fn bars(&self) -> Vec<(u8, BarKind, u64)> {
        self.pci.bars().collect()
    }

    fn assign_bar(&mut self, bar: u8, base: u64) -> Result<(), BarError> {
        self.pci.assign_bar(bar, base)?;
        self.place_doorbells();
        Ok(())
    }
}

impl Drop for VirtioPci {
    /// A function that is removed is rung nowhere and holds no line.
    fn drop(&mut self) {
        for index in 0..self.common.state().queues.len() as u16 {
            self.doorbells.placed(index, None);
        }
        if self.intx_high {
            self.intx.set(false);
        }
    }
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VirtioPci")
            .field("device_type", &self.device_type)
            .field("common", self.common.state())
            .finish_non_exhaustive()
    }
}

/// The table of a function with the most queues ends before the pending bits.
const _: () = assert!((QUEUES_MAX as u64 + 1) * ENTRY_LEN <= PENDING_OFFSET - TABLE_OFFSET);
const _: () = assert!(QUEUES_MAX as u64 * NOTIFY_MULTIPLIER as u64 <= BLOCK_LEN);
