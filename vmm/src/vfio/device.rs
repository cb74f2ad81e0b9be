//! One function of the host, open: its regions, its interrupts, and its end.
//!
//! It may be closed at any time (the guest has let it go, the host wants it back); from then on it reads as ones, and nobody
//! is interrupted by it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use atoll_devices::passthrough::{EXTENDED_LEN, HostFacts, HostFunction, Interrupts, Region};
use vfio_bindings::bindings::vfio;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::error::VfioError;
use super::ioctl::{self, IrqAction};
use super::pin::Pin;
use super::space::OpenFunction;
use crate::irq::VectorTable;
use crate::memory::DevicePages;
use crate::passthrough::Bdf;

const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
const INTX: u32 = vfio::VFIO_PCI_INTX_IRQ_INDEX;
const MSI: u32 = vfio::VFIO_PCI_MSI_IRQ_INDEX;
const MSIX: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;
const ERRORS: u32 = vfio::VFIO_PCI_ERR_IRQ_INDEX;
const REQUESTS: u32 = vfio::VFIO_PCI_REQ_IRQ_INDEX;
const BARS: u32 = 6;

/// How a function interrupts.
struct Wiring {
    by: Interrupts,
    vectors: Option<Arc<VectorTable>>,
    pin: Option<Arc<Pin>>,
}

/// A function of the host.
pub(super) struct Device {
    bdf: Bdf,
    open: RwLock<Option<OpenFunction>>,
    /// The BARs, and configuration space behind them.
    regions: Vec<ioctl::Region>,
    facts: HostFacts,
    wiring: Mutex<Wiring>,
    /// What is wrong with it, for who asks.
    trouble: Mutex<Option<String>>,
    /// The host tells of errors here.
    pub(super) failed: EventFd,
    /// The host wants it back.
    pub(super) wanted: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Looks at what was opened.
    ///
    /// # Errors
    /// When it is no PCI function, or does not answer.
    pub(super) fn new(bdf: Bdf, open: OpenFunction) -> Result<Self, VfioError> {
        let failed = |step| move |source| VfioError::Step { bdf, step, source };
        let flags = ioctl::device_flags(&open.file).map_err(failed("asking what it is"))?;
        if flags & vfio::VFIO_DEVICE_FLAGS_PCI == 0 {
            let source = io::Error::other("VFIO does not take it for a PCI function");
            return Err(VfioError::Step { bdf, step: "asking what it is", source });
        }
        let region = |index| ioctl::region(&open.file, index).map_err(failed("asking for its regions"));
        let mut regions = (0..BARS).map(region).collect::<Result<Vec<_>, _>>()?;
        let mut facts = HostFacts::default();
        for (len, region) in facts.bar_lens.iter_mut().zip(&regions) {
            *len = region.len;
        }
        regions.push(region(CONFIG)?);
        let count = |index| ioctl::irq_count(&open.file, index).map_err(failed("asking for its interrupts"));
        let many = |index| count(index).map(|count| u16::try_from(count).unwrap_or(u16::MAX));
        (facts.pin, facts.msi, facts.msix) = (count(INTX)? > 0, many(MSI)?, many(MSIX)?);
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("making an eventfd"));
        let (errors, wanted) = (event()?, event()?);
        for (index, event) in [(ERRORS, &errors), (REQUESTS, &wanted)] {
            // Not every function tells of these.
            if count(index)? > 0 {
                ioctl::set_irqs(&open.file, index, IrqAction::Trigger(&[event.as_raw_fd()]))
                    .map_err(failed("listening for what the host says of it"))?;
            }
        }
        Ok(Self {
            bdf,
            open: RwLock::new(Some(open)),
            regions,
            facts,
            wiring: Mutex::new(Wiring { by: Interrupts::None, vectors: None, pin: None }),
            trouble: Mutex::default(),
            failed: errors,
            wanted,
        })
    }

    /// Where it is.
    pub(super) fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// What the host says of it.
    pub(super) fn facts(&self) -> &HostFacts {
        &self.facts
    }

    /// Its configuration space, as long as it is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn config(&self) -> Result<Vec<u8>, VfioError> {
        let len = self.regions.last().map_or(0, |region| region.len).min(EXTENDED_LEN as u64);
        let mut config = vec![0xff; len as usize];
        for (at, bytes) in (0_u64..).step_by(4).zip(config.chunks_mut(4)) {
            self.access(Region::Config, at, |file, offset| rustix::io::pread(file, bytes, offset))
                .map_err(|source| VfioError::Step { bdf: self.bdf, step: "reading its configuration space", source })?;
        }
        Ok(config)
    }

    /// The stretches of a BAR that can be mapped.
    pub(super) fn mappable(&self, bar: u8) -> Vec<(u64, u64)> {
        let Some(region) = self.regions.get(usize::from(bar)).filter(|region| region.mappable && bar < BARS as u8)
        else {
            return Vec::new();
        };
        region.sparse.clone().unwrap_or_else(|| vec![(0, region.len)])
    }

    /// Maps pages of a BAR.
    ///
    /// # Errors
    /// When they cannot be.
    pub(super) fn pages(&self, bar: u8, offset: u64, len: u64) -> io::Result<DevicePages> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let open = open.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let region = self.regions.get(usize::from(bar)).ok_or(io::ErrorKind::InvalidInput)?;
        DevicePages::map(&open.file, region.offset + offset, len)
    }

    /// Connects what it interrupts with.
    pub(super) fn wire(&self, vectors: Arc<VectorTable>, pin: Option<Arc<Pin>>) {
        let mut wiring = lock(&self.wiring);
        (wiring.vectors, wiring.pin) = (Some(vectors), pin);
    }

    /// What is wrong with it.
    pub(super) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Something is wrong with it; the first word stands.
    pub(super) fn complain(&self, what: String) {
        tracing::warn!(function = %self.bdf, "{what}");
        lock(&self.trouble).get_or_insert(what);
    }

    /// Unmasks the pin; whether the function is still there.
    pub(super) fn unmask_pin(&self) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.as_ref().is_some_and(|open| ioctl::set_irqs(&open.file, INTX, IrqAction::Unmask).is_ok())
    }

    /// Closes it: it interrupts nobody, reaches no memory, and the host may have it. Pages of it that were mapped are to be
    /// given back before.
    pub(super) fn close(&self) {
        self.interrupt(Interrupts::None);
        let open = self.open.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(open);
        let mut wiring = lock(&self.wiring);
        (wiring.vectors, wiring.pin) = (None, None);
    }

    fn access(
        &self,
        region: Region,
        offset: u64,
        act: impl FnOnce(&std::fs::File, u64) -> rustix::io::Result<usize>,
    ) -> io::Result<()> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let open = open.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let index = match region {
            Region::Config => BARS as usize,
            Region::Bar(bar) => usize::from(bar),
        };
        let region = self.regions.get(index).ok_or(io::ErrorKind::InvalidInput)?;
        if offset >= region.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        act(&open.file, region.offset + offset)?;
        Ok(())
    }

    fn interrupt(&self, by: Interrupts) {
        let mut wiring = lock(&self.wiring);
        let before = std::mem::replace(&mut wiring.by, by);
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = open.as_ref().filter(|_| before != by) else { return };
        let disabled = match before {
            Interrupts::None => Ok(()),
            Interrupts::Pin => {
                let disabled = ioctl::set_irqs(&open.file, INTX, IrqAction::Disable);
                if let Some(pin) = &wiring.pin {
                    pin.disconnect();
                }
                disabled
            }
            Interrupts::Messages(_) => ioctl::set_irqs(&open.file, MSI, IrqAction::Disable),
            Interrupts::Vectors(_) => ioctl::set_irqs(&open.file, MSIX, IrqAction::Disable),
        };
        let events = |count: u16| -> io::Result<Vec<EventFd>> {
            let vectors = wiring.vectors.as_ref().ok_or(io::ErrorKind::NotConnected)?;
            (0..count).map(|vector| vectors.eventfd(vector).map_err(io::Error::other)).collect()
        };
        let trigger = |index, count| {
            let events = events(count)?;
            let descriptors: Vec<RawFd> = events.iter().map(AsRawFd::as_raw_fd).collect();
            ioctl::set_irqs(&open.file, index, IrqAction::Trigger(&descriptors))
        };
        let enabled = match (by, &wiring.pin) {
            (Interrupts::None, _) | (Interrupts::Pin, None) => Ok(()),
            (Interrupts::Pin, Some(pin)) => pin.connect().and_then(|ended| {
                ioctl::set_irqs(&open.file, INTX, IrqAction::Trigger(&[pin.raised().as_raw_fd()]))?;
                match ended {
                    Some(ended) => ioctl::set_irqs(&open.file, INTX, IrqAction::UnmaskBy(ended.as_raw_fd())),
                    None => Ok(()),
                }
            }),
            (Interrupts::Messages(count), _) => trigger(MSI, count),
            (Interrupts::Vectors(count), _) => trigger(MSIX, count),
        };
        if let Err(error) = disabled.and(enabled) {
            self.complain(format!("its interrupts could not be set up ({by:?}): {error}"));
        }
    }
}

/// The function, as its guest half has it.
pub(super) struct Handle(pub(super) Arc<Device>);

impl Handle {
    /// A guest that has looked at the function may have served its pin.
    fn served(&self) {
        let pin = lock(&self.0.wiring).pin.clone();
        if let Some(pin) = pin {
            pin.served();
        }
    }
}

impl HostFunction for Handle {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        let read = self.0.access(region, offset, |file, offset| {
            let read = rustix::io::pread(file, &mut *data, offset)?;
            if read == data.len() { Ok(read) } else { Err(rustix::io::Errno::IO) }
        });
        if read.is_err() {
            data.fill(0xff);
        }
        if region != Region::Config {
            self.served();
        }
    }
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        // A write that nobody takes is lost, as on a bus.
        let _ = self.0.access(region, offset, |file, offset| rustix::io::pwrite(file, data, offset));
        // Also of its command register: a driver serves a pin by silencing it there.
        self.served();
    }
    fn interrupt(&mut self, by: Interrupts) {
        self.0.interrupt(by);
    }
    fn reset(&mut self) {
        let open = self.0.open.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = open.as_ref().map(|open| ioctl::reset(&open.file)) {
            tracing::warn!(function = %self.0.bdf, %error, "it was not reset");
        }
    }
}
