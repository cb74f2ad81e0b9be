//! A running `atoll` and what it says.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Nothing takes that long, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The command, silent but for errors.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll"));
    command.env("ATOLL_LOG", "off").env_remove("ATOLL_BACKEND_DIR").stdin(Stdio::null());
    command
}

/// `atoll run` with a kernel on the software CPU.
pub(crate) fn run(kernel: &Path) -> Command {
    let mut command = command();
    command.args(["run", "--cpu", "soft", "--memory", "size=32M", "--kernel"]).arg(kernel);
    command
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A running process; it is killed when the test gives it up.
pub(crate) struct Running {
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    err: Receiver<String>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (line, lines) = channel();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut text = String::new();
            while out.read_line(&mut text).is_ok_and(|read| read > 0) {
                let _ = line.send(std::mem::take(&mut text));
            }
        });
        let (told, err) = channel();
        let mut stderr = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            let _ = told.send(text);
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines, err }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Types.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }

    /// The next line that is printed.
    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("it prints nothing more")
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None if Instant::now() > deadline => panic!("it does not end"),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let err = self.err.recv_timeout(PATIENCE).unwrap();
        Outcome { status, out: self.lines.iter().collect(), err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
pub(crate) fn outcome(command: Command) -> Outcome {
    let mut running = Running::start(command);
    drop(running.stdin.take());
    running.end()
}
