//! Speed of the software CPU beside QEMU's TCG and the bare processor: five loops, the same object code on all three.
//!
//! The code is assembled once, as a flat image that boots by multiboot: [`image`] puts a few instructions before the
//! loops that reach 64-bit mode, and a frame around the chosen loop that reports through two ports. QEMU boots the image
//! in system mode, so it pays for its MMU as we do; the software CPU starts at the same entry; natively the loops are
//! called where they lie, since the image's addresses are free in this process too. What is timed is the loop alone,
//! between two bytes on the report port, translation or decoding included; and what is counted is processor time, so that
//! the figures stand on a machine with other work too.

mod clock;
pub mod image;
pub mod loops;
pub mod native;
pub mod qemu;
pub mod report;
pub mod soft;
mod wide;

/// What one run of a loop gave.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Result of the loop: the same wherever it runs.
    pub checksum: u64,
    /// Processor time of the loop in seconds.
    pub seconds: f64,
}
