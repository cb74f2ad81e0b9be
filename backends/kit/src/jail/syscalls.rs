//! The seccomp allow-list.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::JailError;

/// What a serving device needs. Not in it, on purpose: anything that opens a path or makes a socket, a process, a
/// thread or an io_uring, and `io_uring_register`.
const ALLOWED: &[i64] = &[
    // I/O on what is open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_io_uring_enter,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_fcntl,
    // The conversation.
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_ppoll,
    // Guest memory, in-flight regions, dirty logs, the heap.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
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
    libc::SYS_tgkill,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same for a process that listens: front ends come, and the socket file goes.
const ALLOWED_LISTENING: &[i64] = &[libc::SYS_accept4, libc::SYS_unlink, libc::SYS_unlinkat];

/// Restricts all threads. A call that is not allowed ends the process.
pub(super) fn restrict(listens: bool, accepts: bool, ioctls: &[u64]) -> Result<(), JailError> {
    let failed = |e: &dyn std::fmt::Display| JailError::Seccomp(e.to_string());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    if listens {
        rules.extend(ALLOWED_LISTENING.iter().map(|call| (*call, Vec::new())));
    }
    if accepts {
        rules.insert(libc::SYS_accept4, Vec::new());
    }
    // Memory never becomes code.
    let not_code = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|e| failed(&e))?;
    rules.insert(libc::SYS_mmap, vec![not_code.clone()]);
    rules.insert(libc::SYS_mprotect, vec![not_code]);
    // A starting thread sets its name.
    let name = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|e| failed(&e))?;
    rules.insert(libc::SYS_prctl, vec![name]);
    if !ioctls.is_empty() {
        let one = |request: &u64| {
            SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *request)
                .and_then(|condition| SeccompRule::new(vec![condition]))
                .map_err(|e| failed(&e))
        };
        rules.insert(libc::SYS_ioctl, ioctls.iter().map(one).collect::<Result<_, _>>()?);
    }
    // `statx` only on a descriptor: an empty path cannot be seen here, but landlock hides all paths.
    rules.insert(libc::SYS_statx, Vec::new());
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
        .map_err(|e| failed(&e))?;
    let program = BpfProgram::try_from(filter).map_err(|e| failed(&e))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|e| failed(&e))
}
