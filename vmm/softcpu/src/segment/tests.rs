//! Loading of selectors, offsets in segments, and the instructions that look at descriptors.

use super::*;
use crate::state::Table;
use crate::test_machine::{CODE32, CODE64, DATA32, TestMachine};

const GDT: u64 = 0x2000;
const DPL3: u16 = 0x60;

/// Descriptors by index: 1 code, 2 data, 3 read-only data of user level, 4 not present, 5 execute-only code,
/// 6 conforming code, 7 busy TSS, 8 available TSS (two slots), 10 LDT (two slots), 12 expand-down data, 13 user data.
fn machine(mut machine: TestMachine) -> TestMachine {
    let rows: [(u64, u32, u32, u16); 11] = [
        (1, 0, 0xf_ffff, CODE32),
        (2, 0x1234_5678, 0xf_ffff, DATA32 & !1),
        (3, 0, 0x1234, 0x91 | DPL3),
        (4, 0, 0, 0x13),
        (5, 0, 0xf_ffff, 0xc099),
        (6, 0, 0xf_ffff, 0xc09e),
        (7, 0x5000, 0x67, 0x8b),
        (8, 0x5000, 0x67, 0x89),
        (10, 0x6000, 0xff, 0x82),
        (12, 0, 0x0fff, 0x4097),
        (13, 0, 0xf_ffff, DATA32 | DPL3),
    ];
    for (index, base, limit, attributes) in rows {
        machine.write64(GDT + index * 8, TestMachine::descriptor(base, limit, attributes));
    }
    machine.cpu.sys.gdtr = Table { base: GDT, limit: 14 * 8 - 1 };
    machine
}

#[test]
fn loading_a_data_segment_sets_the_accessed_bit_once() {
    let mut m = machine(TestMachine::protected());
    m.cpu.load_segment(&mut m.world, SegmentName::Ds, 0x10).expect("plain data");
    let ds = *m.cpu.segment(SegmentName::Ds);
    assert_eq!(ds, Segment { selector: 0x10, base: 0x1234_5678, limit: 0xffff_ffff, attributes: DATA32 });
    assert_eq!(m.read64(GDT + 0x10) >> 40 & 0xff, 0x93, "accessed in memory");
    // In a read-only table an accessed descriptor loads without a write.
    m.cpu.load_segment(&mut m.world, SegmentName::Es, 0x10).expect("again");
}

#[test]
fn loads_are_refused_by_the_book() {
    let user = |mut m: TestMachine| {
        m.cpu.sys.segments[SegmentName::Ss as usize].attributes = DATA32 | DPL3;
        m
    };
    let table: [(SegmentName, u16, bool, Option<Exception>); 16] = [
        (SegmentName::Ds, 0, false, None),
        (SegmentName::Ds, 3, false, None),
        (SegmentName::Ds, 0x18, false, None),
        (SegmentName::Ds, 0x20, false, Some(Exception::with_error(11, 0x20))),
        (SegmentName::Ds, 0x28, false, Some(Exception::gp(0x28))),
        (SegmentName::Ds, 0x30, true, None),
        (SegmentName::Ds, 0x10, true, Some(Exception::gp(0x10))),
        (SegmentName::Ds, 0x13, false, Some(Exception::gp(0x10))),
        (SegmentName::Ds, 0x38, false, Some(Exception::gp(0x38))),
        (SegmentName::Ds, 0x70, false, Some(Exception::gp(0x70))),
        (SegmentName::Ds, 0x14, false, Some(Exception::gp(0x14))),
        (SegmentName::Ss, 0, false, Some(Exception::gp(0))),
        (SegmentName::Ss, 0x18, false, Some(Exception::gp(0x18))),
        (SegmentName::Ss, 0x11, false, Some(Exception::gp(0x10))),
        (SegmentName::Ss, 0x6b, true, None),
        (SegmentName::Ss, 0x10, true, Some(Exception::gp(0x10))),
    ];
    for (row, (name, selector, as_user, expected)) in table.into_iter().enumerate() {
        let mut m = machine(TestMachine::protected());
        if as_user {
            m = user(m);
        }
        let before = m.cpu.sys.clone();
        let got = m.cpu.load_segment(&mut m.world, name, selector).err();
        assert_eq!(got, expected, "row {row}");
        if expected.is_some() {
            assert_eq!(m.cpu.sys, before, "row {row}: nothing changes on a fault");
        }
    }
    // 64-bit code below privilege 3 may have a null SS, which remembers the privilege.
    let mut m = machine(TestMachine::long());
    m.cpu.load_segment(&mut m.world, SegmentName::Ss, 0).expect("null SS");
    assert_eq!(m.cpu.cpl(), 0);
    assert_eq!(m.cpu.load_segment(&mut m.world, SegmentName::Ss, 1), Err(Exception::gp(0)));
}

#[test]
fn offsets_are_held_to_type_and_limit() {
    let gp = Err(Exception::gp(0));
    let mut m = machine(TestMachine::protected());
    m.cpu.load_segment(&mut m.world, SegmentName::Ds, 0x18).expect("read-only data");
    let at =
        |m: &TestMachine, offset: u64, len: u32, write: bool| m.cpu.segment_linear(SegmentName::Ds, offset, len, write);
    assert_eq!(at(&m, 0x1231, 4, false), Ok(0x1231));
    assert_eq!(at(&m, 0x1232, 4, false), gp);
    assert_eq!(at(&m, 0, 1, true), gp);
    m.cpu.load_segment(&mut m.world, SegmentName::Ds, 0x60).expect("expand-down data");
    assert_eq!(at(&m, 0xfff, 1, true), gp);
    assert_eq!(at(&m, 0x1000, 4, true), Ok(0x1000));
    assert_eq!(at(&m, 0xffff_fffd, 4, true), gp);
    m.cpu.load_segment(&mut m.world, SegmentName::Ds, 0).expect("null");
    assert_eq!(at(&m, 0, 1, false), gp);
    assert_eq!(m.cpu.segment_linear(SegmentName::Ss, 0, 1, true), Ok(0));
    // Base plus offset wraps at 4 GiB; a flat segment wraps too.
    m.cpu.load_segment(&mut m.world, SegmentName::Ds, 0x10).expect("data with a base");
    assert_eq!(at(&m, 0xf000_0000, 4, true), Ok(0x0234_5678));
    // CS is not to be written outside real mode.
    assert_eq!(m.cpu.segment_linear(SegmentName::Cs, 0, 1, true), gp);

    let mut m = TestMachine::long();
    m.cpu.sys.segments[SegmentName::Gs as usize].base = 0xffff_8000_0000_0000;
    m.cpu.sys.segments[SegmentName::Ds as usize].base = 0x1000;
    assert_eq!(m.cpu.segment_linear(SegmentName::Gs, 8, 8, true), Ok(0xffff_8000_0000_0008));
    assert_eq!(m.cpu.segment_linear(SegmentName::Ds, 8, 8, true), Ok(8), "only FS and GS have a base");
    assert_eq!(m.cpu.segment_linear(SegmentName::Ds, 0x7fff_ffff_fffc, 8, true), gp);
    assert_eq!(m.cpu.segment_linear(SegmentName::Ss, 1 << 47, 8, true), Err(Exception::with_error(12, 0)));
}

#[test]
fn task_register_becomes_busy() {
    let mut m = machine(TestMachine::long());
    assert_eq!(m.cpu.ltr(&mut m.world, 0x38), Err(Exception::gp(0x38)), "busy already");
    // The upper half of the descriptor holds the base's upper half.
    m.write64(GDT + 9 * 8, 0xffff_8880);
    m.cpu.ltr(&mut m.world, 0x40).expect("available");
    assert_eq!((m.cpu.sys.tr.base, m.cpu.sys.tr.kind()), (0xffff_8880_0000_5000, 0xb));
    assert_eq!(m.read64(GDT + 0x40) >> 40 & 0xf, 0xb, "busy in memory");
    m.write64(GDT + 11 * 8, 0x1_0000);
    assert_eq!(m.cpu.lldt(&mut m.world, 0x50), Err(Exception::gp(0x50)), "base is not canonical");
    m.write64(GDT + 11 * 8, 0);
    m.cpu.lldt(&mut m.world, 0x50).expect("an LDT");
    assert_eq!(m.cpu.sys.ldtr.base, 0x6000);
    m.cpu.lldt(&mut m.world, 0).expect("none");
    assert!(!m.cpu.sys.ldtr.present());
    let mut real = machine(TestMachine::new());
    assert_eq!(real.cpu.ltr(&mut real.world, 0x40), Err(Exception::ud()));
}

#[test]
fn descriptors_are_looked_at_without_faults() {
    let mut m = machine(TestMachine::protected());
    let m = &mut m;
    assert_eq!(m.cpu.lar(&mut m.world, 0x08), Ok(Some(0x00cf_9b00)));
    assert_eq!(m.cpu.lar(&mut m.world, 0x38), Ok(Some(0x0000_8b00)));
    assert_eq!(m.cpu.lar(&mut m.world, 0x48), Ok(None), "type zero");
    assert_eq!(m.cpu.lar(&mut m.world, 0x200), Ok(None), "beyond the table");
    assert_eq!(m.cpu.lar(&mut m.world, 0), Ok(None));
    assert_eq!(m.cpu.lsl(&mut m.world, 0x18), Ok(Some(0x1234)));
    assert_eq!(m.cpu.lsl(&mut m.world, 0x08), Ok(Some(0xffff_ffff)));
    assert_eq!(m.cpu.verr(&mut m.world, 0x18), Ok(true));
    assert_eq!(m.cpu.verw(&mut m.world, 0x18), Ok(false));
    assert_eq!(m.cpu.verr(&mut m.world, 0x28), Ok(false), "execute-only");
    m.cpu.sys.segments[SegmentName::Ss as usize].attributes |= DPL3;
    assert_eq!(m.cpu.verr(&mut m.world, 0x08), Ok(false), "privilege");
    assert_eq!(m.cpu.verr(&mut m.world, 0x30), Ok(true), "conforming");
}

/// 64-bit code with both L and D, and code of 64 bits reached from 32: far transfers switch the mode by CS alone.
#[test]
fn far_jumps_switch_between_32_and_64_bits() {
    let mut m = machine(TestMachine::long());
    m.write64(GDT + 8 * 5, TestMachine::descriptor(0, 0xf_ffff, CODE64));
    m.write64(GDT + 8 * 6, TestMachine::descriptor(0, 0xf_ffff, 0xe09b));
    m.cpu.far_jump(&mut m.world, 0x08, 0x1_0000, OperandSize::Dword).expect("to compatibility mode");
    assert!(!m.cpu.is_64bit());
    assert_eq!(m.cpu.far_jump(&mut m.world, 0x30, 0, OperandSize::Dword), Err(Exception::gp(0x30)));
    m.cpu.regs.gpr[4] = 0x8000;
    m.cpu.far_call(&mut m.world, 0x28, 0x2_0000, OperandSize::Dword).expect("to 64-bit mode");
    assert!(m.cpu.is_64bit());
    assert_eq!((m.cpu.regs.gpr[4], m.read64(0x7ff8)), (0x7ff8, 0x08_0001_0000));
    m.cpu.far_return(&mut m.world, OperandSize::Dword, 0).expect("and back");
    assert!(!m.cpu.is_64bit());
    assert_eq!((m.cpu.regs.rip, m.cpu.regs.gpr[4]), (0x1_0000, 0x8000));
}

/// A call gate to privilege 0 with two parameters, and RET n back.
#[test]
fn call_gates_copy_parameters_to_the_inner_stack() {
    let mut m = machine(TestMachine::protected());
    m.write64(GDT + 8 * 5, TestMachine::descriptor(0, 0xf_ffff, CODE32 | DPL3));
    m.write64(GDT + 8 * 2, TestMachine::descriptor(0, 0xf_ffff, DATA32));
    // Gate at index 6: DPL 3, two parameters, to 0x08:0x1_2345.
    m.write64(GDT + 8 * 6, 0x2345 | 0x08 << 16 | 2 << 32 | 0xec << 40 | 1 << 48);
    m.write64(0x5004, 0x9000 | 0x10 << 32);
    m.cpu.sys.tr = Segment { selector: 0x38, base: 0x5000, limit: 0x67, attributes: 0x8b };
    m.set_code(0x2b, CODE32 | DPL3);
    m.cpu.sys.segments[SegmentName::Ss as usize] =
        Segment { selector: 0x6b, base: 0, limit: !0, attributes: DATA32 | DPL3 };
    m.cpu.regs.gpr[4] = 0x8000;
    m.cpu.regs.rip = 0x4444;
    m.write64(0x8000, 0x2222_2222_1111_1111);
    m.cpu.far_call(&mut m.world, 0x33, 0, OperandSize::Dword).expect("through the gate");
    assert_eq!((m.cpu.cpl(), m.cpu.regs.rip, m.cpu.regs.gpr[4]), (0, 0x1_2345, 0x9000 - 24));
    let frame: Vec<u32> = (0..6).map(|index| m.read32(0x9000 - 24 + 4 * index)).collect();
    assert_eq!(frame, [0x4444, 0x2b, 0x1111_1111, 0x2222_2222, 0x8000, 0x6b]);
    m.cpu.far_return(&mut m.world, OperandSize::Dword, 8).expect("and back");
    assert_eq!((m.cpu.cpl(), m.cpu.regs.rip, m.cpu.regs.gpr[4]), (3, 0x4444, 0x8008));
    // A TSS as the target would switch tasks.
    assert_eq!(m.cpu.far_jump(&mut m.world, 0x43, 0, OperandSize::Dword), Err(Exception::gp(0x40)));
}
