//! The lists. Not in any of them: to execute, fork, trace, mount, load, make rings, or make memory code.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition as Condition, SeccompRule,
};

use super::ThreadClass;
use crate::vfio::{EVENT_CALLS, VCPU_CALLS};

/// What every thread does: wait, wake, use the heap and descriptors that are open, log, end.
const EVERYBODY: &[i64] = &[
    libc::SYS_read,
    // An eventfd's count, without ever blocking.
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    // Two threads that end the process at once: the standard library has the second one wait so.
    libc::SYS_pause,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // A thread that starts another one, and that one's first steps. The other filter answers `clone3`.
    libc::SYS_clone3,
    // Answered with an error, too, but for those who look after devices: the C library reads a setting of the kernel when it
    // gives memory back, and takes no for an answer.
    libc::SYS_openat,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    // Telling the time from a file's size, as logs that go to files do.
    libc::SYS_fstat,
    libc::SYS_lseek,
];

/// Words over a socket that is open, and memory to pass over it.
const SOCKETS: &[i64] = &[
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
];

/// Clients come to a socket with a name, which goes with the socket if it is still its own.
const LISTENER: &[i64] =
    &[libc::SYS_accept4, libc::SYS_statx, libc::SYS_newfstatat, libc::SYS_unlink, libc::SYS_unlinkat];

/// What a vCPU does to ask another process for a register.
const QUESTIONS: &[i64] = &[libc::SYS_futex_waitv, libc::SYS_sendmsg, libc::SYS_shutdown];

/// Registers of functions of the host.
const FUNCTIONS: &[i64] = &[libc::SYS_pread64, libc::SYS_pwrite64];

const EVENTS: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait, libc::SYS_epoll_ctl, libc::SYS_eventfd2];

/// What a new incarnation of a device needs: its image by name, sockets, an in-flight region; and the end of the last one.
const INCARNATION: &[i64] = &[
    libc::SYS_statx,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_pipe2,
    // An image that grows; an in-flight region that is cleared.
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_newfstatat,
    // Of somebody else's backend.
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_waitid,
    libc::SYS_flock,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
];

const FCNTLS: &[libc::c_int] = &[
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_GET_SEALS,
    libc::F_ADD_SEALS,
];
const MADVICES: &[libc::c_int] =
    &[libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP];
/// Names of threads; `PR_SET_VMA` gives names to memory; what the kernel told at the start, where the clock's code is.
const PRCTLS: &[libc::c_int] = &[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA, PR_GET_AUXV];
/// Linux 6.4.
const PR_GET_AUXV: libc::c_int = 0x4155_5856;
/// Terminals and sockets: blocking or not, bytes there, attributes, which are put back at the end.
const LINE_IOCTLS: &[libc::c_ulong] =
    &[libc::FIONBIO, libc::FIONREAD, libc::TCGETS, libc::TCSETS, libc::TCSETSW, libc::TCSETSF, libc::TIOCGWINSZ];

/// How a thread that speaks for a device raises its interrupt on KVM, where the chips are in the kernel: a wire
/// (KVM_IRQ_LINE), a message (KVM_SIGNAL_MSI).
const KVM_INTERRUPTS: [libc::c_ulong; 2] = [0x4008_ae61, 0x4020_aea5];

/// How a function of the host is taken away from a guest on KVM that does not let it go: its registers' memory slots
/// (KVM_SET_USER_MEMORY_REGION), its interrupts (KVM_IRQFD, KVM_SET_GSI_ROUTING).
const KVM_TAKING: [libc::c_ulong; 3] = [0x4020_ae46, 0x4020_ae76, 0x4008_ae6a];

pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn when(argument: u8, compare: Compare, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![Condition::new(argument, Length::Dword, compare, value)?])
}

fn one_of(argument: u8, values: &[libc::c_int]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|value| when(argument, Compare::Eq, u64::from(value.cast_unsigned()))).collect()
}

fn requests(requests: &[libc::c_ulong]) -> Result<Vec<SeccompRule>, BackendError> {
    requests.iter().map(|request| when(1, Compare::Eq, *request)).collect()
}

fn freely(rules: &mut Rules, calls: &[i64]) {
    rules.extend(calls.iter().map(|call| (*call, Vec::new())));
}

/// What threads of `class` may do.
pub(super) fn rules(class: ThreadClass) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    freely(&mut rules, EVERYBODY);
    let not_code = when(2, Compare::MaskedEq(libc::PROT_EXEC as u64), 0)?;
    rules.insert(libc::SYS_mmap, vec![not_code.clone()]);
    rules.insert(libc::SYS_mprotect, vec![not_code]);
    rules.insert(libc::SYS_madvise, one_of(2, MADVICES)?);
    rules.insert(libc::SYS_fcntl, one_of(1, FCNTLS)?);
    rules.insert(libc::SYS_prctl, one_of(0, PRCTLS)?);
    // To itself and its siblings only: a kick of a vCPU, an abort.
    rules.insert(libc::SYS_tgkill, vec![when(0, Compare::Eq, u64::from(std::process::id()))?]);
    // A thread of this process, in no namespace of its own.
    let thread = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND).cast_unsigned();
    let spaces = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID;
    let looked_at = u64::from(thread | spaces.cast_unsigned());
    rules.insert(libc::SYS_clone, vec![when(0, Compare::MaskedEq(looked_at), thread.into())?]);
    match class {
        // Halted, it waits for interrupts by itself.
        ThreadClass::SoftVcpu => {
            freely(&mut rules, &[libc::SYS_epoll_ctl, libc::SYS_epoll_wait]);
            freely(&mut rules, QUESTIONS);
            // How much memory its caches take, in huge pages or small ones.
            freely(&mut rules, &[libc::SYS_mincore]);
            freely(&mut rules, FUNCTIONS);
            rules.insert(libc::SYS_ioctl, requests(&VCPU_CALLS)?);
        }
        ThreadClass::KvmVcpu => {
            // The requests of KVM (type 0xae), on descriptors of KVM: interrupt routes change as a guest's driver sets its
            // vectors, on the vCPU's thread.
            let mut calls = vec![when(1, Compare::MaskedEq(0xff00), 0xae00)?];
            calls.extend(requests(&VCPU_CALLS)?);
            rules.insert(libc::SYS_ioctl, calls);
            freely(&mut rules, FUNCTIONS);
            freely(&mut rules, &[libc::SYS_eventfd2, libc::SYS_epoll_ctl]);
            freely(&mut rules, QUESTIONS);
        }
        ThreadClass::Events => {
            freely(&mut rules, EVENTS);
            // Functions of the host: their lines, and what of memory they reach behind an IOMMU.
            rules.insert(libc::SYS_ioctl, requests(&[&EVENT_CALLS[..], &KVM_INTERRUPTS, &KVM_TAKING].concat())?);
        }
        ThreadClass::Talk => {
            freely(&mut rules, SOCKETS);
            rules.insert(libc::SYS_ioctl, requests(&KVM_INTERRUPTS)?);
        }
        ThreadClass::Device => {
            // The threads that it starts to talk put their own filter on, over this one.
            freely(&mut rules, &[libc::SYS_seccomp]);
            rules.insert(libc::SYS_prctl, one_of(0, &[PRCTLS, &[libc::PR_SET_NO_NEW_PRIVS]].concat())?);
            for calls in [SOCKETS, EVENTS, INCARNATION] {
                freely(&mut rules, calls);
            }
            // A route of an interrupt on KVM; a socket that does not wait.
            let kvm = when(1, Compare::MaskedEq(0xff00), 0xae00)?;
            rules.insert(libc::SYS_ioctl, vec![kvm, when(1, Compare::Eq, libc::FIONBIO)?]);
        }
        ThreadClass::Line => {
            freely(&mut rules, SOCKETS);
            freely(&mut rules, EVENTS);
            // A signal that asks for the end is awaited like a key.
            freely(&mut rules, LISTENER);
            freely(&mut rules, &[libc::SYS_rt_sigtimedwait]);
            rules.insert(libc::SYS_ioctl, requests(&[LINE_IOCTLS, &KVM_INTERRUPTS].concat())?);
        }
        ThreadClass::Actors => {
            freely(&mut rules, SOCKETS);
            freely(&mut rules, EVENTS);
            rules.insert(libc::SYS_ioctl, requests(&KVM_INTERRUPTS)?);
        }
        ThreadClass::Operator => {
            freely(&mut rules, SOCKETS);
            freely(&mut rules, EVENTS);
            freely(&mut rules, LISTENER);
            rules.insert(libc::SYS_ioctl, vec![when(1, Compare::Eq, libc::FIONBIO)?]);
        }
    }
    Ok(rules)
}
