//! The newest QEMU that Debian's archive has, for words that Debian 12's does not speak: that of the next release and its
//! backports, unpacked without root and run with the loader and the libraries that it was linked with. apt finds what belongs to it,
//! by lists of its own, and checks what it fetches against the archive's signatures.

use crate::{packages, place};
use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The release, and where its newer packages are.
const RELEASE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";
const PACKAGE: &str = "qemu-system-x86";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A QEMU of a later Debian.
#[derive(Clone, Debug)]
pub struct Qemu {
    root: PathBuf,
}

/// apt with lists, state and a cache in `folder`, as on a machine with nothing installed.
fn apt(folder: &Path) -> Command {
    let mut command = Command::new("apt-get");
    let option = |name: &str, value: &str| {
        let mut words = OsString::from(format!("{name}="));
        words.push(folder.join(value));
        words
    };
    for (name, value) in [
        ("Dir::State", ""),
        ("Dir::State::status", "status"),
        ("Dir::State::Lists", "lists"),
        ("Dir::Etc::sourcelist", "sources.list"),
        ("Dir::Etc::sourceparts", "none"),
        ("Dir::Etc::preferencesparts", "none"),
        ("Dir::Cache", ""),
        ("Dir::Cache::archives", "archives"),
    ] {
        command.arg("-o").arg(option(name, value));
    }
    command.args(["-qq", "-o", "Debug::NoLocking=true", "-o", "APT::Architecture=amd64"]);
    command
}

impl Qemu {
    /// Fetches it (once) and unpacks it.
    ///
    /// # Errors
    /// No archive, no network, or no room.
    pub fn newest() -> Result<Self> {
        let root = place::cache()?.join(format!("qemu-{RELEASE}"));
        if root.join(".complete").is_file() {
            return Ok(Self { root });
        }
        eprintln!("fetching QEMU of {BACKPORTS} and what belongs to it (40 MB)");
        let work = tempfile::tempdir_in(place::cache()?)?;
        for folder in ["lists/partial", "archives/partial"] {
            std::fs::create_dir_all(work.path().join(folder))?;
        }
        std::fs::write(work.path().join("status"), "")?;
        let archive = packages::archives().into_iter().find(|site| site.ends_with("/debian"));
        let archive = archive.context("apt knows no archive of Debian's: give it one in /etc/apt/sources.list")?;
        let sources = format!("deb {archive} {RELEASE} main\ndeb {archive} {BACKPORTS} main\n");
        std::fs::write(work.path().join("sources.list"), sources)?;
        place::run(apt(work.path()).arg("update")).with_context(|| {
            format!("apt-get reads the lists of {RELEASE}: is this a Debian machine with a network?")
        })?;
        let install = ["install", "-y", "--no-install-recommends", "--download-only", "-t", BACKPORTS, PACKAGE];
        place::run(apt(work.path()).args(install))?;
        let staging = work.path().join("root");
        for file in std::fs::read_dir(work.path().join("archives"))?.flatten().map(|entry| entry.path()) {
            if file.extension().is_some_and(|extension| extension == "deb") {
                place::run(Command::new("dpkg-deb").arg("-x").arg(file).arg(&staging))?;
            }
        }
        std::fs::write(staging.join(".complete"), b"")?;
        let _ = std::fs::remove_dir_all(&root);
        std::fs::rename(&staging, &root).with_context(|| format!("cannot make {}", root.display()))?;
        Ok(Self { root })
    }

    /// The program, with its own libraries, firmware and modules.
    pub fn command(&self) -> Command {
        let libraries = self.root.join(LIBRARIES);
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(self.root.join("usr/bin/qemu-system-x86_64"));
        for data in ["qemu", "seabios"] {
            command.arg("-L").arg(self.root.join("usr/share").join(data));
        }
        command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        command
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// It does not run here.
    pub fn version(&self) -> Result<String> {
        let output = self.command().arg("--version").output()?;
        ensure!(output.status.success(), "QEMU does not run: {}", String::from_utf8_lossy(&output.stderr));
        let said = String::from_utf8_lossy(&output.stdout);
        Ok(said.lines().next().unwrap_or_default().trim_start_matches("QEMU emulator version ").to_owned())
    }
}
