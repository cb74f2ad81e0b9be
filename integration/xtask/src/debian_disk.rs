//! Disks of Debian packages: pinned, unpacked side by side into one ext4 image. No maintainer script runs, so no root is needed: what
//! programs need to start is there, accounts and services are not.

use crate::packages::{self, Package};
use crate::place;
use anyhow::{Context, Result};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Folders at the top that are links into `/usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

const INIT: &str = r#"#!/bin/bash
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
export HOME=/root PATH=/usr/sbin:/usr/bin PS1='atoll# ' LC_ALL=C
cd /root
echo 1 > /proc/sys/kernel/printk
exec setsid --ctty bash --norc --noediting
"#;

/// A package of Debian 12, which is its own successor.
pub(crate) const fn debian(name: &'static str, version: &'static str, sha256: &'static str) -> Package {
    Package { name, version, sha256, successor: name }
}

/// What is on a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contents {
    /// Names its folder in the cache.
    pub(crate) name: &'static str,
    /// Changes when the contents change.
    pub(crate) edition: u32,
    /// Lists of packages; what stands in a later one may replace what an earlier one has brought.
    pub(crate) packages: &'static [&'static [Package]],
    /// As `mkfs.ext4` is told it.
    pub(crate) size: &'static str,
}

impl Contents {
    /// The disk, made on first use.
    pub(crate) fn disk(&self) -> Result<PathBuf> {
        let folder = place::cache()?.join(format!("{}-{}", self.name, self.edition));
        std::fs::create_dir_all(&folder)?;
        let path = folder.join("debian.ext4");
        crate::images::made(&path, |path| self.write(path))?;
        Ok(path)
    }

    fn write(&self, path: &Path) -> Result<()> {
        let tree = tempfile::tempdir()?;
        let root = tree.path();
        for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "dev", "proc", "sys", "tmp", "mnt", "root", "etc"]
        {
            std::fs::create_dir_all(root.join(folder))?;
        }
        for name in MERGED {
            symlink(format!("usr/{name}"), root.join(name))?;
        }
        for folder in packages::all_unpacked(&self.packages.concat())? {
            for entry in std::fs::read_dir(&folder)? {
                let entry = entry?;
                let name = entry.file_name();
                let merged = MERGED.iter().find(|merged| name == **merged);
                let to = merged.map_or_else(|| root.join(&name), |merged| root.join("usr").join(merged));
                if entry.file_type()?.is_dir() {
                    std::fs::create_dir_all(&to)?;
                    place::run(Command::new("cp").arg("-a").arg(entry.path().join(".")).arg(&to))?;
                }
            }
        }
        for unused in
            ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/lib/x86_64-linux-gnu/gconv"]
        {
            let _ = std::fs::remove_dir_all(root.join(unused));
        }
        // There is no init system: what powers the machine off and gets it an address comes from busybox.
        let busybox = packages::unpacked(&packages::BUSYBOX)?.join("bin/busybox");
        std::fs::copy(busybox, root.join("usr/bin/busybox"))?;
        for applet in ["poweroff", "reboot", "udhcpc", "wget"] {
            symlink("../bin/busybox", root.join("usr/sbin").join(applet))?;
        }
        crate::images::write_lease_script(root)?;
        std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/bash\n")?;
        std::fs::write(root.join("etc/group"), "root:x:0:\n")?;
        std::fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
        let init = root.join("usr/sbin/init");
        std::fs::write(&init, INIT)?;
        std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755))?;
        let mkfs = place::on_path("mkfs.ext4").context("mkfs.ext4 is missing: install e2fsprogs")?;
        place::run(
            Command::new(mkfs)
                .args(["-q", "-F", "-L", "debian", "-E", "root_owner=0:0,lazy_itable_init=0", "-d"])
                .arg(root)
                .arg(path)
                .arg(self.size)
                .stdin(Stdio::null()),
        )
    }
}
