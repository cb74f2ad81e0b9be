//! One exec: what happens between fork and the child's first instruction.
#![allow(unsafe_code, reason = "code between fork and exec: std offers it only as an unsafe hook")]

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, set_parent_process_death_signal};

use super::event::SpawnError;
use super::spec::{BackendSpec, JailPolicy, PassedFd};

/// A child that has been started.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) process: std::process::Child,
    pub(super) pidfd: OwnedFd,
    /// Our end of the sidecar.
    pub(super) sidecar: OwnedFd,
    /// Its standard output and error.
    pub(super) output: PipeReader,
}

/// A child of any kind that has been started.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) process: std::process::Child,
    pub(super) pidfd: OwnedFd,
    /// Its standard output and error.
    pub(super) output: PipeReader,
}

/// Starts a device process as a child of the calling thread: it dies when that thread ends, so the thread must be one
/// that stays.
///
/// When this returns, the VMM's copies of everything that was passed are closed.
pub(super) fn launch(spec: BackendSpec, jail: JailPolicy) -> Result<Launched, SpawnError> {
    let (sidecar, childs_sidecar) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| SpawnError::Plumbing { name: spec.name.clone(), source: errno.into() })?;
    let mut fds = spec.fds;
    fds.push(PassedFd { flag: "--sidecar-fd".to_owned(), fd: childs_sidecar });
    let mut command = Command::new(&spec.exe);
    command.args(&spec.args).env_clear().envs(spec.env);
    if jail == JailPolicy::Off {
        command.arg("--jail=off");
    }
    let Started { process, pidfd, output } = start(&spec.name, command, fds)?;
    Ok(Launched { process, pidfd, sidecar, output })
}

/// Starts `command` with the descriptors that it is to inherit, in a process group of its own.
pub(super) fn start(name: &str, mut command: Command, fds: Vec<PassedFd>) -> Result<Started, SpawnError> {
    let plumbing = |source: io::Error| SpawnError::Plumbing { name: name.to_owned(), source };
    let exe = PathBuf::from(command.get_program());
    if is_no_program(&exe) {
        let source = io::Error::from_raw_os_error(libc::ENOEXEC);
        return Err(SpawnError::Exec { name: name.to_owned(), exe, source });
    }
    let (output, childs_output) = io::pipe().map_err(plumbing)?;
    rustix::io::ioctl_fionbio(&output, true).map_err(|errno| plumbing(errno.into()))?;
    let childs_errors = childs_output.try_clone().map_err(plumbing)?;
    let mut kept = Vec::with_capacity(fds.len());
    for PassedFd { flag, fd } in fds {
        // Numbers below 3 are the child's standard streams.
        let fd =
            if fd.as_raw_fd() < 3 { fcntl_dupfd_cloexec(&fd, 3).map_err(|errno| plumbing(errno.into()))? } else { fd };
        let number = fd.as_raw_fd().to_string();
        if flag.contains('=') {
            command.arg(flag + &number);
        } else {
            command.arg(flag).arg(number);
        }
        kept.push(fd);
    }
    command.stdin(Stdio::null()).stdout(childs_output).stderr(childs_errors);
    // A group of its own: Ctrl-C on the VMM's terminal is for the VMM, which then ends its children in order.
    command.process_group(0);
    let numbers: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = getpid();
    // SAFETY: the hook runs in the forked child, where only async-signal-safe work is sound. It makes plain system calls
    // on values that were prepared before the fork; it takes no lock and allocates nothing.
    unsafe {
        command.pre_exec(move || prepare(&numbers, parent));
    }
    let spawned = command.spawn();
    // Also drops the hook and the child's ends of the pipe.
    drop(command);
    drop(kept);
    let mut process = spawned.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => SpawnError::Missing { name: name.to_owned(), exe: exe.clone() },
        _ => SpawnError::Exec { name: name.to_owned(), exe: exe.clone(), source },
    })?;
    // Not reaped yet, so the number is still this child's.
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid.ok_or(rustix::io::Errno::SRCH).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    match pidfd {
        Ok(pidfd) => Ok(Started { process, pidfd, output }),
        Err(errno) => {
            // Without a pidfd it could not be watched.
            let _ = process.kill();
            let _ = process.wait();
            Err(plumbing(errno.into()))
        }
    }
}

/// Whether a file is neither an ELF program nor a script that names its interpreter. The C library hands what the kernel does
/// not execute to a shell, as a script; a text that happens to be executable is no device process.
fn is_no_program(exe: &Path) -> bool {
    let mut start = [0; 4];
    let read = File::open(exe).and_then(|mut file| file.read(&mut start));
    // What cannot be read may still be executed; the kernel says more about it.
    read.is_ok_and(|read| !matches!(start.get(..read), Some([b'#', b'!', ..] | [0x7f, b'E', b'L', b'F'])))
}

/// Runs between fork and exec.
fn prepare(numbers: &[RawFd], parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A parent that died before that line left us to somebody else, and no signal will come.
    if getppid() != Some(parent) {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    // Whatever some library opened without close-on-exec stays here as well.
    // SAFETY: the call takes numbers only, and marks descriptors; it closes none.
    let marked = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    for number in numbers {
        // SAFETY: the parent holds these descriptors until after the fork, so in the child they are open until exec.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        fcntl_setfd(fd.as_fd(), FdFlags::empty())?;
    }
    Ok(())
}
