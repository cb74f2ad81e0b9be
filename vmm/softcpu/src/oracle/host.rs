//! Runs cases on the host processor, in this process, as unprivileged code.
//!
//! Everything lies at fixed low addresses. A stub loads all registers and flags and jumps to the slot; behind the
//! slot's instructions, and where its branches lead, a jump goes to another stub that stores all registers. Faults come
//! back through a signal handler on a stack of its own, which stores the registers that it was given and continues in
//! the second stub. The addresses are a property of the process, so there is one runner at a time.
#![allow(unsafe_code, reason = "runs generated machine code in this process and catches its faults")]

use super::generate::{Slot, Start};
use super::layout::{CODE, DATA, DATA_MAPPED, DATA_WRITABLE, Memory, SLOT, SLOTS, STACK, STACK_LEN, TAKEN};
use super::outcome::{Fault, Outcome};
use crate::FpState;
use iced_x86::code_asm::registers as r;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, ptr, qword_ptr};
use std::mem::offset_of;
use std::sync::{Mutex, MutexGuard};

/// Exchange page between the stubs, the handler and Rust.
const EXCHANGE: u64 = 0x0ff0_0000;
const STUBS: u64 = 0x0ff1_0000;
const PAGE: u64 = 0x1000;

#[repr(C, align(64))]
struct Exchange {
    gpr: [u64; 16],
    rflags: u64,
    /// Which end was reached: 0 behind the instructions, 1 the taken branch, 2 a fault.
    end: u64,
    host_rsp: u64,
    target: u64,
    floating: u64,
    fault_rip: u64,
    vector: u64,
    error: u64,
    cr2: u64,
    mxcsr: u32,
    fp: FpState,
}

static OWNER: Mutex<()> = Mutex::new(());

/// The host as an oracle.
pub(super) struct Host {
    entry: unsafe extern "sysv64" fn(),
    ends: [u64; 2],
    _owner: MutexGuard<'static, ()>,
}

/// The host refuses what the runner needs.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A fixed mapping failed.
    #[error("cannot map {len:#x} bytes at {address:#x} for test cases: {error} (is something else there?)")]
    Map {
        /// Wanted address.
        address: u64,
        /// Wanted length.
        len: u64,
        /// The system's answer.
        error: std::io::Error,
    },
    /// A signal handler or its stack was refused.
    #[error("cannot catch faults of test cases: {0}")]
    Signals(std::io::Error),
}

impl Host {
    /// Maps the regions and installs the fault handlers. One at a time: a second caller waits.
    pub(super) fn new() -> Result<Self, HostError> {
        let owner = OWNER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let data = libc::PROT_READ | libc::PROT_WRITE;
        map(EXCHANGE, PAGE, data)?;
        map(STUBS, PAGE, all)?;
        map(CODE, SLOT * SLOTS, all)?;
        map(DATA, DATA_MAPPED, data)?;
        map(STACK, STACK_LEN, data)?;
        let (code, entry, ends, resume) = stubs();
        // SAFETY: the stub page was just mapped and holds more than the stubs need.
        unsafe { (STUBS as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        RESUME.store(resume, std::sync::atomic::Ordering::Relaxed);
        catch_faults().map_err(HostError::Signals)?;
        // SAFETY: the stub starts there and follows the convention of this type.
        let entry = unsafe { std::mem::transmute::<usize, unsafe extern "sysv64" fn()>(entry as usize) };
        Ok(Self { entry, ends, _owner: owner })
    }

    /// Puts the instructions of a batch in place.
    pub(super) fn load(&mut self, slots: &[Slot]) {
        for slot in slots {
            let mut bytes = vec![0xcc; SLOT as usize];
            bytes[..slot.bytes.len()].copy_from_slice(&slot.bytes);
            for (place, end) in [(slot.bytes.len(), self.ends[0]), (TAKEN as usize, self.ends[1])] {
                let distance = (end as i64 - (slot.address as i64 + place as i64 + 5)) as i32;
                bytes[place] = 0xe9;
                bytes[place + 1..place + 5].copy_from_slice(&distance.to_le_bytes());
            }
            // SAFETY: slots lie within the code mapping; nothing runs there now.
            unsafe { (slot.address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }

    /// Sets all memory.
    pub(super) fn restore(&mut self, memory: &Memory) {
        // SAFETY: these are this runner's mappings, of these lengths; the read-only page is writable meanwhile.
        unsafe {
            libc::mprotect(DATA as *mut _, DATA_MAPPED as usize, libc::PROT_READ | libc::PROT_WRITE);
            (DATA as *mut u8).copy_from_nonoverlapping(memory.data.as_ptr(), DATA_MAPPED as usize);
            (STACK as *mut u8).copy_from_nonoverlapping(memory.stack.as_ptr(), STACK_LEN as usize);
            let read_only = (DATA + DATA_WRITABLE) as *mut _;
            libc::mprotect(read_only, (DATA_MAPPED - DATA_WRITABLE) as usize, libc::PROT_READ);
        }
    }

    /// The writable memory: data, stack.
    pub(super) fn memory(&mut self) -> [&mut [u8]; 2] {
        // SAFETY: mapped by `new`, written only by this process's cases, none of which runs while the borrow lives.
        unsafe {
            [
                std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_WRITABLE as usize),
                std::slice::from_raw_parts_mut(STACK as *mut u8, STACK_LEN as usize),
            ]
        }
    }

    /// Runs a loaded slot; `ends` are the addresses of its two ends.
    pub(super) fn run(&mut self, start: &Start, ends: [u64; 2]) -> Outcome {
        let exchange = EXCHANGE as *mut Exchange;
        // SAFETY: the exchange page belongs to this runner; the stub and the handler keep to the convention described
        // above, so the call returns with callee-saved registers, stack and floating-point control as before.
        unsafe {
            (*exchange).gpr = start.gpr;
            (*exchange).rflags = start.rflags;
            (*exchange).end = 0;
            (*exchange).target = start.rip;
            (*exchange).floating = u64::from(start.fp.is_some());
            (*exchange).mxcsr = 0x1f80;
            if let Some(fp) = &start.fp {
                (*exchange).fp = (**fp).clone();
            }
            std::arch::asm!(
                "call r15",
                in("r15") self.entry,
                clobber_abi("sysv64"),
            );
            let state = &*exchange;
            let fault = (state.end == 2).then(|| Fault {
                vector: state.vector as u8,
                error: if error_code(state.vector) { state.error as u32 } else { 0 },
                cr2: if state.vector == 14 { state.cr2 } else { 0 },
            });
            let rip = match state.end {
                0 => ends[0],
                1 => ends[1],
                _ => state.fault_rip,
            };
            let fp = start.fp.is_some().then(|| Box::new(state.fp.clone()));
            Outcome { gpr: state.gpr, rip, rflags: state.rflags, fault, fp }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (address, len) in regions() {
            // SAFETY: mapped by `new`; nothing refers to them once the runner is gone.
            unsafe { libc::munmap(address as *mut _, len as usize) };
        }
    }
}

fn regions() -> [(u64, u64); 5] {
    [(EXCHANGE, PAGE), (STUBS, PAGE), (CODE, SLOT * SLOTS), (DATA, DATA_MAPPED), (STACK, STACK_LEN)]
}

fn map(address: u64, len: u64, protection: libc::c_int) -> Result<(), HostError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: NOREPLACE never disturbs another mapping.
    let got = unsafe { libc::mmap(address as *mut _, len as usize, protection, flags, -1, 0) };
    if got as u64 == address {
        return Ok(());
    }
    let error = if got == libc::MAP_FAILED {
        std::io::Error::last_os_error()
    } else {
        std::io::Error::from(std::io::ErrorKind::AddrInUse)
    };
    Err(HostError::Map { address, len, error })
}

fn error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// Assembles entry, the two ends and the resumption after a fault.
fn stubs() -> (Vec<u8>, u64, [u64; 2], u64) {
    let registers = [
        r::rax,
        r::rcx,
        r::rdx,
        r::rbx,
        r::rsp,
        r::rbp,
        r::rsi,
        r::rdi,
        r::r8,
        r::r9,
        r::r10,
        r::r11,
        r::r12,
        r::r13,
        r::r14,
        r::r15,
    ];
    let at = |field: usize| qword_ptr(EXCHANGE + field as u64);
    let gpr = |index: usize| at(offset_of!(Exchange, gpr) + 8 * index);
    let fp = ptr(EXCHANGE + offset_of!(Exchange, fp) as u64);
    let saved = [r::rbx, r::rbp, r::r12, r::r13, r::r14, r::r15];
    let build = || -> Result<_, iced_x86::IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut integers = a.create_label();
        let mut first = a.create_label();
        let mut second = a.create_label();
        let mut store = a.create_label();
        let mut resume = a.create_label();
        let mut finish = a.create_label();
        for register in saved {
            a.push(register)?;
        }
        a.mov(at(offset_of!(Exchange, host_rsp)), r::rsp)?;
        a.cmp(at(offset_of!(Exchange, floating)), 0)?;
        a.je(integers)?;
        a.fxrstor64(fp)?;
        a.set_label(&mut integers)?;
        a.push(at(offset_of!(Exchange, rflags)))?;
        a.popfq()?;
        for (index, register) in registers.into_iter().enumerate() {
            a.mov(register, gpr(index))?;
        }
        a.jmp(at(offset_of!(Exchange, target)))?;

        a.set_label(&mut second)?;
        a.mov(at(offset_of!(Exchange, end)), 1)?;
        a.set_label(&mut first)?;
        for (index, register) in registers.into_iter().enumerate() {
            a.mov(gpr(index), register)?;
        }
        a.mov(r::rsp, at(offset_of!(Exchange, host_rsp)))?;
        a.pushfq()?;
        a.pop(at(offset_of!(Exchange, rflags)))?;
        // DF and AC must not outlive the case.
        a.push(0x202)?;
        a.popfq()?;
        a.cmp(at(offset_of!(Exchange, floating)), 0)?;
        a.je(finish)?;
        a.set_label(&mut store)?;
        a.fxsave64(fp)?;
        a.set_label(&mut resume)?;
        a.fninit()?;
        a.ldmxcsr(dword_ptr(EXCHANGE + offset_of!(Exchange, mxcsr) as u64))?;
        a.set_label(&mut finish)?;
        for register in saved.into_iter().rev() {
            a.pop(register)?;
        }
        a.ret()?;
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let done = a.assemble_options(STUBS, options)?;
        let addresses = [first, second, resume].map(|label| done.label_ip(&label));
        let [first, second, resume] = addresses;
        Ok((done.inner.code_buffer, STUBS, [first?, second?], resume?))
    };
    build().expect("the stubs are constant")
}

static RESUME: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

const SIGNALS: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

fn catch_faults() -> std::io::Result<()> {
    const STACK_BYTES: usize = 64 << 10;
    // The alternate stack belongs to the thread for the rest of its life: the handlers stay installed.
    thread_local! {
        static ALTERNATE: std::cell::OnceCell<Box<[u8; STACK_BYTES]>> = const { std::cell::OnceCell::new() };
    }
    ALTERNATE.with(|stack| {
        let base = stack.get_or_init(|| Box::new([0; STACK_BYTES])).as_ptr();
        let stack = libc::stack_t { ss_sp: base.cast_mut().cast(), ss_flags: 0, ss_size: STACK_BYTES };
        // SAFETY: the stack stays allocated until the thread ends.
        if unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        for signal in SIGNALS {
            // SAFETY: an all-zero sigaction is valid; the handler touches only its arguments and the exchange page.
            let result = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let handler: unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(signal, &raw const action, std::ptr::null_mut())
            };
            if result != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    })
}

/// Takes a fault of a case as its outcome. Any other fault is the program's own: the default action takes over.
///
/// # Safety
/// Called by the kernel with a valid context.
unsafe extern "C" fn on_fault(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const ORDER: [i32; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: the kernel passes a ucontext; the exchange page is mapped while a runner exists, and only then does the
    // check on its target let the second half run.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let exchange = EXCHANGE as *mut Exchange;
        let rip = registers[libc::REG_RIP as usize] as u64;
        // A wild jump of a case faults elsewhere: its stack pointer is then not the program's.
        let program_stack = (*exchange).host_rsp.abs_diff(registers[libc::REG_RSP as usize] as u64) < 1 << 20;
        if RESUME.load(std::sync::atomic::Ordering::Relaxed) == 0
            || program_stack && !(CODE..CODE + SLOT * SLOTS).contains(&rip)
        {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        for (index, register) in ORDER.into_iter().enumerate() {
            (*exchange).gpr[index] = registers[register as usize] as u64;
        }
        (*exchange).rflags = registers[libc::REG_EFL as usize] as u64;
        (*exchange).fault_rip = rip;
        (*exchange).vector = registers[libc::REG_TRAPNO as usize] as u64;
        (*exchange).error = registers[libc::REG_ERR as usize] as u64;
        (*exchange).cr2 = registers[libc::REG_CR2 as usize] as u64;
        (*exchange).end = 2;
        if (*exchange).floating != 0 {
            (*exchange).fp = context.uc_mcontext.fpregs.cast::<FpState>().read_unaligned();
        }
        registers[libc::REG_RIP as usize] = RESUME.load(std::sync::atomic::Ordering::Relaxed) as i64;
        registers[libc::REG_RSP as usize] = (*exchange).host_rsp as i64;
        registers[libc::REG_EFL as usize] = 0x202;
    }
}
