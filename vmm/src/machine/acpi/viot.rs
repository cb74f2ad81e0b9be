//! Which functions the virtual IOMMU stands before (ACPI 6.5, 5.2.34).

use acpi_tables::Aml;
use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};

use super::{OEM, OEM_REVISION, OEM_TABLE};

/// Where the IOMMU is and what is behind it, all on bus 0: `slot << 3 | function`, which is also an endpoint's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The IOMMU itself.
    pub iommu: u32,
    /// The others, in order.
    pub endpoints: Vec<u32>,
}

fn device(number: u32) -> PciDevice {
    PciDevice::new(0, 0, (number >> 3) as u8 & 31, number as u8 & 7)
}

/// The table: the IOMMU, and a range for each endpoint. What is not named is not behind it.
pub(super) fn viot(topology: &Topology) -> Vec<u8> {
    let mut viot = VIOT::new(OEM, OEM_TABLE, OEM_REVISION);
    let iommu = viot.add_virtio_pci_iommu(VirtIoPciIommu::new(device(topology.iommu)));
    for endpoint in &topology.endpoints {
        viot.add_pci_range(PciRange::new(device(*endpoint), device(*endpoint), &iommu));
    }
    let mut bytes = Vec::new();
    viot.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux reads of it: the offset of the first node, the ranges with their first endpoint, and to whom they lead.
    #[test]
    fn each_endpoint_leads_to_the_iommu() {
        let table = viot(&Topology { iommu: 8, endpoints: vec![16, 40] });
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let half = |at: usize| u16::from_le_bytes([table[at], table[at + 1]]);
        assert_eq!((half(36), half(38)), (3, 48));
        // The IOMMU: type 3, segment and place.
        assert_eq!((table[48], half(50), half(52), half(54)), (3, 16, 0, 8));
        for (at, endpoint) in [(64, 16), (88, 40)] {
            // A range: type 1, first endpoint, segments, places, the node that it leads to.
            assert_eq!((table[at], half(at + 2), half(at + 4), half(at + 6)), (1, 24, endpoint, 0));
            assert_eq!((half(at + 8), half(at + 10)), (0, 0));
            assert_eq!((half(at + 12), half(at + 14), half(at + 16)), (endpoint, endpoint, 48));
        }
        assert_eq!(table.len(), 112);
    }
}
