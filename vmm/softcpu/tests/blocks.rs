//! Blocks of specialised handlers against the general interpreter, which the host processor has checked.
//!
//! Random programs run twice: as blocks (flags computed only where somebody looks, compares fused with jumps, links,
//! the translation cache inline), and with a budget of one instruction a call, which goes through the general
//! interpreter alone. Registers, flags and memory must be equal.

mod flat;

use flat::{CODE, DATA, Machine, STACK};
use iced_x86::code_asm::registers as r;
use iced_x86::code_asm::{AsmRegister8, AsmRegister16, AsmRegister32, AsmRegister64, AsmRegisterXmm};
use iced_x86::code_asm::{CodeAssembler, CodeLabel, byte_ptr, dword_ptr, ptr, qword_ptr, word_ptr, xmmword_ptr};

/// A small generator of its own, so that a failing program can be named by its number for good.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
    fn flip(&mut self) -> bool {
        self.below(2) == 0
    }
}

// RDI and RSI stay put: they are the memory operands' bases.
const R64: [AsmRegister64; 8] = [r::rax, r::rcx, r::rdx, r::rbx, r::r8, r::r9, r::r12, r::r13];
const R32: [AsmRegister32; 8] = [r::eax, r::ecx, r::edx, r::ebx, r::r8d, r::r9d, r::r12d, r::r13d];
const R16: [AsmRegister16; 8] = [r::ax, r::cx, r::dx, r::bx, r::r8w, r::r9w, r::r12w, r::r13w];
const R8: [AsmRegister8; 8] = [r::al, r::ch, r::dl, r::bh, r::bl, r::ah, r::dh, r::cl];

const XMM: [AsmRegisterXmm; 4] = [r::xmm0, r::xmm1, r::xmm7, r::xmm13];

type Step = Result<(), iced_x86::IcedError>;

/// Two-operand operations in all widths and operand forms.
macro_rules! two {
    ($a:expr, $random:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, &mut Random) -> Step] = &[$(
            |a, random| {
                let (x, y) = (random.below(8) as usize, random.below(8) as usize);
                let offset = random.below(64) as i32 - 32;
                let (i8, i32) = (random.below(256) as u8 as i8, random.below(1 << 32) as i32);
                match random.below(20) {
                    0 => a.$name(R64[x], R64[y]),
                    1 => a.$name(R32[x], R32[y]),
                    2 => a.$name(R16[x], R16[y]),
                    3 => a.$name(R8[x], R8[y]),
                    4 => a.$name(R64[x], i32),
                    5 => a.$name(R32[x], i32),
                    6 => a.$name(R16[x], i32::from(i8)),
                    7 => a.$name(R8[x], i32::from(i8)),
                    8 => a.$name(qword_ptr(r::rdi + offset), R64[y]),
                    9 => a.$name(dword_ptr(r::rdi + offset), R32[y]),
                    10 => a.$name(word_ptr(r::rdi + r::rsi * 2 + offset), R16[y]),
                    11 => a.$name(byte_ptr(r::rdi + r::rsi * 4 + offset), R8[y]),
                    12 => a.$name(qword_ptr(r::rdi + offset), i32::from(i8)),
                    13 => a.$name(dword_ptr(r::rdi + r::rsi + offset), i32),
                    14 => a.$name(word_ptr(r::rdi + offset), i32::from(i8)),
                    15 => a.$name(byte_ptr(r::rdi + offset), i32::from(i8)),
                    16 => a.$name(R64[x], i32::from(i8)),
                    17 => a.$name(R32[x], i32::from(i8)),
                    18 => a.$name(R64[x], R64[x]),
                    _ => a.$name(R32[x], R32[x]),
                }
            },
        )*];
        let pick = $random.below(operations.len() as u64) as usize;
        operations[pick]($a, $random)
    }};
}
/// The same with memory as the source.
macro_rules! from_memory {
    ($a:expr, $random:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, &mut Random) -> Step] = &[$(
            |a, random| {
                let x = random.below(8) as usize;
                let offset = random.below(64) as i32 - 32;
                match random.below(4) {
                    0 => a.$name(R64[x], qword_ptr(r::rdi + offset)),
                    1 => a.$name(R32[x], dword_ptr(r::rdi + r::rsi * 8 + offset)),
                    2 => a.$name(R16[x], word_ptr(r::rdi + offset)),
                    _ => a.$name(R8[x], byte_ptr(r::rdi + r::rsi + offset)),
                }
            },
        )*];
        let pick = $random.below(operations.len() as u64) as usize;
        operations[pick]($a, $random)
    }};
}
/// One operand.
macro_rules! one {
    ($a:expr, $random:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, &mut Random) -> Step] = &[$(
            |a, random| {
                let x = random.below(8) as usize;
                let offset = random.below(64) as i32 - 32;
                match random.below(6) {
                    0 => a.$name(R64[x]),
                    1 => a.$name(R32[x]),
                    2 => a.$name(R16[x]),
                    3 => a.$name(R8[x]),
                    4 => a.$name(qword_ptr(r::rdi + offset)),
                    _ => a.$name(byte_ptr(r::rdi + offset)),
                }
            },
        )*];
        let pick = $random.below(operations.len() as u64) as usize;
        operations[pick]($a, $random)
    }};
}
/// Shifts and rotates.
macro_rules! shifts {
    ($a:expr, $random:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, &mut Random) -> Step] = &[$(
            |a, random| {
                let x = random.below(8) as usize;
                let count = random.below(70) as i32;
                match random.below(8) {
                    0 => a.$name(R64[x], count),
                    1 => a.$name(R32[x], count),
                    2 => a.$name(R16[x], count),
                    3 => a.$name(R8[x], count),
                    4 => a.$name(R64[x], r::cl),
                    5 => a.$name(R32[x], r::cl),
                    6 => a.$name(R16[x], r::cl),
                    _ => a.$name(R8[x], r::cl),
                }
            },
        )*];
        let pick = $random.below(operations.len() as u64) as usize;
        operations[pick]($a, $random)
    }};
}
/// An operation chosen from calls of methods that take a register of 64, 32 or 16 bits and another.
macro_rules! wide {
    ($a:expr, $random:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, &mut Random) -> Step] = &[$(
            |a, random| {
                let (x, y) = (random.below(8) as usize, random.below(8) as usize);
                match random.below(4) {
                    0 => a.$name(R64[x], R64[y]),
                    1 => a.$name(R32[x], R32[y]),
                    2 => a.$name(R16[x], R16[y]),
                    _ => a.$name(R64[x], qword_ptr(r::rdi + (random.below(64) as i32 - 32))),
                }
            },
        )*];
        let pick = $random.below(operations.len() as u64) as usize;
        operations[pick]($a, $random)
    }};
}
macro_rules! jumps {
    ($a:expr, $random:expr, $label:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, CodeLabel) -> Step] = &[$(|a, label| a.$name(label)),*];
        operations[$random.below(operations.len() as u64) as usize]($a, $label)
    }};
}
macro_rules! sets {
    ($a:expr, $random:expr, $($name:ident)*) => {{
        let operations: &[fn(&mut CodeAssembler, &mut Random) -> Step] = &[$(
            |a, random| {
                if random.flip() {
                    a.$name(R8[random.below(8) as usize])
                } else {
                    a.$name(byte_ptr(r::rdi + (random.below(64) as i32 - 32)))
                }
            },
        )*];
        operations[$random.below(operations.len() as u64) as usize]($a, $random)
    }};
}

fn put_one(a: &mut CodeAssembler, random: &mut Random) -> Step {
    let (x, y) = (random.below(8) as usize, random.below(8) as usize);
    let offset = random.below(64) as i32 - 32;
    match random.below(40) {
        0..=9 => two!(a, random, add sub cmp and or xor adc sbb test),
        10..=12 => from_memory!(a, random, add sub cmp and or xor adc sbb mov),
        13..=15 => one!(a, random, inc dec neg not),
        16..=18 => shifts!(a, random, shl shr sar rol ror rcl rcr),
        19 => wide!(a, random, imul_2 cmovb cmove cmovg cmovs cmovp cmovno cmovbe cmovl),
        20 => wide!(a, random, bsf bsr),
        21 => sets!(a, random, seto setb sete setbe sets setp setl setle setno setae setne seta setns setnp setge setg),
        22 => match random.below(6) {
            0 => a.movzx(R32[x & 3], R8[y]),
            1 => a.movsx(R64[x], R16[y]),
            2 => a.movsxd(R64[x], R32[y]),
            3 => a.movzx(R64[x], byte_ptr(r::rdi + offset)),
            4 => a.movsx(R32[x], word_ptr(r::rdi + offset)),
            _ => a.movsxd(R64[x], dword_ptr(r::rdi + r::rsi * 2 + offset)),
        },
        23 => match random.below(5) {
            0 => a.lea(R64[x], qword_ptr(R64[y] + offset)),
            1 => a.lea(R32[x], qword_ptr(R64[y] + R64[x] * 4 + offset)),
            2 => a.lea(R16[x], qword_ptr(R64[y] * 8 + offset)),
            3 => a.lea(R64[x], ptr(R32[y] + offset)),
            _ => a.lea(R64[x], qword_ptr(DATA)),
        },
        24 => match random.below(8) {
            0 => a.cbw(),
            1 => a.cwde(),
            2 => a.cdqe(),
            3 => a.cwd(),
            4 => a.cdq(),
            5 => a.cqo(),
            6 => a.bswap(R64[x]),
            _ => a.bswap(R32[x]),
        },
        25 => match random.below(4) {
            0 => a.xchg(R64[x], R64[y]),
            1 => a.xchg(R8[x], R8[y]),
            2 => a.xchg(dword_ptr(r::rdi + offset), R32[y]),
            _ => a.xadd(qword_ptr(r::rdi + offset), R64[y]),
        },
        26 => match random.below(5) {
            0 => a.lock().add(dword_ptr(r::rdi + offset), R32[y]),
            1 => a.lock().and(byte_ptr(r::rdi + offset), random.below(100) as i32),
            2 => a.lock().inc(qword_ptr(r::rdi + offset)),
            3 => a.lock().cmpxchg(qword_ptr(r::rdi + offset), R64[y]),
            _ => a.cmpxchg(R32[x], R32[y]),
        },
        27 => match random.below(6) {
            0 => a.mul(R64[y]),
            1 => a.mul(R32[y]),
            2 => a.imul(R64[y]),
            3 => a.imul(R8[y]),
            4 => a.imul_3(R32[x], R32[y], random.below(1 << 31) as i32),
            _ => a.imul_3(R64[x], qword_ptr(r::rdi + offset), random.below(200) as i32 - 100),
        },
        28 => match random.below(8) {
            0 => a.bt(R64[x], R64[y]),
            1 => a.bts(R32[x], random.below(64) as i32),
            2 => a.btr(qword_ptr(r::rdi + offset), random.below(64) as i32),
            3 => a.btc(R16[x], R16[y]),
            4 => a.lock().bts(dword_ptr(r::rdi + offset), random.below(32) as i32),
            5 => a.bt(dword_ptr(r::rdi + offset), random.below(32) as i32),
            6 => a.shld(R64[x], R64[y], random.below(64) as i32),
            _ => a.shrd(R32[x], R32[y], r::cl),
        },
        29 => a.push(R64[x]).and_then(|()| a.pop(R64[y])),
        30 => a.push(qword_ptr(r::rdi + offset)).and_then(|()| a.pop(R64[y])),
        31 => a.pushfq().and_then(|()| a.pop(R64[y])),
        32 => a.lahf(),
        33 => a.sahf(),
        34 => a.cmc(),
        35 => a.mov(R64[x], random.below(1 << 53).wrapping_mul(0x1357_9bdf)),
        36 => match random.below(8) {
            0 => a.mov(R16[x], r::ss),
            1 => a.mov(R64[x], i64::from(offset)),
            2 => a.mov(R32[x], offset),
            3 => a.mov(R8[x], offset),
            4 => a.mov(qword_ptr(r::rdi + offset), R64[y]),
            5 => a.mov(byte_ptr(r::rdi + r::rsi * 8 + offset), R8[y]),
            6 => a.mov(dword_ptr(r::rdi + offset), offset),
            _ => a.mov(R8[x], R8[y]),
        },
        37 => {
            let (v, w) = (XMM[random.below(4) as usize], XMM[random.below(4) as usize]);
            match random.below(9) {
                0 => a.movdqu(v, xmmword_ptr(r::rdi + offset)),
                1 => a.movups(xmmword_ptr(r::rdi + r::rsi * 4 + offset), v),
                2 => a.paddd(v, w),
                3 => a.pxor(v, w),
                4 => a.pcmpeqb(v, w),
                5 => a.pmovmskb(R32[x], v),
                6 => a.movq(v, R64[x]),
                7 => a.movaps(v, w),
                _ => a.movq(qword_ptr(r::rdi + offset), v),
            }
        }
        _ => two!(a, random, cmp test add),
    }
}

/// A program of some dozens of instructions with jumps ahead and a function.
fn program(a: &mut CodeAssembler, random: &mut Random) -> Step {
    let mut function = a.create_label();
    let mut top = a.create_label();
    a.mov(r::r15, 3u64)?;
    a.set_label(&mut top)?;
    for _ in 0..random.below(12) + 4 {
        for _ in 0..random.below(4) {
            put_one(a, random)?;
        }
        let mut ahead = a.create_label();
        let jump = random.below(3) != 0;
        if jump {
            jumps!(a, random, ahead, jo jno jb jae je jne jbe ja js jns jp jnp jl jge jle jg)?;
        }
        put_one(a, random)?;
        if random.below(6) == 0 {
            a.call(function)?;
        }
        if jump {
            a.set_label(&mut ahead)?;
        }
        a.nop()?;
    }
    a.dec(r::r15)?;
    a.jne(top)?;
    a.pushfq()?;
    a.hlt()?;
    a.set_label(&mut function)?;
    put_one(a, random)?;
    a.ret()
}

/// Everything that a program can change.
fn outcome(machine: &Machine) -> ([u64; 16], u64, u64, [u128; 16], Vec<u8>) {
    let regs = &machine.cpu.regs;
    let mut memory = machine.read(DATA - 64, 4096 + 256);
    memory.extend(machine.read(STACK - 256, 256));
    (regs.gpr, regs.rip, regs.rflags, regs.fp.xmm, memory)
}

#[test]
fn blocks_do_what_single_instructions_do() {
    let mut blocks = Machine::new();
    let mut steps = Machine::new();
    for number in 0..4000u64 {
        let mut random = Random(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            random.below(2);
        }
        let mut a = CodeAssembler::new(64).expect("assembler");
        program(&mut a, &mut random).expect("program");
        // Start near a page's end now and then, so that blocks and instructions cross it.
        let at = CODE + if random.below(4) == 0 { 0xfc0 + random.below(64) } else { random.below(2048) };
        let code = a.assemble(at).expect("assembles");
        let registers: Vec<u64> = (0..16).map(|_| random.below(1 << 53).wrapping_mul(0x1_0001_0003)).collect();
        let base = DATA + if random.below(3) == 0 { 4096 - random.below(100) } else { random.below(3000) };
        let index = random.below(4);
        let data: Vec<u8> = (0..4096 + 256).map(|_| random.below(256) as u8).collect();
        for machine in [&mut blocks, &mut steps] {
            machine.write(at, &code);
            machine.write(DATA - 64, &data);
            machine.write(STACK - 256, &[0; 256]);
            machine.cpu.regs.gpr.copy_from_slice(&registers);
            machine.cpu.regs.gpr[4] = STACK;
            machine.cpu.regs.gpr[7] = base;
            machine.cpu.regs.gpr[6] = index;
            machine.cpu.regs.rip = at;
            machine.cpu.regs.rflags = 2 | (random.0 & 0x8d5);
            machine.cpu.halted = false;
        }
        steps.cpu.regs.rflags = blocks.cpu.regs.rflags;
        // The host wrote the code: tell the processors, as a backend's interrupt would.
        blocks.attention.raise(atoll_softcpu::Attention::DMA);
        steps.attention.raise(atoll_softcpu::Attention::DMA);
        let (a, b) = (blocks.cpu.retired(), steps.cpu.retired());
        blocks.run();
        while !steps.cpu.halted {
            let _ = steps.cpu.run(&mut steps.world, Some(1));
        }
        assert_eq!(outcome(&blocks), outcome(&steps), "program {number}");
        assert_eq!(blocks.cpu.retired() - a, steps.cpu.retired() - b, "program {number}");
    }
}
