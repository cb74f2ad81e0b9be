//! 32-bit code beside the host: the instructions that exist only outside 64-bit mode, and the everyday ones with 32-bit
//! and 16-bit operands, run on the host through Linux's 32-bit code segment and on the software CPU in protected mode.
//!
//! The 64-bit oracle cannot reach these encodings (AAA, BOUND, PUSHA, short INC, ARPL, …). Here each case is a handful of
//! bytes between two stubs, at the same low addresses on both sides; registers, defined flags, data and stack must agree.
#![allow(unsafe_code, reason = "runs generated machine code in this process")]

mod flat;

use atoll_softcpu::Attention;
use flat::Machine;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, RflagsBits};

/// Where everything lies, below 64 MiB so that the machine's RAM covers it.
const LOW: u32 = 0x0200_0000;
const LEN: usize = 0x6000;
const DATA: u32 = LOW + 0x1000;
const STACK_PAGE: u32 = LOW + 0x2000;
const STUB32: u32 = LOW + 0x3000;
const STUB64: u32 = LOW + 0x4000;
const SCRATCH_STACK: u32 = LOW + 0x5f00;
const PAGE: usize = 0x1000;
// Fields of the exchange page.
const FLAGS_IN: u32 = LOW + 0x20;
const OUT: u32 = LOW + 0x40;
const FLAGS_OUT: u32 = LOW + 0x60;
const HOST_RSP: u32 = LOW + 0x80;
const FAR_POINTER: u32 = LOW + 0x90;
/// Linux's code selectors for user space.
const USER32_CS: u16 = 0x23;
const USER64_CS: u16 = 0x33;

const CASES: u64 = 400_000;
const ARITHMETIC: u32 = 0x8d5;
const DF: u32 = 0x400;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }
    fn below(&mut self, bound: u32) -> u32 {
        self.next() % bound
    }
    /// Mostly numbers at the edges, where flags are decided.
    fn value(&mut self) -> u32 {
        match self.below(4) {
            0 => [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX]
                [self.below(11) as usize],
            1 => self.below(256),
            _ => self.next(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    gpr: [u32; 8],
    flags: u32,
    data: Vec<u8>,
    stack: Vec<u8>,
}

/// A register operand that is not ESP.
fn register(dice: &mut Dice) -> u8 {
    [0, 1, 2, 3, 5, 6, 7][dice.below(7) as usize]
}

/// ModRM with a register or a memory operand in the data page, by [disp32] or [esi + disp8].
fn operand(dice: &mut Dice, reg: u8, code: &mut Vec<u8>) {
    match dice.below(3) {
        0 => code.push(0xc0 | reg << 3 | register(dice)),
        1 => {
            code.push(reg << 3 | 5);
            code.extend((DATA + 0x100 + dice.below(64)).to_le_bytes());
        }
        _ => {
            code.push(0x40 | reg << 3 | 6);
            code.push(dice.below(128) as u8);
        }
    }
}

/// One instruction, with whatever its operands need put into the state.
fn case(dice: &mut Dice, start: &mut State) -> Vec<u8> {
    let mut code = Vec::new();
    let word = dice.below(4) == 0;
    if word {
        code.push(0x66);
    }
    let immediate = |dice: &mut Dice, code: &mut Vec<u8>| {
        let value = dice.value().to_le_bytes();
        code.extend(&value[..if word { 2 } else { 4 }]);
    };
    match dice.below(34) {
        0 => code.push([0x27, 0x2f, 0x37, 0x3f][dice.below(4) as usize]),
        1 => code.extend([0xd4, 1 + dice.below(255) as u8]),
        2 => code.extend([0xd5, dice.below(256) as u8]),
        3 => code.push([0x60, 0x61][dice.below(2) as usize]),
        4 => code.push(0x40 | (dice.below(2) as u8 * 8) | register(dice)),
        5 => code.push(0xd6),
        // BOUND within bounds: the lowest and the highest number of the width.
        6 => {
            let (low, high): (&[u8], &[u8]) =
                if word { (&[0, 0x80], &[0xff, 0x7f]) } else { (&[0, 0, 0, 0x80], &[0xff, 0xff, 0xff, 0x7f]) };
            start.data[0x200..0x200 + low.len()].copy_from_slice(low);
            start.data[0x200 + low.len()..0x200 + 2 * low.len()].copy_from_slice(high);
            code.extend([0x62, register(dice) << 3 | 5]);
            code.extend((DATA + 0x200).to_le_bytes());
        }
        7 => {
            code.clear();
            code.push(0x63);
            let reg = register(dice);
            operand(dice, reg, &mut code);
        }
        8 => {
            code.clear();
            start.flags &= !0x800;
            code.push(0xce);
        }
        // ALU, all forms.
        9..=13 => {
            let reg = register(dice);
            code.push(dice.below(8) as u8 * 8 + dice.below(4) as u8);
            operand(dice, reg, &mut code);
        }
        14 => {
            code.push(dice.below(8) as u8 * 8 + 5);
            immediate(dice, &mut code);
        }
        15 => {
            code.push([0x80, 0x82][dice.below(2) as usize]);
            let group = dice.below(8) as u8;
            operand(dice, group, &mut code);
            code.push(dice.value() as u8);
        }
        16 => {
            code.push(0x81);
            let group = dice.below(8) as u8;
            operand(dice, group, &mut code);
            immediate(dice, &mut code);
        }
        17 | 18 => {
            code.push([0xc0, 0xc1][dice.below(2) as usize]);
            let group = dice.below(8) as u8;
            operand(dice, group, &mut code);
            code.push(dice.below(40) as u8);
        }
        19 => {
            code.push([0xd0, 0xd1, 0xd2, 0xd3][dice.below(4) as usize]);
            let group = dice.below(8) as u8;
            operand(dice, group, &mut code);
        }
        // NOT, NEG, MUL, IMUL.
        20 => {
            code.push([0xf6, 0xf7][dice.below(2) as usize]);
            let group = 2 + dice.below(4) as u8;
            operand(dice, group, &mut code);
        }
        // Two-byte opcodes with an ordinary ModRM: CMOVcc, SETcc, MOVZX, MOVSX, IMUL, XADD, CMPXCHG, SHLD, SHRD, BSF, BSR.
        21..=23 => {
            let second = match dice.below(8) {
                0 => 0x40 + dice.below(16) as u8,
                1 => 0x90 + dice.below(16) as u8,
                2 => [0xb6, 0xb7, 0xbe, 0xbf][dice.below(4) as usize],
                3 => 0xaf,
                4 => [0xc0, 0xc1][dice.below(2) as usize],
                5 => [0xb0, 0xb1][dice.below(2) as usize],
                6 => {
                    // A count past 16 leaves a word undefined.
                    start.gpr[1] &= 15;
                    [0xa5, 0xad][dice.below(2) as usize]
                }
                _ => [0xbc, 0xbd][dice.below(2) as usize],
            };
            code.extend([0x0f, second]);
            let reg = register(dice);
            operand(dice, reg, &mut code);
        }
        // BT and its kin by an immediate: the bit offset stays within the operand.
        24 => {
            code.extend([0x0f, 0xba]);
            let group = 4 + dice.below(4) as u8;
            operand(dice, group, &mut code);
            code.push(dice.below(64) as u8);
        }
        25 => code.push(0x50 | (dice.below(2) as u8 * 8) | register(dice)),
        26 => {
            code.push(0x68);
            immediate(dice, &mut code);
        }
        27 => code.push([0x98, 0x99, 0x9e, 0x9f, 0xf5, 0xf8, 0xf9, 0xfc, 0xfd][dice.below(9) as usize]),
        28 => {
            code.clear();
            code.extend([0x0f, 0xc8 | register(dice)]);
        }
        // LEA with 16-bit addressing: every combination of bases.
        29 => {
            let reg = register(dice);
            let form = dice.below(2) as u8 + 1;
            code.extend([0x67, 0x8d, form << 6 | reg << 3 | dice.below(8) as u8]);
            let displacement = dice.value().to_le_bytes();
            code.extend(&displacement[..usize::from(form)]);
        }
        // String instructions, repeated or not.
        30 | 31 => {
            start.gpr[6] = DATA + 0x400 + dice.below(64);
            start.gpr[7] = DATA + 0x800 + dice.below(64);
            start.gpr[1] = dice.below(20);
            start.flags |= DF * dice.below(2);
            if dice.below(2) == 0 {
                code.push([0xf2, 0xf3][dice.below(2) as usize]);
            }
            code.push([0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf][dice.below(10) as usize]);
        }
        // XLAT, LOOP and JECXZ to the next instruction, ENTER, LEAVE.
        32 => {
            code.clear();
            match dice.below(4) {
                0 => {
                    start.gpr[3] = DATA + 0x100;
                    code.push(0xd7);
                }
                1 => code.extend([0xe0 + dice.below(4) as u8, 0]),
                2 => code.extend([0xc8, 8 + dice.below(32) as u8, 0, 0]),
                _ => {
                    start.gpr[5] = STACK_PAGE + 0x600;
                    code.push(0xc9);
                }
            }
        }
        _ => {
            let reg = register(dice);
            code.push([0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b][dice.below(8) as usize]);
            operand(dice, reg, &mut code);
        }
    }
    code
}

/// Flags that two processors may disagree about after the instruction.
fn undefined(instruction: &Instruction, start: &State) -> u32 {
    let mut bits = 0;
    for (iced, flag) in [
        (RflagsBits::OF, 0x800),
        (RflagsBits::SF, 0x80),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::AF, 0x10),
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
    ] {
        if instruction.rflags_undefined() & iced != 0 {
            bits |= flag;
        }
    }
    let shift = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Sal
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    if shift {
        let last = instruction.op_count() - 1;
        let count = instruction.try_immediate(last).map_or(start.gpr[1], |value| value as u32) & 31;
        let double = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
        bits |= 0x810;
        if count >= 8 || double && count >= 16 {
            bits |= 1;
        }
        if double && count > 16 {
            bits |= ARITHMETIC;
        }
    }
    bits
}

/// The host's side: one low mapping with both stubs.
struct Host;

impl Host {
    fn new() -> Self {
        // SAFETY: a fresh mapping at an address that is asked not to be taken; checked.
        let mapped = unsafe {
            libc::mmap(
                LOW as usize as *mut _,
                LEN,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(mapped as usize, LOW as usize, "the low mapping is taken");
        let mut host = Self;
        // push rbx rbp r12..r15; mov [HOST_RSP], rsp; mov eax, 0x2b; mov ds, eax; mov es, eax; jmp far [FAR_POINTER]
        let mut entry = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x89, 0x24, 0x25];
        entry.extend(HOST_RSP.to_le_bytes());
        entry.extend([0xb8, 0x2b, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0xff, 0x2c, 0x25]);
        entry.extend(FAR_POINTER.to_le_bytes());
        // mov rsp, [HOST_RSP]; xor eax, eax; mov ds, eax; mov es, eax; cld; pops; ret
        let leave_at = STUB64 + entry.len() as u32;
        entry.extend([0x48, 0x8b, 0x24, 0x25]);
        entry.extend(HOST_RSP.to_le_bytes());
        entry.extend([0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0xfc]);
        entry.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        host.put(STUB64, &entry);
        let mut far = STUB32.to_le_bytes().to_vec();
        far.extend(USER32_CS.to_le_bytes());
        host.put(FAR_POINTER, &far);
        host.put(LOW + 0xa0, &leave_at.to_le_bytes());
        host
    }

    fn put(&mut self, at: u32, bytes: &[u8]) {
        assert!(at >= LOW && (at - LOW) as usize + bytes.len() <= LEN);
        // SAFETY: within the mapping that `new` made.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as usize as *mut u8, bytes.len()) };
    }

    fn get(&self, at: u32, len: usize) -> Vec<u8> {
        assert!(at >= LOW && (at - LOW) as usize + len <= LEN);
        // SAFETY: within the mapping; nothing writes while the slice is copied.
        unsafe { std::slice::from_raw_parts(at as usize as *const u8, len) }.to_vec()
    }

    fn run(&mut self, code: &[u8], start: &State) -> State {
        let mut stub = vec![0xbc];
        stub.extend(SCRATCH_STACK.to_le_bytes());
        // push [FLAGS_IN]; popfd
        stub.extend([0xff, 0x35]);
        stub.extend(FLAGS_IN.to_le_bytes());
        stub.push(0x9d);
        for register in 0..8_u8 {
            stub.extend([0x8b, register << 3 | 5]);
            stub.extend((LOW + 4 * u32::from(register)).to_le_bytes());
        }
        stub.extend(code);
        for register in 0..8_u8 {
            stub.extend([0x89, register << 3 | 5]);
            stub.extend((OUT + 4 * u32::from(register)).to_le_bytes());
        }
        stub.push(0xbc);
        stub.extend(SCRATCH_STACK.to_le_bytes());
        // pushfd; pop [FLAGS_OUT]; jmp far back
        stub.extend([0x9c, 0x8f, 0x05]);
        stub.extend(FLAGS_OUT.to_le_bytes());
        stub.push(0xea);
        stub.extend(self.get(LOW + 0xa0, 4));
        stub.extend(USER64_CS.to_le_bytes());
        self.put(STUB32, &stub);
        for (index, value) in start.gpr.iter().enumerate() {
            self.put(LOW + 4 * index as u32, &value.to_le_bytes());
        }
        self.put(FLAGS_IN, &(start.flags | 0x202).to_le_bytes());
        self.put(DATA, &start.data);
        self.put(STACK_PAGE, &start.stack);
        // SAFETY: the stub saves what the calling convention asks for, touches the mapping alone and returns.
        unsafe {
            let enter: extern "sysv64" fn() = std::mem::transmute(STUB64 as usize);
            enter();
        }
        let word = |at: u32| u32::from_le_bytes(self.get(at, 4).try_into().expect("four bytes"));
        State {
            gpr: std::array::from_fn(|index| word(OUT + 4 * index as u32)),
            flags: word(FLAGS_OUT) & (ARITHMETIC | DF),
            data: self.get(DATA, PAGE),
            stack: self.get(STACK_PAGE, PAGE),
        }
    }
}

fn soft(machine: &mut Machine, code: &[u8], start: &State) -> State {
    let mut program = code.to_vec();
    program.push(0xf4);
    machine.write(STUB32.into(), &program);
    // As a backend would overwrite it.
    machine.attention.raise(Attention::DMA);
    machine.write(DATA.into(), &start.data);
    machine.write(STACK_PAGE.into(), &start.stack);
    for (to, from) in machine.cpu.regs.gpr.iter_mut().zip(start.gpr) {
        *to = u64::from(from);
    }
    machine.cpu.regs.rflags = u64::from(start.flags | 2);
    machine.cpu.regs.rip = STUB32.into();
    machine.cpu.halted = false;
    machine.run();
    State {
        gpr: std::array::from_fn(|index| machine.gpr(index) as u32),
        flags: machine.cpu.regs.rflags as u32 & (ARITHMETIC | DF),
        data: machine.read(DATA.into(), PAGE),
        stack: machine.read(STACK_PAGE.into(), PAGE),
    }
}

#[test]
fn thirty_two_bit_code_agrees_with_the_host() {
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut host = Host::new();
    let mut machine = Machine::new();
    machine.protected_mode();
    let mut seen = std::collections::BTreeSet::new();
    for number in 0..CASES {
        let mut start = State {
            gpr: std::array::from_fn(|_| dice.value()),
            flags: dice.next() & ARITHMETIC,
            data: vec![0; PAGE],
            stack: vec![0; PAGE],
        };
        for chunk in start.data[0x80..0x280].chunks_exact_mut(4) {
            chunk.copy_from_slice(&dice.value().to_le_bytes());
        }
        for chunk in start.data[0x400..0x900].chunks_exact_mut(64) {
            chunk.fill(dice.below(3) as u8);
        }
        start.gpr[4] = STACK_PAGE + 0x400 + 4 * dice.below(64);
        start.gpr[6] = DATA + 0x100;
        let code = case(&mut dice, &mut start);
        let instruction = Decoder::with_ip(32, &code, STUB32.into(), DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid() || code.contains(&0xd6) || code.contains(&0x82), "{code:02x?}");
        seen.insert(format!("{:?}", instruction.mnemonic()));
        let (mut native, mut ours) = (host.run(&code, &start), soft(&mut machine, &code, &start));
        let mask = !undefined(&instruction, &start);
        native.flags &= mask;
        ours.flags &= mask;
        if native != ours {
            let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
            panic!(
                "case {number}: {instruction} {code:02x?}\nstart {:08x?} flags {:x}\nhost  {:08x?} flags {:x}\nsoft  {:08x?} flags {:x}\ndata differs at {:x?}, stack at {:x?}",
                start.gpr,
                start.flags,
                native.gpr,
                native.flags,
                ours.gpr,
                ours.flags,
                differ(&native.data, &ours.data),
                differ(&native.stack, &ours.stack)
            );
        }
    }
    assert!(seen.len() > 90, "only {} mnemonics were tried: {seen:?}", seen.len());
}
