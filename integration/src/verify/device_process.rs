//! A device process with a listening socket, killed and started again under load.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long it may take to listen: its predecessor's I/O has to end first.
const LISTEN_MAX: Duration = Duration::from_secs(20);

/// A running device process; killed when dropped.
pub struct DeviceProcess {
    program: PathBuf,
    arguments: Vec<String>,
    socket: PathBuf,
    child: Child,
}

impl DeviceProcess {
    /// Starts `program` with a socket in `folder` and these arguments besides.
    pub fn start(program: &Path, folder: &Path, arguments: &[&str]) -> Result<Self> {
        let socket = folder.join("device.sock");
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let child = spawn(program, &socket, &arguments)?;
        Ok(Self { program: program.to_owned(), arguments, socket, child })
    }

    /// Connects as soon as it listens.
    pub fn connect(&mut self) -> Result<UnixStream> {
        let deadline = Instant::now() + LISTEN_MAX;
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return Ok(stream),
                Err(e) if Instant::now() > deadline => return Err(e).context("the device process does not listen"),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the device process ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGKILL, and its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts a successor.
    pub fn restart(&mut self) -> Result<()> {
        self.child = spawn(&self.program, &self.socket, &self.arguments)?;
        Ok(())
    }
}

fn spawn(program: &Path, socket: &Path, arguments: &[String]) -> Result<Child> {
    Command::new(program)
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

impl Drop for DeviceProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
