//! The conversation with the device's process, which says what is to be seen (QEMU's vhost-user-gpu wire).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use atoll_gpu::edid::edid;
use atoll_protocol::display::{Channel, ChannelError, Features, REQUEST_MAX, Reply, Request, WireError};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::ready;
use crate::stage::Stage;

/// How long an answer may take to be taken: it fits into any socket that is read.
const ANSWER_MAX: Duration = Duration::from_millis(200);
/// Messages of one turn.
const TURN_MAX: usize = 8;
const OFFERED: u64 = Features::EDID.0 | Features::CHANGES.0;

/// Why a conversation ends.
#[derive(Debug, Error)]
enum End {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it agrees to features {0:#x}, which were not offered")]
    Features(u64),
    #[error("it cannot be waited for: {0}")]
    Wait(#[from] io::Error),
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
    (heads.connected, heads.follows) = (false, false);
}

async fn converse(stage: &Stage, socket: OwnedFd) -> Result<(), End> {
    let ready = ready::watch(socket.try_clone()?)?;
    let mut channel = Channel::new(socket, REQUEST_MAX);
    stage.lock().connected = true;
    loop {
        tokio::select! {
            guard = ready.readable() => {
                let mut guard = guard?;
                if !hear(stage, &mut channel)? {
                    guard.clear_ready();
                }
                drop(guard);
                tokio::task::yield_now().await;
            }
            () = stage.wishes.notified() => {
                if stage.lock().follows {
                    say(&mut channel, &Reply::Changed)?;
                }
            }
        }
    }
}

/// Hears what there is; whether there may be more.
fn hear(stage: &Stage, channel: &mut Channel) -> Result<bool, End> {
    for _ in 0..TURN_MAX {
        let Some(mut message) = channel.try_receive()? else { return Ok(false) };
        // It is asked nothing, so that this is no answer, whatever its header says: QEMU's backend leaves the flags to chance.
        let request = Request::decode(message.header.code, &message.payload)?;
        match request {
            Request::GetFeatures => say(channel, &Reply::Features(Features(OFFERED)))?,
            Request::SetFeatures(features) if !Features(OFFERED).contains(features) => {
                return Err(End::Features(features.0));
            }
            Request::SetFeatures(features) => stage.lock().follows = features.contains(Features::CHANGES),
            Request::GetDisplayInfo => {
                let info = stage.lock().info();
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
            request => stage.lock().hear(&request),
        }
    }
    Ok(true)
}

fn say(channel: &mut Channel, reply: &Reply) -> Result<(), End> {
    let mut bytes = Vec::new();
    reply.put(&mut bytes);
    Ok(channel.send(&bytes, ANSWER_MAX)?)
}
