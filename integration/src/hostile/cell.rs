//! One attempt in one process: forked, jailed as a device process is, and looked after from outside.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::sync_channel;

use anyhow::{Context, Result, bail};
use atoll_kit::jail::{Jail, Mode, Profile};
use atoll_kit::uring::Uring;

use super::calls::Attempt;
use super::{Outcome, Victim, outcome, rings};

/// How far the jail is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wall {
    /// Everything that ships.
    Whole,
    /// Without limits and the filter of system calls: what the other layers hold by themselves.
    WithoutFilter,
    /// No jail: to see that an attempt is one.
    None,
}

/// Seconds until a process that does not come back is ended.
const PATIENCE_S: u32 = 10;

/// Tries one system call.
///
/// # Errors
/// The jail cannot be closed on this host.
pub fn call(profile: &'static Profile, wall: Wall, attempt: &Attempt, victim: &Victim) -> Result<Outcome> {
    let told = inside(profile, wall, |_, _, tell| {
        tell("", outcome((attempt.run)(victim)));
    })?;
    told.iter().rfind(|(name, _)| name.is_empty()).map(|(_, outcome)| *outcome).context("nothing came back")
}

/// Tries everything with a ring; each attempt with its outcome.
///
/// # Errors
/// The jail cannot be closed on this host.
pub fn ring(profile: &'static Profile, wall: Wall, victim: &Victim) -> Result<Vec<(String, Outcome)>> {
    inside(profile, wall, |ring, number, tell| {
        rings::misuse(ring, profile.opcodes, victim, &mut *tell);
        // The filter ends the process at the first of them, which the table of system calls has, too.
        if wall == Wall::WithoutFilter {
            rings::register(number, tell);
        }
    })
}

/// Whether every layer but the last two, limits and filter, stands on this host.
///
/// # Errors
/// The jail cannot be closed on this host.
pub fn is_whole(profile: &'static Profile) -> Result<bool> {
    let told = inside(profile, Wall::Whole, |_, _, _| {})?;
    let missing = told.iter().any(|(name, _)| name.starts_with("lacks"));
    Ok(!missing)
}

type Tell<'a> = &'a mut dyn FnMut(&str, Outcome);

/// Runs `act` on a thread like that of a queue, with its ring, in a jailed process of its own. What it told comes back; one
/// that was killed or hung has that as its last line.
fn inside(
    profile: &'static Profile,
    wall: Wall,
    act: impl FnOnce(&mut Uring, i32, Tell<'_>) + Send,
) -> Result<Vec<(String, Outcome)>> {
    let (mut reader, mut writer) = std::io::pipe()?;
    // SAFETY: the caller has one thread, so the child may go on as if it had been started anew.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(std::io::Error::last_os_error().into()),
        0 => {
            drop(reader);
            if let Err(error) = serve(profile, wall, act, &mut writer) {
                let _ = writeln!(writer, "failed\t{error:#}");
            }
            // SAFETY: nothing of the parent's must be cleaned up twice.
            unsafe { libc::_exit(0) }
        }
        child => child,
    };
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    let mut status = 0;
    // SAFETY: the pointer is valid; the child is ours.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        bail!("the jailed process was reaped by somebody else");
    }
    let mut told = Vec::new();
    for line in text.lines() {
        let (name, value) = line.rsplit_once('\t').context("half a line")?;
        if name == "failed" {
            bail!("{value}");
        }
        told.push((name.to_owned(), outcome(value.parse()?)));
    }
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        let end = if signal == libc::SIGALRM { Outcome::Hung } else { Outcome::Killed(signal) };
        told.push((String::new(), end));
    }
    Ok(told)
}

/// The life of a device process: confined, then its threads and rings, then locked.
fn serve(
    profile: &'static Profile,
    wall: Wall,
    act: impl FnOnce(&mut Uring, i32, Tell<'_>) + Send,
    writer: &mut std::io::PipeWriter,
) -> Result<()> {
    // SAFETY: it only sets a timer, whose signal ends the process.
    unsafe { libc::alarm(PATIENCE_S) };
    // Opened outside, as long as that can be done.
    let number = std::fs::File::open("/dev/null")?.as_raw_fd();
    let mode = if wall == Wall::None { Mode::Off } else { Mode::Default };
    let jail = Jail { mode, profile, supervised: false, writes_files: false };
    let confined = jail.confine(None)?;
    for missing in confined.layers().iter().filter(|layer| !layer.stands()) {
        writeln!(writer, "lacks {missing}\t0")?;
    }
    std::thread::scope(|scope| {
        let (lock, locked) = sync_channel::<()>(0);
        let (ready, is_ready) = sync_channel(0);
        let queue = scope.spawn(move || -> Result<()> {
            let mut ring = Uring::new(8, profile.opcodes)?;
            let _ = ready.send(());
            locked.recv()?;
            let mut tell = |name: &str, outcome: Outcome| {
                let value = match outcome {
                    Outcome::Refused(errno) => -i64::from(errno),
                    Outcome::Done(value) => value,
                    Outcome::Killed(_) | Outcome::Hung => i64::MAX,
                };
                let _ = writer.write_all(format!("{name}\t{value}\n").as_bytes());
            };
            act(&mut ring, number, &mut tell);
            // SAFETY: the attempt is over, and what it has done to this process is nobody's business any more.
            unsafe { libc::_exit(0) }
        });
        is_ready.recv().context("no ring")?;
        if wall == Wall::Whole {
            confined.lock(1)?;
        }
        lock.send(())?;
        queue.join().map_err(|_| anyhow::anyhow!("the attempt panicked"))?
    })
}
