//! The CPU seam: something that executes guest code, and the little that the board needs of it.
//!
//! A [`Processor`] makes vCPUs and is where interrupts end; a [`Vcpu`] runs until it has a reason to stop and asks a
//! [`GuestBus`] for everything that is not RAM, in the middle of the instruction, on its own thread. No KVM type and no
//! flag of the software CPU crosses this seam, so a machine cannot tell which of the two drives it.

mod address_space;
mod gate;
pub mod kvm;
pub mod probe;
pub mod soft;
mod state;
mod thread;

use std::io;
use std::sync::Arc;

use atoll_devices::GuestClock;
use thiserror::Error;

use crate::irq::InterruptFabric;
use crate::memory::DevicePages;

pub use address_space::{ANSWER_BUDGET, AddressSpace, SharedDevice, Stall, StallSink, VcpuBus};
pub use atoll_protocol::Space;
pub use gate::VcpuPhase;
pub use state::{CpuState, reset_system};
pub use thread::{Kicks, VcpuEnd, VcpuThread};

/// Name of the CPU model that hides nothing of the host's processor.
const HOST_MODEL: &str = "host";

/// Looks whether there is a CPU model of this name; not whether this host can show it to a guest.
///
/// # Errors
/// [`CpuError::NoModel`].
pub fn check_model(name: &str) -> Result<(), CpuError> {
    if name == HOST_MODEL {
        return Ok(());
    }
    Ok(atoll_softcpu::CpuModel::named(name, atoll_softcpu::VcpuTopology::SINGLE).map(drop)?)
}

/// Everything outside RAM, as one vCPU reaches it. Each call returns within the bus's deadline, with the instruction
/// that asked complete: a read that nobody answers gives all ones, a write that nobody takes is dropped.
pub trait GuestBus {
    /// Reads `data.len()` bytes.
    fn read(&mut self, space: Space, address: u64, data: &mut [u8]);
    /// Writes `data`.
    fn write(&mut self, space: Space, address: u64, data: &[u8]);
}

/// Why a vCPU stopped running guest code. Never with an instruction half done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// [`Kick::kick`] was called.
    Stopped,
    /// Triple fault, with the address of the instruction that the first fault belongs to where it is known.
    TripleFault {
        /// RIP when the CPU shut down; KVM forgets it on AMD's processors.
        rip: Option<u64>,
    },
    /// The CPU cannot go on from this instruction.
    Stuck {
        /// RIP of the instruction.
        rip: u64,
        /// What is the matter with it.
        reason: String,
    },
}

/// Why a CPU could not be made or run.
#[derive(Debug, Error)]
pub enum CpuError {
    /// `/dev/kvm` cannot be opened or used.
    #[error("KVM cannot be used: {0}; give the user access to /dev/kvm or run with --cpu soft")]
    NoKvm(#[source] io::Error),
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}; run with --cpu soft")]
    KvmLacks(&'static str),
    /// An ioctl failed.
    #[error("KVM failed at {what}: {source}")]
    Kvm {
        /// The step.
        what: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Unknown CPU model.
    #[error("{0}, or {HOST_MODEL} with --cpu kvm")]
    NoModel(#[from] atoll_softcpu::UnknownModel),
    /// The thread could not be started.
    #[error("no thread {name}: {source}; raise the limit on processes (ulimit -u)")]
    Thread {
        /// Name of the thread.
        name: String,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The combination is not there.
    #[error("{0}")]
    Unsupported(String),
}

/// Asks a vCPU to leave guest code; any thread, any number of times. The request stays until the vCPU has seen it.
pub trait Kick: Send + Sync {
    /// Makes the current or the next [`Vcpu::run`] return [`Exit::Stopped`] soon.
    fn kick(&self);
}

/// What a vCPU has done, as far as its CPU keeps count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuFigures {
    /// Instructions retired.
    pub instructions: u64,
    /// Host memory that holds decoded code, in bytes.
    pub cache_bytes: u64,
    /// How often guest code was left for this process, for whatever reason: returns of KVM_RUN. Zero where nobody counts.
    pub returns: u64,
    /// Deterministic mode: a hash of the registers at each millionth instruction and at the end.
    pub trace_hash: Option<u64>,
}

/// One virtual processor.
pub trait Vcpu {
    /// Runs guest code; sleeps while the guest is halted.
    fn run(&mut self, bus: &mut dyn GuestBus) -> Result<Exit, CpuError>;
    /// The architectural state, between two runs.
    fn state(&mut self) -> Result<CpuState, CpuError>;
    /// Replaces it.
    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError>;
    /// The handle that stops it.
    fn kick_handle(&self) -> Arc<dyn Kick>;
    /// What it has done so far.
    fn figures(&self) -> VcpuFigures;
    /// It stood between two instructions while the host's time went on, and runs again: a guest that asked for a
    /// paravirtual clock is told, so that its watchdogs forgive the pause.
    fn stood(&mut self) -> Result<(), CpuError>;
    /// Sends it a non-maskable interrupt, between two runs.
    fn nmi(&mut self) -> Result<(), CpuError>;
}

/// What the vCPUs of one machine have in common.
pub trait Processor: Send + Sync {
    /// `kvm` or `soft`.
    fn name(&self) -> &'static str;
    /// Makes vCPU `index`, in its reset state. Called on the thread that will run it.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, CpuError>;
    /// Where interrupts end.
    fn interrupts(&self) -> Arc<dyn InterruptFabric>;
    /// Guest time.
    fn clock(&self) -> Arc<dyn GuestClock>;
    /// What shows a guest memory of the host that is not RAM; none where each access outside RAM comes out.
    fn windows(&self) -> Option<Arc<dyn MemoryWindows>> {
        None
    }
    /// Doorbells that the processor can watch by itself, without a vCPU leaving the guest.
    fn doorbells(&self) -> Option<Arc<dyn DoorbellWatch>>;
}

/// A processor whose guest reaches registers of a device without leaving guest code.
pub trait MemoryWindows: Send + Sync {
    /// Shows `pages` at guest-physical `gpa`, a multiple of the page size, until what is returned is dropped.
    ///
    /// # Errors
    /// When something else is there, or there are as many windows as there can be.
    fn show(&self, gpa: u64, pages: Arc<DevicePages>) -> Result<Box<dyn Send>, CpuError>;
}

/// A processor that turns a guest's write at an address into a signal of an eventfd (ioeventfd).
pub trait DoorbellWatch: Send + Sync {
    /// Starts watching: a write of any value at `address`, of any width, signals `event` and nothing else happens.
    fn watch(&self, space: Space, address: u64, event: &vmm_sys_util::eventfd::EventFd) -> Result<(), CpuError>;
    /// Stops watching.
    fn unwatch(&self, space: Space, address: u64, event: &vmm_sys_util::eventfd::EventFd) -> Result<(), CpuError>;
}
