//! A guest's driver with hand-made rings, and a screen that keeps what it is told.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_kit::driver::process::Process;
use atoll_kit::driver::{Driver, Options, display};
use atoll_protocol::display::{
    Channel, CursorPosition, DisplayInfo, Features, REQUEST_MAX, Rect, Reply, Request, Screen as Wanted, pixel_bytes,
};

pub(crate) mod scene;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_atoll-gpu");
/// Guest addresses: commands, answers, pictures.
pub(crate) const SAID: u64 = 2 << 20;
const HEARD: u64 = 3 << 20;
pub(crate) const PICTURES: u64 = 4 << 20;

pub(crate) const OK: u32 = 0x1100;
pub(crate) const UNSPECIFIED: u32 = 0x1200;
pub(crate) const OUT_OF_MEMORY: u32 = 0x1201;
pub(crate) const NO_SCANOUT: u32 = 0x1202;
pub(crate) const NO_RESOURCE: u32 = 0x1203;
pub(crate) const NO_CONTEXT: u32 = 0x1204;
pub(crate) const PARAMETER: u32 = 0x1205;

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A guest.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    /// Whose commands these are.
    pub(crate) context: u32,
    fence: u64,
}

pub(crate) fn options() -> Options {
    Options { queues: 2, size: 64, memory: 64 << 20, ..Options::default() }
}

/// Starts the program.
pub(crate) fn listen(folder: &Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Process> {
    Process::listen(PROGRAM, folder, args, fds)
}

impl Guest {
    pub(crate) fn new() -> Result<Self> {
        Self::with(options())
    }

    pub(crate) fn with(options: Options) -> Result<Self> {
        Ok(Self { driver: Driver::new(options)?, context: 0, fence: 0 })
    }

    pub(crate) fn connected(process: &mut Process) -> Result<Self> {
        let mut guest = Self::new()?;
        guest.driver.connect(process.connect()?)?;
        Ok(guest)
    }

    /// Makes a command available, with what follows its header behind it.
    pub(crate) fn add(&mut self, kind: u32, body: &[u8]) -> Result<()> {
        self.fence += 1;
        let (queue, guest) = self.driver.queue(0)?;
        let slot = self.fence % 16;
        let (said, heard) = (SAID + slot * 0x1_0000, HEARD + slot * 0x1000);
        let mut bytes = words(&[kind, 1, self.fence as u32, 0, self.context, 0]);
        bytes.extend(body);
        ensure!(bytes.len() <= 0x1_0000, "a long command");
        guest.write(said, &bytes);
        guest.write(heard, &[0xee; 2048]);
        // The header and the rest lie apart, as Linux has them.
        let parts = [(said, 24), (said + 24, bytes.len() as u32 - 24)];
        let parts = if body.is_empty() { &parts[..1] } else { &parts[..] };
        queue.add(guest, parts, &[(heard, 2048)]).context("a full queue")?;
        queue.publish(guest)
    }

    /// Waits for the answer to the oldest command of `pending`: its first word and what follows the header.
    pub(crate) fn hear(&mut self, pending: u64) -> Result<(u32, Vec<u8>)> {
        let fence = self.fence + 1 - pending;
        let (queue, guest) = self.driver.queue(0)?;
        let (_, len) = queue.take_within(guest, PATIENCE)?;
        let mut bytes = vec![0; len as usize];
        guest.read(HEARD + fence % 16 * 0x1000, &mut bytes);
        ensure!(bytes.len() >= 24, "{} bytes", bytes.len());
        ensure!(bytes[4..16] == words(&[1, fence as u32, 0]), "fence {fence}: {:?}", &bytes[..24]);
        Ok((u32::from_le_bytes(bytes[..4].try_into()?), bytes[24..].to_vec()))
    }

    /// Asks and is answered.
    pub(crate) fn ask(&mut self, kind: u32, body: &[u8]) -> Result<(u32, Vec<u8>)> {
        self.add(kind, body)?;
        self.hear(1)
    }

    pub(crate) fn status(&mut self, kind: u32, body: &[u32]) -> Result<u32> {
        Ok(self.ask(kind, &words(body))?.0)
    }

    pub(crate) fn done(&mut self, kind: u32, body: &[u32]) -> Result<()> {
        let status = self.status(kind, body)?;
        ensure!(status == OK, "command {kind:#x} {body:?}: {status:#x}");
        Ok(())
    }

    pub(crate) fn create(&mut self, id: u32, format: u32, width: u32, height: u32) -> Result<()> {
        self.done(0x101, &[id, format, width, height])
    }

    /// Attaches these ranges.
    pub(crate) fn attach_body(id: u32, entries: &[(u64, u32)]) -> Vec<u8> {
        let mut body = words(&[id, entries.len() as u32]);
        for (addr, len) in entries {
            body.extend(words(&[*addr as u32, (*addr >> 32) as u32, *len, 0]));
        }
        body
    }

    pub(crate) fn attach(&mut self, id: u32, entries: &[(u64, u32)]) -> Result<u32> {
        Ok(self.ask(0x106, &Self::attach_body(id, entries))?.0)
    }

    pub(crate) fn transfer(&mut self, id: u32, rect: Rect, offset: u64) -> Result<u32> {
        let Rect { x, y, width, height } = rect;
        self.status(0x105, &[x, y, width, height, offset as u32, (offset >> 32) as u32, id, 0])
    }

    pub(crate) fn set_scanout(&mut self, scanout: u32, id: u32, rect: Rect) -> Result<u32> {
        self.status(0x103, &[rect.x, rect.y, rect.width, rect.height, scanout, id])
    }

    pub(crate) fn flush(&mut self, id: u32, rect: Rect) -> Result<u32> {
        self.status(0x104, &[rect.x, rect.y, rect.width, rect.height, id, 0])
    }

    /// A picture that is shown: made, with memory in pieces, filled, transferred, flushed. Its pixels.
    pub(crate) fn show(&mut self, scanout: u32, id: u32, width: u32, height: u32) -> Result<Vec<u8>> {
        let rect = Rect { x: 0, y: 0, width, height };
        let pixels = picture(width, height, id);
        let entries = self.lay(id, &pixels)?;
        self.create(id, 2, width, height)?;
        ensure!(self.attach(id, &entries)? == OK);
        ensure!(self.transfer(id, rect, 0)? == OK);
        ensure!(self.set_scanout(scanout, id, rect)? == OK);
        ensure!(self.flush(id, rect)? == OK);
        Ok(pixels)
    }

    /// Writes pixels into guest memory, in pieces that do not follow each other; where they are.
    pub(crate) fn lay(&mut self, id: u32, pixels: &[u8]) -> Result<Vec<(u64, u32)>> {
        let (_, guest) = self.driver.queue(0)?;
        let base = PICTURES + u64::from(id % 8) * (6 << 20);
        let mut entries = Vec::new();
        for (index, piece) in (0_u64..).zip(pixels.chunks(40_000)) {
            // Every second one lies behind its successor.
            let addr = base + (index ^ 1) * 40_960;
            guest.write(addr, piece);
            entries.push((addr, piece.len() as u32));
        }
        Ok(entries)
    }

    pub(crate) fn cursor(&mut self, kind: u32, body: &[u32]) -> Result<()> {
        let (queue, guest) = self.driver.queue(1)?;
        let bytes = words(&[&[kind, 0, 0, 0, 0, 0], body].concat());
        guest.write(SAID - 0x1000, &bytes);
        queue.add(guest, &[(SAID - 0x1000, bytes.len() as u32)], &[]).context("a full queue")?;
        queue.publish(guest)?;
        queue.take_within(guest, PATIENCE)?;
        Ok(())
    }

    /// Hands the device a screen.
    pub(crate) fn screen(&mut self, features: Features, modes: &[(u32, u32)]) -> Result<Screen> {
        let (ours, theirs) = UnixStream::pair()?;
        ensure!(display::hand_over(self.driver.talk()?, theirs.as_fd())?, "the device takes no screen");
        drop(theirs);
        let mut screen = Screen::new(ours, features, modes);
        screen.until(|screen| screen.asked > 0)?;
        Ok(screen)
    }
}

/// Some pixels that are like no others.
pub(crate) fn picture(width: u32, height: u32, seed: u32) -> Vec<u8> {
    (0..width * height).flat_map(|at| at.wrapping_mul(2_654_435_761).wrapping_add(seed << 20).to_le_bytes()).collect()
}

/// A screen, and what it was told.
pub(crate) struct Screen {
    pub(crate) channel: Channel,
    features: Features,
    pub(crate) wanted: DisplayInfo,
    /// How often it was asked what it wants.
    pub(crate) asked: u32,
    /// What each scanout shows: columns, rows, pixels.
    pub(crate) shown: BTreeMap<u32, (u32, u32, Vec<u8>)>,
    pub(crate) updates: u32,
    /// Memory for frames, how many came in it, and whether it is said that they are taken.
    pub(crate) frames: Option<File>,
    pub(crate) framed: u32,
    pub(crate) takes: bool,
    pub(crate) cursor: Option<(CursorPosition, bool)>,
    pub(crate) cursor_picture: Vec<u8>,
    pub(crate) hot: (u32, u32),
}

impl Screen {
    fn new(stream: UnixStream, features: Features, modes: &[(u32, u32)]) -> Self {
        let mut wanted = DisplayInfo::default();
        for (screen, (width, height)) in wanted.screens.iter_mut().zip(modes) {
            *screen = Wanted { rect: Rect { x: 0, y: 0, width: *width, height: *height }, enabled: true, flags: 0 };
        }
        Self {
            channel: Channel::with_descriptors(stream, REQUEST_MAX),
            features,
            wanted,
            asked: 0,
            shown: BTreeMap::new(),
            updates: 0,
            frames: None,
            framed: 0,
            takes: true,
            cursor: None,
            cursor_picture: Vec::new(),
            hot: (0, 0),
        }
    }

    /// Hears until something is so.
    pub(crate) fn until(&mut self, is_so: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "it is not so in time");
            let mut message = self.channel.receive(left)?;
            ensure!(!message.header.reply, "an answer of a device");
            if let Some(memory) = message.descriptors.pop() {
                self.frames = Some(memory.into());
            }
            self.hear(Request::decode(message.header.code, &message.payload)?)?;
        }
        Ok(())
    }

    /// Waits until this picture is shown.
    pub(crate) fn shows(&mut self, scanout: u32, width: u32, height: u32, pixels: &[u8]) -> Result<()> {
        let is_shown =
            |screen: &Self| screen.shown.get(&scanout).is_some_and(|s| (s.0, s.1) == (width, height) && s.2 == pixels);
        let shown = self.until(is_shown);
        shown.with_context(|| match self.shown.get(&scanout) {
            Some((has_width, has_height, has)) => {
                let wrong = has.iter().zip(pixels).position(|(a, b)| a != b).unwrap_or(0) / 4 * 4;
                let [has, wanted] = [has.as_slice(), pixels].map(|all| all.get(wrong..wrong + 4));
                format!("{has_width} by {has_height} are shown; pixel {} is {has:?} and not {wanted:?}", wrong / 4)
            }
            None => "nothing is shown".into(),
        })
    }

    pub(crate) fn say(&mut self, reply: &Reply) -> Result<()> {
        let mut bytes = Vec::new();
        reply.put(&mut bytes);
        Ok(self.channel.send(&bytes, PATIENCE)?)
    }

    fn draw(&mut self, scanout: u32, rect: Rect, pixels: &[u8]) -> Result<()> {
        self.updates += 1;
        let (width, height, shown) = self.shown.get_mut(&scanout).context("an update before its scanout")?;
        ensure!(rect.x + rect.width <= *width && rect.y + rect.height <= *height, "{rect:?}");
        for (row, pixels) in (rect.y..).zip(pixels.chunks(rect.width as usize * 4)) {
            let at = (row * *width + rect.x) as usize * 4;
            shown[at..at + pixels.len()].copy_from_slice(pixels);
        }
        Ok(())
    }

    fn hear(&mut self, request: Request<'_>) -> Result<()> {
        match request {
            Request::GetFeatures => self.say(&Reply::Features(self.features))?,
            Request::SetFeatures(features) => {
                ensure!(features == self.features.and(Features::CHANGES | Features::FRAMES));
            }
            Request::GetDisplayInfo => {
                self.say(&Reply::DisplayInfo(Box::new(self.wanted)))?;
                self.asked += 1;
            }
            Request::GetEdid { .. } => bail!("nobody asks for an EDID"),
            Request::CursorPosition(position) => self.cursor = Some((position, true)),
            Request::CursorHide(position) => self.cursor = Some((position, false)),
            Request::CursorUpdate { position, hot_x, hot_y, picture } => {
                (self.cursor, self.hot) = (Some((position, true)), (hot_x, hot_y));
                self.cursor_picture = picture.to_vec();
            }
            Request::Scanout { scanout, width: 0, .. } => {
                ensure!(self.shown.remove(&scanout).is_some(), "it was never there");
            }
            Request::Scanout { scanout, width, height } => {
                self.shown.insert(scanout, (width, height, vec![0; width as usize * height as usize * 4]));
            }
            Request::Update { scanout, rect, pixels } => self.draw(scanout, rect, pixels)?,
            Request::FrameMemory { len } => {
                let memory = self.frames.as_ref().context("memory without memory")?;
                ensure!(memory.metadata()?.len() == len);
            }
            Request::Frame { scanout, rect } => {
                ensure!(self.takes || self.framed == 0, "a frame before the one before it was taken");
                let mut pixels = vec![0; pixel_bytes(rect)];
                self.frames.as_ref().context("a frame before its memory")?.read_exact_at(&mut pixels, 0)?;
                self.framed += 1;
                self.draw(scanout, rect, &pixels)?;
                if self.takes {
                    self.say(&Reply::Taken)?;
                }
            }
        }
        Ok(())
    }
}
