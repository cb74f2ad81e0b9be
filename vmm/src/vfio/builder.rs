//! Puts a function of the host on the board.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use atoll_devices::passthrough::{PassedFunction, PassedParts, Shown, direct_pages};
use atoll_devices::pci::{BarKind, DevFn, SharedFunction};

use super::bars::{Direct, DirectBars};
use super::behind::Behind;
use super::device::{Device, Handle};
use super::error::VfioError;
use super::pin::Pin;
use super::space::{DmaSpace, Place, SharedSpace, own_space};
use super::watch::{Watch, Watched};
use crate::config::{DeviceKind, PassthroughConfig};
use crate::iommu::{Endpoint, endpoint_id};
use crate::lifecycle::{DeviceReport, DeviceState, RecoveryClass, Story};
use crate::machine::layout;
use crate::machine::{Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, Ground, LifeError, Withdrawal};
use crate::memory::GuestMemory;
use crate::metrics::Registry;
use crate::passthrough::Bdf;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A function that is open, and what it showed then.
struct Opened {
    device: Arc<Device>,
    space: std::sync::Weak<DmaSpace>,
    config: Vec<u8>,
}

/// What functions of one machine share.
pub(crate) struct Surroundings {
    /// What they reach, unless they are behind the guest's IOMMU.
    pub(crate) shared: SharedSpace,
    /// Where is told what becomes of them.
    pub(crate) story: Story,
    /// Where figures are.
    pub(crate) registry: Registry,
}

/// Makes one function of the host a device of the guest.
pub(crate) struct VfioBuilder {
    name: String,
    bdf: Bdf,
    folder: PathBuf,
    group: Option<Arc<OwnedFd>>,
    iommu: bool,
    shared: SharedSpace,
    story: Story,
    registry: Registry,
    opened: Option<Opened>,
}

impl VfioBuilder {
    /// Of the device `name`. Nothing is opened yet.
    pub(crate) fn new(name: String, bdf: Bdf, config: &PassthroughConfig, surroundings: Surroundings) -> Self {
        let (folder, iommu, group) = (config.path.clone(), config.iommu, config.group.0.first().cloned());
        let Surroundings { shared, story, registry } = surroundings;
        Self { name, bdf, folder, group, iommu, shared, story, registry, opened: None }
    }

    fn open(&self, memory: &GuestMemory) -> Result<Opened, VfioError> {
        let place = Place::new(&self.folder, self.bdf, self.group.clone());
        let open = match self.iommu {
            true => own_space(&place, memory)?,
            false => self.shared.open(&place, memory)?,
        };
        let space = Arc::downgrade(&open.space);
        let device = Arc::new(Device::new(self.bdf, open)?);
        let config = device.config()?;
        Ok(Opened { device, space, config })
    }

    fn shown(&self) -> String {
        format!("--device {} ({})", self.folder.display(), self.name)
    }
}

impl DeviceBuilder for VfioBuilder {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn prepare(&mut self, ground: &Ground, _withdrawal: &Withdrawal) -> Result<(), BuildError> {
        if self.opened.is_none() {
            let opened = self.open(&ground.memory);
            self.opened = Some(opened.map_err(|error| BuildError::new(self.shown(), error))?);
        }
        Ok(())
    }

    fn build(mut self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let ground = Ground { memory: board.memory().clone(), relay: Arc::clone(board.relay()) };
        self.prepare(&ground, &Withdrawal::default())?;
        let shown = self.shown();
        self.put_on(board).map_err(|source| BuildError::new(shown, source))
    }
}

impl VfioBuilder {
    fn put_on(mut self, board: &mut Board) -> Result<BuiltDevice, Cause> {
        let Opened { device, space, config } = self.opened.take().ok_or("its preparation had failed")?;
        let bdf = self.bdf;
        let failed = |source| VfioError::Function { bdf, source };
        let mut facts = device.facts().clone();
        let mut shown = Shown::of(&config, &facts).map_err(|error| failed(error.into()))?;
        fits(bdf, &shown)?;
        let (wire, line) = board.next_pin();
        let mut pin = match shown.pin {
            true => Some(Arc::new(Pin::new(board.fabric(), line.into(), wire, Arc::downgrade(&device))?)),
            false => None,
        };
        let windows = board.processor().windows();
        // Who reaches the registers without anybody in between cannot be seen to serve a line that is set here.
        if windows.is_some() && pin.as_ref().is_some_and(|pin| pin.by_hand()) {
            if shown.msi.is_none() && shown.msix.is_none() {
                return Err(VfioError::PinOnly { bdf }.into());
            }
            facts.pin = false;
            pin = None;
            shown = Shown::of(&config, &facts).map_err(|error| failed(error.into()))?;
        }
        let vectors = board.vectors(shown.vectors())?;
        let direct = if windows.is_some() { direct(&device, &shown) } else { Vec::new() };
        let registers = board.bar_mapping();
        let bars = Arc::new(DirectBars::new(Arc::clone(&registers), windows, direct));
        tracing::debug!(function = %bdf, direct = bars.direct_bytes(), vectors = vectors.len(), pin = shown.pin, "opened");
        device.wire(Arc::clone(&vectors), pin.clone());
        let behind = match self.iommu {
            true => Some(self.behind(board, &space)?),
            false => None,
        };
        let function = PassedFunction::new(PassedParts {
            config,
            facts,
            host: Box::new(Handle(Arc::clone(&device))),
            mapping: Arc::clone(&bars) as _,
            routes: vectors,
            line,
        })
        .map_err(failed)?;
        let shared: SharedFunction = Arc::new(Mutex::new(function));
        let place = board.add_pci(shared, &registers)?;
        let watch = Watch::start(Watched {
            name: self.name.clone(),
            device: Arc::clone(&device),
            bars: Arc::clone(&bars),
            pin,
            story: self.story.clone(),
            events: board.events().clone(),
        })?;
        let life = VfioLife { name: self.name.clone(), place, device, bars, behind, watch: Some(watch) };
        Ok(BuiltDevice { name: self.name, place: Some(place), life: Box::new(life) })
    }

    /// Puts the function behind the guest's IOMMU; until a driver attaches it, it reaches all of RAM.
    fn behind(&self, board: &Board, space: &std::sync::Weak<DmaSpace>) -> Result<Arc<Behind>, Cause> {
        let unit = board.iommu().ok_or(VfioError::NoUnit)?;
        let place = board.next_slot().and_then(|slot| DevFn::new(slot, 0)).ok_or("all PCI slots are taken")?;
        let space = space.upgrade().ok_or("it is closed already")?;
        let endpoint = endpoint_id(place);
        let meter = self.registry.uncounted(&self.name, DeviceKind::Vfio)?;
        let behind = Arc::new(Behind::new(Arc::clone(unit), endpoint, &space, meter));
        let known: Arc<dyn Endpoint> = Arc::clone(&behind) as _;
        unit.join(endpoint, Arc::downgrade(&known));
        behind.follow(atoll_devices::iommu::IovaRange::ALL)?;
        Ok(behind)
    }
}

/// Refuses BARs that no board has room for, before anything is made of them.
fn fits(bdf: Bdf, shown: &Shown) -> Result<(), VfioError> {
    for bar in &shown.bars {
        let room = match bar.kind {
            BarKind::Memory64 { .. } => layout::MMIO64.len,
            BarKind::Memory32 => layout::MMIO32.len,
            BarKind::Io => layout::PCI_IO.len,
        };
        if bar.len > room {
            return Err(VfioError::BarTooLarge { bdf, bar: bar.bar, len: bar.len, room });
        }
    }
    Ok(())
}

/// Maps what of the function's BARs the guest may reach by itself.
fn direct(device: &Device, shown: &Shown) -> Vec<Direct> {
    let mut all = Vec::new();
    for bar in shown.bars.iter().filter(|bar| bar.kind != BarKind::Io) {
        for (offset, len) in direct_pages(bar.bar, bar.len, &device.mappable(bar.bar), shown.msix) {
            match device.pages(bar.bar, offset, len) {
                Ok(pages) => all.push(Direct { bar: bar.bar, offset, pages: Arc::new(pages) }),
                // Each access comes out, and is answered all the same.
                Err(error) => tracing::warn!(bar = bar.bar, %error, "registers of a device cannot be mapped"),
            }
        }
    }
    all
}

/// A function's part in the machine's life.
struct VfioLife {
    name: String,
    place: DevFn,
    device: Arc<Device>,
    bars: Arc<DirectBars>,
    behind: Option<Arc<Behind>>,
    watch: Option<Watch>,
}

impl VfioLife {
    fn end(&mut self) {
        self.watch = None;
        self.bars.close();
        self.device.close();
        if let Some(behind) = self.behind.take() {
            behind.leave();
        }
    }
}

impl Drop for VfioLife {
    fn drop(&mut self) {
        self.end();
    }
}

impl DeviceLife for VfioLife {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        // The kernel resets the function as it is closed, and takes guest memory out of its reach.
        self.end();
        Ok(())
    }
    fn report(&self) -> Option<DeviceReport> {
        let reason = self.device.trouble();
        Some(DeviceReport {
            id: self.name.clone(),
            kind: DeviceKind::Vfio,
            bdf: Some(format!("0000:00:{:02x}.{}", self.place.slot(), self.place.function())),
            state: if reason.is_some() { DeviceState::Quarantined } else { DeviceState::Running },
            reason,
            generation: 1,
            restarts: 0,
            failed_starts: 0,
            upgrade: None,
            link: None,
            recovery: RecoveryClass::None,
            counted: None,
            pid: None,
            exe: None,
            standby: None,
            jail: std::collections::BTreeMap::new(),
            last_exit: None,
            last_lines: Vec::new(),
            queues: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use atoll_devices::passthrough::HostFacts;

    use super::*;

    /// Recorded from QEMU's drive, whose BAR has 64 bits.
    const DRIVE: &[u8] = include_bytes!("../../../devices/src/passthrough/recorded/nvme.config");

    /// A BAR of more than the guest's address space has for all of them is refused with what it has, whatever the device claims.
    #[test]
    fn a_bar_larger_than_the_address_space_is_refused() {
        let bdf: Bdf = "0000:01:00.0".parse().unwrap();
        let with = |len: u64| {
            let facts = HostFacts { bar_lens: [len, 0, 0, 0, 0, 0], pin: true, msi: 0, msix: 0 };
            fits(bdf, &Shown::of(DRIVE, &facts).unwrap())
        };
        with(0x4000).unwrap();
        with(layout::MMIO64.len).unwrap();
        for len in [2 * layout::MMIO64.len, 1 << 63] {
            let error = with(len).unwrap_err();
            assert!(matches!(error, VfioError::BarTooLarge { bar: 0, .. }), "{error}");
            assert!(error.to_string().contains("resource0_resize"), "{error}");
        }
    }
}
