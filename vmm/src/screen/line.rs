//! What a display stands on and what outlives its process: the sockets that viewers come to, their password, the sizes that were
//! asked for, and the control socket of the process that there is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use atoll_protocol::display::SCANOUTS_MAX;
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::socket::{FrameSocket, SocketError};
use rustix::fs::{MemfdFlags, Mode as FileMode, OFlags, SealFlags};
use rustix::rand::{GetRandomFlags, getrandom};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Joint;
use crate::backend::PassedFd;
use crate::config::{DisplayConfig, InputKind, Mode, ViewersAt, VmConfig};
use crate::machine::SerialBranch;
use crate::unix_socket::{BoundSocket, SocketError as BindError};

/// How long the display's process may take for an order.
const ORDER_MAX: Duration = Duration::from_secs(5);
/// Letters of a password that is made up.
const SECRET_LEN: usize = 24;
/// Bytes of one that is given.
const SECRET_MAX: usize = 256;
/// Bytes in which a process writes down sizes for its successors: columns and rows of each head.
const ASKED_LEN: u64 = 8 * SCANOUTS_MAX as u64;
/// Letters that nobody confuses.
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// What is in noVNC's folder, and in no other.
const NOVNC_FILE: &str = "core/rfb.js";
/// Who may read a file beside its owner.
const OTHERS_READ: u32 = 0o044;
/// Bytes of a picture that a client takes.
const PICTURE_MAX: u64 = 64 << 20;

/// Why there is no line for a display, or why it does not do as it is asked.
#[derive(Debug, Error)]
pub enum DisplayError {
    /// A UNIX socket.
    #[error("display: {0}")]
    Socket(#[from] BindError),
    /// A TCP port.
    #[error("display: cannot listen at {place}: {source}; choose another port, or 0 for any")]
    Port {
        /// Where.
        place: String,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
    /// The password.
    #[error("display: the password in {}: {what}", .path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The folder of noVNC.
    #[error(
        "display: novnc={} has no {NOVNC_FILE}: name noVNC's folder, as /usr/share/novnc of the package novnc, or leave novnc out",
        .0.display()
    )]
    Novnc(PathBuf),
    /// No descriptors left.
    #[error("display: {0}")]
    Host(#[from] std::io::Error),
    /// There is no process at the moment.
    #[error("the display's process is not there at the moment: ask again")]
    Nobody,
    /// It does not answer.
    #[error("the display's process does not answer ({0}): it is replaced if it is stuck; ask again")]
    Silent(#[from] SocketError),
    /// Who recorded is gone.
    #[error(
        "the display's process has ended, and the recording of head {0} with it: the file is whole and has what was seen until a \
         few seconds before; begin another, to another file"
    )]
    Cut(u32),
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// What it says cannot be right.
    #[error("the display's process answers something else: {0}")]
    Absurd(&'static str),
}

#[derive(Debug)]
enum Listener {
    Unix(BoundSocket),
    /// With its address, which the threads that are asked for it may not ask the kernel for.
    Tcp(TcpListener, SocketAddr),
}

impl Listener {
    fn open(place: &ViewersAt) -> Result<Self, DisplayError> {
        match place {
            ViewersAt::Path(path) => Ok(Self::Unix(BoundSocket::bind(path)?)),
            ViewersAt::Tcp(address) => {
                let refused = |source| DisplayError::Port { place: address.to_string(), source };
                let listener = TcpListener::bind(address).map_err(refused)?;
                let address = listener.local_addr()?;
                Ok(Self::Tcp(listener, address))
            }
        }
    }
    fn pass(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Unix(socket) => socket.listener().try_clone().map(OwnedFd::from),
            Self::Tcp(listener, _) => listener.try_clone().map(OwnedFd::from),
        }
    }
    fn port(&self) -> Option<String> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(_, address) => Some(address.to_string()),
        }
    }
}

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
    control: Mutex<Option<FrameSocket>>,
    joint: Arc<Joint>,
    /// The guest's serial console, for the page.
    serial: Option<Arc<SerialBranch>>,
    tapes: Mutex<BTreeMap<u32, Tape>>,
    /// Orders that all processes have carried out.
    obeyed: AtomicU64,
}

/// The password that viewers over TCP are asked for.
fn secret(config: &DisplayConfig) -> Result<String, DisplayError> {
    let Some(path) = &config.password_file else {
        let mut bytes = [0; SECRET_LEN];
        getrandom(&mut bytes, GetRandomFlags::empty()).map_err(std::io::Error::from)?;
        let letters = bytes.iter().filter_map(|byte| LETTERS.get(usize::from(byte % 32)));
        return Ok(letters.map(|letter| char::from(*letter)).collect());
    };
    let wrong = |what: String| DisplayError::Secret { path: path.clone(), what };
    let mut text = String::new();
    // A pipe would keep whoever opens it waiting.
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, FileMode::empty());
    let remedy =
        "give a file with a line in it that can be read, or leave password_file out: then a password is made up";
    let file = File::from(file.map_err(|errno| wrong(format!("{}; {remedy}", std::io::Error::from(errno))))?);
    let about = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if !about.is_file() {
        return Err(wrong("it is no plain file: give one with a line in it".into()));
    }
    if about.permissions().mode() & OTHERS_READ != 0 {
        let file = path.display();
        tracing::warn!(%file, "others may read the file with the display's password: chmod 600 {file}");
    }
    let most = SECRET_MAX as u64 + 3;
    file.take(most).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
    let word = text.trim_end_matches(['\r', '\n']);
    if !(1..=SECRET_MAX).contains(&word.len())
        || !word.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_".contains(letter))
    {
        return Err(wrong(format!("it is one line of 1 to {SECRET_MAX} letters, digits, - and _")));
    }
    Ok(word.to_owned())
}

/// The folder is noVNC's. The display's process reads it when it starts, and can only tell browsers that nothing is there.
fn check_novnc(folder: &Path) -> Result<(), DisplayError> {
    if folder.join(NOVNC_FILE).is_file() { Ok(()) } else { Err(DisplayError::Novnc(folder.into())) }
}

/// Bytes as a descriptor that nobody changes.
fn sealed(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create("display-secret", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
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
        let (config, control, joint) = (display.clone(), Mutex::default(), Arc::clone(joint));
        let (tapes, obeyed, asked) = (Mutex::default(), AtomicU64::new(0), memory()?);
        Ok(Some(Self { vnc, web, config, secret, inputs, modes, heads, asked, control, joint, serial, tapes, obeyed }))
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

    fn lock(&self) -> MutexGuard<'_, Option<FrameSocket>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// A process is there: it takes orders from now on, and pictures.
    pub(crate) fn enter(self: &Arc<Self>, control: FrameSocket) {
        *self.lock() = Some(control);
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
        self.joint.shown_by_nobody();
        *self.lock() = None;
        self.tapes().values_mut().for_each(|tape| *tape = Tape::Cut);
    }

    /// How many orders all processes so far have answered: one that does has not died for nothing.
    pub(crate) fn obeyed(&self) -> u64 {
        self.obeyed.load(Ordering::Relaxed)
    }

    /// Orders something and waits for the answer, and for what comes beside it.
    fn order(&self, order: &DisplayOrder, beside: &[&OwnedFd]) -> Result<(DisplayReport, Vec<OwnedFd>), DisplayError> {
        let mut control = self.lock();
        let socket = control.as_mut().ok_or(DisplayError::Nobody)?;
        let beside: Vec<_> = beside.iter().map(|fd| fd.as_fd()).collect();
        let answered =
            socket.writer.send(order, &beside, ORDER_MAX).and_then(|()| socket.reader.receive(Some(ORDER_MAX)));
        let frame = match answered {
            Ok(frame) => frame,
            Err(error) => {
                // What it answers later would be taken for the answer to something else.
                if let Some(socket) = control.take() {
                    socket.reader.hang_up_handle().hang_up();
                }
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
        let (report, mut beside) = self.order(&DisplayOrder::Screenshot { head }, &[])?;
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
        match self.order(&DisplayOrder::Resize { head, width, height }, &[])? {
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
        // First, so that a process that dies behind its answer leaves it cut.
        let before = self.tapes().insert(head, Tape::Running);
        let begun = match self.order(&DisplayOrder::Record { head }, &[file]) {
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
            DisplayError::Nobody | DisplayError::Silent(_) if tape.is_some() => DisplayError::Cut(head),
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
    use super::*;
    use crate::config::GpuConfig;

    fn open(display: DisplayConfig) -> Result<Arc<DisplayLine>, DisplayError> {
        let config = VmConfig { gpu: Some(GpuConfig::default()), display: Some(display), ..VmConfig::default() };
        Ok(Arc::new(DisplayLine::open(&config, &Arc::default(), None)?.unwrap()))
    }

    /// A process of the display's that answers these orders with these reports, one after the other, and ends.
    fn process(line: &Arc<DisplayLine>, reports: Vec<DisplayReport>) -> std::thread::JoinHandle<()> {
        let (fds, ours) = line.descriptors().unwrap();
        line.enter(ours);
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

    /// One line each, with the file's name and the remedy.
    #[test]
    fn files_that_are_not_there_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let novnc = DisplayConfig { novnc: Some(folder.path().into()), ..DisplayConfig::default() };
        let told = open(novnc.clone()).unwrap_err().to_string();
        assert!(told.contains(&*folder.path().to_string_lossy()) && told.contains("/usr/share/novnc"), "{told}");
        std::fs::create_dir(folder.path().join("core")).unwrap();
        std::fs::write(folder.path().join(NOVNC_FILE), "export default 1;").unwrap();
        open(novnc).unwrap();

        let secret = |path: PathBuf| DisplayConfig { password_file: Some(path), ..DisplayConfig::default() };
        let told = open(secret("/nope".into())).unwrap_err().to_string();
        assert!(told.contains("/nope: ") && told.contains("leave password_file out"), "{told}");
        let file = folder.path().join("secret");
        std::fs::write(&file, "word\n").unwrap();
        assert_eq!(open(secret(file)).unwrap().where_to_look().password.as_deref(), Some("word"));
    }
}
