//! What a display stands on and what outlives its process: the sockets that viewers come to, their password, the sizes that were
//! asked for, and the control socket of the process that there is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use atoll_protocol::display::SCANOUTS_MAX;
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::socket::FrameSocket;
use rustix::fs::{MemfdFlags, SealFlags};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::DisplayError;
use super::joint::Joint;
use super::place::{Listener, check_novnc, sealed, secret};
use crate::backend::PassedFd;
use crate::config::{DisplayConfig, InputKind, Mode, ViewersAt, VmConfig};
use crate::machine::SerialBranch;

/// How long the display's process may take for an order.
pub(super) const ORDER_MAX: Duration = Duration::from_secs(5);
/// How long an operator's order waits for a successor of a process that has died.
const SUCCESSOR_MAX: Duration = Duration::from_secs(2);
/// How long a process may take to have pictures of all heads: a GPU in 3D that has died with it takes a while to come back.
const FIRST_PICTURE_MAX: Duration = Duration::from_millis(1500);
/// Between two looks whether it has them.
const LOOK: Duration = Duration::from_millis(5);
/// Bytes in which a process writes down sizes for its successors: columns and rows of each head.
const ASKED_LEN: u64 = 8 * SCANOUTS_MAX as u64;
/// Bytes of a picture that a client takes.
const PICTURE_MAX: u64 = 64 << 20;

/// Where a person goes to see the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WhereToLook {
    /// Address of the page, with the token in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Where VNC viewers connect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vnc: Option<String>,
    /// What they are asked for; VNC reads its first eight bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Heads that are being recorded.
    #[serde(default)]
    pub recorded: Vec<u32>,
}

/// A recording that somebody has begun and nobody has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tape {
    /// The process that there is makes it.
    Running,
    /// It ended with its process, and whoever wanted it has not heard of that.
    Cut,
}

/// Tells whoever keeps the process that it does not answer.
type Stuck = Box<dyn Fn() + Send + Sync>;

/// The process.
enum Process {
    /// It has died, or has hung up on us, and another is on its way.
    Coming,
    /// It takes orders.
    There { control: FrameSocket, since: Instant, stuck: Stuck },
    /// There is none until an operator revives it.
    GivenUp,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coming => "Coming",
            Self::There { .. } => "There",
            Self::GivenUp => "GivenUp",
        })
    }
}

/// The place of a display.
#[derive(Debug)]
pub struct DisplayLine {
    vnc: Option<Listener>,
    web: Option<Listener>,
    config: DisplayConfig,
    secret: Option<String>,
    inputs: Vec<InputKind>,
    modes: Vec<Mode>,
    /// How many heads the GPU has.
    heads: u32,
    /// Sizes that operators and viewers have asked for, which the process writes and its successor reads.
    asked: OwnedFd,
    process: Mutex<Process>,
    /// Another process is there.
    entered: Condvar,
    joint: Arc<Joint>,
    /// The guest's serial console, for the page.
    serial: Option<Arc<SerialBranch>>,
    tapes: Mutex<BTreeMap<u32, Tape>>,
    /// Orders that all processes have carried out.
    obeyed: AtomicU64,
}

/// Memory for sizes, all of them zero, as long as it stays.
fn memory() -> std::io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create("display-sizes", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memfd, ASKED_LEN)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memfd)
}

impl DisplayLine {
    /// Binds what viewers come to; its page shows `serial` beside the picture.
    ///
    /// # Errors
    /// What is taken, or cannot be read.
    pub fn open(
        config: &VmConfig,
        joint: &Arc<Joint>,
        serial: Option<Arc<SerialBranch>>,
    ) -> Result<Option<Self>, DisplayError> {
        let Some(display) = &config.display else { return Ok(None) };
        let inputs = config.input.iter().flatten().map(|input| input.kind).collect();
        let heads = config.gpu.as_ref().map_or(0, |gpu| gpu.scanouts().into());
        let modes = config.gpu.iter().flat_map(|gpu| &gpu.modes).copied().collect();
        let place = |text: &Option<String>| -> Result<Option<Listener>, DisplayError> {
            let place =
                text.as_ref().map(|text| text.parse::<ViewersAt>().map_err(DisplayError::Refused)).transpose()?;
            place.as_ref().map(Listener::open).transpose()
        };
        display.novnc.as_deref().map_or(Ok(()), check_novnc)?;
        let (vnc, web) = (place(&display.vnc)?, place(&display.web)?);
        let open = [&vnc, &web].into_iter().flatten().any(|listener| matches!(listener, Listener::Tcp(..)));
        let secret = if open || display.password_file.is_some() { Some(secret(display)?) } else { None };
        let (config, process, joint) = (display.clone(), Mutex::new(Process::Coming), Arc::clone(joint));
        let entered = Condvar::new();
        let (tapes, obeyed, asked) = (Mutex::default(), AtomicU64::new(0), memory()?);
        Ok(Some(Self {
            vnc,
            web,
            config,
            secret,
            inputs,
            modes,
            heads,
            asked,
            process,
            entered,
            joint,
            serial,
            tapes,
            obeyed,
        }))
    }

    /// The configuration, with the ports that the kernel has chosen.
    pub fn told(&self) -> DisplayConfig {
        let mut config = self.config.clone();
        for (listener, place) in [(&self.vnc, &mut config.vnc), (&self.web, &mut config.web)] {
            if let Some(port) = listener.as_ref().and_then(Listener::port) {
                *place = Some(port);
            }
        }
        config
    }

    /// Where people go.
    pub fn where_to_look(&self) -> WhereToLook {
        let told = self.told();
        let token = self.secret.as_deref().unwrap_or_default();
        WhereToLook {
            url: told.web.map(|place| format!("http://{place}/?token={token}")),
            vnc: told.vnc,
            password: self.secret.clone(),
            recorded: self.tapes().iter().filter(|(_, tape)| **tape == Tape::Running).map(|(head, _)| *head).collect(),
        }
    }

    /// Arguments of the process that are no descriptors.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let sizes = self.modes.iter().flat_map(|mode| ["--size".into(), mode.to_string().into()]);
        let novnc = self.config.novnc.iter().flat_map(|folder| ["--novnc".into(), folder.into()]);
        sizes.chain(novnc).collect()
    }

    fn tapes(&self) -> MutexGuard<'_, BTreeMap<u32, Tape>> {
        self.tapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an incarnation inherits, and our end of its control socket.
    pub(crate) fn descriptors(&self) -> std::io::Result<(Vec<PassedFd>, FrameSocket)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut fds = vec![
            PassedFd { flag: "--control-fd".into(), fd: theirs.into() },
            PassedFd { flag: "--asked-fd".into(), fd: self.asked.try_clone()? },
        ];
        for (flag, listener) in [("--vnc-fd", &self.vnc), ("--web-fd", &self.web)] {
            if let Some(listener) = listener {
                fds.push(PassedFd { flag: flag.into(), fd: listener.pass()? });
            }
        }
        for kind in &self.inputs {
            let flag = format!("--events-fd={}:", kind.name());
            fds.push(PassedFd { flag, fd: self.joint.speaker(*kind)? });
        }
        if let Some(serial) = &self.serial {
            fds.push(PassedFd { flag: "--serial-fd".into(), fd: serial.join()? });
        }
        if let Some(secret) = &self.secret {
            fds.push(PassedFd { flag: "--secret-fd".into(), fd: sealed(secret.as_bytes())? });
        }
        Ok((fds, FrameSocket::new(ours.into())))
    }

    /// A process is there: it takes orders from now on, and pictures. `stuck` has it replaced if it does not answer.
    pub(crate) fn enter(self: &Arc<Self>, control: FrameSocket, stuck: impl Fn() + Send + Sync + 'static) {
        *self.process() = Process::There { control, since: Instant::now(), stuck: Box::new(stuck) };
        self.entered.notify_all();
        let line = Arc::downgrade(self);
        self.joint.shown_by(move |socket| {
            let Some(line) = line.upgrade() else { return };
            if let Err(error) = line.order(&DisplayOrder::NewDisplay, &[&socket]) {
                tracing::warn!(%error, "the display has no socket of the GPU");
            }
        });
    }

    /// It is gone.
    pub(crate) fn leave(&self) {
        self.left(Process::Coming);
    }

    /// There will be no other, until one enters all the same.
    pub(crate) fn give_up(&self) {
        self.left(Process::GivenUp);
        self.entered.notify_all();
    }

    fn left(&self, next: Process) {
        self.joint.shown_by_nobody();
        *self.process() = next;
        self.tapes().values_mut().for_each(|tape| *tape = Tape::Cut);
    }

    /// Waits for a successor, where one is on its way.
    fn await_process(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let is_coming = |process: &mut Process| matches!(process, Process::Coming);
        drop(self.entered.wait_timeout_while(self.process(), left, is_coming));
    }

    /// How many orders all processes so far have answered: one that does has not died for nothing.
    pub(crate) fn obeyed(&self) -> u64 {
        self.obeyed.load(Ordering::Relaxed)
    }

    /// Orders something and waits for the answer, and for what comes beside it.
    fn order(&self, order: &DisplayOrder, beside: &[&OwnedFd]) -> Result<(DisplayReport, Vec<OwnedFd>), DisplayError> {
        let mut process = self.process();
        let (socket, stuck) = match &mut *process {
            Process::There { control, stuck, .. } => (control, stuck),
            Process::Coming => return Err(DisplayError::Nobody),
            Process::GivenUp => return Err(DisplayError::GivenUp),
        };
        let beside: Vec<_> = beside.iter().map(|fd| fd.as_fd()).collect();
        let answered =
            socket.writer.send(order, &beside, ORDER_MAX).and_then(|()| socket.reader.receive(Some(ORDER_MAX)));
        let frame = match answered {
            Ok(frame) => frame,
            Err(error) => {
                // What it answers later would be taken for the answer to something else.
                socket.reader.hang_up_handle().hang_up();
                stuck();
                *process = Process::Coming;
                return Err(error.into());
            }
        };
        match frame.decode().map_err(|error| DisplayError::Silent(error.into()))? {
            DisplayReport::Refused { reason } => {
                self.obeyed.fetch_add(1, Ordering::Relaxed);
                Err(DisplayError::Refused(reason))
            }
            report => {
                self.obeyed.fetch_add(1, Ordering::Relaxed);
                Ok((report, frame.descriptors))
            }
        }
    }

    /// The same of whoever is there or comes: what the order asks for may be done twice. `first` is done before each try.
    fn insist(
        &self,
        order: &DisplayOrder,
        beside: &[&OwnedFd],
        first: impl Fn(),
    ) -> Result<(DisplayReport, Vec<OwnedFd>), DisplayError> {
        let until = Instant::now() + SUCCESSOR_MAX;
        loop {
            self.await_process(until);
            first();
            match self.order(order, beside) {
                Err(DisplayError::Nobody) => {}
                Err(DisplayError::Silent(error)) if error.is_hang_up() => {}
                // It has just come, and the GPU's pictures have not.
                Err(DisplayError::Refused(_)) if self.has_just_come() && Instant::now() < until => {
                    std::thread::sleep(LOOK);
                }
                answered => return answered,
            }
            if Instant::now() >= until {
                return Err(DisplayError::Nobody);
            }
        }
    }

    fn has_just_come(&self) -> bool {
        matches!(&*self.process(), Process::There { since, .. } if since.elapsed() < FIRST_PICTURE_MAX)
    }

    fn has(&self, head: u32) -> Result<(), DisplayError> {
        let all = self.heads;
        if head < all {
            return Ok(());
        }
        Err(DisplayError::Refused(format!("there is no head {head}: the GPU has {all}, and the first is 0")))
    }

    /// What a head shows, as a PNG.
    ///
    /// # Errors
    /// There is no such head, it shows nothing, or nobody answers.
    pub fn screenshot(&self, head: u32) -> Result<Vec<u8>, DisplayError> {
        self.has(head)?;
        let (report, mut beside) = self.insist(&DisplayOrder::Screenshot { head }, &[], || {})?;
        let (DisplayReport::Screenshot { .. }, Some(picture), None) = (report, beside.pop(), beside.pop()) else {
            return Err(DisplayError::Absurd("no picture"));
        };
        let picture = File::from(picture);
        if picture.metadata()?.len() > PICTURE_MAX {
            return Err(DisplayError::Absurd("a picture of more than 64 MiB"));
        }
        let mut bytes = Vec::new();
        rustix::fs::seek(&picture, rustix::fs::SeekFrom::Start(0)).map_err(std::io::Error::from)?;
        picture.take(PICTURE_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Gives a head another size, which the guest is told of.
    ///
    /// # Errors
    /// There is no such head, or nobody answers.
    pub fn resize(&self, head: u32, width: u32, height: u32) -> Result<(), DisplayError> {
        self.has(head)?;
        match self.insist(&DisplayOrder::Resize { head, width, height }, &[], || {})? {
            (DisplayReport::Done, _) => Ok(()),
            _ => Err(DisplayError::Absurd("no word of the size")),
        }
    }

    /// Records what a head shows to a file (animated PNG), until [`Self::stop_record`].
    ///
    /// # Errors
    /// It is being recorded, or nobody answers.
    pub fn record(&self, head: u32, file: &OwnedFd) -> Result<(), DisplayError> {
        self.has(head)?;
        let before = self.tapes().get(&head).copied();
        // First, so that a process that dies behind its answer leaves it cut.
        let first = || _ = self.tapes().insert(head, Tape::Running);
        let begun = match self.insist(&DisplayOrder::Record { head }, &[file], first) {
            Ok((DisplayReport::Done, _)) => Ok(()),
            Ok(_) => Err(DisplayError::Absurd("no word of the recording")),
            Err(error) => Err(error),
        };
        match (&begun, before) {
            (Ok(()), _) | (Err(_), Some(Tape::Running)) => {}
            (Err(_), Some(Tape::Cut)) => _ = self.tapes().insert(head, Tape::Cut),
            (Err(_), None) => _ = self.tapes().remove(&head),
        }
        begun
    }

    /// Ends a recording; how many pictures are in it.
    ///
    /// # Errors
    /// There is none, or it has ended with the process that made it.
    pub fn stop_record(&self, head: u32) -> Result<u32, DisplayError> {
        self.has(head)?;
        let tape = self.tapes().remove(&head);
        if tape == Some(Tape::Cut) {
            return Err(DisplayError::Cut(head));
        }
        let told = self.order(&DisplayOrder::StopRecord { head }, &[]).map_err(|error| match error {
            // A process that does not answer is hung up on, and ends what it records.
            DisplayError::Nobody | DisplayError::GivenUp | DisplayError::Silent(_) if tape.is_some() => {
                DisplayError::Cut(head)
            }
            error => error,
        });
        match told? {
            (DisplayReport::Recorded { frames, .. }, _) => Ok(frames),
            _ => Err(DisplayError::Absurd("no word of the recording")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::GpuConfig;

    fn open(display: DisplayConfig) -> Result<Arc<DisplayLine>, DisplayError> {
        let config = VmConfig { gpu: Some(GpuConfig::default()), display: Some(display), ..VmConfig::default() };
        Ok(Arc::new(DisplayLine::open(&config, &Arc::default(), None)?.unwrap()))
    }

    /// A process of the display's that answers these orders with these reports, one after the other, and ends.
    fn process(line: &Arc<DisplayLine>, reports: Vec<DisplayReport>) -> std::thread::JoinHandle<()> {
        let (fds, ours) = line.descriptors().unwrap();
        line.enter(ours, || {});
        let control = fds.into_iter().find(|passed| passed.flag == "--control-fd").unwrap();
        let mut socket = FrameSocket::new(control.fd);
        std::thread::spawn(move || {
            for report in reports {
                socket.reader.receive(Some(ORDER_MAX)).unwrap();
                socket.writer.send(&report, &[], ORDER_MAX).unwrap();
            }
        })
    }

    /// A stranger ended the display's process while `atoll record` ran, and read ten seconds later that nothing was being recorded.
    /// Whoever asks hears what has become of it, once, whether the successor is there or not; the next recording is like any.
    #[test]
    fn a_recording_ends_with_its_process() {
        let line = open(DisplayConfig::default()).unwrap();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let cut =
            |error: DisplayError| matches!(error, DisplayError::Cut(0)) && error.to_string().contains("begin another");

        let first = process(&line, vec![DisplayReport::Done]);
        line.record(0, &file).unwrap();
        first.join().unwrap();
        assert_eq!(line.where_to_look().recorded, [0]);
        line.leave();
        assert_eq!(line.where_to_look().recorded, [0_u32; 0]);
        let refused = DisplayReport::Refused { reason: "head 0 is not being recorded".into() };
        let recorded = DisplayReport::Recorded { head: 0, frames: 7 };
        let successor = process(&line, vec![refused, DisplayReport::Done, recorded, DisplayReport::Done]);
        assert!(cut(line.stop_record(0).unwrap_err()));
        assert!(matches!(line.stop_record(0), Err(DisplayError::Refused(_))), "it is told once");
        line.record(0, &file).unwrap();
        assert_eq!(line.stop_record(0).unwrap(), 7);

        // The end of the process is seen at the order, before anybody has told of it.
        line.record(0, &file).unwrap();
        successor.join().unwrap();
        assert!(cut(line.stop_record(0).unwrap_err()));
        assert!(line.tapes().is_empty());
    }

    /// A process that ends instead of an answer is told of as stuck, which costs one that is dead nothing. Whoever wants a picture
    /// meanwhile gets its successor's, once that has one; the new size waits, too. Where there will be no successor, nobody waits.
    #[test]
    fn orders_wait_for_a_successor() {
        let line = open(DisplayConfig::default()).unwrap();
        let (fds, ours) = line.descriptors().unwrap();
        let told = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&told);
        line.enter(ours, move || _ = count.fetch_add(1, Ordering::Relaxed));
        drop(fds);
        let asked = Arc::clone(&line);
        let picture = std::thread::spawn(move || asked.screenshot(0));
        let begin = Instant::now();
        while told.load(Ordering::Relaxed) == 0 {
            assert!(begin.elapsed() < ORDER_MAX);
            std::thread::sleep(LOOK);
        }
        let refused = DisplayReport::Refused { reason: "head 0 shows nothing".into() };
        let absurd = DisplayReport::Done;
        process(&line, vec![refused, absurd]);
        // The one that answers something else has answered.
        assert!(matches!(picture.join().unwrap(), Err(DisplayError::Absurd(_))));
        line.leave();
        let resizer = Arc::clone(&line);
        let resized = std::thread::spawn(move || resizer.resize(0, 640, 480));
        process(&line, vec![DisplayReport::Done]);
        resized.join().unwrap().unwrap();

        // Nobody is told twice that a recording was cut which goes on.
        let (fds, ours) = line.descriptors().unwrap();
        line.enter(ours, || {});
        drop(fds);
        let recorder = Arc::clone(&line);
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let recorded = std::thread::spawn(move || recorder.record(0, &file));
        let begin = Instant::now();
        while matches!(&*line.process(), Process::There { .. }) {
            assert!(begin.elapsed() < ORDER_MAX);
            std::thread::sleep(LOOK);
        }
        line.leave();
        process(&line, vec![DisplayReport::Done]);
        recorded.join().unwrap().unwrap();
        assert_eq!(line.where_to_look().recorded, [0]);
        line.give_up();
        let begin = Instant::now();
        assert!(matches!(line.screenshot(0), Err(DisplayError::GivenUp)));
        assert!(begin.elapsed() < SUCCESSOR_MAX, "nobody is waited for");
    }

    /// One line each, with the file's name and the remedy.
    #[test]
    fn files_that_are_not_there_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let novnc = DisplayConfig { novnc: Some(folder.path().into()), ..DisplayConfig::default() };
        let told = open(novnc.clone()).unwrap_err().to_string();
        assert!(told.contains(&*folder.path().to_string_lossy()) && told.contains("/usr/share/novnc"), "{told}");
        std::fs::create_dir(folder.path().join("core")).unwrap();
        std::fs::write(folder.path().join("core/rfb.js"), "export default 1;").unwrap();
        open(novnc).unwrap();

        let secret = |path: PathBuf| DisplayConfig { password_file: Some(path), ..DisplayConfig::default() };
        let told = open(secret("/nope".into())).unwrap_err().to_string();
        assert!(told.contains("/nope: ") && told.contains("leave password_file out"), "{told}");
        let file = folder.path().join("secret");
        std::fs::write(&file, "word\n").unwrap();
        assert_eq!(open(secret(file)).unwrap().where_to_look().password.as_deref(), Some("word"));
    }
}
