//! Running machines are found by name and driven by commands of other processes.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use atoll_vmm::api::{Client, Method};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::kernel::obedient;
use super::process::{Outcome, PATIENCE, Running, command, outcome};

/// A user with a run-time folder of their own.
pub(crate) struct User {
    pub(crate) folder: tempfile::TempDir,
    kernel: PathBuf,
}

impl User {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = obedient(folder.path());
        Self { folder, kernel }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command();
        command.env("XDG_RUNTIME_DIR", self.folder.path()).args(arguments);
        command
    }

    /// `run` with the obedient kernel.
    pub(crate) fn run(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&["run", "--cpu", "soft", "--memory", "size=32M", "--kernel"]);
        command.arg(&self.kernel).args(arguments);
        command
    }

    fn done(&self, arguments: &[&str]) -> Outcome {
        let end = outcome(self.command(arguments));
        assert_eq!((end.status, end.err.as_str()), (Some(0), ""), "{arguments:?}");
        end
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let end = outcome(self.command(arguments));
        assert_eq!((end.status, end.out.as_str()), (Some(1), ""), "{arguments:?}");
        end.err
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.done(arguments).out).unwrap()
    }

    fn api_socket(&self, name: &str) -> PathBuf {
        self.folder.path().join("atoll").join(name).join("api.sock")
    }

    /// Waits until the machine answers.
    fn wait_for(&self, name: &str) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&self.api_socket(name)) {
                Ok(client) => return client,
                Err(error) if Instant::now() > deadline => panic!("{error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// From its start to its end by another process; nothing is left of it.
#[test]
fn a_machine_is_found_and_driven() {
    let user = User::new();
    let running = Running::start(user.run(&["--name", "web"]));
    assert_eq!(running.line(), "hello\n");
    let list = user.done(&["ps"]).out;
    assert!(list.starts_with("NAME") && list.contains("web") && list.contains("Running"), "{list}");
    assert_eq!(user.json(&["ps", "--json"])[0]["pid"], running.pid());
    let events = Running::start(user.command(&["events", "web"]));
    // The stream is there once its head has come; then the first thing to happen is ours.
    std::thread::sleep(Duration::from_millis(300));
    user.done(&["pause", "web"]);
    let paused: Value = serde_json::from_str(&events.line()).unwrap();
    assert_eq!((&paused["source"], &paused["event"]), (&json!("vm"), &json!("pausing")));
    assert_eq!(user.json(&["info", "web", "--json"])["state"], "Paused");
    let twice = user.refused(&["pause", "web"]);
    assert!(twice.contains("paused already"), "{twice}");
    let top = user.done(&["top", "--once"]).out;
    assert!(top.starts_with("web: paused, cpu soft, memory 32M\n") && top.contains("vcpu0"), "{top}");
    user.done(&["resume", "web"]);
    let info = user.done(&["info", "web"]).out;
    assert!(info.contains("state    Running\n") && info.contains("serial   tty\n"), "{info}");
    assert!(user.json(&["inspect", "web", "vcpus/vcpu0"])["instructions"].as_u64().unwrap() > 0);
    user.done(&["reset", "web"]);
    assert_eq!(running.line(), "hello\n");
    let unknown = user.refused(&["info", "wbe"]);
    assert_eq!(unknown, "atoll: no machine named 'wbe' runs; these do: web\n");
    user.done(&["shutdown", "web"]);
    assert_eq!(running.end().status, Some(0));
    let rest = events.end();
    let last = rest.out.lines().last().unwrap_or_default();
    assert!(rest.status == Some(0) && last.contains("\"vmm\"") && last.contains("\"shutdown\""), "{rest:?}");
    assert_eq!(user.json(&["ps", "--json"]), json!([]));
    assert!(!user.api_socket("web").parent().unwrap().exists());
}

/// The console of a machine without a terminal: what was printed before somebody came is there, what is typed arrives.
#[test]
fn a_console_is_attached_to() {
    for serial in ["socket", "pty"] {
        let user = User::new();
        let running = Running::start(user.run(&["--serial", serial]));
        user.wait_for("vm0");
        while user.json(&["info", "vm0", "--json"])["state"] != "Running" {
            std::thread::sleep(Duration::from_millis(20));
        }
        // Leaving by the escape leaves the machine alone.
        let mut visit = Running::start(user.command(&["console", "vm0"]));
        assert_eq!(visit.line(), "hello\n", "{serial}");
        visit.send(b"\x01x");
        assert_eq!(visit.end().status, Some(0));
        let mut console = Running::start(user.command(&["console", "vm0"]));
        console.send(b"q");
        assert_eq!(running.end().status, Some(0), "{serial}");
        assert_eq!(console.end().status, Some(0), "{serial}");
    }
}

/// A script's input is sent to its end, what the guest says is printed for a while, and that is all; no input at all is
/// the same. The machine is left alone, unless it was told to end.
#[test]
fn a_console_ends_with_its_input() {
    let user = User::new();
    let running = Running::start(user.run(&["--serial", "socket"]));
    user.wait_for("vm0");
    while user.json(&["info", "vm0", "--json"])["state"] != "Running" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let end = outcome(user.command(&["console", "vm0"]));
    assert_eq!((end.status, end.out.as_str()), (Some(0), "hello\n"), "{end:?}");
    assert_eq!(user.json(&["info", "vm0", "--json"])["state"], "Running");
    let mut scripted = Running::start(user.command(&["console", "vm0", "--wait", "50"]));
    scripted.send(b"q");
    drop(scripted.stdin.take());
    assert_eq!(running.end().status, Some(0), "all of it has arrived");
    assert_eq!(scripted.end().status, Some(0));
}

/// Without a kernel the machine comes over the API, and may be switched off and on.
#[test]
fn a_machine_comes_over_the_api() {
    let user = User::new();
    let socket = user.folder.path().join("own.sock");
    let running = Running::start(user.command(&["--api-socket", socket.to_str().unwrap(), "--name", "late"]));
    let mut client = user.wait_for("late");
    assert!(user.done(&["ps"]).out.contains("No machine"));
    let config = json!({
        "payload": { "kernel": user.kernel },
        "memory": { "size": 32 << 20 },
        "platform": { "cpu": "soft" },
    });
    client.call(Method::Put, "/api/v1/vm.create", Some(&config)).unwrap();
    let socket = socket.to_str().unwrap();
    user.done(&["boot", socket]);
    assert_eq!(user.json(&["info", "late", "--json"])["state"], "Running");
    user.done(&["shutdown", socket, "--keep"]);
    assert_eq!(user.json(&["info", "late", "--json"])["state"], "Shutdown");
    user.done(&["boot", "late"]);
    signal(running.pid(), Signal::TERM);
    assert_eq!(running.end().status, Some(128 + 15));
    assert!(!Path::new(socket).exists());
}

/// A machine that was killed is not listed, and its name is free. Whoever was attached hears that it did not end by itself.
#[test]
fn what_a_killed_machine_leaves_is_nothing() {
    let user = User::new();
    let running = Running::start(user.run(&["--name", "web", "--serial", "socket"]));
    let mut client = user.wait_for("web");
    while user.json(&["info", "web", "--json"])["state"] != "Running" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let console = Running::start(user.command(&["console", "web"]));
    assert_eq!(console.line(), "hello\n");
    let events = Running::start(user.command(&["events", "web"]));
    // Until the listener hears of something.
    let (sender, heard) = std::sync::mpsc::channel();
    let events = std::thread::spawn(move || {
        sender.send(events.line()).unwrap();
        events.end()
    });
    while heard.try_recv().is_err() {
        client.call(Method::Put, "/api/v1/vm.pause", None).unwrap();
        client.call(Method::Put, "/api/v1/vm.resume", None).unwrap();
    }
    signal(running.pid(), Signal::KILL);
    assert_eq!(running.end().status, None);
    for end in [console.end(), events.join().unwrap()] {
        assert!(end.status == Some(1) && end.err.contains("the process of web is gone"), "{end:?}");
    }
    assert!(user.api_socket("web").exists(), "a killed process cannot clean up");
    assert_eq!(user.json(&["ps", "--json"]), json!([]));
    assert!(!user.folder.path().join("atoll/web").exists(), "whoever lists machines does");
    let mut again = Running::start(user.run(&["--name", "web"]));
    again.line();
    again.send(b"q");
    assert_eq!(again.end().status, Some(0));
}

/// The same machine, from a file.
#[test]
fn a_file_describes_a_machine() {
    let user = User::new();
    let file = user.folder.path().join("vm.toml");
    let text = format!(
        "name = \"filed\"\nmemory.size = \"32M\"\nplatform.cpu = \"soft\"\n[payload]\nkernel = {:?}\n",
        user.kernel.to_str().unwrap()
    );
    std::fs::write(&file, text).unwrap();
    let mut running = Running::start(user.command(&["--config", file.to_str().unwrap()]));
    assert_eq!(running.line(), "hello\n");
    assert_eq!(user.json(&["info", "filed", "--json"])["memory_actual_size"], 32 << 20);
    running.send(b"q");
    assert_eq!(running.end().status, Some(0));
}

/// Clients of Cloud Hypervisor start it by that name, and gate features by what it answers.
#[test]
fn it_answers_to_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let alias = folder.path().join("cloud-hypervisor");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_atoll"), &alias).unwrap();
    let told = |program: &Path| {
        let mut command = Command::new(program);
        command.arg("--version");
        outcome(command).out
    };
    assert!(told(&alias).starts_with("cloud-hypervisor v51."), "{}", told(&alias));
    let both = told(Path::new(env!("CARGO_BIN_EXE_atoll")));
    assert!(both.starts_with("atoll ") && both.contains("cloud-hypervisor v51."), "{both}");
}

/// A switch that dies is started again; a signal ends both. One that does not even start is a mistake.
#[test]
fn a_switch_is_kept_alive() {
    let user = User::new();
    let lives = user.folder.path().join("lives");
    let backend = user.folder.path().join("atoll-net");
    let write = |script: &str| {
        let mut file = std::fs::File::create(&backend).unwrap();
        write!(file, "#!/bin/sh\n{script}\n").unwrap();
        std::fs::set_permissions(&backend, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let folder = user.folder.path().to_str().unwrap();
    write("echo no luck >&2; exit 3");
    let error = user.refused(&["switch", "lan", "--backend-dir", folder]);
    assert!(error.contains("no luck") && error.contains("has ended at once (exit status: 3)"), "{error}");
    write(&format!("echo $$ $* >> {}; exec sleep 1000.25", lives.display()));
    let switch = Running::start(user.command(&["switch", "lan", "--ports", "3", "--backend-dir", folder]));
    let line = |number: usize| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read_to_string(&lives).unwrap_or_default();
            if let Some(line) = text.lines().nth(number) {
                return line.to_owned();
            }
            assert!(Instant::now() < deadline, "no life {number}: {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let first = line(0);
    let socket = user.folder.path().join("atoll/switches/lan.sock");
    assert!(first.ends_with(&format!("--switch --socket {} --ports 3", socket.display())), "{first}");
    std::thread::sleep(Duration::from_millis(1100));
    signal(first.split(' ').next().unwrap().parse().unwrap(), Signal::KILL);
    let second: i32 = line(1).split(' ').next().unwrap().parse().unwrap();
    signal(switch.pid(), Signal::TERM);
    assert_eq!(switch.end().status, Some(0));
    assert!(!Path::new(&format!("/proc/{second}")).exists(), "the switch's process lives on");
}
