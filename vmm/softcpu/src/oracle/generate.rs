//! Cases from numbers: a slot holds one to six instructions, and is run several times with other register contents.

use super::catalog::{Family, emulators_differ, encodings};
use super::layout::{BATCH, CODE, DATA_MAPPED, Memory, RUNS, SEQUENCE_MAX, SLOT, SLOTS, STACK, STACK_LEN, TAKEN};
use super::operands::{Frame, fill};
use super::random::Random;
use super::undefined::{ARITHMETIC, DF, flow, undefined_after};
use crate::{Features, FpState};
use iced_x86::code_asm::{CodeAssembler, qword_ptr, rsp};
use iced_x86::{Code, Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use std::collections::BTreeMap;

/// Registers, flags and patched memory at the start of a case.
#[derive(Clone)]
pub(super) struct Start {
    pub(super) gpr: [u64; 16],
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) fp: Option<Box<FpState>>,
    pub(super) patches: Vec<(u64, u64)>,
}

/// Instructions at a fixed address, and what is needed to run and judge them.
pub(super) struct Slot {
    pub(super) address: u64,
    pub(super) instructions: Vec<Instruction>,
    /// The instructions' bytes; whoever runs them puts its own end after them and at [`TAKEN`].
    pub(super) bytes: Vec<u8>,
    pub(super) pinned: BTreeMap<usize, u64>,
    pub(super) patches: Vec<(u64, u64)>,
    /// Flags undefined at the end, whatever CL was.
    pub(super) undefined: u64,
    pub(super) runs: Vec<Start>,
}

impl Slot {
    /// Whether an operand is so large that processors differ in the byte of it that a page fault names.
    pub(super) fn vague_fault_address(&self) -> bool {
        self.instructions.iter().any(|instruction| !matches!(instruction.memory_size().size(), 0..=10 | 16))
    }

    /// Whether the x87 stack may have been rotated: an MMX instruction that faults has or has not rotated it back.
    pub(super) fn may_rotate_before_fault(&self) -> bool {
        let loads = |mnemonic| matches!(mnemonic, Mnemonic::Fxrstor | Mnemonic::Fxrstor64);
        self.instructions.iter().any(|instruction| loads(instruction.mnemonic()))
    }

    /// Whether flags may be those of a part of an instruction that faults: AMD's processors keep what the last comparison of a
    /// repeated one has left, Intel's what was there before.
    pub(super) fn may_flag_before_fault(&self) -> bool {
        let repeated = |instruction: &Instruction| instruction.has_rep_prefix() || instruction.has_repne_prefix();
        self.instructions.iter().any(repeated)
    }

    /// Whether an instruction computes several results one from another.
    pub(super) fn has_dot_product(&self) -> bool {
        self.instructions.iter().any(|instruction| matches!(instruction.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd))
    }

    /// Whether an instruction stores several values, of which some may be in memory when it faults.
    pub(super) fn may_store_before_fault(&self) -> bool {
        self.instructions.iter().any(|instruction| instruction.mnemonic() == Mnemonic::Enter)
    }

    /// Flags that the two sides may disagree about after starting from `start` and ending at `rip`, which is that of an
    /// instruction if it faulted.
    pub(super) fn undefined(&self, start: &Start, rip: u64) -> u64 {
        match self.instructions.as_slice() {
            [only] if rip != only.ip() => undefined_after(only, Some(start.gpr[1] as u8)),
            all => match all.iter().position(|instruction| instruction.ip() == rip) {
                Some(faulting) => {
                    all[..faulting].iter().fold(0, |before, instruction| flow(before, instruction).unwrap_or(before))
                }
                None => self.undefined,
            },
        }
    }
}

/// The numbered cases of one family.
pub(super) struct Generator {
    seed: u64,
    stream: u64,
    family: Family,
    codes: Vec<Code>,
    /// One instruction a slot: what an emulator does otherwise must not spread.
    single: bool,
}

impl Generator {
    /// `portable` leaves out what an emulator need not get right to the bit.
    pub(super) fn new(seed: u64, family: Family, features: Features, portable: bool) -> Self {
        let mut codes = encodings(family, features);
        if portable {
            codes.retain(|code| !emulators_differ(code.mnemonic()));
        }
        assert!(!codes.is_empty(), "no encodings in the {} family", family.name());
        // Streams of random numbers: two a family.
        Self { seed, stream: 2 * family as u64, family, codes, single: portable }
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// How many encodings take part.
    pub(super) fn encodings(&self) -> usize {
        self.codes.len()
    }

    /// Memory at the start of every case of a batch.
    pub(super) fn memory(&self, batch: u64) -> Memory {
        let mut random = Random::new(self.seed, self.stream, batch);
        let floating = self.family.floating();
        let mut block = |len: u64| {
            let words = (0..len / 8).flat_map(|_| {
                if floating && random.one_in(2) { random.double() } else { random.integer() }.to_le_bytes()
            });
            words.collect()
        };
        Memory { data: block(DATA_MAPPED), stack: block(STACK_LEN) }
    }

    /// The slot that holds case number `case`.
    pub(super) fn slot(&self, case: u64) -> Slot {
        let number = case / RUNS;
        let mut random = Random::new(self.seed, self.stream + 1, number);
        let address = CODE + (case % BATCH) / RUNS * SLOT;
        debug_assert!(address < CODE + SLOTS * SLOT);
        let length = match random.below(4) {
            0 | 1 => 1,
            _ if self.single => 1,
            2 => 2 + random.below(2),
            _ => 3 + random.below(4),
        };
        let mut draft = Draft::new(address);
        let mut attempts = 0;
        while (draft.instructions.len() as u64) < length && attempts < 64 {
            attempts += 1;
            if self.family == Family::Integer && random.one_in(150) {
                draft.pop_flags(&mut random);
            } else {
                let code = *random.pick(&self.codes);
                draft.add(code, self.family, &mut random);
            }
            if draft.ended {
                break;
            }
        }
        let mut slot = Slot {
            address,
            undefined: draft.undefined,
            instructions: draft.instructions,
            bytes: draft.bytes,
            pinned: draft.frame.pinned,
            patches: draft.frame.patches,
            runs: Vec::new(),
        };
        slot.pinned.entry(4).or_insert(STACK + STACK_LEN / 2);
        slot.runs = (0..RUNS).map(|_| self.start(&slot, &mut random)).collect();
        slot
    }

    fn start(&self, slot: &Slot, random: &mut Random) -> Start {
        let mut gpr: [u64; 16] = std::array::from_fn(|_| random.integer());
        // Divisions that do not overflow are rare among random numbers.
        if slot.instructions.iter().any(|i| matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)) && random.one_in(2)
        {
            gpr[2] = if random.one_in(2) { 0 } else { ((gpr[0] as i64) >> 63) as u64 };
            gpr[0] &= 0xffff;
        }
        for (&index, &value) in &slot.pinned {
            gpr[index] = value;
        }
        let mut rflags = 0x202 | random.u64() & ARITHMETIC;
        if random.one_in(4) {
            rflags |= DF;
        }
        let fp = self.family.floating().then(|| Box::new(random_fp(self.family, random)));
        Start { gpr, rip: slot.address, rflags, fp, patches: slot.patches.clone() }
    }
}

fn random_fp(family: Family, random: &mut Random) -> FpState {
    let mut fp = FpState::default();
    for xmm in &mut fp.xmm {
        *xmm = match random.below(3) {
            0 => u128::from(random.integer()) | u128::from(random.integer()) << 64,
            _ => u128::from(random.double()) | u128::from(random.double()) << 64,
        };
    }
    // Flags, rounding, DAZ and FTZ are free; masks stay, because emulators do not raise #XM.
    fp.mxcsr = 0x1f80;
    if random.one_in(2) {
        fp.mxcsr |= (random.u64() as u32) & 0xe07f;
    }
    if family == Family::X87 {
        fp.fcw = 0x37f & !0xf00 | *random.pick(&[0u16, 0x200, 0x300]) | (random.below(4) as u16) << 10;
        fp.fsw = random.u64() as u16 & 0x7f00;
        // Mostly with room for one more: ST(7) is the physical register below the top.
        let top = fp.fsw >> 11 & 7;
        fp.ftw = match random.below(4) {
            0 => random.u64() as u8,
            1 => 0xff,
            _ => !(1 << (top.wrapping_sub(1) & 7)),
        };
    }
    for st in &mut fp.st {
        *st = if family == Family::X87 { extended(random) } else { u128::from(random.integer()) | 0xffff << 64 };
    }
    if family == Family::Vector && random.one_in(2) {
        fp.ftw = 0xff;
    }
    fp
}

/// An 80-bit number that the x87 supports: normal, zero, infinite, NaN or denormal.
fn extended(random: &mut Random) -> u128 {
    let sign = u128::from(random.below(2)) << 79;
    let (exponent, significand) = match random.below(12) {
        0 => (0, 0),
        1 => (0x7fff, 1 << 63),
        2 => (0x7fff, 1 << 63 | random.u64() >> 1 | 1),
        3 => (0, random.u64() >> 1),
        4 => (0x3fff, 1 << 63),
        5 => (random.below(0x7fff), 1 << 63 | random.u64()),
        6 => (0x3fff - 32 + random.below(64), 1 << 63 | random.u64() << random.below(63)),
        _ => (0x3fff - 70 + random.below(140), 1 << 63 | random.u64()),
    };
    let exponent = if exponent == 0 || significand >> 63 == 1 { exponent } else { 0x3fff };
    sign | u128::from(exponent) << 64 | u128::from(significand)
}

/// A slot in the making.
struct Draft {
    frame: Frame,
    instructions: Vec<Instruction>,
    bytes: Vec<u8>,
    address: u64,
    undefined: u64,
    ended: bool,
}

impl Draft {
    fn new(address: u64) -> Self {
        let frame = Frame {
            pinned: BTreeMap::new(),
            written: 0,
            patches: Vec::new(),
            unmasked: false,
            stored: false,
            taken: address + TAKEN,
        };
        Self { frame, instructions: Vec::new(), bytes: Vec::new(), address, undefined: 0, ended: false }
    }

    fn next(&self) -> u64 {
        self.address + self.bytes.len() as u64
    }

    fn add(&mut self, code: Code, family: Family, random: &mut Random) {
        let before = self.frame.clone();
        if self.try_add(code, family, random).is_none() {
            self.frame = before;
        }
    }

    fn try_add(&mut self, code: Code, family: Family, random: &mut Random) -> Option<()> {
        let instruction = fill(code, family, random, &mut self.frame)?;
        let mut encoder = Encoder::new(64);
        encoder.encode(&instruction, self.next()).ok()?;
        let mut bytes = encoder.take_buffer();
        let branch = instruction.flow_control() != FlowControl::Next;
        // (A longer instruction would move an operand relative to its end.)
        if !branch && !instruction.is_ip_rel_memory_operand() && bytes.len() < 14 && random.one_in(24) {
            // Segment overrides that 64-bit mode ignores, and GS, whose base is zero on both sides.
            bytes.insert(0, *random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x65]));
        }
        let decoded = decode(&bytes, self.next())?;
        self.commit(&decoded, &bytes)
    }

    /// Appends an instruction that fits, reads no undefined flag and addresses memory by registers known.
    fn commit(&mut self, instruction: &Instruction, bytes: &[u8]) -> Option<()> {
        if self.bytes.len() + bytes.len() > SEQUENCE_MAX as usize {
            return None;
        }
        let undefined = flow(self.undefined, instruction)?;
        // Processors differ in the instruction and data pointers that they keep: store them only while they are zero.
        if stores_x87_pointers(instruction) && self.instructions.iter().any(uses_x87) {
            return None;
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(instruction);
        let mut written = 0;
        for used in info.used_registers() {
            let register = used.register().full_register();
            if register.is_gpr64() {
                let read_only = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
                // PUSH and POP move RSP by little and leave it useful.
                let stack = register == Register::RSP && instruction.is_stack_instruction();
                written |= u16::from(!read_only && !stack) << register.number();
                if stack && self.frame.written >> 4 & 1 != 0 {
                    return None;
                }
            }
        }
        let reads = |access| matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
        self.frame.stored |=
            instruction.is_stack_instruction() || info.used_memory().iter().any(|used| !reads(used.access()));
        if instruction.mnemonic() == Mnemonic::Leave || instruction.mnemonic() == Mnemonic::Enter {
            written |= 1 << 4;
        }
        // An explicit destination RSP, even of POP.
        if instruction.op_count() > 0
            && instruction.op_kind(0) == OpKind::Register
            && instruction.op0_register().full_register() == Register::RSP
            && instruction.mnemonic() != Mnemonic::Push
        {
            written |= 1 << 4;
        }
        self.frame.written |= written;
        self.undefined = undefined;
        self.ended = instruction.flow_control() != FlowControl::Next;
        self.instructions.push(*instruction);
        self.bytes.extend_from_slice(bytes);
        Some(())
    }

    /// POPF of an image without the bits that would trap.
    fn pop_flags(&mut self, random: &mut Random) {
        if self.frame.written >> 4 & 1 != 0 {
            return;
        }
        let mut assemble = || {
            let mut a = CodeAssembler::new(64).ok()?;
            a.and(qword_ptr(rsp), 0x0020_0cd5).ok()?;
            if random.one_in(2) {
                a.popfq().ok()?;
            } else {
                a.popf().ok()?;
            }
            a.assemble(self.next()).ok()
        };
        let Some(bytes) = assemble() else { return };
        let top = *self.frame.pinned.entry(4).or_insert(STACK + STACK_LEN / 2);
        if !(STACK + 64..STACK + STACK_LEN - 64).contains(&top)
            || self.bytes.len() + bytes.len() > SEQUENCE_MAX as usize
        {
            return;
        }
        let first = decode(&bytes, self.next());
        if let Some(first) = first {
            let at = first.len();
            if let Some(second) = decode(&bytes[at..], self.next() + at as u64) {
                self.commit(&first, &bytes[..at]);
                self.commit(&second, &bytes[at..]);
            }
        }
    }
}

fn stores_x87_pointers(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Fnstenv | M::Fnsave | M::Fxsave | M::Fxsave64)
}

fn uses_x87(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    instruction.cpuid_features().iter().any(|feature| matches!(feature, F::FPU | F::FPU287 | F::FPU387 | F::FXSR))
}

/// The first instruction of `bytes`, if it is one.
pub(super) fn decode(bytes: &[u8], ip: u64) -> Option<Instruction> {
    let instruction = iced_x86::Decoder::with_ip(64, bytes, ip, iced_x86::DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}
