//! Mistakes: each is told in one line that names the thing and what to do, and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::kernel::{kernel, power_off};
use super::operate::User;
use super::process::{Running, command, outcome, run};

/// Runs, expects failure with status `status`, and looks for each of `words` in the only line.
fn check(command: Command, status: i32, words: &[&str]) {
    let shown = format!("{command:?}");
    let end = outcome(command);
    assert_eq!(end.status, Some(status), "{shown}\n{end:?}");
    assert_eq!(end.err.lines().count(), 1, "{shown}\n{}", end.err);
    for word in words {
        assert!(end.err.contains(word), "{shown}\n{} lacks '{word}'", end.err);
    }
}

struct Bench {
    folder: tempfile::TempDir,
    kernel: std::path::PathBuf,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = kernel(folder.path(), power_off);
        Self { folder, kernel }
    }
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
    fn sized(&self, name: &str, bytes: u64) -> std::path::PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }
    fn with(&self, arguments: &[&str]) -> Command {
        let mut command = run(&self.kernel);
        command.args(arguments);
        command
    }
    fn with_disk(&self, image: &Path, more: &str) -> Command {
        self.with(&["--disk", &format!("path={}{more}", image.display())])
    }
    /// A folder with a backend of this script.
    fn backend(&self, script: &str) -> std::path::PathBuf {
        let folder = self.path("backends");
        fs::create_dir(&folder).unwrap();
        let backend = folder.join("atoll-blk");
        fs::write(&backend, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&backend, fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }
}

#[test]
fn kernels_that_are_none() {
    let bench = Bench::new();
    check(run(&bench.path("missing")), 1, &["cannot read kernel", "missing", "No such file"]);
    check(run(bench.folder.path()), 1, &["not a regular file"]);
    let picture = bench.path("picture.jpg");
    let mut jpeg = vec![0xff, 0xd8, 0xff, 0xe0, 0, 16];
    jpeg.extend_from_slice(b"JFIF\0");
    jpeg.resize(5000, 0x55);
    fs::write(&picture, jpeg).unwrap();
    check(run(&picture), 1, &["picture.jpg is not a kernel", "vmlinuz"]);
    let cut = bench.path("cut");
    fs::write(&cut, &fs::read(&bench.kernel).unwrap()[..100]).unwrap();
    check(run(&cut), 1, &["cannot be loaded", "damaged"]);
    let empty = bench.sized("empty", 0);
    check(run(&empty), 1, &["is not a kernel"]);
    // A bzImage whose second half is missing: it would start and unpack nonsense.
    let half = bench.path("half");
    let mut image = vec![0; 8192];
    image[0x1f1] = 1;
    image[0x1f4..0x1f8].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x236] = 1;
    fs::write(&half, image).unwrap();
    check(run(&half), 1, &["cannot be loaded", "half", "cut short"]);
}

#[test]
fn memory_that_cannot_be() {
    let bench = Bench::new();
    let memory = |size: &str| {
        let mut command = command();
        command.args(["run", "--cpu", "soft", "--kernel"]).arg(&bench.kernel);
        command.args(["--memory", &format!("size={size}")]);
        command
    };
    check(memory("1M"), 2, &["--memory size=1M", "too little", "16M"]);
    check(memory("1P"), 2, &["--memory size=1P", "511G"]);
    check(memory("99999999999P"), 2, &["--memory size=99999999999P", "number of bytes"]);
    check(memory("1000001"), 2, &["16M"]);
    check(memory("0"), 2, &["--memory size=0", "16M"]);
    let large = bench.sized("initramfs", 64 << 20);
    check(bench.with(&["--initramfs", large.to_str().unwrap()]), 1, &["initramfs", "64 MiB", "--memory"]);
    check(bench.with(&["--initramfs", "/missing"]), 1, &["cannot read initramfs /missing"]);
}

#[test]
fn options_that_are_none() {
    let bench = Bench::new();
    check(bench.with(&["--flub"]), 2, &["--flub", "--help"]);
    let only = |arguments: &[&str]| {
        let mut command = command();
        command.arg("run").args(arguments).arg("--kernel").arg(&bench.kernel);
        command
    };
    check(only(&["--memory", "sze=1G"]), 2, &["--memory sze=1G", "no key 'sze'", "size"]);
    check(only(&["--cpu", "fast"]), 2, &["fast", "auto"]);
    check(bench.with(&["--disk", "path=a,colour=red"]), 2, &["--disk path=a,colour=red", "colour", "readonly"]);
    check(bench.with(&["--cpus", "boot=0"]), 2, &["--cpus boot=0", "1 to 255"]);
    check(bench.with(&["--cpus", "boot=300"]), 2, &["--cpus boot=300", "1 to 255"]);
    check(bench.with(&["--cpu-model", "pentium"]), 2, &["pentium", "atoll-v1", "or host with --cpu kvm"]);
    check(bench.with(&["--name", "../x"]), 2, &["--name", "'../x' is no name for a machine"]);
    check(bench.with(&["--api-socket", "path=/tmp/x,foo=1"]), 2, &["--api-socket path=/tmp/x,foo=1", "no key 'foo'"]);
    check(bench.with(&["--event-monitor", "path=/tmp/x,foo=1"]), 2, &["--event-monitor", "no key 'foo'"]);
    let switch = |arguments: &[&str]| {
        let mut command = command();
        command.arg("switch").args(arguments);
        command
    };
    check(switch(&["lan", "--ports", "0"]), 2, &["--ports", "1.."]);
    check(switch(&[""]), 2, &["'' is no name for a switch"]);
    check(bench.with(&["--console", "teletype"]), 2, &["--console teletype", "off"]);
    check(bench.with(&["--console", "tty", "--serial", "tty"]), 2, &["console", "the terminal already"]);
    check(bench.with(&["--serial", "file=/missing/x"]), 1, &["/missing/x", "another file"]);
    check(bench.with(&["--cmdline", &"x".repeat(5000)]), 1, &["5000 bytes", "2047", "--cmdline"]);
    check(bench.with(&["--cpus", "boot=2"]), 1, &["boot=2", "boot=1"]);
    let bare = outcome(command());
    assert!(bare.status == Some(2) && bare.err.contains("Usage: atoll"), "{bare:?}");
    let mut kernelless = command();
    kernelless.args(["run", "--memory", "size=32M"]);
    check(kernelless, 2, &["--kernel"]);
}

/// A name, a socket or an id that somebody has already, and those that cannot be.
#[test]
fn names_and_sockets_that_are_taken() {
    let user = User::new();
    let running = Running::start(user.run(&["--name", "web", "--serial", "socket"]));
    let socket = user.folder.path().join("atoll/web/console.sock");
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    check(user.run(&["--name", "web"]), 1, &["'web' runs already", &format!("pid {}", running.pid()), "--name"]);
    check(user.run(&["--name", "a/b"]), 2, &["'a/b' is no name"]);
    let taken = format!("socket={}", socket.display());
    check(user.run(&["--serial", &taken]), 1, &["console.sock", "taken"]);
    check(user.run(&["--api-socket", socket.to_str().unwrap()]), 1, &["console.sock", "taken"]);
    let long = format!("/tmp/{}", "x".repeat(120));
    check(user.run(&["--serial", &format!("socket={long}")]), 2, &["107", "shorter"]);
    check(user.run(&["--api-socket", &long]), 2, &["107", "shorter"]);
    check(user.run(&["--api-socket", "fd=77"]), 2, &["77", "not open"]);
    check(user.run(&["--disk", "path=a,id=x", "path=b,id=x"]), 2, &["two devices have the id 'x'"]);
    check(
        user.run(&["--net", "fd=[77]"]),
        2,
        &["--net fd=77", "atoll was started without a descriptor of that number"],
    );
    check(user.run(&["--firmware", "x"]), 2, &["--firmware", "not supported", "--kernel"]);
    let rundirs = fs::read_dir(user.folder.path().join("atoll")).unwrap();
    let machines = rundirs.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
    assert_eq!(machines, 1, "a mistake has left a folder");
}

#[test]
fn files_that_say_nonsense() {
    let user = User::new();
    let file = user.folder.path().join("vm.toml");
    let with = |text: &str| {
        fs::write(&file, text).unwrap();
        user.run(&["--config", file.to_str().unwrap()])
    };
    check(with("\n[[disks]]\npath = \"a\"\ncolour = \"red\"\n"), 2, &["vm.toml, line 4", "'disks.0.colour'"]);
    check(with("[payload\n"), 2, &["vm.toml, line 1"]);
    check(with("memory.size = \"much\"\n"), 2, &["line 1", "number of bytes"]);
    check(with("[[net]]\nuser = true\ntap = \"tap0\"\n"), 2, &["net", "exclude each other"]);
    check(user.run(&["--config", "/missing.toml"]), 2, &["/missing.toml", "TOML"]);
}

#[test]
fn images_that_cannot_be_disks() {
    let bench = Bench::new();
    check(bench.with_disk(&bench.path("missing"), ""), 1, &["missing"]);
    check(bench.with_disk(&bench.sized("odd", 1000), ""), 1, &["odd", "1000 bytes", "512"]);
    check(bench.with_disk(&bench.sized("nothing", 0), ""), 1, &["nothing", "empty"]);
    check(bench.with(&["--disk", "vhost_user=on,socket=/missing"]), 1, &["/missing", "socket="]);
}

/// Whether any process runs whose command line has `word` in it.
fn runs(word: &str) -> bool {
    let line = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
    let found = |line: Vec<u8>| String::from_utf8_lossy(&line).contains(word);
    fs::read_dir("/proc").unwrap().filter_map(Result::ok).any(|entry| found(line(entry)))
}

#[test]
fn missing_backend() {
    let bench = Bench::new();
    let image = bench.sized("image", 1 << 20);
    let mut command = bench.with_disk(&image, "");
    command.args(["--backend-dir", "/missing"]);
    check(command, 1, &["/missing/atoll-blk", "install"]);
}

#[test]
fn backend_that_dies_at_once() {
    let bench = Bench::new();
    let image = bench.sized("image", 1 << 20);
    let mut command = bench.with_disk(&image, "");
    command.arg("--backend-dir").arg(bench.backend("echo no luck today >&2; exit 3"));
    check(command, 1, &["disk0", "exit status 3", "no luck today"]);
}

/// A backend that says nothing is given up and killed; so is what it may have left in its group.
#[test]
fn backend_that_never_answers() {
    let bench = Bench::new();
    let image = bench.sized("image", 1 << 20);
    let folder = bench.backend("exec sleep 12345.678");
    let mut command = bench.with_disk(&image, "");
    command.arg("--backend-dir").arg(folder);
    let started = Instant::now();
    check(command, 1, &["disk0", "said nothing"]);
    assert!(started.elapsed() < Duration::from_secs(40));
    assert!(!runs("12345.678"), "the backend lives on");
}
