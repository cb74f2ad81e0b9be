//! Everything forbidden that a system call can do.

use std::ffi::CStr;

use super::Victim;

/// One thing to try.
#[derive(Clone, Copy)]
pub struct Attempt {
    /// What it is called in the table.
    pub name: &'static str,
    /// Other walls than the filter must withstand it, too.
    pub walls: bool,
    /// Tries it; gives what the kernel gives.
    pub run: fn(&Victim) -> i64,
}

/// Attempts that succeed, and do no harm, where there is no jail: it is the jail that they fail by.
pub const CONTROL: &[&str] = &[
    "openat a file",
    "openat by a stray directory",
    "stat",
    "socket, local",
    "socket, internet",
    "connect to an abstract socket",
    "connect to a port",
    "fork",
    "clone",
    "clone3",
    "kill",
    "pidfd_open",
    "prctl dumpable",
    "io_uring_setup",
    "map memory as code",
    "map a file as code",
    "make memory code",
    "pipe",
    "dup",
    "eventfd",
    "epoll",
];

/// Makes a system call; a negated error, or what it gave.
fn call(number: i64, arguments: &[usize]) -> i64 {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: pointers among the arguments are valid for what the kernel would do with them; what it would break, this
    // process is there to break.
    let result =
        unsafe { libc::syscall(number, argument(0), argument(1), argument(2), argument(3), argument(4), argument(5)) };
    if result == -1 { -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)) } else { result }
}

fn text(text: &CStr) -> usize {
    text.as_ptr() as usize
}

const CWD: usize = libc::AT_FDCWD as usize;
const PAGE: usize = 4096;
/// Room for what the kernel writes or reads, zeroed.
const ROOM: usize = 4096;

/// Calls with zeroed memory to read from or write to.
fn with_room(number: i64, arguments: impl Fn(usize) -> Vec<usize>) -> i64 {
    let mut room = vec![0_u64; ROOM / 8];
    call(number, &arguments(room.as_mut_ptr() as usize))
}

fn abstract_address(victim: &Victim) -> (libc::sockaddr_un, usize) {
    // SAFETY: all zeroes are an address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path.iter_mut().skip(1).zip(victim.abstract_name.bytes()) {
        *to = from.cast_signed();
    }
    (address, 3 + victim.abstract_name.len())
}

fn connect_abstract(victim: &Victim) -> i64 {
    let socket = call(libc::SYS_socket, &[libc::AF_UNIX as usize, libc::SOCK_STREAM as usize, 0]);
    if socket < 0 {
        return socket;
    }
    let (address, length) = abstract_address(victim);
    call(libc::SYS_connect, &[socket as usize, (&raw const address) as usize, length])
}

fn connect_tcp(victim: &Victim) -> i64 {
    let socket = call(libc::SYS_socket, &[libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0]);
    if socket < 0 {
        return socket;
    }
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: victim.port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    };
    call(libc::SYS_connect, &[socket as usize, (&raw const address) as usize, size_of_val(&address)])
}

/// Memory of the victim process, to or from ours.
fn foreign_memory(number: i64, victim: &Victim) -> i64 {
    let mut ours = [0_u8; 16];
    // The victim has forked this process: what is there is at the same address.
    let (local, remote) = (
        libc::iovec { iov_base: ours.as_mut_ptr().cast(), iov_len: ours.len() },
        libc::iovec { iov_base: std::ptr::from_ref(victim).cast_mut().cast(), iov_len: ours.len() },
    );
    call(number, &[victim.pid as usize, (&raw const local) as usize, 1, (&raw const remote) as usize, 1, 0])
}

fn exec_mapping(victim: &Victim) -> i64 {
    let protection = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    call(libc::SYS_mmap, &[0, PAGE, protection, libc::MAP_PRIVATE as usize, victim.program as usize, 0])
}

fn exec_anonymous(_: &Victim) -> i64 {
    let protection = (libc::PROT_WRITE | libc::PROT_EXEC) as usize;
    call(libc::SYS_mmap, &[0, PAGE, protection, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize, usize::MAX, 0])
}

fn make_executable(number: i64) -> i64 {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    let page = call(libc::SYS_mmap, &[0, PAGE, protection, flags, usize::MAX, 0]);
    if page < 0 {
        return page;
    }
    call(number, &[page as usize, PAGE, (libc::PROT_READ | libc::PROT_EXEC) as usize, usize::MAX])
}

fn clone3(_: &Victim) -> i64 {
    // struct clone_args: flags, …, exit_signal in the fifth word.
    let arguments = [0_u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    ended_if_child(call(libc::SYS_clone3, &[arguments.as_ptr() as usize, size_of_val(&arguments)]))
}

/// A child that should not be must not go on as if it were its parent.
fn ended_if_child(result: i64) -> i64 {
    if result == 0 {
        // SAFETY: nothing of the parent's must be cleaned up twice.
        unsafe { libc::_exit(0) }
    }
    result
}

/// The call numbers of another kind of program: none of them is looked up in our table.
fn as_x32(_: &Victim) -> i64 {
    call(libc::SYS_getpid | 0x4000_0000, &[])
}

fn as_i386(_: &Victim) -> i64 {
    let result: i64;
    // SAFETY: getpid by the numbers of 32-bit programs (20); it touches no memory.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("rax") 20_i64 => result, out("r8") _, out("r9") _, out("r10") _,
            out("r11") _, options(nostack));
    }
    result
}

macro_rules! attempts {
    ($($walls:ident $name:literal: $run:expr;)*) => {
        /// All of them. `walls`: the rest of the jail withstands it without the filter, too.
        pub const ATTEMPTS: &[Attempt] =
            &[$(Attempt { name: $name, walls: attempts!(@$walls), run: $run }),*];
    };
    (@walls) => { true };
    (@filter) => { false };
}

const RW: usize = libc::O_RDWR as usize;
const CREATE: usize = (libc::O_RDWR | libc::O_CREAT) as usize;

attempts! {
    // Files.
    walls "open a file": |_| call(libc::SYS_open, &[text(c"/etc/passwd"), 0]);
    walls "openat a file": |_| call(libc::SYS_openat, &[CWD, text(c"/etc/passwd"), 0]);
    walls "openat by a stray directory": |v| call(libc::SYS_openat, &[v.root as usize, text(c"etc/passwd"), 0]);
    walls "openat2 by a stray directory": |v| with_room(libc::SYS_openat2, |how| vec![v.root as usize, text(c"etc/passwd"), how, 24]);
    walls "openat the victim's file": |v| call(libc::SYS_openat, &[CWD, text(&v.path), RW]);
    walls "create a file": |_| call(libc::SYS_openat, &[CWD, text(c"/tmp/escaped"), CREATE, 0o600]);
    walls "create by a stray directory": |v| call(libc::SYS_openat, &[v.root as usize, text(c"tmp/escaped"), CREATE, 0o600]);
    walls "creat": |_| call(libc::SYS_creat, &[text(c"escaped"), 0o600]);
    walls "truncate": |v| call(libc::SYS_truncate, &[text(&v.path), 0]);
    walls "unlink": |v| call(libc::SYS_unlink, &[text(&v.path)]);
    walls "unlinkat": |v| call(libc::SYS_unlinkat, &[CWD, text(&v.path), 0]);
    walls "rename": |v| call(libc::SYS_rename, &[text(&v.path), text(c"/tmp/escaped")]);
    walls "link": |v| call(libc::SYS_link, &[text(&v.path), text(c"/tmp/escaped")]);
    walls "symlink": |v| call(libc::SYS_symlink, &[text(&v.path), text(c"/tmp/escaped")]);
    walls "mkdir": |_| call(libc::SYS_mkdir, &[text(c"/tmp/escaped"), 0o700]);
    walls "mknod": |_| call(libc::SYS_mknod, &[text(c"/tmp/escaped"), (libc::S_IFCHR | 0o600) as usize, 0x101]);
    walls "chmod": |v| call(libc::SYS_chmod, &[text(&v.path), 0o777]);
    walls "chown": |v| call(libc::SYS_chown, &[text(&v.path), 1, 1]);
    walls "setxattr": |v| call(libc::SYS_setxattr, &[text(&v.path), text(c"user.a"), text(c"b"), 1, 0]);
    walls "stat": |v| with_room(libc::SYS_stat, |to| vec![text(&v.path), to]);
    walls "readlink": |_| with_room(libc::SYS_readlink, |to| vec![text(c"/proc/self/exe"), to, ROOM]);
    walls "access": |v| call(libc::SYS_access, &[text(&v.path), 0]);
    walls "chdir": |_| call(libc::SYS_chdir, &[text(c"/etc")]);
    filter "fchdir to a stray directory": |v| call(libc::SYS_fchdir, &[v.root as usize]);
    filter "getdents of a stray directory": |v| with_room(libc::SYS_getdents64, |to| vec![v.root as usize, to, ROOM]);
    walls "open_by_handle_at": |v| with_room(libc::SYS_open_by_handle_at, |handle| vec![v.root as usize, handle, 0]);
    filter "name_to_handle_at": |v| with_room(libc::SYS_name_to_handle_at, |to| vec![v.root as usize, text(c"etc"), to, to + 256, 0]);
    filter "inotify": |_| call(libc::SYS_inotify_init1, &[0]);
    filter "fanotify": |_| call(libc::SYS_fanotify_init, &[0, 0]);
    walls "mount": |_| call(libc::SYS_mount, &[text(c"tmpfs"), text(c"/"), text(c"tmpfs"), 0, 0]);
    walls "umount": |_| call(libc::SYS_umount2, &[text(c"/"), libc::MNT_DETACH as usize]);
    walls "pivot_root": |_| call(libc::SYS_pivot_root, &[text(c"/"), text(c"/")]);
    walls "chroot": |_| call(libc::SYS_chroot, &[text(c"/")]);
    walls "fsopen": |_| call(libc::SYS_fsopen, &[text(c"tmpfs"), 0]);
    walls "open_tree, cloned": |v| call(libc::SYS_open_tree, &[v.root as usize, text(c"."), 1]);
    walls "move_mount": |v| call(libc::SYS_move_mount, &[v.root as usize, text(c"."), CWD, text(c"/"), 0]);
    walls "swapon": |v| call(libc::SYS_swapon, &[text(&v.path), 0]);
    walls "quotactl": |v| call(libc::SYS_quotactl, &[0x80_0002, text(&v.path), 0, 0]);

    // Sockets.
    filter "socket, local": |_| call(libc::SYS_socket, &[libc::AF_UNIX as usize, 1, 0]);
    filter "socket, internet": |_| call(libc::SYS_socket, &[libc::AF_INET as usize, 1, 0]);
    filter "socket, netlink": |_| call(libc::SYS_socket, &[libc::AF_NETLINK as usize, 3, 0]);
    walls "socket, packets": |_| call(libc::SYS_socket, &[libc::AF_PACKET as usize, 3, 0]);
    filter "socket, vsock": |_| call(libc::SYS_socket, &[libc::AF_VSOCK as usize, 1, 0]);
    filter "socketpair": |_| with_room(libc::SYS_socketpair, |to| vec![libc::AF_UNIX as usize, 1, 0, to]);
    walls "connect to an abstract socket": connect_abstract;
    walls "connect to a port": connect_tcp;
    filter "bind": |v| with_room(libc::SYS_bind, |address| vec![v.event as usize, address, 2]);
    filter "listen": |v| call(libc::SYS_listen, &[v.event as usize, 1]);

    // Programs and processes.
    walls "execve": |_| call(libc::SYS_execve, &[text(c"/bin/true"), 0, 0]);
    filter "execveat of memory": |v| call(libc::SYS_execveat, &[v.program as usize, text(c""), 0, 0, libc::AT_EMPTY_PATH as usize]);
    filter "fork": |_| ended_if_child(call(libc::SYS_fork, &[]));
    filter "clone": |_| ended_if_child(call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0]));
    filter "clone3": clone3;
    walls "ptrace attach": |v| call(libc::SYS_ptrace, &[libc::PTRACE_ATTACH as usize, v.pid as usize]);
    walls "ptrace seize": |v| call(libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, v.pid as usize]);
    walls "kill": |v| call(libc::SYS_kill, &[v.pid as usize, 0]);
    filter "kill everybody": |_| call(libc::SYS_kill, &[usize::MAX, 0]);
    walls "tgkill": |v| call(libc::SYS_tgkill, &[v.pid as usize, v.pid as usize, 0]);
    walls "tkill": |v| call(libc::SYS_tkill, &[v.pid as usize, 0]);
    walls "rt_sigqueueinfo": |v| with_room(libc::SYS_rt_sigqueueinfo, |info| vec![v.pid as usize, 0, info]);
    filter "pidfd_open": |v| call(libc::SYS_pidfd_open, &[v.pid as usize, 0]);
    filter "pidfd_send_signal": |v| call(libc::SYS_pidfd_send_signal, &[v.event as usize, 0, 0, 0]);
    filter "pidfd_getfd": |v| call(libc::SYS_pidfd_getfd, &[v.event as usize, 0, 0]);
    walls "process_vm_readv": |v| foreign_memory(libc::SYS_process_vm_readv, v);
    walls "process_vm_writev": |v| foreign_memory(libc::SYS_process_vm_writev, v);
    walls "process_madvise": |v| with_room(libc::SYS_process_madvise, |iov| vec![v.event as usize, iov, 1, libc::MADV_COLD as usize, 0]);
    walls "kcmp": |v| call(libc::SYS_kcmp, &[v.pid as usize, std::process::id() as usize, 0, 0, 0]);
    walls "migrate_pages": |v| with_room(libc::SYS_migrate_pages, |nodes| vec![v.pid as usize, 8, nodes, nodes]);
    filter "get_robust_list": |v| with_room(libc::SYS_get_robust_list, |to| vec![v.pid as usize, to, to + 8]);
    filter "sched_setaffinity": |v| with_room(libc::SYS_sched_setaffinity, |mask| vec![v.pid as usize, 8, mask]);
    filter "sched_setscheduler": |v| with_room(libc::SYS_sched_setscheduler, |to| vec![v.pid as usize, libc::SCHED_FIFO as usize, to]);
    filter "setpriority": |v| call(libc::SYS_setpriority, &[0, v.pid as usize, 19]);
    filter "prlimit": |v| with_room(libc::SYS_prlimit64, |to| vec![v.pid as usize, libc::RLIMIT_NOFILE as usize, 0, to]);
    walls "limits raised": |_| {
        let most = [u64::MAX, u64::MAX];
        call(libc::SYS_prlimit64, &[0, libc::RLIMIT_CORE as usize, most.as_ptr() as usize, 0])
    };
    filter "setpgid": |_| call(libc::SYS_setpgid, &[0, 0]);
    filter "setsid": |_| call(libc::SYS_setsid, &[]);

    // Rights and namespaces.
    walls "setns": |v| call(libc::SYS_setns, &[v.network as usize, libc::CLONE_NEWNET as usize]);
    filter "unshare user": |_| call(libc::SYS_unshare, &[libc::CLONE_NEWUSER as usize]);
    walls "unshare mounts": |_| call(libc::SYS_unshare, &[libc::CLONE_NEWNS as usize]);
    walls "capset": |_| {
        let (header, data) = ([0x2008_0522_u32, 0], [u32::MAX; 6]);
        call(libc::SYS_capset, &[header.as_ptr() as usize, data.as_ptr() as usize])
    };
    filter "setuid": |_| call(libc::SYS_setresuid, &[0, 0, 0]);
    walls "setgroups": |_| call(libc::SYS_setgroups, &[0, 0]);
    filter "prctl dumpable": |_| call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1, 0, 0, 0]);
    filter "prctl death signal": |_| call(libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG as usize, 0, 0, 0, 0]);
    walls "prctl new privileges": |_| call(libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS as usize, 0, 0, 0, 0]);
    filter "prctl subreaper": |_| call(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER as usize, 1, 0, 0, 0]);
    walls "prctl ambient capability": |_| call(libc::SYS_prctl, &[libc::PR_CAP_AMBIENT as usize, libc::PR_CAP_AMBIENT_RAISE as usize, 21, 0, 0]);
    filter "prctl memory map": |_| call(libc::SYS_prctl, &[libc::PR_SET_MM as usize, 1, PAGE, 0, 0]);
    filter "arch_prctl": |_| with_room(libc::SYS_arch_prctl, |to| vec![0x1003, to]);
    filter "personality": |_| call(libc::SYS_personality, &[0x40_0000]);
    filter "seccomp": |_| with_room(libc::SYS_seccomp, |to| vec![2, 0, to]);
    filter "landlock": |_| call(libc::SYS_landlock_create_ruleset, &[0, 0, 1]);
    filter "keyctl": |_| call(libc::SYS_keyctl, &[0, usize::MAX - 2, 1]);
    filter "add_key": |_| call(libc::SYS_add_key, &[text(c"user"), text(c"escaped"), text(c"x"), 1, usize::MAX - 2]);
    filter "request_key": |_| call(libc::SYS_request_key, &[text(c"user"), text(c"escaped"), 0, 0]);

    // The kernel.
    walls "bpf": |_| with_room(libc::SYS_bpf, |attributes| vec![0, attributes, 64]);
    filter "perf_event_open": |_| with_room(libc::SYS_perf_event_open, |attributes| vec![attributes, 0, usize::MAX, usize::MAX, 0]);
    filter "userfaultfd": |_| call(libc::SYS_userfaultfd, &[0]);
    walls "init_module": |_| call(libc::SYS_init_module, &[text(c""), 0, text(c"")]);
    walls "finit_module": |v| call(libc::SYS_finit_module, &[v.program as usize, text(c""), 0]);
    walls "delete_module": |_| call(libc::SYS_delete_module, &[text(c"no_such_module"), 0]);
    walls "kexec_load": |_| call(libc::SYS_kexec_load, &[0, 0, 0, 0]);
    walls "reboot": |_| call(libc::SYS_reboot, &[0xfee1_dead, 672_274_793, 0, 0]);
    walls "sethostname": |_| call(libc::SYS_sethostname, &[text(c"escaped"), 7]);
    filter "clock_settime": |_| call(libc::SYS_clock_settime, &[0, 0]);
    walls "iopl": |_| call(libc::SYS_iopl, &[3]);
    walls "ioperm": |_| call(libc::SYS_ioperm, &[0x60, 1, 1]);
    walls "vhangup": |_| call(libc::SYS_vhangup, &[]);
    walls "acct": |v| call(libc::SYS_acct, &[text(&v.path)]);
    filter "modify_ldt": |_| with_room(libc::SYS_modify_ldt, |to| vec![0, to, 64]);

    // Rings.
    filter "io_uring_setup": |_| with_room(libc::SYS_io_uring_setup, |parameters| vec![4, parameters]);
    filter "io_uring_register": |v| call(libc::SYS_io_uring_register, &[v.event as usize, 0, 0, 0]);
    filter "io_setup (old aio)": |_| with_room(libc::SYS_io_setup, |to| vec![4, to]);

    // Memory.
    filter "map a file as code": exec_mapping;
    filter "map memory as code": exec_anonymous;
    filter "make memory code": |_| make_executable(libc::SYS_mprotect);
    filter "make memory code with a key": |_| make_executable(libc::SYS_pkey_mprotect);
    filter "memfd_secret": |_| call(libc::SYS_memfd_secret, &[0]);
    filter "madvise hwpoison": |v| call(libc::SYS_madvise, &[v.path.as_ptr() as usize & !(PAGE - 1), PAGE, libc::MADV_HWPOISON as usize]);
    filter "madvise mergeable": |v| call(libc::SYS_madvise, &[v.path.as_ptr() as usize & !(PAGE - 1), PAGE, libc::MADV_MERGEABLE as usize]);
    filter "remap_file_pages": |_| call(libc::SYS_remap_file_pages, &[0, PAGE, 0, 0, 0]);
    filter "mlock": |v| call(libc::SYS_mlock, &[v.path.as_ptr() as usize, 1]);
    filter "shared memory, System V": |_| call(libc::SYS_shmget, &[0, PAGE, 0o1600]);
    filter "queues, System V": |_| call(libc::SYS_msgget, &[0, 0o1600]);
    filter "queues, POSIX": |_| call(libc::SYS_mq_open, &[text(c"escaped"), CREATE, 0o600, 0]);

    // Descriptors.
    filter "pipe": |_| with_room(libc::SYS_pipe2, |to| vec![to, 0]);
    filter "dup": |v| call(libc::SYS_dup, &[v.event as usize]);
    filter "dup over another": |v| call(libc::SYS_dup2, &[v.event as usize, 1]);
    filter "eventfd": |_| call(libc::SYS_eventfd2, &[0, 0]);
    filter "epoll": |_| call(libc::SYS_epoll_create1, &[0]);
    filter "timerfd": |_| call(libc::SYS_timerfd_create, &[1, 0]);
    filter "signalfd": |_| with_room(libc::SYS_signalfd4, |mask| vec![usize::MAX, mask, 8, 0]);
    filter "splice": |v| call(libc::SYS_splice, &[v.event as usize, 0, v.program as usize, 0, 1, 0]);
    filter "vmsplice": |v| with_room(libc::SYS_vmsplice, |iov| vec![v.event as usize, iov, 1, 0]);
    filter "sendfile": |v| call(libc::SYS_sendfile, &[v.event as usize, v.program as usize, 0, 8]);
    filter "copy_file_range": |v| call(libc::SYS_copy_file_range, &[v.program as usize, 0, v.program as usize, 0, 8, 0]);
    filter "ioctl: push input back": |_| call(libc::SYS_ioctl, &[0, libc::TIOCSTI as usize, text(c"x")]);
    filter "ioctl: bytes there": |v| with_room(libc::SYS_ioctl, |to| vec![v.event as usize, libc::FIONREAD as usize, to]);
    filter "fcntl: signals to others": |v| call(libc::SYS_fcntl, &[v.event as usize, libc::F_SETOWN as usize, v.pid as usize]);
    filter "fcntl: lease": |v| call(libc::SYS_fcntl, &[v.program as usize, libc::F_SETLEASE as usize, 0]);
    filter "fcntl: a process' own lock": |v| with_room(libc::SYS_fcntl, |lock| vec![v.program as usize, libc::F_SETLK as usize, lock]);
    filter "flock": |v| call(libc::SYS_flock, &[v.program as usize, libc::LOCK_EX as usize]);
    filter "fadvise": |v| call(libc::SYS_fadvise64, &[v.program as usize, 0, 0, 4]);
    filter "syncfs": |v| call(libc::SYS_syncfs, &[v.program as usize]);

    // Numbers of other kinds of programs.
    filter "a call by x32 number": as_x32;
    filter "a call of i386": as_i386;
}
