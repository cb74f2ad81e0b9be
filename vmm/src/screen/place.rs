//! Where viewers come to, what they are asked for, and what their browser is given: opened and checked before there is a process.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::fs::{MemfdFlags, Mode as FileMode, OFlags, SealFlags};
use rustix::rand::{GetRandomFlags, getrandom};

use super::error::DisplayError;
use crate::config::{DisplayConfig, ViewersAt};
use crate::unix_socket::BoundSocket;

/// Letters of a password that is made up.
const SECRET_LEN: usize = 24;
/// Bytes of one that is given.
const SECRET_MAX: usize = 256;
/// Letters that nobody confuses.
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// What is in noVNC's folder, and in no other.
const NOVNC_FILE: &str = "core/rfb.js";
/// Who may read a file beside its owner.
const OTHERS_READ: u32 = 0o044;

/// What viewers connect to.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(BoundSocket),
    /// With its address, which the threads that are asked for it may not ask the kernel for.
    Tcp(TcpListener, SocketAddr),
}

impl Listener {
    pub(super) fn open(place: &ViewersAt) -> Result<Self, DisplayError> {
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
    pub(super) fn pass(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Unix(socket) => socket.listener().try_clone().map(OwnedFd::from),
            Self::Tcp(listener, _) => listener.try_clone().map(OwnedFd::from),
        }
    }
    pub(super) fn port(&self) -> Option<String> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(_, address) => Some(address.to_string()),
        }
    }
}

/// The password that viewers over TCP are asked for.
pub(super) fn secret(config: &DisplayConfig) -> Result<String, DisplayError> {
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
pub(super) fn check_novnc(folder: &Path) -> Result<(), DisplayError> {
    if folder.join(NOVNC_FILE).is_file() { Ok(()) } else { Err(DisplayError::Novnc(folder.into())) }
}

/// Bytes as a descriptor that nobody changes.
pub(super) fn sealed(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create("display-secret", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
}
