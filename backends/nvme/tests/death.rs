//! The whole process, with a client and a driver made by hand: it is killed under load again and again, and goes on from its
//! record. Memory, record and image are files, so the test looks at them as they are.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_nvme::record::{DOORBELLS_AT, RECORD_LEN};
use atoll_nvme::spec::{admin, nvm, register};
use atoll_protocol::vfio_user::{
    Channel, DmaMap, DmaUnmap, Header, Kind, RegionAccess, Request, Version, region, reply,
};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::FdFlags;

const STEP: Duration = Duration::from_secs(60);
const RAM: u64 = 1 << 20;
const IMAGE: u64 = 1 << 20;
const SIZE: u32 = 16;
const ASQ: u64 = 0x1000;
const ACQ: u64 = 0x2000;
const SQ: u64 = 0x3000;
const CQ: u64 = 0x4000;
const DATA: u64 = 0x10_000;

fn memfd(len: u64) -> Result<File> {
    let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, len)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file.into())
}

/// One process and the conversation with it.
struct Server {
    process: Child,
    channel: Channel,
    next: u16,
}

impl Server {
    fn start(image: &Path, record: &File) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (theirs, record) = (OwnedFd::from(theirs), record.as_fd().try_clone_to_owned()?);
        let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-nvme"));
        for (option, fd) in [("--vhost-fd", &theirs), ("--record-fd", &record)] {
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            command.arg(option).arg(fd.as_raw_fd().to_string());
        }
        let process = command.arg("--path").arg(image).stdin(Stdio::null()).spawn()?;
        let mut server = Self { process, channel: Channel::new(ours), next: 0 };
        let version = Version { major: Version::MAJOR, minor: Version::MINOR, capabilities: Default::default() };
        server.ask(&Request::Version(version), &[])?;
        Ok(server)
    }
    fn ask(&mut self, request: &Request, beside: &[BorrowedFd<'_>]) -> Result<Vec<u8>> {
        self.next += 1;
        let command = request.command() as u16;
        let header = Header { id: self.next, command, payload: 0, kind: Kind::Command { reply: true } };
        self.channel.send(header, &request.encode(), beside, STEP)?;
        let answer = self.channel.receive(STEP)?;
        ensure!((answer.header.id, answer.header.command) == (header.id, command), "{:?}", answer.header);
        ensure!(answer.header.kind == Kind::Reply, "{request:?}: {:?}", answer.header.kind);
        Ok(answer.payload)
    }
    fn map(&mut self, ram: &File) -> Result<()> {
        let map = DmaMap { address: 0, len: RAM, offset: 0, readable: true, writable: true };
        self.ask(&Request::DmaMap(map), &[ram.as_fd()]).map(drop)
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let access = RegionAccess { region: region::BAR_0, offset, count: data.len() as u32 };
        self.ask(&Request::RegionWrite(access, data.to_vec()), &[]).map(drop)
    }
    fn read(&mut self, offset: u64) -> Result<u32> {
        let access = RegionAccess { region: region::BAR_0, offset, count: 4 };
        let payload = self.ask(&Request::RegionRead(access), &[])?;
        Ok(u32::from_le_bytes(reply::decode_read(&access, &payload)?.try_into()?))
    }
    fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A queue pair as its driver has it.
struct Pair {
    number: u64,
    sq: u64,
    cq: u64,
    tail: u32,
    head: u32,
    phase: bool,
}

impl Pair {
    fn new(number: u64, sq: u64, cq: u64) -> Self {
        Self { number, sq, cq, tail: 0, head: 0, phase: true }
    }
    /// Puts a command into the queue and rings, in the record: whether there is a process or not.
    fn submit(&mut self, ram: &File, record: &File, opcode: u8, id: u16, rest: &[(usize, u32)]) -> Result<()> {
        let mut words = [0_u32; 16];
        (words[0], words[1]) = (u32::from(opcode) | u32::from(id) << 16, 1);
        rest.iter().for_each(|(at, word)| words[*at] = *word);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write_all_at(&bytes, self.sq + u64::from(self.tail) * 64)?;
        self.tail = (self.tail + 1) % SIZE;
        Ok(record.write_all_at(&self.tail.to_le_bytes(), DOORBELLS_AT + self.number * 8)?)
    }
    fn take(&mut self, ram: &File, record: &File) -> Result<Option<(u16, u16)>> {
        let mut last = [0; 4];
        ram.read_exact_at(&mut last, self.cq + u64::from(self.head) * 16 + 12)?;
        let last = u32::from_le_bytes(last);
        if (last >> 16 & 1 == 1) != self.phase {
            return Ok(None);
        }
        self.head = (self.head + 1) % SIZE;
        self.phase ^= self.head == 0;
        record.write_all_at(&self.head.to_le_bytes(), DOORBELLS_AT + self.number * 8 + 4)?;
        Ok(Some((last as u16, (last >> 17) as u16)))
    }
    /// Waits for a completion; every question wakes the server.
    fn await_one(&mut self, server: &mut Server, ram: &File, record: &File) -> Result<(u16, u16)> {
        let deadline = Instant::now() + STEP;
        while Instant::now() < deadline {
            if let Some(completion) = self.take(ram, record)? {
                return Ok(completion);
            }
            server.read(register::CSTS)?;
        }
        bail!("no completion in queue {}", self.number)
    }
}

#[test]
fn every_write_survives_and_completes_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.img");
    File::create(&path)?.set_len(IMAGE)?;
    let (ram, record) = (memfd(RAM)?, memfd(RECORD_LEN as u64)?);
    let mut server = Server::start(&path, &record)?;
    let (mut admin_queue, mut queue) = (Pair::new(0, ASQ, ACQ), Pair::new(1, SQ, CQ));
    server.map(&ram)?;
    server.write(register::AQA, &((SIZE - 1) | ((SIZE - 1) << 16)).to_le_bytes())?;
    server.write(register::ASQ, &ASQ.to_le_bytes())?;
    server.write(register::ACQ, &ACQ.to_le_bytes())?;
    server.write(register::CC, &0x0046_0001_u32.to_le_bytes())?;
    ensure!(server.read(register::CSTS)? == 1, "it gets ready");
    let size = (SIZE - 1) << 16 | 1;
    let create = [(admin::CREATE_CQ, CQ, 1 << 16 | 3), (admin::CREATE_SQ, SQ, 1 << 16 | 1)];
    for (id, (opcode, base, more)) in (1..).zip(create) {
        admin_queue.submit(&ram, &record, opcode, id, &[(6, base as u32), (10, size), (11, more)])?;
        ensure!(admin_queue.await_one(&mut server, &ram, &record)? == (id, 0));
    }
    let (mut id, mut seen, mut expected) = (0_u16, BTreeMap::new(), BTreeMap::new());
    for round in 0..30_u64 {
        // Twelve writes, the later ones rung when the process is dead.
        for turn in 0..12 {
            id += 1;
            let (slot, block) = (u64::from(id % SIZE as u16), u64::from(id) * 7 % 2048);
            let page = [id as u8 ^ round as u8; 512];
            ram.write_all_at(&page, DATA + slot * 512)?;
            let at = (DATA + slot * 512) as u32;
            queue.submit(&ram, &record, nvm::WRITE, id, &[(6, at), (10, block as u32), (12, 0)])?;
            expected.insert(block, page);
            if turn == 5 {
                server.read(register::CSTS)?;
                std::thread::sleep(Duration::from_micros(round * 37 % 700));
                server.kill()?;
                server = Server::start(&path, &record)?;
            }
        }
        ensure!(server.read(register::CSTS)? == 1, "registers are as they were");
        server.map(&ram)?;
        for _ in 0..12 {
            let (done, status) = queue.await_one(&mut server, &ram, &record)?;
            ensure!(status == 0, "command {done}: {status:#x}");
            *seen.entry(done).or_insert(0) += 1;
        }
        ensure!(queue.take(&ram, &record)?.is_none(), "nothing completes twice");
    }
    let each_once: BTreeMap<u16, u32> = (1..=id).map(|id| (id, 1)).collect();
    ensure!(seen == each_once, "{seen:?}");
    // Held still: memory is taken away, and nothing is fetched until it is back.
    server.ask(&Request::DmaUnmap(DmaUnmap::One { address: 0, len: RAM }), &[])?;
    queue.submit(&ram, &record, nvm::FLUSH, 9999, &[])?;
    server.read(register::CSTS)?;
    ensure!(queue.take(&ram, &record)?.is_none(), "a device without memory rests");
    server.map(&ram)?;
    ensure!(queue.await_one(&mut server, &ram, &record)? == (9999, 0));
    server.kill()?;
    let image = std::fs::read(&path)?;
    for (block, page) in expected {
        let at = usize::try_from(block * 512)?;
        ensure!(image.get(at..at + 512).context("within the image")? == page, "block {block}");
    }
    Ok(())
}
