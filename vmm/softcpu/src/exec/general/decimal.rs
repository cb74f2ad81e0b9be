//! Decimal adjustment, BOUND's siblings of the 8086: legacy modes only.

use iced_x86::{Instruction, Mnemonic, Register};

use super::arith::{AF, ARITH, CF, szp};
use super::{Done, Flow};
use crate::cpu::Cpu;
use crate::state::Exception;

impl Cpu {
    /// AAA, AAS, AAM, AAD, DAA, DAS.
    pub(super) fn decimal(&mut self, insn: &Instruction) -> Done {
        let flags = self.regs.rflags;
        let ax = self.regs.gpr[0] & 0xffff;
        let (al, ah) = (ax & 0xff, ax >> 8);
        let half = al & 0xf > 9 || flags & AF != 0;
        match insn.mnemonic() {
            Mnemonic::Aaa | Mnemonic::Aas => {
                let add = insn.mnemonic() == Mnemonic::Aaa;
                let adjusted = match (half, add) {
                    (false, _) => ax,
                    (true, true) => ax.wrapping_add(0x106),
                    (true, false) => ax.wrapping_sub(0x106),
                };
                let result = adjusted & 0xff0f;
                self.set_register(Register::AX, result);
                let out = if half { AF | CF } else { 0 };
                self.regs.rflags = (flags & !ARITH) | out | szp(result & 0xff, 1);
            }
            Mnemonic::Aam => {
                let base = insn.immediate(0) & 0xff;
                if base == 0 {
                    return Err(Exception::plain(0));
                }
                self.set_register(Register::AX, ((al / base) << 8) | (al % base));
                self.regs.rflags = (flags & !ARITH) | szp(al % base, 1);
            }
            Mnemonic::Aad => {
                let result = al.wrapping_add(ah.wrapping_mul(insn.immediate(0) & 0xff)) & 0xff;
                self.set_register(Register::AX, result);
                self.regs.rflags = (flags & !ARITH) | szp(result, 1);
            }
            other => {
                let full = al > 0x99 || flags & CF != 0;
                let correction = if half { 6 } else { 0 } + if full { 0x60 } else { 0 };
                let subtract = other == Mnemonic::Das;
                let result = if subtract { al.wrapping_sub(correction) } else { al.wrapping_add(correction) } & 0xff;
                // DAS also borrows when the low digit's correction goes below zero.
                let carry = full || (subtract && half && al < 6);
                let out = if half { AF } else { 0 } | if carry { CF } else { 0 };
                self.set_register(Register::AL, result);
                self.regs.rflags = (flags & !ARITH) | out | szp(result, 1);
            }
        }
        Ok(Flow::Next)
    }
}
