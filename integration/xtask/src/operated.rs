//! A VM with a hand on its console and another on its operator's socket: what soaks and whole-VM tests of the lifecycle
//! drive. The socket is spoken to in plain text here, so that it is not our own client that finds our server in order.

use crate::console::Console;
use crate::processes;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long the socket may take to be there.
const SOCKET_LIMIT: Duration = Duration::from_secs(60);

/// What a process has open and running.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Belongings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Its children's process ids, in order.
    pub children: Vec<u32>,
}

impl Belongings {
    /// Those of a running process.
    pub fn of(pid: u32) -> Result<Self> {
        let count = |folder: &str| -> Result<usize> {
            let path = format!("/proc/{pid}/{folder}");
            Ok(std::fs::read_dir(&path).with_context(|| format!("cannot list {path}"))?.count())
        };
        let mut children = processes::children(pid);
        children.sort_unstable();
        Ok(Self { descriptors: count("fd")?, threads: count("task")?, children })
    }
}

/// The VM.
pub struct Operated {
    /// Its serial port.
    pub console: Console,
    socket: PathBuf,
}

impl Operated {
    /// Starts `command`, an `atoll run` with its console on the terminal, with an operator's socket in `folder`.
    pub fn spawn(command: &mut Command, folder: &Path) -> Result<Self> {
        let socket = folder.join("api.sock");
        command.arg("--api-socket").arg(&socket);
        let console = Console::spawn(command)?;
        let deadline = Instant::now() + SOCKET_LIMIT;
        while UnixStream::connect(&socket).is_err() {
            if !processes::alive(console.pid()) {
                let (status, errors) = console.wait(REQUEST_LIMIT)?;
                bail!("atoll ended with {status} before it listened: {errors}");
            }
            if Instant::now() >= deadline {
                bail!("nobody listens at {} within {SOCKET_LIMIT:?}", socket.display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { console, socket })
    }

    /// `PUT /api/v1/{path}`.
    pub fn put(&self, path: &str, body: Option<&Value>) -> Result<Option<Value>> {
        self.request("PUT", path, body)
    }

    /// `GET /api/v1/{path}`.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request("GET", path, None)?.with_context(|| format!("GET {path} gives nothing"))
    }

    fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Option<Value>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(REQUEST_LIMIT))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        write!(
            stream,
            "{method} /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut reply = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            if let Some((status, answer)) = whole(&reply)? {
                if !(200..300).contains(&status) {
                    bail!("{method} {path}: status {status}: {}", String::from_utf8_lossy(answer));
                }
                return if answer.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_slice(answer)?)) };
            }
            match stream.read(&mut chunk).with_context(|| format!("{method} {path} is not answered"))? {
                0 => bail!("{method} {path}: the connection ended after {:?}", String::from_utf8_lossy(&reply)),
                read => reply.extend_from_slice(&chunk[..read]),
            }
        }
    }
}

/// Status and body of a reply, once all of it is there.
fn whole(reply: &[u8]) -> Result<Option<(u16, &[u8])>> {
    let Some(end) = reply.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&reply[..end])?;
    let status = head.split_whitespace().nth(1).context("a reply without a status")?.parse()?;
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let length: usize = length.map_or(Ok(0), |length| length.trim().parse())?;
    Ok(reply.get(end + 4..end + 4 + length).map(|body| (status, body)))
}
