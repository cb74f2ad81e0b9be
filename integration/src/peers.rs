//! Foreign peers: processes of other projects, on sockets of a test's own folder, ended by pid.

use anyhow::{Context, Result, bail};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A peer that serves a UNIX socket. Dropping it kills it.
pub struct Peer {
    child: Child,
    /// Its socket.
    pub socket: PathBuf,
}

impl Peer {
    /// Starts `command` and waits until its socket exists.
    pub fn start(command: &mut Command, socket: &Path) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let mut peer = Self { child, socket: socket.to_path_buf() };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            if let Some(status) = peer.child.try_wait()? {
                bail!("{command:?} ended with {status} before it served {}", socket.display());
            }
            if Instant::now() >= deadline {
                bail!("{command:?} serves no {} within 20 s", socket.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(peer)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// qemu-storage-daemon exporting a raw image as a vhost-user-blk device.
pub fn storage_daemon(image: &Path, folder: &Path) -> Result<Peer> {
    let socket = folder.join("qsd.sock");
    Peer::start(
        Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=file,filename={}", image.display()))
            .args(["--blockdev", "driver=raw,node-name=disk,file=file"])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            )),
        &socket,
    )
}

/// `atoll-blk` on its own, for a foreign front end.
pub fn atoll_blk(image: &Path, folder: &Path) -> Result<Peer> {
    let socket = folder.join("blk.sock");
    Peer::start(
        Command::new(xtask::place::program("atoll-blk")?).arg("--socket").arg(&socket).arg("--path").arg(image),
        &socket,
    )
}

/// passt on its stream socket, with addresses that do not depend on the host's network. Started by root it
/// becomes nobody, who makes the socket: so that gets a folder of its own.
pub fn passt(folder: &Path) -> Result<Peer> {
    let open = folder.join("passt");
    std::fs::create_dir(&open)?;
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let socket = open.join("stream.sock");
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "-4", "-i", "lo", "-a", "10.0.2.15", "-g", "10.0.2.2"]);
    // The loopback interface has no hardware address that passt could take over.
    command.args(["-M", "52:55:0a:00:02:02", "-s"]);
    Peer::start(command.arg(&socket).stderr(Stdio::null()), &socket)
}

/// `atoll-net` on its own, with passt behind it, for a foreign front end.
pub fn atoll_net(passt: &Peer, folder: &Path) -> Result<Peer> {
    let socket = folder.join("net.sock");
    let mut command = Command::new(xtask::place::program("atoll-net")?);
    Peer::start(command.arg("--socket").arg(&socket).arg("--stream").arg(&passt.socket), &socket)
}

/// Whether anything listens on a socket.
pub fn listening(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Where Debian's packages put virtiofsd: `qemu-system-common` of Debian 12, `virtiofsd` of later ones.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// virtiofsd sharing `shared`, whichever of the two this machine has.
pub fn virtiofsd(shared: &Path, folder: &Path) -> Result<Peer> {
    let socket = folder.join("fs.sock");
    let found = VIRTIOFSD.iter().find(|path| Path::new(path).exists());
    let program = found.context("no virtiofsd: run `sudo apt-get install --no-install-recommends qemu-system-x86`")?;
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(program)
    } else {
        // It wants to be root where it shares; a user may be that in a namespace of his own.
        let mut command = Command::new("unshare");
        command.args(["-r", "--", program]);
        command
    };
    command.arg(format!("--socket-path={}", socket.display()));
    if program.starts_with("/usr/lib/") {
        command.arg("-o").arg(format!("source={},sandbox=chroot", shared.display()));
    } else {
        command.arg(format!("--shared-dir={}", shared.display())).arg("--sandbox=none");
    }
    // Each request of the guest would be a line.
    Peer::start(command.stderr(Stdio::null()), &socket)
}

/// `atoll-rng` on its own, for a front end that knows it by its device type only.
pub fn atoll_rng(folder: &Path) -> Result<Peer> {
    let socket = folder.join("rng.sock");
    Peer::start(Command::new(xtask::place::program("atoll-rng")?).arg("--socket").arg(&socket), &socket)
}
