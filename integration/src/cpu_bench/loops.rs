//! The loops, as a compiler would write them: table-driven CRC, sieve, recursive Fibonacci, integer matrix product, and
//! [`wide`](super::wide), thousands of functions that are each called a few times.
//!
//! Every loop has two entries: `prepare`, which sets up its memory and is not timed, and `run`, which takes a count in RDI
//! and returns a checksum in RAX. Callee-saved registers are preserved.

use super::wide;
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, byte_ptr, dword_ptr, eax, ebx, ecx, edi, edx, esi, ptr, qword_ptr, r8, r8d, r9, r9d,
    r10, r10d, rax, rbx, rcx, rdi, rdx, rsi,
};

/// First byte of the loops' memory.
pub const DATA: u64 = 0x0100_0000;
/// Length of the loops' memory.
pub const DATA_LEN: u64 = 0x0040_0000;

/// One of the five.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// CRC-32 of 64 KiB by a table of 256 words.
    Crc,
    /// Sieve of Eratosthenes over 64 Ki flags.
    Sieve,
    /// Recursive Fibonacci: calls and returns.
    Fib,
    /// Product of two 64x64 matrices of 32-bit integers.
    Matmul,
    /// About 230,000 static instructions in some 4,600 functions.
    Wide,
}

impl Loop {
    /// All, in the order of the report.
    pub const ALL: [Self; 5] = [Self::Crc, Self::Sieve, Self::Fib, Self::Matmul, Self::Wide];

    /// Name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crc => "crc",
            Self::Sieve => "sieve",
            Self::Fib => "fib",
            Self::Matmul => "matmul",
            Self::Wide => "wide",
        }
    }

    /// Count that takes a few hundred million instructions; passes over cold code for [`Loop::Wide`].
    pub fn count(self) -> u64 {
        match self {
            Self::Crc => 1000,
            Self::Sieve => 1200,
            Self::Fib => 36,
            Self::Matmul => 250,
            Self::Wide => 1000,
        }
    }

    /// Least ratio to QEMU TCG that the software CPU must reach.
    pub fn threshold(self) -> f64 {
        match self {
            Self::Wide => 0.7,
            _ => 0.2,
        }
    }

    /// Ratio that it aims at.
    pub fn aim(self) -> f64 {
        match self {
            Self::Wide => 1.2,
            _ => 0.4,
        }
    }

    /// Assembles the loop behind what is in `a`, and sets the labels of its two entries.
    pub(super) fn assemble(
        self,
        a: &mut CodeAssembler,
        prepare: &mut CodeLabel,
        run: &mut CodeLabel,
    ) -> Result<(), IcedError> {
        a.set_label(prepare)?;
        match self {
            Self::Crc => prepare_crc(a)?,
            Self::Matmul => fill(a, DATA, 2 * 64 * 64)?,
            Self::Wide => fill(a, DATA, wide::DATA_WORDS)?,
            Self::Sieve | Self::Fib => a.ret()?,
        }
        match self {
            Self::Crc => crc(a, run),
            Self::Sieve => sieve(a, run),
            Self::Fib => fib(a, run),
            Self::Matmul => matmul(a, run),
            Self::Wide => wide::assemble(a, run),
        }
    }
}

/// Fills `words` 32-bit words at `address` from a linear congruential generator, and returns.
fn fill(a: &mut CodeAssembler, address: u64, words: u32) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.mov(edx, address as u32)?;
    a.mov(ecx, words)?;
    a.mov(eax, 12345)?;
    a.set_label(&mut next)?;
    a.imul_3(eax, eax, 1_103_515_245)?;
    a.add(eax, 12345)?;
    a.mov(dword_ptr(rdx), eax)?;
    a.add(rdx, 4)?;
    a.dec(ecx)?;
    a.jne(next)?;
    a.ret()
}

const CRC_TABLE: u64 = DATA;
const CRC_BUFFER: u64 = DATA + 0x1000;
const CRC_LEN: u32 = 0x1_0000;

fn prepare_crc(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut entry = a.create_label();
    let mut bit = a.create_label();
    let mut even = a.create_label();
    a.xor(ecx, ecx)?;
    a.set_label(&mut entry)?;
    a.mov(eax, ecx)?;
    a.mov(edx, 8)?;
    a.set_label(&mut bit)?;
    a.shr(eax, 1)?;
    a.jae(even)?;
    a.xor(eax, 0xedb8_8320_u32 as i32)?;
    a.set_label(&mut even)?;
    a.dec(edx)?;
    a.jne(bit)?;
    a.mov(dword_ptr(rcx * 4 + CRC_TABLE), eax)?;
    a.inc(ecx)?;
    a.cmp(ecx, 256)?;
    a.jne(entry)?;
    fill(a, CRC_BUFFER, CRC_LEN / 4)
}

fn crc(a: &mut CodeAssembler, run: &mut CodeLabel) -> Result<(), IcedError> {
    let mut pass = a.create_label();
    let mut byte = a.create_label();
    a.set_label(run)?;
    a.mov(eax, -1)?;
    a.mov(r9d, CRC_TABLE as u32)?;
    a.set_label(&mut pass)?;
    a.mov(esi, CRC_BUFFER as u32)?;
    a.lea(r8, ptr(rsi + u64::from(CRC_LEN)))?;
    a.set_label(&mut byte)?;
    a.movzx(edx, al)?;
    a.movzx(ecx, byte_ptr(rsi))?;
    a.xor(edx, ecx)?;
    a.shr(eax, 8)?;
    a.xor(eax, dword_ptr(r9 + rdx * 4))?;
    a.inc(rsi)?;
    a.cmp(rsi, r8)?;
    a.jne(byte)?;
    a.dec(rdi)?;
    a.jne(pass)?;
    a.ret()
}

fn sieve(a: &mut CodeAssembler, run: &mut CodeLabel) -> Result<(), IcedError> {
    const FLAGS: u64 = DATA;
    const SIZE: i32 = 0x1_0000;
    let [mut pass, mut clear, mut number, mut strike, mut composite] = std::array::from_fn(|_| a.create_label());
    a.set_label(run)?;
    a.xor(r10, r10)?;
    a.set_label(&mut pass)?;
    a.mov(edx, FLAGS as u32)?;
    a.lea(r8, ptr(rdx + SIZE))?;
    a.mov(rax, rdx)?;
    a.set_label(&mut clear)?;
    a.mov(qword_ptr(rax), 0x0101_0101)?;
    a.mov(dword_ptr(rax + 4), 0x0101_0101)?;
    a.add(rax, 8)?;
    a.cmp(rax, r8)?;
    a.jne(clear)?;
    a.mov(ecx, 2)?;
    a.set_label(&mut number)?;
    a.cmp(byte_ptr(rdx + rcx), 0)?;
    a.je(composite)?;
    a.inc(r10)?;
    a.lea(rax, ptr(rcx + rcx))?;
    a.cmp(rax, SIZE)?;
    a.jae(composite)?;
    a.set_label(&mut strike)?;
    a.mov(byte_ptr(rdx + rax), 0)?;
    a.add(rax, rcx)?;
    a.cmp(rax, SIZE)?;
    a.jb(strike)?;
    a.set_label(&mut composite)?;
    a.inc(rcx)?;
    a.cmp(rcx, SIZE)?;
    a.jne(number)?;
    a.dec(rdi)?;
    a.jne(pass)?;
    a.mov(rax, r10)?;
    a.ret()
}

fn fib(a: &mut CodeAssembler, run: &mut CodeLabel) -> Result<(), IcedError> {
    let mut small = a.create_label();
    a.set_label(run)?;
    a.cmp(edi, 2)?;
    a.jb(small)?;
    a.push(rbx)?;
    a.push(rdi)?;
    a.dec(edi)?;
    a.call(*run)?;
    a.mov(rbx, rax)?;
    a.pop(rdi)?;
    a.sub(edi, 2)?;
    a.call(*run)?;
    a.add(rax, rbx)?;
    a.pop(rbx)?;
    a.ret()?;
    a.set_label(&mut small)?;
    a.mov(eax, edi)?;
    a.ret()
}

fn matmul(a: &mut CodeAssembler, run: &mut CodeLabel) -> Result<(), IcedError> {
    const LEFT: u64 = DATA;
    const RIGHT: u64 = DATA + 64 * 64 * 4;
    const PRODUCT: u64 = DATA + 2 * 64 * 64 * 4;
    let [mut pass, mut row, mut column, mut term, mut sum] = std::array::from_fn(|_| a.create_label());
    a.set_label(run)?;
    a.push(rbx)?;
    a.set_label(&mut pass)?;
    a.mov(esi, LEFT as u32)?;
    a.mov(r10d, PRODUCT as u32)?;
    a.set_label(&mut row)?;
    a.xor(r9d, r9d)?;
    a.set_label(&mut column)?;
    a.lea(rdx, ptr(r9 * 4 + RIGHT))?;
    a.xor(eax, eax)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut term)?;
    a.mov(r8d, dword_ptr(rsi + rcx * 4))?;
    a.imul_2(r8d, dword_ptr(rdx))?;
    a.add(eax, r8d)?;
    a.add(rdx, 64 * 4)?;
    a.inc(rcx)?;
    a.cmp(rcx, 64)?;
    a.jne(term)?;
    a.mov(dword_ptr(r10), eax)?;
    a.add(r10, 4)?;
    a.inc(r9)?;
    a.cmp(r9, 64)?;
    a.jne(column)?;
    a.add(rsi, 64 * 4)?;
    a.cmp(rsi, RIGHT as i32)?;
    a.jne(row)?;
    // The next product starts from this one, or passes could be left out.
    a.mov(eax, dword_ptr(PRODUCT))?;
    a.xor(dword_ptr(LEFT), eax)?;
    a.dec(rdi)?;
    a.jne(pass)?;
    a.xor(eax, eax)?;
    a.mov(ecx, 64 * 64)?;
    a.mov(edx, PRODUCT as u32)?;
    a.set_label(&mut sum)?;
    a.mov(ebx, dword_ptr(rdx))?;
    a.add(rax, rbx)?;
    a.add(rdx, 4)?;
    a.dec(ecx)?;
    a.jne(sum)?;
    a.pop(rbx)?;
    a.ret()
}
