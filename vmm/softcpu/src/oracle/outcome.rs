//! What a case leaves behind, in a form that both sides and another process can produce.

use crate::FpState;
use std::fmt::Write as _;

/// A fault that ended a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) vector: u8,
    pub(super) error: u32,
    /// Linear address of a page fault, else zero.
    pub(super) cr2: u64,
}

/// State after a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) gpr: [u64; 16],
    /// Address of the end that was reached, or of the instruction that faulted.
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) fault: Option<Fault>,
    pub(super) fp: Option<Box<FpState>>,
}

impl Outcome {
    /// Puts what the two sides may disagree about into one form: undefined flags, RF, and of the x87 what is not
    /// architectural in FXSAVE's image (pointers that only some processors keep, reserved bytes).
    pub(super) fn normalise(&mut self, undefined: u64) {
        const RESUME: u64 = 1 << 16;
        self.rflags &= !(undefined | RESUME);
        // Host kernels say "present" of any address that is not the program's.
        if let Some(fault) = self.fault.as_mut().filter(|fault| fault.cr2 >= 0x7fff_ffff_f000) {
            fault.error |= 1;
        }
        let unmasked_simd = self.fault.is_some_and(|fault| fault.vector == 19);
        if let Some(fp) = &mut self.fp {
            // With an unmasked overflow or underflow, the precision flag tells of a rounding without bound on the
            // exponent, which only hardware knows.
            if unmasked_simd && fp.mxcsr & 0x18 != 0 {
                fp.mxcsr &= !0x20;
            }
            fp.fop = 0;
            fp.fip = 0;
            fp.fdp = 0;
            fp.reserved0 = 0;
            fp.mxcsr_mask = 0xffff;
            fp.reserved1 = [0; 12];
            for st in &mut fp.st {
                *st &= (1 << 80) - 1;
            }
        }
    }

    /// The differences in words, one a line.
    pub(super) fn difference(&self, other: &Self, names: [&str; 2]) -> String {
        const GPR: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
            "r15",
        ];
        let mut text = String::new();
        let [a, b] = names;
        let mut line = |name: &str, left: String, right: String| {
            if left != right {
                let _ = writeln!(text, "  {name:6} {a} {left}  {b} {right}");
            }
        };
        for (index, name) in GPR.iter().enumerate() {
            line(name, format!("{:016x}", self.gpr[index]), format!("{:016x}", other.gpr[index]));
        }
        line("rip", format!("{:x}", self.rip), format!("{:x}", other.rip));
        line("rflags", flags(self.rflags), flags(other.rflags));
        line("fault", format!("{:x?}", self.fault), format!("{:x?}", other.fault));
        if let (Some(left), Some(right)) = (&self.fp, &other.fp) {
            line("fcw", format!("{:04x}", left.fcw), format!("{:04x}", right.fcw));
            line("fsw", format!("{:04x}", left.fsw), format!("{:04x}", right.fsw));
            line("ftw", format!("{:02x}", left.ftw), format!("{:02x}", right.ftw));
            line("mxcsr", format!("{:04x}", left.mxcsr), format!("{:04x}", right.mxcsr));
            for n in 0..8 {
                line(&format!("st{n}"), format!("{:020x}", left.st[n]), format!("{:020x}", right.st[n]));
            }
            for n in 0..16 {
                line(&format!("xmm{n}"), format!("{:032x}", left.xmm[n]), format!("{:032x}", right.xmm[n]));
            }
        }
        text
    }
}

/// Flags by letter.
pub(super) fn flags(value: u64) -> String {
    let names = [(0x800, 'O'), (0x400, 'D'), (0x200, 'I'), (0x80, 'S'), (0x40, 'Z'), (0x10, 'A'), (4, 'P'), (1, 'C')];
    let letters: String = names.iter().map(|&(bit, letter)| if value & bit != 0 { letter } else { '-' }).collect();
    format!("{value:06x} {letters}")
}
