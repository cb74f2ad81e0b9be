//! The terminal is raw while the machine runs and as it was before afterwards, however the machine ends.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use super::kernel::obedient;
use super::operate::User;
use super::process::{PATIENCE, Running, run};

/// A terminal of our own with `atoll` on it.
struct OnTerminal {
    master: File,
    slave: File,
    child: Child,
    _folder: tempfile::TempDir,
}

impl OnTerminal {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let command = run(&obedient(folder.path()));
        Self::with(command, folder, "hello")
    }

    fn with(mut command: Command, folder: tempfile::TempDir, first: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let mut terminal = Self { master: File::from(master), slave, child, _folder: folder };
        terminal.expect(first);
        terminal
    }

    /// Reads until the text is there.
    fn expect(&mut self, text: &str) {
        let mut seen = String::new();
        let mut bytes = [0; 256];
        let deadline = Instant::now() + PATIENCE;
        while !seen.contains(text) {
            assert!(Instant::now() < deadline, "no '{text}' in '{seen}'");
            let read = self.master.read(&mut bytes).unwrap();
            seen.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(self.slave.as_fd()).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    /// Waits for the end; the terminal must be as it was.
    fn ends_clean(mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let modes = tcgetattr(self.slave.as_fd()).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "{modes:?}");
        status
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl OnTerminal {
    fn type_in(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).unwrap();
    }
}

#[test]
fn given_back_after_power_off() {
    let mut terminal = OnTerminal::start();
    assert!(terminal.is_raw());
    terminal.type_in(b"q");
    assert!(terminal.ends_clean().success());
}

#[test]
fn given_back_after_the_escape() {
    let mut terminal = OnTerminal::start();
    terminal.type_in(b"\x01x");
    assert!(terminal.ends_clean().success());
}

#[test]
fn given_back_after_a_failure() {
    let mut terminal = OnTerminal::start();
    terminal.type_in(b"t");
    assert_eq!(terminal.ends_clean().code(), Some(1));
}

/// Ctrl-C belongs to the guest; signals come from outside, those that ask and those that report a crash.
#[test]
fn given_back_after_signals() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::ABORT, Signal::SEGV] {
        let mut terminal = OnTerminal::start();
        terminal.type_in(b"\x03");
        terminal.signal(signal);
        assert!(!terminal.ends_clean().success(), "{signal:?}");
    }
}

/// `top` shows a machine until that ends, and then says so: nothing went wrong. One that was killed is another matter.
#[test]
fn top_ends_with_its_machine() {
    for killed in [false, true] {
        let user = User::new();
        let mut running = Running::start(user.run(&["--name", "web"]));
        running.line();
        let folder = tempfile::tempdir().unwrap();
        let mut top = OnTerminal::with(user.command(&["top", "web"]), folder, "web: running");
        if killed {
            kill_process(Pid::from_raw(running.pid()).unwrap(), Signal::KILL).unwrap();
        } else {
            running.send(b"q");
            top.expect("web has ended");
        }
        assert_eq!(top.ends_clean().code(), Some(i32::from(killed)));
        let _ = running.end();
    }
}
