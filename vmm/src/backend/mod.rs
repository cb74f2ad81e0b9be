//! Device processes: how they are started, watched, judged and replaced.
//!
//! - [`BackendSpec`] says what to start; [`Spawner`] starts it, on the one thread that is the parent of all children,
//!   and reports [`BackendEvent`]s: ready, progress, stalled, exited.
//! - [`Watch`] is what the spawner knows of a child: a state machine over the words of its sidecar and the clock.
//! - [`RestartPolicy`] decides what an exit leads to; the [`Supervisor`] actor feeds it with events and hands its
//!   decisions to whoever can carry them out. The supervisor itself never calls a child, nor waits for one.
//! - [`RegisterBackend`] keeps a process that serves registers on the bus alive ([`UartBuilder`] is one);
//!   [`Household`] is what all devices in processes share.
//! - [`ImageHandle`] keeps hold of a disk image over all incarnations of its backend, without being able to lock it.

mod asked;
mod companion;
mod event;
mod household;
mod image;
mod kept;
mod launch;
mod lines;
mod policy;
mod registers;
mod spawner;
mod spec;
mod standing;
mod supervisor;
mod uart;
mod watch;

pub use asked::{AskError, ask};
pub use companion::{COMPANION_END, Companion, CompanionSpec};
pub use event::{BackendEvent, BackendExit, EventKind, EventSink, ExitCause, ExitStatus, Offer, SpawnError};
pub use household::Household;
pub use image::{ImageAccess, ImageError, ImageHandle};
pub use kept::KeptError;
pub(crate) use kept::{Attachment, Kept, KeptProcess};
pub use policy::{Decision, Ending, PolicyConfig, QuarantineReason, RestartPolicy, START_ATTEMPTS};
pub use registers::{RegisterBackend, RegisterProcess};
pub use spawner::{Child, Spawner};
pub use spec::{BackendSpec, JailPolicy, PassedFd, WatchLimits, beside_this_binary};
pub use supervisor::{Recovery, Supervisor, SupervisorMail};
pub use uart::{UartBuilder, UartError, UartLine, UartOutput};
pub use watch::{Watch, WatchAction};

#[cfg(test)]
mod tests;
