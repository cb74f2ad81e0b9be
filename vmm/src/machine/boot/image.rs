//! Reads kernel and initramfs into guest memory.
//!
//! Their files are opened once for a machine and read again at each reset: a reset starts what the machine was booted with,
//! also where the names have been removed or given to other files since.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, blank, place};
use crate::machine::layout::Span;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Highest end of an initramfs that every kernel can reach (Linux boot protocol, `initrd_addr_max` of 2.03).
const INITRAMFS_END_MAX: u64 = 0x8000_0000;
/// `HdrS` at 0x202 of a bzImage.
const BZIMAGE_MAGIC: (u64, [u8; 4]) = (0x202, *b"HdrS");
/// `XLF_KERNEL_64`: there is an entry point at 0x200 for 64-bit mode.
const XLF_KERNEL_64: u16 = 1;
/// Distance of that entry point from the start of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// Longest command line of an ELF kernel, terminating zero included (`COMMAND_LINE_SIZE` on x86).
const ELF_COMMAND_LINE_MAX: usize = 2048;

/// How a kernel starts.
pub(super) enum Entry {
    /// 32-bit protected mode, paging off.
    Pvh(u64),
    /// Long mode, with the setup header of the image.
    Linux64 {
        /// Entry point.
        rip: u64,
        /// From the image.
        header: Box<setup_header>,
    },
}

/// A loaded kernel.
pub(super) struct Kernel {
    /// How it starts.
    pub(super) entry: Entry,
    /// One past what it occupies, now or while it unpacks itself.
    pub(super) end: u64,
    /// Highest end of an initramfs.
    pub(super) initramfs_end_max: u64,
    /// Longest command line with its zero.
    pub(super) command_line_max: usize,
}

/// Where an initramfs was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initramfs {
    /// Its addresses, without padding.
    pub(super) span: Span,
}

/// A file that a machine boots from, held open.
#[derive(Debug)]
pub(super) struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
    /// Length and time of the last change when it was opened.
    was: (u64, SystemTime),
}

impl BootFile {
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let failed = |source| BootError::Read { what, path: path.into(), source };
        let file = File::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(std::io::Error::other("it is not a regular file")));
        }
        let was = version(&file).map_err(failed)?;
        Ok(Self { what, path: path.into(), file, was })
    }

    /// Whether it is still what was opened: somebody may have written into the very same file.
    ///
    /// # Errors
    /// [`BootError::Changed`].
    pub(super) fn check(&self) -> Result<(), BootError> {
        match version(&self.file) {
            Ok(now) if now == self.was => Ok(()),
            Ok(_) => Err(BootError::Changed { what: self.what, path: self.path.clone() }),
            Err(source) => Err(BootError::Read { what: self.what, path: self.path.clone(), source }),
        }
    }
}

fn version(file: &File) -> std::io::Result<(u64, SystemTime)> {
    let metadata = file.metadata()?;
    Ok((metadata.len(), metadata.modified()?))
}

/// Reads up to `into.len()` bytes at `offset`; a short file gives fewer.
fn peek(mut file: &File, path: &Path, offset: u64, into: &mut [u8]) -> Result<usize, BootError> {
    let failed = |source| BootError::Read { what: "kernel", path: path.into(), source };
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let mut filled = 0;
    while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest).map_err(failed)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// The RAM below the PCI hole.
fn low_end(ram: &[Span]) -> u64 {
    ram.first().map_or(0, |span| span.end())
}

pub(super) fn load_kernel(from: &BootFile, memory: &GuestMemoryMmap, ram: &[Span]) -> Result<Kernel, BootError> {
    let BootFile { path, file, .. } = from;
    // Of the same open file, with which it shares its position: each of these says where it reads.
    let own = || file.try_clone().map_err(|source| BootError::Read { what: "kernel", path: path.clone(), source });
    let mut magic = [0; 4];
    let elf = peek(file, path, 0, &mut magic)? == 4 && magic == *b"\x7fELF";
    let kernel = if elf {
        let kernel = load_elf(path, &mut own()?, memory)?;
        blank::unfilled(file, memory, low_end(ram));
        kernel
    } else {
        let found = peek(file, path, BZIMAGE_MAGIC.0, &mut magic)? == 4 && magic == BZIMAGE_MAGIC.1;
        if !found {
            return Err(BootError::NotAKernel { path: path.into() });
        }
        load_bzimage(path, &mut own()?, memory)?
    };
    let have = low_end(ram);
    if kernel.end > have {
        let needed = kernel.end.div_ceil(MIB);
        return Err(BootError::KernelTooLarge { path: path.into(), needed, have: have / MIB });
    }
    Ok(kernel)
}

fn damaged(path: &Path) -> impl Fn(linux_loader::loader::Error) -> BootError {
    move |error| BootError::Damaged { path: path.into(), reason: error.to_string() }
}

fn load_elf(path: &Path, file: &mut File, memory: &GuestMemoryMmap) -> Result<Kernel, BootError> {
    let loaded = Elf::load(memory, None, file, None).map_err(damaged(path))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(Kernel {
            entry: Entry::Pvh(entry.0),
            end: loaded.kernel_end,
            initramfs_end_max: INITRAMFS_END_MAX,
            command_line_max: ELF_COMMAND_LINE_MAX,
        }),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(BootError::NoPvh { path: path.into() })
        }
    }
}

fn load_bzimage(path: &Path, file: &mut File, memory: &GuestMemoryMmap) -> Result<Kernel, BootError> {
    let high = Some(GuestAddress(place::HIGH_MEMORY));
    let loaded = BzImage::load(memory, None, file, high).map_err(damaged(path))?;
    let header = loaded.setup_header.unwrap_or_default();
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64Bit { path: path.into() });
    }
    let told = u64::from(header.syssize) * 16;
    if loaded.kernel_end - loaded.kernel_load.0 < told {
        return Err(BootError::Damaged { path: path.into(), reason: "it is cut short".into() });
    }
    // The kernel unpacks itself to where it prefers to be, or to where it was loaded if that is higher, and needs
    // `init_size` bytes from there on.
    let runs_at = header.pref_address.max(loaded.kernel_load.0);
    let end = runs_at.saturating_add(u64::from(header.init_size)).max(loaded.kernel_end);
    Ok(Kernel {
        entry: Entry::Linux64 { rip: loaded.kernel_load.0 + ENTRY_64, header: Box::new(header) },
        end,
        initramfs_end_max: u64::from(header.initrd_addr_max).saturating_add(1).min(INITRAMFS_END_MAX),
        command_line_max: (header.cmdline_size as usize).saturating_add(1),
    })
}

/// Puts the initramfs as high as it may be, so that the kernel has room to unpack itself below.
pub(super) fn load_initramfs(
    from: &BootFile,
    memory: &GuestMemoryMmap,
    ram: &[Span],
    kernel: &Kernel,
) -> Result<Initramfs, BootError> {
    let BootFile { path, file, .. } = from;
    let failed = |source| BootError::Read { what: "initramfs", path: path.into(), source };
    let mut file = file.try_clone().map_err(failed)?;
    file.rewind().map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let top = low_end(ram).min(kernel.initramfs_end_max) & !(PAGE - 1);
    let start = top.checked_sub(len).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel.end);
    let Some(start) = start else {
        let room = top.saturating_sub(kernel.end) / MIB;
        return Err(BootError::InitramfsTooLarge { path: path.into(), size: len.div_ceil(MIB), room });
    };
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .map_err(|error| failed(std::io::Error::other(error)))?;
    Ok(Initramfs { span: Span { start, len } })
}
