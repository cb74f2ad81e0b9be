//! A passt that speaks vhost-user, which Debian 12's does not: Debian 13's, run with the loader and the C library that it
//! was linked with.

use crate::{packages, place};
use anyhow::Result;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

/// A folder with a program `passt`, to be put in front of PATH; made on first use.
pub fn with_vhost_user() -> Result<PathBuf> {
    let passt = packages::unpacked_from_pool(&packages::PASST)?;
    let libc = packages::unpacked_from_pool(&packages::LIBC_13)?;
    let folder = place::cache()?.join("passt-vhost-user");
    std::fs::create_dir_all(&folder)?;
    crate::images::made(&folder.join("passt"), |path| {
        let script = format!(
            "#!/bin/sh\nexec {0}/ld-linux-x86-64.so.2 --library-path {0} {1} \"$@\"\n",
            libc.join("usr/lib/x86_64-linux-gnu").display(),
            passt.join("usr/bin/passt").display()
        );
        std::fs::write(path, script)?;
        Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
    })?;
    Ok(folder)
}
