//! The seccomp allow-list, made of a profile.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::JailError;
use super::profile::{EVERYBODY, Profile};

/// The same for a process that listens: front ends come, and the socket file goes.
const LISTENING: &[i64] = &[libc::SYS_accept4, libc::SYS_unlinkat];

/// What `fcntl` may be asked: flags, copies, locks that belong to the file description, seals. Not owners, leases,
/// signals, nor locks that belong to a process.
const FCNTLS: &[libc::c_int] = &[
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_OFD_SETLK,
    libc::F_OFD_GETLK,
    libc::F_GET_SEALS,
    libc::F_ADD_SEALS,
];

/// What the kernel told at the start (Linux 6.4).
const PR_GET_AUXV: u64 = 0x4155_5856;

/// What the allocator says about memory.
const MADVICES: &[libc::c_int] = &[libc::MADV_DONTNEED, libc::MADV_FREE];

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}

/// One rule for each value that argument number `argument` may have.
fn one_of(argument: u8, values: impl IntoIterator<Item = u64>) -> Result<Vec<SeccompRule>, BackendError> {
    values.into_iter().map(|value| condition(argument, SeccompCmpOp::Eq, value)).collect()
}

/// The filter of `profile`, for this process. A call that is not allowed ends the process.
fn program(profile: &Profile, listens: bool) -> Result<BpfProgram, BackendError> {
    let freely = EVERYBODY.iter().chain(profile.calls).chain(if listens { LISTENING } else { &[] });
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = freely.map(|call| (*call, Vec::new())).collect();
    // Memory never becomes code; where there is a compiler, what it has written does, and cannot be written any more.
    let code = |mask: i32, is: i32| condition(2, SeccompCmpOp::MaskedEq(mask as u64), is as u64);
    let not_code = code(libc::PROT_EXEC, 0)?;
    let mut protections = vec![not_code.clone()];
    if profile.makes_code {
        protections.push(code(libc::PROT_EXEC | libc::PROT_WRITE, libc::PROT_EXEC)?);
    }
    rules.insert(libc::SYS_mmap, vec![not_code]);
    rules.insert(libc::SYS_mprotect, protections);
    rules.insert(libc::SYS_madvise, one_of(2, MADVICES.iter().map(|advice| *advice as u64))?);
    rules.insert(libc::SYS_fcntl, one_of(1, FCNTLS.iter().map(|command| *command as u64))?);
    // A starting thread sets its name; who asks for the time the first time asks where the code for that is.
    rules.insert(libc::SYS_prctl, one_of(0, [libc::PR_SET_NAME as u64, PR_GET_AUXV])?);
    // An abort is a signal to oneself.
    rules.insert(libc::SYS_tgkill, one_of(0, [u64::from(std::process::id())])?);
    // Who connects makes sockets, of this host only.
    if profile.calls.contains(&libc::SYS_connect) {
        rules.insert(libc::SYS_socket, one_of(0, [libc::AF_UNIX as u64])?);
    }
    if !profile.ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, one_of(1, profile.ioctls.iter().copied())?);
    }
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    filter.try_into()
}

/// Whether the kernel has filters at all.
pub(super) fn available() -> bool {
    #[allow(unsafe_code, reason = "a question to the kernel")]
    // SAFETY: it takes no pointer and changes nothing.
    let mode = unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) };
    mode >= 0
}

/// Restricts all threads.
pub(super) fn restrict(profile: &Profile, listens: bool) -> Result<(), JailError> {
    let failed = |e: &dyn std::fmt::Display| JailError::Seccomp(e.to_string());
    let program = program(profile, listens).map_err(|e| failed(&e))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|e| failed(&e))
}
