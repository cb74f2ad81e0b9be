//! Puts a kernel, its initramfs and command line into guest memory and says in which state the boot processor starts.
//!
//! An ELF kernel starts by the PVH entry point that its notes name; a bzImage by the 64-bit entry of the Linux boot
//! protocol. Both get the same memory map and the same ACPI tables.

mod blank;
mod entry;
mod error;
mod image;
mod memory_map;

use std::path::PathBuf;

use vm_memory::GuestMemoryMmap;

use crate::cpu::CpuState;

use super::layout::Span;
pub use blank::low_memory;
pub use error::BootError;
pub use memory_map::{MapEntry, MapKind, memory_map};

/// Where things that only the kernel's first steps need lie, all in the first 640 KiB.
mod place {
    /// Global descriptor table of the 64-bit entry.
    pub(super) const GDT: u64 = 0x500;
    /// PVH start info, or the zero page.
    pub(super) const PARAMETERS: u64 = 0x7000;
    /// PVH memory map.
    pub(super) const PVH_MEMORY_MAP: u64 = 0x7400;
    /// PVH module list.
    pub(super) const PVH_MODULES: u64 = 0x7800;
    /// Page tables of the 64-bit entry: six pages.
    pub(super) const PAGE_TABLES: u64 = 0x9000;
    /// Command line.
    pub(super) const COMMAND_LINE: u64 = 0x2_0000;
    /// Longest command line with its terminating zero.
    pub(super) const COMMAND_LINE_MAX: usize = 0x1_0000;
    /// Where RAM for kernels starts.
    pub(super) const HIGH_MEMORY: u64 = 0x10_0000;
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSource {
    /// ELF or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
}

/// The files of a [`BootSource`], held open as long as the machine lives.
#[derive(Debug)]
pub struct BootFiles {
    kernel: image::BootFile,
    initramfs: Option<image::BootFile>,
}

impl BootFiles {
    /// Opens them.
    ///
    /// # Errors
    /// [`BootError::Read`].
    pub fn open(source: &BootSource) -> Result<Self, BootError> {
        let kernel = image::BootFile::open("kernel", &source.kernel)?;
        let initramfs = source.initramfs.as_deref().map(|path| image::BootFile::open("initramfs", path)).transpose()?;
        Ok(Self { kernel, initramfs })
    }

    /// Whether they are still what the machine was booted with. Files that were removed or replaced are: they are held.
    ///
    /// # Errors
    /// [`BootError::Changed`], when somebody has written into one.
    pub fn check(&self) -> Result<(), BootError> {
        self.kernel.check()?;
        self.initramfs.as_ref().map_or(Ok(()), image::BootFile::check)
    }
}

/// Loads everything into RAM at `ram` and gives the state of the boot processor. `rsdp` is where the ACPI tables start.
///
/// # Errors
/// When a file cannot be read, is not what it is said to be, or does not fit.
pub fn load(
    files: &BootFiles,
    command_line: &str,
    memory: &GuestMemoryMmap,
    ram: &[Span],
    rsdp: u64,
) -> Result<CpuState, BootError> {
    let kernel = image::load_kernel(&files.kernel, memory, ram)?;
    let initramfs = match &files.initramfs {
        Some(file) => Some(image::load_initramfs(file, memory, ram, &kernel)?),
        None => None,
    };
    entry::command_line(command_line, memory, kernel.command_line_max)?;
    let map = memory_map(ram);
    match kernel.entry {
        image::Entry::Pvh(rip) => entry::pvh(memory, rip, initramfs, &map, rsdp),
        image::Entry::Linux64 { rip, header } => entry::linux64(memory, rip, *header, initramfs, &map, rsdp),
    }
}
