//! What a disk is stored on: a file, a block device, or nothing at all (for measuring).
//!
//! The storage is opened, checked and measured once; afterwards it is plain data that the queue threads share.
//! Whether it can be driven without blocking is probed, not guessed: tmpfs refuses RWF_NOWAIT, so that every
//! request through an io_uring would take a detour over a worker thread there; a plain system call on the queue's own
//! thread costs half as much.

#![allow(unsafe_code, reason = "inherited descriptors, block device ioctls and vectored I/O on guest memory")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use atoll_kit::memory::Transfer;
use rustix::fs::{FallocateFlags, OFlags};
use thiserror::Error;

use crate::bounce::Bounce;
use crate::qcow2::file::Align;
use crate::qcow2::header;
use crate::qcow2::image::{Chain, Format, Image, ImageError, Layer};

/// Bytes of a virtio sector, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;

/// What to open.
#[derive(Debug, Clone)]
pub enum Source {
    /// A path.
    Path(PathBuf),
    /// A descriptor that was inherited.
    Fd(RawFd),
    /// Nothing, of this many bytes.
    Null(u64),
}

/// Why an image cannot be served. Each says what to do about it.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It is not there.
    #[error("there is no image {0}: check the path, or create one with `truncate -s 1G {0}`")]
    Missing(String),
    /// It may not be written.
    #[error("image {0} cannot be opened for writing: change its permissions or use --read-only")]
    ReadOnly(String),
    /// Any other failure to open it.
    #[error("cannot open image {name}: {reason}")]
    Open {
        /// Path or descriptor.
        name: String,
        /// What the kernel said.
        reason: String,
    },
    /// Neither a file nor a block device.
    #[error("image {0} is neither a regular file nor a block device")]
    Kind(String),
    /// Its size is no multiple of a sector.
    #[error(
        "image {name} has {bytes} bytes, which is no multiple of {unit}: extend it with `truncate -s %{unit} {name}`"
    )]
    Odd {
        /// Path or descriptor.
        name: String,
        /// Its length.
        bytes: u64,
        /// What it must be a multiple of.
        unit: u64,
    },
    /// It has no bytes.
    #[error("image {0} is empty: give it a size with `truncate -s 1G {0}`")]
    Empty(String),
    /// Its file system cannot bypass the page cache.
    #[error("image {0} cannot be opened with O_DIRECT: its file system does not support it; leave out --direct")]
    NoDirect(String),
    /// Nobody said what it is, and it may be either.
    #[error(
        "image {0} begins with a qcow2 header and nobody said what it is: say --image-type qcow2, or --image-type raw if \
         a guest wrote that header onto its raw disk"
    )]
    Ambiguous(String),
    /// What is in it is not served.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// How requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// They succeed at once; reads leave the guest's buffers as they are.
    Null,
    /// By a system call on the queue's thread.
    Inline,
    /// By the queue's io_uring.
    Ring,
    /// Through the tables of a qcow2 image; data by a ring, or by system calls.
    Mapped {
        /// By the ring.
        ring: bool,
    },
}

/// What direct I/O demands, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlign {
    /// Of buffers.
    pub memory: usize,
    /// Of offsets and lengths.
    pub offset: u64,
}

/// An opened image.
#[derive(Debug)]
pub struct Storage {
    file: Option<Arc<File>>,
    name: String,
    bytes: AtomicU64,
    read_only: bool,
    engine: Engine,
    direct: Option<DirectAlign>,
    block_bytes: u32,
    chain: Option<Chain>,
    /// Bytes of a cluster of the qcow2 image; 0 without one, or as long as nothing of it was read.
    cluster: AtomicU64,
    image: OnceLock<Image>,
}

/// What a qcow2 image stands on: descriptors that were inherited.
#[derive(Debug, Clone, Default)]
pub struct Beneath {
    /// Another file with its data.
    pub data: Option<RawFd>,
    /// Backing files, nearest first.
    pub backing: Vec<(RawFd, Format)>,
}

impl Storage {
    /// Opens and checks `source`, which is raw.
    pub fn open(source: &Source, read_only: bool, direct: bool) -> Result<Self, OpenError> {
        Self::open_raw(source, read_only, direct, true)
    }

    /// The same for an image of which nobody said that it is raw: one that begins like qcow2 is refused.
    pub fn guess(source: &Source, read_only: bool, direct: bool) -> Result<Self, OpenError> {
        Self::open_raw(source, read_only, direct, false)
    }

    fn open_raw(source: &Source, read_only: bool, direct: bool, sure: bool) -> Result<Self, OpenError> {
        let (file, name) = match source {
            Source::Null(bytes) => return Self::null(*bytes, read_only),
            Source::Path(path) => (open_path(path, read_only, direct)?, path.display().to_string()),
            Source::Fd(fd) => adopt(*fd, read_only, direct)?,
        };
        let failed = |e: io::Error| OpenError::Open { name: name.clone(), reason: e.to_string() };
        let meta = file.metadata().map_err(failed)?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(OpenError::Kind(name));
        }
        if !sure && looks_like_qcow2(&file) {
            return Err(OpenError::Ambiguous(name));
        }
        let bytes = length(&file).map_err(failed)?;
        let direct = direct.then(|| direct_align(&file));
        let block_bytes = match direct {
            Some(align) => align.offset.max(SECTOR_BYTES) as u32,
            None if block_device => logical_block_bytes(file.as_fd()).max(SECTOR_BYTES as u32),
            None => SECTOR_BYTES as u32,
        };
        let unit = u64::from(block_bytes);
        if bytes == 0 {
            return Err(OpenError::Empty(name));
        }
        if !bytes.is_multiple_of(unit) {
            return Err(OpenError::Odd { name, bytes, unit });
        }
        let engine = if refuses_nowait(&file) { Engine::Inline } else { Engine::Ring };
        let bytes = AtomicU64::new(bytes);
        let file = Some(Arc::new(file));
        let cluster = AtomicU64::new(0);
        Ok(Self {
            file,
            name,
            bytes,
            read_only,
            engine,
            direct,
            block_bytes,
            chain: None,
            cluster,
            image: OnceLock::new(),
        })
    }

    /// Opens a qcow2 image, of which nothing is read before [`Storage::read_tables`].
    pub fn open_qcow2(source: &Source, beneath: &Beneath, read_only: bool, direct: bool) -> Result<Self, OpenError> {
        let (file, name) = match source {
            Source::Null(_) => return Err(OpenError::Kind("(null)".to_owned())),
            Source::Path(path) => (open_path(path, read_only, direct)?, path.display().to_string()),
            Source::Fd(fd) => adopt(*fd, read_only, direct)?,
        };
        let layer = |file: File, name: String, format| -> Result<Layer, OpenError> {
            let kind = file.metadata().map_err(|e| OpenError::Open { name: name.clone(), reason: e.to_string() })?;
            if !kind.is_file() && !kind.file_type().is_block_device() {
                return Err(OpenError::Kind(name));
            }
            Ok(Layer { file: Arc::new(file), name, format })
        };
        let top = layer(file, name.clone(), Format::Qcow2)?;
        let data = beneath.data.map(|fd| adopt(fd, read_only, direct)).transpose()?;
        let data = data.map(|(file, name)| layer(file, name, Format::Raw)).transpose()?;
        let mut backing = Vec::new();
        for (fd, format) in &beneath.backing {
            let (file, name) = adopt(*fd, true, direct)?;
            backing.push(layer(file, name, *format)?);
        }
        let files = || std::iter::once(&top).chain(&data).chain(&backing);
        // One alignment for all: the strictest.
        let direct = direct.then(|| {
            files().map(|layer| direct_align(&layer.file)).fold(DirectAlign { memory: 1, offset: 1 }, |a, b| {
                DirectAlign { memory: a.memory.max(b.memory), offset: a.offset.max(b.offset) }
            })
        });
        let align = direct.map_or(Align::NONE, |a| Align { memory: a.memory, offset: a.offset });
        let block_bytes = align.offset.max(SECTOR_BYTES) as u32;
        let ring = !files().any(|layer| refuses_nowait(&layer.file));
        let (file, bytes) = (Some(Arc::clone(&top.file)), AtomicU64::new(0));
        let chain = Some(Chain { top, data, backing, read_only, align });
        let engine = Engine::Mapped { ring };
        let cluster = AtomicU64::new(0);
        Ok(Self { file, name, bytes, read_only, engine, direct, block_bytes, chain, cluster, image: OnceLock::new() })
    }

    /// Reads and checks the tables of a qcow2 image. To be called once nobody else can change them any more.
    pub fn read_tables(&self) -> Result<(), OpenError> {
        let Some(chain) = &self.chain else { return Ok(()) };
        let image = Image::open(chain)?;
        let (bytes, unit) = (image.bytes(), u64::from(self.block_bytes));
        if !bytes.is_multiple_of(unit) {
            return Err(OpenError::Odd { name: self.name.clone(), bytes, unit });
        }
        self.bytes.store(bytes, Ordering::Release);
        self.cluster.store(image.cluster(), Ordering::Release);
        let _ = self.image.set(image);
        Ok(())
    }

    /// Learns the size of a qcow2 image and of its clusters from its header and nothing else: another process serves it.
    pub fn read_header(&self) -> Result<(), OpenError> {
        let Some(chain) = &self.chain else { return Ok(()) };
        let (bytes, cluster) = Image::shape(chain)?;
        self.bytes.store(bytes, Ordering::Release);
        self.cluster.store(cluster, Ordering::Release);
        Ok(())
    }

    /// The qcow2 image, if it is one.
    pub fn image(&self) -> Option<&Image> {
        self.image.get()
    }

    /// All files of a qcow2 image but itself, and whether each is only read.
    pub fn beneath(&self) -> impl Iterator<Item = (&Layer, bool)> {
        let chain = self.chain.as_ref();
        let data = chain.and_then(|chain| chain.data.as_ref()).map(|layer| (layer, self.read_only));
        data.into_iter().chain(chain.into_iter().flat_map(|chain| &chain.backing).map(|layer| (layer, true)))
    }

    fn null(bytes: u64, read_only: bool) -> Result<Self, OpenError> {
        let name = "(null)".to_owned();
        if bytes == 0 {
            return Err(OpenError::Empty(name));
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::Odd { name, bytes, unit: SECTOR_BYTES });
        }
        let (engine, block_bytes) = (Engine::Null, SECTOR_BYTES as u32);
        let bytes = AtomicU64::new(bytes);
        Ok(Self {
            file: None,
            name,
            bytes,
            read_only,
            engine,
            direct: None,
            block_bytes,
            chain: None,
            cluster: AtomicU64::new(0),
            image: OnceLock::new(),
        })
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The open file, unless there is none.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Looks at its length anew. A length that no disk can have leaves things as they are.
    ///
    /// Requests that are under way have been checked against the old end: what lies behind the new one fails in the file.
    pub fn measure(&self) -> Result<u64, OpenError> {
        let Some(file) = self.file.as_ref().filter(|_| self.chain.is_none()) else { return Ok(self.bytes()) };
        let name = || self.name.clone();
        let bytes = length(file).map_err(|e| OpenError::Open { name: name(), reason: e.to_string() })?;
        let unit = u64::from(self.block_bytes);
        match bytes {
            0 => Err(OpenError::Empty(name())),
            _ if !bytes.is_multiple_of(unit) => Err(OpenError::Odd { name: name(), bytes, unit }),
            _ => {
                self.bytes.store(bytes, Ordering::Relaxed);
                Ok(bytes)
            }
        }
    }

    /// True when writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// How requests are carried out.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// What direct I/O demands, when it is used.
    pub fn direct(&self) -> Option<DirectAlign> {
        self.direct
    }

    /// Smallest unit that the guest should address.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// What a discard should be a multiple of.
    pub fn clear_bytes(&self) -> u64 {
        match self.cluster.load(Ordering::Relaxed) {
            0 => self.block_bytes.into(),
            cluster => cluster,
        }
    }

    /// The descriptor for operations on a ring, -1 when there is none.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_ref().map_or(-1, |file| file.as_raw_fd())
    }

    /// Reads into all of `transfer` from `offset` on.
    pub fn read_inline(&self, transfer: &mut Transfer, offset: u64) -> io::Result<()> {
        let fd = self.raw_fd();
        // SAFETY: the iovec points into mapped guest memory, which may change under the kernel's hands.
        whole(transfer, offset, |iov, n, at| unsafe { libc::preadv(fd, iov, n, at) })
    }

    /// Writes all of `transfer` at `offset`.
    pub fn write_inline(&self, transfer: &mut Transfer, offset: u64, durable: bool) -> io::Result<()> {
        let fd = self.raw_fd();
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: as for reads.
        whole(transfer, offset, |iov, n, at| unsafe { libc::pwritev2(fd, iov, n, at, flags) })
    }

    /// Makes all completed writes durable.
    pub fn flush_inline(&self) -> io::Result<()> {
        Ok(self.file.as_ref().map_or(Ok(()), rustix::fs::fdatasync)?)
    }

    /// fallocate on the queue's thread.
    pub fn fallocate_inline(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        Ok(self.file.as_ref().map_or(Ok(()), |file| rustix::fs::fallocate(&**file, mode, offset, len))?)
    }

    /// Writes zeroes on the queue's thread.
    pub fn zero_inline(&self, mut offset: u64, len: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let Some(file) = &self.file else { return Ok(()) };
        let end = offset.saturating_add(len);
        while offset < end {
            let part = usize::try_from(end - offset).unwrap_or(usize::MAX).min(ZEROES.len());
            match rustix::io::pwrite(file, ZEROES.get(..part).unwrap_or(&ZEROES), offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => offset += n as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whether a file begins like a qcow2 image. Aligned, because it may be open for direct I/O.
fn looks_like_qcow2(file: &File) -> bool {
    let mut start = Bounce::new(4096, 4096);
    let start = start.part(4096);
    matches!(rustix::io::pread(file, &mut *start, 0), Ok(4..)) && start.starts_with(&header::MAGIC)
}

/// Whether a file system lacks an operation.
pub(crate) fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOSYS))
}

/// Bytes up to the end of a file or block device. Its position is of no interest: all I/O names its offset.
fn length(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?)
}

/// Most entries of an iovec in one system call (UIO_MAXIOV).
pub const IOV_MAX: u32 = 1024;

/// Reads into `transfer` from `offset` of `file` on, and gives how many bytes there were before its end.
pub(crate) fn read_to_end(file: &File, transfer: &mut Transfer, offset: u64) -> io::Result<u64> {
    let fd = file.as_raw_fd();
    // SAFETY: the iovec points into mapped guest memory, which may change under the kernel's hands.
    as_far(transfer, offset, |iov, n, at| unsafe { libc::preadv(fd, iov, n, at) })
}

/// Writes all of `transfer` at `offset` of `file`.
pub(crate) fn write_to(file: &File, transfer: &mut Transfer, offset: u64) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: as for reads.
    whole(transfer, offset, |iov, n, at| unsafe { libc::pwritev(fd, iov, n, at) })
}

fn whole(transfer: &mut Transfer, offset: u64, call: impl Fn(*const libc::iovec, i32, i64) -> isize) -> io::Result<()> {
    as_far(transfer, offset, call)?;
    // The file has become shorter than it was.
    if transfer.iovec().1 == 0 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Moves bytes until all are moved, or none can be.
fn as_far(
    transfer: &mut Transfer,
    offset: u64,
    call: impl Fn(*const libc::iovec, i32, i64) -> isize,
) -> io::Result<u64> {
    let mut done = 0;
    loop {
        let (iov, n) = transfer.iovec();
        if n == 0 {
            return Ok(done);
        }
        let moved = call(iov, n.min(IOV_MAX) as i32, offset.saturating_add(done).cast_signed());
        match usize::try_from(moved) {
            Ok(0) => return Ok(done),
            Ok(bytes) => {
                transfer.advance(bytes);
                done += bytes as u64;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn open_path(path: &Path, read_only: bool, direct: bool) -> Result<File, OpenError> {
    let name = path.display().to_string();
    let flags = libc::O_CLOEXEC | if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path).map_err(|e| {
        match (e.kind(), e.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => OpenError::Missing(name),
            (_, Some(libc::EINVAL)) if direct => OpenError::NoDirect(name),
            (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem, _) if !read_only => {
                OpenError::ReadOnly(name)
            }
            (_, Some(libc::EISDIR)) => OpenError::Kind(name),
            _ => OpenError::Open { name, reason: e.to_string() },
        }
    })
}

fn adopt(fd: RawFd, read_only: bool, direct: bool) -> Result<(File, String), OpenError> {
    let name = name_of(fd);
    let failed = |reason: String| OpenError::Open { name: name.clone(), reason };
    // SAFETY: only asks for the flags of a number; nothing is owned yet.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(failed("no such descriptor was inherited".to_owned()));
    }
    // SAFETY: the descriptor is open, was passed for this purpose on the command line and is taken over once.
    let file = unsafe { File::from_raw_fd(fd) };
    let _ = rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC);
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.to_string()))?;
    if flags.contains(OFlags::PATH) {
        return Err(failed("it was opened with O_PATH: open it for reading or writing".to_owned()));
    }
    let access = flags & OFlags::ACCMODE;
    if access == OFlags::WRONLY {
        return Err(failed("it was opened for writing only".to_owned()));
    }
    if access == OFlags::RDONLY && !read_only {
        return Err(OpenError::ReadOnly(name));
    }
    if direct && rustix::fs::fcntl_setfl(&file, flags | OFlags::DIRECT).is_err() {
        return Err(OpenError::NoDirect(name));
    }
    Ok((file, name))
}

/// The path behind a descriptor, which tells people more than its number.
fn name_of(fd: RawFd) -> String {
    match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(path) if path.is_absolute() => path.display().to_string(),
        _ => format!("descriptor {fd}"),
    }
}

/// The demands of direct I/O as the kernel states them, else those that every device meets.
fn direct_align(file: &File) -> DirectAlign {
    let fallback = DirectAlign { memory: 4096, offset: 512 };
    // SAFETY: `out` is plain data, filled by the call.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH asks for the descriptor itself.
    let done =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut out) };
    if done == 0 && out.stx_mask & libc::STATX_DIOALIGN != 0 && out.stx_dio_offset_align > 0 {
        DirectAlign { memory: out.stx_dio_mem_align.max(1) as usize, offset: u64::from(out.stx_dio_offset_align) }
    } else {
        fallback
    }
}

fn logical_block_bytes(fd: BorrowedFd<'_>) -> u32 {
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), BLKSSZGET, &raw mut bytes) } == 0 { bytes.cast_unsigned() } else { 512 }
}

/// True when the file system knows no I/O that returns instead of waiting.
fn refuses_nowait(file: &File) -> bool {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Page([0; 4096]);
    let iov = libc::iovec { iov_base: page.0.as_mut_ptr().cast(), iov_len: page.0.len() };
    // SAFETY: the iovec points to the page on the stack.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const iov, 1, 0, libc::RWF_NOWAIT) };
    read < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP)
}
