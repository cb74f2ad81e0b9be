//! Delivery in every mode, with the frames spelled out, and what becomes of exceptions met on the way.

use super::*;
use crate::state::Table;
use crate::test_machine::{CODE32, CODE64, DATA32, TestMachine};

const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const TSS: u64 = 0x4000;
/// Where handlers and stacks are.
const HANDLER: u64 = 0x1_2340;
const STACK: u64 = 0x8000;
const INNER_STACK: u64 = 0x9008;

const GDT_CODE32: u16 = 0x08;
const GDT_DATA: u16 = 0x10;
const GDT_CODE64: u16 = 0x18;
const GDT_USER_DATA: u16 = 0x20;
const GDT_USER_CODE32: u16 = 0x28;
const GDT_USER_CODE64: u16 = 0x30;
const GDT_CODE16: u16 = 0x38;

/// Types with P set.
const INTERRUPT32: u16 = 0x8e;
const TRAP32: u16 = 0x8f;
const INTERRUPT16: u16 = 0x86;
const TASK: u16 = 0x85;
const DPL3: u16 = 0x60;

fn tables(machine: &mut TestMachine) {
    let rows = [
        (GDT_CODE32, CODE32),
        (GDT_DATA, DATA32),
        (GDT_CODE64, CODE64),
        (GDT_USER_DATA, DATA32 | DPL3),
        (GDT_USER_CODE32, CODE32 | DPL3),
        (GDT_USER_CODE64, CODE64 | DPL3),
        (GDT_CODE16, 0x9b),
    ];
    for (selector, attributes) in rows {
        machine.write64(GDT + u64::from(selector), TestMachine::descriptor(0, 0xf_ffff, attributes));
    }
    machine.cpu.sys.gdtr = Table { base: GDT, limit: 0x3f };
    machine.cpu.sys.idtr = Table { base: IDT, limit: 0xfff };
    machine.cpu.sys.tr = Segment { selector: 0x40, base: TSS, limit: 0x67, attributes: 0x8b };
    machine.cpu.regs.gpr[RSP] = STACK;
    machine.cpu.regs.rip = 0x7777;
    machine.cpu.regs.rflags = FLAG_IF | FLAG_TF | 0x47;
}

fn gate32(machine: &mut TestMachine, vector: u64, selector: u16, kind: u16) {
    let raw = HANDLER & 0xffff | u64::from(selector) << 16 | u64::from(kind) << 40 | (HANDLER >> 16) << 48;
    machine.write64(IDT + vector * 8, raw);
}

fn gate64(machine: &mut TestMachine, vector: u64, selector: u16, kind: u16, ist: u64) {
    let raw = HANDLER & 0xffff | u64::from(selector) << 16 | ist << 32 | u64::from(kind) << 40 | (HANDLER >> 16) << 48;
    machine.write64(IDT + vector * 16, raw);
    machine.write64(IDT + vector * 16 + 8, 0);
}

fn protected() -> TestMachine {
    let mut machine = TestMachine::protected();
    tables(&mut machine);
    machine.cpu.sys.segments[SegmentName::Cs as usize].selector = GDT_CODE32;
    machine
}

fn long() -> TestMachine {
    let mut machine = TestMachine::long();
    tables(&mut machine);
    machine.cpu.sys.segments[SegmentName::Cs as usize].selector = GDT_CODE64;
    machine
}

/// Makes the machine run user code, with its first 2 MiB mapped for users.
fn user(mut machine: TestMachine, code: u16, attributes: u16) -> TestMachine {
    machine.set_code(code | 3, attributes | DPL3);
    machine.cpu.sys.segments[SegmentName::Ss as usize] =
        Segment { selector: GDT_USER_DATA | 3, base: 0, limit: 0xffff_ffff, attributes: DATA32 | DPL3 };
    assert_eq!(machine.cpu.cpl(), 3);
    machine
}

fn frame64(machine: &mut TestMachine, words: u64) -> Vec<u64> {
    let rsp = machine.cpu.regs.gpr[RSP];
    (0..words).map(|index| machine.read64(rsp + 8 * index)).collect()
}

fn frame32(machine: &mut TestMachine, words: u64) -> Vec<u32> {
    let rsp = machine.cpu.regs.gpr[RSP];
    (0..words).map(|index| machine.read32(rsp + 4 * index)).collect()
}

#[test]
fn real_mode_pushes_three_words_and_jumps_through_the_vector_table() {
    let mut machine = TestMachine::new();
    machine.write(0x20 * 4, &[0x34, 0x12, 0x00, 0x30]);
    machine.cpu.set_real_stack(0x5000, 0x0100);
    machine.set_code(0x1234, 0x9b);
    machine.cpu.sys.segments[SegmentName::Cs as usize].limit = 0xffff;
    machine.cpu.regs.rip = 0x777;
    machine.cpu.regs.rflags = FLAG_IF | FLAG_TF | FLAG_AC | 0x47;
    machine.cpu.sys.idtr = Table { base: 0, limit: 0x3ff };
    machine.cpu.halted = true;
    machine.cpu.deliver_interrupt(&mut machine.world, 0x20).expect("delivered");
    assert!(!machine.cpu.halted);
    assert_eq!(machine.cpu.regs.gpr[RSP], 0xabcd_00fa, "only SP moves");
    assert_eq!([0, 2, 4].map(|at| machine.read16(0x5_00fa + at)), [0x777, 0x1234, 0x347]);
    assert_eq!((machine.cpu.regs.rip, machine.cpu.regs.rflags), (0x1234, 0x47));
    let cs = machine.cpu.segment(SegmentName::Cs);
    assert_eq!((cs.selector, cs.base), (0x3000, 0x3_0000));
    // A vector beyond the table is #GP, which is not there either: three strikes.
    machine.cpu.sys.idtr.limit = 3;
    assert_eq!(machine.cpu.deliver_interrupt(&mut machine.world, 0x20), Err(TripleFault));
}

impl Cpu {
    fn set_real_stack(&mut self, selector: u16, sp: u64) {
        self.sys.segments[SegmentName::Ss as usize] =
            Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, attributes: 0x93 };
        self.regs.gpr[RSP] = 0xabcd_0000 | sp;
    }
}

#[test]
fn protected_mode_same_privilege() {
    let mut machine = protected();
    gate32(&mut machine, 0x20, GDT_CODE32, INTERRUPT32);
    machine.cpu.deliver_interrupt(&mut machine.world, 0x20).expect("delivered");
    assert_eq!(machine.cpu.regs.gpr[RSP], STACK - 12);
    assert_eq!(frame32(&mut machine, 3), [0x7777, u32::from(GDT_CODE32), 0x347]);
    assert_eq!((machine.cpu.regs.rip, machine.cpu.regs.rflags), (HANDLER, 0x47));

    // A fault with an error code through a trap gate: IF stays, RF is set in the image.
    let mut machine = protected();
    gate32(&mut machine, 13, GDT_CODE32, TRAP32);
    machine.cpu.deliver(&mut machine.world, Exception::gp(0x58)).expect("delivered");
    assert_eq!(frame32(&mut machine, 4), [0x58, 0x7777, u32::from(GDT_CODE32), 0x1_0347]);
    assert_eq!(machine.cpu.regs.rflags, 0x247);

    // A 16-bit gate pushes words and cuts the offset.
    let mut machine = protected();
    gate32(&mut machine, 0x21, GDT_CODE32, INTERRUPT16);
    machine.cpu.deliver_interrupt(&mut machine.world, 0x21).expect("delivered");
    assert_eq!(machine.cpu.regs.gpr[RSP], STACK - 6);
    assert_eq!([0, 2, 4].map(|at| machine.read16(STACK - 6 + at)), [0x7777, GDT_CODE32, 0x347]);
    assert_eq!(machine.cpu.regs.rip, HANDLER & 0xffff);
}

#[test]
fn protected_mode_takes_the_inner_stack_from_the_tss() {
    let mut machine = user(protected(), GDT_USER_CODE32, CODE32);
    gate32(&mut machine, 0x80, GDT_CODE32, INTERRUPT32 | DPL3);
    machine.write64(TSS + 4, INNER_STACK | u64::from(GDT_DATA) << 32);
    machine.cpu.software_interrupt(&mut machine.world, 0x80, SoftwareInterrupt::IntN).expect("DPL 3 lets it pass");
    assert_eq!(machine.cpu.regs.gpr[RSP], INNER_STACK - 20);
    assert_eq!(
        frame32(&mut machine, 5),
        [0x7777, u32::from(GDT_USER_CODE32) | 3, 0x347, STACK as u32, u32::from(GDT_USER_DATA) | 3]
    );
    assert_eq!(machine.cpu.cpl(), 0);
    assert_eq!(machine.cpu.segment(SegmentName::Cs).selector, GDT_CODE32);

    // The way back restores everything, and takes kernel segments away from the user.
    machine.cpu.sys.segments[SegmentName::Ds as usize] =
        Segment { selector: GDT_DATA, base: 0, limit: !0, attributes: DATA32 };
    machine.cpu.iret(&mut machine.world, OperandSize::Dword).expect("returns");
    assert_eq!((machine.cpu.regs.rip, machine.cpu.regs.gpr[RSP], machine.cpu.cpl()), (0x7777, STACK, 3));
    assert_eq!(machine.cpu.regs.rflags, 0x347);
    assert!(!machine.cpu.segment(SegmentName::Ds).present());
}

#[test]
fn long_mode_aligns_the_stack_and_always_saves_it() {
    let mut machine = long();
    gate64(&mut machine, 14, GDT_CODE64, INTERRUPT32, 0);
    machine.cpu.regs.gpr[RSP] = STACK + 5;
    machine.cpu.deliver(&mut machine.world, Exception::pf(0xdead_b000, 2)).expect("delivered");
    assert_eq!(machine.cpu.regs.gpr[RSP], STACK - 48);
    assert_eq!(frame64(&mut machine, 6), [2, 0x7777, u64::from(GDT_CODE64), 0x1_0347, STACK + 5, 0x10]);
    assert_eq!(machine.cpu.sys.cr2, 0xdead_b000);
    assert_eq!(machine.cpu.regs.rflags, 0x47);
    // IRETQ pops the stack even within a privilege.
    machine.cpu.regs.gpr[RSP] += 8;
    machine.cpu.iret(&mut machine.world, OperandSize::Qword).expect("returns");
    assert_eq!((machine.cpu.regs.rip, machine.cpu.regs.gpr[RSP]), (0x7777, STACK + 5));
}

#[test]
fn long_mode_uses_ist_and_rsp0() {
    // An IST stack serves without a change of privilege too, and SS stays.
    let mut machine = long();
    gate64(&mut machine, 2, GDT_CODE64, INTERRUPT32, 3);
    machine.write64(TSS + 0x24 + 16, INNER_STACK);
    machine.cpu.deliver_interrupt(&mut machine.world, 2).expect("delivered");
    assert_eq!(machine.cpu.regs.gpr[RSP], (INNER_STACK & !0xf) - 40);
    assert_eq!(machine.cpu.segment(SegmentName::Ss).selector, 0x10);

    // From 32-bit user code: 64-bit frame on RSP0, SS null.
    let mut machine = user(long(), GDT_USER_CODE32, CODE32);
    gate64(&mut machine, 0x20, GDT_CODE64, INTERRUPT32, 0);
    machine.write64(TSS + 4, INNER_STACK);
    machine.cpu.deliver_interrupt(&mut machine.world, 0x20).expect("delivered");
    let ss = machine.cpu.segment(SegmentName::Ss);
    assert_eq!((ss.selector, ss.present()), (0, false));
    assert!(machine.cpu.is_64bit() && machine.cpu.cpl() == 0);
    assert_eq!(
        frame64(&mut machine, 5),
        [0x7777, u64::from(GDT_USER_CODE32) | 3, 0x347, STACK, u64::from(GDT_USER_DATA) | 3]
    );
    machine.cpu.iret(&mut machine.world, OperandSize::Qword).expect("returns");
    assert!(!machine.cpu.is_64bit() && machine.cpu.cpl() == 3);
    assert_eq!(machine.cpu.regs.gpr[RSP], STACK);

    // A TSS that is too short for RSP0 raises #TS with TR's selector, told to be external.
    let mut machine = user(long(), GDT_USER_CODE64, CODE64);
    gate64(&mut machine, 0x20, GDT_CODE64, INTERRUPT32, 0);
    machine.cpu.sys.tr.limit = 0xa;
    let before = machine.cpu.regs.clone();
    assert_eq!(
        machine.cpu.enter(&mut machine.world, 0x20, None, Source::Event, false),
        Err(Exception::with_error(10, 0x41))
    );
    assert_eq!(machine.cpu.regs, before, "nothing has changed");
}

#[test]
fn gates_are_checked() {
    let refuse = |mut machine: TestMachine, vector: u8, expected: Exception| {
        let before = (machine.cpu.regs.clone(), machine.cpu.sys.clone());
        let got = machine.cpu.software_interrupt(&mut machine.world, vector, SoftwareInterrupt::IntN);
        assert_eq!(got, Err(expected));
        assert_eq!((machine.cpu.regs.clone(), machine.cpu.sys.clone()), before);
    };
    // DPL below CPL; not present; a task gate; beyond the limit; data where code should be; a 32-bit segment.
    let mut machine = user(long(), GDT_USER_CODE64, CODE64);
    gate64(&mut machine, 0x20, GDT_CODE64, INTERRUPT32, 0);
    refuse(machine, 0x20, Exception::gp(0x20 << 3 | 2));
    let mut machine = long();
    gate64(&mut machine, 0x20, GDT_CODE64, INTERRUPT32 & !0x80, 0);
    refuse(machine, 0x20, Exception::with_error(11, 0x20 << 3 | 2));
    let mut machine = protected();
    gate32(&mut machine, 0x20, GDT_CODE32, TASK);
    refuse(machine, 0x20, Exception::gp(0x20 << 3 | 2));
    let mut machine = long();
    machine.cpu.sys.idtr.limit = 0x20f - 1;
    refuse(machine, 0x20, Exception::gp(0x20 << 3 | 2));
    let mut machine = long();
    gate64(&mut machine, 0x20, GDT_DATA, INTERRUPT32, 0);
    refuse(machine, 0x20, Exception::gp(u32::from(GDT_DATA)));
    let mut machine = long();
    gate64(&mut machine, 0x20, GDT_CODE32, INTERRUPT32, 0);
    refuse(machine, 0x20, Exception::gp(u32::from(GDT_CODE32)));
    let mut machine = long();
    gate64(&mut machine, 0x20, 0, INTERRUPT32, 0);
    refuse(machine, 0x20, Exception::gp(0));
    // The same gate as an external interrupt says so in bit 0.
    let mut machine = long();
    gate64(&mut machine, 0x20, 0, INTERRUPT32, 0);
    assert_eq!(machine.cpu.enter(&mut machine.world, 0x20, None, Source::Event, false), Err(Exception::gp(1)));
}

/// SDM vol. 3, table 6-5: rows are the first exception, columns the second.
#[test]
fn exceptions_combine_by_the_table() {
    let first = [(1, "benign"), (13, "contributory"), (14, "page fault"), (8, "double fault")];
    let second = [Exception::plain(6), Exception::gp(0), Exception::pf(0, 0)];
    let double = Ok(Exception::with_error(8, 0));
    let expected = [
        [Ok(second[0]), Ok(second[1]), Ok(second[2])],
        [Ok(second[0]), double, Ok(second[2])],
        [Ok(second[0]), double, double],
        [Ok(second[0]), Err(TripleFault), Err(TripleFault)],
    ];
    for ((vector, name), row) in first.into_iter().zip(expected) {
        for (met, outcome) in second.into_iter().zip(row) {
            assert_eq!(combine(class(vector), met), outcome, "{name}, then {}", met.vector);
        }
    }
}

#[test]
fn a_fault_without_gates_becomes_a_double_and_then_a_triple_fault() {
    // Only the double fault has a gate: it sees error code 0 and no RF.
    let mut machine = long();
    gate64(&mut machine, 8, GDT_CODE64, INTERRUPT32, 0);
    machine.cpu.deliver(&mut machine.world, Exception::gp(0)).expect("double fault delivered");
    assert_eq!(frame64(&mut machine, 4), [0, 0x7777, u64::from(GDT_CODE64), 0x347]);

    // A page fault whose handler's stack is not mapped: CR2 is that of the stack.
    let mut machine = long();
    gate64(&mut machine, 14, GDT_CODE64, INTERRUPT32, 0);
    gate64(&mut machine, 8, GDT_CODE64, INTERRUPT32, 1);
    machine.write64(TSS + 0x24, INNER_STACK);
    machine.cpu.regs.gpr[RSP] = 0x7f_0000_0000;
    machine.cpu.deliver(&mut machine.world, Exception::pf(0x1234, 0)).expect("double fault delivered");
    assert_eq!(machine.cpu.sys.cr2, 0x7f_0000_0000 - 8);

    let mut machine = long();
    machine.cpu.sys.idtr.limit = 0;
    assert_eq!(machine.cpu.deliver(&mut machine.world, Exception::ud()), Err(TripleFault));
}
