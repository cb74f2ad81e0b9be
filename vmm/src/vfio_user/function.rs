//! What the guest sees: configuration space and the table of vectors are here, the rest of each BAR is the server's.

use std::sync::{Arc, PoisonError};

use atoll_devices::Answer;
use atoll_devices::access;
use atoll_devices::interrupt::MsixRoutes;
use atoll_devices::pci::config_space::{BarKind, ConfigSpace};
use atoll_devices::pci::msix::{ENTRY_LEN, Msix};
use atoll_devices::pci::{BarError, BarMapping, PciFunction};

use super::device::{Access, Request, Shared};
use super::greeting::{Place, Shape};

const CAPABILITY_VENDOR: u8 = 0x09;

/// Why the function cannot be made.
pub(super) type Unfit = Box<dyn std::error::Error + Send + Sync>;

/// A function that another process serves.
pub(super) struct UserFunction {
    config: ConfigSpace,
    msix: Msix,
    table: Place,
    pending: Place,
    shared: Arc<Shared>,
}

impl UserFunction {
    /// Of that shape.
    ///
    /// # Errors
    /// When configuration space has no room for it.
    pub(super) fn new(
        shape: &Shape,
        mapping: Arc<dyn BarMapping>,
        routes: Arc<dyn MsixRoutes>,
        shared: Arc<Shared>,
    ) -> Result<Self, Unfit> {
        let mut config = ConfigSpace::new(shape.identity, mapping);
        for (bar, kind, len) in &shape.bars {
            config.add_bar(*bar, *kind, *len)?;
        }
        let mut msix = Msix::new(shape.vectors, routes)?;
        msix.add_capability(&mut config, shape.table.bar, shape.table.offset, shape.pending.offset)?;
        for body in &shape.vendor {
            config.add_capability(CAPABILITY_VENDOR, body, &[])?;
        }
        Ok(Self { config, msix, table: shape.table, pending: shape.pending, shared })
    }

    /// Where an access is in the table, and where in what is pending.
    fn place(&self, bar: u8, offset: u64) -> (Option<u64>, Option<u64>) {
        let vectors = u64::from(self.msix.vectors());
        let within = |place: Place, len: u64| {
            let at = offset.checked_sub(place.offset.into())?;
            (place.bar == bar && at < len).then_some(at)
        };
        (within(self.table, vectors * ENTRY_LEN), within(self.pending, vectors.div_ceil(64) * 8))
    }

    fn ask(&self, bar: u8, offset: u64, data: Option<&[u8]>, len: usize) -> Answer {
        let (completion, deferred) = access::deferred();
        let access =
            Access { region: u32::from(bar), offset, data: data.map(<[u8]>::to_vec), len: len.min(8), completion };
        // One that is not taken drops its completion: it ends as one that nobody answered.
        self.shared.send(Request::Access(access));
        Answer::Later(deferred)
    }
}

impl PciFunction for UserFunction {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) -> Answer {
        self.config.read(offset, data);
        Answer::Now
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) -> Answer {
        self.config.write(offset, data);
        self.msix.config_written(&self.config, offset, data.len());
        Answer::Now
    }
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) -> Answer {
        match self.place(bar, offset) {
            (Some(at), _) => self.msix.table_read(at, data),
            (_, Some(at)) => self.msix.pending_read(at, data),
            _ => return self.ask(bar, offset, None, data.len()),
        }
        Answer::Now
    }
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) -> Answer {
        match self.place(bar, offset) {
            (Some(at), _) => self.msix.table_write(at, data),
            (_, Some(_)) => {}
            _ => {
                let doorbells = Arc::clone(&self.shared.doorbells.lock().unwrap_or_else(PoisonError::into_inner));
                if !doorbells.ring(bar, offset, data) {
                    return self.ask(bar, offset, Some(data), data.len());
                }
            }
        }
        Answer::Now
    }
    fn reset(&mut self) -> Answer {
        // The server is reset when it gets the next board's memory.
        self.config.reset();
        self.msix.reset();
        Answer::Now
    }
    fn bars(&self) -> Vec<(u8, BarKind, u64)> {
        self.config.bars().collect()
    }
    fn assign_bar(&mut self, bar: u8, base: u64) -> Result<(), BarError> {
        self.config.assign_bar(bar, base)
    }
}
