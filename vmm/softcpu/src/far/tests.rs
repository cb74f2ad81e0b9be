//! Whatever state and memory a guest prepares, the privileged half answers with a state or with a fault: it never
//! panics, and a fault leaves the registers alone.

use proptest::prelude::{Strategy, any, prop};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;
use crate::interrupt::SoftwareInterrupt;
use crate::state::Table;
use crate::test_machine::TestMachine;

/// Where descriptor tables, TSS and stacks of the random guests are.
const TABLES: u64 = 0x2000;

/// Addresses that are likely to matter.
fn address() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![
        0u64,
        1,
        TABLES,
        TABLES + 0x100,
        0x8000,
        0xffe,
        0xfff,
        0x7fff_ffff_f000,
        0x7fff_ffff_ffff,
        1 << 47,
        !0,
        !0 - 7,
        0xffff_8000_0000_0000,
        0xffff_ffff,
        0xffff_fffc,
        0xf_fffe,
        0x10_0000,
    ])
}

fn segment() -> impl Strategy<Value = Segment> {
    let attributes = prop::sample::select(vec![
        0xa09bu16, 0xc09b, 0xc093, 0xa0fb, 0xc0fb, 0xc0f3, 0x9b, 0x93, 0x97, 0xf3, 0, 0x60, 0x8b, 0x83, 0x82, 0x89,
    ]);
    let limit = prop::sample::select(vec![0u32, 1, 0x67, 0xfff, 0xffff, 0xf_ffff, 0xffff_fffe, 0xffff_ffff]);
    (any::<u16>(), address(), limit, attributes).prop_map(|(selector, base, limit, attributes)| Segment {
        selector,
        base,
        limit,
        attributes,
    })
}

/// Descriptors and gates that are likely to pass some of the checks.
fn descriptor() -> impl Strategy<Value = u64> {
    let kind = prop::sample::select(vec![
        0xa09bu64, 0xc09b, 0xc093, 0xa0fb, 0xc0fb, 0xc0f3, 0xc09f, 0x008e, 0x00ee, 0x008f, 0x00ec, 0x008c, 0x0084,
        0x0085, 0x0086, 0x0089, 0x008b, 0x0082, 0x0000, 0xe09b, 0x4097,
    ]);
    (any::<u64>(), kind, any::<u8>()).prop_map(|(noise, kind, selector)| {
        noise & !0x00f0_ff00_ffff_0000 | kind << 40 | u64::from(selector & 0x7b) << 16
    })
}

#[test]
fn no_guest_state_panics() {
    let modes = 0u8..4;
    let memory = prop::collection::vec(descriptor(), 64);
    let state = (prop::collection::vec(segment(), 8), address(), address(), any::<[u16; 4]>());
    let registers = (address(), address(), any::<u32>(), prop::collection::vec(address(), 16));
    let operation = (0u8..16, any::<u16>(), any::<u64>(), 0u8..3);
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 8_000, failure_persistence: None, ..Config::default() },
        TestRng::deterministic_rng(RngAlgorithm::ChaCha),
    );
    let machines = std::cell::RefCell::new([
        TestMachine::new(),
        TestMachine::protected(),
        TestMachine::long(),
        TestMachine::long(),
    ]);
    let fresh: Vec<_> = machines.borrow().iter().map(|machine| machine.cpu.sys.clone()).collect();
    let outcomes = std::cell::RefCell::new([0u32; 2]);
    runner
        .run(&(modes, memory, state, registers, operation), |(mode, memory, state, registers, operation)| {
            let machine = &mut machines.borrow_mut()[usize::from(mode)];
            for (index, word) in (0u64..).zip(&memory) {
                machine.write64(TABLES + index * 8, *word);
            }
            let (segments, gdt, idt, [gdt_limit, idt_limit, selector_low, _]) = state;
            let (cpu, world) = (&mut machine.cpu, &mut machine.world);
            cpu.sys = fresh[usize::from(mode)].clone();
            cpu.sys.segments.copy_from_slice(&segments[..6]);
            (cpu.sys.ldtr, cpu.sys.tr) = (segments[6], segments[7]);
            cpu.sys.gdtr = Table { base: gdt, limit: gdt_limit };
            cpu.sys.idtr = Table { base: idt, limit: idt_limit };
            cpu.sys.efer |= 1;
            (cpu.sys.star, cpu.sys.sysenter) = (gdt ^ idt << 7, [u64::from(selector_low), gdt, idt]);
            let (rip, rsp, flags, gpr) = registers;
            cpu.regs.gpr.copy_from_slice(&gpr);
            cpu.regs.gpr[RSP] = rsp;
            cpu.regs.rip = rip;
            cpu.regs.rflags = u64::from(flags) & 0x24_7fd5 | 2;
            cpu.state_replaced();
            let before = (cpu.regs.clone(), cpu.sys.clone());
            let (what, selector, value, size) = operation;
            // Mostly selectors within the prepared table.
            let selector = if value & 1 == 0 { selector & 0x1ff } else { selector };
            let size = [OperandSize::Word, OperandSize::Dword, OperandSize::Qword][usize::from(size)];
            let name =
                [SegmentName::Es, SegmentName::Ss, SegmentName::Ds, SegmentName::Fs][usize::from(value as u8 & 3)];
            let outcome = match what {
                0 => cpu.far_jump(world, selector, value, size),
                1 => cpu.far_call(world, selector, value, size),
                2 => cpu.far_return(world, size, value as u16),
                3 => cpu.iret(world, size),
                4 => cpu.software_interrupt(world, value as u8, SoftwareInterrupt::IntN),
                5 => cpu.load_segment(world, name, selector),
                6 => cpu.lldt(world, selector),
                7 => cpu.ltr(world, selector),
                8 => cpu.lar(world, selector).map(|_| ()),
                9 => cpu.check_io(world, value as u16, 4),
                10 => cpu.write_cr(world, value as u8 & 7, value.rotate_left(23)),
                11 => cpu.syscall(),
                12 => cpu.sysret(size),
                13 => cpu.segment_linear(name, value, value as u32 & 0xfff, true).map(|_| ()),
                14 => {
                    // Anything may come of it but a panic.
                    let _ = cpu.deliver(world, Exception::pf(value, 2));
                    return Ok(());
                }
                _ => cpu.sysenter().and_then(|()| cpu.sysexit()),
            };
            outcomes.borrow_mut()[usize::from(outcome.is_err())] += 1;
            if outcome.is_err() && what != 15 {
                assert_eq!((cpu.regs.clone(), cpu.sys.clone()), before, "a fault changes no register");
            }
            Ok(())
        })
        .expect("every case ends");
    let [done, faulted] = outcomes.into_inner();
    assert!(done > 400 && faulted > 400, "the cases reach both ends: {done} done, {faulted} faults");
}
