//! Control registers, system calls, flags and I/O permission.

use super::*;
use crate::msr::EFER_LME;
use crate::test_machine::{CODE32, DATA32, TestMachine};
use crate::tlb::Kind;
use crate::walk::EFER_NXE;

const PAE_PGE: u64 = CR4_PAE | CR4_PGE;

fn user(mut machine: TestMachine) -> TestMachine {
    machine.cpu.sys.segments[SegmentName::Ss as usize].attributes = DATA32 | DPL3;
    machine
}

#[test]
fn control_registers_refuse_what_cannot_be() {
    let gp = Err(Exception::gp(0));
    let write = |machine: &mut TestMachine, number: u8, value: u64| {
        let before = machine.cpu.sys.clone();
        let outcome = machine.cpu.write_cr(&mut machine.world, number, value);
        if outcome.is_err() {
            assert_eq!(machine.cpu.sys, before);
        }
        outcome
    };
    let mut m = TestMachine::protected();
    let m = &mut m;
    assert_eq!(write(m, 1, 0), Err(Exception::ud()));
    assert_eq!(write(m, 0, CR0_PG), gp, "paging without protection");
    assert_eq!(write(m, 0, CR0_PE | CR0_NW), gp, "NW without CD");
    assert_eq!(write(m, 0, CR0_PE | 1 << 32), gp);
    assert_eq!(write(m, 4, 1 << 12), gp, "LA57 is not there");
    assert_eq!(write(m, 4, 1 << 17), gp, "PCID is not there");
    assert_eq!(write(m, 0, CR0_PE | 1 << 17), Ok(()), "unknown bits of CR0 stay zero");
    assert_eq!(m.cpu.sys.cr0, CR0_PE | CR0_ET);

    // Into long mode: PAE first, and not from a 64-bit segment.
    m.cpu.write_msr(&mut m.world, 0xc000_0080, EFER_LME | EFER_NXE).expect("EFER");
    m.write64(0xe_0000, 0xe_1003);
    m.write64(0xe_1000, 0x183);
    assert_eq!(write(m, 3, 0xe_0000), Ok(()));
    assert_eq!(write(m, 0, CR0_PE | CR0_PG), gp, "without PAE");
    assert_eq!(write(m, 4, PAE_PGE), Ok(()));
    m.set_code(0x08, FLAT_CODE64);
    assert_eq!(write(m, 0, CR0_PE | CR0_PG), gp, "from a 64-bit segment");
    m.set_code(0x08, CODE32);
    assert_eq!(write(m, 0, CR0_PE | CR0_PG), Ok(()));
    assert!(m.cpu.long_mode_active() && !m.cpu.is_64bit());
    assert_eq!(write(m, 4, CR4_PGE), gp, "PAE cannot go in long mode");
    assert_eq!(write(m, 3, 1 << 40), gp, "beyond physical memory");
    assert_eq!(m.cpu.write_msr(&mut m.world, 0xc000_0080, EFER_NXE), gp, "LME cannot go under paging");
    m.set_code(0x08, FLAT_CODE64);
    assert_eq!(write(m, 0, CR0_PE), gp, "paging cannot go under 64-bit code");
    m.set_code(0x08, CODE32);
    assert_eq!(write(m, 0, CR0_PE), Ok(()));
    assert!(!m.cpu.long_mode_active());

    let mut m = user(TestMachine::protected());
    assert_eq!(write(&mut m, 3, 0), gp);
    assert_eq!(m.cpu.read_cr(&mut m.world, 0), Err(Exception::gp(0)));
    assert_eq!(m.cpu.invlpg(0), gp);
}

/// PAE paging reads its four PDPTEs when CR3 is loaded, and refuses bad ones then.
#[test]
fn pdptes_are_registers() {
    let mut m = TestMachine::protected();
    let m = &mut m;
    m.write64(0xe_0020, 0xe_1001);
    m.write64(0xe_1000, 0x83);
    m.cpu.write_cr(&mut m.world, 3, 0xe_0020).expect("any value while paging is off");
    m.cpu.write_cr(&mut m.world, 4, CR4_PAE).expect("PAE");
    m.cpu.write_cr(&mut m.world, 0, CR0_PE | CR0_PG).expect("paging");
    let mut data = [0; 8];
    m.cpu.read_slow(&mut m.world, 0xe_0020, &mut data, false).expect("mapped");
    assert_eq!(u64::from_le_bytes(data), 0xe_1001);
    m.write64(0xe_0020, 0);
    m.cpu.mmu.flush_all();
    m.cpu.read_slow(&mut m.world, 0x5000, &mut data, false).expect("the register still holds it");
    m.write64(0xe_0040, 0xe_1003);
    assert_eq!(m.cpu.write_cr(&mut m.world, 3, 0xe_0040), Err(Exception::gp(0)), "R/W is reserved in a PDPTE");
    assert_eq!(m.cpu.sys.cr3, 0xe_0020);
}

/// What a CR3 load, INVLPG and a CR4.PGE toggle keep and drop.
#[test]
fn flushes_drop_what_the_manual_says() {
    let cached = |m: &TestMachine, linear: u64| m.cpu.mmu.tlb[0].lookup(Kind::Read, linear).is_some();
    let mut m = TestMachine::long();
    let m = &mut m;
    m.cpu.sys.cr4 |= CR4_PGE;
    // 0 to 2 MiB: small pages, page 5 global; 2 to 4 MiB: one large global page onto the first megabyte.
    m.write64(0xe_1000, 0xe_2003);
    m.write64(0xe_2000, 0xe_3003);
    m.write64(0xe_2008, 0x183);
    for page in 0..256u64 {
        m.write64(0xe_3000 + 8 * page, page << 12 | 3 | if page == 5 { 0x100 } else { 0 });
    }
    m.cpu.state_replaced();
    let touch = |m: &mut TestMachine| {
        for linear in [0x4000, 0x5000, 0x6000, 0x20_0000, 0x20_7000] {
            m.cpu.read_slow(&mut m.world, linear, &mut [0; 8], false).expect("mapped");
        }
    };
    let state = |m: &TestMachine| [0x4000, 0x5000, 0x6000, 0x20_0000, 0x20_7000].map(|linear| cached(m, linear));
    touch(m);
    assert_eq!(state(m), [true; 5]);
    m.cpu.mmu.remember_exec(false, 0);
    let epoch = m.cpu.mmu.exec_epochs[0];
    m.cpu.write_cr(&mut m.world, 3, 0xe_0000).expect("CR3");
    assert!(m.cpu.mmu.exec_epochs[0] > epoch);
    assert_eq!(state(m), [false, true, false, true, true], "global pages stay");
    touch(m);
    m.cpu.invlpg(0x6fff).expect("INVLPG");
    assert_eq!(state(m), [true, true, false, true, true], "one page");
    m.cpu.invlpg(0x20_1000).expect("INVLPG");
    assert_eq!(state(m), [true, true, false, false, false], "every fragment of the large page, though global");
    touch(m);
    m.cpu.write_cr(&mut m.world, 4, m.cpu.sys.cr4 & !CR4_PGE).expect("CR4");
    assert_eq!(state(m), [false; 5]);
    // A slot is listed once, however often it is filled, and a second flush finds nothing left to do.
    for _ in 0..3 {
        touch(m);
        m.cpu.write_cr(&mut m.world, 3, 0xe_0000).expect("CR3");
        assert_eq!(state(m), [false; 5]);
    }
}

#[test]
fn code_pages_have_no_write_entries() {
    let mut m = TestMachine::long();
    m.cpu.write_slow(&mut m.world, 0x5000, &[1], false).expect("mapped");
    assert!(m.cpu.mmu.tlb[0].lookup(Kind::Write, 0x5000).is_some());
    m.cpu.mmu.protect_code(0x5000);
    assert!(m.cpu.mmu.tlb[0].lookup(Kind::Write, 0x5000).is_none());
    assert!(m.cpu.mmu.tlb[0].lookup(Kind::Read, 0x5000).is_some());
    m.cpu.write_slow(&mut m.world, 0x5000, &[2], false).expect("mapped");
    assert!(m.cpu.mmu.tlb[0].lookup(Kind::Write, 0x5000).is_none());
    m.cpu.mmu.unprotect_code(0x5000);
    m.cpu.write_slow(&mut m.world, 0x5000, &[3], false).expect("mapped");
    assert!(m.cpu.mmu.tlb[0].lookup(Kind::Write, 0x5000).is_some());
    assert_eq!(m.read64(0x5000), 3);
}

/// A write that crosses into a page that cannot be written leaves the first page alone.
#[test]
fn a_faulting_write_writes_nothing() {
    let mut m = TestMachine::long();
    m.write64(0xe_1000, 0xe_2003);
    m.write64(0xe_2000, 0xe_3003);
    m.write64(0xe_3000 + 8 * 5, 0x5003);
    m.write64(0xe_3000 + 8 * 6, 0x6001);
    m.cpu.sys.cr0 |= CR0_WP;
    m.cpu.state_replaced();
    let outcome = m.cpu.write_slow(&mut m.world, 0x5ffc, &[0xee; 8], false);
    assert_eq!(outcome, Err(Exception::pf(0x6000, 3)));
    assert_eq!(m.read64(0x5ff8), 0);
    m.write64(0xe_3000 + 8 * 6, 0x6003);
    m.cpu.write_slow(&mut m.world, 0x5ffc, &[0xee; 8], false).expect("now it may");
    assert_eq!((m.read32(0x5ffc), m.read32(0x6000)), (0xeeee_eeee, 0xeeee_eeee));
}

#[test]
fn system_calls_switch_privilege_and_come_back() {
    let mut m = TestMachine::long();
    let m = &mut m;
    assert_eq!(m.cpu.syscall(), Err(Exception::ud()), "EFER.SCE is clear");
    m.cpu.sys.efer |= EFER_SCE;
    m.cpu.sys.star = 0x0023_0010 << 32;
    m.cpu.sys.lstar = 0xffff_ffff_8000_0000;
    m.cpu.sys.cstar = 0xffff_ffff_8000_1000;
    m.cpu.sys.sfmask = 0x4_7700;
    m.cpu.regs.rip = 0x40_1000;
    m.cpu.regs.rflags = 0x246;
    m.cpu.sysret(OperandSize::Qword).expect("into user mode");
    assert_eq!((m.cpu.cpl(), m.cpu.is_64bit()), (3, true));
    assert_eq!([SegmentName::Cs, SegmentName::Ss].map(|name| m.cpu.segment(name).selector), [0x33, 0x2b]);
    m.cpu.regs.rip = 0x40_1000;
    m.cpu.regs.rflags = 0x246;
    m.cpu.syscall().expect("into the kernel");
    assert_eq!((m.cpu.regs.gpr[1], m.cpu.regs.gpr[11]), (0x40_1000, 0x246));
    assert_eq!((m.cpu.regs.rip, m.cpu.regs.rflags), (m.cpu.sys.lstar, 0x46));
    assert_eq!((m.cpu.cpl(), m.cpu.segment(SegmentName::Ss).selector), (0, 0x18));
    // To 32-bit user code and back: the other entry point.
    m.cpu.regs.gpr[1] = 0x1_0040_2000;
    m.cpu.sysret(OperandSize::Dword).expect("into 32-bit user mode");
    assert_eq!((m.cpu.regs.rip, m.cpu.is_64bit(), m.cpu.segment(SegmentName::Cs).selector), (0x40_2000, false, 0x23));
    assert_eq!(m.cpu.sysret(OperandSize::Dword), Err(Exception::gp(0)));
    m.cpu.syscall().expect("into the kernel");
    assert_eq!(m.cpu.regs.rip, m.cpu.sys.cstar);
    // An address that is not canonical is user mode's problem.
    m.cpu.regs.gpr[1] = 1 << 47;
    m.cpu.sysret(OperandSize::Qword).expect("as AMD does it");
    assert_eq!((m.cpu.cpl(), m.cpu.fetch_page(m.cpu.regs.rip, true).err()), (3, Some(Exception::gp(0))));
}

#[test]
fn flags_and_ports_are_guarded() {
    let mut m = user(TestMachine::protected());
    let m = &mut m;
    m.cpu.regs.rflags = 0x202;
    m.cpu.popf(0x3000, OperandSize::Dword).expect("POPF");
    assert_eq!(m.cpu.regs.rflags, 0x202, "neither IOPL nor IF at privilege 3");
    assert_eq!(m.cpu.cli(), Err(Exception::gp(0)));
    m.cpu.regs.rflags |= FLAG_IOPL;
    m.cpu.cli().expect("IOPL 3");
    m.cpu.sti().expect("IOPL 3");
    assert!(m.cpu.sys.interrupt_shadow);
    m.cpu.check_io(&mut m.world, 0x3f8, 4).expect("IOPL 3");
    m.cpu.regs.rflags = 0x202;
    m.cpu.sys.tr = Segment { selector: 0x38, base: 0x4000, limit: 0x68 + 128, attributes: 0x8b };
    m.write(0x4066, &[0x68, 0]);
    m.write(0x4068, &[0xff; 129]);
    m.write(0x4068 + 0x7f, &[0x00]);
    m.cpu.check_io(&mut m.world, 0x3f8, 4).expect("the bitmap lets it pass");
    m.cpu.check_io(&mut m.world, 0x3ff, 1).expect("the last one");
    assert_eq!(m.cpu.check_io(&mut m.world, 0x3ff, 2), Err(Exception::gp(0)), "it reaches into a port that is closed");
    assert_eq!(m.cpu.check_io(&mut m.world, 0x408, 1), Err(Exception::gp(0)), "beyond the bitmap");
}

#[test]
fn debug_registers_are_stored_and_guarded() {
    let mut m = TestMachine::protected();
    let m = &mut m;
    m.cpu.write_dr(0, 0x1234).expect("DR0");
    m.cpu.write_dr(7, 0xffff_ffff).expect("DR7");
    assert_eq!(m.cpu.read_dr(7), Err(Exception::plain(1)), "GD traps the next access");
    assert_eq!(m.cpu.sys.dr[6] & DR6_BD, DR6_BD);
    m.cpu.sys.dr[7] = 0x400;
    m.cpu.write_dr(4, 0).expect("an old name of DR6");
    assert_eq!(m.cpu.read_dr(6), Ok(0xffff_0ff0));
    m.cpu.sys.cr4 |= CR4_DE;
    assert_eq!(m.cpu.read_dr(5), Err(Exception::ud()));
    assert_eq!(m.cpu.write_dr(7, 1 << 32), Err(Exception::gp(0)));
}
