//! `switch`: a network switch of this user's, kept alive until a signal ends it.
#![allow(unsafe_code, reason = "the child is told to end with its parent, between fork and exec")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::Context;
use atoll_vmm::backend::beside_this_binary;
use atoll_vmm::rundir::{RunDirError, RunRoot};
use atoll_vmm::unix_socket::BoundSocket;

use crate::cli::SwitchArgs;
use crate::described::UsageError;
use crate::run::RunError;
use crate::signals;

/// What the switch's executable is called.
const BACKEND: &str = "atoll-net";
/// A switch that lives that long has started; one that does not is not started again.
const STARTED_AFTER: Duration = Duration::from_secs(1);
/// Longest pause before the next start.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How long the switch has to end by itself.
const GRACE: Duration = Duration::from_secs(2);

fn start(args: &SwitchArgs, socket: &Path) -> anyhow::Result<Child> {
    let binary = match &args.backend_dir {
        Some(folder) => folder.join(BACKEND),
        None => beside_this_binary(BACKEND).context("atoll-net cannot be found")?,
    };
    // What another one has left is in the way; one that lives is not to be replaced.
    drop(BoundSocket::bind(socket)?);
    let mut command = Command::new(&binary);
    command.arg("--switch").arg("--socket").arg(socket).arg("--ports").arg(args.ports.to_string());
    for file in &args.pcap {
        command.arg("--pcap").arg(file);
    }
    let end_with_parent = || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        Ok(())
    };
    // SAFETY: it makes one system call and allocates nothing.
    unsafe { command.pre_exec(end_with_parent) };
    command.spawn().with_context(|| {
        format!(
            "{} cannot be started; install it beside atoll, or name its folder with --backend-dir",
            binary.display()
        )
    })
}

fn stop(child: &mut Child) {
    if let Ok(Some(pid)) = i32::try_from(child.id()).map(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let deadline = Instant::now() + GRACE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// `switch`; the exit status.
pub(crate) fn switch(args: &SwitchArgs) -> Result<u8, RunError> {
    let root = RunRoot::of_user().map_err(anyhow::Error::from)?;
    let socket = root.switch_socket(&args.name).map_err(|error| match error {
        RunDirError::Name { .. } => RunError::Usage(UsageError::Where(error.to_string())),
        _ => RunError::Failed(error.into()),
    })?;
    Ok(keep_alive(args, &socket)?)
}

/// Starts the switch whenever there is none, until a signal ends it.
fn keep_alive(args: &SwitchArgs, socket: &Path) -> anyhow::Result<u8> {
    signals::block()?;
    let mut pause = Duration::ZERO;
    loop {
        let started = Instant::now();
        let mut child = start(args, socket)?;
        tracing::info!("switch {} at {}", args.name, socket.display());
        let ended = loop {
            match signals::wait(None) {
                Some(libc::SIGCHLD) | None => {
                    if let Some(status) = child.try_wait()? {
                        break status;
                    }
                }
                Some(_) => {
                    stop(&mut child);
                    let _ = std::fs::remove_file(socket);
                    return Ok(0);
                }
            }
        };
        anyhow::ensure!(started.elapsed() >= STARTED_AFTER, "the switch {} has ended at once ({ended})", args.name);
        tracing::warn!("the switch {} has ended ({ended}); it is started again", args.name);
        // The first death is answered at once, those that follow soon after it later and later.
        pause = if started.elapsed() > 10 * BACKOFF_MAX { Duration::ZERO } else { pause };
        let until = Instant::now() + pause;
        pause = (2 * pause).clamp(Duration::from_millis(100), BACKOFF_MAX);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if signals::wait(Some(left)).is_some_and(|signal| signal != libc::SIGCHLD) {
                return Ok(0);
            }
        }
    }
}
