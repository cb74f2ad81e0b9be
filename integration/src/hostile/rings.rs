//! Everything forbidden that a ring can do: requests pass no filter of system calls, so the ring itself must refuse.

use std::mem::transmute;
use std::os::fd::{AsRawFd, RawFd};

use atoll_kit::uring::Uring;
use io_uring::{opcode, squeue};

use super::{Outcome, Victim, outcome};

/// More than any kernel has: unknown ones are refused as such.
const OPCODES: u8 = 80;
/// More than any kernel has.
const REGISTRATIONS: libc::c_long = 48;
/// Names of opcodes by number, where they have one that says what harm they do.
const NAMES: &[(u8, &str)] = &[
    (6, "poll_add"),
    (9, "sendmsg"),
    (10, "recvmsg"),
    (13, "accept"),
    (16, "connect"),
    (17, "fallocate"),
    (18, "openat"),
    (19, "close"),
    (21, "statx"),
    (25, "madvise"),
    (28, "openat2"),
    (29, "epoll_ctl"),
    (30, "splice"),
    (31, "provide_buffers"),
    (33, "tee"),
    (35, "renameat"),
    (36, "unlinkat"),
    (37, "mkdirat"),
    (38, "symlinkat"),
    (39, "linkat"),
    (40, "msg_ring"),
    (42, "setxattr"),
    (45, "socket"),
    (46, "uring_cmd"),
    (47, "send_zc"),
    (50, "waitid"),
    (51, "futex_wait"),
    (54, "fixed_fd_install"),
    (55, "ftruncate"),
    (56, "bind"),
    (57, "listen"),
];

/// What opcode `number` is called.
#[must_use]
pub fn name(number: u8) -> String {
    let known = NAMES.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| format!("opcode {number}"), |(_, name)| (*name).to_owned())
}

/// A ring as a device's queue thread makes it, and its descriptor's number.
///
/// # Errors
/// There is none on this host.
pub fn open(opcodes: &[u8]) -> anyhow::Result<(Uring, RawFd)> {
    // The kernel gives the lowest free number.
    let number = std::fs::File::open("/dev/null")?.as_raw_fd();
    Ok((Uring::new(8, opcodes)?, number))
}

/// A request of 64 bytes with plausible arguments: a path, a descriptor, room.
fn request(number: u8, flags: u8, victim: &Victim, room: &mut [u8; 256]) -> squeue::Entry {
    let mut bytes = [0_u8; 64];
    let (path, at) = (victim.path.as_ptr() as u64, libc::AT_FDCWD);
    let (fd, address) = match number {
        18 | 21 | 28 | 35..=39 | 42 => (at, path),
        45 => (libc::AF_UNIX, 0),
        _ => (victim.event, room.as_mut_ptr() as u64),
    };
    let mut put = |at: usize, value: &[u8]| {
        if let Some(place) = bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    };
    put(0, &[number, flags]);
    put(4, &fd.to_ne_bytes());
    put(16, &address.to_ne_bytes());
    put(24, &8_u32.to_ne_bytes());
    put(32, &u64::from(number).to_ne_bytes());
    // SAFETY: an entry is these 64 bytes; any of them are a request, which the kernel checks.
    unsafe { transmute::<[u8; 64], squeue::Entry>(bytes) }
}

fn submit(ring: &mut Uring, entry: &squeue::Entry) -> Outcome {
    // SAFETY: what the entry points to lives as long as the process.
    if unsafe { ring.push(entry) }.is_err() || ring.submit_and_wait().is_err() {
        return Outcome::Hung;
    }
    let mut completions = Vec::new();
    ring.reap(&mut completions);
    completions.first().map_or(Outcome::Hung, |completion| outcome(completion.result.into()))
}

/// Tries every opcode that is not among `opcodes`, and the allowed ones with every flag; tells each.
pub fn misuse(ring: &mut Uring, opcodes: &[u8], victim: &Victim, mut tell: impl FnMut(&str, Outcome)) {
    let allowed = [opcodes, &[opcode::PollAdd::CODE, opcode::PollRemove::CODE]].concat();
    // Kept for ever: a ring that is not restricted might write into it later.
    let room = Box::leak(Box::new([0_u8; 256]));
    for number in (0..OPCODES).filter(|number| !allowed.contains(number)) {
        let outcome = submit(ring, &request(number, 0, victim, room));
        tell(&format!("ring: {}", name(number)), outcome);
    }
    for flag in 0..8 {
        let outcome = submit(ring, &request(opcode::PollAdd::CODE, 1 << flag, victim, room));
        tell(&format!("ring: poll_add with flag {flag}"), outcome);
    }
}

/// Asks the ring to take files, buffers, personalities, workers, more restrictions, …; tells each.
pub fn register(ring: RawFd, mut tell: impl FnMut(&str, Outcome)) {
    let mut room = [0_u64; 64];
    for number in 0..REGISTRATIONS {
        // SAFETY: the room is larger than any argument of one element.
        let result = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, number, room.as_mut_ptr(), 1) };
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        let outcome = outcome(if result < 0 { -i64::from(errno) } else { result });
        tell(&format!("ring: register {number}"), outcome);
    }
}
