//! The least that a hand-over costs: two threads on a futex, two processes on a pair of eventfds. Neither has a deadline
//! or can be told to stop, both of which the ways beside them have, at 0.1 to 0.3 us each time: that is counted against
//! the ways.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{JoinHandle, Thread};

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{FdFlags, fcntl_setfd, read, retry_on_intr, write};

const IDLE: u32 = 0;
const ASKED: u32 = 1;
const ENDED: u32 = 2;

/// A thread that answers by parking and unparking, which is a futex in the standard library.
pub(super) struct Threads {
    word: Arc<AtomicU32>,
    other: Thread,
    join: Option<JoinHandle<()>>,
}

impl Threads {
    pub(super) fn new() -> Result<Self> {
        let word = Arc::new(AtomicU32::new(IDLE));
        let asker = std::thread::current();
        let join = std::thread::Builder::new().name("echo".into()).spawn({
            let word = Arc::clone(&word);
            move || {
                loop {
                    match word.load(Ordering::Acquire) {
                        IDLE => std::thread::park(),
                        ENDED => return,
                        _ => {
                            word.store(IDLE, Ordering::Release);
                            asker.unpark();
                        }
                    }
                }
            }
        })?;
        Ok(Self { word, other: join.thread().clone(), join: Some(join) })
    }

    pub(super) fn trip(&self) {
        self.word.store(ASKED, Ordering::Release);
        self.other.unpark();
        while self.word.load(Ordering::Acquire) == ASKED {
            std::thread::park();
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.word.store(ENDED, Ordering::Release);
        self.other.unpark();
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}

/// A process that answers on eventfds: this program again, as [`echo`].
pub(super) struct Processes {
    there: OwnedFd,
    back: OwnedFd,
    child: Child,
}

impl Processes {
    pub(super) fn new() -> Result<Self> {
        let event = || -> Result<OwnedFd> {
            let event = eventfd(0, EventfdFlags::empty())?;
            fcntl_setfd(&event, FdFlags::empty())?;
            Ok(event)
        };
        let (there, back) = (event()?, event()?);
        let child = Command::new(std::env::current_exe()?)
            .arg("--echo")
            .args([there.as_raw_fd().to_string(), back.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start the process that answers")?;
        let this = Self { there, back, child };
        this.trip()?;
        Ok(this)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn trip(&self) -> Result<()> {
        write(&self.there, &1_u64.to_ne_bytes())?;
        let mut count = [0; 8];
        retry_on_intr(|| read(&self.back, &mut count))?;
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process at the other end: answers until it is killed.
///
/// # Errors
/// When the descriptors are not eventfds.
pub fn echo(there: RawFd, back: RawFd) -> Result<()> {
    if there < 3 || back < 3 {
        bail!("--echo wants two descriptors that were passed");
    }
    let (there, back) = (inherited(there), inherited(back));
    let mut count = [0; 8];
    loop {
        retry_on_intr(|| read(&there, &mut count))?;
        write(&back, &1_u64.to_ne_bytes())?;
    }
}

#[allow(unsafe_code, reason = "a descriptor comes as a number")]
fn inherited(fd: RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the parent left exactly these two open for this process, which takes each over once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
