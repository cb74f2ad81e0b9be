//! The loops under QEMU's TCG, in system mode.

use super::Run;
use super::clock::ProcessorClock;
use super::image::{EXIT_PORT, Image, REPORT_PORT};
use anyhow::{Context, bail};
use std::io::{Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-system-x86_64";
/// Longest that one loop may take.
const DEADLINE: Duration = Duration::from_secs(180);

/// First line of `--version`.
pub fn version() -> anyhow::Result<String> {
    let output = Command::new(PROGRAM)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {PROGRAM}: install QEMU (Debian: qemu-system-x86)"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Ends the process with its owner.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended already; either way it is reaped here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the image and times its loop by QEMU's processor time when the two report bytes arrive.
pub fn run(image: &Image) -> anyhow::Result<Run> {
    let mut file = tempfile::NamedTempFile::new().context("no temporary file for the image")?;
    file.write_all(&image.bytes).context("cannot write the image")?;
    let mut child = Guard(
        Command::new(PROGRAM)
            .args(["-M", "q35", "-accel", "tcg", "-cpu", "qemu64", "-m", "64M", "-nodefaults", "-display", "none"])
            .args(["-chardev", "stdio,id=report", "-device"])
            .arg(format!("isa-debugcon,iobase={REPORT_PORT:#x},chardev=report"))
            .args(["-device", &format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"), "-kernel"])
            .arg(file.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {PROGRAM}: install QEMU (Debian: qemu-system-x86)"))?,
    );
    let output = child.0.stdout.take().context("no pipe from QEMU")?;
    let clock = ProcessorClock::of_process(child.0.id())?;
    let (sender, receiver) = mpsc::sync_channel(64);
    let reader = std::thread::spawn(move || forward(output, clock, &sender));
    let end = Instant::now() + DEADLINE;
    let mut bytes = Vec::new();
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(stamped) => bytes.push(stamped),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("{PROGRAM} did not finish the loop within {DEADLINE:?}"),
        }
    }
    // The reader has dropped its end, so it is about to return.
    let _ = reader.join();
    let text: Vec<u8> = bytes.iter().map(|(byte, _)| *byte).collect();
    let Some(start) = text.iter().position(|byte| *byte == b'S') else {
        let mut errors = String::new();
        if let Some(mut stderr) = child.0.stderr.take() {
            let _ = stderr.read_to_string(&mut errors);
        }
        bail!("{PROGRAM} did not start the image: {}", errors.trim());
    };
    match text.get(start..start + 10) {
        Some([b'S', b'E', checksum @ ..]) => Ok(Run {
            checksum: checksum.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)),
            seconds: bytes[start + 1].1 - bytes[start].1,
        }),
        _ => bail!("{PROGRAM} reported {text:?} instead of a result"),
    }
}

/// Stamps each byte with QEMU's processor time at its arrival.
fn forward(mut output: ChildStdout, clock: ProcessorClock, sender: &mpsc::SyncSender<(u8, f64)>) {
    let mut buffer = [0; 64];
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        let now = clock.seconds();
        for &byte in &buffer[..count] {
            if sender.send((byte, now)).is_err() {
                return;
            }
        }
    }
}
