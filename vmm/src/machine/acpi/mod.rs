//! The ACPI tables of board `atoll-1`: what the guest is told about the hardware that it cannot discover.
//!
//! They are frozen with the board and pinned by a golden test. RSDP first, then FACS, DSDT, FADT, MADT, MCFG and XSDT,
//! one after the other below 1 MiB.

mod dsdt;
mod fixed;
mod hotplug;
mod viot;

pub use viot::Topology;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::boot::BootError;
use super::layout::{ACPI_TABLES, ECAM, Span};

/// Who made the tables.
const OEM: [u8; 6] = *b"ATOLL ";
/// Which board.
const OEM_TABLE: [u8; 8] = *b"ATOLL-1 ";
/// Version of the tables.
const OEM_REVISION: u32 = 1;

/// What the tables depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// vCPUs, 1 to 255.
    pub vcpus: u8,
    /// Whether COM1 is there.
    pub com1: bool,
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Tables one after the other, and where each came to lie.
struct Layout {
    image: Vec<u8>,
}

impl Layout {
    /// Address of the next table; FACS wants 64 bytes of alignment, and it hurts nobody else.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.image.resize(self.image.len().next_multiple_of(64), 0);
        let address = ACPI_TABLES.start + self.image.len() as u64;
        self.image.extend_from_slice(table);
        address
    }
}

/// All tables as they lie from [`ACPI_TABLES`] on; the RSDP is first. With an IOMMU there is one more, behind the others.
pub fn tables(config: AcpiConfig, iommu: Option<&Topology>) -> Vec<u8> {
    let mut layout = Layout { image: vec![0; Rsdp::len()] };
    let facs = layout.add(&bytes(&FACS::new()));
    let dsdt = layout.add(&dsdt::dsdt(config));
    let fadt = layout.add(&bytes(&fixed::fadt(facs, dsdt)));
    let madt = layout.add(fixed::madt(config).as_slice());
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 255);
    let mcfg = layout.add(&bytes(&mcfg));
    let viot = iommu.map(|topology| layout.add(&viot::viot(topology)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg].into_iter().chain(viot) {
        xsdt.add_entry(table);
    }
    let xsdt = layout.add(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    layout.image[..rsdp.len()].copy_from_slice(&rsdp);
    layout.image
}

/// Writes the tables into guest memory; where the RSDP is.
///
/// # Errors
/// When there is no RAM for them.
pub fn write_tables(config: AcpiConfig, iommu: Option<&Topology>, memory: &GuestMemoryMmap) -> Result<u64, BootError> {
    let image = tables(config, iommu);
    let span = Span { start: ACPI_TABLES.start, len: image.len() as u64 };
    if span.len > ACPI_TABLES.len {
        return Err(BootError::NoRam(span));
    }
    memory.write_slice(&image, GuestAddress(span.start)).map_err(|_| BootError::NoRam(span))?;
    Ok(span.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(image: &[u8]) -> String {
        let line = |(index, row): (usize, &[u8])| {
            let hex: String = row.iter().map(|byte| format!(" {byte:02x}")).collect();
            format!("{:05x}:{hex}\n", ACPI_TABLES.start as usize + index * 16)
        };
        image.chunks(16).enumerate().map(line).collect()
    }

    /// The tables are part of the frozen board: a snapshot that was taken under them resumes under them. A change here
    /// is a new board. The golden file was checked with `iasl -d`, which read it back without an error.
    #[test]
    fn tables_are_pinned() {
        let image = dump(&tables(AcpiConfig { vcpus: 2, com1: true }, None));
        let golden = include_str!("golden/atoll-1.txt");
        assert!(image == golden, "the ACPI tables of board atoll-1 have changed:\n{image}");
    }

    /// Every table's bytes add up to zero, and each is found from the RSDP.
    #[test]
    fn tables_are_linked_and_summed() {
        let config = AcpiConfig { vcpus: 255, com1: false };
        let image = tables(config, None);
        assert!(image.len() as u64 <= ACPI_TABLES.len);
        let at = |address: u64| &image[(address - ACPI_TABLES.start) as usize..];
        let word = |bytes: &[u8], offset: usize| u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap());
        let long = |bytes: &[u8], offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap());
        let table = |address: u64| {
            let bytes = at(address);
            let table = &bytes[..word(bytes, 4) as usize];
            assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{:?}", &table[..4]);
            table.to_vec()
        };
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(image[..20].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = table(long(&image, 24));
        let entries: Vec<Vec<u8>> = xsdt[36..].chunks(8).map(|entry| table(long(entry, 0))).collect();
        let names: Vec<&[u8]> = entries.iter().map(|entry| &entry[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = &entries[0];
        assert_eq!(&table(long(fadt, 140))[..4], b"DSDT");
        assert_eq!(&at(long(fadt, 132))[..4], b"FACS");
        let behind = tables(config, Some(&Topology { iommu: 8, endpoints: vec![16, 24, 40] }));
        assert_eq!(behind.windows(4).filter(|word| word == b"VIOT").count(), 1);
        assert!(image.windows(4).all(|word| word != b"VIOT"), "without an IOMMU nothing has changed");
        let local_apics = entries[1][44..].windows(4).filter(|entry| entry[..2] == [0, 8] && entry[2] == entry[3]);
        assert!(local_apics.count() >= 255);
    }
}
