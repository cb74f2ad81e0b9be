//! The guest's side of a network card: receive buffers, frames both ways, commands.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::guest::Guest;
use super::queue::{QUEUE_BYTES, Queue};
use super::{Driver, LOG_ALL, Options};

/// Bytes of the header before each frame.
pub const HEADER_BYTES: usize = 12;
/// How long anything may take in a test.
pub const FRAME_TIME_MAX: Duration = Duration::from_secs(20);
/// Room for the header and the longest frame.
const SEND_BYTES: u64 = 66 << 10;

/// What a guest's card is like.
#[derive(Debug, Clone)]
pub struct NetOptions {
    /// Queue pairs that it uses.
    pub pairs: u16,
    /// Queue pairs that the device has, which says where the control queue is.
    pub pairs_max: u16,
    /// Entries of each queue.
    pub size: u16,
    /// Bytes of each receive buffer.
    pub buffer_bytes: u32,
    /// Feature bits to leave out of what is offered.
    pub without: u64,
    /// Ask for an in-flight region.
    pub inflight: bool,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self { pairs: 1, pairs_max: 1, size: 128, buffer_bytes: 1536, without: LOG_ALL, inflight: true }
    }
}

impl NetOptions {
    /// Where buffers to send and to receive begin.
    fn places(&self) -> (u64, u64) {
        let send_at = QUEUE_BYTES * u64::from(2 * self.pairs_max + 1);
        let per_pair = SEND_BYTES * u64::from(self.size);
        (send_at, send_at + per_pair * u64::from(self.pairs_max))
    }

    /// What such a guest is made of.
    pub fn driver(&self) -> Options {
        let queues = 2 * self.pairs_max + 1;
        let (_, receive_at) = self.places();
        let receive_bytes = u64::from(self.buffer_bytes) * u64::from(self.size) * u64::from(self.pairs_max);
        let memory = (receive_at + receive_bytes).next_multiple_of(2 << 20) as usize;
        let (size, without, inflight) = (self.size, self.without, self.inflight);
        Options { queues, size, memory, without, inflight, iommu: false }
    }
}

/// A frame that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Its header.
    pub header: [u8; HEADER_BYTES],
    /// The frame.
    pub frame: Vec<u8>,
    /// Buffers that it took.
    pub buffers: u16,
}

/// A guest with a network card.
pub struct NetGuest {
    /// The front end.
    pub driver: Driver,
    options: NetOptions,
    send_at: u64,
    receive_at: u64,
}

impl NetGuest {
    /// A guest that no device serves yet.
    pub fn new(options: NetOptions) -> Result<Self> {
        Ok(Self::over(Driver::new(options.driver())?, options))
    }

    /// A guest on rings whose front end is somebody else's, made with [`NetOptions::driver`].
    pub fn over(driver: Driver, options: NetOptions) -> Self {
        let (send_at, receive_at) = options.places();
        Self { driver, options, send_at, receive_at }
    }

    /// A guest on a new connection, with all receive buffers available.
    pub fn connected(options: NetOptions, stream: UnixStream) -> Result<Self> {
        let mut guest = Self::new(options)?;
        guest.driver.connect(stream)?;
        guest.fill_all()?;
        Ok(guest)
    }

    /// Makes all free receive buffers available, on all pairs in use.
    pub fn fill_all(&mut self) -> Result<()> {
        (0..self.options.pairs).try_for_each(|pair| self.fill(pair).map(drop))
    }

    /// Makes all free receive buffers of a pair available; how many.
    pub fn fill(&mut self, pair: u16) -> Result<u32> {
        let (bytes, at) = (self.options.buffer_bytes, self.buffers_at(pair));
        let (queue, guest) = self.driver.queue(usize::from(2 * pair))?;
        let mut count = 0;
        while let Some(head) = queue.next_head() {
            queue.add(guest, &[], &[(at + u64::from(head) * u64::from(bytes), bytes)]).context("a free descriptor")?;
            count += 1;
        }
        queue.publish(guest)?;
        Ok(count)
    }

    fn buffers_at(&self, pair: u16) -> u64 {
        self.receive_at + u64::from(pair) * u64::from(self.options.buffer_bytes) * u64::from(self.options.size)
    }

    /// Makes a frame available; false when the queue is full. The device sees it after [`NetGuest::publish`].
    pub fn add(&mut self, pair: u16, header: &[u8; HEADER_BYTES], frame: &[u8]) -> Result<bool> {
        let at = self.send_at + u64::from(pair) * SEND_BYTES * u64::from(self.options.size);
        let (queue, guest) = self.driver.queue(usize::from(2 * pair + 1))?;
        while queue.take(guest).is_some() {}
        let Some(head) = queue.next_head() else { return Ok(false) };
        let at = at + u64::from(head) * SEND_BYTES;
        ensure!(frame.len() + HEADER_BYTES <= SEND_BYTES as usize, "the frame is too long for this guest");
        guest.write(at, header);
        guest.write(at + HEADER_BYTES as u64, frame);
        Ok(queue.add(guest, &[(at, (HEADER_BYTES + frame.len()) as u32)], &[]).is_some())
    }

    /// Lets the device see what was added.
    pub fn publish(&mut self, pair: u16) -> Result<()> {
        let (queue, guest) = self.driver.queue(usize::from(2 * pair + 1))?;
        queue.publish(guest)
    }

    /// Sends one frame and waits until the device has taken it.
    pub fn send_with(&mut self, pair: u16, header: &[u8; HEADER_BYTES], frame: &[u8]) -> Result<()> {
        ensure!(self.add(pair, header, frame)?, "the transmit queue is full");
        self.publish(pair)?;
        self.sent(pair)
    }

    /// Waits until the device has taken every frame.
    pub fn sent(&mut self, pair: u16) -> Result<()> {
        let (queue, guest) = self.driver.queue(usize::from(2 * pair + 1))?;
        while queue.outstanding() > 0 {
            queue.take_within(guest, FRAME_TIME_MAX)?;
        }
        Ok(())
    }

    /// Sends one frame on the first pair that asks for nothing.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.send_with(0, &[0; HEADER_BYTES], frame)
    }

    /// A frame that has come in; its buffers are made available again.
    pub fn poll(&mut self, pair: u16) -> Result<Option<Received>> {
        let (bytes, at) = (self.options.buffer_bytes, self.buffers_at(pair));
        let (queue, guest) = self.driver.queue(usize::from(2 * pair))?;
        let Some((head, len)) = queue.take(guest) else { return Ok(None) };
        let mut data = part(guest, at, head, bytes, len)?;
        ensure!(data.len() >= HEADER_BYTES, "a buffer came back with {len} bytes");
        let frame = data.split_off(HEADER_BYTES);
        let header: [u8; HEADER_BYTES] = data.try_into().ok().context("a header")?;
        let buffers = u16::from_le_bytes([header[10], header[11]]);
        let mut received = Received { header, frame, buffers };
        for _ in 1..buffers {
            // They must all be there already.
            let (head, len) = queue.take(guest).context("a frame's buffers are not there together")?;
            received.frame.extend(part(guest, at, head, bytes, len)?);
        }
        self.fill(pair)?;
        Ok(Some(received))
    }

    /// Waits for a frame on the first pair.
    pub fn receive(&mut self) -> Result<Received> {
        self.receive_on(0)
    }

    /// Waits for a frame.
    pub fn receive_on(&mut self, pair: u16) -> Result<Received> {
        let deadline = Instant::now() + FRAME_TIME_MAX;
        loop {
            if let Some(received) = self.poll(pair)? {
                return Ok(received);
            }
            if Instant::now() > deadline {
                bail!("no frame in time");
            }
            let (queue, guest) = self.driver.queue(usize::from(2 * pair))?;
            queue.wait(guest, Duration::from_millis(100))?;
        }
    }

    /// Index of the control queue.
    pub fn control(&self) -> u16 {
        2 * self.options.pairs_max
    }

    /// Sends a command; the answer: 0 when it was done.
    pub fn command(&mut self, control: u16, command: &[u8]) -> Result<u8> {
        let (queue, guest) = self.driver.queue(usize::from(control))?;
        let at = queue.small;
        ensure!(command.len() < 0x1000, "the command is too long for this guest");
        guest.write(at, command);
        guest.store(at + 0x1000, 0xff_u8);
        queue.add(guest, &[(at, command.len() as u32)], &[(at + 0x1000, 1)]).context("a free descriptor")?;
        queue.publish(guest)?;
        queue.take_within(guest, FRAME_TIME_MAX)?;
        Ok(guest.load(at + 0x1000))
    }

    /// The queues and memory, for what has no method here.
    pub fn queue(&mut self, index: u16) -> Result<(&mut Queue, &Guest)> {
        self.driver.queue(usize::from(index))
    }
}

fn part(guest: &Guest, at: u64, head: u16, bytes: u32, len: u32) -> Result<Vec<u8>> {
    ensure!(len <= bytes, "a buffer of {bytes} bytes came back with {len}");
    let mut data = vec![0; len as usize];
    guest.read(at + u64::from(head) * u64::from(bytes), &mut data);
    Ok(data)
}
