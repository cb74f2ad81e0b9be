//! Benchmarks: each sets Atoll beside a peer in the same run, in turn, and prints ratios with their spread.

pub mod boot;
pub mod cube;
pub mod gpu;
pub mod memory;
pub mod reconnect;
pub mod spread;
pub mod wire;

use crate::{packages, place};
use anyhow::Result;
use std::process::Command;

/// The software CPU beside QEMU TCG and native: a program of the integration room.
pub fn cpu(arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["qemu-system-x86_64"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("cpu-bench")?).args(arguments))
}

/// The switch of `atoll-net` beside DPDK's testpmd, or beside two copying threads where that cannot be had.
pub fn net(arguments: &[String]) -> Result<()> {
    if let Err(reason) = packages::ensure_installed("dpdk-testpmd", &["dpdk-dev", "librte-net-vhost23"]) {
        eprintln!("{reason:#}: going on without testpmd");
    }
    place::build_programs()?;
    place::run(Command::new(place::program("net-bench")?).args(arguments))
}

/// `atoll-blk` beside qemu-storage-daemon: a program of the integration room.
pub fn blk(arguments: &[String]) -> Result<()> {
    packages::ensure_peers(&["qemu-storage-daemon", "mkfs.ext4"])?;
    place::build_programs()?;
    place::run(Command::new(place::program("blk-bench")?).args(arguments))
}

/// An exit to a device and back, beside the least that a hand-over costs: a program of the integration room.
pub fn bus(arguments: &[String]) -> Result<()> {
    place::build_programs()?;
    place::run(Command::new(place::program("bus-bench")?).args(arguments))
}

/// What `track=shadow` costs: a program of the integration room.
pub fn track(arguments: &[String]) -> Result<()> {
    place::build_programs()?;
    place::run(Command::new(place::program("track-bench")?).args(arguments))
}

/// What `isolation=copy` costs: the same program.
pub fn isolation(arguments: &[String]) -> Result<()> {
    let copies = std::iter::once("--copies".to_owned());
    track(&copies.chain(arguments.iter().cloned()).collect::<Vec<_>>())
}
