//! Figures of a machine: what its devices and vCPUs have done, counted where it happens and read without disturbing it.
//!
//! A device process counts in a page that it shares with the VMM ([`StatsPage`]); the page belongs to the VMM and outlives
//! the process, so nothing is lost with a crash. Of a process that does not count, the VMM counts what the rings show
//! ([`CountedBy`]). A vCPU counts its exits on its own thread ([`VcpuCounters`]). The
//! [`Registry`] knows them all; whoever asks gets numbers ([`Registry::counters`], [`Registry::snapshot`]) or Prometheus'
//! text ([`Registry::prometheus`]). Nobody is asked, stopped or locked for it, and nothing runs while nobody asks, but for
//! the look at those rings.

mod device;
mod histogram;
mod page;
mod prometheus;
mod registry;
mod rings;
mod translation;
mod vcpu;

pub use device::{Account, DeviceMeter, DeviceSnapshot, Phase, QueueSnapshot};
pub use histogram::Histogram;
pub use page::{QueueFigures, StatsPage};
pub use registry::{MetricsError, Registry, Snapshot};
pub use rings::CountedBy;
pub use translation::{TranslationCounters, TranslationEvent};
pub use vcpu::{AnswerKind, VcpuCounters, VcpuSnapshot};
