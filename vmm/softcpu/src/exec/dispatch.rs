//! How handlers follow each other, and the handlers that every block needs: general instructions and exits.

use iced_x86::Instruction;

use super::general::{Flow, ThunkCall};
use super::{Exit, FarLink, Leave, Mode, Next, Op, fold, unfold};
use crate::cpu::Cpu;

/// Goes on with an op: a jump in optimised builds, a return to the trampoline in others.
macro_rules! go {
    ($cpu:expr, $op:expr, $fuel:expr, $flags:expr) => {{
        let op: *const crate::exec::Op = $op;
        #[cfg(not(debug_assertions))]
        #[allow(unused_unsafe, reason = "some users of the macro are within unsafe blocks")]
        {
            // SAFETY: `op` is an op of a live block, and the arguments are passed on.
            return unsafe { ((*op).handler)($cpu, op, $fuel, $flags) };
        }
        #[cfg(debug_assertions)]
        {
            let _ = $cpu;
            return crate::exec::Next { op, rest: u64::from($fuel as u32) | ($flags << 32) };
        }
    }};
}
/// Goes on with the next op.
macro_rules! next {
    ($cpu:expr, $op:expr, $fuel:expr, $flags:expr) => {
        // SAFETY: a block ends with an op that leaves it, so there is a next one.
        crate::exec::dispatch::go!($cpu, unsafe { $op.add(1) }, $fuel, $flags)
    };
}
/// Returns to the run loop.
macro_rules! leave {
    ($cpu:expr, $why:expr, $fuel:expr, $flags:expr) => {{
        // SAFETY: `cpu` is valid by the contract of a handler.
        #[allow(unused_unsafe, reason = "some users of the macro are within unsafe blocks")]
        unsafe {
            crate::exec::dispatch::record_leave($cpu, $why, $fuel, $flags)
        };
        #[cfg(not(debug_assertions))]
        return;
        #[cfg(debug_assertions)]
        return crate::exec::Next { op: std::ptr::null(), rest: 0 };
    }};
}
/// The end of a handler after which `exec` already says everything.
macro_rules! finish {
    () => {{
        #[cfg(not(debug_assertions))]
        return;
        #[cfg(debug_assertions)]
        return crate::exec::Next { op: std::ptr::null(), rest: 0 };
    }};
}
pub(crate) use {finish, go, leave, next};

/// Goes to the block at `regs.rip` if the jump cache knows it, else to the run loop. 64-bit code only: there RIP is the
/// linear address.
macro_rules! jump_cached {
    ($cpu:expr, $fuel:expr, $flags:expr) => {{
        // SAFETY: the jump cache has a power of two of entries, and those whose tag fits hold ops of live blocks.
        #[allow(unused_unsafe, reason = "some users of the macro are within unsafe blocks")]
        unsafe {
            let rip = (*$cpu).regs.rip;
            let jump = (*$cpu).exec.jumps.add(crate::exec::dispatch::jump_index(rip));
            let key = (*$cpu).exec.jump_keys[(rip >> 63) as usize];
            if (*jump).tag == rip ^ key {
                crate::exec::dispatch::go!($cpu, (*jump).op, $fuel, $flags);
            }
        }
        crate::exec::dispatch::leave!($cpu, crate::exec::Leave::Lookup, $fuel, $flags)
    }};
}
pub(crate) use jump_cached;

/// Goes to the block at `regs.rip` by a link if it is good, else by the jump cache, remembering the way.
macro_rules! go_far {
    ($cpu:expr, $link:expr, $fuel:expr, $flags:expr) => {{
        let link: *mut crate::exec::FarLink = $link;
        let rip = (*$cpu).regs.rip;
        let half = (rip >> 63) as usize;
        let key = *(&raw const (*$cpu).exec.link_keys).cast::<u64>().add(half);
        if (*link).rip == rip && (*link).key == key {
            crate::exec::dispatch::go!($cpu, (*link).op, $fuel, $flags);
        }
        let jump = (*$cpu).exec.jumps.add(crate::exec::dispatch::jump_index(rip));
        if (*jump).tag == rip ^ *(&raw const (*$cpu).exec.jump_keys).cast::<u64>().add(half) {
            *link = crate::exec::FarLink { rip, key, op: (*jump).op };
            crate::exec::dispatch::go!($cpu, (*jump).op, $fuel, $flags);
        }
        crate::exec::dispatch::leave!($cpu, crate::exec::Leave::Lookup, $fuel, $flags)
    }};
}
pub(crate) use go_far;

/// Stores what flows in registers.
///
/// # Safety
/// As for a handler.
#[inline(always)]
pub(crate) unsafe fn record_leave(cpu: *mut Cpu, why: Leave, fuel: i64, flags: u64) {
    // SAFETY: by contract.
    unsafe {
        (*cpu).exec.left = why;
        (*cpu).exec.fuel = fuel;
        (*cpu).regs.rflags = fold((*cpu).regs.rflags, flags);
    }
}

impl Cpu {
    /// Runs from an op on until something leaves; `exec.left`, `exec.fuel` and `regs` then say how things stand.
    pub(super) fn run_from(&mut self, op: *const Op, fuel: i64) {
        let flags = unfold(self.regs.rflags);
        let cpu: *mut Self = self;
        #[cfg(not(debug_assertions))]
        // SAFETY: the op is that of a live block; `self` is not used until the call returns.
        unsafe {
            ((*op).handler)(cpu, op, fuel, flags);
        }
        #[cfg(debug_assertions)]
        {
            let mut next = Next { op, rest: u64::from(fuel as u32) | (flags << 32) };
            while !next.op.is_null() {
                // SAFETY: as above; handlers return ops of live blocks.
                next =
                    unsafe { ((*next.op).handler)(cpu, next.op, i64::from(next.rest as u32 as i32), next.rest >> 32) };
            }
        }
    }

    /// One general instruction of a block, `rip` already behind it: what its handler does next.
    fn run_general(&mut self, insn: &Instruction, thunk: Option<&ThunkCall>) -> Outcome {
        // SAFETY: the board outlives `run`, which put the pointer there, and nobody else uses it while a handler runs.
        let Some(world) = self.exec.world.map(|world| unsafe { &mut *world }) else { return Outcome::Leave };
        let done = match thunk {
            Some(call) => self.run_thunk(world, &call.insn, &call.thunk),
            None => self.execute(world, insn),
        };
        match done {
            Ok(Flow::Next) if !self.exec.stale && !self.wants_attention() => Outcome::Next,
            Ok(Flow::Jump) => {
                self.exec.left = Leave::Lookup;
                Outcome::Leave
            }
            Ok(Flow::Again) => {
                self.exec.left = Leave::Boundary;
                Outcome::Back
            }
            Ok(_) => {
                self.exec.left = Leave::Boundary;
                Outcome::Leave
            }
            Err(fault) => {
                self.exec.fault = fault;
                self.exec.left = Leave::Fault;
                Outcome::Back
            }
        }
    }

    /// The part of a general op's handler that is not dispatch. Returns whether to go on with the next op.
    #[inline(never)]
    fn general_op(&mut self, op: &Op, insn: &Instruction, thunk: Option<&ThunkCall>, fuel: i64, flags: u64) -> bool {
        self.regs.rflags = fold(self.regs.rflags, flags);
        self.retired = self.exec.base.wrapping_add((self.exec.slice - fuel) as u64) + u64::from(op.ordinal);
        let start = self.regs.rip;
        let mask = if self.exec.mode == Mode::Bits64 { u64::MAX } else { 0xffff_ffff };
        let here = start.wrapping_add(u64::from(op.offset)) & mask;
        self.regs.rip = here.wrapping_add(u64::from(op.r0)) & mask;
        match self.run_general(insn, thunk) {
            Outcome::Next => {
                self.regs.rip = start;
                true
            }
            Outcome::Leave => {
                self.exec.fuel = fuel - i64::from(op.ordinal) - 1;
                false
            }
            Outcome::Back => {
                self.regs.rip = here;
                self.exec.fuel = fuel - i64::from(op.ordinal);
                false
            }
        }
    }
}

/// What a general instruction's handler does next.
enum Outcome {
    /// The next op.
    Next,
    /// Leave; the instruction has retired.
    Leave,
    /// Leave; the instruction has not retired, RIP goes back to it.
    Back,
}

/// Slots that an op with its whole instruction behind it takes.
pub(crate) const GENERAL_SLOTS: usize = 3;
const _: () = assert!(size_of::<Instruction>() <= (GENERAL_SLOTS - 1) * size_of::<Op>());

/// Any instruction, by way of the general interpreter. The decoded instruction lies behind the op.
pub(crate) unsafe extern "sysv64" fn general(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler; the decoder puts an instruction behind this op.
    let (on, flags) = unsafe {
        let insn = op.add(1).cast::<Instruction>();
        let on = (*cpu).general_op(&*op, &*insn, None, fuel, flags);
        (on, unfold((*cpu).regs.rflags))
    };
    if on {
        // SAFETY: two slots hold the instruction, the block goes on behind them.
        go!(cpu, unsafe { op.add(GENERAL_SLOTS) }, fuel, flags);
    }
    finish!();
}

/// Slots that an op with thunk and instruction behind it takes.
pub(crate) const THUNK_SLOTS: usize = 1 + size_of::<ThunkCall>().div_ceil(size_of::<Op>());

/// An instruction that runs natively. Instruction and thunk lie behind the op.
pub(crate) unsafe extern "sysv64" fn native(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler; the decoder puts a thunk call behind this op.
    let (on, flags) = unsafe {
        let call = &*op.add(1).cast::<ThunkCall>();
        let on = (*cpu).general_op(&*op, &call.insn, Some(call), fuel, flags);
        (on, unfold((*cpu).regs.rflags))
    };
    if on {
        // SAFETY: the slots behind the op hold the call.
        go!(cpu, unsafe { op.add(THUNK_SLOTS) }, fuel, flags);
    }
    finish!();
}

/// The instruction cannot be kept in a block (it crosses into another frame): the run loop does it alone.
pub(crate) unsafe extern "sysv64" fn step(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    let fuel = unsafe {
        (*cpu).regs.rip = (*cpu).regs.rip.wrapping_add(u64::from((*op).offset));
        fuel - i64::from((*op).ordinal)
    };
    leave!(cpu, Leave::Step, fuel, flags)
}

/// An exit whose target is in the same frame and not linked yet. RIP and fuel are already those of the target.
pub(crate) unsafe extern "sysv64" fn unlinked(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    leave!(cpu, Leave::Link(op.cast::<Exit>()), fuel, flags)
}

/// An exit to another frame outside 64-bit code.
pub(crate) unsafe extern "sysv64" fn lookup(cpu: *mut Cpu, _op: *const Op, fuel: i64, flags: u64) -> Next {
    leave!(cpu, Leave::Lookup, fuel, flags)
}

/// Where exits to another frame lead: on by the far link behind this op if that is still good, else by the jump cache.
pub(crate) unsafe extern "sysv64" fn elsewhere(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: the decoder puts a far link behind this op.
    unsafe { go_far!(cpu, op.cast_mut().add(1).cast::<FarLink>(), fuel, flags) }
}

/// Slot of a linear address in the jump cache.
#[inline(always)]
pub(crate) fn jump_index(linear: u64) -> usize {
    ((linear ^ (linear >> 12)) as usize) & (super::cache::JUMPS - 1)
}

/// Takes an exit: charges the block's instructions, moves RIP, and goes to the target unless the slice is used up.
macro_rules! take_exit {
    ($cpu:expr, $exit:expr, $fuel:expr, $flags:expr) => {{
        let exit: *const crate::exec::Exit = $exit;
        // SAFETY: the exit record belongs to the running block.
        #[allow(unused_unsafe, reason = "some users of the macro are within unsafe blocks")]
        unsafe {
            let fuel = $fuel - i64::from((*exit).count);
            (*$cpu).regs.rip = (*$cpu).regs.rip.wrapping_add_signed(i64::from((*exit).delta));
            if fuel < 0 {
                crate::exec::dispatch::leave!($cpu, crate::exec::Leave::Lookup, fuel, $flags);
            }
            crate::exec::dispatch::go!($cpu, (*exit).link.cast::<crate::exec::Op>(), fuel, $flags)
        }
    }};
}
pub(crate) use take_exit;

/// The end of a block without a jump: the exit record is behind the op.
pub(crate) unsafe extern "sysv64" fn fall_out(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: the decoder puts an exit record behind this op.
    take_exit!(cpu, unsafe { op.add(1).cast::<Exit>() }, fuel, flags);
}
