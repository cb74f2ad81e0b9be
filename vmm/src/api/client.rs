//! A client of the operator's socket: one connection, one request at a time, each with a deadline.
//!
//! ```no_run
//! # use atoll_vmm::api::{Client, Method};
//! # fn main() -> Result<(), atoll_vmm::api::ClientError> {
//! let mut client = Client::connect("/run/user/1000/atoll/web/api.sock".as_ref())?;
//! let info = client.call(Method::Get, "/api/v1/vm.info", None)?;
//! # Ok(())
//! # }
//! ```

use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;
use thiserror::Error;

use super::request::Method;
use super::wire::{self, WireError};
use crate::lifecycle::StoryEvent;

/// How long a request may take unless [`Client::with_patience`] says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a reply's head at most.
const HEAD_MAX: usize = 16 << 10;
/// Bytes of a reply's body at most: an inspected tree or a page of metrics is far smaller.
const BODY_MAX: usize = 64 << 20;
/// Header lines of a reply at most.
const HEADERS_MAX: usize = 32;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody can be reached at that path.
    #[error("no virtual machine answers at {path}: {source}; `atoll ps` lists those that run")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// The path does not fit into a socket address.
    #[error("the socket path {0} is too long: it may have 107 bytes")]
    PathTooLong(PathBuf),
    /// The request was refused.
    #[error("{}", errors.join(": "))]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the server says.
        errors: Vec<String>,
    },
    /// No whole answer in time; whether the request was carried out is not known.
    #[error("no answer within {} s: the virtual machine may be busy; ask it again", .0.as_secs())]
    Late(Duration),
    /// The connection ended before the answer; whether the request was carried out is not known.
    #[error("the connection ended before the answer came: the virtual machine monitor may have gone")]
    Cut,
    /// The answer is not one.
    #[error("the answer cannot be read: {0}")]
    Garbled(String),
    /// The kernel's error.
    #[error("the connection failed: {0}")]
    Io(std::io::Error),
}

impl From<WireError> for ClientError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Io(Errno::PIPE | Errno::CONNRESET) => Self::Cut,
            WireError::Io(errno) => Self::Io(errno.into()),
            other => Self::Garbled(other.to_string()),
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Its body; empty with status 204.
    pub body: Vec<u8>,
}

impl Response {
    /// The body as JSON; `None` when there is none.
    ///
    /// # Errors
    /// When the body is not JSON, or the request was refused.
    pub fn json(&self) -> Result<Option<Value>, ClientError> {
        if !(200..300).contains(&self.status) {
            let errors = serde_json::from_slice(&self.body)
                .unwrap_or_else(|_| vec![format!("status {} without a reason that can be read", self.status)]);
            return Err(ClientError::Refused { status: self.status, errors });
        }
        if self.body.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&self.body).map(Some).map_err(|error| ClientError::Garbled(error.to_string()))
    }
}

/// A connection to one virtual machine monitor.
pub struct Client {
    socket: OwnedFd,
    patience: Duration,
    buffer: Vec<u8>,
    /// An earlier exchange ended in the middle: what comes next cannot be told apart.
    torn: bool,
}

impl Client {
    /// The connected socket, to learn who is at its other end.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`ClientError::PathTooLong`], [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let address = SocketAddrUnix::new(path).map_err(|_| ClientError::PathTooLong(path.into()))?;
        let failed = |errno: Errno| ClientError::Connect { path: path.into(), source: errno.into() };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                // Its backlog is full: poll does not tell when that ends.
                Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(Self { socket, patience: PATIENCE, buffer: Vec::new(), torn: false })
    }

    /// From now on a request may take so long.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Asks, and gives the answer whatever its status is.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn request(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<Response, ClientError> {
        self.request_with(method, path, body, &[])
    }

    /// [`request`](Self::request) with copies of `descriptors` beside it.
    ///
    /// # Errors
    /// As there.
    pub fn request_with(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Response, ClientError> {
        let deadline = self.ask(method, path, body, descriptors)?;
        let head = self.receive_head(deadline)?;
        let response = self.receive_body(&head, deadline)?;
        // Nobody asked for what is left over, if anything is.
        self.torn = head.closes || !self.buffer.is_empty();
        Ok(response)
    }

    /// [`request`](Self::request) whose refusal is an error.
    ///
    /// # Errors
    /// As there, and [`ClientError::Refused`].
    pub fn call(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<Option<Value>, ClientError> {
        self.request(method, path, body)?.json()
    }

    /// Listens to what happens, from now on.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn events(mut self) -> Result<Events, ClientError> {
        let deadline = self.ask(Method::Get, "/api/v1/events", None, &[])?;
        let head = self.receive_head(deadline)?;
        if head.status != 200 {
            self.receive_body(&head, deadline)?.json()?;
            return Err(ClientError::Garbled(format!("status {} is no stream of events", head.status)));
        }
        Ok(Events { client: self })
    }

    fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Instant, ClientError> {
        if self.torn {
            return Err(ClientError::Cut);
        }
        let deadline = Instant::now() + self.patience;
        let body = body.map(Value::to_string);
        let mut text = format!("{} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n", method.name());
        if let Some(body) = &body {
            let _ = write!(text, "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        } else {
            text.push_str("Content-Length: 0\r\n\r\n");
        }
        self.torn = true;
        wire::send(self.socket.as_fd(), text.as_bytes(), descriptors, deadline).map_err(|error| match error {
            WireError::Late => ClientError::Late(self.patience),
            other => other.into(),
        })?;
        Ok(deadline)
    }

    fn receive_head(&mut self, deadline: Instant) -> Result<ReplyHead, ClientError> {
        loop {
            if let Some((head, length)) = ReplyHead::parse(&self.buffer)? {
                self.buffer.drain(..length);
                // An interim answer is followed by the answer.
                if head.status >= 200 {
                    return Ok(head);
                }
                continue;
            }
            let room = HEAD_MAX.saturating_sub(self.buffer.len());
            if room == 0 {
                return Err(ClientError::Garbled(format!("its head is longer than {HEAD_MAX} bytes")));
            }
            self.receive(room, deadline)?;
        }
    }

    fn receive_body(&mut self, head: &ReplyHead, deadline: Instant) -> Result<Response, ClientError> {
        while let missing @ 1.. = head.length.saturating_sub(self.buffer.len()) {
            self.receive(missing, deadline)?;
        }
        let rest = self.buffer.split_off(head.length);
        Ok(Response { status: head.status, body: std::mem::replace(&mut self.buffer, rest) })
    }

    fn receive(&mut self, room: usize, deadline: Instant) -> Result<(), ClientError> {
        // A server has no reason to send descriptors; they are closed.
        let mut unwanted = Vec::new();
        match wire::receive(self.socket.as_fd(), &mut self.buffer, room, &mut unwanted, Some(deadline)) {
            Ok(0) => Err(ClientError::Cut),
            Ok(_) => Ok(()),
            Err(WireError::Late) => Err(ClientError::Late(self.patience)),
            Err(error) => Err(error.into()),
        }
    }
}

struct ReplyHead {
    status: u16,
    length: usize,
    closes: bool,
}

impl ReplyHead {
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, ClientError> {
        let garbled = |error: &dyn std::fmt::Display| ClientError::Garbled(error.to_string());
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut reply = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = reply.parse(bytes).map_err(|error| garbled(&error))? else {
            return Ok(None);
        };
        let mut head = Self { status: reply.code.unwrap_or_default(), length: 0, closes: false };
        for header in reply.headers.iter() {
            let value = std::str::from_utf8(header.value).map_err(|error| garbled(&error))?.trim();
            if header.name.eq_ignore_ascii_case("content-length") {
                head.length = value.parse().map_err(|error| garbled(&error))?;
            } else if header.name.eq_ignore_ascii_case("connection") {
                head.closes = value.eq_ignore_ascii_case("close");
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(garbled(&"it is sent in chunks"));
            }
        }
        if head.length > BODY_MAX {
            return Err(garbled(&format_args!("it is longer than {BODY_MAX} bytes")));
        }
        Ok(Some((head, length)))
    }
}

/// What happens to a virtual machine, as it happens.
pub struct Events {
    client: Client,
}

impl Events {
    /// The next event within `limit`; `None` when there is none.
    ///
    /// # Errors
    /// [`ClientError::Cut`] when the virtual machine monitor ends.
    pub fn next(&mut self, limit: Duration) -> Result<Option<StoryEvent>, ClientError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.client.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.client.buffer.drain(..=end).collect();
                let event = serde_json::from_slice(&line).map_err(|error| ClientError::Garbled(error.to_string()))?;
                return Ok(Some(event));
            }
            let room = BODY_MAX.saturating_sub(self.client.buffer.len());
            match self.client.receive(room, deadline) {
                Err(ClientError::Late(_)) => return Ok(None),
                other => other?,
            }
        }
    }
}
