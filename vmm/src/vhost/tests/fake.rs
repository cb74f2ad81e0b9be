//! A backend in a thread: it records every message, and misbehaves where it is told to.

use std::fs::File;
use std::io::{IoSliceMut, Read as _, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures as Protocol,
};

use crate::vhost::patience::Patience;
use crate::vhost::source::{BackendSource, Build, Incarnation, SourceError};
use crate::vhost::upgrade::Lone;

/// What to do when a message comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Misdeed {
    /// End, with the connection.
    Die,
    /// End after the first bytes of an answer.
    DieHalfway,
    /// Never answer, and read no more.
    Silence,
    /// Say no.
    Refuse,
}

/// The state of a fake.
pub(super) const STATE: &[u8] = b"what I know";

/// How a fake gives and takes its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StateChannel {
    /// By memory of its own.
    Memory,
    /// By the channel that it is offered.
    Offered,
    /// By a descriptor that is no memory, and on which nothing ever comes.
    Pipe,
    /// By memory without end.
    Long,
    /// By the channel that it is offered, on which nothing ever comes.
    Endless,
}

/// What a fake is like.
#[derive(Clone, Debug)]
pub(super) struct Character {
    pub(super) features: u64,
    pub(super) protocol: Protocol,
    pub(super) queues: u64,
    pub(super) config: Vec<u8>,
    pub(super) inflight_size: Option<u64>,
    /// How it gives and takes its state.
    pub(super) channel: StateChannel,
    /// At the first message whose record starts like this, do that.
    pub(super) misdeed: Option<(String, Misdeed)>,
}

impl Default for Character {
    fn default() -> Self {
        Self {
            features: (1 << 32) | (1 << 30) | (1 << 29) | (1 << 9),
            protocol: Protocol::MQ | Protocol::CONFIG | Protocol::INFLIGHT_SHMFD,
            queues: 2,
            config: vec![7; 16],
            inflight_size: None,
            channel: StateChannel::Memory,
            misdeed: None,
        }
    }
}

/// What the test sees of one incarnation.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) log: Vec<String>,
    pub(super) kicks: Vec<(u8, File)>,
    pub(super) calls: Vec<(u8, File)>,
    pub(super) inflight: Option<File>,
    /// The channel for requests of its own.
    pub(super) requests: Option<UnixStream>,
    /// What its configuration space has become.
    pub(super) config: Option<Vec<u8>>,
    /// The state that it was given, and what it keeps open.
    pub(super) state: Option<File>,
    pub(super) open: Vec<File>,
}

pub(super) struct Fake {
    character: Character,
    seen: Arc<Mutex<Seen>>,
    stay_silent: Receiver<()>,
    socket: UnixStream,
}

impl Fake {
    fn die(&self) -> Result<()> {
        let _ = self.socket.shutdown(Shutdown::Both);
        Err(Error::Disconnected)
    }
    fn hear(&mut self, message: String) -> Result<()> {
        let misdeed = match &self.character.misdeed {
            Some((at, misdeed)) if message.starts_with(at.as_str()) => Some(*misdeed),
            _ => None,
        };
        self.seen.lock().unwrap().log.push(message);
        match misdeed {
            None => Ok(()),
            Some(Misdeed::Die) => self.die(),
            Some(Misdeed::DieHalfway) => {
                let _ = (&self.socket).write(&[1, 0, 0, 0, 5, 0]);
                self.die()
            }
            Some(Misdeed::Silence) => {
                // Until the test lets go of it.
                let _ = self.stay_silent.recv();
                self.die()
            }
            Some(Misdeed::Refuse) => Err(Error::InvalidParam),
        }
    }
}

fn unused<T>() -> Result<T> {
    Err(Error::InvalidOperation("not asked of a disk"))
}

impl VhostUserBackendReqHandlerMut for Fake {
    fn set_owner(&mut self) -> Result<()> {
        self.hear("SET_OWNER".into())
    }
    fn reset_owner(&mut self) -> Result<()> {
        unused()
    }
    fn reset_device(&mut self) -> Result<()> {
        unused()
    }
    fn get_features(&mut self) -> Result<u64> {
        self.hear("GET_FEATURES".into())?;
        Ok(self.character.features)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.hear(format!("SET_FEATURES {features:#x}"))
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        _files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions: Vec<String> = regions
            .iter()
            .map(|region| {
                let (gpa, user, size, offset) =
                    (region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset);
                format!("{gpa:#x}={user:#x}+{size:#x}@{offset:#x}")
            })
            .collect();
        self.hear(format!("SET_MEM_TABLE {}", regions.join(" ")))?;
        Ok(None)
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.hear(format!("SET_VRING_NUM {index} {num}"))
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.hear(format!("SET_VRING_ADDR {index} {descriptor:#x} {available:#x} {used:#x}"))
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.hear(format!("SET_VRING_BASE {index} {base}"))
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.hear(format!("GET_VRING_BASE {index}"))?;
        Ok(VhostUserVringState::new(index, 0))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.seen.lock().unwrap().kicks.push((index, fd.ok_or(Error::IncorrectFds)?));
        self.hear(format!("SET_VRING_KICK {index}"))
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.seen.lock().unwrap().calls.push((index, fd.ok_or(Error::IncorrectFds)?));
        self.hear(format!("SET_VRING_CALL {index}"))
    }
    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        fd.ok_or(Error::IncorrectFds)?;
        self.hear(format!("SET_VRING_ERR {index}"))
    }
    fn get_protocol_features(&mut self) -> Result<Protocol> {
        self.hear("GET_PROTOCOL_FEATURES".into())?;
        Ok(self.character.protocol)
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.hear(format!("SET_PROTOCOL_FEATURES {features:#x}"))
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        self.hear("GET_QUEUE_NUM".into())?;
        Ok(self.character.queues)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.hear(format!("SET_VRING_ENABLE {index} {}", u8::from(enable)))
    }
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.hear(format!("GET_CONFIG {offset} {size}"))?;
        let now = self.seen.lock().unwrap().config.clone();
        Ok(now.unwrap_or_else(|| self.character.config.clone()))
    }
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.hear(format!("SET_CONFIG {offset} {buf:?}"))
    }
    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unused()
    }
    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unused()
    }
    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, queue_size) = (asked.num_queues, asked.queue_size);
        self.hear(format!("GET_INFLIGHT_FD {queues} {queue_size}"))?;
        let size = u64::from(queues) * (16 + 16 * u64::from(queue_size)).next_multiple_of(64);
        let size = self.character.inflight_size.unwrap_or(size);
        let file = File::from(rustix::fs::memfd_create("fake", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        Ok((VhostUserInflight::new(size, 0, queues, queue_size), file))
    }
    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, queue_size, size) = (inflight.num_queues, inflight.queue_size, inflight.mmap_size);
        self.seen.lock().unwrap().inflight = Some(file);
        self.hear(format!("SET_INFLIGHT_FD {queues} {queue_size} {size}"))
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unused()
    }
    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        unused()
    }
    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unused()
    }
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut offered: File,
    ) -> Result<Option<File>> {
        self.hear(format!("SET_DEVICE_STATE_FD {direction:?}"))?;
        let saves = direction == VhostTransferStateDirection::SAVE;
        let memory = || File::from(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap());
        let mut seen = self.seen.lock().unwrap();
        let own = match self.character.channel {
            StateChannel::Offered => {
                if saves {
                    offered.write_all(STATE).unwrap();
                } else {
                    seen.state = Some(offered);
                }
                return Ok(None);
            }
            StateChannel::Endless => {
                seen.open.push(offered);
                return Ok(None);
            }
            StateChannel::Pipe => {
                let (reader, writer) = std::io::pipe().unwrap();
                seen.open.push(std::os::fd::OwnedFd::from(writer).into());
                return Ok(Some(std::os::fd::OwnedFd::from(reader).into()));
            }
            StateChannel::Long => {
                let own = memory();
                own.set_len(1 << 40).unwrap();
                return Ok(Some(own));
            }
            StateChannel::Memory => memory(),
        };
        if saves {
            (&own).write_all(STATE).unwrap();
        } else {
            seen.state = Some(own.try_clone().unwrap());
        }
        Ok(Some(own))
    }
    fn check_device_state(&mut self) -> Result<()> {
        let state = self.seen.lock().unwrap().state.take();
        if let Some(mut state) = state {
            let mut bytes = Vec::new();
            if self.character.channel == StateChannel::Memory {
                use std::os::unix::fs::FileExt as _;
                bytes.resize(state.metadata().unwrap().len() as usize, 0);
                state.read_exact_at(&mut bytes, 0).unwrap();
            } else {
                state.read_to_end(&mut bytes).unwrap();
            }
            assert_eq!(bytes, STATE);
        }
        self.hear("CHECK_DEVICE_STATE".into())
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unused()
    }
    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unused()
    }
}

/// One incarnation, as the test holds it. Dropping it lets a silent one go.
pub(super) struct Life {
    pub(super) seen: Arc<Mutex<Seen>>,
    /// A copy of the backend's end of the socket.
    socket: UnixStream,
    _silence: Sender<()>,
}

impl Life {
    pub(super) fn log(&self) -> Vec<String> {
        self.seen.lock().unwrap().log.clone()
    }
    /// Waits until a message has come.
    pub(super) fn await_message(&self, message: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.log().iter().any(|seen| seen.starts_with(message)) {
            assert!(Instant::now() < deadline, "{message} never came: {:?}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    /// The backend's process is gone.
    pub(super) fn die(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
    /// Its configuration space becomes another; it says nothing of that.
    pub(super) fn has_config(&self, config: &[u8]) {
        self.seen.lock().unwrap().config = Some(config.to_vec());
    }
    /// Its configuration space becomes another, and it says so.
    pub(super) fn tells_config(&self, config: &[u8]) {
        self.has_config(config);
        let request = [BackendReq::CONFIG_CHANGE_MSG.into(), 1, 0].map(u32::to_le_bytes).concat();
        self.seen.lock().unwrap().requests.as_ref().unwrap().write_all(&request).unwrap();
    }
    /// Takes a kick of ring `index`, waiting for it.
    pub(super) fn await_kick(&self, index: u8) -> u64 {
        let file = {
            let seen = self.seen.lock().unwrap();
            seen.kicks.iter().rev().find(|(ring, _)| *ring == index).unwrap().1.try_clone().unwrap()
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut count = [0; 8];
            match rustix::io::read(&file, &mut count) {
                Ok(8) => return u64::from_ne_bytes(count),
                _ => assert!(Instant::now() < deadline, "ring {index} was not kicked"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    /// Interrupts the driver.
    pub(super) fn call(&self, index: u8) {
        let seen = self.seen.lock().unwrap();
        let (_, file) = seen.calls.iter().rev().find(|(ring, _)| *ring == index).unwrap();
        rustix::io::write(file, &1_u64.to_ne_bytes()).unwrap();
    }
}

/// Starts a fake and gives its front end's socket.
pub(super) fn start(character: Character) -> (UnixStream, Life) {
    let (front, back) = UnixStream::pair().unwrap();
    (front, serve(back, character))
}

/// Takes the channel for requests of the backend's own, if that is what comes next: the `vhost` crate keeps it to itself, and cannot
/// say there that a configuration has changed.
fn take_channel(socket: &UnixStream, seen: &Mutex<Seen>) -> Option<bool> {
    let mut request = [0; 4];
    let (_, peeked) = recv(socket, &mut request, RecvFlags::PEEK | RecvFlags::WAITALL).ok()?;
    if peeked < request.len() || u32::from_le_bytes(request) != u32::from(FrontendReq::SET_BACKEND_REQ_FD) {
        return (peeked > 0).then_some(false);
    }
    let (mut header, mut beside) = ([0; 12], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut beside = RecvAncillaryBuffer::new(&mut beside);
    recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut beside, RecvFlags::CMSG_CLOEXEC).ok()?;
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            seen.lock().unwrap().requests = descriptors.last().map(UnixStream::from);
        }
    }
    // Yes, where an answer is wanted.
    if header[4] & 8 != 0 {
        let answer = [FrontendReq::SET_BACKEND_REQ_FD.into(), 5, 8, 0, 0].map(u32::to_le_bytes).concat();
        (&*socket).write_all(&answer).ok()?;
    }
    Some(true)
}

/// Starts a fake at the backend's end of a socket.
pub(super) fn serve(back: UnixStream, character: Character) -> Life {
    let socket = back.try_clone().unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (silence, stay_silent) = channel();
    let fake = Fake { character, seen: Arc::clone(&seen), stay_silent, socket: socket.try_clone().unwrap() };
    let ended = socket.try_clone().unwrap();
    std::thread::spawn(move || {
        let seen = Arc::clone(&fake.seen);
        let mut handler = BackendReqHandler::from_stream(back, Arc::new(Mutex::new(fake)));
        while take_channel(&ended, &seen).is_some_and(|taken| taken || handler.handle_request().is_ok()) {}
        let _ = ended.shutdown(Shutdown::Both);
    });
    Life { seen, socket, _silence: silence }
}

/// Gives a device one fake after the other; the last character stays.
pub(super) struct Fakes {
    characters: Vec<Character>,
    lives: Sender<Life>,
    build: Arc<Build>,
}

impl Fakes {
    pub(super) fn new(characters: Vec<Character>) -> (Self, Receiver<Life>) {
        let (lives, born) = channel();
        (Self { characters, lives, build: Build::new("old".into()) }, born)
    }
}

impl BackendSource for Fakes {
    fn connect(&mut self, _generation: u64, _patience: &mut Patience) -> std::result::Result<Incarnation, SourceError> {
        let character = if self.characters.len() > 1 { self.characters.remove(0) } else { self.characters[0].clone() };
        let (socket, life) = start(character);
        let _ = self.lives.send(life);
        Ok(Incarnation { socket, process: None })
    }
    fn connect_beside(
        &mut self,
        generation: u64,
        _exe: Option<&std::path::Path>,
        patience: &mut Patience,
    ) -> std::result::Result<Incarnation, SourceError> {
        self.connect(generation, patience)
    }
    fn build(&self) -> std::result::Result<Arc<Build>, Lone> {
        Ok(Arc::clone(&self.build))
    }
    fn describe(&self) -> String {
        "a fake".into()
    }
}
