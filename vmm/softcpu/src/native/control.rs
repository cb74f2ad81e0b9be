//! Instructions that move x87 and SSE control state: plain code on [`FpState`](crate::state::FpState), behind the same
//! function type as thunks (SDM vol. 1, 8.1.8 to 8.1.10 and 10.5).

use super::{MemAccess, ThunkFn, Unit};
use crate::state::{FpState, Regs};
use iced_x86::{Code, Instruction, Mnemonic};

/// What [`find`] says about a control instruction.
pub(super) struct Control {
    pub(super) entry: ThunkFn,
    pub(super) mem: MemAccess,
    pub(super) mem_size: u16,
    pub(super) mem_align: u8,
    pub(super) unit: Unit,
    pub(super) waits: bool,
}

/// The function that implements `instruction`, if it is a control instruction.
pub(super) fn find(instruction: &Instruction) -> Option<Control> {
    use MemAccess::{None as Nothing, Read, Write};
    // Outside 64-bit mode XMM8 to XMM15 do not exist: FXSAVE leaves their place alone.
    let short = instruction.code_size() != iced_x86::CodeSize::Code64;
    let fxsr_size = if short { 160 + 8 * 16 } else { 160 + 16 * 16 };
    let (entry, mem, mem_size, unit): (ThunkFn, _, _, _) = match instruction.mnemonic() {
        Mnemonic::Ldmxcsr => (ldmxcsr, Read, 4, Unit::Sse),
        Mnemonic::Stmxcsr => (stmxcsr, Write, 4, Unit::Sse),
        Mnemonic::Fxsave if short => (fxsave::<32, 8>, Write, fxsr_size, Unit::Fxsr),
        Mnemonic::Fxsave => (fxsave::<32, 16>, Write, fxsr_size, Unit::Fxsr),
        Mnemonic::Fxsave64 => (fxsave::<64, 16>, Write, fxsr_size, Unit::Fxsr),
        Mnemonic::Fxrstor if short => (fxrstor::<32, 8>, Read, fxsr_size, Unit::Fxsr),
        Mnemonic::Fxrstor => (fxrstor::<32, 16>, Read, fxsr_size, Unit::Fxsr),
        Mnemonic::Fxrstor64 => (fxrstor::<64, 16>, Read, fxsr_size, Unit::Fxsr),
        Mnemonic::Fnstcw => (fnstcw, Write, 2, Unit::X87),
        Mnemonic::Fldcw => (fldcw, Read, 2, Unit::X87),
        Mnemonic::Fnstsw if instruction.code() == Code::Fnstsw_AX => (fnstsw_ax, Nothing, 0, Unit::X87),
        Mnemonic::Fnstsw => (fnstsw, Write, 2, Unit::X87),
        Mnemonic::Fnclex => (fnclex, Nothing, 0, Unit::X87),
        Mnemonic::Fninit => (fninit, Nothing, 0, Unit::X87),
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => (nothing, Nothing, 0, Unit::X87),
        Mnemonic::Wait => (fwait, Nothing, 0, Unit::Fwait),
        _ => match instruction.code() {
            Code::Fnstenv_m14byte => (fnstenv::<2>, Write, 14, Unit::X87),
            Code::Fnstenv_m28byte => (fnstenv::<4>, Write, 28, Unit::X87),
            Code::Fldenv_m14byte => (fldenv::<2>, Read, 14, Unit::X87),
            Code::Fldenv_m28byte => (fldenv::<4>, Read, 28, Unit::X87),
            Code::Fnsave_m94byte => (fnsave::<2>, Write, 94, Unit::X87),
            Code::Fnsave_m108byte => (fnsave::<4>, Write, 108, Unit::X87),
            Code::Frstor_m94byte => (frstor::<2>, Read, 94, Unit::X87),
            Code::Frstor_m108byte => (frstor::<4>, Read, 108, Unit::X87),
            _ => return None,
        },
    };
    let mem_align = if unit == Unit::Fxsr { 16 } else { 1 };
    let waits =
        matches!(instruction.mnemonic(), Mnemonic::Fldcw | Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Wait);
    Some(Control { entry, mem, mem_size, mem_align, unit, waits })
}

/// Exception summary and busy, which follow from flags and masks.
const SUMMARY: u16 = 0x8080;
const TOP: u16 = 0x3800;

impl FpState {
    fn top(&self) -> usize {
        usize::from((self.fsw & TOP) >> 11)
    }

    fn summarise(&mut self) {
        let pending = self.fsw & !self.fcw & 0x3f != 0;
        self.fsw = if pending { self.fsw | SUMMARY } else { self.fsw & !SUMMARY };
    }

    /// Whether an unmasked x87 exception waits for the next waiting instruction.
    pub(crate) fn pending(&self) -> bool {
        self.fsw & 0x80 != 0
    }

    /// Replaces the status word. Its TOP says which physical register is ST(0), and `st` is in stack order.
    fn set_status(&mut self, fsw: u16) {
        let old = self.top();
        self.fsw = fsw;
        let new = self.top();
        self.st.rotate_left((new + 8 - old) & 7);
    }

    fn initialise(&mut self) {
        self.fcw = 0x37f;
        self.set_status(0);
        self.ftw = 0;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
    }

    /// The full tag word: two bits for each physical register (0 valid, 1 zero, 2 special, 3 empty).
    fn full_tags(&self) -> u16 {
        (0..8).fold(0, |word, physical| {
            let tag = if self.ftw >> physical & 1 == 0 {
                3
            } else {
                let value = self.st[(physical + 8 - self.top()) & 7];
                let significand = value as u64;
                match (value >> 64) as u16 & 0x7fff {
                    0 if significand == 0 => 1,
                    0 | 0x7fff => 2,
                    _ if significand >> 63 == 0 => 2,
                    _ => 0,
                }
            };
            word | tag << (2 * physical)
        })
    }

    fn set_full_tags(&mut self, tags: u16) {
        self.ftw = (0..8).fold(0, |word, physical| {
            let empty = tags >> (2 * physical) & 3 == 3;
            word | u8::from(!empty) << physical
        });
    }
}

/// First half of an MMX instruction: TOP becomes 0, so that register MMi is ST(i), and all registers are in use.
///
/// # Safety
/// `regs` must point at the CPU's registers, with no other reference alive.
pub(super) unsafe extern "sysv64" fn enter_mmx(regs: *mut Regs) {
    // SAFETY: contract of this function.
    let fp = unsafe { &mut (*regs).fp };
    fp.set_status(fp.fsw & !TOP);
    fp.ftw = 0xff;
}

/// The memory operand of a control instruction: unaligned, in guest RAM or the caller's buffer.
///
/// # Safety
/// `mem` must be readable for `N` bytes.
unsafe fn load<const N: usize>(mem: *const u8, offset: usize) -> [u8; N] {
    // SAFETY: contract of this function, offset included by the callers' operand sizes.
    unsafe { mem.add(offset).cast::<[u8; N]>().read_unaligned() }
}

/// # Safety
/// `mem` must be writable for `offset + bytes.len()` bytes.
unsafe fn store(mem: *mut u8, offset: usize, bytes: &[u8]) {
    // SAFETY: contract of this function.
    unsafe { mem.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
}

macro_rules! control_instructions {
    ($($(#[$doc:meta])* fn $name:ident $(<$(const $generic:ident: usize),+>)? ($regs:ident, $mem:ident) $body:block)+) => {$(
        $(#[$doc])*
        unsafe extern "sysv64" fn $name $(<$(const $generic: usize),+>)? (regs: *mut Regs, $mem: *mut u8) -> u64 {
            // SAFETY: callers of a thunk pass the CPU's registers and an operand of the size that `find` gives.
            unsafe {
                let $regs = &mut *regs;
                let _ = $mem;
                $body
            }
        }
    )+};
}

control_instructions! {
    fn nothing(_regs, mem) { 0 }

    fn fwait(regs, mem) {
        if regs.fp.pending() { 16 } else { 0 }
    }

    fn ldmxcsr(regs, mem) {
        let value = u32::from_le_bytes(load(mem, 0));
        if value & !0xffff != 0 {
            return 13;
        }
        regs.fp.mxcsr = value;
        0
    }

    fn stmxcsr(regs, mem) {
        store(mem, 0, &regs.fp.mxcsr.to_le_bytes());
        0
    }

    fn fnstcw(regs, mem) {
        store(mem, 0, &regs.fp.fcw.to_le_bytes());
        0
    }

    fn fldcw(regs, mem) {
        if regs.fp.pending() {
            return 16;
        }
        regs.fp.fcw = control_word(u16::from_le_bytes(load(mem, 0)));
        regs.fp.summarise();
        0
    }

    fn fnstsw(regs, mem) {
        store(mem, 0, &regs.fp.fsw.to_le_bytes());
        0
    }

    fn fnstsw_ax(regs, mem) {
        regs.gpr[0] = regs.gpr[0] & !0xffff | u64::from(regs.fp.fsw);
        0
    }

    fn fnclex(regs, mem) {
        regs.fp.fsw &= 0x7f00;
        0
    }

    fn fninit(regs, mem) {
        regs.fp.initialise();
        0
    }

    /// Environment in the protected-mode format of words of `WORD` bytes. The selectors, which current processors have
    /// given up, are stored as zero.
    fn fnstenv<const WORD: usize>(regs, mem) {
        store_environment::<WORD>(&regs.fp, mem);
        regs.fp.fcw |= 0x3f;
        regs.fp.summarise();
        0
    }

    fn fldenv<const WORD: usize>(regs, mem) {
        if regs.fp.pending() {
            return 16;
        }
        load_environment::<WORD>(&mut regs.fp, mem);
        0
    }

    fn fnsave<const WORD: usize>(regs, mem) {
        store_environment::<WORD>(&regs.fp, mem);
        for (index, value) in regs.fp.st.iter().enumerate() {
            store(mem, 7 * WORD + 10 * index, &value.to_le_bytes()[..10]);
        }
        regs.fp.initialise();
        0
    }

    fn frstor<const WORD: usize>(regs, mem) {
        if regs.fp.pending() {
            return 16;
        }
        load_environment::<WORD>(&mut regs.fp, mem);
        for (index, value) in regs.fp.st.iter_mut().enumerate() {
            let mut bytes = [0; 16];
            bytes[..10].copy_from_slice(&load::<10>(mem, 7 * WORD + 10 * index));
            *value = u128::from_le_bytes(bytes);
        }
        0
    }

    /// FXSAVE with pointers of `WIDTH` bits and `XMMS` registers. Bytes from 464 on belong to software.
    fn fxsave<const WIDTH: usize, const XMMS: usize>(regs, mem) {
        let fp = &regs.fp;
        let mut header = [0; 32];
        header[0..2].copy_from_slice(&fp.fcw.to_le_bytes());
        header[2..4].copy_from_slice(&fp.fsw.to_le_bytes());
        header[4] = fp.ftw;
        header[6..8].copy_from_slice(&fp.fop.to_le_bytes());
        header[8..8 + WIDTH / 8].copy_from_slice(&fp.fip.to_le_bytes()[..WIDTH / 8]);
        header[16..16 + WIDTH / 8].copy_from_slice(&fp.fdp.to_le_bytes()[..WIDTH / 8]);
        header[24..28].copy_from_slice(&fp.mxcsr.to_le_bytes());
        header[28..32].copy_from_slice(&fp.mxcsr_mask.to_le_bytes());
        store(mem, 0, &header);
        for (index, value) in fp.st.iter().enumerate() {
            store(mem, 32 + 16 * index, &(value & ((1 << 80) - 1)).to_le_bytes());
        }
        for (index, value) in fp.xmm[..XMMS].iter().enumerate() {
            store(mem, 160 + 16 * index, &value.to_le_bytes());
        }
        0
    }

    fn fxrstor<const WIDTH: usize, const XMMS: usize>(regs, mem) {
        let fp = &mut regs.fp;
        let mxcsr = u32::from_le_bytes(load(mem, 24));
        if mxcsr & !0xffff != 0 {
            return 13;
        }
        fp.mxcsr = mxcsr;
        fp.fcw = control_word(u16::from_le_bytes(load(mem, 0)));
        fp.fsw = u16::from_le_bytes(load(mem, 2));
        fp.ftw = load::<1>(mem, 4)[0];
        fp.fop = u16::from_le_bytes(load(mem, 6)) & 0x7ff;
        let mask = if WIDTH == 64 { u64::MAX } else { u32::MAX.into() };
        fp.fip = u64::from_le_bytes(load(mem, 8)) & mask;
        fp.fdp = u64::from_le_bytes(load(mem, 16)) & mask;
        fp.summarise();
        for (index, value) in fp.st.iter_mut().enumerate() {
            *value = u128::from_le_bytes(load(mem, 32 + 16 * index)) & ((1 << 80) - 1);
        }
        for (index, value) in fp.xmm[..XMMS].iter_mut().enumerate() {
            *value = u128::from_le_bytes(load(mem, 160 + 16 * index));
        }
        0
    }
}

/// Bit 6 of the control word always reads as one, bits 7 and 13 to 15 as zero.
fn control_word(value: u16) -> u16 {
    value & 0x1f3f | 0x40
}

/// # Safety
/// `mem` must be writable for `7 * WORD` bytes.
unsafe fn store_environment<const WORD: usize>(fp: &FpState, mem: *mut u8) {
    let mut words = [0u32; 7];
    words[0] = 0xffff_0000 | u32::from(fp.fcw);
    words[1] = 0xffff_0000 | u32::from(fp.fsw);
    words[2] = 0xffff_0000 | u32::from(fp.full_tags());
    words[3] = fp.fip as u32;
    words[4] = u32::from(fp.fop) << 16;
    words[5] = fp.fdp as u32;
    words[6] = 0xffff_0000;
    for (index, word) in words.iter().enumerate() {
        // The 16-bit format has no opcode and keeps the low halves of the rest.
        let word = if WORD == 2 && index == 4 { 0 } else { *word };
        // SAFETY: contract of this function.
        unsafe { store(mem, WORD * index, &word.to_le_bytes()[..WORD]) };
    }
}

/// # Safety
/// `mem` must be readable for `7 * WORD` bytes.
unsafe fn load_environment<const WORD: usize>(fp: &mut FpState, mem: *const u8) {
    let word = |index: usize| {
        let mut bytes = [0; 4];
        for (at, byte) in bytes[..WORD].iter_mut().enumerate() {
            // SAFETY: contract of this function.
            *byte = unsafe { load::<1>(mem, WORD * index + at) }[0];
        }
        u32::from_le_bytes(bytes)
    };
    fp.fcw = control_word(word(0) as u16);
    fp.set_status(word(1) as u16);
    fp.fip = word(3).into();
    fp.fop = if WORD == 4 { (word(4) >> 16) as u16 & 0x7ff } else { 0 };
    fp.fdp = word(5).into();
    fp.set_full_tags(word(2) as u16);
    fp.summarise();
}
