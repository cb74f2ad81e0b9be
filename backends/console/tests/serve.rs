//! `atoll-console` as a process: the test is the guest's driver on one side and the host's clients on the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::{Driver, Options, Queue};

const DATA: u64 = 4 << 20;
const ROOM: u32 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);
/// Queues: input and output of port 0, control messages both ways, then port 1.
const INPUT: usize = 0;
const OUTPUT: usize = 1;
const MESSAGES: usize = 2;
const CONTROL: usize = 3;
const SECOND_OUTPUT: usize = 5;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
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

/// The guest's side.
struct Guest(Driver);

impl Guest {
    /// Where the buffer of a queue is.
    fn place(queue: usize) -> u64 {
        DATA + queue as u64 * u64::from(ROOM)
    }
    fn offer(&mut self, queue: usize) -> Result<()> {
        let (ring, guest) = self.0.queue(queue)?;
        ring.add(guest, &[], &[(Self::place(queue), ROOM)]).context("a full queue")?;
        ring.publish(guest)
    }
    /// Takes what came for a queue, and offers its buffer again.
    fn hear(&mut self, queue: usize) -> Result<Vec<u8>> {
        let (ring, guest) = self.0.queue(queue)?;
        let (_, len) = ring.take_within(guest, PATIENCE).with_context(|| format!("queue {queue}"))?;
        let mut bytes = vec![0; len as usize];
        guest.read(Self::place(queue), &mut bytes);
        self.offer(queue)?;
        Ok(bytes)
    }
    fn say(&mut self, queue: usize, bytes: &[u8]) -> Result<()> {
        let (ring, guest) = self.0.queue(queue)?;
        guest.write(Self::place(queue), bytes);
        ring.add(guest, &[(Self::place(queue), bytes.len() as u32)], &[]).context("a full queue")?;
        ring.publish(guest)?;
        ring.take_within(guest, PATIENCE)?;
        Ok(())
    }
    fn control(&mut self, port: u32, event: u16, value: u16) -> Result<()> {
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.say(CONTROL, &message)
    }
    /// The next message: port, event, value, text.
    fn message(&mut self) -> Result<(u32, u16, u16, String)> {
        let bytes = self.hear(MESSAGES)?;
        ensure!(bytes.len() >= 8, "{bytes:?}");
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let port = u32::from(half(0)) | u32::from(half(2)) << 16;
        Ok((port, half(4), half(6), String::from_utf8(bytes[8..].to_vec())?))
    }
}

/// The driver greets the device, learns of both ports and talks through the first to one client after the other; what it
/// prints while nobody listens is lost and keeps nobody waiting. The second port goes to a file.
#[test]
fn two_ports_are_served() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (socket, client, log) = (folder.path().join("v"), folder.path().join("c"), folder.path().join("log"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-console"));
    command.arg("--socket").arg(&socket);
    command.arg("--port").arg(format!("console=unix:{}", client.display()));
    command.arg("--port").arg(format!("org.log=file:{}", log.display()));
    let _process = Process(command.spawn()?);
    let mut driver = Driver::connected(Options { queues: 6, ..Options::default() }, connect(&socket)?)?;
    ensure!(driver.features() & 2 != 0, "VIRTIO_CONSOLE_F_MULTIPORT");
    ensure!(driver.config(12)?[4..8] == 2_u32.to_le_bytes());
    let mut guest = Guest(driver);
    guest.say(OUTPUT, b"nobody hears this")?;
    for queue in [INPUT, MESSAGES] {
        guest.offer(queue)?;
    }
    guest.control(0, 0, 1)?;
    ensure!(guest.message()? == (0, 1, 1, String::new()) && guest.message()? == (1, 1, 1, String::new()));
    guest.control(0, 3, 1)?;
    ensure!(guest.message()? == (0, 4, 1, String::new()), "port 0 is a console");
    ensure!(guest.message()? == (0, 7, 1, "console".into()));
    ensure!(guest.message()? == (0, 6, 0, String::new()), "nobody is there");
    guest.control(1, 3, 1)?;
    ensure!(guest.message()? == (1, 7, 1, "org.log".into()));
    ensure!(guest.message()? == (1, 6, 1, String::new()));
    // A port that is not there, an event that is not known: passed over.
    guest.control(77, 3, 1)?;
    guest.control(0, 999, 1)?;
    guest.say(CONTROL, &[1, 2])?;
    for round in 0..3_u8 {
        let mut host = connect(&client)?;
        host.set_read_timeout(Some(PATIENCE))?;
        ensure!(guest.message()? == (0, 6, 1, String::new()), "round {round}");
        host.write_all(&[b'a' + round; 5])?;
        ensure!(guest.hear(INPUT)? == [b'a' + round; 5]);
        let long = vec![b'A' + round; ROOM as usize];
        guest.say(OUTPUT, &long)?;
        let mut heard = vec![0; long.len()];
        host.read_exact(&mut heard)?;
        ensure!(heard == long);
        drop(host);
        ensure!(guest.message()? == (0, 6, 0, String::new()), "round {round}");
    }
    guest.say(SECOND_OUTPUT, b"one line\n")?;
    ensure!(std::fs::read(&log)? == b"one line\n");
    Ok(())
}

/// A driver that waits for its output in a loop, as Linux's does, is not interrupted for it; one that sleeps is.
#[test]
fn who_looks_is_not_called() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("v");
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-console"));
    command.arg("--socket").arg(&socket).arg("--port").arg(format!("a=file:{}", folder.path().join("log").display()));
    let _process = Process(command.spawn()?);
    let mut driver = Driver::connected(Options { queues: 4, ..Options::default() }, connect(&socket)?)?;
    let (ring, guest) = driver.queue(OUTPUT)?;
    let print = |ring: &mut Queue| -> Result<()> {
        ring.ask_for_call(guest);
        let _ = ring.call.read();
        ring.add(guest, &[(DATA, 1)], &[]).context("a full queue")?;
        ring.publish(guest)
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        ensure!(Instant::now() < deadline, "this machine is too slow to look in time");
        print(ring)?;
        let published = Instant::now();
        while ring.take(guest).is_none() {
            ensure!(Instant::now() < deadline, "a line is not taken");
            std::hint::spin_loop();
        }
        ring.ask_for_call(guest);
        // Another time, if this thread did not run when it had to look.
        if published.elapsed() < Duration::from_millis(8) {
            break;
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    ensure!(ring.call.read().is_err(), "called for what was seen");
    print(ring)?;
    while ring.call.read().is_err() {
        ensure!(Instant::now() < deadline, "not called for what was not seen");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// More input than the guest has buffers for waits where it came from, and arrives in order.
#[test]
fn input_waits_for_buffers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (socket, client) = (folder.path().join("v"), folder.path().join("c"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-console"));
    command.arg("--socket").arg(&socket).arg("--port").arg(format!("console=unix:{}", client.display()));
    let _process = Process(command.spawn()?);
    let driver = Driver::connected(Options { queues: 4, ..Options::default() }, connect(&socket)?)?;
    let mut guest = Guest(driver);
    let mut host = connect(&client)?;
    let text: Vec<u8> = (0..40_000_u32).map(|at| (at % 251) as u8).collect();
    host.write_all(&text)?;
    guest.offer(INPUT)?;
    let mut heard = Vec::new();
    while heard.len() < text.len() {
        heard.extend(guest.hear(INPUT)?);
    }
    ensure!(heard == text);
    Ok(())
}

#[test]
fn bad_ports_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("v");
    let missing = format!("a=file:{}", folder.path().join("no/where").display());
    for (port, expected) in [
        (None, "give 1 to 31, with --port"),
        (Some("console"), "a name is missing"),
        (Some("console=tcp:1"), "give console=pty"),
        (Some(missing.as_str()), "choose another path"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-console"));
        command.arg("--socket").arg(&socket).stderr(Stdio::piped());
        command.args(port.iter().flat_map(|port| ["--port", port]));
        let output = command.spawn()?.wait_with_output()?;
        let text = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && text.lines().count() == 1, "{:?}: {text}", output.status);
        ensure!(text.starts_with("atoll-console: ") && text.contains(expected), "{text}");
    }
    Ok(())
}
