//! Small programs in flat 64-bit mode, run to HLT.

mod flat;

use flat::{DATA, Machine};
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
