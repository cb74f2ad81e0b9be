//! `atoll-rng` as a process, with a front end's hand-made ring.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::{Driver, Options};

/// Guest address where buffers may lie.
const DATA: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(socket: &Path, args: &[&str]) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-rng"));
    Ok(Process(command.arg("--socket").arg(socket).args(args).spawn()?))
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Asks for `len` bytes at `DATA` and gives what came.
fn ask(driver: &mut Driver, len: u32) -> Result<Vec<u8>> {
    let (queue, guest) = driver.queue(0)?;
    guest.write(DATA, &vec![0; len as usize]);
    queue.add(guest, &[], &[(DATA, len / 2), (DATA + u64::from(len / 2), len - len / 2)]).context("a full queue")?;
    queue.publish(guest)?;
    let (_, written) = queue.take_within(guest, PATIENCE)?;
    let mut bytes = vec![0; len as usize];
    guest.read(DATA, &mut bytes);
    ensure!(bytes[written as usize..].iter().all(|byte| *byte == 0), "bytes behind what was told");
    bytes.truncate(written as usize);
    Ok(bytes)
}

/// A buffer is filled with what is random as far as one can see; one that is too large is filled as far as it goes; a
/// successor of a killed process answers what its predecessor left.
#[test]
fn guests_get_entropy_over_deaths() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("rng.sock");
    let first = start(&socket, &[])?;
    let mut driver = Driver::connected(Options::default(), connect(&socket)?)?;
    let (one, two) = (ask(&mut driver, 64)?, ask(&mut driver, 64)?);
    ensure!(one.len() == 64 && two.len() == 64 && one != two);
    ensure!(ask(&mut driver, 200_000)?.len() == 64 << 10);
    ensure!(ask(&mut driver, 0)?.is_empty());
    drop(first);
    let (queue, guest) = driver.queue(0)?;
    queue.add(guest, &[], &[(DATA, 32)]).context("a full queue")?;
    queue.publish(guest)?;
    let _second = start(&socket, &[])?;
    // The dead process has left its socket's name behind.
    let deadline = Instant::now() + PATIENCE;
    while driver.connect(connect(&socket)?).is_err() {
        ensure!(Instant::now() < deadline, "no successor");
    }
    let (queue, guest) = driver.queue(0)?;
    ensure!(queue.take_within(guest, PATIENCE)?.1 == 32);
    Ok(())
}

/// The limit lets a bucket's worth through at once and the rest at its pace.
#[test]
fn entropy_can_be_limited() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("rng.sock");
    let _process = start(&socket, &["--rate-bytes", "1000,200"])?;
    let mut driver = Driver::connected(Options::default(), connect(&socket)?)?;
    let began = Instant::now();
    for _ in 0..3 {
        ensure!(ask(&mut driver, 1000)?.len() == 1000);
    }
    ensure!(began.elapsed() >= Duration::from_millis(390), "3000 bytes within {:?}", began.elapsed());
    Ok(())
}

/// What cannot be a source is one line that says what can.
#[test]
fn bad_sources_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    std::fs::write(&file, "four")?;
    for src in [file.as_path(), folder.path(), Path::new("/nowhere")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-rng"));
        command.arg("--socket").arg(folder.path().join("s")).arg("--src").arg(src).stderr(Stdio::piped());
        let output = command.spawn()?.wait_with_output()?;
        let text = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && text.lines().count() == 1, "{:?}: {text}", output.status);
        ensure!(text.starts_with("atoll-rng: ") && text.contains("/dev/urandom"), "{text}");
    }
    Ok(())
}
