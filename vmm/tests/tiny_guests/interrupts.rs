//! Interrupts from each kind of source: wires through both controllers, messages, eventfds, the interval timer.

use std::time::Duration;

use atoll_devices::{MsiMessage, MsixRoutes};
use atoll_vmm::irq::VectorTable;
use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, dx, eax, edx, rbx, word_ptr};

use super::lab::{Cpu, Lab, PORT, long_mode, out, real_mode};

const IDT: u64 = 0x7_0000;
const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// Where the handler of a vector is; each tells its vector and returns.
const HANDLERS: u64 = 0x6_0000;

/// Fills the IDT with handlers that write their vector to the first port, and loads it.
fn handlers(lab: &Lab, state: &mut atoll_vmm::cpu::CpuState, vectors: &[u8]) {
    for vector in vectors {
        let at = HANDLERS + u64::from(*vector) * 64;
        let mut code = CodeAssembler::new(64).unwrap();
        code.push(iced_x86::code_asm::rax).unwrap();
        code.push(iced_x86::code_asm::rdx).unwrap();
        code.push(rbx).unwrap();
        code.mov(edx, u32::from(PORT)).unwrap();
        code.mov(al, i32::from(*vector)).unwrap();
        code.out(dx, al).unwrap();
        code.mov(rbx, LAPIC).unwrap();
        code.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
        code.pop(rbx).unwrap();
        code.pop(iced_x86::code_asm::rdx).unwrap();
        code.pop(iced_x86::code_asm::rax).unwrap();
        code.iretq().unwrap();
        lab.put(at, &code.assemble(at).unwrap());
        let gate = (at & 0xffff) | 8 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        lab.put(IDT + u64::from(*vector) * 16, &gate.to_le_bytes());
        lab.put(IDT + u64::from(*vector) * 16 + 8, &(at >> 32).to_le_bytes());
    }
    state.system.idtr = atoll_softcpu::state::Table { base: IDT, limit: 0xfff };
}

/// Code that enables the local APIC, does what `before` adds, says so on port 2 and waits with interrupts on.
fn waiter(before: impl FnOnce(&mut CodeAssembler)) -> CodeAssembler {
    let mut code = CodeAssembler::new(64).unwrap();
    code.mov(rbx, LAPIC).unwrap();
    code.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
    before(&mut code);
    code.mov(edx, u32::from(PORT + 2)).unwrap();
    code.out(dx, al).unwrap();
    code.sti().unwrap();
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.hlt().unwrap();
    code.jmp(again).unwrap();
    code
}

fn message(vector: u8) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data: u32::from(vector) }
}

/// Messages: fired directly, by an eventfd, and by an eventfd that was masked when it was signalled.
fn messages(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut state = long_mode(&lab);
    handlers(&lab, &mut state, &[0x41, 0x42, 0x43]);
    lab.load(waiter(|_| {}));
    let fabric = lab.processor.interrupts();
    let table = VectorTable::new(fabric.as_ref(), 2).unwrap();
    lab.start(state);
    assert_eq!(lab.next().offset, 2);

    fabric.fire(message(0x41));
    assert_eq!(lab.next(), out(0, 1, 0x41));

    table.route(0, Some(message(0x42)));
    table.eventfd(0).unwrap().write(1).unwrap();
    assert_eq!(lab.next(), out(0, 1, 0x42));

    table.route(0, None);
    table.eventfd(0).unwrap().write(1).unwrap();
    assert!(lab.is_silent() && table.pending(0) && !table.pending(1));
    table.route(0, Some(message(0x43)));
    assert_eq!(lab.next(), out(0, 1, 0x43), "what was signalled while masked comes on unmask");
    assert!(lab.is_silent());
    table.route(0, None);
    assert!(!table.pending(0), "and has been delivered once");
}

/// An operator's non-maskable interrupt reaches a guest that masks everything, runs or stands, and is over with IRET.
fn non_maskable(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut state = long_mode(&lab);
    handlers(&lab, &mut state, &[2]);
    let mut code = CodeAssembler::new(64).unwrap();
    code.mov(edx, u32::from(PORT + 2)).unwrap();
    code.out(dx, al).unwrap();
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.jmp(again).unwrap();
    lab.load(code);
    lab.start(state);
    assert_eq!(lab.next().offset, 2);
    for _ in 0..3 {
        lab.vcpu().nmi();
        assert_eq!(lab.next(), out(0, 1, 2));
    }
    assert!(lab.is_silent());
    lab.vcpu().stand();
    assert!(lab.vcpu().await_standing(std::time::Instant::now() + super::lab::PATIENCE));
    lab.vcpu().nmi();
    assert!(lab.is_silent());
    lab.vcpu().go();
    assert_eq!(lab.next(), out(0, 1, 2));
}

/// A wire through the I/O APIC, as the guest has programmed its pin.
fn ioapic_wire(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut state = long_mode(&lab);
    handlers(&lab, &mut state, &[0x51]);
    lab.load(waiter(|code| {
        // The 8259 pair would deliver the line too.
        code.mov(al, 0xff).unwrap();
        code.out(0x21, al).unwrap();
        code.out(0xa1, al).unwrap();
        // Pin 5: vector 0x51, edge, to APIC 0.
        code.mov(rbx, IOAPIC).unwrap();
        code.mov(dword_ptr(rbx), 0x10 + 2 * 5 + 1).unwrap();
        code.mov(dword_ptr(rbx + 0x10), 0).unwrap();
        code.mov(dword_ptr(rbx), 0x10 + 2 * 5).unwrap();
        code.mov(dword_ptr(rbx + 0x10), 0x51).unwrap();
    }));
    let fabric = lab.processor.interrupts();
    lab.start(state);
    assert_eq!(lab.next().offset, 2);
    for _ in 0..3 {
        fabric.set_level(5, true);
        fabric.set_level(5, false);
        assert_eq!(lab.next(), out(0, 1, 0x51));
    }
    assert!(lab.is_silent());
}

/// Real mode, as firmware would: the 8259 pair set up for vectors from 8 on, the interval timer at 1 kHz, and a handler
/// that counts ticks while the processor is halted.
fn interval_timer(cpu: Cpu) {
    const HANDLER: u16 = 0x9000;
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut handler = CodeAssembler::new(16).unwrap();
    handler.push(iced_x86::code_asm::ax).unwrap();
    handler.push(dx).unwrap();
    handler.mov(dx, i32::from(PORT)).unwrap();
    handler.mov(al, 0x77).unwrap();
    handler.out(dx, al).unwrap();
    handler.mov(al, 0x20).unwrap();
    handler.out(0x20, al).unwrap();
    handler.pop(dx).unwrap();
    handler.pop(iced_x86::code_asm::ax).unwrap();
    handler.iret().unwrap();
    lab.put(u64::from(HANDLER), &handler.assemble(u64::from(HANDLER)).unwrap());

    let mut code = CodeAssembler::new(16).unwrap();
    code.mov(word_ptr(8 * 4), i32::from(HANDLER as i16)).unwrap();
    code.mov(word_ptr(8 * 4 + 2), 0).unwrap();
    let initialise =
        [(0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0x43, 0x34), (0x40, 0xa9), (0x40, 4)];
    for (port, value) in initialise {
        code.mov(al, value).unwrap();
        code.out(port, al).unwrap();
    }
    code.sti().unwrap();
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.hlt().unwrap();
    code.jmp(again).unwrap();
    lab.load(code);
    let mut state = real_mode();
    state.system.idtr = atoll_softcpu::state::Table { base: 0, limit: 0x3ff };
    let started = std::time::Instant::now();
    lab.start(state);
    for _ in 0..20 {
        assert_eq!(lab.next(), out(0, 1, 0x77));
    }
    assert!(started.elapsed() > Duration::from_millis(10), "20 ticks of 1 ms do not come at once");
}

/// The local APIC's own timer, periodic: it goes on without the guest setting it again.
fn local_timer(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut state = long_mode(&lab);
    handlers(&lab, &mut state, &[0x61]);
    lab.load(waiter(|code| {
        code.mov(dword_ptr(rbx + 0x3e0), 0xb).unwrap();
        // Periodic, vector 0x61.
        code.mov(dword_ptr(rbx + 0x320), 0x2_0061).unwrap();
        code.mov(eax, 1_000_000).unwrap();
        code.mov(dword_ptr(rbx + 0x380), eax).unwrap();
    }));
    lab.start(state);
    assert_eq!(lab.next().offset, 2);
    for _ in 0..5 {
        assert_eq!(lab.next(), out(0, 1, 0x61));
    }
}

super::lab::on_both_cpus!(non_maskable, messages, ioapic_wire, interval_timer, local_timer);
