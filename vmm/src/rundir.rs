//! Where running machines are found: one folder per user, one folder in it per machine.
//!
//! A machine's folder holds its sockets and a file `pid` on which the process holds a lock (flock) as long as it lives:
//! the kernel lets go of it however the process ends, so what is left of a killed one is recognised without guessing by
//! process ids, its name is free again, and whoever lists machines or starts one removes it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

/// The API's socket in a machine's folder.
pub const API_SOCKET: &str = "api.sock";
/// The serial port's socket in a machine's folder.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The file that is locked.
const PID: &str = "pid";
/// Folder of the sockets of this user's switches.
const SWITCHES: &str = "switches";
/// Most bytes of a name: the path of a socket must fit into its address.
const NAME_BYTES_MAX: usize = 32;
/// Somebody who looks whether a machine lives holds the lock for a moment.
const LOOK_MAX: Duration = Duration::from_millis(300);

/// What can be wrong with a machine's name or folder.
#[derive(Debug, Error)]
pub enum RunDirError {
    /// The user has no folder.
    #[error("{}: {source}; let XDG_RUNTIME_DIR name a folder that can be written", .path.display())]
    Folder {
        /// Where it should be.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Somebody else could look into it or owns it.
    #[error(
        "{} is not a folder of this user alone (owner {owner}, mode {mode:o}); remove it, or let XDG_RUNTIME_DIR name \
         another place", .path.display()
    )]
    NotPrivate {
        /// Which.
        path: PathBuf,
        /// Its owner's id.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// A name that is none.
    #[error(
        "'{name}' is no name for a {what}: 1 to {NAME_BYTES_MAX} letters, digits, dots, hyphens and underscores are \
         expected, not a dot first"
    )]
    Name {
        /// What it was to name: a machine, or a switch.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A machine of that name runs.
    #[error(
        "a machine named '{name}' runs already (pid {pid}); choose another --name, or end it: atoll shutdown {name}"
    )]
    Taken {
        /// The name.
        name: String,
        /// Its process.
        pid: String,
    },
    /// No machine of that name runs.
    #[error("no machine named '{name}' runs; {}", running_words(.running))]
    Unknown {
        /// The name.
        name: String,
        /// Those that run.
        running: Vec<String>,
    },
}

fn running_words(names: &[String]) -> String {
    if names.is_empty() { "none does".into() } else { format!("these do: {}", names.join(", ")) }
}

/// The folder of one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRoot(PathBuf);

/// A machine that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningVm {
    /// Its name.
    pub name: String,
    /// Its process, where that could be read.
    pub pid: Option<u32>,
    /// Its folder.
    pub folder: PathBuf,
}

impl RunningVm {
    /// Its API.
    pub fn api_socket(&self) -> PathBuf {
        self.folder.join(API_SOCKET)
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), RunDirError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.starts_with('.') && name.bytes().all(plain);
    if fits && name != SWITCHES { Ok(()) } else { Err(RunDirError::Name { what, name: name.into() }) }
}

/// Makes a folder for this user alone, or checks that it is one.
fn private_folder(path: &Path) -> Result<(), RunDirError> {
    let failed = |source| RunDirError::Folder { path: path.into(), source };
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = std::fs::symlink_metadata(path).map_err(failed)?;
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    if !found.is_dir() || owner != rustix::process::geteuid().as_raw() || mode & 0o022 != 0 {
        return Err(RunDirError::NotPrivate { path: path.into(), owner, mode });
    }
    if mode & 0o077 != 0 {
        // Others could look, but not write: there is nothing of theirs in it.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// Takes the lock of the file `pid`; `None` when somebody holds it for longer than a look takes.
fn lock_within(file: &File, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether `path` still is the file that `file` was opened from.
fn is_at(file: &File, path: &Path) -> bool {
    let key = |found: std::fs::Metadata| (found.dev(), found.ino());
    let open = file.metadata().map(key);
    open.is_ok_and(|open| std::fs::symlink_metadata(path).map(key).is_ok_and(|there| there == open))
}

impl RunRoot {
    /// This user's: in `$XDG_RUNTIME_DIR`, else in `/run/user/UID`, else in `/tmp`. Made when it is not there.
    ///
    /// # Errors
    /// When it cannot be made, or is not the user's alone.
    pub fn of_user() -> Result<Self, RunDirError> {
        let user = rustix::process::geteuid().as_raw();
        let own = |folder: &Path| std::fs::metadata(folder).is_ok_and(|found| found.is_dir() && found.uid() == user);
        let named = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()).map(PathBuf::from);
        let usual = Some(PathBuf::from(format!("/run/user/{user}"))).filter(|folder| own(folder));
        match named.or(usual) {
            Some(folder) => Self::at(folder.join("atoll")),
            None => Self::at(std::env::temp_dir().join(format!("atoll-{user}"))),
        }
    }

    /// This folder; made when it is not there.
    ///
    /// # Errors
    /// As [`Self::of_user`].
    pub fn at(path: PathBuf) -> Result<Self, RunDirError> {
        private_folder(&path)?;
        Ok(Self(path))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The socket of the switch `name`; its folder is made.
    ///
    /// # Errors
    /// When the name is none or the folder cannot be made.
    pub fn switch_socket(&self, name: &str) -> Result<PathBuf, RunDirError> {
        check_name("switch", name)?;
        private_folder(&self.0.join(SWITCHES))?;
        Ok(crate::vhost::switch_socket(&self.0, name))
    }

    /// Takes `name` for this process. What a process that is gone has left under it is removed.
    ///
    /// # Errors
    /// [`RunDirError::Taken`], and when the folder cannot be made.
    pub fn claim(&self, name: &str) -> Result<RunDir, RunDirError> {
        check_name("machine", name)?;
        self.tidy();
        let folder = self.0.join(name);
        let failed = |source| RunDirError::Folder { path: folder.clone(), source };
        loop {
            private_folder(&folder)?;
            let path = folder.join(PID);
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
            let mut file = match opened {
                Ok(file) => file,
                // Its owner has just removed the folder.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            if !lock_within(&file, LOOK_MAX) {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                return Err(RunDirError::Taken { name: name.into(), pid: pid.trim().into() });
            }
            if !is_at(&file, &path) {
                continue;
            }
            for left in std::fs::read_dir(&folder).map_err(failed)?.filter_map(Result::ok) {
                if left.file_name() != PID {
                    let _ = std::fs::remove_file(left.path());
                }
            }
            file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
            return Ok(RunDir { name: name.into(), folder, _lock: file });
        }
    }

    /// Takes the first free name of vm0, vm1, …
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn claim_free(&self) -> Result<RunDir, RunDirError> {
        let mut number = 0_u32;
        loop {
            let name = format!("vm{number}");
            // Without waiting for the lock of each that runs.
            if !self.lives(&name) {
                match self.claim(&name) {
                    Err(RunDirError::Taken { .. }) => {}
                    claimed => return claimed,
                }
            }
            number += 1;
        }
    }

    /// Removes the folders of machines whose process is gone without having done so: it was killed.
    fn tidy(&self) {
        for name in self.names().filter(|name| !self.lives(name)) {
            let folder = self.0.join(&name);
            let path = folder.join(PID);
            // A folder that nobody has locked yet has an owner to come.
            let Ok(file) = File::open(&path) else { continue };
            // Under the lock that whoever wants the name takes first, and looks afterwards whether it is still there.
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() && is_at(&file, &path) {
                match std::fs::remove_dir_all(&folder) {
                    Ok(()) => tracing::debug!(name, "what a machine that was killed had left is removed"),
                    Err(error) => tracing::debug!(name, %error, "what a machine that was killed has left remains"),
                }
            }
        }
    }

    /// What may be machines: folders that have the name of one.
    fn names(&self) -> impl Iterator<Item = String> + use<> {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok);
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| check_name("machine", name).is_ok())
    }

    /// Whether a process holds the name.
    fn lives(&self, name: &str) -> bool {
        let opened = File::open(self.0.join(name).join(PID));
        opened.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// The machines that run, by name. What killed ones have left is removed.
    pub fn list(&self) -> Vec<RunningVm> {
        self.tidy();
        let mut running: Vec<RunningVm> = self
            .names()
            .filter(|name| self.lives(name))
            .map(|name| {
                let folder = self.0.join(&name);
                let pid = std::fs::read_to_string(folder.join(PID)).ok().and_then(|text| text.trim().parse().ok());
                RunningVm { name, pid, folder }
            })
            .collect();
        running.sort_by(|one, other| one.name.cmp(&other.name));
        running
    }

    /// The machine of that name.
    ///
    /// # Errors
    /// [`RunDirError::Unknown`], which lists those that run.
    pub fn find(&self, name: &str) -> Result<RunningVm, RunDirError> {
        let running = self.list();
        let names = running.iter().map(|vm| vm.name.clone()).collect();
        let found = running.into_iter().find(|vm| vm.name == name);
        found.ok_or_else(|| RunDirError::Unknown { name: name.into(), running: names })
    }
}

/// A machine's folder, ours until it is dropped; it is removed then.
#[derive(Debug)]
pub struct RunDir {
    name: String,
    folder: PathBuf,
    _lock: File,
}

impl RunDir {
    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Still under the lock: whoever wants the name next finds either all of it or nothing.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, RunRoot) {
        let folder = tempfile::tempdir().unwrap();
        let root = RunRoot::at(folder.path().join("atoll")).unwrap();
        (folder, root)
    }

    /// One machine a name; what it leaves is nothing, and what a killed one has left is taken over.
    #[test]
    fn a_name_belongs_to_one_process() {
        let (_folder, root) = root();
        let web = root.claim("web").unwrap();
        std::fs::write(web.path().join(API_SOCKET), "").unwrap();
        assert_eq!(root.find("web").unwrap().pid, Some(std::process::id()));
        let taken = root.claim("web").unwrap_err().to_string();
        assert!(
            taken.contains(&format!("pid {}", std::process::id())) && taken.contains("atoll shutdown web"),
            "{taken}"
        );
        let unknown = root.find("wbe").unwrap_err().to_string();
        assert!(unknown.contains("these do: web"), "{unknown}");
        let path = web.path().to_owned();
        drop(web);
        assert!(!path.exists());
        // As a killed process leaves it: files, and no lock.
        std::fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        std::fs::write(path.join(PID), "1\n").unwrap();
        std::fs::write(path.join(API_SOCKET), "").unwrap();
        assert_eq!(root.list(), []);
        let web = root.claim("web").unwrap();
        assert!(!path.join(API_SOCKET).exists());
        drop(web);
    }

    #[test]
    fn the_first_free_name_is_taken() {
        let (_folder, root) = root();
        let machines = [root.claim_free().unwrap(), root.claim_free().unwrap()];
        assert_eq!(machines.each_ref().map(RunDir::name), ["vm0", "vm1"]);
        let [first, second] = machines;
        drop(first);
        assert_eq!(root.claim_free().unwrap().name(), "vm0");
        drop(second);
    }

    #[test]
    fn names_and_folders_are_checked() {
        let (folder, root) = root();
        for name in ["", "a/b", "..", ".x", "switches", "ä", &"x".repeat(33)] {
            assert!(matches!(root.claim(name), Err(RunDirError::Name { .. })), "{name}");
        }
        let open = folder.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
        RunRoot::at(open.clone()).unwrap();
        assert_eq!(open.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = RunRoot::at(open).unwrap_err().to_string();
        assert!(error.contains("mode 777") && error.contains("XDG_RUNTIME_DIR"), "{error}");
        assert!(RunRoot::at("/missing/atoll".into()).unwrap_err().to_string().contains("/missing/atoll"));
        assert!(root.switch_socket("lan").unwrap().ends_with("switches/lan.sock"));
    }
}
