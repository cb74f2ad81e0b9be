//! The driver of an NVMe controller without a guest in between: it brings the controller up by its registers, through the
//! function that the VMM shows a guest, makes queues, and puts a disk's requests into them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_devices::Answer;
use atoll_kit::driver::disk::Kind as Request;
use atoll_kit::driver::queue::{QUEUE_BYTES, Woken};
use atoll_kit::driver::{Guest, Options};
use atoll_vmm::vfio_user::Bare;

use super::queue_pair::{Completed, QueuePair};
use super::rig::answered;
use crate::verify::disk_queues::{DiskQueues, Range};

/// Registers (NVM Express 1.4, 3.1).
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
/// CC: entries of 64 and of 16 bytes, enabled.
const ENABLE: u32 = 4 << 20 | 6 << 16 | 1;
/// CSTS.RDY and CSTS.CFS.
const READY: u32 = 1;
const FATAL: u32 = 2;
/// Admin commands.
const CREATE_SQ: u32 = 0x01;
const CREATE_CQ: u32 = 0x05;
const IDENTIFY: u32 = 0x06;
const SET_FEATURES: u32 = 0x09;
/// Commands of the NVM command set.
const FLUSH: u32 = 0x00;
const WRITE: u32 = 0x01;
const READ: u32 = 0x02;
const WRITE_ZEROES: u32 = 0x08;
const DATASET: u32 = 0x09;
/// Force unit access; the range may lose its room; a dataset's ranges are not needed.
const FUA: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;
const NOT_NEEDED: u32 = 1 << 2;
/// Entries of the admin queues.
const ADMIN_SIZE: u16 = 32;
/// How long the controller may take to change its state, and an admin command.
const STEP_MAX: Duration = Duration::from_secs(30);

fn read(bare: &Bare, offset: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    let function = bare.function();
    let answer = function.lock().map_err(|_| anyhow::anyhow!("the function"))?.bar_read(0, offset, &mut bytes);
    Ok(answered(answer)?.map_or(u32::from_le_bytes(bytes), |value| value as u32))
}

fn begin_write(bare: &Bare, offset: u64, data: &[u8]) -> Result<Answer> {
    let function = bare.function();
    Ok(function.lock().map_err(|_| anyhow::anyhow!("the function"))?.bar_write(0, offset, data))
}

fn write(bare: &Bare, offset: u64, data: &[u8]) -> Result<()> {
    answered(begin_write(bare, offset, data)?).map(drop)
}

fn await_state(bare: &Bare, wanted: u32) -> Result<()> {
    let deadline = Instant::now() + STEP_MAX;
    loop {
        let status = read(bare, CSTS)?;
        ensure!(wanted == 0 || status & FATAL == 0, "the controller has given up: CSTS {status:#x}");
        if status & READY == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "CSTS stays {status:#x}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The driver begins to reset the controller; the answer says when the register is written.
pub(super) fn begin_reset(bare: &Bare) -> Result<Answer> {
    begin_write(bare, CC, &0_u32.to_le_bytes())
}

/// I/O queues of a controller.
pub struct NvmeQueues {
    guest: Guest,
    pairs: Vec<QueuePair>,
}

/// Resets the controller and makes I/O queues, the admin queues behind everything else in guest memory.
pub(super) fn start(bare: &Bare, guest: Guest, options: &Options) -> Result<NvmeQueues> {
    write(bare, CC, &0_u32.to_le_bytes())?;
    await_state(bare, 0)?;
    let admin_at = (guest.bytes() as u64).checked_sub(QUEUE_BYTES).context("memory for the admin queues")?;
    ensure!(options.memory as u64 <= admin_at, "{} bytes of memory are too few", guest.bytes());
    let zeroes = vec![0; QUEUE_BYTES as usize];
    let places = (0..u64::from(options.queues)).map(|index| index * QUEUE_BYTES).chain([admin_at]);
    places.for_each(|at| guest.write(at, &zeroes));
    let pair = |number: u16, size: u16, at: u64| -> Result<QueuePair> {
        QueuePair::new(number, size, at, bare.function(), bare.vectors().eventfd(number)?)
    };
    let mut admin = pair(0, ADMIN_SIZE, admin_at)?;
    let sizes = u32::from(ADMIN_SIZE - 1);
    write(bare, AQA, &(sizes << 16 | sizes).to_le_bytes())?;
    write(bare, ASQ, &admin.submissions().to_le_bytes())?;
    write(bare, ACQ, &admin.completions().to_le_bytes())?;
    write(bare, CC, &ENABLE.to_le_bytes())?;
    await_state(bare, READY)?;
    let mut ask = |opcode: u32, words: [u32; 2], data: u64, len: u64| ask(&mut admin, &guest, opcode, words, data, len);
    // The controller says what it is, into a page behind the admin queues, which are short.
    let page = admin_at + QUEUE_BYTES - 4096;
    ask(IDENTIFY, [1, 0], page, 4096)?;
    let number = u32::from(options.queues - 1);
    let granted = ask(SET_FEATURES, [7, number << 16 | number], 0, 0)?.result;
    ensure!(granted & 0xffff >= number && granted >> 16 >= number, "{granted:#x} queues");
    let mut pairs = Vec::new();
    for index in 0..options.queues {
        let (number, at) = (index + 1, u64::from(index) * QUEUE_BYTES);
        let pair = pair(number, options.size, at)?;
        let (id, vector) = (u32::from(number), u32::from(number));
        let size = u32::from(options.size - 1) << 16;
        // Contiguous, with interrupts; and one of each kind.
        ask(CREATE_CQ, [size | id, vector << 16 | 3], pair.completions(), 1)?;
        ask(CREATE_SQ, [size | id, id << 16 | 1], pair.submissions(), 1)?;
        pairs.push(pair);
    }
    Ok(NvmeQueues { guest, pairs })
}

/// An admin command from beginning to end.
fn ask(admin: &mut QueuePair, guest: &Guest, opcode: u32, words: [u32; 2], data: u64, len: u64) -> Result<Completed> {
    let mut command = [0; 16];
    (command[0], command[10], command[11]) = (opcode, words[0], words[1]);
    let id = admin.add(guest, command, data, len).context("room in the admin queue")?;
    admin.ring()?;
    let deadline = Instant::now() + STEP_MAX;
    loop {
        if let Some(done) = admin.take(guest)? {
            admin.ring()?;
            ensure!(done.id == id && done.status == 0, "admin command {opcode:#x}: {done:?}");
            return Ok(done);
        }
        if Instant::now() > deadline {
            bail!("admin command {opcode:#x} is not answered");
        }
        admin.wait(guest, Duration::from_millis(20))?;
    }
}

impl NvmeQueues {
    fn pair(&mut self, index: usize) -> Result<(&mut QueuePair, &Guest)> {
        Ok((self.pairs.get_mut(index).context("no such queue")?, &self.guest))
    }
}

impl DiskQueues for NvmeQueues {
    fn guest(&self) -> &Guest {
        &self.guest
    }
    fn add(&mut self, index: usize, request: Request, range: Range, parts: &[(u64, u32)]) -> Result<Option<u16>> {
        let data = parts.first().map_or(0, |(at, _)| *at);
        let len = parts.iter().map(|(_, len)| u64::from(*len)).sum();
        let Range { sector, sectors } = range;
        let mut words = [0; 16];
        words[1] = 1;
        (words[10], words[11]) = (sector as u32, (sector >> 32) as u32);
        words[12] = sectors.saturating_sub(1);
        let (pair, guest) = self.pair(index)?;
        let (opcode, len) = match request {
            Request::In => (READ, len),
            Request::Out => {
                // Every other one that begins at a page's end is to be durable at once.
                words[12] |= if sector % 16 == 0 { FUA } else { 0 };
                (WRITE, len)
            }
            Request::Flush => ((FLUSH), 0),
            Request::WriteZeroes => {
                words[12] |= if sector % 2 == 0 { DEALLOCATE } else { 0 };
                (WRITE_ZEROES, 0)
            }
            Request::Discard => {
                // One range: attributes, blocks, the first of them.
                guest.store(data, 0_u32);
                guest.store(data + 4, sectors.to_le());
                guest.store(data + 8, sector.to_le());
                (words[10], words[11], words[12]) = (0, NOT_NEEDED, 0);
                (DATASET, len)
            }
            Request::GetId => bail!("an NVMe disk has no such request"),
        };
        words[0] = opcode;
        if opcode == FLUSH {
            (words[10], words[11], words[12]) = (0, 0, 0);
        }
        Ok(pair.add(guest, words, data, len))
    }
    fn publish(&mut self, index: usize) -> Result<()> {
        self.pair(index)?.0.ring()
    }
    fn take(&mut self, index: usize) -> Result<Option<(u16, Option<u8>)>> {
        let (pair, guest) = self.pair(index)?;
        let done = pair.take(guest)?;
        // Code and type, as far as a byte has room for them; what failed is never 0.
        let status = |done: Completed| if done.status == 0 { 0 } else { (done.status as u8).clamp(1, 0xfe) };
        Ok(done.map(|done| (done.id, Some(status(done)))))
    }
    fn wait(&mut self, index: usize, tick: Duration) -> Result<Woken> {
        let (pair, guest) = self.pair(index)?;
        pair.wait(guest, tick)
    }
    fn counts(&mut self, index: usize) -> Result<(u16, u16)> {
        let (pair, guest) = self.pair(index)?;
        Ok(pair.counts(guest))
    }
}
