//! Who may do what: one table for all device processes, so that it can be read, and audited, in one place.
//!
//! A profile is data. The filter is made of it in `syscalls`, the rings of its opcodes by whoever drives them; the test of
//! hostile backends tries everything else against these same values.

use io_uring::opcode;

/// What a kind of device needs once it serves.
#[derive(Debug, PartialEq, Eq)]
pub struct Profile {
    /// Name of the kind, for people.
    pub name: &'static str,
    /// System calls besides those that every process of the kit makes.
    pub calls: &'static [i64],
    /// Requests of `ioctl`, on what is open by then.
    pub ioctls: &'static [u64],
    /// io_uring opcodes besides polls.
    pub opcodes: &'static [u8],
    /// It translates programs while it serves: memory that was written may become code, which cannot be written any more.
    pub makes_code: bool,
    /// Most bytes of its heap and stacks. What it maps of a guest is shared and does not count.
    pub heap_bytes_max: u64,
}

/// What every process of the kit needs, with any argument. Not in it, on purpose: anything that opens a path or makes a
/// socket, a process, a thread or an io_uring, and `io_uring_register`. What is allowed with some arguments only
/// (`mmap`, `mprotect`, `madvise`, `fcntl`, `prctl`, `tgkill`, `ioctl`) is in `syscalls`.
pub(super) const EVERYBODY: &[i64] = &[
    // Eventfds, sidecar, bus and standard streams.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_close,
    // The heap.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    // Threads that exist (the youngest may still be starting), time, signals, the end.
    libc::SYS_futex,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    // Two threads that end the process at once: the standard library has the second one wait so.
    libc::SYS_pause,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same for a process that speaks vhost-user: its rings, guest memory, in-flight regions that it makes for front ends
/// that have none.
macro_rules! vhost_user {
    ($($more:expr),* $(,)?) => {
        &[
            libc::SYS_io_uring_enter,
            libc::SYS_memfd_create,
            libc::SYS_ftruncate,
            libc::SYS_fstat,
            // On a descriptor: an empty path cannot be told from others here, but landlock and the empty root hide all.
            libc::SYS_statx,
            libc::SYS_lseek,
            $($more),*
        ]
    };
}

const MIB: u64 = 1 << 20;

impl Profile {
    /// A disk: reads and writes beside the ring where that is faster, holes, flushes.
    pub const BLK: Self = Self {
        name: "blk",
        calls: vhost_user![
            libc::SYS_readv,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_fallocate,
            libc::SYS_fdatasync,
            libc::SYS_fsync,
        ],
        ioctls: &[],
        opcodes: &[
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            // A turn of its own for a request that waits for others of its batch.
            opcode::Nop::CODE,
        ],
        makes_code: false,
        // Bounce buffers of 64 queues.
        heap_bytes_max: 2048 * MIB,
    };

    /// An NVMe controller: what a disk needs.
    pub const NVME: Self = Self { name: "nvme", heap_bytes_max: 512 * MIB, ..Self::BLK };

    /// Reads the header of an image, says what is in it, and ends.
    pub const PROBE: Self = Self {
        name: "probe",
        calls: &[libc::SYS_lseek, libc::SYS_pread64, libc::SYS_preadv],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        heap_bytes_max: 64 * MIB,
    };

    /// A network card on a stream, a switch or nothing, and captures.
    pub const NET: Self = Self {
        name: "net",
        calls: vhost_user![libc::SYS_readv, libc::SYS_pwrite64],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        heap_bytes_max: 512 * MIB,
    };

    /// A network card on a TAP, which is told what the guest's driver can take.
    pub const NET_TAP: Self =
        Self { name: "net-tap", ioctls: &[libc::TUNSETOFFLOAD, libc::TUNSETVNETHDRSZ, libc::TUNSETQUEUE], ..Self::NET };

    /// Entropy.
    pub const RNG: Self = Self {
        name: "rng",
        calls: vhost_user![],
        ioctls: &[],
        opcodes: &[opcode::Read::CODE],
        makes_code: false,
        heap_bytes_max: 64 * MIB,
    };

    /// A console, whose clients come to sockets of its own.
    pub const CONSOLE: Self = Self {
        name: "console",
        calls: vhost_user![libc::SYS_accept4],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        heap_bytes_max: 128 * MIB,
    };

    /// Sockets between guest and host: programs of the host come, and are reached at paths of one folder, which is entered
    /// before each connection because the root is empty.
    pub const VSOCK: Self = Self {
        name: "vsock",
        calls: vhost_user![
            libc::SYS_accept4,
            libc::SYS_connect,
            libc::SYS_fchdir,
            libc::SYS_epoll_ctl,
            libc::SYS_epoll_wait,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_pwait2,
        ],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        // 192 connections with 256 KiB of room each.
        heap_bytes_max: 256 * MIB,
    };

    /// A display without a renderer: pictures are in a memfd, whose pages are given back.
    pub const GPU: Self = Self {
        name: "gpu",
        calls: vhost_user![libc::SYS_fallocate],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        // One update of the largest picture, and what resources stand on.
        heap_bytes_max: 256 * MIB,
    };

    /// The same with a renderer, whose libraries are loaded and whose threads are there by then, and its compiler.
    pub const GPU_VIRGL: Self = Self {
        name: "gpu-virgl",
        makes_code: true,
        // Resources of 3D, what Mesa makes of them, stacks of its threads, its compiler.
        heap_bytes_max: 6144 * MIB,
        ..Self::GPU
    };

    /// A keyboard or a pointer: events come over one socket.
    pub const INPUT: Self = Self {
        name: "input",
        calls: vhost_user![],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        heap_bytes_max: 64 * MIB,
    };

    /// A screen: viewers come to sockets that were bound for it. No ring and no guest memory. What takes pictures makes
    /// memfds for them, and files that it is told to record to are open already.
    pub const DISPLAY: Self = Self {
        name: "display",
        calls: &[
            libc::SYS_accept4,
            libc::SYS_setsockopt,
            libc::SYS_epoll_ctl,
            libc::SYS_epoll_wait,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_pwait2,
            libc::SYS_memfd_create,
            libc::SYS_ftruncate,
            libc::SYS_fstat,
            libc::SYS_statx,
            libc::SYS_lseek,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
        ],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        // Pictures of the guest, and for each viewer what it has not read yet.
        heap_bytes_max: 1024 * MIB,
    };

    /// A serial port on the bus: no ring and no guest memory.
    pub const UART: Self = Self {
        name: "uart",
        calls: &[libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_fstat],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        heap_bytes_max: 64 * MIB,
    };

    /// A device that nobody has a profile for: what a ring and files need.
    pub const GENERIC: Self = Self {
        name: "generic",
        calls: vhost_user![
            libc::SYS_readv,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_fallocate,
            libc::SYS_fdatasync,
            libc::SYS_fsync,
            libc::SYS_accept4,
        ],
        ioctls: &[],
        opcodes: &[],
        makes_code: false,
        heap_bytes_max: 2048 * MIB,
    };

    /// All of them.
    pub const ALL: [&'static Self; 14] = [
        &Self::BLK,
        &Self::NVME,
        &Self::PROBE,
        &Self::NET,
        &Self::NET_TAP,
        &Self::RNG,
        &Self::CONSOLE,
        &Self::VSOCK,
        &Self::GPU,
        &Self::GPU_VIRGL,
        &Self::INPUT,
        &Self::DISPLAY,
        &Self::UART,
        &Self::GENERIC,
    ];

    /// Whether it drives rings.
    pub(super) fn has_rings(&self) -> bool {
        self.calls.contains(&libc::SYS_io_uring_enter)
    }
}
