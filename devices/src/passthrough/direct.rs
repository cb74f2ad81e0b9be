//! Which pages of a BAR a guest may reach without anybody between: those that the host can map, without the ones that hold
//! what is answered here (the table and the pending bits of MSI-X).

use super::shown::{MsixPlace, Stretch};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Whole pages of a BAR: offset and length.
pub type Pages = (u64, u64);

fn down(at: u64) -> u64 {
    at & !(PAGE - 1)
}

fn up(at: u64) -> u64 {
    at.checked_add(PAGE - 1).map_or(!(PAGE - 1), down)
}

/// Takes a stretch out of whole pages.
fn without(pages: Vec<Pages>, hole: Stretch) -> Vec<Pages> {
    let (first, end) = (down(hole.offset), up(hole.offset.saturating_add(hole.len)));
    let cut = |(offset, len): Pages| {
        let last = offset + len;
        let before = (offset, last.min(first).saturating_sub(offset));
        let after = (offset.max(end), last.saturating_sub(offset.max(end)));
        [before, after]
    };
    pages.into_iter().flat_map(cut).filter(|(_, len)| *len > 0).collect()
}

/// The pages of BAR `bar`, `len` bytes long, that a guest may reach by itself. `mappable` are the stretches (offset, length)
/// of it that the host can map.
pub fn direct_pages(bar: u8, len: u64, mappable: &[(u64, u64)], msix: Option<MsixPlace>) -> Vec<Pages> {
    let whole = |(offset, size): &(u64, u64)| {
        let end = down(offset.saturating_add(*size).min(len));
        let offset = up(*offset);
        (offset < end).then(|| (offset, end - offset))
    };
    let mut pages: Vec<Pages> = mappable.iter().filter_map(whole).collect();
    let holes = msix.into_iter().flat_map(|place| [place.table, place.pending]);
    for hole in holes.filter(|hole| hole.bar == bar) {
        pages = without(pages, hole);
    }
    pages
}
