//! Which machine a command is for, and how it is asked.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use atoll_vmm::api::{Client, ClientError, Method};
use atoll_vmm::lifecycle::{DeviceReport, VmInfo, VmState};
use atoll_vmm::rundir::{RunRoot, RunningVm};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// How long a machine may take to answer a question.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long it may take to carry something out: pausing and plugging wait for devices.
const DEED_MAX: Duration = Duration::from_secs(200);

/// How long a machine whose serial line has ended is given to end too.
const AFTERMATH_MAX: Duration = Duration::from_secs(3);

/// Paths of the API.
pub(crate) const ROOT: &str = "/api/v1";

/// The API socket of the machine that is called `name`: a path where it has a slash.
pub(crate) fn socket(name: &str) -> anyhow::Result<PathBuf> {
    if name.contains('/') {
        return Ok(name.into());
    }
    Ok(RunRoot::of_user()?.find(name)?.api_socket())
}

/// The only machine that runs, or the one that is called `name`.
pub(crate) fn named_or_only(name: Option<&str>) -> anyhow::Result<String> {
    if let Some(name) = name {
        return Ok(name.into());
    }
    let mut running = RunRoot::of_user()?.list();
    match (running.pop(), running.is_empty()) {
        (Some(vm), true) => Ok(vm.name),
        (None, _) => anyhow::bail!("no machine runs; start one with atoll run"),
        (Some(vm), false) => {
            let names: Vec<_> = running.iter().chain([&vm]).map(|vm| vm.name.as_str()).collect();
            anyhow::bail!("several machines run; name one of {}", names.join(", "))
        }
    }
}

/// Its virtual machine monitor has ended without a word.
pub(crate) fn vanished(name: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "the process of {name} is gone without having said why: it was killed, or it crashed; its log may tell"
    )
}

/// What became of a machine whose serial line has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aftermath {
    /// It was switched off, or its process ended as it should.
    Ended,
    /// It runs on.
    Runs,
    /// Its process is gone and has left its socket behind.
    Vanished,
}

/// Looks what became of the machine that serves `socket`, for as long as it seems to run on.
pub(crate) fn aftermath(socket: &Path) -> Aftermath {
    let deadline = Instant::now() + AFTERMATH_MAX;
    loop {
        match Client::connect(socket) {
            Err(ClientError::Connect { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Aftermath::Ended;
            }
            Err(_) => return Aftermath::Vanished,
            // While it ends it may not answer any more.
            Ok(client) => match Machine(client.with_patience(AFTERMATH_MAX)).info() {
                Ok(info) if matches!(info.state, VmState::Running | VmState::Paused) => {}
                Ok(_) => return Aftermath::Ended,
                Err(_) => {}
            },
        }
        if Instant::now() >= deadline {
            return Aftermath::Runs;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A connection to a machine.
pub(crate) struct Machine(Client);

impl Machine {
    /// The machine that is called `name`.
    pub(crate) fn find(name: &str) -> anyhow::Result<Self> {
        Self::at(&socket(name)?)
    }

    /// The machine that serves `socket`.
    pub(crate) fn at(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self(Client::connect(socket)?))
    }

    /// A machine of the list, for a question that must not take long.
    pub(crate) fn briefly(vm: &RunningVm, patience: Duration) -> anyhow::Result<Self> {
        Ok(Self(Client::connect(&vm.api_socket())?.with_patience(patience)))
    }

    /// Reads the resource `path`.
    pub(crate) fn get(&mut self, path: &str) -> anyhow::Result<Value> {
        Ok(self.0.call(Method::Get, &format!("{ROOT}/{path}"), None)?.unwrap_or_default())
    }

    /// Reads the resource `path` as text.
    pub(crate) fn text(&mut self, path: &str) -> anyhow::Result<String> {
        let response = self.0.request(Method::Get, path, None)?;
        anyhow::ensure!(response.status == 200, "{path} is refused with status {}", response.status);
        String::from_utf8(response.body).context("the answer is no text")
    }

    /// Reads the resource `path` as it is.
    pub(crate) fn bytes(&mut self, path: &str) -> anyhow::Result<Vec<u8>> {
        let response = self.0.request(Method::Get, &format!("{ROOT}/{path}"), None)?;
        if response.status != 200 {
            response.json()?;
        }
        Ok(response.body)
    }

    fn read<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<T> {
        serde_json::from_value(self.get(path)?).with_context(|| format!("the answer of {path} cannot be read"))
    }

    /// Configuration and state.
    pub(crate) fn info(&mut self) -> anyhow::Result<VmInfo> {
        self.read("vm.info")
    }

    /// Devices with their processes.
    pub(crate) fn devices(&mut self) -> anyhow::Result<Vec<DeviceReport>> {
        self.read("devices")
    }

    /// Has something done.
    pub(crate) fn put(self, path: &str, body: Option<&Value>) -> anyhow::Result<Option<Value>> {
        let mut client = self.0.with_patience(DEED_MAX);
        Ok(client.call(Method::Put, &format!("{ROOT}/{path}"), body)?)
    }

    /// The process that serves it, where it can be told for certain: who made the socket is who answers.
    pub(crate) fn process(&mut self) -> anyhow::Result<Option<OwnedFd>> {
        let says = self.get("vmm.ping")?["pid"].as_i64();
        let Ok(peer) = socket_peercred(self.0.socket()) else { return Ok(None) };
        if says != Some(peer.pid.as_raw_nonzero().get().into()) {
            return Ok(None);
        }
        // It has just answered on this connection, so the id is still its own.
        Ok(pidfd_open(peer.pid, PidfdFlags::empty()).ok())
    }

    /// The connection itself.
    pub(crate) fn into_client(self) -> Client {
        self.0.with_patience(ANSWER_MAX)
    }
}
