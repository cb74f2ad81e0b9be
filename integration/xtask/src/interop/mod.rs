//! `cargo xtask interop`: our device processes behind the newest foreign front end, which Debian 12 does not have.

pub mod gpu;
mod monitor;
pub mod nvme;
pub mod smpte;

use crate::place;
use crate::qemu::Qemu;
use anyhow::{Result, ensure};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a guest may take to start on a processor that is emulated, and to do one thing.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// How long a device process may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
const MEMORY: &str = "512M";

/// A machine without devices, whose memory other processes can map, with its console on the terminal.
fn machine(qemu: &Qemu) -> Command {
    let mut command = qemu.command();
    command
        .args(["-M", "q35", "-accel", "tcg", "-m", MEMORY, "-machine", "memory-backend=m"])
        .args(["-object", &format!("memory-backend-memfd,id=m,size={MEMORY},share=on")])
        .args(["-display", "none", "-serial", "stdio", "-monitor", "none", "-nodefaults", "-no-reboot"]);
    command
}

/// A device process, which ends with its owner.
struct Device(Child);

impl Device {
    fn start(program: &str, socket: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(place::program(program)?);
        let child = command.arg("--socket").arg(socket).args(arguments).stdout(Stdio::null()).spawn()?;
        let device = Self(child);
        let deadline = Instant::now() + LISTEN_LIMIT;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "{program} does not listen at {}", socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(device)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
