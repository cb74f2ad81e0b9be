//! How a vCPU starts, stops and fails, and what happens without it leaving the guest.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Instant;

use atoll_vmm::cpu::{Exit, Space, VcpuPhase};
use atoll_vmm::doorbell::{Doorbell, Relay};
use atoll_vmm::memory::DevicePages;
use iced_x86::code_asm::{CodeAssembler, al, byte_ptr, dword_ptr, dx, eax, ebx, edx, esi, rax, word_ptr};

use super::lab::{CODE, Cpu, Lab, MMIO, PATIENCE, PORT, long_mode, out, pattern, protected_mode};

/// A guest that never leaves by itself, with interrupts off: stopping it must not depend on it.
fn endless_loop_is_stopped(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(32).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.out(dx, al).unwrap();
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.jmp(again).unwrap();
    lab.load(code);
    lab.start(protected_mode());
    lab.next();
    let asked = Instant::now();
    assert_eq!(lab.stop(), Exit::Stopped);
    assert!(asked.elapsed() < PATIENCE);
}

/// A guest that halts for ever, likewise.
fn halted_guest_is_stopped(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(32).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.out(dx, al).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    lab.start(protected_mode());
    lab.next();
    assert_eq!(lab.stop(), Exit::Stopped);
}

/// A guest that counts aloud, over ports and memory in turn, and reads in between: however often it stands in the middle
/// of that, it says each number once, and reads what it should.
fn pauses_lose_and_repeat_nothing(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(32).unwrap();
    let (mut again, mut wrong) = (code.create_label(), code.create_label());
    code.mov(ebx, MMIO as u32).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.set_label(&mut again).unwrap();
    code.inc(esi).unwrap();
    code.mov(eax, esi).unwrap();
    code.out(dx, eax).unwrap();
    code.in_(eax, dx).unwrap();
    code.cmp(eax, 0xa3a2_a1a0_u32).unwrap();
    code.jne(wrong).unwrap();
    code.inc(esi).unwrap();
    code.mov(dword_ptr(ebx), esi).unwrap();
    code.mov(eax, dword_ptr(ebx + 4)).unwrap();
    code.cmp(eax, 0xa7a6_a5a4_u32).unwrap();
    code.je(again).unwrap();
    code.set_label(&mut wrong).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    lab.start(protected_mode());
    let mut count = 0;
    let mut heard = |lab: &Lab, least: u64| {
        for _ in 0..least {
            count += 1;
            assert_eq!(lab.next().value, count);
        }
    };
    for round in 0..100 {
        heard(&lab, 1 + round % 7);
        lab.vcpu().stand();
        assert!(lab.vcpu().await_standing(Instant::now() + PATIENCE));
        assert_eq!(lab.vcpu().phase(), VcpuPhase::Standing);
        lab.vcpu().go();
    }
    heard(&lab, 100);
    assert_eq!(lab.stop(), Exit::Stopped);
}

/// No handler for a fault, nor for the fault of that, …: the end names the instruction.
fn triple_fault_names_rip(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(64).unwrap();
    code.nop().unwrap();
    code.ud2().unwrap();
    lab.load(code);
    let mut state = long_mode(&lab);
    state.system.idtr = atoll_softcpu::state::Table { base: 0, limit: 0 };
    lab.start(state);
    match lab.end() {
        // KVM on AMD's processors has forgotten it, and says so.
        Exit::TripleFault { rip: None } if cpu == Cpu::Kvm => {}
        end => assert_eq!(end, Exit::TripleFault { rip: Some(CODE + 1) }),
    }
}

/// Code that jumps to where no memory is ends the machine; it must neither hang nor take the monitor with it.
fn jump_into_nowhere_ends(cpu: Cpu) {
    let Some(mut lab) = Lab::new(cpu) else { return };
    let mut code = CodeAssembler::new(64).unwrap();
    code.mov(rax, MMIO + 0x10_0000).unwrap();
    code.jmp(rax).unwrap();
    lab.load(code);
    let mut state = long_mode(&lab);
    state.system.idtr = atoll_softcpu::state::Table { base: 0, limit: 0 };
    lab.start(state);
    match lab.end() {
        Exit::TripleFault { rip: None } if cpu == Cpu::Kvm => {}
        Exit::TripleFault { rip: Some(rip) } | Exit::Stuck { rip, .. } => assert_eq!(rip, MMIO + 0x10_0000),
        Exit::TripleFault { rip: None } => panic!("this CPU knows where it was"),
        Exit::Stopped => panic!("nobody stopped it"),
    }
}

/// A doorbell is signalled by the guest's write, of whatever width and value, and the register behind it sees nothing.
fn doorbell_rings(cpu: Cpu) {
    const DOORBELL: u64 = MMIO + 0x100;
    let Some(mut lab) = Lab::new(cpu) else { return };
    let relay = Relay::new().unwrap();
    let bell = Doorbell::new(&relay).unwrap();
    lab.doorbells.insert(Space::Mmio, DOORBELL, Arc::clone(&bell)).unwrap();
    let mut code = CodeAssembler::new(32).unwrap();
    code.mov(ebx, DOORBELL as u32).unwrap();
    code.mov(dword_ptr(ebx), 1).unwrap();
    code.mov(word_ptr(ebx), 2).unwrap();
    code.mov(byte_ptr(ebx), 3).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.out(dx, al).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    lab.start(protected_mode());
    assert_eq!(lab.next().space, Space::Pio);
    assert_eq!(bell.backend_event().read().unwrap(), 3);
}

/// KVM's log names the pages that the guest has written, and none that it has not touched; pages that are read for the first
/// time it may name too.
#[test]
fn kvm_logs_dirty_pages() {
    let Some(mut lab) = Lab::new(Cpu::Kvm) else { return };
    let kvm = lab.kvm.clone().unwrap();
    let mut code = CodeAssembler::new(32).unwrap();
    for page in [0x20_0000, 0x20_3000, 0x80_0000] {
        code.mov(byte_ptr(page), 1).unwrap();
    }
    code.mov(eax, dword_ptr(0x30_0000)).unwrap();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.out(dx, al).unwrap();
    code.hlt().unwrap();
    lab.load(code);
    kvm.dirty_log().start().unwrap();
    assert!(kvm.dirty_log().take().unwrap().is_empty());
    lab.start(protected_mode());
    assert_eq!(lab.next(), out(0, 1, 0));
    let named = kvm.dirty_log().take().unwrap();
    assert!(named.is_sorted());
    assert!([0x20_0000, 0x20_3000, 0x80_0000].iter().all(|page| named.contains(page)), "{named:x?}");
    assert!(named.iter().all(|page| [CODE, 0x20_0000, 0x20_3000, 0x30_0000, 0x80_0000].contains(page)), "{named:x?}");
    assert!(kvm.dirty_log().take().unwrap().is_empty());
    kvm.dirty_log().stop().unwrap();
}

/// Registers of a device are shown to the guest, and vanish under it: the guest goes on, each access comes out and is answered by
/// whoever is there. (Pages beyond the end of a file are as unreachable as those of a device that is gone.)
#[test]
fn kvm_survives_registers_that_vanish() {
    let Some(mut lab) = Lab::new(Cpu::Kvm) else { return };
    const LEN: u64 = 0x1000;
    let device = tempfile::tempfile().unwrap();
    device.set_len(LEN).unwrap();
    device.write_all_at(&0x1234_5678_u32.to_le_bytes(), 4).unwrap();
    let pages = Arc::new(DevicePages::map(&device, 0, LEN).unwrap());
    let window = lab.processor.windows().unwrap().show(MMIO, pages).unwrap();
    let mut code = CodeAssembler::new(32).unwrap();
    let mut again = code.create_label();
    code.mov(edx, u32::from(PORT)).unwrap();
    code.mov(ebx, MMIO as u32).unwrap();
    code.set_label(&mut again).unwrap();
    code.mov(eax, dword_ptr(ebx + 4)).unwrap();
    code.out(dx, eax).unwrap();
    code.jmp(again).unwrap();
    lab.load(code);
    lab.start(protected_mode());
    assert_eq!(lab.next(), out(0, 4, 0x1234_5678));
    device.set_len(0).unwrap();
    let answered = u64::from(u32::from_le_bytes([4, 5, 6, 7].map(pattern)));
    let deadline = Instant::now() + PATIENCE;
    while lab.next() != out(0, 4, answered) {
        assert!(Instant::now() < deadline, "the guest still reads what is not there");
    }
    assert_eq!(lab.stop(), Exit::Stopped);
    // Its place is another's when its owner has let it go.
    drop(window);
    device.set_len(LEN).unwrap();
    let pages = Arc::new(DevicePages::map(&device, 0, LEN).unwrap());
    lab.processor.windows().unwrap().show(MMIO, pages).unwrap();
}

super::lab::on_both_cpus!(
    endless_loop_is_stopped,
    halted_guest_is_stopped,
    pauses_lose_and_repeat_nothing,
    triple_fault_names_rip,
    jump_into_nowhere_ends,
    doorbell_rings
);
