//! Port and memory-mapped I/O from each mode.

use iced_x86::code_asm::{
    CodeAssembler, al, ax, bp, byte_ptr, cx, dword_ptr, dx, eax, ebx, ecx, edi, edx, esi, qword_ptr, rax, rbx, si,
    word_ptr,
};

use super::lab::{CODE, Cpu, Lab, MMIO, PORT, long_mode, out, pattern, protected_mode, real_mode, store};

fn expected(offset: u64, width: u32) -> u64 {
    (0..u64::from(width)).rev().fold(0, |value, index| value << 8 | u64::from(pattern(offset + index)))
}

/// Real mode: reads a port, counts in a loop through memory, writes bytes and words.
fn real(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(16).unwrap();
    code.mov(dx, i32::from(PORT + 4)).unwrap();
    code.in_(al, dx).unwrap();
    code.mov(dx, i32::from(PORT)).unwrap();
    code.out(dx, al).unwrap();
    code.mov(word_ptr(0x7000), 0).unwrap();
    code.mov(cx, 100).unwrap();
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.add(word_ptr(0x7000), cx).unwrap();
    code.loop_(again).unwrap();
    code.mov(ax, word_ptr(0x7000)).unwrap();
    code.out(dx, ax).unwrap();
    code.mov(bp, ax).unwrap();
    code.push(bp).unwrap();
    code.pop(si).unwrap();
    code.mov(ax, si).unwrap();
    code.out(dx, ax).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    lab.start(real_mode());
    assert_eq!(lab.next(), out(0, 1, u64::from(pattern(4))));
    assert_eq!(lab.next(), out(0, 2, 5050));
    assert_eq!(lab.next(), out(0, 2, 5050));
    assert_eq!(lab.memory_word(0x7000), 5050);
}

/// Protected mode: each width of memory-mapped register, and string output, of which each element is one access.
fn protected(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(32).unwrap();
    code.mov(ebx, MMIO as u32).unwrap();
    code.mov(eax, dword_ptr(ebx + 0x10)).unwrap();
    code.mov(dword_ptr(ebx + 0x20), eax).unwrap();
    code.movzx(eax, word_ptr(ebx + 0x12)).unwrap();
    code.mov(word_ptr(ebx + 0x24), ax).unwrap();
    code.mov(al, byte_ptr(ebx + 0x13)).unwrap();
    code.mov(byte_ptr(ebx + 0x26), al).unwrap();
    code.mov(esi, 0x7000).unwrap();
    code.mov(ecx, 3).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.cld().unwrap();
    code.rep().outsw().unwrap();
    code.mov(edi, 0x7100).unwrap();
    code.mov(ecx, 2).unwrap();
    code.rep().insd().unwrap();
    code.mov(eax, dword_ptr(0x7104)).unwrap();
    code.out(dx, eax).unwrap();
    // Nobody is there: all ones.
    code.mov(eax, dword_ptr(ebx + 0x2000)).unwrap();
    code.out(dx, eax).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    lab.put(0x7000, &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66]);
    lab.start(protected_mode());
    assert_eq!(lab.next(), store(0x20, 4, expected(0x10, 4)));
    assert_eq!(lab.next(), store(0x24, 2, expected(0x12, 2)));
    assert_eq!(lab.next(), store(0x26, 1, expected(0x13, 1)));
    assert_eq!([lab.next(), lab.next(), lab.next()], [out(0, 2, 0x2211), out(0, 2, 0x4433), out(0, 2, 0x6655)]);
    assert_eq!(lab.next(), out(0, 4, expected(0, 4)));
    assert_eq!(lab.next(), out(0, 4, 0xffff_ffff));
}

/// Long mode: 64-bit registers in memory, and addresses above 4 GiB of stack arithmetic.
fn long(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(64).unwrap();
    code.mov(rbx, MMIO).unwrap();
    code.mov(rax, qword_ptr(rbx + 0x18)).unwrap();
    code.mov(qword_ptr(rbx + 0x40), rax).unwrap();
    code.mov(rax, 0x1122_3344_5566_7788_u64).unwrap();
    code.push(rax).unwrap();
    code.pop(qword_ptr(rbx + 0x48)).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.out(dx, eax).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    let state = long_mode(&lab);
    lab.start(state);
    assert_eq!(lab.next(), store(0x40, 8, expected(0x18, 8)));
    assert_eq!(lab.next(), store(0x48, 8, 0x1122_3344_5566_7788));
    assert_eq!(lab.next(), out(0, 4, 0x5566_7788));
}

/// What is set in one CPU's registers is read back from them, and what code did to them too.
fn state_round_trip(cpu: Cpu) {
    let Some(lab) = Lab::new(cpu) else { return };
    let mut vcpu = lab.processor.create_vcpu(0).unwrap();
    let mut state = long_mode(&lab);
    for (index, register) in state.regs.gpr.iter_mut().enumerate() {
        *register = 0x0101_0101_0101_0101 * index as u64;
    }
    state.regs.fp.xmm[3] = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321;
    state.system.lstar = 0xffff_8000_0000_1000;
    state.system.star = 0x0023_0010_0000_0000;
    state.system.kernel_gs_base = 0xffff_8880_0000_0000;
    vcpu.set_state(&state).unwrap();
    let read = vcpu.state().unwrap();
    assert_eq!(read.regs.gpr, state.regs.gpr);
    assert_eq!((read.regs.rip, read.regs.rflags), (CODE, 2));
    assert_eq!(read.regs.fp.xmm, state.regs.fp.xmm);
    let system = |state: &atoll_vmm::cpu::CpuState| {
        let system = &state.system;
        (system.cr0, system.cr3, system.cr4, system.efer, system.lstar, system.star, system.kernel_gs_base, system.gdtr)
    };
    assert_eq!(system(&read), system(&state));
    assert_eq!(read.system.segments[1].attributes, 0xa09b);
}

super::lab::on_both_cpus!(real, protected, long, state_round_trip);
