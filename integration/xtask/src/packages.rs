//! Debian packages: pinned by version and SHA-256, fetched once through apt, unpacked without root.
//!
//! Where the archive no longer carries a pinned version, set-up takes the one that the machine's own signed package
//! index offers, and says so: an old pin must not stop a newcomer.

use crate::place;
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One pinned package.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// Debian's name.
    pub name: &'static str,
    /// The pinned version.
    pub version: &'static str,
    /// SHA-256 of the pinned `.deb`.
    pub sha256: &'static str,
    /// The metapackage whose dependency replaces the pin when it is gone.
    pub successor: &'static str,
}

/// Debian 12's own cloud kernel.
pub const KERNEL_6_1: Package = Package {
    name: "linux-image-6.1.0-56-cloud-amd64",
    version: "6.1.192-2",
    sha256: "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee",
    successor: "linux-image-cloud-amd64",
};

/// The newer long-term cloud kernel that Debian 12 also carries.
pub const KERNEL_6_12: Package = Package {
    name: "linux-image-6.12.117+deb12-cloud-amd64",
    version: "6.12.117-1~deb12u1",
    sha256: "5195b288dec79e2981d6b84457f38b7ce7310a2d702930ec7d07209c7f78ce37",
    successor: "linux-image-6.12-cloud-amd64",
};

/// The guest's user land.
pub const BUSYBOX: Package = Package {
    name: "busybox-static",
    version: "1:1.35.0-4+deb12u1+b1",
    sha256: "3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744",
    successor: "busybox-static",
};

/// Debian 12's own kernel with all drivers.
pub const FULL_KERNEL: Package = Package {
    name: "linux-image-6.1.0-56-amd64",
    version: "6.1.192-2",
    sha256: "a86e2049672f52354c4536a089203b6c82639420424d31c91cf31a181fd4d8f1",
    successor: "linux-image-amd64",
};

/// VNC in a browser.
pub const NOVNC: Package = Package {
    name: "novnc",
    version: "1:1.3.0-1",
    sha256: "5ff8b8c93c1c6cc911e01bfa77d12d4098e1904f738a996040c8095e02492ebb",
    successor: "novnc",
};

/// QEMU's `vhost-user-gpu`, among much that is not run.
pub const QEMU_GUI: Package = Package {
    name: "qemu-system-gui",
    version: "1:7.2+dfsg-7+deb12u18+b3",
    sha256: "933a89743d2b1551f118c3d911c57682cb21e8a0429da3032c220cedd0805d19",
    successor: "qemu-system-gui",
};

/// What it is linked with.
pub const QEMU_GPU_PEERS: &[&str] =
    &["libvirglrenderer.so.1", "libepoxy.so.0", "libgbm.so.1", "libpixman-1.so.0", "libglib-2.0.so.0", "libnuma.so.1"];

/// What QEMU's own device needs to draw in 3D on a host without a GPU: its window, and an X server in memory to put it on.
pub const QEMU_GL_PEERS: &[&str] = &["qemu/ui-sdl.so", "Xvfb"];

/// What 3D is drawn with on a host without a GPU, and what programs of the host draw with.
pub const RENDERER_PEERS: &[&str] =
    &["libvirglrenderer.so.1", "libEGL.so.1", "libGLESv2.so.2", "libGL.so.1", "dri/swrast_dri.so"];

impl Package {
    fn folder(&self, packages: &Path) -> PathBuf {
        packages.join(format!("{}_{}", self.name, self.version.replace(':', "%3a")))
    }
    fn wanted(&self) -> String {
        format!("{}={}", self.name, self.version)
    }
}

/// A package of a later Debian than the machine's: apt's lists do not have it, so it comes from the pool of the archive
/// that the machine uses.
#[derive(Clone, Copy, Debug)]
pub struct Pooled {
    /// The package, by its pinned hash alone.
    pub package: Package,
    /// Where it lies in the archive.
    pub path: &'static str,
}

/// A passt that speaks vhost-user: Debian 13's.
pub const PASST: Pooled = Pooled {
    package: Package {
        name: "passt",
        version: "0.0~git20250503.587980c-2+deb13u1",
        sha256: "dfbca023b20c84a3345e36bbbe182c18bf262583d31386fc7e3050a708850f0d",
        successor: "passt",
    },
    path: "pool/main/p/passt/passt_0.0~git20250503.587980c-2+deb13u1_amd64.deb",
};

/// The C library that it was linked with.
pub const LIBC_13: Pooled = Pooled {
    package: Package {
        name: "libc6",
        version: "2.41-12+deb13u4",
        sha256: "967aa62605721081c3eb2a17650611a792aa802d76a6511d1840242623d204c9",
        successor: "libc6",
    },
    path: "pool/main/g/glibc/libc6_2.41-12+deb13u4_amd64.deb",
};

/// The archives that this machine is set up for, mirrors and all.
pub fn archives() -> Vec<String> {
    let output = Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]).output();
    let listed = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut sites: Vec<String> = listed.lines().map(|site| site.trim_end_matches('/').to_owned()).collect();
    sites.dedup();
    sites
}

/// Fetches (once) and unpacks a package of a later Debian; gives the folder with its files.
pub fn unpacked_from_pool(pooled: &Pooled) -> Result<PathBuf> {
    const HELPER: &str = "/usr/lib/apt/apt-helper";
    let Pooled { package, path } = pooled;
    let packages = place::cache()?.join("packages");
    let folder = package.folder(&packages);
    if folder.join(".complete").is_file() {
        return Ok(folder);
    }
    std::fs::create_dir_all(&packages)?;
    eprintln!("fetching {} {}", package.name, package.version);
    let archive = packages.join(format!("{}-{}.deb", package.name, &package.sha256[..16]));
    let sites = archives();
    let fetched = sites.iter().any(|site| {
        let status = Command::new(HELPER)
            .args(["-qq", "download-file", &format!("{site}/{path}")])
            .arg(&archive)
            .arg(format!("SHA256:{}", package.sha256))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success()) && archive.is_file()
    });
    if !fetched {
        bail!("no archive of {sites:?} has {path}: is this a Debian machine with a network?");
    }
    let found = sha256(&archive)?;
    if found != package.sha256 {
        let _ = std::fs::remove_file(&archive);
        bail!("{path} has SHA-256 {found}, not the pinned {}: refusing it", package.sha256);
    }
    unpack(package, &packages, &archive)?;
    let _ = std::fs::remove_file(archive);
    Ok(folder)
}

/// Packages, in order: those that are missing are fetched by one call of apt where their pins are still in the archive.
pub fn all_unpacked(all: &[Package]) -> Result<Vec<PathBuf>> {
    let packages = place::cache()?.join("packages");
    std::fs::create_dir_all(&packages)?;
    let missing: Vec<&Package> =
        all.iter().filter(|package| !package.folder(&packages).join(".complete").is_file()).collect();
    if missing.len() > 1 {
        eprintln!("fetching {} packages", missing.len());
        let staging = tempfile::tempdir_in(&packages)?;
        // What does not come this way is fetched one by one.
        let _ = Command::new("apt-get")
            .args(["-qq", "download"])
            .args(missing.iter().map(|package| package.wanted()))
            .current_dir(staging.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        for file in std::fs::read_dir(staging.path())?.flatten().map(|entry| entry.path()) {
            let found = sha256(&file)?;
            if let Some(package) = missing.iter().find(|package| package.sha256 == found) {
                unpack(package, &packages, &file)?;
            }
        }
    }
    all.iter().map(unpacked).collect()
}

/// Fetches (once) and unpacks a package; gives the folder with its files.
pub fn unpacked(package: &Package) -> Result<PathBuf> {
    let packages = place::cache()?.join("packages");
    let folder = package.folder(&packages);
    if folder.join(".complete").is_file() {
        return Ok(folder);
    }
    std::fs::create_dir_all(&packages)?;
    let archive = fetch(package, &packages)?;
    unpack(package, &packages, &archive)?;
    let _ = std::fs::remove_file(archive);
    Ok(folder)
}

fn unpack(package: &Package, packages: &Path, archive: &Path) -> Result<()> {
    let folder = package.folder(packages);
    let staging = tempfile::tempdir_in(packages)?;
    place::run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(staging.path()))
        .context("dpkg-deb unpacks the packages: install `dpkg`")?;
    std::fs::write(staging.path().join(".complete"), b"")?;
    let staged = staging.keep();
    if let Err(error) = std::fs::rename(&staged, &folder) {
        // Another run was faster; its result is the same.
        let _ = std::fs::remove_dir_all(&staged);
        if !folder.join(".complete").is_file() {
            return Err(error).context("cannot move the unpacked package into place");
        }
    }
    Ok(())
}

fn fetch(package: &Package, into: &Path) -> Result<PathBuf> {
    eprintln!("fetching {} {}", package.name, package.version);
    let wanted = package.wanted();
    let private_lists = into.join("lists");
    let downloaded = match download(&wanted, into, None) {
        Ok(path) => path,
        Err(_) => {
            update(&private_lists)?;
            match download(&wanted, into, Some(&private_lists)) {
                Ok(path) => path,
                Err(pinned) => return newest(package, into, &private_lists).context(pinned),
            }
        }
    };
    let found = sha256(&downloaded)?;
    if found != package.sha256 {
        let _ = std::fs::remove_file(&downloaded);
        bail!("{wanted} has SHA-256 {found}, not the pinned {}: refusing it", package.sha256);
    }
    Ok(downloaded)
}

/// The pin is gone from the archive: follow the metapackage; apt has checked the hash against the signed index.
fn newest(package: &Package, into: &Path, lists: &Path) -> Result<PathBuf> {
    let mut name = package.successor.to_owned();
    if package.successor != package.name {
        let output =
            Command::new("apt-cache").args(lists_option(lists)).args(["depends", package.successor]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        name = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .with_context(|| format!("{} depends on no kernel image", package.successor))?
            .to_owned();
    }
    eprintln!(
        "note: {} {} is no longer in the archive; taking {name} as it stands there",
        package.name, package.version
    );
    download(&name, into, Some(lists))
}

fn lists_option(lists: &Path) -> Vec<String> {
    vec!["-o".into(), format!("Dir::State::Lists={}", lists.display())]
}

fn update(lists: &Path) -> Result<()> {
    std::fs::create_dir_all(lists.join("partial"))?;
    place::run(
        Command::new("apt-get")
            .args(lists_option(lists))
            .args(["-qq", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "update"])
            .stderr(Stdio::null()),
    )
    .context("apt-get cannot read the package lists: is this a Debian machine with a network?")
}

fn download(what: &str, into: &Path, lists: Option<&Path>) -> Result<PathBuf> {
    let staging = tempfile::tempdir_in(into)?;
    let mut command = Command::new("apt-get");
    if let Some(lists) = lists {
        command.args(lists_option(lists));
    }
    let status = command
        .args(["-qq", "download", what])
        .current_dir(staging.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("apt-get fetches the packages: install `apt`")?;
    let file = std::fs::read_dir(staging.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|kind| kind == "deb"));
    match file {
        Some(file) if status.success() => {
            let kept = into.join(file.file_name().context("a downloaded file has a name")?);
            std::fs::rename(&file, &kept)?;
            Ok(kept)
        }
        _ => {
            bail!("apt-get has no {what}: the machine's package sources must hold Debian 12 with its security updates")
        }
    }
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut text = String::new();
    for byte in Sha256::digest(&bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// Programs that some tests and benchmarks set beside Atoll, and libraries that a device loads if they are there (their names end
/// as names of libraries do), with the Debian package that holds each.
pub const PEERS: [(&str, &str); 20] = [
    ("passt", "passt"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("qemu-x86_64", "qemu-user"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("chromium", "chromium"),
    ("libvirglrenderer.so.1", "libvirglrenderer1"),
    ("libEGL.so.1", "libegl1"),
    ("libGL.so.1", "libgl1"),
    ("dri/swrast_dri.so", "libgl1-mesa-dri"),
    ("libGLESv2.so.2", "libgles2"),
    ("libepoxy.so.0", "libepoxy0"),
    ("libgbm.so.1", "libgbm1"),
    ("libpixman-1.so.0", "libpixman-1-0"),
    ("libglib-2.0.so.0", "libglib2.0-0"),
    ("libnuma.so.1", "libnuma1"),
    ("qemu/ui-sdl.so", "qemu-system-gui"),
    ("Xvfb", "xvfb"),
];

/// Where this machine has its libraries.
const LIBRARIES: [&str; 4] = ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"];

/// Whether a program is in PATH, or a library where libraries are.
fn is_there(peer: &str) -> bool {
    if peer.contains(".so") {
        LIBRARIES.iter().any(|folder| Path::new(folder).join(peer).exists())
    } else {
        place::on_path(peer).is_some()
    }
}

/// Packages are installed at most this often, until nothing is missing.
const PASSES: usize = 3;

/// Packages of those peers that are missing.
pub fn missing_peers(wanted: &[&str]) -> Vec<&'static str> {
    let absent = |peer: &str| wanted.contains(&peer) && !is_there(peer);
    let mut packages: Vec<&str> = PEERS.iter().filter(|(peer, _)| absent(peer)).map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

/// Installs the peers that are missing, if this user may; says what to install otherwise.
pub fn ensure_peers(wanted: &[&str]) -> Result<()> {
    let missing = || missing_peers(wanted);
    // A package of another release that is there may have to go when its neighbour comes, and what it had is missing then.
    for _ in 0..PASSES {
        let packages = missing();
        if packages.is_empty() {
            return Ok(());
        }
        install(&packages)?;
    }
    let packages = missing();
    ensure!(packages.is_empty(), "{} installed, but what it holds is not where it is looked for", packages.join(", "));
    Ok(())
}

/// Installs the packages that a program needs, if it is missing and this user may.
pub fn ensure_installed(program: &str, packages: &[&str]) -> Result<()> {
    if place::on_path(program).is_some() { Ok(()) } else { install(packages) }
}

fn install(missing: &[&str]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("missing programs: run `sudo apt-get install --no-install-recommends {}`", missing.join(" "));
    }
    eprintln!("installing {}", missing.join(" "));
    let install = |quiet: &str| {
        Command::new("apt-get")
            .args(["install", "-y", quiet, "--no-install-recommends"])
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("apt-get is missing, which would install {}", missing.join(" ")))
    };
    if !install("-qq")?.success() {
        place::run(Command::new("apt-get").args(["-qq", "update"]))?;
        if !install("-qq")?.success() {
            bail!("apt-get could not install {}", missing.join(" "));
        }
    }
    Ok(())
}
