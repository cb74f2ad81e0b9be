//! Guest memory: a sealed memfd, mapped here and by the device.

use std::fs::File;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Guest memory from address 0 on.
#[derive(Debug)]
pub struct Guest {
    map: MmapRegion<()>,
    file: File,
}

impl Guest {
    /// `bytes` of memory, zeroed.
    pub fn new(bytes: usize) -> Result<Self> {
        let fd = rustix::fs::memfd_create(c"guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = File::from(fd);
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).context("map guest memory")?;
        Ok(Self { map, file })
    }

    /// Somebody else's memory, whose file holds `bytes` of it from address 0 on.
    pub fn over(file: File, bytes: usize) -> Result<Self> {
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).context("map guest memory")?;
        Ok(Self { map, file })
    }

    /// The same memory once more, for who plays a device in another thread.
    pub fn again(&self) -> Result<Self> {
        let (file, bytes) = (self.file.try_clone()?, self.map.size());
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).context("map guest memory")?;
        Ok(Self { map, file })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.map.size()
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Loads an integer.
    pub fn load<T: AtomicAccess>(&self, addr: u64) -> T {
        self.map.as_volatile_slice().load(addr as usize, Ordering::Acquire).expect("a guest address")
    }

    /// Stores an integer.
    pub fn store<T: AtomicAccess>(&self, addr: u64, value: T) {
        self.map.as_volatile_slice().store(value, addr as usize, Ordering::Release).expect("a guest address");
    }

    /// Copies out.
    pub fn read(&self, addr: u64, out: &mut [u8]) {
        self.map.as_volatile_slice().read_slice(out, addr as usize).expect("a guest address");
    }

    /// Copies in.
    pub fn write(&self, addr: u64, data: &[u8]) {
        self.map.as_volatile_slice().write_slice(data, addr as usize).expect("a guest address");
    }
}
