//! `atoll-vsock` as a process: the test is the guest's driver on one side and the host's programs on the other.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::{Driver, Options};

const PATIENCE: Duration = Duration::from_secs(20);
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// Where buffers are in the guest's memory.
const DATA: u64 = 4 << 20;
const BUFFER: u32 = 4096;
const BUFFERS: u64 = 8;
const SAID: u64 = DATA + (1 << 20);
const HEADER: usize = 44;
const CID: u64 = 7;
const PORT: u32 = 1234;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    host: u32,
    guest: u32,
    op: u16,
    flags: u32,
    room: u32,
    taken: u32,
    data: Vec<u8>,
}

struct Stage {
    folder: tempfile::TempDir,
    process: Process,
    driver: Driver,
}

fn connect(path: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn start(folder: &Path) -> Result<Process> {
    for name in ["v", "front"] {
        let _ = std::fs::remove_file(folder.join(name));
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-vsock"));
    command.arg("--socket").arg(folder.join("front")).arg("--cid").arg(CID.to_string());
    Ok(Process(command.arg("--path").arg(folder.join("v")).stdin(Stdio::null()).spawn()?))
}

impl Stage {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let process = start(folder.path())?;
        let options = Options { queues: 3, ..Options::default() };
        let driver = Driver::connected(options, connect(&folder.path().join("front"))?)?;
        let mut stage = Self { folder, process, driver };
        ensure!(stage.driver.config(8)? == CID.to_le_bytes());
        for buffer in 0..BUFFERS {
            stage.offer(RECEIVE, DATA + buffer * u64::from(BUFFER))?;
        }
        stage.offer(EVENTS, SAID + (1 << 20))?;
        stage.transport_reset()?;
        Ok(stage)
    }
    fn offer(&mut self, queue: usize, at: u64) -> Result<()> {
        let (ring, guest) = self.driver.queue(queue)?;
        ring.add(guest, &[], &[(at, BUFFER)]).context("a full queue")?;
        ring.publish(guest)
    }
    /// A process that has just begun says that earlier connections are gone.
    fn transport_reset(&mut self) -> Result<()> {
        let (ring, guest) = self.driver.queue(EVENTS)?;
        let (_, len) = ring.take_within(guest, PATIENCE).context("the event")?;
        let mut event = [0xff; 4];
        guest.read(SAID + (1 << 20), &mut event);
        ensure!(len == 4 && event == [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
        self.offer(EVENTS, SAID + (1 << 20))
    }
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    fn say_raw(&mut self, bytes: &[u8]) -> Result<()> {
        let (ring, guest) = self.driver.queue(TRANSMIT)?;
        guest.write(SAID, bytes);
        ring.add(guest, &[(SAID, bytes.len() as u32)], &[]).context("a full queue")?;
        ring.publish(guest)?;
        ring.take_within(guest, PATIENCE)?;
        Ok(())
    }
    fn say(&mut self, packet: &Packet) -> Result<()> {
        let Packet { host, guest, op, flags, room, taken, data } = packet;
        let mut bytes = [&CID.to_le_bytes()[..], &2_u64.to_le_bytes()].concat();
        for word in [*guest, *host, data.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(1_u16.to_le_bytes().into_iter().chain(op.to_le_bytes()));
        for word in [*flags, *room, *taken] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(data);
        self.say_raw(&bytes)
    }
    fn hear(&mut self) -> Result<Packet> {
        let (ring, guest) = self.driver.queue(RECEIVE)?;
        let (head, len) = ring.take_within(guest, PATIENCE).context("a packet")?;
        let at = DATA + u64::from(head) % BUFFERS * u64::from(BUFFER);
        let mut bytes = vec![0; len as usize];
        guest.read(at, &mut bytes);
        self.offer(RECEIVE, at)?;
        ensure!(bytes.len() >= HEADER, "{bytes:?}");
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        ensure!(bytes[..8] == 2_u64.to_le_bytes() && bytes[8..16] == CID.to_le_bytes(), "{bytes:?}");
        ensure!(half(28) == 1 && word(24) as usize == bytes.len() - HEADER, "{bytes:?}");
        let data = bytes[HEADER..].to_vec();
        Ok(Packet {
            host: word(16),
            guest: word(20),
            op: half(30),
            flags: word(32),
            room: word(36),
            taken: word(40),
            data,
        })
    }
    /// The next packet, which is of this kind.
    fn hear_op(&mut self, op: u16) -> Result<Packet> {
        let packet = self.hear()?;
        ensure!(packet.op == op, "{packet:?}");
        Ok(packet)
    }
    /// A connection that a client of the host's has asked for.
    fn connected_from_host(&mut self, room: u32) -> Result<(UnixStream, Packet)> {
        let mut client = connect(&self.path("v"))?;
        client.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
        let asked = self.hear_op(REQUEST)?;
        ensure!(asked.guest == PORT, "{asked:?}");
        let answer = packet(&asked, RESPONSE, room);
        self.say(&answer)?;
        let wanted = format!("OK {}\n", asked.host);
        let mut line = vec![0; wanted.len()];
        client.read_exact(&mut line)?;
        ensure!(line == wanted.as_bytes(), "{line:?}");
        Ok((client, answer))
    }
}

/// A packet of the guest's on the connection of another one.
fn packet(of: &Packet, op: u16, room: u32) -> Packet {
    Packet { op, room, flags: 0, taken: 0, data: Vec::new(), ..of.clone() }
}

/// A client of the host's reaches a port of the guest; bytes go both ways, no more than either side has room for; each side
/// shuts its end and the connection is over.
#[test]
fn a_client_of_the_host_reaches_the_guest() -> Result<()> {
    let mut stage = Stage::new()?;
    let (mut client, base) = stage.connected_from_host(1000)?;
    // More than the guest has room for.
    client.write_all(&[7; 3000])?;
    let first = stage.hear_op(RW)?;
    ensure!(first.data == [7; 1000], "{} bytes", first.data.len());
    ensure!(first.room > 0);
    stage.say(&Packet { taken: 1000, ..packet(&base, CREDIT_UPDATE, 1000) })?;
    ensure!(stage.hear_op(RW)?.data == [7; 1000]);
    stage.say(&Packet { taken: 2000, ..packet(&base, CREDIT_UPDATE, 5000) })?;
    ensure!(stage.hear_op(RW)?.data == [7; 1000]);
    // The other way, and what the guest is told of it.
    let mut sent = 0_u32;
    for round in 0..100_u8 {
        let data = vec![round; 4000];
        sent += 4000;
        stage.say(&Packet { taken: 3000, data, ..packet(&base, RW, 5000) })?;
        let mut got = [0; 4000];
        client.read_exact(&mut got)?;
        ensure!(got.iter().all(|byte| *byte == round));
        if sent.is_multiple_of(68_000) {
            ensure!(stage.hear_op(CREDIT_UPDATE)?.taken >= 65_536);
        }
    }
    stage.say(&Packet { taken: 3000, ..packet(&base, CREDIT_REQUEST, 5000) })?;
    while stage.hear_op(CREDIT_UPDATE)?.taken != sent {}
    // The host says no more, and still hears.
    client.shutdown(std::net::Shutdown::Write)?;
    ensure!(stage.hear_op(SHUTDOWN)?.flags == 2);
    stage.say(&Packet { taken: 3000, data: b"last words".to_vec(), ..packet(&base, RW, 5000) })?;
    stage.say(&Packet { taken: 3000, flags: 3, ..packet(&base, SHUTDOWN, 5000) })?;
    ensure!(stage.hear_op(RESET)?.host == base.host, "both ends are shut");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest)?;
    ensure!(rest == b"last words", "{rest:?}");
    Ok(())
}

/// The guest reaches who listens at PATH_PORT; where nobody does, and on a connection that is not known, it is reset. A
/// client that the guest turns away is closed, and so is one that talks nonsense.
#[test]
fn a_guest_reaches_the_host_or_is_refused() -> Result<()> {
    let mut stage = Stage::new()?;
    let listener = UnixListener::bind(stage.path("v_52"))?;
    let base = Packet { host: 52, guest: 1025, op: REQUEST, flags: 0, room: 65536, taken: 0, data: Vec::new() };
    stage.say(&base)?;
    ensure!(stage.hear_op(RESPONSE)?.guest == 1025);
    let (mut program, _) = listener.accept()?;
    program.set_read_timeout(Some(PATIENCE))?;
    stage.say(&Packet { data: b"to the host".to_vec(), ..packet(&base, RW, 65536) })?;
    let mut got = [0; 11];
    program.read_exact(&mut got)?;
    ensure!(&got == b"to the host");
    program.write_all(b"to the guest")?;
    ensure!(stage.hear_op(RW)?.data == b"to the guest");
    // It ends: what it said before comes first.
    program.write_all(b"bye")?;
    drop(program);
    ensure!(stage.hear_op(RW)?.data == b"bye");
    let mut flags = 0;
    while flags != 3 {
        flags |= stage.hear_op(SHUTDOWN)?.flags;
    }
    stage.say(&packet(&base, RESET, 0))?;
    for (host, op) in [(53, REQUEST), (99, RW), (99, CREDIT_UPDATE), (52, RW)] {
        stage.say(&Packet { host, ..packet(&base, op, 0) })?;
        ensure!(stage.hear_op(RESET)?.host == host);
    }
    let mut client = connect(&stage.path("v"))?;
    client.write_all(b"CONNECT 77\n")?;
    let asked = stage.hear_op(REQUEST)?;
    stage.say(&packet(&asked, RESET, 0))?;
    ensure!(client.read(&mut [0; 8])? == 0, "nobody listens at port 77 of the guest");
    let mut client = connect(&stage.path("v"))?;
    client.write_all(b"CONNECT nowhere\n")?;
    ensure!(client.read(&mut [0; 8]).unwrap_or(0) == 0, "that is no port");
    Ok(())
}

/// What a guest must not do costs it a connection and nothing else: more than there was room for, lengths that are not true,
/// addresses of others, floods.
#[test]
fn a_hostile_guest_harms_itself() -> Result<()> {
    let mut stage = Stage::new()?;
    let (client, base) = stage.connected_from_host(1 << 20)?;
    // Nobody reads on the host's side: what the socket and the room hold, and then the end.
    let mut taken = 0;
    let reset = loop {
        let data = vec![1; 60_000];
        stage.say(&Packet { data, ..packet(&base, RW, 1 << 20) })?;
        taken += 60_000;
        ensure!(taken < 8 << 20, "there is no end of it");
        let (ring, guest) = stage.driver.queue(RECEIVE)?;
        if ring.take_within(guest, Duration::from_millis(1)).is_ok() {
            break true;
        }
    };
    ensure!(reset);
    drop(client);
    let mut stage = Stage::new()?;
    stage.say_raw(&[0; 3])?;
    stage.say_raw(&[0xff; 200])?;
    let mut lying = vec![0; HEADER];
    lying[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    lying[30] = RW as u8;
    stage.say_raw(&lying)?;
    for port in 0..2000 {
        let host = 1_000_000 + port;
        let flood = Packet { host, guest: 5, op: RW, flags: 0, room: 0, taken: 0, data: vec![0; 16] };
        stage.say(&flood)?;
    }
    // Eight buffers hold answers; the others wait, and some were not worth keeping.
    let mut resets = 0;
    while resets < 100 {
        stage.hear_op(RESET)?;
        resets += 1;
    }
    drop(stage);
    let mut stage = Stage::new()?;
    stage.connected_from_host(1000).map(drop)
}

/// A successor says that all connections are gone, and serves new ones; what the dead one had open is closed.
#[test]
fn a_successor_begins_without_connections() -> Result<()> {
    let mut stage = Stage::new()?;
    let (mut client, base) = stage.connected_from_host(1000)?;
    drop(std::mem::replace(&mut stage.process, start(stage.folder.path())?));
    ensure!(client.read(&mut [0; 8]).unwrap_or(0) == 0, "its stream ends");
    let front = connect(&stage.path("front"))?;
    stage.driver.connect(front)?;
    stage.transport_reset()?;
    stage.say(&packet(&base, RW, 1000))?;
    ensure!(stage.hear_op(RESET)?.host == base.host);
    stage.connected_from_host(1000).map(drop)
}
