//! qcow2 images.
//!
//! [`header`] and [`tables`] check what an image says of itself; [`store`] keeps the order in which its tables change;
//! [`image`] is the image as a queue uses it. Mappings, allocation, copies on write and decompression are imago's.

pub mod file;
pub mod header;
pub mod image;
#[cfg(test)]
mod journal;
#[cfg(test)]
mod power;
pub mod store;
pub mod tables;
mod unsettled;
