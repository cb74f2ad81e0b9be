//! A recording of a head: an animated PNG. Browsers and players know it, the crate that writes screenshots writes it too,
//! nothing is lost, and a frame is only what has changed, for as long as it was to be seen. The file is right after each
//! frame: the number of frames, which stands at its front, is brought up to date each time, and the last chunk is put behind the
//! frame, where the next one begins. So a process that is killed leaves a recording up to the last change, or until some seconds
//! before where nothing changed.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use atoll_protocol::display::Rect;
use png::{BitDepth, ColorType, Compression, Encoder, Writer};
use thiserror::Error;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::damage;
use crate::shot;
use crate::stage::Stage;

/// The time between two frames, at least.
const FRAME: Duration = Duration::from_millis(33);
/// How long nothing changes before what is seen is written: that much, at most, is missing from a recording whose process is
/// killed. It is less than a frame's duration can say.
const STILL: Duration = Duration::from_secs(5);
/// A part of the picture to see again, when nothing has changed.
const CORNER: Rect = Rect { x: 0, y: 0, width: 1, height: 1 };
/// Frames that a file is announced to have until it is known better.
const FRAMES_MAX: u32 = 0x7fff_ffff;

/// Why a recording ends, or does not begin.
#[derive(Debug, Error)]
pub enum RecordError {
    /// Nothing is shown.
    #[error("head {0} shows nothing: wait until its guest does, or choose another")]
    Dark(usize),
    /// Not a file.
    #[error("a recording goes to a regular file that can be read and written: {0}")]
    File(#[source] io::Error),
    /// It cannot be written down.
    #[error("the recording ends: {0}")]
    Encode(#[from] png::EncodingError),
    /// The file takes no more.
    #[error("the recording ends: {0}; make room")]
    Io(#[from] io::Error),
}

/// The last chunk of a PNG.
const END: [u8; 12] = *b"\0\0\0\0IEND\xae\x42\x60\x82";
/// Bytes in which the number of frames is.
const FRONT: usize = 128;

/// What was seen and is not written: how long it could be seen is not known yet.
struct Seen {
    rect: Rect,
    rgb: Vec<u8>,
    at: Instant,
}

/// A recording under way.
pub struct Recording {
    writer: Writer<File>,
    file: File,
    head: usize,
    canvas: Rect,
    seen: Option<Seen>,
    frames: u32,
}

impl Recording {
    /// Begins a recording of a head to `file`, which is emptied.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn begin(stage: &Stage, head: usize, mut file: File) -> Result<Self, RecordError> {
        if !file.metadata().map_err(RecordError::File)?.is_file() {
            return Err(RecordError::File(io::ErrorKind::InvalidInput.into()));
        }
        let size = stage.lock().shown(head).map(|picture| picture.size()).ok_or(RecordError::Dark(head))?;
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(RecordError::File)?;
        let mut encoder = Encoder::new(file.try_clone()?, size.0, size.1);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        encoder.set_compression(Compression::Fast);
        encoder.set_animated(FRAMES_MAX, 1)?;
        let writer = encoder.write_header()?;
        let mut recording = Self { writer, file, head, canvas: damage::whole(size), seen: None, frames: 0 };
        // A file that can only be written cannot be brought up to date.
        if recording.front().is_none() {
            return Err(RecordError::File(io::ErrorKind::PermissionDenied.into()));
        }
        recording.see(stage, recording.canvas)?;
        Ok(recording)
    }

    /// Sees a part of the head, which stays to be seen until the next time.
    fn see(&mut self, stage: &Stage, rect: Rect) -> Result<(), RecordError> {
        self.write(Instant::now())?;
        let mut pixels = Vec::new();
        let picture = stage.lock().picture(self.head);
        picture.append(rect, &mut pixels);
        self.seen = Some(Seen { rect, rgb: shot::rgb(&pixels), at: Instant::now() });
        Ok(())
    }

    /// When what is seen has been seen for long enough.
    fn still_at(&self) -> Instant {
        self.seen.as_ref().map_or_else(Instant::now, |seen| seen.at) + STILL
    }

    /// Writes what was seen until `now`.
    fn write(&mut self, now: Instant) -> Result<(), RecordError> {
        let Some(Seen { rect, rgb, at }) = self.seen.take() else { return Ok(()) };
        let shown_ms = now.duration_since(at).as_millis().clamp(1, 65_535) as u16;
        if self.frames > 0 {
            // Each is judged with what the other is at the moment.
            self.writer.set_frame_position(0, 0)?;
            self.writer.set_frame_dimension(rect.width, rect.height)?;
            self.writer.set_frame_position(rect.x, rect.y)?;
        }
        self.writer.set_frame_delay(shown_ms, 1000)?;
        self.writer.write_image_data(&rgb)?;
        self.frames += 1;
        self.count()?;
        let end = (&self.file).stream_position()?;
        Ok(self.file.write_all_at(&END, end)?)
    }

    /// Says at the front of the file how many frames there are.
    fn count(&self) -> Result<(), RecordError> {
        let Some(front) = self.front() else { return Ok(()) };
        let mut chunk = b"acTL".to_vec();
        chunk.extend(self.frames.to_be_bytes());
        chunk.extend(1_u32.to_be_bytes());
        let sum = crc32fast::hash(&chunk);
        chunk.extend(sum.to_be_bytes());
        Ok(self.file.write_all_at(&chunk, front)?)
    }

    fn front(&self) -> Option<u64> {
        let mut front = vec![0; FRONT];
        let count = self.file.read_at(&mut front, 0).ok()?;
        front.truncate(count);
        front.windows(4).position(|bytes| bytes == b"acTL").map(|at| at as u64)
    }

    /// Writes what is left; the number of frames.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn end(mut self) -> Result<u32, RecordError> {
        self.write(Instant::now())?;
        let frames = self.frames;
        self.writer.finish()?;
        Ok(frames)
    }

    /// Records until it is told to stop, or cannot go on.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn run(mut self, stage: Arc<Stage>, mut stop: oneshot::Receiver<()>) -> Result<u32, RecordError> {
        let wake = Arc::new(Notify::new());
        let id = stage.lock().watch(self.head, Arc::clone(&wake));
        if let Some(news) = stage.lock().news(id) {
            news.damage.clear();
        }
        let outcome = loop {
            tokio::select! {
                _ = &mut stop => break Ok(()),
                () = wake.notified() => {}
                () = tokio::time::sleep_until(self.still_at()) => {}
            }
            let changed = stage.lock().news(id).map(|news| news.damage.take(self.canvas)).unwrap_or_default();
            let again = (self.still_at() <= Instant::now()).then_some(CORNER);
            if let Some(rect) = changed.into_iter().reduce(damage::around).or(again)
                && let Err(error) = self.see(&stage, rect)
            {
                break Err(error);
            }
            tokio::time::sleep(FRAME).await;
        };
        stage.lock().unwatch(id);
        outcome?;
        self.end()
    }
}
