//! One vCPU of KVM: runs, answers its exits in place, and leaves when it is kicked.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::split::Chips;
use super::windows::Windows;
use super::{failed, state};
use crate::cpu::{CpuError, CpuState, Exit, GuestBus, Kick, Space, Vcpu, VcpuFigures};

/// `immediate_exit` in the page that KVM shares with a vCPU: KVM_RUN returns at once while it is set.
struct ImmediateExit(NonNull<AtomicU8>);

// SAFETY: it is one byte of a shared mapping, accessed only as an atomic, and the kick forgets it before it is unmapped.
unsafe impl Send for ImmediateExit {}

/// Makes the vCPU leave the guest: the flag keeps it from entering again, the signal gets it out.
struct KvmKick {
    asked: AtomicBool,
    thread: rustix::thread::Pid,
    /// Gone when the vCPU is.
    exit: Mutex<Option<ImmediateExit>>,
}

/// The signal that gets a thread out of KVM_RUN; its handler does nothing, its arrival is enough.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn nothing(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

fn install_handler() -> Result<(), CpuError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed =
        INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), nothing).map_err(|error| error.errno()));
    installed.map_err(|errno| CpuError::Kvm {
        what: "installing a signal handler",
        source: io::Error::from_raw_os_error(errno),
    })
}

impl Kick for KvmKick {
    fn kick(&self) {
        self.asked.store(true, Ordering::SeqCst);
        let exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(exit) = exit.as_ref() else { return };
        // SAFETY: the mapping exists while the option is `Some`, and the lock is held.
        unsafe { exit.0.as_ref() }.store(1, Ordering::SeqCst);
        // SAFETY: a system call on integers; the thread exists, as the vCPU lives on it and takes the lock before it ends.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread.as_raw_nonzero().get(), kick_signal()) };
    }
}

pub(super) struct KvmVcpu {
    fd: VcpuFd,
    kick: Arc<KvmKick>,
    /// An access has been answered, and the kernel has not yet put the answer into the guest's registers: that happens
    /// at the next entry, and until then the instruction is half done.
    is_owed: bool,
    /// How often KVM_RUN has returned.
    returns: u64,
    /// The interrupt chips that are not in the kernel.
    chips: Option<Arc<Chips>>,
    /// Registers of devices that the guest reaches by itself.
    windows: Arc<Windows>,
    /// Whether it is the one that the 8259 pair of those interrupts.
    is_boot_cpu: bool,
}

impl KvmVcpu {
    /// Takes the vCPU over, on the thread that will run it.
    pub(super) fn new(
        mut fd: VcpuFd,
        index: u32,
        chips: Option<Arc<Chips>>,
        windows: Arc<Windows>,
    ) -> Result<Self, CpuError> {
        install_handler()?;
        let run: *mut kvm_run = fd.get_kvm_run();
        // SAFETY: the pointer is to a live mapping; the byte is aligned as every byte is.
        let exit = NonNull::new(unsafe { &raw mut (*run).immediate_exit }.cast::<AtomicU8>()).map(ImmediateExit);
        let kick = KvmKick { asked: AtomicBool::new(false), thread: rustix::thread::gettid(), exit: Mutex::new(exit) };
        let (kick, is_boot_cpu) = (Arc::new(kick), index == 0);
        if let Some(chips) = chips.as_ref().filter(|_| is_boot_cpu) {
            chips.lines.set_boot_cpu(Arc::clone(&kick) as _);
        }
        Ok(Self { fd, kick, is_owed: false, returns: 0, chips, windows, is_boot_cpu })
    }

    /// Whether somebody wants the vCPU out and it may go; asks once. While the kernel owes the guest an answer it may not:
    /// the next entry pays it and returns at once, as the kick has set `immediate_exit`.
    fn is_kicked(&mut self) -> bool {
        if self.is_owed {
            return false;
        }
        let asked = self.kick.asked.swap(false, Ordering::SeqCst);
        if asked {
            let exit = self.kick.exit.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(exit) = exit.as_ref() {
                // SAFETY: as in `kick`.
                unsafe { exit.0.as_ref() }.store(0, Ordering::SeqCst);
            }
        }
        asked
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }

    /// Where the guest was when it shut down. On AMD's processors nothing is known of a guest after that, and KVM has put
    /// it into the state after INIT.
    fn rip_at_shutdown(&self) -> Option<u64> {
        const INIT_CS_BASE: u64 = 0xffff_0000;
        const INIT_RIP: u64 = 0xfff0;
        let (regs, sregs) = (self.fd.get_regs().ok()?, self.fd.get_sregs().ok()?);
        ((regs.rip, sregs.cs.base) != (INIT_RIP, INIT_CS_BASE)).then_some(regs.rip)
    }

    /// Why KVM gave up.
    fn internal_error(&mut self) -> Exit {
        let rip = self.rip();
        // SAFETY: the exit reason says that this is the field of the union.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let reason = match error.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "KVM has to interpret this instruction and does not know it".into(),
            code => format!("KVM failed with internal error {code}"),
        };
        Exit::Stuck { rip, reason }
    }

    /// Answers port I/O: one element, or several of a string instruction.
    fn port_io(&mut self, port: u16, data: NonNull<u8>, len: usize, write: bool, bus: &mut dyn GuestBus) {
        // SAFETY: the exit reason says that this is the field of the union.
        let size = usize::from(unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size }).max(1);
        // SAFETY: kvm-ioctls made the slice inside the shared page, which lives as long as the vCPU, and the guest does
        // not run.
        let data = unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), len) };
        for element in data.chunks_mut(size) {
            if write {
                bus.write(Space::Pio, u64::from(port), element);
            } else {
                bus.read(Space::Pio, u64::from(port), element);
            }
        }
    }
}

/// An exit without the borrow of the vCPU.
enum Left {
    Port {
        port: u16,
        data: NonNull<u8>,
        len: usize,
        write: bool,
    },
    /// A memory-mapped access, answered.
    Answered,
    End(Exit),
    InternalError,
    Interrupted,
}

impl KvmVcpu {
    /// Runs guest code, with everything outside the kernel on `bus`.
    fn run_on(&mut self, bus: &mut dyn GuestBus) -> Result<Exit, CpuError> {
        loop {
            if self.is_kicked() {
                return Ok(Exit::Stopped);
            }
            if self.is_boot_cpu
                && let Some(chips) = &self.chips
            {
                chips.lines.offer(&mut self.fd)?;
            }
            self.is_owed = false;
            self.returns += 1;
            let withdrawn = self.windows.withdrawn();
            let left = match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    Left::Port { port, len: data.len(), data: NonNull::from(data).cast(), write: false }
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    Left::Port { port, len: data.len(), data: NonNull::from(data).cast(), write: true }
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    bus.read(Space::Mmio, address, data);
                    Left::Answered
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    bus.write(Space::Mmio, address, data);
                    Left::Answered
                }
                Ok(VcpuExit::IoapicEoi(vector)) => {
                    if let Some(chips) = &self.chips {
                        chips.lines.end_of_interrupt(vector);
                    }
                    Left::Interrupted
                }
                Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => Left::Interrupted,
                // A device's registers that are not there any more: the access comes out the next time.
                Ok(VcpuExit::MemoryFault { gpa, .. }) if self.windows.vanished(Some(gpa), withdrawn) => {
                    Left::Interrupted
                }
                Ok(VcpuExit::Shutdown) => Left::End(Exit::TripleFault { rip: None }),
                Ok(VcpuExit::InternalError) => Left::InternalError,
                Ok(other) => Left::End(Exit::Stuck { rip: 0, reason: format!("KVM left the guest with {other:?}") }),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Left::Interrupted,
                // The same of a KVM that does not say where.
                Err(error) if error.errno() == libc::EFAULT && self.windows.vanished(None, withdrawn) => {
                    Left::Interrupted
                }
                Err(error) => return Err(failed("running the guest")(error)),
            };
            match left {
                Left::Port { port, data, len, write } => {
                    self.port_io(port, data, len, write, bus);
                    self.is_owed = true;
                }
                Left::Answered => self.is_owed = true,
                Left::Interrupted => {}
                Left::InternalError => return Ok(self.internal_error()),
                Left::End(Exit::TripleFault { .. }) => return Ok(Exit::TripleFault { rip: self.rip_at_shutdown() }),
                Left::End(Exit::Stuck { reason, .. }) => return Ok(Exit::Stuck { rip: self.rip(), reason }),
                Left::End(Exit::Stopped) => return Ok(Exit::Stopped),
            }
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &mut dyn GuestBus) -> Result<Exit, CpuError> {
        match self.chips.clone() {
            Some(chips) => self.run_on(&mut chips.before(bus)),
            None => self.run_on(bus),
        }
    }

    fn state(&mut self) -> Result<CpuState, CpuError> {
        state::read(&self.fd)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError> {
        state::write(&self.fd, state)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as _
    }

    fn figures(&self) -> VcpuFigures {
        VcpuFigures { returns: self.returns, ..VcpuFigures::default() }
    }

    fn stood(&mut self) -> Result<(), CpuError> {
        match self.fd.kvmclock_ctrl() {
            Ok(()) => Ok(()),
            // The guest has no such clock.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            Err(error) => Err(failed("telling the guest that it stood")(error)),
        }
    }

    fn nmi(&mut self) -> Result<(), CpuError> {
        self.fd.nmi().map_err(failed("sending a non-maskable interrupt"))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        *self.kick.exit.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
