//! What a builder finds: memory, address space, interrupts, and the means to start what stands behind a device.

use std::sync::Arc;

use atoll_devices::{MsiSink, Wire};

use crate::cpu::Processor;
use crate::irq::{InterruptFabric, IrqError, VectorTable};

/// A board under construction.
pub struct Board {
    processor: Arc<dyn Processor>,
    fabric: Arc<dyn InterruptFabric>,
}

impl Board {
    /// An empty board around a processor.
    pub fn new(processor: Arc<dyn Processor>) -> Self {
        let fabric = processor.interrupts();
        Self { processor, fabric }
    }

    /// The processor.
    pub fn processor(&self) -> &Arc<dyn Processor> {
        &self.processor
    }

    /// A wire to input `gsi` of the interrupt controllers: 0 to 15 are the ISA lines, 16 to 23 those of PCI.
    pub fn wire(&self, gsi: u32) -> Wire {
        Wire::new(Arc::new(GsiSink(Arc::clone(&self.fabric))), gsi)
    }

    /// Where messages that the core itself sends go.
    pub fn msi(&self) -> Arc<dyn MsiSink> {
        Arc::new(GsiSink(Arc::clone(&self.fabric)))
    }

    /// Eventfds for the MSI-X vectors of one function.
    pub fn vectors(&self, count: u16) -> Result<Arc<VectorTable>, IrqError> {
        VectorTable::new(self.fabric.as_ref(), count).map(Arc::new)
    }
}

/// The fabric as devices hold it.
struct GsiSink(Arc<dyn InterruptFabric>);

impl atoll_devices::WireSink for GsiSink {
    fn set_level(&self, line: u32, high: bool) {
        self.0.set_level(line, high);
    }
}

impl MsiSink for GsiSink {
    fn fire(&self, message: atoll_devices::MsiMessage) {
        self.0.fire(message);
    }
}
