//! Much code, little repetition: what a kernel's boot is made of. Functions of some fifty instructions with loads,
//! stores, arithmetic and forward branches, from a fixed seed, called one after the other in a shuffled order.

use super::loops::DATA;
use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmRegister64, CodeAssembler, CodeLabel, ptr, qword_ptr, r8, r9, r10, r11, r12, rax, rbp, rbx, rcx, rdx, rsi,
};

/// Functions; about fifty instructions each.
const FUNCTIONS: usize = 4600;
const INSTRUCTIONS: u32 = 49;
/// Words of memory that the functions work on.
pub(super) const DATA_WORDS: u32 = 0x4000;

/// Registers that functions use freely; RBX holds the data's address.
const SCRATCH: [AsmRegister64; 8] = [rax, rcx, rdx, rsi, r8, r9, r10, r11];

struct Seed(u64);

impl Seed {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((self.0 >> 33) * u64::from(bound)) >> 31) as u32
    }

    fn register(&mut self) -> AsmRegister64 {
        SCRATCH[self.below(SCRATCH.len() as u32) as usize]
    }
}

pub(super) fn assemble(a: &mut CodeAssembler, run: &mut CodeLabel) -> Result<(), IcedError> {
    let mut seed = Seed(0x5eed);
    let mut functions: Vec<CodeLabel> = (0..FUNCTIONS).map(|_| a.create_label()).collect();
    let mut pass = a.create_label();
    a.set_label(run)?;
    for register in [rbx, rbp, r12] {
        a.push(register)?;
    }
    a.mov(rbx, DATA)?;
    a.xor(rbp, rbp)?;
    a.mov(r12, iced_x86::code_asm::rdi)?;
    for register in SCRATCH {
        a.mov(register, rbp)?;
    }
    a.set_label(&mut pass)?;
    let mut order: Vec<usize> = (0..FUNCTIONS).collect();
    for index in (1..FUNCTIONS).rev() {
        order.swap(index, seed.below(index as u32 + 1) as usize);
    }
    for index in order {
        a.call(functions[index])?;
    }
    a.dec(r12)?;
    a.jne(pass)?;
    a.mov(rax, rbp)?;
    for register in [r12, rbp, rbx] {
        a.pop(register)?;
    }
    a.ret()?;
    for label in &mut functions {
        a.set_label(label)?;
        function(a, &mut seed)?;
    }
    Ok(())
}

fn function(a: &mut CodeAssembler, seed: &mut Seed) -> Result<(), IcedError> {
    let mut left = INSTRUCTIONS;
    while left > 3 {
        if seed.below(7) == 0 && left > 8 {
            // A forward branch over one to four instructions, on a comparison.
            let mut over = a.create_label();
            a.cmp(seed.register(), seed.register())?;
            match seed.below(4) {
                0 => a.jb(over)?,
                1 => a.je(over)?,
                2 => a.jl(over)?,
                _ => a.jns(over)?,
            }
            let skipped = 1 + seed.below(4);
            for _ in 0..skipped {
                simple(a, seed)?;
            }
            a.set_label(&mut over)?;
            // A label must stand before an instruction of its own.
            simple(a, seed)?;
            left -= 3 + skipped;
        } else {
            simple(a, seed)?;
            left -= 1;
        }
    }
    a.add(rbp, seed.register())?;
    a.rol(rbp, 1)?;
    a.ret()
}

fn simple(a: &mut CodeAssembler, seed: &mut Seed) -> Result<(), IcedError> {
    let (to, from) = (seed.register(), seed.register());
    let offset = seed.below(DATA_WORDS / 2) as i32 * 8;
    match seed.below(16) {
        0..=2 => a.mov(to, qword_ptr(rbx + offset)),
        3 | 4 => a.mov(qword_ptr(rbx + offset), from),
        5 => a.add(to, qword_ptr(rbx + offset)),
        6 | 7 => a.add(to, from),
        8 => a.sub(to, from),
        9 => a.xor(to, from),
        10 => a.and(to, 0x00ff_ff0f + seed.below(0xff) as i32),
        11 => a.lea(to, ptr(from + seed.below(4096))),
        12 => a.shl(to, 1 + seed.below(8)),
        13 => a.shr(to, 1 + seed.below(8)),
        14 => a.imul_2(to, from),
        _ => a.mov(to, from),
    }
}
