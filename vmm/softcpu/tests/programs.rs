//! Small programs in flat 64-bit mode, run to HLT.
#![allow(unsafe_code, reason = "another thread works on guest memory")]

mod flat;

use std::sync::atomic::{AtomicU64, Ordering};

use atoll_softcpu::{Attention, Stop, TimeMode};
use flat::{CODE, DATA, Machine, STACK, TABLES};
use iced_x86::code_asm::*;

#[test]
fn a_loop_adds_up() {
    let mut machine = Machine::new();
    machine.load(|a| {
        let mut top = a.create_label();
        a.mov(rcx, 1000u64).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(rcx).unwrap();
        a.jne(top).unwrap();
        a.mov(qword_ptr(DATA as i32), rax).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.gpr(0), 500_500);
    assert_eq!(machine.read_u64(DATA), 500_500);
    assert_eq!(machine.cpu.retired(), 2 + 3000 + 2);
}

/// The decoder calls INTO and VMMCALL calls, so that a block ended behind them with nothing there; when they came back
/// the processor ran into whatever lay behind the block.
#[test]
fn calls_that_come_back_find_the_next_instruction() {
    let mut machine = Machine::new();
    machine.load(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 3).unwrap();
        a.set_label(&mut top).unwrap();
        a.vmmcall().unwrap();
        a.add(qword_ptr(DATA as i32), rax).unwrap();
        a.dec(ecx).unwrap();
        a.jne(top).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.read_u64(DATA) as i64, -3000, "there is no such hypercall, three times");
}

/// Handlers call each other in tail position. If one of those calls were not turned into a jump, each instruction would
/// use stack until the end of the slice: thousands of frames, of which this stack has no room for a part.
#[test]
fn a_hundred_million_instructions_need_no_stack() {
    let mut machine = Box::new(Machine::new());
    machine.load(|a| {
        let mut top = a.create_label();
        let mut inner = a.create_label();
        let mut function = a.create_label();
        a.mov(rcx, 6_000_000u64).unwrap();
        a.lea(rbx, qword_ptr(function)).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(rax, qword_ptr(DATA as i32)).unwrap();
        a.add(qword_ptr(DATA as i32), 3).unwrap();
        a.push(rax).unwrap();
        a.call(function).unwrap();
        a.call(rbx).unwrap();
        a.pop(rdx).unwrap();
        a.cmp(rax, rdx).unwrap();
        a.je(inner).unwrap();
        a.sete(dl).unwrap();
        a.set_label(&mut inner).unwrap();
        a.lock().add(qword_ptr((DATA + 8) as i32), rax).unwrap();
        a.shr(rax, 3).unwrap();
        a.movzx(esi, al).unwrap();
        a.imul_2(rsi, rax).unwrap();
        a.cmovs(rsi, rax).unwrap();
        a.sub(rcx, 1).unwrap();
        a.jne(top).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.lahf().unwrap();
        a.ret().unwrap();
    });
    std::thread::Builder::new()
        .stack_size(40 << 10)
        .spawn(move || {
            machine.run();
            assert!(machine.cpu.retired() >= 100_000_000);
            assert_eq!(machine.read_u64(DATA), 18_000_000);
        })
        .expect("thread")
        .join()
        .expect("no overflow");
}

/// About one boot in fifty hung: `call [mem]` reads its target in one page and writes the return address into another.
/// When both pages fell into the same slot of the TLB, filling the entry for the read also replaced the one for the write,
/// and the other way round, so that the instruction was tried for ever.
#[test]
fn two_operands_in_one_tlb_slot_make_progress() {
    let mut machine = Machine::new();
    // As many pages apart as any direct table has entries: a multiple of 4 MiB.
    let same_slot = STACK - 0x1000 + 0x0100_0000;
    machine.load(|a| {
        let mut function = a.create_label();
        a.mov(rsp, STACK - 0x800).unwrap();
        a.mov(rbx, same_slot).unwrap();
        a.lea(rax, qword_ptr(function)).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.push(rax).unwrap();
        a.call(qword_ptr(rbx)).unwrap();
        a.push(qword_ptr(rbx)).unwrap();
        a.pop(qword_ptr(rbx + 8)).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.inc(ecx).unwrap();
        a.ret().unwrap();
    });
    assert_eq!(machine.cpu.run(&mut machine.world, Some(1000)), Stop::Halted);
    assert_eq!(machine.gpr(1), 1);
    assert_eq!(machine.read_u64(same_slot + 8), machine.gpr(0));
}

#[test]
fn code_that_overwrites_the_very_next_instruction_runs_the_new_one() {
    let mut machine = Machine::new();
    machine.load(|a| {
        let mut patched = a.create_label();
        // First pass runs the old immediate, so that it is decoded; the second overwrites it one instruction ahead.
        a.mov(ecx, 2).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.lea(rbx, qword_ptr(patched)).unwrap();
        a.cmp(ecx, 1).unwrap();
        let mut skip = a.create_label();
        a.jne(skip).unwrap();
        a.mov(dword_ptr(rbx + 1), 77).unwrap();
        a.set_label(&mut skip).unwrap();
        a.nop().unwrap();
        a.set_label(&mut patched).unwrap();
        a.mov(eax, 11).unwrap();
        a.push(rax).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.read_u64(STACK - 8), 11);
    assert_eq!(machine.read_u64(STACK - 16), 77);
}

#[test]
fn code_overwritten_in_another_page_is_decoded_again() {
    let mut machine = Machine::new();
    let other = CODE + 0x3000;
    machine.load_at(other, |a| {
        a.mov(eax, 1).unwrap();
        a.ret().unwrap();
    });
    machine.load(|a| {
        a.mov(rbx, other).unwrap();
        a.call(rbx).unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(byte_ptr(rbx + 1), 2).unwrap();
        a.call(rbx).unwrap();
        a.mov(edi, eax).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!((machine.gpr(6), machine.gpr(7)), (1, 2));
}

/// A backend process writes guest memory without the CPU seeing the store. All the CPU gets is the board's word that
/// some backend has signalled; it must then run the new code, at the latest when it comes to that page again.
#[test]
fn code_overwritten_by_dma_is_decoded_again() {
    let mut machine = Machine::new();
    let other = CODE + 0x3000;
    machine.load_at(other, |a| {
        a.mov(eax, 1).unwrap();
        a.ret().unwrap();
    });
    machine.load(|a| {
        a.mov(rbx, other).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.gpr(0), 1);
    machine.write(other + 1, &[2]);
    machine.attention.raise(Attention::DMA);
    machine.restart();
    machine.run();
    assert_eq!(machine.gpr(0), 2);
    assert_eq!(machine.attention.peek(), 0);
}

/// The same in the upper half of the address space, where a kernel lives: its frame is handed to a device and mapped anew,
/// perhaps under the same address.
#[test]
fn kernel_code_overwritten_by_dma_is_decoded_again_once_it_is_mapped_anew() {
    let mut machine = Machine::new();
    let upper = machine.read_u64(TABLES).to_le_bytes();
    machine.write(TABLES + 256 * 8, &upper);
    let other = CODE + 0x3000;
    machine.load_at(other, |a| {
        a.mov(eax, 1).unwrap();
        a.ret().unwrap();
    });
    machine.load(|a| {
        a.mov(rbx, other | 0xffff_8000_0000_0000).unwrap();
        a.invlpg(byte_ptr(rbx)).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    for value in 1..4 {
        machine.write(other + 1, &[value]);
        machine.attention.raise(Attention::DMA);
        machine.restart();
        machine.run();
        assert_eq!(machine.gpr(0), u64::from(value));
    }
}

/// The same while the overwritten page spins: the look at attention once a slice must be enough.
#[test]
fn a_spinning_loop_overwritten_by_dma_ends() {
    let mut machine = Machine::new();
    machine.load(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin).unwrap();
        a.nop().unwrap();
        a.jmp(spin).unwrap();
    });
    let host = machine.host(CODE) as usize;
    let attention = machine.attention.clone();
    let backend = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        // SAFETY: guest RAM lives as long as the process.
        unsafe { (host as *mut u8).write_volatile(0xf4) };
        attention.raise(Attention::DMA);
    });
    machine.run();
    backend.join().expect("backend");
    assert_eq!(machine.cpu.regs.rip, CODE + 1);
}

/// Clears the present bit of the 2 MiB page that holds `address`; the handler of #PF sets it and returns.
fn with_demand_paging(machine: &mut Machine, address: u64) {
    let entry = TABLES + 0x2000 + (address >> 21) * 8;
    let absent = (machine.read_u64(entry) & !1).to_le_bytes();
    machine.write(entry, &absent);
    let handler = CODE + 0x8000;
    machine.load_at(handler, |a| {
        a.push(rax).unwrap();
        a.push(rbx).unwrap();
        a.mov(rax, cr2).unwrap();
        a.shr(rax, 21).unwrap();
        a.lea(rbx, qword_ptr(TABLES as i32 + 0x2000)).unwrap();
        a.or(qword_ptr(rbx + rax * 8), 1).unwrap();
        a.inc(qword_ptr((DATA - 8) as i32)).unwrap();
        a.pop(rbx).unwrap();
        a.pop(rax).unwrap();
        a.add(rsp, 8).unwrap();
        a.iretq().unwrap();
    });
    machine.gate(14, handler);
}

#[test]
fn a_faulting_instruction_runs_again_with_nothing_lost() {
    let mut machine = Machine::new();
    let absent = 0x120_0000u64;
    with_demand_paging(&mut machine, absent);
    machine.load(|a| {
        a.mov(rdi, absent).unwrap();
        a.mov(eax, 5).unwrap();
        // A compare whose flags only the handler's saved image shows, then a store that faults, then a use of them.
        a.cmp(eax, 6).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.setb(dl).unwrap();
        a.add(qword_ptr(rdi), 1).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.gpr(2) & 0xff, 1);
    assert_eq!(machine.read_u64(absent), 6);
    assert_eq!(machine.read_u64(DATA - 8), 1);
    assert_eq!(machine.cpu.retired(), 7 + 11);
}

#[test]
fn a_string_copy_goes_on_where_it_faulted() {
    let mut machine = Machine::new();
    let absent = 0x120_0000u64;
    with_demand_paging(&mut machine, absent);
    let start = absent - 100;
    let source: Vec<u8> = (0..5000u32).map(|n| (n * 7) as u8).collect();
    machine.write(DATA, &source);
    machine.load(|a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, start).unwrap();
        a.mov(ecx, 5000).unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.read(start, 5000), source);
    assert_eq!((machine.gpr(1), machine.gpr(6), machine.gpr(7)), (0, DATA + 5000, start + 5000));
    assert_eq!(machine.read_u64(DATA - 8), 1);
    assert_eq!(machine.cpu.retired(), 5 + 11);
}

#[test]
fn an_overlapping_string_copy_repeats_its_pattern() {
    let mut machine = Machine::new();
    machine.write(DATA, b"abc");
    machine.load(|a| {
        a.mov(rsi, DATA).unwrap();
        a.lea(rdi, qword_ptr(rsi + 3)).unwrap();
        a.mov(ecx, 9).unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.read(DATA, 12), b"abcabcabcabc");
}

#[test]
fn scans_and_compares_stop_where_they_should() {
    let mut machine = Machine::new();
    machine.write(DATA, b"hello, world\0");
    machine.write(DATA + 0x100, b"hello, wOrld\0");
    machine.load(|a| {
        a.mov(rdi, DATA).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(rcx, -1i64).unwrap();
        a.repne().scasb().unwrap();
        a.not(rcx).unwrap();
        a.mov(r8, rcx).unwrap();
        a.mov(rsi, DATA).unwrap();
        a.lea(rdi, qword_ptr(rsi + 0x100)).unwrap();
        a.mov(ecx, 13).unwrap();
        a.repe().cmpsb().unwrap();
        a.seta(bl).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.gpr(8), 13);
    assert_eq!(machine.gpr(1), 13 - 9);
    assert_eq!(machine.gpr(3) & 0xff, 1);
}

#[test]
fn locked_operations_are_atomic_against_another_thread() {
    let mut machine = Machine::new();
    machine.load(|a| {
        let mut top = a.create_label();
        a.mov(rdi, DATA).unwrap();
        a.mov(ecx, 300_000).unwrap();
        a.set_label(&mut top).unwrap();
        a.lock().inc(qword_ptr(rdi)).unwrap();
        a.mov(eax, 1).unwrap();
        a.lock().xadd(qword_ptr(rdi), rax).unwrap();
        let mut retry = a.create_label();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.set_label(&mut retry).unwrap();
        a.lea(rdx, qword_ptr(rax + 1)).unwrap();
        a.lock().cmpxchg(qword_ptr(rdi), rdx).unwrap();
        a.jne(retry).unwrap();
        a.dec(ecx).unwrap();
        a.jne(top).unwrap();
        a.hlt().unwrap();
    });
    let cell = machine.host(DATA) as usize;
    let other = std::thread::spawn(move || {
        // SAFETY: guest RAM lives as long as the process, and the word is aligned.
        let cell = unsafe { &*(cell as *const AtomicU64) };
        for _ in 0..600_000 {
            cell.fetch_add(1, Ordering::SeqCst);
        }
    });
    machine.run();
    other.join().expect("other thread");
    assert_eq!(machine.read_u64(DATA), 900_000 + 600_000);
}

#[test]
fn single_steps_trap_after_each_instruction() {
    let mut machine = Machine::new();
    let handler = CODE + 0x8000;
    machine.load_at(handler, |a| {
        a.inc(qword_ptr((DATA - 8) as i32)).unwrap();
        a.mov(rdx, qword_ptr(rsp)).unwrap();
        a.iretq().unwrap();
    });
    machine.gate(1, handler);
    machine.load(|a| {
        a.pushfq().unwrap();
        a.or(qword_ptr(rsp), 0x100).unwrap();
        a.popfq().unwrap();
        a.mov(eax, 1).unwrap();
        a.mov(ebx, 2).unwrap();
        a.pushfq().unwrap();
        a.and(qword_ptr(rsp), -0x101).unwrap();
        a.popfq().unwrap();
        a.mov(ecx, 3).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!(machine.read_u64(DATA - 8), 5);
    assert_eq!((machine.gpr(0), machine.gpr(3), machine.gpr(1)), (1, 2, 3));
}

#[test]
fn an_interrupt_waits_out_the_shadow_of_sti() {
    let mut machine = Machine::new();
    let handler = CODE + 0x8000;
    machine.load_at(handler, |a| {
        a.mov(rdx, qword_ptr(rsp)).unwrap();
        a.iretq().unwrap();
    });
    machine.gate(0x40, handler);
    machine.world.vectors.push(0x40);
    machine.attention.raise(Attention::INTERRUPT);
    machine.load(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.mov(eax, 1).unwrap();
        a.mov(ebx, 2).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    // NOP and STI are two bytes, MOV five: the interrupt came behind the first MOV.
    assert_eq!(machine.gpr(2), CODE + 7);
    assert_eq!(machine.gpr(3), 2);
}

/// A block does not end for STI, unless it ends there anyway. Wherever that is, and whenever an interrupt comes, it must not
/// come between STI and the next instruction: a kernel that halts there would sleep through it.
#[test]
fn no_interrupt_comes_right_behind_sti_wherever_blocks_end() {
    for before in 56..68_u64 {
        for look in [3, 10, 11, 12] {
            let mut machine = Machine::new();
            let handler = CODE + 0x8000;
            machine.load_at(handler, |a| {
                a.mov(rdx, qword_ptr(rsp)).unwrap();
                a.mov(qword_ptr(DATA as i32), 1).unwrap();
                a.iretq().unwrap();
            });
            machine.gate(0x40, handler);
            machine.world.at_look = Some((look, 0x40, machine.attention.clone()));
            machine.load(|a| {
                let mut top = a.create_label();
                let mut done = a.create_label();
                a.mov(ecx, 1_000_000).unwrap();
                a.set_label(&mut top).unwrap();
                a.cli().unwrap();
                for _ in 0..before {
                    a.inc(eax).unwrap();
                }
                a.sti().unwrap();
                a.inc(ebx).unwrap();
                a.cmp(qword_ptr(DATA as i32), 0).unwrap();
                a.jne(done).unwrap();
                a.dec(ecx).unwrap();
                a.jne(top).unwrap();
                a.set_label(&mut done).unwrap();
                a.cli().unwrap();
                a.hlt().unwrap();
            });
            machine.run();
            assert_eq!(machine.read_u64(DATA), 1, "the interrupt came");
            // MOV is five bytes, INC two, CLI and STI one each.
            let behind = CODE + 5 + 1 + 2 * before + 1;
            assert_ne!(machine.gpr(2), behind, "{before} instructions before STI, at look {look}");
        }
    }
}

/// A timer of the board has no thread: the processor looks around every few microseconds of guest code, and an interrupt
/// that comes of it ends a busy loop.
#[test]
fn a_busy_loop_is_interrupted_by_what_the_board_sees() {
    let mut machine = Machine::new();
    let handler = CODE + 0x8000;
    machine.load_at(handler, |a| {
        a.mov(qword_ptr(DATA as i32), 1).unwrap();
        a.iretq().unwrap();
    });
    machine.gate(0x40, handler);
    machine.world.at_look = Some((50, 0x40, machine.attention.clone()));
    machine.load(|a| {
        let mut top = a.create_label();
        let mut done = a.create_label();
        a.mov(rcx, 10_000_000u64).unwrap();
        a.sti().unwrap();
        a.set_label(&mut top).unwrap();
        a.cmp(qword_ptr(DATA as i32), 0).unwrap();
        a.jne(done).unwrap();
        a.dec(rcx).unwrap();
        a.jne(top).unwrap();
        a.set_label(&mut done).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!((machine.read_u64(DATA), machine.world.at_look.is_none()), (1, true));
    let each = machine.cpu.retired() / machine.world.looks;
    assert!((1..=4096).contains(&each), "a look for each {each} instructions");
}

#[test]
fn budgets_are_exact_and_deterministic_runs_have_equal_hashes() {
    let program = |a: &mut CodeAssembler| {
        let mut top = a.create_label();
        a.mov(rcx, 100_000u64).unwrap();
        a.set_label(&mut top).unwrap();
        a.rdtsc().unwrap();
        a.add(rbx, rax).unwrap();
        a.ror(rbx, 5).unwrap();
        a.xor(qword_ptr(DATA as i32), rbx).unwrap();
        a.dec(rcx).unwrap();
        a.jne(top).unwrap();
        a.hlt().unwrap();
    };
    let run = |steps: &[u64]| {
        let mut machine = Machine::with_time(TimeMode::Retired { ns_per_1000: 1000 });
        machine.load(program);
        machine.cpu.trace(1000);
        for &step in steps {
            let before = machine.cpu.retired();
            assert_eq!(machine.cpu.run(&mut machine.world, Some(step)), Stop::Budget);
            assert_eq!(machine.cpu.retired() - before, step);
        }
        machine.run();
        (machine.cpu.trace_hash(), machine.gpr(3), machine.cpu.retired())
    };
    let whole = run(&[]);
    assert_eq!(whole.2, 1 + 600_000 + 1);
    assert_eq!(whole, run(&[1, 2, 3, 64, 65, 1000, 12_345]));
    assert_eq!(whole, run(&[7; 300]));
}

#[test]
fn what_the_model_lacks_is_undefined() {
    let mut machine = Machine::new();
    let handler = CODE + 0x8000;
    machine.load_at(handler, |a| {
        a.mov(rdx, qword_ptr(rsp)).unwrap();
        a.hlt().unwrap();
    });
    machine.gate(6, handler);
    machine.load(|a| {
        a.nop().unwrap();
        a.vaddps(ymm0, ymm1, ymm2).unwrap();
    });
    machine.run();
    assert_eq!(machine.gpr(2), CODE + 1);
}

/// An instruction that lies across two pages belongs to no block; and its second half may change alone.
#[test]
fn an_instruction_across_pages_follows_both() {
    let mut machine = Machine::new();
    let at = CODE + 0xffd;
    machine.load_at(at, |a| {
        a.mov(eax, 0x0101_0101).unwrap();
        a.ret().unwrap();
    });
    machine.load(|a| {
        a.mov(rbx, at).unwrap();
        a.call(rbx).unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(byte_ptr(rbx + 4), 0x7f).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!((machine.gpr(6), machine.gpr(0)), (0x0101_0101, 0x7f01_0101));
}

#[test]
fn real_mode_has_segments_and_wrapping_addresses() {
    let mut machine = Machine::new();
    machine.real_mode();
    machine.write(0x1_2345, b"segment");
    machine.load_bits(16, 0x7c00, |a| {
        a.mov(ax, 0x1000u32).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(ax, 0x2000u32).unwrap();
        a.mov(es, ax).unwrap();
        a.mov(si, 0x2345u32).unwrap();
        a.mov(di, 0xfffdu32).unwrap();
        a.mov(cx, 3u32).unwrap();
        a.cld().unwrap();
        a.rep().movsb().unwrap();
        // DI has wrapped to zero: the next byte goes to the segment's start.
        a.movsb().unwrap();
        // An offset of 16 bits wraps too: BX + SI is 0x1_0010.
        a.mov(bx, 0xffffu32).unwrap();
        a.mov(si, 0x11u32).unwrap();
        a.mov(byte_ptr(bx + si), 0x5a).unwrap();
        a.pusha().unwrap();
        a.mov(ax, 0x1234u32).unwrap();
        a.popa().unwrap();
        let mut function = a.create_label();
        a.call(function).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.aam(10).unwrap();
        a.ret().unwrap();
    });
    machine.run();
    assert_eq!(machine.read(0x2_fffd, 3), b"seg");
    assert_eq!(machine.read(0x2_0000, 1), b"m");
    assert_eq!(machine.read(0x1_0010, 1), [0x5a]);
    assert_eq!(machine.gpr(0) & 0xffff, 0, "AX held 0x2000: AL is 0");
    assert_eq!(machine.gpr(4), 0x7000);
}

#[test]
fn protected_mode_wraps_at_four_gibibytes() {
    let mut machine = Machine::new();
    machine.protected_mode();
    machine.load_bits(32, CODE, |a| {
        let mut top = a.create_label();
        let mut function = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        a.call(function).unwrap();
        a.loop_(top).unwrap();
        a.mov(ebx, 0xffff_fff0u32).unwrap();
        a.mov(dword_ptr(ebx + (DATA as i32 + 16)), eax).unwrap();
        a.inc(edx).unwrap();
        a.push(0x1234_5678).unwrap();
        a.pop(esi).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.add(eax, ecx).unwrap();
        a.ret().unwrap();
    });
    machine.run();
    assert_eq!(machine.read_u64(DATA) as u32, 500_500);
    assert_eq!((machine.gpr(2), machine.gpr(6)), (1, 0x1234_5678));
}

/// A watched variable is stored to twice and loaded once; the handler of #DB counts, and notes where it was told. The
/// breakpoint on an instruction fires before it, once, because the handler sets RF.
#[test]
fn breakpoints_fire_on_data_and_on_instructions() {
    let mut machine = Machine::new();
    let handler = CODE + 0x800;
    machine.load(|a| {
        let mut watched = a.create_label();
        a.mov(rax, DATA + 0x100).unwrap();
        a.mov(dr0, rax).unwrap();
        a.lea(rax, qword_ptr(watched)).unwrap();
        a.mov(dr1, rax).unwrap();
        // 0: writes to eight bytes; 1: execution.
        a.mov(eax, 0x0009_040a).unwrap();
        a.mov(dr7, rax).unwrap();
        a.mov(qword_ptr((DATA + 0x100) as i32), 1).unwrap();
        a.mov(rcx, qword_ptr((DATA + 0x100) as i32)).unwrap();
        a.mov(byte_ptr((DATA + 0x107) as i32), 1).unwrap();
        a.mov(byte_ptr((DATA + 0x108) as i32), 1).unwrap();
        a.set_label(&mut watched).unwrap();
        a.inc(rcx).unwrap();
        a.hlt().unwrap();
    });
    machine.load_at(handler, |a| {
        a.push(rax).unwrap();
        a.mov(rax, dr6).unwrap();
        a.shl(qword_ptr(DATA as i32), 4).unwrap();
        a.and(eax, 0xf).unwrap();
        a.or(qword_ptr(DATA as i32), rax).unwrap();
        a.or(dword_ptr(rsp + 24), 0x1_0000).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    machine.gate(1, handler);
    machine.run();
    assert_eq!(machine.read_u64(DATA), 0x112, "two stores and the instruction");
    assert_eq!(machine.gpr(1), 2);
}
