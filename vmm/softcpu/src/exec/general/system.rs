//! System instructions: operands are found here, meaning is given by the system half of the crate.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::arith::{ZF, mask};
use super::operand::Place;
use super::{Done, Flow};
use crate::cpu::Cpu;
use crate::exec::Mode;
use crate::interrupt::SoftwareInterrupt;
use crate::segment::OperandSize;
use crate::state::{Exception, SegmentName, Table};
use crate::world::World;

impl Cpu {
    /// MOV to and from control and debug registers.
    pub(super) fn mov_system(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let (target, source) = (insn.op0_register(), insn.op1_register());
        let number = |register: Register, first: Register| (register as u32 - first as u32) as u8;
        if source.is_cr() {
            let value = self.read_cr(world, number(source, Register::CR0))?;
            self.set_register(target, value);
            return Ok(Flow::Next);
        }
        if target.is_cr() {
            let value = self.register(source);
            self.write_cr(world, number(target, Register::CR0), value)?;
            return Ok(Flow::Boundary);
        }
        if source.is_dr() {
            let value = self.read_dr(number(source, Register::DR0))?;
            self.set_register(target, value);
            return Ok(Flow::Next);
        }
        if target.is_dr() {
            let value = self.register(source);
            self.write_dr(number(target, Register::DR0), value)?;
            return Ok(Flow::Boundary);
        }
        Err(Exception::ud())
    }

    /// The instruction if it is one of the system's, `None` otherwise.
    pub(super) fn system_instruction(&mut self, world: &mut dyn World, insn: &Instruction) -> Option<Done> {
        use Mnemonic as M;
        Some(match insn.mnemonic() {
            M::In => self.port_in(world, insn),
            M::Out => self.port_out(world, insn),
            M::Cli => self.cli().map(|()| Flow::Next),
            M::Sti => self.sti().map(|()| Flow::Boundary),
            M::Hlt => self.halt(),
            M::Cpuid => {
                self.cpuid(world);
                Ok(Flow::Next)
            }
            M::Vmcall | M::Vmmcall => {
                self.hypercall();
                Ok(Flow::Next)
            }
            M::Rdtsc => self.rdtsc(world).map(|()| Flow::Next),
            M::Rdtscp => self.rdtscp(world).map(|()| Flow::Next),
            M::Rdpmc => self.rdpmc().map(|()| Flow::Next),
            M::Rdmsr => self.rdmsr(world).map(|()| Flow::Boundary),
            M::Wrmsr => self.wrmsr(world).map(|()| Flow::Boundary),
            M::Syscall => self.syscall().map(|()| Flow::Boundary),
            M::Sysret | M::Sysretq => {
                let size = if insn.code() == Code::Sysretq { OperandSize::Qword } else { OperandSize::Dword };
                self.sysret(size).map(|()| Flow::Boundary)
            }
            M::Sysenter => self.sysenter().map(|()| Flow::Boundary),
            M::Sysexit | M::Sysexitq => self.sysexit().map(|()| Flow::Boundary),
            M::Swapgs => self.swapgs().map(|()| Flow::Next),
            M::Iret | M::Iretd | M::Iretq => {
                let size = match insn.code() {
                    Code::Iretw => OperandSize::Word,
                    Code::Iretd => OperandSize::Dword,
                    _ => OperandSize::Qword,
                };
                let returned = self.iret(world, size);
                // The handler is over, whether the return succeeded or not (SDM vol. 3, 6.7.1).
                self.nmi.masked = false;
                returned.map(|()| Flow::Boundary)
            }
            M::Retf => {
                let extra = if insn.op_count() == 1 { insn.immediate16() } else { 0 };
                let size = match insn.code() {
                    Code::Retfw | Code::Retfw_imm16 => OperandSize::Word,
                    Code::Retfd | Code::Retfd_imm16 => OperandSize::Dword,
                    _ => OperandSize::Qword,
                };
                self.far_return(world, size, extra).map(|()| Flow::Boundary)
            }
            M::Int => {
                let vector = insn.immediate8();
                self.software_interrupt(world, vector, SoftwareInterrupt::IntN).map(|()| Flow::Boundary)
            }
            M::Int3 => self.software_interrupt(world, 3, SoftwareInterrupt::Int3).map(|()| Flow::Boundary),
            M::Int1 => self.software_interrupt(world, 1, SoftwareInterrupt::Int1).map(|()| Flow::Boundary),
            M::Into => {
                if self.regs.rflags & super::arith::OF == 0 {
                    Ok(Flow::Next)
                } else {
                    self.software_interrupt(world, 4, SoftwareInterrupt::Into).map(|()| Flow::Boundary)
                }
            }
            M::Bound => self.bound(world, insn),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => self.load_far_pointer(world, insn),
            M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => self.table(world, insn),
            M::Lldt | M::Ltr => {
                let selector = match self.operand(world, insn, 0, 2) {
                    Ok(value) => value as u16,
                    Err(fault) => return Some(Err(fault)),
                };
                let loaded =
                    if insn.mnemonic() == M::Lldt { self.lldt(world, selector) } else { self.ltr(world, selector) };
                loaded.map(|()| Flow::Boundary)
            }
            M::Sldt | M::Str => self.store_selector(world, insn),
            M::Clts => self.clts().map(|()| Flow::Boundary),
            M::Lmsw => self.load_machine_word(world, insn),
            M::Smsw => self.store_machine_word(world, insn),
            M::Invlpg => {
                let (segment, offset) = self.effective_address(insn);
                let base = match (self.exec.mode, segment) {
                    (Mode::Bits64, SegmentName::Fs | SegmentName::Gs) => self.sys.segments[segment as usize].base,
                    (Mode::Bits64, _) => 0,
                    _ => self.sys.segments[segment as usize].base,
                };
                self.invlpg(offset.wrapping_add(base)).map(|()| Flow::Boundary)
            }
            M::Wbinvd | M::Invd | M::Wbnoinvd => self.wbinvd_check().map(|()| Flow::Next),
            M::Lar | M::Lsl => self.descriptor_query(world, insn),
            M::Verr | M::Verw => self.descriptor_check(world, insn),
            M::Arpl => self.arpl(world, insn),
            _ => return None,
        })
    }

    fn halt(&mut self) -> Done {
        self.hlt_check()?;
        self.halted = true;
        Ok(Flow::Boundary)
    }

    /// Port number of operand `n`: an immediate byte or DX.
    fn port(&self, insn: &Instruction, n: u32) -> u16 {
        match insn.op_kind(n) {
            OpKind::Register => self.regs.gpr[2] as u16,
            _ => insn.immediate(n) as u16 & 0xff,
        }
    }
    fn port_in(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let port = self.port(insn, 1);
        self.check_io(world, port, size)?;
        let mut bytes = [0; 8];
        world.pio_in(port, &mut bytes[..size as usize]);
        self.set_register(insn.op0_register(), u64::from_le_bytes(bytes));
        Ok(Flow::Boundary)
    }
    fn port_out(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 1);
        let port = self.port(insn, 0);
        self.check_io(world, port, size)?;
        let value = self.register(insn.op1_register());
        world.pio_out(port, &value.to_le_bytes()[..size as usize]);
        Ok(Flow::Boundary)
    }

    /// LDS, LES, LFS, LGS, LSS.
    fn load_far_pointer(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = insn.op0_register().size() as u32;
        let (offset, selector) = self.far_pointer(world, insn, size)?;
        let name = match insn.mnemonic() {
            Mnemonic::Lds => SegmentName::Ds,
            Mnemonic::Les => SegmentName::Es,
            Mnemonic::Lfs => SegmentName::Fs,
            Mnemonic::Lgs => SegmentName::Gs,
            _ => SegmentName::Ss,
        };
        self.load_segment(world, name, selector)?;
        self.set_register(insn.op0_register(), offset);
        Ok(Flow::Boundary)
    }

    /// LGDT, LIDT, SGDT, SIDT: limit of two bytes, base of four (three with 16-bit operands) or eight.
    fn table(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let wide = self.exec.mode == Mode::Bits64;
        let base_size = if wide { 8 } else { 4 };
        let short = matches!(
            insn.code(),
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16
        );
        let store = matches!(insn.mnemonic(), Mnemonic::Sgdt | Mnemonic::Sidt);
        let place = self.operand_place(insn, 0, base_size + 2, store)?;
        let Place::Mem { linear, stack } = place else { return Err(Exception::ud()) };
        let at_base = linear.wrapping_add(2);
        if store {
            let table = if insn.mnemonic() == Mnemonic::Sgdt { self.sys.gdtr } else { self.sys.idtr };
            self.store_value(world, linear, 2, u64::from(table.limit), stack)?;
            self.store_value(world, at_base, base_size, table.base & mask(base_size), stack)?;
            return Ok(Flow::Next);
        }
        self.require_cpl0()?;
        let limit = self.load_value(world, linear, 2, stack)? as u16;
        let mut base = self.load_value(world, at_base, base_size, stack)?;
        if short {
            base &= 0xff_ffff;
        }
        let table = Table { base, limit };
        if insn.mnemonic() == Mnemonic::Lgdt {
            self.lgdt(table)?;
        } else {
            self.lidt(table)?;
        }
        Ok(Flow::Boundary)
    }

    /// SLDT and STR: 16 bits to memory, zero-extended to a register.
    fn store_selector(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if !self.has_selectors() {
            return Err(Exception::ud());
        }
        let selector = if insn.mnemonic() == Mnemonic::Sldt { self.sys.ldtr.selector } else { self.sys.tr.selector };
        let size = Self::operand_size(insn, 0);
        let place = self.operand_place(insn, 0, size, true)?;
        self.put_place(world, place, size, u64::from(selector))?;
        Ok(Flow::Next)
    }
    fn load_machine_word(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let value = self.operand(world, insn, 0, 2)?;
        self.lmsw(value as u16)?;
        Ok(Flow::Boundary)
    }
    fn store_machine_word(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let value = self.smsw();
        let size = Self::operand_size(insn, 0);
        let place = self.operand_place(insn, 0, size, true)?;
        self.put_place(world, place, size, value & mask(size))?;
        Ok(Flow::Next)
    }

    /// LAR and LSL.
    fn descriptor_query(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if !self.has_selectors() {
            return Err(Exception::ud());
        }
        let selector = self.operand(world, insn, 1, 2)? as u16;
        let answer =
            if insn.mnemonic() == Mnemonic::Lar { self.lar(world, selector)? } else { self.lsl(world, selector)? };
        match answer {
            Some(value) => {
                self.set_register(insn.op0_register(), u64::from(value));
                self.regs.rflags |= ZF;
            }
            None => self.regs.rflags &= !ZF,
        }
        Ok(Flow::Next)
    }
    /// VERR and VERW.
    fn descriptor_check(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if !self.has_selectors() {
            return Err(Exception::ud());
        }
        let selector = self.operand(world, insn, 0, 2)? as u16;
        let good =
            if insn.mnemonic() == Mnemonic::Verr { self.verr(world, selector)? } else { self.verw(world, selector)? };
        if good {
            self.regs.rflags |= ZF;
        } else {
            self.regs.rflags &= !ZF;
        }
        Ok(Flow::Next)
    }
    /// ARPL.
    fn arpl(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if !self.has_selectors() {
            return Err(Exception::ud());
        }
        let source = self.register(insn.op1_register()) & 3;
        let place = self.operand_place(insn, 0, 2, true)?;
        let mut lower = false;
        self.modify(world, place, 2, false, &mut |value| {
            lower = value & 3 < source;
            lower.then_some((value & !3) | source)
        })?;
        if lower {
            self.regs.rflags |= ZF;
        } else {
            self.regs.rflags &= !ZF;
        }
        Ok(Flow::Next)
    }
    /// Protected mode and not virtual-8086 mode.
    fn has_selectors(&self) -> bool {
        self.protected_mode() && self.regs.rflags & (1 << 17) == 0
    }
}
