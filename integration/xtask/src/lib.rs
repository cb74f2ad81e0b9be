//! Everything that `cargo xtask` does, as a library, so that tests use the same images and the same console.
//!
//! Set-up fetches pinned Debian packages once into a cache folder and builds guest images from them; all else runs
//! offline. Start reading at `packages` (what is fetched), then `images` (what is made of it), then `console` (how a
//! guest is driven over its serial port).

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "xtask talks to a person at a terminal")]

pub mod archive;
pub mod bench;
pub mod browser;
pub mod chaos;
pub mod console;
mod debian_disk;
pub mod demo;
pub mod full_kernel;
pub mod fuzz;
pub mod graphics_land;
pub mod guest_clock;
pub mod images;
pub mod interop;
pub mod lab;
pub mod laden;
pub mod lives;
pub mod operated;
pub mod packages;
pub mod painting;
pub mod passt;
pub mod payload;
pub mod picture;
pub mod place;
pub mod processes;
pub mod progress;
pub mod qemu;
pub mod screen_demo;
pub mod soak;
pub mod suite;
pub mod tidy;
pub mod tied;
pub mod tour;
pub mod userland;
pub mod verify;
pub mod viewer;
pub mod yardstick;
