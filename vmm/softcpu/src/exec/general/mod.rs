//! The complete instruction set, one instruction at a time, from iced-x86's decoded form.
//!
//! Every instruction in every mode has its meaning here; the specialised handlers of the sibling module are faster
//! copies of the commonest ones and fall back to this for anything out of the ordinary (a page crossing, MMIO, a store
//! into code). An instruction changes architectural state only when nothing can fault any more, so that a fault leaves
//! it restartable.

pub(crate) mod arith;
mod atomic;
mod bits;
mod control;
mod decimal;
mod integer;
mod operand;
mod stack;
mod strings;
mod system;
mod thunk;

use iced_x86::{Instruction, Mnemonic};

pub(crate) use control::is_canonical;
pub(crate) use integer::condition_of;
pub(crate) use operand::{segment_name, slot, stack_fault};
pub(crate) use thunk::ThunkCall;

use crate::cpu::Cpu;
use crate::segment::OperandSize;
use crate::state::Exception;
use crate::world::World;

/// What follows an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next one.
    Next,
    /// `regs.rip` has been set; mode and privilege are as before.
    Jump,
    /// Anything may have changed: look at everything again.
    Boundary,
    /// A string instruction has done a part: it runs again (after interrupts), and has not retired.
    Again,
}

/// What an instruction returns.
pub(crate) type Done = Result<Flow, Exception>;

impl Cpu {
    /// Executes one decoded instruction. `regs.rip` is at the next one; on an error the caller puts it back.
    pub(crate) fn execute(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        use Mnemonic as M;
        match insn.mnemonic() {
            M::Mov => self.mov(world, insn),
            M::Add | M::Adc | M::Sub | M::Sbb | M::Cmp | M::And | M::Or | M::Xor | M::Test => self.alu(world, insn),
            M::Inc | M::Dec | M::Not | M::Neg => self.unary(world, insn),
            M::Lea => self.lea(insn),
            M::Movzx | M::Movsx | M::Movsxd => self.extend(world, insn),
            M::Xchg => self.xchg(world, insn),
            M::Xadd => self.xadd(world, insn),
            M::Cmpxchg => self.cmpxchg(world, insn),
            M::Cmpxchg8b => self.cmpxchg8b(world, insn),
            M::Cmpxchg16b => self.cmpxchg16b(world, insn),
            M::Mul | M::Imul => self.multiply(world, insn),
            M::Div | M::Idiv => self.divide(world, insn),
            M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => self.shift(world, insn),
            M::Shld | M::Shrd => self.double_shift(world, insn),
            M::Bt | M::Bts | M::Btr | M::Btc => self.bit_test(world, insn),
            M::Bsf | M::Bsr => self.bit_scan(world, insn),
            M::Bswap => self.bswap(insn),
            M::Movbe => self.movbe(world, insn),
            M::Movnti => self.mov(world, insn),
            M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => self.widen(insn),
            M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg => self.setcc(world, insn),
            M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg => self.cmov(world, insn),
            M::Jo
            | M::Jno
            | M::Jb
            | M::Jae
            | M::Je
            | M::Jne
            | M::Jbe
            | M::Ja
            | M::Js
            | M::Jns
            | M::Jp
            | M::Jnp
            | M::Jl
            | M::Jge
            | M::Jle
            | M::Jg => self.jcc(insn),
            M::Jmp => self.jmp(world, insn),
            M::Call => self.call(world, insn),
            M::Ret => self.ret(world, insn),
            M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne => self.loop_(insn),
            M::Push => self.push_operand(world, insn),
            M::Pop => self.pop_operand(world, insn),
            M::Pusha | M::Pushad => self.pusha(world, insn),
            M::Popa | M::Popad => self.popa(world, insn),
            M::Pushf | M::Pushfd | M::Pushfq => self.pushf(world, insn),
            M::Popf | M::Popfd | M::Popfq => self.popf_stack(world, insn),
            M::Enter => self.enter_frame(world, insn),
            M::Leave => self.leave(world, insn),
            M::Lahf | M::Sahf | M::Clc | M::Stc | M::Cmc | M::Cld | M::Std | M::Salc => self.flag_op(insn),
            M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das => self.decimal(insn),
            M::Xlatb => self.xlat(world, insn),
            M::Movsb
            | M::Movsw
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd => self.string(world, insn),
            M::Movsd | M::Cmpsd if insn.is_string_instruction() => self.string(world, insn),
            M::Nop
            | M::Pause
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Reservednop
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote => Ok(Flow::Next),
            M::Mfence | M::Lfence | M::Sfence => {
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                Ok(Flow::Next)
            }
            M::Clflush | M::Clflushopt | M::Clwb => self.touch(world, insn),
            M::Ud0 | M::Ud1 | M::Ud2 => Err(Exception::ud()),
            _ => match self.system_instruction(world, insn) {
                Some(done) => done,
                None => self.native(world, insn),
            },
        }
    }
}

/// The operand size of `bytes`.
fn operand_size_of(bytes: u32) -> OperandSize {
    match bytes {
        2 => OperandSize::Word,
        4 => OperandSize::Dword,
        _ => OperandSize::Qword,
    }
}
