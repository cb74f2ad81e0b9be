//! The walker against a second, plain one, on random tables; the table of fault codes; hostile tables.

use proptest::prelude::{Strategy, any, prop};
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::test_machine::{RAM_BYTES, TestMachine};

/// Frames at the bottom of RAM in which random tables live.
const TABLE_FRAMES: u64 = 4;

/// Control state of a case.
#[derive(Clone, Copy, Debug)]
struct Control {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

/// The same rules, written down once more as plainly as possible: one level after the other, as a list of (index bits,
/// entry width), with all entries in a vector. No A and D, which are compared by the caller.
fn plain(
    memory: &dyn Fn(u64, u32) -> u64,
    control: Control,
    pdpte: [u64; 4],
    linear: u64,
    access: Access,
    user: bool,
) -> Result<u64, u32> {
    let long = control.efer & EFER_LMA != 0;
    let pae = control.cr4 & CR4_PAE != 0;
    let nxe = control.efer & EFER_NXE != 0;
    let smep = control.cr4 & CR4_SMEP != 0;
    let mut code = 0;
    if access == Access::Write {
        code |= 2;
    }
    if user {
        code |= 4;
    }
    if access == Access::Execute && (smep || pae && nxe) {
        code |= 16;
    }
    if control.cr0 & CR0_PG == 0 {
        return Ok(linear & 0xffff_ffff);
    }
    let shifts: &[u32] = match (long, pae) {
        (true, _) => &[39, 30, 21, 12],
        (false, true) => &[21, 12],
        (false, false) => &[22, 12],
    };
    let width = if pae { 8 } else { 4 };
    let address: u64 = if pae { 0xff_ffff_f000 } else { 0xffff_f000 };
    let mut table = if long { control.cr3 & address } else { control.cr3 & 0xffff_f000 };
    if !long && pae {
        let entry = pdpte[(linear >> 30) as usize];
        if entry & 1 == 0 {
            return Err(code);
        }
        table = entry & address;
    }
    let (mut w, mut u, mut x) = (true, true, true);
    for &shift in shifts {
        let count = if pae { 512 } else { 1024 };
        let entry = memory(table + (linear >> shift) % count * u64::from(width), width);
        if entry & 1 == 0 {
            return Err(code);
        }
        let ps = shift != 12 && entry & 0x80 != 0 && (pae || control.cr4 & CR4_PSE != 0);
        let mut bad = false;
        if pae {
            bad |= entry >> 40 & if long { 0xfff } else { 0x7f_ffff } != 0;
            bad |= entry >> 63 != 0 && !nxe;
            bad |= shift == 39 && entry & 0x80 != 0;
            bad |= ps && shift == 30 && entry >> 13 & 0x1_ffff != 0;
            bad |= ps && shift == 21 && entry >> 13 & 0xff != 0;
        } else {
            bad |= ps && entry >> 21 & 1 != 0;
        }
        if bad {
            return Err(code | 9);
        }
        w &= entry & 2 != 0;
        u &= entry & 4 != 0;
        x &= entry >> 63 == 0;
        if ps || shift == 12 {
            let allowed = match access {
                Access::Read => u || !user,
                Access::Write => (u || !user) && (w || !user && control.cr0 & CR0_WP == 0),
                Access::Execute => (u || !user) && x && (user || !u || !smep),
            };
            if !allowed {
                return Err(code | 1);
            }
            let inside = (1u64 << shift) - 1;
            let mut base = entry & address;
            if ps && !pae {
                base = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
            }
            return Ok(base & !inside | linear & inside);
        }
        table = entry & address;
    }
    unreachable!("the last level has returned")
}

/// Entries that lead somewhere more often than random bits would.
fn entry() -> impl Strategy<Value = u64> {
    let flags = prop::sample::select(vec![0x7u64, 0x67, 0x27, 0x107, 0x1, 0x3, 0x5, 0x87, 0x85, 0x187, 0x6]);
    let frame = prop::sample::select(vec![0u64, 1, 2, 3, 1, 2, 3, 0x80, 0xff, 0x200, 0x1000, 0xf_fe00]);
    let odd = prop::bool::weighted(0.1).prop_flat_map(|odd| {
        prop::sample::select(if odd { vec![1 << 63, 1 << 40, 1 << 52, 1 << 13, 1 << 21, 1 << 62] } else { vec![0u64] })
    });
    (flags, frame, odd).prop_map(|(flags, frame, odd)| flags | frame << 12 | odd)
}

fn control() -> impl Strategy<Value = Control> {
    (0u8..4, any::<[bool; 5]>(), 0u64..TABLE_FRAMES).prop_map(|(mode, [wp, smep, nxe, pse, pge], frame)| {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        Control {
            cr0: CR0_PG | bit(wp, CR0_WP),
            cr3: frame << 12,
            cr4: bit(mode != 0, CR4_PAE) | bit(smep, CR4_SMEP) | bit(pse, CR4_PSE) | bit(pge, CR4_PGE),
            efer: bit(mode > 1, EFER_LMA) | bit(nxe, EFER_NXE),
        }
    })
}

#[test]
fn agrees_with_a_plain_walker_on_random_tables() {
    let entries = prop::collection::vec((0u64..TABLE_FRAMES, 0u64..2, entry()), 24);
    let linear = (0u64..2, 0u64..2, 0u64..2, 0u64..2, 0u64..4096);
    let access = prop::sample::select(vec![Access::Read, Access::Write, Access::Execute]);
    let strategy = (control(), entries, linear, access, any::<bool>());
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 10_000, ..Config::default() },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let (mut hits, mut faults) = (0u32, 0u32);
    let machine = std::cell::RefCell::new(TestMachine::new());
    let counts = std::cell::RefCell::new((&mut hits, &mut faults));
    runner
        .run(&strategy, |(control, entries, (l4, l3, l2, l1, offset), access, user)| {
            let mut machine = machine.borrow_mut();
            machine.write(0, &[0; TABLE_FRAMES as usize * 4096]);
            for (frame, index, value) in entries {
                machine.write64(frame << 12 | index << 3, value);
            }
            let wide = l4 << 39 | l3 << 30 | l2 << 21 | l1 << 12 | offset;
            let linear = if control.efer & EFER_LMA != 0 { wide } else { wide & 0xffff_ffff };
            let ram = machine.cpu.ram.clone();
            let mut walker = Walker {
                ram: &ram,
                cr0: control.cr0,
                cr3: control.cr3,
                cr4: control.cr4,
                efer: control.efer,
                pdpte: [0; 4],
                physical_bits: 40,
            };
            if control.cr4 & CR4_PAE != 0 && control.efer & EFER_LMA == 0 {
                walker.pdpte = walker.load_pdptes().unwrap_or_default();
            }
            let read_all = |machine: &mut TestMachine| -> Vec<u64> {
                (0..TABLE_FRAMES * 512).map(|index| machine.read64(index * 8)).collect()
            };
            let before = read_all(&mut machine);
            let memory = |gpa: u64, width: u32| {
                let all_ones = if width == 8 { !0 } else { 0xffff_ffff };
                let Some(word) = (gpa < RAM_BYTES).then(|| before.get((gpa / 8) as usize).copied().unwrap_or(0)) else {
                    return all_ones;
                };
                if width == 8 { word } else { word >> (gpa % 8 * 8) & 0xffff_ffff }
            };
            let expected = plain(&memory, control, walker.pdpte, linear, access, user);
            let got = walker.translate(linear, access, user, false).map(|found| found.frame | linear & 0xfff);
            assert_eq!(got, expected);
            // Entries gain A and D, and only when the walk succeeded; nothing else in memory changes.
            let mut gained = 0;
            for (old, new) in before.iter().zip(read_all(&mut machine)) {
                assert_eq!(new & !0x60_0000_0060, old & !0x60_0000_0060);
                assert_eq!(new & old, *old, "a bit was lost");
                gained |= new ^ old;
            }
            if expected.is_err() {
                assert_eq!(gained, 0);
            }
            // Once more: the second walk finds its bits set and says the same.
            let again = walker.translate(linear, access, user, true).map(|found| found.frame | linear & 0xfff);
            assert_eq!(again, expected);
            let mut counts = counts.borrow_mut();
            if expected.is_ok() {
                *counts.0 += 1;
            } else {
                *counts.1 += 1;
            }
            Ok(())
        })
        .expect("both walkers agree");
    assert!(hits > 500 && faults > 500, "the cases reach both ends: {hits} translations, {faults} faults");
}

/// (leaf entry, access, user, WP, SMEP) and the outcome: the address is mapped, or the error code.
#[test]
fn fault_codes_are_those_of_the_manual() {
    const NX: u64 = 1 << 63;
    let table = [
        (0x7, Access::Read, true, true, true, Ok(())),
        (0x3, Access::Read, true, true, true, Err(0x5)),
        (0x3, Access::Read, false, true, true, Ok(())),
        (0x5, Access::Write, true, true, true, Err(0x7)),
        (0x5, Access::Write, false, true, true, Err(0x3)),
        (0x5, Access::Write, false, false, true, Ok(())),
        (0x5, Access::Write, true, false, true, Err(0x7)),
        (0x6, Access::Write, true, true, true, Err(0x6)),
        (0x0, Access::Execute, false, true, true, Err(0x10)),
        (0x7, Access::Execute, false, true, true, Err(0x11)),
        (0x7, Access::Execute, false, true, false, Ok(())),
        (0x7 | NX, Access::Execute, true, true, true, Err(0x15)),
        (0x3 | NX, Access::Execute, false, true, true, Err(0x11)),
        (0x3, Access::Execute, false, true, true, Ok(())),
        (0x7 | 1 << 45, Access::Read, true, true, true, Err(0xd)),
        (0x7 | 1 << 45, Access::Write, false, true, true, Err(0xb)),
        (0x7 | 1 << 45, Access::Execute, false, true, true, Err(0x19)),
    ];
    for (row, (leaf, access, user, wp, smep, expected)) in table.into_iter().enumerate() {
        let mut machine = TestMachine::long();
        machine.write64(0xe_0000, 0xe_1007);
        machine.write64(0xe_1000, 0xe_2007);
        machine.write64(0xe_2000, 0xe_3007);
        machine.write64(0xe_3000 + 5 * 8, 0x5000 | leaf);
        let ram = machine.cpu.ram.clone();
        let walker = Walker {
            ram: &ram,
            cr0: CR0_PG | if wp { CR0_WP } else { 0 },
            cr3: 0xe_0000,
            cr4: CR4_PAE | if smep { CR4_SMEP } else { 0 },
            efer: EFER_LMA | EFER_NXE,
            pdpte: [0; 4],
            physical_bits: 40,
        };
        let got = walker.translate(0x5123, access, user, false).map(|found| assert_eq!(found.frame, 0x5000));
        assert_eq!(got, expected, "row {row}");
        let dirty = machine.read64(0xe_3000 + 5 * 8) & DIRTY != 0;
        assert_eq!(dirty, expected.is_ok() && access == Access::Write, "row {row}: D");
        assert_eq!(machine.read64(0xe_0000) & ACCESSED != 0, expected.is_ok(), "row {row}: A");
    }
}

/// A table that points at itself on every level is a fine way to map page tables, and a table outside RAM reads as all
/// ones: neither may hang, panic or reach host memory that is not the guest's.
#[test]
fn loops_and_tables_outside_ram_are_harmless() {
    let mut machine = TestMachine::long();
    for index in 0..512 {
        machine.write64(0xe_0000 + index * 8, 0xe_0067);
    }
    machine.cpu.state_replaced();
    let mut data = [0; 8];
    let world = &mut machine.world;
    machine.cpu.read_slow(world, 0xffff_f000, &mut data, false).expect("the table maps itself");
    assert_eq!(u64::from_le_bytes(data), 0xe_0067);

    for outside in [0x10_0000u64, 0xfee0_0000, 0xff_ffff_f000] {
        for level in 0..4u64 {
            let mut machine = TestMachine::long();
            let tables = [0xe_0000u64, 0xe_1000, 0xe_2000, 0xe_3000];
            for (at, table) in tables.into_iter().enumerate() {
                let next = tables.get(at + 1).copied().unwrap_or(0x5000);
                machine.write64(table, if at as u64 == level { outside } else { next } | 7);
            }
            machine.cpu.state_replaced();
            let outcome = machine.cpu.read_slow(&mut machine.world, 0x10, &mut data, false);
            if level == 3 {
                outcome.expect("a device frame is the board's business");
                assert_eq!(machine.world.reads, [(outside | 0x10, 8)]);
            } else {
                assert_eq!(outcome.map_err(|fault| fault.error), Err(Some(9)), "all ones have reserved bits set");
                assert!(machine.world.reads.is_empty());
            }
            let fetched = machine.cpu.fetch_page(0x10, false);
            assert!(fetched.is_err(), "code does not run from outside RAM");
        }
    }
}
