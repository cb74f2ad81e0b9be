//! Where a serial port leads, opened once: it outlives the machine's resets.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::serial_branch::SerialBranch;
use super::serial_peer::Peer;
use super::transcript::Transcript;
use super::{DeviceBuilder, EventSender, SerialBuilder, SerialEnd, SerialError};
use crate::config::{ConsoleConfig, ConsoleMode};
use crate::unix_socket::BoundSocket;

enum Target {
    Terminal(File, File),
    File(Transcript),
    Null,
    Peer(Arc<Peer>),
}

/// The host's end of COM1.
pub struct SerialLine {
    target: Target,
    branch: Option<Arc<SerialBranch>>,
    told: ConsoleConfig,
}

impl SerialLine {
    /// Opens what `config` names; `None` where there is to be no port.
    ///
    /// # Errors
    /// When it cannot be opened, or a file or socket has no path.
    pub fn open(config: &ConsoleConfig) -> Result<Option<Self>, SerialError> {
        let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let mut told = config.clone();
        let path = |path: &Option<PathBuf>, key| path.clone().ok_or(SerialError::NoPath(key));
        let target = match config.mode {
            ConsoleMode::Off => return Ok(None),
            ConsoleMode::Null => Target::Null,
            ConsoleMode::Tty => Target::Terminal(copy(std::io::stdin().as_fd())?, copy(std::io::stdout().as_fd())?),
            ConsoleMode::File => {
                let path = path(&config.file, "file")?;
                Target::File(Transcript::open(&path).map_err(|source| SerialError::File { path, source })?)
            }
            ConsoleMode::Pty => {
                let (peer, name) = Peer::pty().map_err(SerialError::Pty)?;
                told.file = Some(name);
                Target::Peer(Arc::new(peer))
            }
            ConsoleMode::Socket => {
                let socket = BoundSocket::bind(&path(&config.socket, "socket")?)?;
                Target::Peer(Arc::new(Peer::socket(socket)?))
            }
        };
        Ok(Some(Self { target, branch: None, told }))
    }

    /// A second end of it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn branch(&mut self) -> Result<Arc<SerialBranch>, SerialError> {
        Ok(Arc::clone(self.branch.insert(Arc::new(SerialBranch::new()?))))
    }

    /// The configuration, with the name of the pseudo terminal in `file`.
    pub fn told(&self) -> ConsoleConfig {
        self.told.clone()
    }

    /// A guest begins to print.
    pub fn begin(&self) {
        if let Target::File(file) = &self.target {
            file.begin();
        }
    }

    /// Builds the port for one board. `events` hears of the terminal's escape.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn builder(&self, events: &EventSender) -> Result<Box<dyn DeviceBuilder>, SerialError> {
        let end = match &self.target {
            Target::Terminal(input, output) => {
                SerialEnd::Terminal { input: input.try_clone()?, output: output.try_clone()?, events: events.clone() }
            }
            Target::File(file) => SerialEnd::Output(file.file().try_clone()?),
            Target::Null => SerialEnd::Null,
            Target::Peer(peer) => SerialEnd::Peer(Arc::clone(peer)),
        };
        Ok(Box::new(SerialBuilder::new(end, self.branch.clone())))
    }
}
