//! One viewer: what it says is heard, what it has not seen is told, each at its own pace.
//!
//! A viewer that does not read costs a part of a picture and is dropped after a while; one that says too much is heard more
//! slowly; one that says what cannot be right is hung up on.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use atoll_protocol::display::{PIXEL_BYTES, Rect};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::damage;
use crate::keys;
use crate::picture::Picture;
use crate::rfb::format::PixelFormat;
use crate::rfb::hello::{Hello, Security};
use crate::rfb::message::{Decoder, ViewerMessage};
use crate::rfb::update::{self, Coding, Resized};
use crate::rfb::{RfbError, encoding};
use crate::seat::ViewerId;
use crate::stage::{SIDE_MAX, SIDE_MIN, Stage};

/// How long a viewer may take to be let in.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long it may take to read [`READ_MIN`].
const READ_MAX: Duration = Duration::from_secs(10);
/// How long a wrong password takes.
const WRONG: Duration = Duration::from_secs(1);
/// The time between two updates, at least.
const FRAME: Duration = Duration::from_micros(16_667);
/// Messages of a second, at most.
const MESSAGES_MAX: u32 = 2000;
/// Seconds of more than that, one after the other, after which it is hung up on: what it has said by then and is not heard yet would
/// keep the guest busy long after it has gone.
const FLOODS_MAX: u32 = 5;
/// The time between two wishes for another size, at least.
const RESIZE: Duration = Duration::from_millis(200);
/// Bytes that are sent together.
const PIECE: usize = 512 << 10;
/// Bytes of them that are read within [`READ_MAX`].
const READ_MIN: usize = 64 << 10;
/// Bytes of a picture that is held on to while it is told: one of 3840 by 2160 pixels.
const MOMENT_MAX: usize = 3840 * 2160 * PIXEL_BYTES;

/// Why a viewer is gone.
#[derive(Debug, Error)]
pub enum ViewerError {
    /// It has hung up.
    #[error("it has hung up")]
    Gone,
    /// It says what cannot be right.
    #[error(transparent)]
    Rfb(#[from] RfbError),
    /// It is silent where it should speak, or does not read.
    #[error("it did not {what} within {limit:?}")]
    Slow {
        /// What it should have done.
        what: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// It says more than anybody types and points, and goes on.
    #[error("it said more than {MESSAGES_MAX} messages in each of {FLOODS_MAX} seconds")]
    Flood,
    /// Everybody who may look does.
    #[error("all places for viewers are taken: close one of them")]
    Full,
    /// Its socket failed.
    #[error("its connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for ViewerError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted => Self::Gone,
            _ => Self::Io(error),
        }
    }
}

/// What a viewer has asked for.
#[derive(Debug)]
struct Wishes {
    format: PixelFormat,
    encodings: Vec<i32>,
    /// It waits for what is new within.
    requested: Option<Rect>,
    /// It has just said that it knows other sizes, or asked for one.
    size: Option<Resized>,
    /// It has to hear that keys may have numbers.
    offers_keys: bool,
}

impl Wishes {
    fn has(&self, encoding: i32) -> bool {
        self.encodings.contains(&encoding)
    }
}

/// One viewer, between its two halves.
struct Viewer {
    stage: Arc<Stage>,
    head: usize,
    id: ViewerId,
    wake: Arc<Notify>,
    wishes: Mutex<Wishes>,
}

/// Whatever ends the conversation: keys are let go, and nothing is noted any more.
impl Drop for Viewer {
    fn drop(&mut self) {
        self.stage.lock().unwatch(self.id);
        self.stage.seat().leave(self.id);
    }
}

/// Serves a viewer of a head to its end. Once it has shown that it may look, `admit` gives it the place that it has until then.
///
/// # Errors
/// [`ViewerError`], always: it is why it ends.
pub async fn serve<S>(
    stage: Arc<Stage>,
    head: usize,
    security: Security,
    mut stream: S,
    admit: impl FnMut() -> Option<OwnedSemaphorePermit>,
) -> Result<(), ViewerError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let size = words(stage.lock().size(head));
    let slow = |what, limit| move |_| ViewerError::Slow { what, limit };
    let _place = timeout(HELLO_MAX, greet(&mut stream, security, size, head, admit))
        .await
        .map_err(slow("introduce itself", HELLO_MAX))??;
    let wake = Arc::new(Notify::new());
    let id = stage.lock().watch(head, Arc::clone(&wake));
    let wishes =
        Wishes { format: PixelFormat::NATIVE, encodings: Vec::new(), requested: None, size: None, offers_keys: false };
    let viewer = Viewer { stage, head, id, wake, wishes: Mutex::new(wishes) };
    let (reader, writer) = tokio::io::split(stream);
    tokio::select! {
        end = viewer.hear(reader) => end,
        end = viewer.tell(writer, size) => end,
    }
}

/// A size in the words of the protocol.
fn words((width, height): (u32, u32)) -> (u16, u16) {
    (width.min(SIDE_MAX) as u16, height.min(SIDE_MAX) as u16)
}

async fn greet<S>(
    stream: &mut S,
    security: Security,
    size: (u16, u16),
    head: usize,
    mut admit: impl FnMut() -> Option<OwnedSemaphorePermit>,
) -> Result<OwnedSemaphorePermit, ViewerError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut hello, first) = Hello::new(security);
    stream.write_all(&first).await?;
    let name = if head == 0 { "Atoll".to_owned() } else { format!("Atoll, head {head}") };
    let mut said = Vec::new();
    while let Some(count) = hello.wants() {
        said.resize(count, 0);
        stream.read_exact(&mut said).await?;
        let step = hello.hear(&said, size, &name);
        if step.outcome == Err(RfbError::Password) {
            // Who guesses has to wait.
            sleep(WRONG).await;
        }
        // The last word of all is the picture's size: who is told that has a place.
        let is_last = step.outcome.is_ok() && hello.wants().is_none();
        let place = if is_last { Some(admit().ok_or(ViewerError::Full)?) } else { None };
        stream.write_all(&step.answer).await?;
        stream.flush().await?;
        step.outcome?;
        if let Some(place) = place {
            return Ok(place);
        }
    }
    Err(ViewerError::Gone)
}

/// What is told next.
#[derive(Debug, Default)]
struct Plan {
    /// The size, and why it is told.
    size: Option<Resized>,
    offers_keys: bool,
    cursor: bool,
    rects: Vec<Rect>,
    /// What they are told from: one moment's, however long that takes. One that is very large is told from what it is by then, or a
    /// viewer that reads slowly would cost that much.
    moment: Option<Arc<Picture>>,
}

impl Viewer {
    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn hear(&self, mut reader: impl AsyncRead + Unpin) -> Result<(), ViewerError> {
        let mut decoder = Decoder::default();
        let mut bytes = vec![0; 4096];
        let (mut window, mut heard, mut floods) = (Instant::now(), 0, 0);
        // Of the sizes that come too soon the newest counts.
        let (mut size, mut sized) = (None, Instant::now());
        loop {
            let count = tokio::select! {
                count = reader.read(&mut bytes) => count?,
                () = sleep_until(sized), if size.is_some() => {
                    size.take().into_iter().for_each(|message| self.obey(message));
                    sized = Instant::now() + RESIZE;
                    continue;
                }
            };
            if count == 0 {
                return Err(ViewerError::Gone);
            }
            decoder.push(bytes.get(..count).unwrap_or_default());
            while let Some(message) = decoder.take()? {
                if window.elapsed() >= Duration::from_secs(1) {
                    floods = if heard > MESSAGES_MAX { floods } else { 0 };
                    (window, heard) = (Instant::now(), 0);
                }
                heard += 1;
                if heard > MESSAGES_MAX {
                    floods += 1;
                    if floods >= FLOODS_MAX {
                        return Err(ViewerError::Flood);
                    }
                    sleep_until(window + Duration::from_secs(1)).await;
                }
                if matches!(message, ViewerMessage::Resize { .. }) {
                    size = Some(message);
                } else {
                    self.obey(message);
                }
            }
        }
    }

    fn obey(&self, message: ViewerMessage) {
        match message {
            ViewerMessage::Format(format) => self.wishes().format = format,
            ViewerMessage::Encodings(encodings) => {
                let mut wishes = self.wishes();
                let knew = (wishes.has(encoding::EXTENDED_DESKTOP_SIZE), wishes.has(encoding::QEMU_KEY));
                wishes.encodings = encodings;
                // Each has to be answered, or it is not used.
                if !knew.0 && wishes.has(encoding::EXTENDED_DESKTOP_SIZE) {
                    wishes.size = Some(Resized::ByOthers);
                }
                wishes.offers_keys |= !knew.1 && wishes.has(encoding::QEMU_KEY);
                self.wake.notify_one();
            }
            ViewerMessage::Update { incremental, area } => {
                if !incremental {
                    let mut heads = self.stage.lock();
                    let seen = damage::shared(area, damage::whole(heads.size(self.head)));
                    if let (Some(news), Some(seen)) = (heads.news(self.id), seen) {
                        news.damage.add(seen);
                    }
                }
                let mut wishes = self.wishes();
                wishes.requested = Some(wishes.requested.map_or(area, |requested| damage::around(requested, area)));
                self.wake.notify_one();
            }
            ViewerMessage::Symbol { keysym, down } => self.key(keys::of_keysym(keysym), down),
            ViewerMessage::Key { keysym, scancode, down } => {
                self.key(keys::of_scancode(scancode).or_else(|| keys::of_keysym(keysym)), down);
            }
            ViewerMessage::Pointer { buttons, x, y } => {
                let (place, desk) = self.stage.lock().place(self.head, (x.into(), y.into()));
                self.stage.seat().pointer(self.id, place, desk, buttons);
            }
            ViewerMessage::Resize { width, height } => {
                let size = (u32::from(width), u32::from(height));
                let fits = [size.0, size.1].iter().all(|side| (SIDE_MIN..=SIDE_MAX).contains(side));
                let resized = match fits {
                    false => Resized::Invalid,
                    true if self.stage.resize(self.head, size) => Resized::Forwarded,
                    true => Resized::Prohibited,
                };
                self.wishes().size = Some(resized);
                self.wake.notify_one();
            }
            ViewerMessage::Ignored => {}
        }
    }

    fn key(&self, key: Option<u16>, down: bool) {
        if let Some(key) = key {
            self.stage.seat().key(self.id, key, down);
        }
    }

    /// What there is to tell, if the viewer waits for something.
    fn plan(&self, known: &mut (u16, u16)) -> Option<Plan> {
        let mut wishes = self.wishes();
        let area = wishes.requested?;
        let mut heads = self.stage.lock();
        let size = heads.size(self.head);
        let news = heads.news(self.id)?;
        let mut plan = Plan::default();
        let resized = std::mem::take(&mut news.resized) || words(size) != *known;
        let knows = (wishes.has(encoding::EXTENDED_DESKTOP_SIZE), wishes.has(encoding::DESKTOP_SIZE));
        if resized && knows == (false, false) {
            // It goes on with the size that it knows, and sees what fits.
            news.damage.add(Rect { x: 0, y: 0, width: known.0.into(), height: known.1.into() });
        } else if resized || wishes.size.is_some() {
            *known = words(size);
            plan.size = Some(wishes.size.take().unwrap_or(Resized::ByOthers));
            plan.offers_keys = std::mem::take(&mut wishes.offers_keys);
            news.damage.add(if resized { damage::whole(size) } else { Rect::default() });
            wishes.requested = None;
            return Some(plan);
        }
        plan.offers_keys = std::mem::take(&mut wishes.offers_keys);
        plan.cursor = wishes.has(encoding::CURSOR) && std::mem::take(&mut news.cursor);
        let bounds = Rect { x: 0, y: 0, width: known.0.into(), height: known.1.into() };
        if let Some(area) = damage::shared(area, bounds) {
            plan.rects = news.damage.take(area);
        }
        if !plan.rects.is_empty() {
            plan.moment = Some(heads.picture(self.head)).filter(|picture| picture.pixels().len() <= MOMENT_MAX);
        }
        if !plan.offers_keys && !plan.cursor && plan.rects.is_empty() {
            return None;
        }
        wishes.requested = None;
        Some(plan)
    }

    async fn tell(&self, mut writer: impl AsyncWrite + Unpin, size: (u16, u16)) -> Result<(), ViewerError> {
        let mut known = size;
        let (mut out, mut pixels, mut coding) = (Vec::new(), Vec::new(), Coding::default());
        loop {
            let Some(plan) = self.plan(&mut known) else {
                self.wake.notified().await;
                continue;
            };
            let begun = Instant::now();
            let format = {
                let wishes = self.wishes();
                coding.choose(&wishes.encodings);
                wishes.format
            };
            let whole = plan.moment.as_deref().filter(|_| coding.is_plain(&format));
            let rows = |rect: Rect| whole.and_then(|picture| picture.rows(rect));
            let (rows, rest): (Vec<_>, Vec<_>) = plan.rects.iter().partition(|rect| rows(**rect).is_some());
            let parts = [rows, update::parts(&rest)].concat();
            let count = parts.len() + usize::from(plan.size.is_some()) + usize::from(plan.offers_keys);
            update::begin((count + usize::from(plan.cursor)) as u16, &mut out);
            if let Some(why) = plan.size {
                if self.wishes().has(encoding::EXTENDED_DESKTOP_SIZE) {
                    update::put_extended_size(known, why, &mut out);
                } else {
                    update::put_size(known, &mut out);
                }
            }
            if plan.offers_keys {
                update::put_key_offer(&mut out);
            }
            if plan.cursor {
                let heads = self.stage.lock();
                let cursor = heads.pointer(self.head).map(|cursor| (&*cursor.picture, cursor.hot));
                update::put_cursor(&format, cursor, &mut out);
            }
            for part in parts {
                if let Some(rows) = whole.and_then(|picture| picture.rows(part)) {
                    // As they are: they go from the picture to the viewer.
                    coding.put_header(part, &mut out);
                    send(&mut writer, &mut out).await?;
                    for piece in rows.chunks(PIECE) {
                        write(&mut writer, piece).await?;
                    }
                    continue;
                }
                let picture = plan.moment.clone().unwrap_or_else(|| self.stage.lock().picture(self.head));
                if coding.is_plain(&format) {
                    coding.put_header(part, &mut out);
                    picture.append(part, &mut out);
                } else {
                    pixels.clear();
                    picture.append(part, &mut pixels);
                    coding.put(&format, part, &pixels, &mut out);
                }
                drop(picture);
                if out.len() >= PIECE {
                    send(&mut writer, &mut out).await?;
                }
                // Others have something to say, too.
                tokio::task::yield_now().await;
            }
            // The room may be wanted for another picture.
            drop(plan.moment);
            send(&mut writer, &mut out).await?;
            sleep_until(begun + FRAME).await;
        }
    }
}

async fn send(writer: &mut (impl AsyncWrite + Unpin), out: &mut Vec<u8>) -> Result<(), ViewerError> {
    write(writer, out).await?;
    out.clear();
    Ok(())
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), ViewerError> {
    write_within(writer, bytes, READ_MAX).await
}

/// Writes; each [`READ_MIN`] has to be taken within `limit`.
async fn write_within(
    writer: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    limit: Duration,
) -> Result<(), ViewerError> {
    let slow = |_| ViewerError::Slow { what: "read", limit };
    let (mut until, mut read) = (Instant::now() + limit, 0);
    while !bytes.is_empty() {
        let count = timeout_at(until, writer.write(bytes)).await.map_err(slow)??;
        bytes = bytes.get(count..).filter(|_| count > 0).ok_or(ViewerError::Gone)?;
        read += count;
        if read >= READ_MIN {
            (until, read) = (Instant::now() + limit, 0);
        }
    }
    Ok(timeout_at(until, writer.flush()).await.map_err(slow)??)
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Builder;

    use super::*;

    /// A viewer at the end of a slow line takes longer for a picture than it has for a part, and gets it whole; one that takes
    /// nothing is given up.
    #[test]
    fn slow_is_not_stuck() {
        const LIMIT: Duration = Duration::from_millis(1000);
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let picture = vec![7; 10 * READ_MIN];
            let (mut writer, mut reader) = tokio::io::duplex(4096);
            let begun = Instant::now();
            let reads = async {
                let mut part = vec![0; READ_MIN];
                for _ in 0..10 {
                    sleep(LIMIT / 5).await;
                    reader.read_exact(&mut part).await.unwrap();
                }
            };
            let (written, ()) = tokio::join!(write_within(&mut writer, &picture, LIMIT), reads);
            written.unwrap();
            assert!(begun.elapsed() > LIMIT);
            let stuck = write_within(&mut writer, &picture, LIMIT / 10).await;
            assert!(matches!(stuck, Err(ViewerError::Slow { what: "read", .. })), "{stuck:?}");
        });
    }
}
