//! What a device process that was taken over finds of its guest's memory: a canary lies in all of it but the rings and the
//! one buffer that the driver gives away, and the process (`canary-rng`) looks through every descriptor that it holds.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::Options;
use atoll_vmm::config::{DeviceConfig, Isolation, OnFailure, RngConfig};
use xtask::place;

use crate::chaos::rig::House;

/// What lies in guest memory, over and over.
pub const CANARY: [u8; 16] = *b"atoll's canary\xf0\x0f";

const MEMORY: u64 = 16 << 20;
/// The rings are below, and the buffer of each request begins here.
const BUFFER: u64 = 1 << 20;
const REQUEST_MAX: Duration = Duration::from_secs(60);

/// What a process has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Descriptors of files.
    pub descriptors: u64,
    /// Bytes that it could map and read.
    pub bytes: u64,
    /// Canaries among them.
    pub canaries: u64,
}

impl Found {
    /// As it is answered: three numbers.
    pub fn encode(self) -> Vec<u8> {
        [self.descriptors, self.bytes, self.canaries].into_iter().flat_map(u64::to_le_bytes).collect()
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.chunks_exact(8).map(|word| word.try_into().map(u64::from_le_bytes));
        let mut word = || words.next()?.ok();
        Some(Self { descriptors: word()?, bytes: word()?, canaries: word()? })
    }
}

/// Serves a device whose process is a spy, and asks what it finds. `programs` gets a folder for its program.
///
/// # Errors
/// When the device does not serve.
pub fn spy(isolation: Isolation, programs: &Path) -> Result<Found> {
    let link = programs.join("atoll-rng");
    if !link.exists() {
        std::fs::copy(place::program("canary-rng")?, &link)?;
    }
    let house = House::new(programs)?;
    let config = RngConfig {
        src: "/dev/urandom".into(),
        id: None,
        stall_timeout: None,
        start_attempts: None,
        on_failure: OnFailure::default(),
        iommu: false,
        isolation,
    };
    let mut rig = house.device(&DeviceConfig::Rng(config), MEMORY)?;
    let options = Options { queues: 1, size: 64, memory: MEMORY as usize, ..Options::default() };
    let mut driver = rig.start(options)?;
    let (queue, guest) = driver.queue(0)?;
    for at in (BUFFER..MEMORY).step_by(CANARY.len()) {
        guest.write(at, &CANARY);
    }
    // Twice: what a request has brought in is there at the next.
    let mut found = Found::default();
    for _ in 0..2 {
        guest.write(BUFFER, &[0; 64]);
        queue.add(guest, &[], &[(BUFFER, 64)]).context("a free descriptor")?;
        queue.publish(guest)?;
        let (_, written) = queue.take_within(guest, REQUEST_MAX)?;
        ensure!(written == 24, "{written} bytes were answered");
        let mut answer = [0; 24];
        guest.read(BUFFER, &mut answer);
        found = Found::decode(&answer).context("three numbers")?;
    }
    Ok(found)
}
