//! The conversation with the device's process, which says what is to be seen (QEMU's vhost-user-gpu wire, and what is ours in it).
//!
//! Pixels that come by memory are read from it as from a file: nothing of the device's is mapped here.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use atoll_gpu::edid::edid;
use atoll_protocol::display::{
    Channel, ChannelError, Features, REQUEST_MAX, Rect, Reply, Request, WireError, pixel_bytes,
};
use rustix::fs::{SealFlags, fcntl_get_seals};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::ready;
use crate::stage::Stage;

/// How long an answer may take to be taken: it fits into any socket that is read.
const ANSWER_MAX: Duration = Duration::from_millis(200);
/// Messages of one turn.
const TURN_MAX: usize = 8;
const OFFERED: u64 = Features::EDID.0 | Features::CHANGES.0 | Features::FRAMES.0;

/// Why a conversation ends.
#[derive(Debug, Error)]
enum End {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it agrees to features {0:#x}, which were not offered")]
    Features(u64),
    #[error("it cannot be waited for: {0}")]
    Wait(#[from] io::Error),
    #[error("it speaks of frames in memory, to which it has not agreed")]
    Unagreed,
    #[error("its memory for frames is no memfd that stays as long as it is: one is to come beside the message, sealed")]
    Memory,
    #[error("a frame cannot be read from its memory: {0}")]
    Frame(#[source] io::Error),
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Channel(error.into())
    }
}

/// Hears one device's process after the other; each socket that comes takes the place of the one before.
pub async fn attend(stage: Arc<Stage>, mut sockets: mpsc::Receiver<OwnedFd>) {
    let mut next = sockets.recv().await;
    while let Some(socket) = next.take() {
        tokio::select! {
            end = converse(&stage, socket) => {
                match end {
                    Err(End::Channel(error)) if error.is_hang_up() => {
                        tracing::info!("the device's process is gone; its last picture stays");
                    }
                    Err(end) => tracing::warn!(%end, "the device's process is given up; its last picture stays"),
                    Ok(()) => {}
                }
                lose(&stage);
                next = sockets.recv().await;
            }
            socket = sockets.recv() => next = socket,
        }
        lose(&stage);
    }
}

fn lose(stage: &Stage) {
    let mut heads = stage.lock();
    (heads.connected, heads.follows) = (false, None);
}

async fn converse(stage: &Stage, socket: OwnedFd) -> Result<(), End> {
    let ready = ready::watch(socket.try_clone()?)?;
    let mut talk = Talk { channel: Channel::with_descriptors(socket, REQUEST_MAX), frames: Frames::Not };
    stage.lock().connected = true;
    loop {
        tokio::select! {
            guard = ready.readable() => {
                let mut guard = guard?;
                if !talk.hear(stage)? {
                    guard.clear_ready();
                }
                drop(guard);
                tokio::task::yield_now().await;
            }
            () = stage.wishes.notified() => {
                if stage.lock().follows == Some(true) {
                    say(&mut talk.channel, &Reply::Changed)?;
                }
            }
        }
    }
}

/// How far the memory for frames is.
enum Frames {
    /// Not agreed on.
    Not,
    /// Agreed on, and not there.
    Agreed,
    /// There, and the room into which it is read.
    There(File, Vec<u8>),
}

impl Frames {
    /// What came beside its message: memory that cannot be cut, which no other file can be either.
    fn there(&self, mut beside: Vec<OwnedFd>) -> Result<Self, End> {
        if matches!(self, Self::Not) {
            return Err(End::Unagreed);
        }
        let memory = beside.pop().filter(|_| beside.is_empty()).ok_or(End::Memory)?;
        let is_sealed = fcntl_get_seals(&memory).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if is_sealed { Ok(Self::There(File::from(memory), Vec::new())) } else { Err(End::Memory) }
    }

    /// Shows the pixels of a rectangle.
    fn show(&mut self, stage: &Stage, scanout: u32, rect: Rect) -> Result<(), End> {
        let Self::There(memory, room) = self else { return Err(End::Unagreed) };
        room.resize(pixel_bytes(rect), 0);
        memory.read_exact_at(room, 0).map_err(End::Frame)?;
        stage.lock().update(scanout, rect, room, 0);
        Ok(())
    }
}

/// A conversation.
struct Talk {
    channel: Channel,
    frames: Frames,
}

impl Talk {
    /// Hears what there is; whether there may be more.
    fn hear(&mut self, stage: &Stage) -> Result<bool, End> {
        let channel = &mut self.channel;
        for _ in 0..TURN_MAX {
            let Some(mut message) = channel.try_receive()? else { return Ok(false) };
            // It is asked nothing, so that this is no answer, whatever its header says: QEMU's backend leaves the flags to chance.
            let request = Request::decode(message.header.code, &message.payload)?;
            match request {
                Request::GetFeatures => say(channel, &Reply::Features(Features(OFFERED)))?,
                Request::SetFeatures(features) if !Features(OFFERED).contains(features) => {
                    return Err(End::Features(features.0));
                }
                Request::SetFeatures(features) => {
                    stage.lock().follows = Some(features.contains(Features::CHANGES));
                    self.frames = if features.contains(Features::FRAMES) { Frames::Agreed } else { Frames::Not };
                }
                Request::GetDisplayInfo => {
                    let info = {
                        let mut heads = stage.lock();
                        // One that has not said until then never will.
                        heads.follows.get_or_insert(false);
                        heads.info()
                    };
                    say(channel, &Reply::DisplayInfo(Box::new(info)))?;
                }
                Request::GetEdid { scanout } => {
                    let (width, height) = stage.lock().wanted(scanout as usize);
                    say(channel, &Reply::Edid(edid(scanout, width, height).filled()))?;
                }
                Request::Update { scanout, rect, pixels } => {
                    let from = message.payload.len() - pixels.len();
                    stage.lock().update(scanout, rect, &mut message.payload, from);
                    channel.give_back(message.payload);
                }
                Request::FrameMemory { .. } => self.frames = self.frames.there(message.descriptors)?,
                Request::Frame { scanout, rect } => {
                    self.frames.show(stage, scanout, rect)?;
                    say(channel, &Reply::Taken)?;
                }
                request => stage.lock().hear(&request),
            }
        }
        Ok(true)
    }
}

fn say(channel: &mut Channel, reply: &Reply) -> Result<(), End> {
    let mut bytes = Vec::new();
    reply.put(&mut bytes);
    Ok(channel.send(&bytes, ANSWER_MAX)?)
}
