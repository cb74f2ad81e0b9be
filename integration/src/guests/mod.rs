//! Guests of our own: ELF kernels of a few hundred bytes, assembled here, entered by PVH.
//!
//! A stock kernel shows that things work; these show what it never does: a deterministic run down to the last register,
//! and the worst that a guest can try. All begin with the same prologue, which leaves them in long mode with the first
//! 4 GiB mapped one to one.

pub mod disk;
pub mod elf;
pub mod hostile;
pub mod idle;
pub mod prologue;
pub mod trace;

use iced_x86::IcedError;
use thiserror::Error;

/// A guest that could not be assembled.
#[derive(Debug, Error)]
#[error("cannot assemble the guest: {0}")]
pub struct AssembleError(#[from] IcedError);
