//! A guest with Debian's full kernel whose screen is painted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_vmm::api::{Client, Method};
use rustix::process::Signal;
use serde_json::Value;
use xtask::console::Console;
use xtask::demo::BOOT_LIMIT;
use xtask::operated::Operated;
use xtask::painting::{self, Painting};
use xtask::picture::{self, Picture};
use xtask::{full_kernel, place};

use crate::processes;

const STEP: Duration = Duration::from_secs(60);
/// A picture is there this soon after what brings it.
const PICTURE_LIMIT: Duration = Duration::from_secs(10);

/// The guest.
pub struct Screen {
    /// Its machine.
    pub machine: Operated,
    /// Where its operator is heard.
    pub api: PathBuf,
    painting: Painting,
    _folder: tempfile::TempDir,
}

/// A machine's operator.
///
/// # Errors
/// Nobody listens.
pub fn operator(api: &Path) -> Result<Client> {
    Ok(Client::connect(api)?)
}

/// What the first head shows.
///
/// # Errors
/// Nobody can say at the moment.
pub fn screenshot(client: &mut Client) -> Result<Picture> {
    screenshot_of(client, 0)
}

/// What a head shows.
///
/// # Errors
/// Nobody can say at the moment.
pub fn screenshot_of(client: &mut Client, head: u32) -> Result<Picture> {
    let response = client.request(Method::Get, &format!("/api/v1/vm.screenshot/{head}"), None)?;
    ensure!(response.status == 200, "{}", String::from_utf8_lossy(&response.body));
    picture::of_png(&response.body)
}

impl Screen {
    /// A guest with these pictures, of which it has painted the first, and a display of these keys.
    ///
    /// # Errors
    /// It does not come so far.
    pub fn painted(painting: Painting, display: &str) -> Result<Self> {
        Self::painted_on(&format!("modes=[{}x{}]", painting.width, painting.height), painting, display)
    }

    /// The same, on a GPU of these keys.
    ///
    /// # Errors
    /// It does not come so far.
    pub fn painted_on(gpu: &str, painting: Painting, display: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(place::program("atoll")?);
        command
            .arg("--kernel")
            .arg(full_kernel::image()?)
            .arg("--initramfs")
            .arg(painting.initramfs(folder.path())?)
            .args(["--cmdline", "console=ttyS0 panic=-1 quiet", "--memory", "size=512M", "--cpu", "soft"])
            .args(["--gpu", gpu, "--display", display]);
        let mut screen = Self::of(&mut command, folder, painting)?;
        painting.ready(screen.console())?;
        painting::paint(screen.console(), 0)?;
        Ok(screen)
    }

    /// The guest of this command, at its first prompt; what it has to paint with is its own affair.
    ///
    /// # Errors
    /// It does not come so far.
    pub fn of(command: &mut Command, folder: tempfile::TempDir, painting: Painting) -> Result<Self> {
        let mut machine = Operated::spawn(command, folder.path())?;
        machine.console.prompt(BOOT_LIMIT)?;
        Ok(Self { machine, api: folder.path().join("api.sock"), painting, _folder: folder })
    }

    /// Its serial port.
    pub fn console(&mut self) -> &mut Console {
        &mut self.machine.console
    }

    /// Waits until all of a picture is there.
    ///
    /// # Errors
    /// It does not come.
    pub fn shows(&self, frame: u8) -> Result<()> {
        let begin = Instant::now();
        loop {
            let seen = operator(&self.api).and_then(|mut client| screenshot(&mut client));
            let left = seen.map(|(size, pixels)| self.painting.wrong(frame, size, &pixels));
            match left {
                Ok(0) => return Ok(()),
                other => ensure!(begin.elapsed() < PICTURE_LIMIT, "pixels that are wrong: {other:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the device process of this name, and gives when and which it was.
    ///
    /// # Errors
    /// There is none.
    pub fn strike(&self, program: &str) -> Result<(Instant, u32)> {
        let victim = processes::child_named(self.machine.console.pid(), program, STEP)?;
        processes::signal(victim, Signal::KILL)?;
        Ok((Instant::now(), victim))
    }

    /// The same, and waits until another one is there.
    ///
    /// # Errors
    /// None comes.
    pub fn kill(&self, program: &str) -> Result<()> {
        let (begin, victim) = self.strike(program)?;
        while processes::child_named(self.machine.console.pid(), program, STEP)? == victim {
            ensure!(begin.elapsed() < STEP, "{program} has no successor");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The device of this kind, as its operator is told of it.
    ///
    /// # Errors
    /// There is none.
    pub fn device(&self, kind: &str) -> Result<Value> {
        let devices = self.machine.get("devices")?;
        let found = devices.as_array().and_then(|all| all.iter().find(|device| device["kind"] == kind));
        found.cloned().with_context(|| format!("no {kind} in {devices}"))
    }

    /// How many processes of devices of this kind were started again.
    ///
    /// # Errors
    /// The machine does not say.
    pub fn restarts(&self, kind: &str) -> Result<u64> {
        let devices = self.machine.get("devices")?;
        let of_kind = devices.as_array().into_iter().flatten().filter(|device| device["kind"] == kind);
        Ok(of_kind.filter_map(|device| device["restarts"].as_u64()).sum())
    }

    /// Where the guest has an input device whose name has this word in it.
    ///
    /// # Errors
    /// It has none.
    pub fn input(&mut self, word: &str) -> Result<String> {
        let find =
            "for E in /sys/class/input/event*; do grep -qi $K $E/device/name && echo /dev/input/${E##*/}; done; true";
        let place = self.console().run(&format!("K={word}; {find}"), STEP)?;
        ensure!(place.starts_with("/dev/input/event"), "the guest has no {word}: {place}");
        Ok(place)
    }

    /// Switches it off; its kernel has found nothing wrong with its GPU.
    ///
    /// # Errors
    /// Or it has.
    pub fn end(mut self) -> Result<()> {
        painting::nobody_complains(self.console())?;
        self.console().send("poweroff -f\n")?;
        let (status, errors) = self.machine.console.wait(STEP)?;
        ensure!(status.success(), "{status}: {errors}");
        Ok(())
    }
}
