//! The translation cache: three direct-mapped tables (read, write, execute) for each of the two privileges.
//!
//! An entry exists only for a RAM page for which the access needs no further check: permissions hold, A (and D for
//! writing) are set, and a page that holds decoded code has no write entry. So a hit is one comparison and one addition,
//! and everything else is the slow path's business.
//!
//! Flushing must be cheap, because an operating system does it tens of thousands of times a second. A load of CR3 keeps
//! global pages; the non-global slots in use are kept in a list, so the cost is that of the entries made since the last
//! flush and not that of the tables. INVLPG clears one slot, and looks for fragments of a large page only where a filter
//! says that there may be some.

use std::mem::size_of;
use std::sync::Arc;

use crate::huge::{HugePages, Placed};

/// Entries of each table. Booting Linux to a shell takes 190,000 data fills with 1024 entries, six times as many with
/// 512, and with 2048 two thirds.
pub const TLB_ENTRIES: usize = 2048;

/// Tag of an empty entry: no page has this address.
const EMPTY: u64 = !0;

/// Flags in the low bits of a slot's note; the frame's guest-physical address is above them.
const GLOBAL: u64 = 1;
const LISTED: u64 = 2;
const LARGE: u64 = 4;
const HUGE: u64 = 8;
const FLAGS: u64 = 0xfff;

/// Words of the filter of large pages.
const FILTER_WORDS: usize = 64;

/// One cached translation.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear address of the page; all ones when empty.
    pub tag: u64,
    /// Host address = linear address + addend, wrapping.
    pub addend: usize,
}

/// Which of a privilege's three tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Data reads.
    Read = 0,
    /// Data writes.
    Write = 1,
    /// Instruction fetches.
    Exec = 2,
}

/// How much linear address space the page-table entry behind a translation maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Large,
    /// 4 MiB (32-bit paging).
    Legacy,
    /// 1 GiB.
    Huge,
}

/// The tables of one privilege.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tlb {
    /// Data reads.
    pub read: [TlbEntry; TLB_ENTRIES],
    /// Data writes.
    pub write: [TlbEntry; TLB_ENTRIES],
    /// Instruction fetches.
    pub exec: [TlbEntry; TLB_ENTRIES],
    /// Frame and flags of each slot, beside the entries so that those stay sixteen bytes.
    notes: [[u64; TLB_ENTRIES]; 3],
    /// [`Mmu::dma_epoch`] at which each slot for instruction fetches was filled.
    filled: [u64; TLB_ENTRIES],
}

/// What a fill puts into a slot.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Linear address of the page.
    pub linear: u64,
    /// Host address of the frame.
    pub host: *mut u8,
    /// Guest-physical address of the frame.
    pub gpa: u64,
    /// The translation survives a load of CR3.
    pub global: bool,
    /// Size of the page that this is a fragment of.
    pub size: PageSize,
}

impl Tlb {
    const fn empty() -> Self {
        let none = [TlbEntry { tag: EMPTY, addend: 0 }; TLB_ENTRIES];
        Self { read: none, write: none, exec: none, notes: [[0; TLB_ENTRIES]; 3], filled: [0; TLB_ENTRIES] }
    }

    fn table(&mut self, kind: usize) -> &mut [TlbEntry; TLB_ENTRIES] {
        match kind {
            0 => &mut self.read,
            1 => &mut self.write,
            _ => &mut self.exec,
        }
    }

    /// Index of the slot for a linear address.
    #[inline(always)]
    pub fn index(linear: u64) -> usize {
        (linear >> 12) as usize & (TLB_ENTRIES - 1)
    }

    /// The entry for `linear`, if it is cached.
    #[inline(always)]
    pub fn lookup(&self, kind: Kind, linear: u64) -> Option<TlbEntry> {
        let table = match kind {
            Kind::Read => &self.read,
            Kind::Write => &self.write,
            Kind::Exec => &self.exec,
        };
        let entry = table[Self::index(linear)];
        (entry.tag == linear & !0xfff).then_some(entry)
    }

    /// Whether an entry for `linear` would push out no other page's.
    #[inline(always)]
    pub fn is_free(&self, kind: Kind, linear: u64) -> bool {
        let tag = match kind {
            Kind::Read => &self.read,
            Kind::Write => &self.write,
            Kind::Exec => &self.exec,
        }[Self::index(linear)]
        .tag;
        tag == EMPTY || tag == linear & !0xfff
    }

    /// When the slot for instruction fetches at `linear` was filled, in the measure of [`Mmu::dma_epoch`].
    pub(crate) fn filled(&self, linear: u64) -> u64 {
        self.filled[Self::index(linear)]
    }

    /// Guest-physical frame of the slot at `index`; meaningful while the slot's tag is set.
    #[inline(always)]
    pub fn frame(&self, kind: Kind, index: usize) -> u64 {
        self.notes[kind as usize][index & (TLB_ENTRIES - 1)] & !FLAGS
    }
}

/// Everything that caches translations.
pub struct Mmu {
    /// Supervisor tables at 0, user tables at 1.
    pub(crate) tlb: Placed<[Tlb; 2]>,
    /// For the lower and the upper half of the address space: grows whenever a translation that
    /// [`Mmu::remember_exec`] was told of may have changed. Whoever keeps code by linear address compares it.
    pub exec_epochs: [u64; 2],
    /// How often backends have reported that they wrote memory.
    pub(crate) dma_epoch: u64,
    /// What has been remembered since the epoch last grew, for each half.
    remembered: [Remembered; 2],
    /// PDPTE registers of PAE paging (SDM vol. 3, 4.4.1); loaded at a CR3 write, or at the first walk after the state
    /// was set from outside.
    pub(crate) pdpte: Option<[u64; 4]>,
    /// DR6 bits of debug traps that wait for the next instruction boundary.
    pub(crate) pending_debug: u64,
    /// Slots filled since the last flush that were not global when filled: privilege << 15 | kind << 13 | index.
    listed: Vec<u16>,
    /// One bit for each hash of a 2 MiB or 1 GiB region of which fragments may be cached.
    filter: [u64; FILTER_WORDS],
    /// Pages that hold decoded code, a bit for each frame of each RAM region.
    code: Vec<CodeBits>,
}

/// Pages from which code is remembered by linear address.
#[derive(Clone, Copy, Default)]
struct Remembered {
    /// One bit for each hash of a page.
    pages: [u64; 16],
    /// One bit for each hash of a large page that some of them are fragments of.
    large: u64,
    /// Some page is not global.
    local: bool,
}

/// The code bits of one stretch of RAM.
struct CodeBits {
    gpa: u64,
    frames: u64,
    bits: Vec<u64>,
}

impl Mmu {
    /// Empty caches for the given RAM stretches (guest-physical address and length).
    pub(crate) fn new(pages: &Arc<HugePages>, ram: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let code = ram
            .into_iter()
            .map(|(gpa, len)| CodeBits { gpa, frames: len / 4096, bits: vec![0; (len / 4096).div_ceil(64) as usize] })
            .collect();
        Self {
            tlb: Placed::new(pages, Box::new([const { Tlb::empty() }; 2])),
            exec_epochs: [0; 2],
            dma_epoch: 0,
            remembered: [Remembered::default(); 2],
            pdpte: None,
            pending_debug: 0,
            listed: Vec::with_capacity(2 * 3 * TLB_ENTRIES),
            filter: [0; FILTER_WORDS],
            code,
        }
    }

    /// Memory held by the tables.
    pub fn cache_bytes(&self) -> usize {
        size_of::<Self>()
            + self.tlb.heap_bytes()
            + self.listed.capacity() * 2
            + self.code.iter().map(|stretch| stretch.bits.len() * 8).sum::<usize>()
    }

    /// Caches a translation.
    pub fn fill(&mut self, user: bool, kind: Kind, fill: Fill) {
        let index = Tlb::index(fill.linear);
        let tlb = &mut self.tlb[usize::from(user)];
        let page = fill.linear & !0xfff;
        tlb.table(kind as usize)[index] =
            TlbEntry { tag: page, addend: (fill.host as usize).wrapping_sub(page as usize) };
        if kind == Kind::Exec {
            tlb.filled[index] = self.dma_epoch;
        }
        let note = &mut tlb.notes[kind as usize][index];
        let mut flags = *note & LISTED;
        if fill.global {
            flags |= GLOBAL;
        } else if flags & LISTED == 0 {
            flags |= LISTED;
            self.listed.push(u16::from(user) << 15 | (kind as u16) << 13 | index as u16);
        }
        flags |= match fill.size {
            PageSize::Small => 0,
            PageSize::Large => LARGE,
            PageSize::Legacy => LARGE | HUGE,
            PageSize::Huge => HUGE,
        };
        *note = fill.gpa & !FLAGS | flags;
        if fill.size != PageSize::Small {
            let (word, bit) = filter_bit(region_of(page, fill.size));
            self.filter[word] |= bit;
        }
    }

    /// Empties everything (a change of CR0, CR4 or EFER that alters translation).
    pub fn flush_all(&mut self) {
        for tlb in self.tlb.iter_mut() {
            for kind in 0..3 {
                for entry in tlb.table(kind) {
                    entry.tag = EMPTY;
                }
                tlb.notes[kind] = [0; TLB_ENTRIES];
            }
        }
        self.listed.clear();
        self.filter = [0; FILTER_WORDS];
        self.forget_exec(0);
        self.forget_exec(1);
    }

    /// To be told of each linear page (with an entry in the execute table) that a jump cache leads to.
    pub(crate) fn remember_exec(&mut self, user: bool, linear: u64) {
        let half = &mut self.remembered[(linear >> 63) as usize];
        let (word, bit) = page_bit(linear);
        half.pages[word] |= bit;
        let note = self.tlb[usize::from(user)].notes[Kind::Exec as usize][Tlb::index(linear)];
        half.local |= note & GLOBAL == 0;
        match note & (LARGE | HUGE) {
            0 => {}
            LARGE => half.large |= region_bit(region_of(linear, PageSize::Large)),
            HUGE => half.large |= region_bit(region_of(linear, PageSize::Huge)),
            _ => half.large |= region_bit(region_of(linear, PageSize::Legacy)),
        }
    }
    /// Remembered code of one half may lie elsewhere now.
    fn forget_exec(&mut self, half: usize) {
        self.exec_epochs[half] += 1;
        self.remembered[half] = Remembered::default();
    }

    /// Empties what a load of CR3 empties: all but global pages.
    pub fn flush_non_global(&mut self) {
        for &slot in &self.listed {
            let tlb = &mut self.tlb[usize::from(slot >> 15)];
            let (kind, index) = (usize::from(slot >> 13) & 3, usize::from(slot) & (TLB_ENTRIES - 1));
            let note = &mut tlb.notes[kind][index];
            *note &= !LISTED;
            if *note & GLOBAL == 0 {
                tlb.table(kind)[index].tag = EMPTY;
            }
        }
        self.listed.clear();
        for half in 0..2 {
            if self.remembered[half].local {
                self.forget_exec(half);
            }
        }
    }

    /// INVLPG: drops every translation of the page that holds `linear`, whatever its size, global or not.
    pub fn flush_page(&mut self, linear: u64) {
        let (page, index) = (linear & !0xfff, Tlb::index(linear));
        for tlb in self.tlb.iter_mut() {
            for kind in 0..3 {
                let entry = &mut tlb.table(kind)[index];
                if entry.tag == page {
                    entry.tag = EMPTY;
                }
            }
        }
        let regions = [PageSize::Large, PageSize::Legacy, PageSize::Huge].map(|size| region_of(page, size));
        if regions.into_iter().any(|region| {
            let (word, bit) = filter_bit(region);
            self.filter[word] & bit != 0
        }) {
            self.flush_fragments(regions);
        }
        let half = (linear >> 63) as usize;
        let remembered = &self.remembered[half];
        let (word, bit) = page_bit(linear);
        if remembered.pages[word] & bit != 0
            || regions.into_iter().any(|region| remembered.large & region_bit(region) != 0)
        {
            self.forget_exec(half);
        }
    }

    /// Drops the fragments of some large regions, and makes the filter exact again on the way.
    fn flush_fragments(&mut self, regions: [u64; 3]) {
        self.filter = [0; FILTER_WORDS];
        for tlb in self.tlb.iter_mut() {
            for kind in 0..3 {
                for index in 0..TLB_ENTRIES {
                    let size = match tlb.notes[kind][index] & (LARGE | HUGE) {
                        0 => continue,
                        LARGE => PageSize::Large,
                        HUGE => PageSize::Huge,
                        _ => PageSize::Legacy,
                    };
                    let entry = &mut tlb.table(kind)[index];
                    if entry.tag == EMPTY {
                        continue;
                    }
                    let region = region_of(entry.tag, size);
                    if regions.contains(&region) {
                        entry.tag = EMPTY;
                    } else {
                        let (word, bit) = filter_bit(region);
                        self.filter[word] |= bit;
                    }
                }
            }
        }
    }

    /// Drops every execute entry: a backend has written memory, so the next fetch from each page must be looked at.
    pub fn drop_exec(&mut self) {
        for tlb in self.tlb.iter_mut() {
            for entry in &mut tlb.exec {
                entry.tag = EMPTY;
            }
        }
        self.forget_exec(0);
        self.forget_exec(1);
    }

    fn code_word(&mut self, gpa: u64) -> Option<(&mut u64, u64)> {
        let stretch = self
            .code
            .iter_mut()
            .find(|stretch| gpa.checked_sub(stretch.gpa).is_some_and(|offset| offset / 4096 < stretch.frames))?;
        let frame = (gpa - stretch.gpa) / 4096;
        Some((stretch.bits.get_mut((frame / 64) as usize)?, 1 << (frame % 64)))
    }

    /// Notes that the frame at `gpa` holds decoded code: writes to it take the slow path from now on.
    pub fn protect_code(&mut self, gpa: u64) {
        let Some((word, bit)) = self.code_word(gpa) else { return };
        if *word & bit != 0 {
            return;
        }
        *word |= bit;
        let frame = gpa & !FLAGS;
        for tlb in self.tlb.iter_mut() {
            for (entry, note) in tlb.write.iter_mut().zip(&tlb.notes[Kind::Write as usize]) {
                if *note & !FLAGS == frame {
                    entry.tag = EMPTY;
                }
            }
        }
    }

    /// The frame at `gpa` holds no decoded code any more.
    pub fn unprotect_code(&mut self, gpa: u64) {
        if let Some((word, bit)) = self.code_word(gpa) {
            *word &= !bit;
        }
    }

    /// Whether the frame at `gpa` holds decoded code.
    pub fn is_code(&self, gpa: u64) -> bool {
        self.code.iter().any(|stretch| {
            gpa.checked_sub(stretch.gpa).is_some_and(|offset| {
                let frame = offset / 4096;
                frame < stretch.frames
                    && stretch.bits.get((frame / 64) as usize).is_some_and(|word| word >> (frame % 64) & 1 != 0)
            })
        })
    }
}

/// A number for the region that a large page covers.
fn region_of(linear: u64, size: PageSize) -> u64 {
    match size {
        PageSize::Small | PageSize::Large => linear >> 21,
        PageSize::Legacy => linear >> 22 | 1 << 62,
        PageSize::Huge => linear >> 30 | 1 << 63,
    }
}

fn filter_bit(region: u64) -> (usize, u64) {
    let hash = region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    ((hash / 64) as usize & (FILTER_WORDS - 1), 1 << (hash % 64))
}

fn region_bit(region: u64) -> u64 {
    1 << (region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

fn page_bit(linear: u64) -> (usize, u64) {
    let hash = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    ((hash / 64) as usize & 15, 1 << (hash % 64))
}
