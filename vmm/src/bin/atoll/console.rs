//! `console`: this terminal on a machine's serial port.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Read, Write, stderr, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context;
use atoll_vmm::config::{ConsoleConfig, ConsoleMode};
use atoll_vmm::machine::EscapeFilter;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::target::{self, Aftermath, Machine};
use crate::terminal::{self, RawTerminal};

/// Bytes that are carried at once.
const CHUNK: usize = 4096;

/// The machine's end of the line.
fn far_end(name: &str, port: Option<&ConsoleConfig>) -> anyhow::Result<OwnedFd> {
    let mode = port.map_or(ConsoleMode::Off, |port| port.mode);
    let leads = match (mode, port) {
        (ConsoleMode::Pty, Some(ConsoleConfig { file: Some(path), .. })) => {
            let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path);
            return Ok(opened.with_context(|| format!("cannot open {}", path.display()))?.into());
        }
        (ConsoleMode::Socket, Some(ConsoleConfig { socket: Some(path), .. })) => {
            return Ok(UnixStream::connect(path)
                .with_context(|| format!("cannot connect to {}", path.display()))?
                .into());
        }
        (ConsoleMode::Tty, _) => "leads to the terminal that it was started from",
        (ConsoleMode::File, _) => "leads to a file",
        _ => "leads nowhere",
    };
    anyhow::bail!("the serial port of {name} {leads}; run the machine with --serial socket or --serial pty")
}

/// `console`.
pub(crate) fn console(name: &str, wait_s: u32) -> anyhow::Result<()> {
    let socket = target::socket(name)?;
    let info = Machine::at(&socket)?.info()?;
    let far = File::from(far_end(name, info.config.serial.as_ref())?);
    if stdin().is_terminal() {
        let _ = writeln!(stderr(), "attached to {name}; Ctrl-A x detaches");
    }
    terminal::restore_on_signals();
    let raw = RawTerminal::enter();
    let relayed = relay(&far, Some(Duration::from_secs(wait_s.into())));
    drop(raw);
    if stdin().is_terminal() {
        let _ = writeln!(stderr(), "\ndetached from {name}");
    }
    if matches!(relayed?, Parted::Escape | Parted::Input) {
        return Ok(());
    }
    match target::aftermath(&socket) {
        Aftermath::Ended => Ok(()),
        Aftermath::Runs => anyhow::bail!("{name} runs on and has closed this line: is somebody else attached to it?"),
        Aftermath::Vanished => Err(target::vanished(name)),
    }
}

/// Why bytes are carried no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parted {
    /// The machine has ended.
    Machine,
    /// The escape was typed.
    Escape,
    /// There was no more to send, and the time for answers is over.
    Input,
}

/// Carries bytes both ways until the machine ends, or the escape is typed; after the end of standard input for `answers`
/// more, or without a limit.
pub(crate) fn relay(far: &File, answers: Option<Duration>) -> anyhow::Result<Parted> {
    let (mut from, mut to) = (far.try_clone()?, far.try_clone()?);
    let mut typed = File::from(stdin().as_fd().try_clone_to_owned()?);
    let mut filter = EscapeFilter::default();
    let mut chunk = [0; CHUNK];
    let mut passed = Vec::new();
    let mut typing = true;
    let mut until = None;
    loop {
        let mut fds = vec![PollFd::new(far, PollFlags::IN)];
        if typing {
            fds.push(PollFd::new(&typed, PollFlags::IN));
        }
        let left = match until.map(|until: Instant| until.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Ok(Parted::Input),
            Some(left) => Some(Timespec::try_from(left)?),
            None => None,
        };
        match poll(&mut fds, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let told: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if told.first().is_some_and(|far| !far.is_empty()) {
            match from.read(&mut chunk) {
                // A pseudo terminal whose machine is gone says EIO.
                Ok(0) | Err(_) => return Ok(Parted::Machine),
                Ok(count) => {
                    stdout().write_all(chunk.get(..count).unwrap_or_default())?;
                    stdout().flush()?;
                }
            }
        }
        if told.get(1).is_some_and(|typed| !typed.is_empty()) {
            let count = match typed.read(&mut chunk) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            typing = count > 0;
            if !typing {
                until = answers.map(|answers| Instant::now() + answers);
            }
            passed.clear();
            let left = filter.pass(chunk.get(..count).unwrap_or_default(), &mut passed);
            if to.write_all(&passed).is_err() {
                return Ok(Parted::Machine);
            }
            if left {
                return Ok(Parted::Escape);
            }
        }
    }
}
