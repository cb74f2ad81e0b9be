//! User-mode networking: passt, which needs no rights on the host, behind a network card.
//!
//! A passt that speaks vhost-user serves the card by itself. An older one has a stream socket, and `atoll-net` stands
//! between it and the guest; so it does where a capture, a rate limit or more queues are wanted, which passt has not.
//! Each incarnation of the backend gets a passt of its own, which ends when its socket closes: connections through it
//! do not outlive it, the card does.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::{Host, KindError};
use crate::backend::{COMPANION_END, Companion, CompanionSpec, PassedFd, Spawner};
use crate::vhost::patience::Patience;
use crate::vhost::source::{BackendProcess, BackendSource, Build, EndIsEnough, Fence, Incarnation, SourceError};
use crate::vhost::spawned::MakeDescriptors;
use crate::vhost::upgrade::Lone;

/// How long passt may take to print its options.
const PROBE_MAX: Duration = Duration::from_secs(2);
/// What a guest gets where the host has no network of which passt could take over the addresses.
const WITHOUT_NETWORK: [&str; 9] = ["-4", "-i", "lo", "-a", "10.0.2.15", "-g", "10.0.2.2", "-M", "52:55:0a:00:02:02"];

/// Why there is no user-mode networking.
#[derive(Debug, Error)]
pub enum UserError {
    /// Not installed.
    #[error("user=on needs passt, which is not on PATH: install the package passt, or use tap= or switch=")]
    Missing,
    /// Somebody else has a port that is to be forwarded.
    #[error("forward={rule}: port {port} of this host cannot be had ({source}); choose another one")]
    Port {
        /// As the user gave it.
        rule: String,
        /// The host's port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It does not run.
    #[error("{} does not run: {reason}", .exe.display())]
    Probe {
        /// Which.
        exe: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// What the user wants of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct UserMode {
    /// `HOSTPORT:GUESTPORT` or `udp:HOSTPORT:GUESTPORT`, checked.
    pub(super) forward: Vec<String>,
    /// Largest packet.
    pub(super) mtu: Option<u16>,
    /// `atoll-net` is wanted between passt and the guest.
    pub(super) through_net: bool,
}

/// A rule without its protocol, and whether that is UDP.
fn ports(rule: &str) -> (bool, &str) {
    match rule.strip_prefix("udp:") {
        Some(ports) => (true, ports),
        None => (false, rule.strip_prefix("tcp:").unwrap_or(rule)),
    }
}

/// Finds a port that is taken before passt does, which could say so only in its log.
fn try_port(rule: &str) -> Result<(), UserError> {
    let (udp, ports) = ports(rule);
    let Some(port) = ports.split(':').next().and_then(|port| port.parse::<u16>().ok()) else { return Ok(()) };
    let bound = if udp {
        std::net::UdpSocket::bind(("127.0.0.1", port)).map(drop)
    } else {
        std::net::TcpListener::bind(("127.0.0.1", port)).map(drop)
    };
    bound.map_err(|source| UserError::Port { rule: rule.to_owned(), port, source })
}

/// Where passt is installed.
fn find() -> Result<PathBuf, UserError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join("passt")).find(|exe| exe.is_file()).ok_or(UserError::Missing)
}

/// Whether this passt speaks vhost-user, by the options that it lists.
fn speaks_vhost_user(exe: &Path) -> Result<bool, UserError> {
    let failed = |reason: String| UserError::Probe { exe: exe.to_owned(), reason };
    let mut child = Command::new(exe)
        .arg("--help")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let deadline = Instant::now() + PROBE_MAX;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("it did not list its options within {PROBE_MAX:?}")));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
    }
    // It has ended, so what it wrote is in the pipes, as far as they hold: its list is shorter than that.
    let mut text = String::new();
    let read = |pipe: Option<&mut dyn Read>, text: &mut String| {
        if let Some(pipe) = pipe {
            let mut bytes = Vec::new();
            let _ = pipe.take(1 << 16).read_to_end(&mut bytes);
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
    };
    read(child.stdout.as_mut().map(|pipe| pipe as &mut dyn Read), &mut text);
    read(child.stderr.as_mut().map(|pipe| pipe as &mut dyn Read), &mut text);
    Ok(text.contains("--vhost-user"))
}

/// Whether the host has a way out, whose addresses a guest can share.
fn has_route() -> bool {
    let default4 = |line: &str| line.split_ascii_whitespace().nth(1) == Some("00000000");
    let default6 = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let net = fields.next().is_some_and(|net| net.bytes().all(|digit| digit == b'0'));
        net && fields.next() == Some("00") && line.split_ascii_whitespace().last() != Some("lo")
    };
    let any = |path: &str, default: &dyn Fn(&str) -> bool| {
        std::fs::read_to_string(path).is_ok_and(|text| text.lines().any(default))
    };
    any("/proc/net/route", &default4) || any("/proc/net/ipv6_route", &default6)
}

/// How passt is started, but for its socket.
fn arguments(wish: &UserMode, routed: bool) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--foreground".into(), "--quiet".into()];
    if !routed {
        args.extend(WITHOUT_NETWORK.iter().map(OsString::from));
    }
    if let Some(mtu) = wish.mtu {
        args.extend(["--mtu".into(), mtu.to_string().into()]);
    }
    for rule in &wish.forward {
        // On the loopback address: what is forwarded is for this host.
        let (udp, ports) = ports(rule);
        let flag = if udp { "--udp-ports" } else { "--tcp-ports" };
        args.extend([flag.into(), format!("127.0.0.1/{ports}").into()]);
    }
    args
}

/// A passt that runs.
struct Passt {
    exe: PathBuf,
    args: Vec<OsString>,
    name: String,
    spawner: Spawner,
}

impl Passt {
    fn start(&self, more: Option<&str>, socket: UnixStream) -> Result<Companion, crate::backend::SpawnError> {
        let mut args = self.args.clone();
        args.extend(more.map(OsString::from));
        let fds = vec![PassedFd { flag: "--fd".into(), fd: OwnedFd::from(socket) }];
        self.spawner.companion(CompanionSpec { name: self.name.clone(), exe: self.exe.clone(), args, fds })
    }
}

/// Where the backends of a card in user mode come from.
pub(super) fn source(
    wish: &UserMode,
    host: &Host,
    net: impl FnOnce(MakeDescriptors) -> Result<Box<dyn BackendSource>, KindError>,
) -> Result<Box<dyn BackendSource>, KindError> {
    let exe = find()?;
    wish.forward.iter().try_for_each(|rule| try_port(rule))?;
    let direct = !wish.through_net && speaks_vhost_user(&exe)?;
    let args = arguments(wish, has_route());
    let passt = Passt { exe, args, name: host.name.clone(), spawner: host.spawner.clone() };
    if direct {
        return Ok(Box::new(PasstBackend(passt)));
    }
    // Kept until the next incarnation of atoll-net takes its place.
    let running: Mutex<Option<Arc<Companion>>> = Mutex::default();
    net(Box::new(move || {
        let (theirs, ours) = UnixStream::pair()?;
        let companion = passt.start(None, theirs)?;
        *running.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(companion));
        Ok(vec![PassedFd { flag: "--stream-fd".into(), fd: OwnedFd::from(ours) }])
    }))
}

/// passt as the backend itself.
struct PasstBackend(Passt);

impl BackendSource for PasstBackend {
    fn connect(&mut self, _generation: u64, _patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| SourceError::Start { hopeless: false, source };
        let (socket, theirs) = UnixStream::pair().map_err(|error| failed(error.into()))?;
        let companion = self.0.start(Some("--vhost-user"), theirs).map_err(|error| failed(error.into()))?;
        Ok(Incarnation { socket, process: Some(Box::new(PasstProcess(companion))) })
    }
    fn build(&self) -> Result<Arc<Build>, Lone> {
        Err(Lone::User)
    }
    fn describe(&self) -> String {
        self.0.exe.display().to_string()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(EndIsEnough)
    }
}

struct PasstProcess(Companion);

impl BackendProcess for PasstProcess {
    fn id(&self) -> u32 {
        self.0.pid()
    }
    fn ended(&self) -> BorrowedFd<'_> {
        self.0.ended()
    }
    fn kill(&mut self, deadline: Instant) -> String {
        self.0.kill();
        self.0.await_end(deadline).unwrap_or_else(|| format!("process {} has not ended yet", self.0.pid()))
    }
    fn measure(&mut self, _patience: &mut Patience) -> Result<u64, String> {
        Err("passt has no size".into())
    }
    fn finish(&mut self, deadline: Instant) -> String {
        // Its socket was closed, which is its order to end.
        match self.0.await_end(deadline) {
            Some(end) => end,
            None => self.kill(Instant::now() + COMPANION_END),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(wish: &UserMode, routed: bool) -> String {
        arguments(wish, routed).iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    /// What is forwarded listens on the loopback address only; a host without a network still has one for its guests.
    #[test]
    fn wishes_become_arguments() {
        let forward = vec!["2222:22".to_owned(), "udp:5353:53".to_owned()];
        let wish = UserMode { forward, mtu: Some(1400), through_net: false };
        let expected = "--foreground --quiet --mtu 1400 --tcp-ports 127.0.0.1/2222:22 --udp-ports 127.0.0.1/5353:53";
        assert_eq!(text(&wish, true), expected);
        assert!(text(&UserMode::default(), false).contains("-a 10.0.2.15"));
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        let error = try_port(&format!("{port}:22")).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("choose another"), "{error}");
        drop(holder);
        try_port(&format!("tcp:{port}:22")).unwrap();
    }
}
