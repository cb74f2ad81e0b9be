//! Commands that ask a running machine for something.

use std::io::{self, Write, stdout};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use atoll_vmm::api::{Client, ClientError, Method};
use atoll_vmm::config::{ConsoleConfig, DeviceConfig, bytes_of};
use atoll_vmm::lifecycle::{DeviceReport, DeviceState, VmInfo, VmState};
use atoll_vmm::rundir::{RunRoot, RunningVm};
use atoll_vmm::vhost::UPGRADE_TRIAL;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde_json::{Value, json};

use crate::described;
use crate::run::{GROUP, RunError, TAP, inherited};
use crate::table;
use crate::target::{self, Machine, ROOT};
use atoll_vmm::machine::LinkState;

/// How long `ps` waits for each machine.
const PS_PATIENCE: Duration = Duration::from_secs(1);
/// How long a machine has to end: its devices stop within less.
const END_MAX: Duration = Duration::from_secs(30);
/// How often to look whether it has.
const END_LOOK: Duration = Duration::from_millis(10);
/// How often to look whether a device has gone.
const GONE_LOOK: Duration = Duration::from_millis(100);

/// Prints; a reader that is gone is no mistake.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => String::new(),
    }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// What `ps` tells of a machine.
#[derive(Serialize)]
struct Listed {
    name: String,
    /// `No machine` while none was created, `No answer` when the process is busy or stuck.
    state: String,
    pid: Option<u32>,
    vcpus: Option<u32>,
    memory: Option<u64>,
    devices: Option<usize>,
    api_socket: PathBuf,
}

fn listed(vm: &RunningVm) -> Listed {
    let asked = Machine::briefly(vm, PS_PATIENCE).and_then(|mut machine| machine.info());
    let (state, info) = match asked {
        Ok(info) => (word(info.state), Some(info)),
        Err(error) if error.to_string().contains("no machine") => ("No machine".into(), None),
        Err(_) => ("No answer".into(), None),
    };
    Listed {
        name: vm.name.clone(),
        state,
        pid: vm.pid,
        vcpus: info.as_ref().map(|info| info.config.cpus.boot_vcpus),
        memory: info.as_ref().map(|info| info.memory_actual_size),
        devices: info.as_ref().map(|info| info.config.devices().len()),
        api_socket: vm.api_socket(),
    }
}

/// `ps`.
pub(crate) fn ps(as_json: bool) -> anyhow::Result<()> {
    let all: Vec<Listed> = RunRoot::of_user()?.list().iter().map(listed).collect();
    if as_json {
        return print_json(&all);
    }
    let mut rows = vec![row(["NAME", "STATE", "PID", "VCPUS", "MEMORY", "DEVICES"])];
    let number = |number: Option<String>| number.unwrap_or_else(|| "-".into());
    rows.extend(all.iter().map(|vm| {
        vec![
            vm.name.clone(),
            vm.state.clone(),
            number(vm.pid.map(|pid| pid.to_string())),
            number(vm.vcpus.map(|vcpus| vcpus.to_string())),
            number(vm.memory.map(table::bytes)),
            number(vm.devices.map(|count| count.to_string())),
        ]
    }));
    print(&table::table(&rows, &[2, 3, 4, 5]))
}

fn port(name: &str, port: Option<&ConsoleConfig>) -> Option<String> {
    let port = port?;
    let place = port.file.as_ref().or(port.socket.as_ref());
    let place = place.map(|place| format!(" {}", place.display())).unwrap_or_default();
    Some(format!("{name:<9}{}{place}\n", word(port.mode).to_lowercase()))
}

fn device_rows(devices: &[DeviceReport]) -> Vec<Vec<String>> {
    let mut rows = vec![row(["DEVICE", "KIND", "PLACE", "STATE", "RECOVERY", "PID", "GENERATION", "RESTARTS", ""])];
    let optional = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    rows.extend(devices.iter().map(|device| {
        let unplugged = || (device.link == Some(LinkState::Down)).then(|| "link down".into());
        let last = || device.last_exit.as_ref().map(|exit| format!("last: {exit}"));
        let why = device.reason.clone().or_else(|| device.upgrade.clone()).or_else(unplugged).or_else(last);
        vec![
            device.id.clone(),
            device.kind.name().into(),
            optional(device.bdf.clone()),
            word(device.state),
            word(device.recovery),
            optional(device.pid.map(|pid| pid.to_string())),
            device.generation.to_string(),
            device.restarts.to_string(),
            why.unwrap_or_default(),
        ]
    }));
    rows
}

fn about(info: &VmInfo, devices: &[DeviceReport]) -> String {
    let config = &info.config;
    let mut text = format!(
        "{:<9}{}\n{:<9}{}\n{:<9}{}\n",
        "state",
        word(info.state),
        "vcpus",
        config.cpus.boot_vcpus,
        "memory",
        table::bytes(info.memory_actual_size)
    );
    let files = [("kernel", &config.payload.kernel), ("initrd", &config.payload.initramfs)];
    for (name, path) in files {
        if let Some(path) = path {
            text.push_str(&format!("{name:<9}{}\n", path.display()));
        }
    }
    if let Some(line) = &config.payload.cmdline {
        text.push_str(&format!("{:<9}{line}\n", "cmdline"));
    }
    let ports = [("serial", &config.serial), ("serial2", &config.serial2), ("console", &config.console)];
    text.extend(ports.iter().filter_map(|(name, config)| port(name, config.as_ref())));
    if !devices.is_empty() {
        text.push('\n');
        text.push_str(&table::table(&device_rows(devices), &[5, 6, 7]));
    }
    text
}

/// `info`.
pub(crate) fn info(name: &str, as_json: bool) -> anyhow::Result<()> {
    let mut machine = Machine::find(name)?;
    if as_json {
        return print_json(&machine.get("vm.info")?);
    }
    let info = machine.info()?;
    let devices = machine.devices()?;
    print(&about(&info, &devices))
}

/// A command without anything to say but that it was done.
pub(crate) fn put(name: &str, path: &str) -> anyhow::Result<()> {
    Machine::find(name)?.put(path, None).map(drop)
}

/// Ends a machine and its process, and waits until that has ended.
pub(crate) fn end(name: &str) -> anyhow::Result<()> {
    let socket = target::socket(name)?;
    let mut machine = Machine::at(&socket)?;
    // Held before it is asked to end, so that its id cannot be somebody else's by then.
    let process = machine.process()?;
    machine.put("vmm.shutdown", None)?;
    let deadline = Instant::now() + END_MAX;
    let ended = match process {
        Some(process) => ends_by(&process, deadline)?,
        // It runs out of sight: behind somebody else's socket, or in another namespace of processes.
        None => loop {
            match (socket.exists(), Instant::now() < deadline) {
                (false, _) => break true,
                (true, false) => break false,
                (true, true) => std::thread::sleep(END_LOOK),
            }
        },
    };
    anyhow::ensure!(ended, "{name} is ending, and has not ended within {} s", END_MAX.as_secs());
    Ok(())
}

/// Whether a process has ended by `deadline`.
fn ends_by(process: &OwnedFd, deadline: Instant) -> anyhow::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&Timespec::try_from(left)?)) {
            Ok(ended) => return Ok(ended > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Paths of the command line are those of its folder, not of the machine's process.
fn make_absolute(device: &mut DeviceConfig) -> anyhow::Result<()> {
    let paths: Vec<&mut PathBuf> = match device {
        DeviceConfig::Disk(disk) => disk.path.iter_mut().chain(&mut disk.vhost_socket).collect(),
        DeviceConfig::Net(net) => net.pcap.iter_mut().chain(&mut net.vhost_socket).collect(),
        DeviceConfig::Fs(fs) => vec![&mut fs.socket],
        DeviceConfig::Vsock(vsock) => vec![&mut vsock.socket],
        DeviceConfig::Generic(generic) => vec![&mut generic.socket],
        DeviceConfig::Passthrough(function) => vec![&mut function.path],
        DeviceConfig::Nvme(nvme) => vec![&mut nvme.path],
        DeviceConfig::User(device) => vec![&mut device.socket],
        DeviceConfig::Gpu(gpu) => gpu.socket.iter_mut().collect(),
        DeviceConfig::Rng(_) | DeviceConfig::Console(_) | DeviceConfig::Input(_) => Vec::new(),
    };
    for path in paths {
        *path = std::path::absolute(&path).with_context(|| format!("{} has no absolute path", path.display()))?;
    }
    Ok(())
}

/// `add-disk` and its like.
pub(crate) fn add(command: &'static str, name: &str, keys: &str) -> Result<(), RunError> {
    let mut device = described::device(command, keys).map_err(|error| RunError::Usage(error.into()))?;
    make_absolute(&mut device)?;
    let mut descriptors = Vec::new();
    let (path, body) = match &device {
        DeviceConfig::Disk(disk) => ("vm.add-disk", json!(disk)),
        DeviceConfig::Net(net) => {
            for fd in net.fds.iter().flatten() {
                descriptors.push(inherited(command, *fd, TAP)?);
            }
            ("vm.add-net", json!(net))
        }
        DeviceConfig::Fs(fs) => ("vm.add-fs", json!(fs)),
        DeviceConfig::Vsock(vsock) => ("vm.add-vsock", json!(vsock)),
        DeviceConfig::Generic(generic) => ("vm.add-generic-vhost-user", json!(generic)),
        DeviceConfig::Nvme(nvme) => ("vm.add-nvme", json!(nvme)),
        DeviceConfig::User(device) => ("vm.add-user-device", json!(device)),
        DeviceConfig::Passthrough(function) => {
            if let Some(fd) = function.fd {
                descriptors.push(inherited(command, fd, GROUP)?);
            }
            ("vm.add-device", json!(function))
        }
        DeviceConfig::Rng(_) | DeviceConfig::Console(_) | DeviceConfig::Gpu(_) | DeviceConfig::Input(_) => {
            return Err(anyhow::anyhow!("it cannot be plugged in").into());
        }
    };
    let mut client: Client = Machine::find(name)?.into_client();
    let beside: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let answer = client
        .request_with(Method::Put, &format!("{ROOT}/{path}"), Some(&body), &beside)
        .and_then(|response| response.json())
        .map_err(anyhow::Error::from)?;
    let told = match answer {
        Some(plugged) => {
            let text = |key: &str| plugged.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
            format!("{} at {}\n", text("id"), text("bdf"))
        }
        None => "added; it is there when the machine boots\n".into(),
    };
    Ok(print(&told)?)
}

/// `remove`.
pub(crate) fn remove(name: &str, id: &str, wait_s: u64) -> anyhow::Result<()> {
    let socket = target::socket(name)?;
    Machine::at(&socket)?.put("vm.remove-device", Some(&json!({ "id": id })))?;
    if wait_s == 0 {
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(wait_s);
    let mut machine = Machine::at(&socket)?;
    loop {
        match machine.devices()?.into_iter().find(|device| device.id == id) {
            None => return Ok(()),
            Some(device) if device.state != DeviceState::Unplugging => {
                anyhow::bail!("the guest keeps {id} ({}); unmount it there and try again", word(device.state))
            }
            // Nobody in the guest can answer: to wait would be in vain.
            Some(_) if machine.info()?.state == VmState::Paused => {
                anyhow::bail!("the machine is paused: its guest can let {id} go when it goes on (atoll resume {name})")
            }
            Some(_) if Instant::now() >= deadline => anyhow::bail!(
                "the guest has not let {id} go within {wait_s} s; it may still: atoll events {name} tells"
            ),
            Some(_) => std::thread::sleep(GONE_LOOK),
        }
    }
}

/// `resize-disk`.
pub(crate) fn resize_disk(name: &str, id: &str, size: &str, shrink: bool) -> Result<(), RunError> {
    let Some(bytes) = bytes_of(size) else {
        let text =
            format!("resize-disk: '{size}' is no size: a number of bytes, with K, M, G or T after it, is expected");
        return Err(RunError::Usage(described::UsageError::Where(text)));
    };
    let body = json!({ "id": id, "desired_size": bytes, "allow_shrink": shrink });
    Machine::find(name)?.put("vm.resize-disk", Some(&body))?;
    Ok(())
}

/// `link`.
pub(crate) fn link(name: &str, id: &str, link: LinkState) -> anyhow::Result<()> {
    Machine::find(name)?.put("vm.set-link", Some(&json!({ "id": id, "link": link })))?;
    Ok(())
}

/// `revive`.
pub(crate) fn revive(name: &str, id: &str) -> anyhow::Result<()> {
    Machine::find(name)?.put("vm.revive-device", Some(&json!({ "id": id })))?;
    Ok(())
}

/// `upgrade`.
pub(crate) fn upgrade(name: &str, id: &str, exe: &Path, step_ms: u32) -> anyhow::Result<()> {
    let exe = exe.canonicalize().map_err(|error| anyhow::anyhow!("{}: {error}", exe.display()))?;
    let body = json!({ "id": id, "exe": exe, "step_ms": step_ms });
    let answer = Machine::find(name)?.put("vm.upgrade-device", Some(&body))?;
    let generation = answer.as_ref().and_then(|answer| answer["generation"].as_u64()).unwrap_or_default();
    let trial = UPGRADE_TRIAL.as_secs();
    let line = format!(
        "{id} is served by {} now (generation {generation}); for {trial} s it is on probation: if it dies, the program before \
         it comes back (`atoll info`)\n",
        exe.display()
    );
    stdout().write_all(line.as_bytes())?;
    Ok(())
}

/// `fault`.
pub(crate) fn fault(name: &str, id: &str, fault: atoll_vmm::vhost::Fault, seed: u64) -> anyhow::Result<()> {
    Machine::find(name)?.put("vm.fault-device", Some(&json!({ "id": id, "fault": fault, "seed": seed })))?;
    Ok(())
}

/// `events`.
pub(crate) fn events(name: &str) -> anyhow::Result<()> {
    let mut events = Machine::find(name)?.into_client().events()?;
    // Whoever ends says so first.
    let mut told = false;
    loop {
        match events.next(Duration::from_secs(3600)) {
            Ok(Some(event)) => {
                told |= (event.source.as_str(), event.event.as_str()) == ("vmm", "shutdown");
                let line = format!("{}\n", serde_json::to_string(&event)?);
                if stdout().write_all(line.as_bytes()).and_then(|()| stdout().flush()).is_err() {
                    return Ok(());
                }
            }
            Ok(None) => {}
            Err(ClientError::Cut) if told => return Ok(()),
            Err(ClientError::Cut) => return Err(target::vanished(name)),
            Err(error) => return Err(error.into()),
        }
    }
}

/// `inspect`.
pub(crate) fn inspect(name: &str, path: &str) -> anyhow::Result<()> {
    let path = path.trim_matches('/');
    let resource = if path.is_empty() { "inspect".into() } else { format!("inspect/{path}") };
    print_json(&Machine::find(name)?.get(&resource)?)
}

#[cfg(test)]
mod tests {
    use atoll_vmm::config::{DeviceKind, VmConfig};
    use atoll_vmm::lifecycle::RecoveryClass;

    use super::*;

    #[test]
    fn a_machine_is_shown_with_its_devices() {
        let info = VmInfo { config: VmConfig::default(), state: VmState::Running, memory_actual_size: 512 << 20 };
        let device = DeviceReport {
            id: "_disk0".into(),
            kind: DeviceKind::Disk,
            bdf: Some("0000:00:01.0".into()),
            state: DeviceState::Recovering,
            reason: None,
            generation: 2,
            restarts: 1,
            failed_starts: 0,
            upgrade: None,
            link: None,
            recovery: RecoveryClass::IdleOnly,
            counted: None,
            pid: Some(7),
            exe: None,
            standby: None,
            jail: std::collections::BTreeMap::new(),
            last_exit: Some("signal 9".into()),
            last_lines: Vec::new(),
            queues: Vec::new(),
        };
        let text = about(&info, &[device]);
        assert!(text.contains("state    Running\n") && text.contains("memory   512M\n"), "{text}");
        assert!(
            text.contains("recovering") && text.contains("idle-only") && text.ends_with("last: signal 9\n"),
            "{text}"
        );
    }
}
