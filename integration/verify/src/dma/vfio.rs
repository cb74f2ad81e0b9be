//! As much of VFIO as it takes (Linux, `include/uapi/linux/vfio.h`): a container with one device, mappings, and registers
//! that are read and written through the device's descriptor.
#![allow(unsafe_code, reason = "VFIO is a handful of ioctls, and what is mapped for a device must stay where it is")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// What can be mapped.
pub const PAGE: usize = 4096;

const SET_IOMMU: libc::c_ulong = 0x3b66;
const GROUP_SET_CONTAINER: libc::c_ulong = 0x3b68;
const GROUP_GET_DEVICE: libc::c_ulong = 0x3b6a;
const REGION_INFO: libc::c_ulong = 0x3b6c;
const SET_IRQS: libc::c_ulong = 0x3b6e;
const MAP: libc::c_ulong = 0x3b71;
const UNMAP: libc::c_ulong = 0x3b72;
const TYPE1_V2: libc::c_ulong = 3;
/// The region of the configuration space; those of BARs are before it.
const CONFIG: u32 = 7;
/// Interrupts by MSI, told through an eventfd (VFIO_IRQ_SET_DATA_EVENTFD and _ACTION_TRIGGER).
const MSI: u32 = 1;
const BY_EVENTFD: u32 = 1 << 2 | 1 << 5;
const WAIT: Duration = Duration::from_secs(20);

#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: libc::c_int,
}

fn checked(result: libc::c_int, what: &str) -> io::Result<libc::c_int> {
    if result >= 0 {
        return Ok(result);
    }
    let error = io::Error::last_os_error();
    Err(io::Error::new(error.kind(), format!("{what}: {error}")))
}

fn named<T>(result: io::Result<T>, path: &Path) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// What a device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// Pages of this process that stay where they are.
pub struct Pages {
    start: *mut u8,
    len: usize,
}

impl Pages {
    /// So many pages of zeroes.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(count: usize) -> io::Result<Self> {
        let len = count * PAGE;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a mapping of its own, anywhere.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }
    /// Writes `bytes` from `at` on.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "beyond the pages");
        for (offset, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping; a device may write at the same time, and no reference to it exists.
            unsafe { self.start.add(at + offset).write_volatile(*byte) };
        }
    }
    /// Reads `N` bytes from `at` on.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= self.len, "beyond the pages");
        // SAFETY: as above.
        std::array::from_fn(|offset| unsafe { self.start.add(at + offset).read_volatile() })
    }
    /// Writes all of it.
    pub fn fill(&self, bytes: &[u8]) {
        self.write(0, bytes);
    }
    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        (0..self.len).map(|at| self.read::<1>(at)[0]).collect()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping that was made; the kernel keeps what a device has pinned.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// What a device reaches.
pub struct Container(File);

impl Container {
    /// An empty one.
    ///
    /// # Errors
    /// There is no VFIO.
    pub fn new() -> io::Result<Self> {
        let path = Path::new("/dev/vfio/vfio");
        Ok(Self(named(File::options().read(true).write(true).open(path), path)?))
    }

    /// Takes the device at `place` from its driver and puts its group into the container.
    ///
    /// # Errors
    /// The step that fails.
    pub fn device(&self, devices: &Path, place: &str) -> io::Result<Device> {
        let folder = devices.join(place);
        let write = |path: &Path, text: &str| named(std::fs::write(path, text), path);
        if folder.join("driver").exists() {
            write(&folder.join("driver/unbind"), place)?;
        }
        write(&folder.join("driver_override"), "vfio-pci")?;
        write(Path::new("/sys/bus/pci/drivers_probe"), place)?;
        let group = named(std::fs::read_link(folder.join("iommu_group")), &folder)?;
        let number = group.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let path = Path::new("/dev/vfio").join(number);
        let deadline = Instant::now() + WAIT;
        let group = loop {
            match File::options().read(true).write(true).open(&path) {
                // Its node is made a moment after the driver has it.
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                opened => break named(opened, &path)?,
            }
        };
        let container = self.0.as_raw_fd();
        let name = std::ffi::CString::new(place)?;
        // SAFETY: each has the argument that it wants: a descriptor's address, a number, a string; all outlive the call.
        let device = unsafe {
            checked(libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const container), "the container")?;
            checked(libc::ioctl(container, SET_IOMMU, TYPE1_V2), "an IOMMU of type 1")?;
            checked(libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE, name.as_ptr()), "the device")?
        };
        // SAFETY: it was just made, and is nobody else's.
        let file = unsafe { File::from_raw_fd(device) };
        Ok(Device { file, _group: group })
    }

    /// Lets the device reach `pages` at `iova`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(&self, iova: u64, pages: &Pages, rights: Rights) -> io::Result<()> {
        let flags = if rights == Rights::Read { 1 } else { 3 };
        let (vaddr, size) = (pages.start as u64, pages.len as u64);
        let request = DmaMap { argsz: size_of::<DmaMap>() as u32, flags, vaddr, iova, size };
        // SAFETY: the request is what the call wants and outlives it; the pages outlive the container's use by design of
        // VFIO, which pins them.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), MAP, &raw const request) }, "a mapping").map(drop)
    }

    /// Takes the page at `iova` back.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unmap(&self, iova: u64) -> io::Result<()> {
        let mut request = DmaUnmap { argsz: size_of::<DmaUnmap>() as u32, flags: 0, iova, size: PAGE as u64 };
        // SAFETY: the request is what the call wants and outlives it.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), UNMAP, &raw mut request) }, "an unmapping")?;
        let all = request.size == PAGE as u64;
        if all { Ok(()) } else { Err(io::Error::other(format!("{:#x} bytes were unmapped", request.size))) }
    }
}

/// A device that is driven from here.
pub struct Device {
    file: File,
    _group: File,
}

/// What a device sends by MSI.
pub struct Message(File);

impl Message {
    /// How many were sent since the last question, waiting for the first; none within `limit` is an error.
    ///
    /// # Errors
    /// None came, or the kernel's.
    pub fn sent(&mut self, limit: Duration) -> io::Result<u64> {
        let deadline = Instant::now() + limit;
        let mut count = [0; 8];
        loop {
            match self.0.read(&mut count) {
                Ok(8) => return Ok(u64::from_ne_bytes(count)),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Err(_) if Instant::now() > deadline => return Err(io::Error::other("no message came")),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// One region of its registers.
pub struct Region<'a> {
    file: &'a File,
    offset: u64,
}

impl Device {
    fn region(&self, index: u32) -> io::Result<Region<'_>> {
        let mut info = RegionInfo { argsz: size_of::<RegionInfo>() as u32, index, ..RegionInfo::default() };
        // SAFETY: the request is what the call wants and outlives it.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), REGION_INFO, &raw mut info) }, "a region")?;
        Ok(Region { file: &self.file, offset: info.offset })
    }
    /// Lets it send one message.
    ///
    /// # Errors
    /// It has no MSI, or the kernel's.
    pub fn message(&self) -> io::Result<Message> {
        // SAFETY: it makes a descriptor and reads nothing.
        let eventfd = checked(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) }, "an eventfd")?;
        // SAFETY: it was just made, and is nobody else's.
        let file = unsafe { File::from_raw_fd(eventfd) };
        let argsz = size_of::<IrqSet>() as u32;
        let request = IrqSet { argsz, flags: BY_EVENTFD, index: MSI, start: 0, count: 1, eventfd };
        // SAFETY: the request is what the call wants and outlives it.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), SET_IRQS, &raw const request) }, "MSI")?;
        Ok(Message(file))
    }
    /// Its configuration space.
    ///
    /// # Errors
    /// The kernel's.
    pub fn config(&self) -> io::Result<Region<'_>> {
        self.region(CONFIG)
    }
    /// What is behind a BAR.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bar(&self, number: u8) -> io::Result<Region<'_>> {
        self.region(number.into())
    }
}

impl Region<'_> {
    /// Reads a register.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read<const N: usize>(&self, at: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, self.offset + at)?;
        Ok(bytes)
    }
    /// Writes a register.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.offset + at)
    }
}
