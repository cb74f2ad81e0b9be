//! The memory map that every kernel is given, however it is booted.

use crate::machine::layout::{ECAM, LEGACY, Span};

/// What a stretch of addresses is (ACPI 6.5, table 15.3; the PVH start info uses the same numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Usable memory.
    Ram = 1,
    /// Not usable; says nothing about what is there.
    Reserved = 2,
}

/// One entry of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The addresses.
    pub span: Span,
    /// What they are.
    pub kind: MapKind,
}

/// The map of a machine with RAM at `ram` (from [`crate::machine::layout::ram`]): RAM without the legacy hole below 1 MiB, and the reserved
/// stretches that a kernel checks for (the ACPI tables and ECAM).
pub fn memory_map(ram: &[Span]) -> Vec<MapEntry> {
    let mut map = Vec::with_capacity(ram.len() + 3);
    for span in ram {
        if span.start < LEGACY.start {
            let low = Span { start: span.start, len: LEGACY.start - span.start };
            let high = Span { start: LEGACY.end(), len: span.end() - LEGACY.end() };
            map.push(MapEntry { span: low, kind: MapKind::Ram });
            map.push(MapEntry { span: LEGACY, kind: MapKind::Reserved });
            map.push(MapEntry { span: high, kind: MapKind::Ram });
        } else {
            map.push(MapEntry { span: *span, kind: MapKind::Ram });
        }
    }
    map.push(MapEntry { span: ECAM, kind: MapKind::Reserved });
    map.sort_by_key(|entry| entry.span.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout::ram;

    /// Part of the frozen board: the map of a machine with RAM on both sides of the PCI hole.
    #[test]
    fn map_of_a_large_machine() {
        let lines: Vec<String> = memory_map(&ram(5 << 30).unwrap())
            .iter()
            .map(|entry| format!("{:#x}..{:#x} {:?}", entry.span.start, entry.span.end(), entry.kind))
            .collect();
        assert_eq!(
            lines,
            [
                "0x0..0xa0000 Ram",
                "0xa0000..0x100000 Reserved",
                "0x100000..0xc0000000 Ram",
                "0xe0000000..0xf0000000 Reserved",
                "0x100000000..0x180000000 Ram",
            ]
        );
    }
}
