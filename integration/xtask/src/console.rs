//! A guest on its serial port: start a VMM with its console on pipes, wait for text, type, read what comes back.

use anyhow::{Context, Result, bail};
use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::images::PROMPT;

/// Lines of stderr that an error quotes.
const QUOTED_LINES: usize = 12;
const CHUNKS_MAX: usize = 4096;

/// A running VMM and its guest's serial console. Dropping it kills the VMM.
pub struct Console {
    child: Child,
    input: Option<ChildStdin>,
    output: Receiver<(Instant, Vec<u8>)>,
    errors: Option<JoinHandle<String>>,
    started: Instant,
    /// Everything that the guest has printed.
    pub transcript: String,
    /// How much of the transcript earlier waits have consumed.
    consumed: usize,
    arrivals: Vec<(usize, Instant)>,
}

impl Console {
    /// Starts `command` with its standard streams on pipes.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let mut stdout = child.stdout.take().context("stdout was piped")?;
        let mut stderr = child.stderr.take().context("stderr was piped")?;
        let (sender, output) = sync_channel(CHUNKS_MAX);
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut chunk) {
                if sender.send((Instant::now(), chunk[..length].to_vec())).is_err() {
                    break;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self {
            input: child.stdin.take(),
            child,
            output,
            errors: Some(errors),
            started,
            transcript: String::new(),
            consumed: 0,
            arrivals: Vec::new(),
        })
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When the VMM was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Waits until `wanted` appears after what earlier waits consumed; gives the text before it.
    pub fn expect(&mut self, wanted: &str, within: Duration) -> Result<String> {
        let deadline = Instant::now() + within;
        // What has been searched is not searched again: a guest may say megabytes before the word that is waited for.
        let mut from = self.consumed;
        loop {
            if let Some(at) = self.transcript[from..].find(wanted) {
                let before = self.transcript[self.consumed..from + at].to_owned();
                self.consumed = from + at + wanted.len();
                return Ok(before);
            }
            from = self.transcript.floor_char_boundary(self.transcript.len().saturating_sub(wanted.len())).max(from);
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((when, chunk)) => {
                    self.transcript.push_str(&String::from_utf8_lossy(&chunk));
                    self.arrivals.push((self.transcript.len(), when));
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {wanted:?} on the console within {within:?}; it ends with:\n{}", self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let end = self.child.wait()?;
                    let errors = self.errors.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
                    bail!("the VMM ended ({end}) before {wanted:?}; console:\n{}\nstderr:\n{errors}", self.tail())
                }
            }
        }
    }

    fn tail(&self) -> String {
        let lines: Vec<&str> = self.transcript.lines().collect();
        lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n")
    }

    /// When the first occurrence of `text` had arrived whole.
    pub fn arrival(&self, text: &str) -> Option<Instant> {
        let end = self.transcript.find(text)? + text.len();
        self.arrivals.iter().find(|(length, _)| *length >= end).map(|(_, when)| *when)
    }

    /// Types text.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let input = self.input.as_mut().context("the console's input was closed")?;
        input.write_all(text.as_bytes())?;
        input.flush()?;
        Ok(())
    }

    /// Waits for the shell's first prompt.
    pub fn prompt(&mut self, within: Duration) -> Result<()> {
        self.expect(PROMPT, within).map(drop)
    }

    /// Runs one command in the guest's shell; gives its output, or an error with it if its exit status is not zero.
    pub fn run(&mut self, command: &str, within: Duration) -> Result<String> {
        // The quotes keep the echo of what is typed from looking like the answer. Where the echo ends the output tells: the echo
        // may come twice (typed before the prompt), be broken at the line's end, and lose a letter to the end of a job.
        self.send(&format!("echo \"be\"\"gun.\"; {command}; echo \"st\"\"atus=$?.\"\n"))?;
        self.expect("begun.", within)?;
        let output = self.expect("status=", within)?;
        let status = self.expect(".", within)?;
        self.expect(PROMPT, within)?;
        let output = output.replace('\r', "").trim().to_owned();
        if status != "0" {
            bail!("`{command}` in the guest ended with status {status}: {output}");
        }
        Ok(output)
    }

    /// Waits for the VMM to end by itself; gives its status and what it wrote to stderr.
    pub fn wait(mut self, within: Duration) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let errors = self.errors.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
                return Ok((status, errors));
            }
            if Instant::now() >= deadline {
                while let Ok((_, chunk)) = self.output.try_recv() {
                    self.transcript.push_str(&String::from_utf8_lossy(&chunk));
                }
                bail!("the VMM has not ended within {within:?}; console:\n{}", self.tail());
            }
            while let Ok((_, chunk)) = self.output.recv_timeout(Duration::from_millis(5)) {
                self.transcript.push_str(&String::from_utf8_lossy(&chunk));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
