//! The core of the virtual machine monitor: it owns guest memory and vCPUs, and nothing else.
//!
//! Devices that the guest sees are state machines of `atoll-devices`; what stands behind them is another process.
//! This crate is the only place where CPUs, tokio and processes meet.

pub mod actor;
pub mod api;
pub mod backend;
pub mod config;
pub mod cpu;
pub mod doorbell;
pub mod iommu;
pub mod irq;
mod lasted;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod passthrough;
pub mod rundir;
pub mod screen;
pub mod seccomp;
pub mod unix_socket;
pub mod vfio;
pub mod vfio_user;
pub mod vhost;
