//! What there is to see: the heads of the guest, as the device has told them, and who has not seen what of them.
//!
//! One lock, held for no longer than a picture is taken over or drawn on; it is told from without the lock. Nothing is queued for a
//! viewer: what has changed is noted for each, and the newest is told when it asks. When the device's process dies, everything stays as it was.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_protocol::display::control::HeadInfo;
use atoll_protocol::display::{CURSOR_BYTES, DisplayInfo, Rect, Request, SCANOUTS_MAX, Screen, pixel_bytes};
use tokio::sync::Notify;

use crate::asked::{Asked, Sizes};
use crate::damage::{self, Damage};
use crate::picture::Picture;
use crate::seat::{Seat, ViewerId};

/// Bytes of all pictures at most.
const PICTURES_MAX: usize = 512 << 20;
/// Sides of a head that can be asked for.
pub const SIDE_MIN: u32 = 64;
/// As above: what fits into the words of a viewer and of a mode.
pub const SIDE_MAX: u32 = 8192;

/// The pointer of a head.
#[derive(Clone, Debug)]
pub struct Cursor {
    /// What it looks like.
    pub picture: Box<[u8; CURSOR_BYTES]>,
    /// Where in the picture it points.
    pub hot: (u32, u32),
    /// It can be seen.
    pub shown: bool,
}

/// A head.
#[derive(Debug, Default)]
struct Head {
    /// What is shown; also what was shown last, where nothing is any more. Whoever tells of it holds on to it meanwhile, so that
    /// what a viewer is told is one moment's picture: the next one is another.
    picture: Arc<Picture>,
    /// The guest shows something.
    lit: bool,
    /// Pixels have been told since the picture has its size: before that it is no picture of the guest's, only black.
    told: bool,
    cursor: Option<Cursor>,
    wanted: Screen,
    /// It was larger than anything that is shown: said once.
    refused: bool,
}

/// What a viewer has not seen.
#[derive(Debug)]
pub struct Watch {
    head: usize,
    /// Changed pixels.
    pub damage: Damage,
    /// The size is another one.
    pub resized: bool,
    /// The pointer looks otherwise.
    pub cursor: bool,
    wake: Arc<Notify>,
}

/// The heads, and who looks at them.
#[derive(Debug, Default)]
pub struct Heads {
    heads: Vec<Head>,
    watches: BTreeMap<ViewerId, Watch>,
    next: ViewerId,
    /// A device is connected.
    pub connected: bool,
    /// Whether the device hears of another size by itself; not known before it is connected and has said so. It asks for sizes then.
    pub follows: Option<bool>,
    /// Heads that are recorded.
    pub recorded: [bool; SCANOUTS_MAX],
}

/// Shared by all conversations.
#[derive(Debug)]
pub struct Stage {
    heads: Mutex<Heads>,
    seat: Mutex<Seat>,
    /// Where other sizes are written down.
    asked: Option<Asked>,
    /// What is wanted of the device has changed.
    pub wishes: Notify,
}

impl Stage {
    /// A stage whose heads want these sizes; the first ones are enabled.
    #[must_use]
    pub fn new(sizes: &[(u32, u32)]) -> Arc<Self> {
        Self::build(sizes, None, &Sizes::default())
    }

    /// The same, but for heads of which somebody has asked predecessors for another size; whoever asks from now on is remembered.
    #[must_use]
    pub fn succeeding(sizes: &[(u32, u32)], (asked, before): (Asked, Sizes)) -> Arc<Self> {
        Self::build(sizes, Some(asked), &before)
    }

    fn build(sizes: &[(u32, u32)], asked: Option<Asked>, before: &Sizes) -> Arc<Self> {
        let mut heads: Vec<Head> = (0..SCANOUTS_MAX).map(|_| Head::default()).collect();
        let mut x = 0;
        for (number, (head, before)) in heads.iter_mut().zip(before).enumerate() {
            let Some((width, height)) = before.or_else(|| sizes.get(number).copied()) else { continue };
            head.wanted = Screen { rect: Rect { x, y: 0, width, height }, enabled: true, flags: 0 };
            head.picture = Arc::new(Picture::black((width, height)));
            x += width;
        }
        let heads = Heads { heads, ..Heads::default() };
        Arc::new(Self { heads: Mutex::new(heads), seat: Mutex::default(), asked, wishes: Notify::new() })
    }

    /// Takes the lock of the heads.
    pub fn lock(&self) -> MutexGuard<'_, Heads> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock of the input devices.
    pub fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A head is to have another size: whether the guest hears of it, at once or when its device is there.
    pub fn resize(&self, head: usize, (width, height): (u32, u32)) -> bool {
        let mut heads = self.lock();
        let follows = heads.follows;
        let Some(changed) = heads.heads.get_mut(head) else { return false };
        if let Some(asked) = &self.asked {
            asked.note(head, (width, height));
        }
        let rect = Rect { width, height, ..changed.wanted.rect };
        let wanted = Screen { rect, enabled: true, flags: 0 };
        if std::mem::replace(&mut changed.wanted, wanted) != wanted {
            // Heads stand beside each other.
            let mut x = 0;
            for head in &mut heads.heads {
                head.wanted.rect.x = x;
                x += head.wanted.rect.width;
            }
            self.wishes.notify_one();
        }
        follows.unwrap_or(true)
    }
}

impl Heads {
    /// What the device is asked to show.
    #[must_use]
    pub fn info(&self) -> DisplayInfo {
        let mut info = DisplayInfo::default();
        for (to, head) in info.screens.iter_mut().zip(&self.heads) {
            *to = head.wanted;
        }
        info
    }

    /// Size that a head is to have.
    #[must_use]
    pub fn wanted(&self, head: usize) -> (u32, u32) {
        self.heads.get(head).map_or((0, 0), |head| (head.wanted.rect.width, head.wanted.rect.height))
    }

    /// The device says something about a head.
    pub fn hear(&mut self, request: &Request<'_>) {
        match *request {
            Request::Scanout { scanout, width, height } => self.scanout(scanout as usize, (width, height)),
            Request::Update { scanout, rect, pixels } => {
                self.draw(scanout, |picture| Arc::make_mut(picture).draw(rect, pixels));
            }
            Request::CursorPosition(position) => self.cursor(position.scanout as usize, true, None),
            Request::CursorHide(position) => self.cursor(position.scanout as usize, false, None),
            Request::CursorUpdate { position, hot_x, hot_y, picture } => {
                self.cursor(position.scanout as usize, true, Some(((hot_x, hot_y), picture)));
            }
            Request::GetFeatures
            | Request::SetFeatures(_)
            | Request::GetDisplayInfo
            | Request::GetEdid { .. }
            | Request::FrameMemory { .. }
            | Request::Frame { .. } => {}
        }
    }

    /// The device says an update; `message` has its pixels from `from` on. What is left there is not needed any more.
    pub fn update(&mut self, scanout: u32, rect: Rect, message: &mut Vec<u8>, from: usize) {
        self.draw(scanout, |picture| match Picture::whole(picture.size(), rect, message, from) {
            // Whoever holds on to the one before keeps it; else its bytes are the room for the next message.
            Some(next) => {
                let before = std::mem::replace(picture, Arc::new(next));
                *message = Arc::try_unwrap(before).map(Picture::into_bytes).unwrap_or_default();
                Some(rect)
            }
            None => Arc::make_mut(picture).draw(rect, message.get(from..).unwrap_or_default()),
        });
    }

    fn draw(&mut self, scanout: u32, on: impl FnOnce(&mut Arc<Picture>) -> Option<Rect>) {
        let Some(head) = self.heads.get_mut(scanout as usize).filter(|head| head.lit) else { return };
        if let Some(part) = on(&mut head.picture) {
            head.told = true;
            self.tell(scanout as usize, |watch| watch.damage.add(part));
        }
    }

    fn scanout(&mut self, number: usize, size: (u32, u32)) {
        let others: usize = self.heads.iter().map(|head| head.picture.pixels().len()).sum();
        let Some(head) = self.heads.get_mut(number) else { return };
        let now = head.picture.size();
        let fits = size.0.max(size.1) <= SIDE_MAX
            && others - head.picture.pixels().len() + pixel_bytes(damage::whole(size)) <= PICTURES_MAX;
        if size == (0, 0) || !fits {
            if !fits && !std::mem::replace(&mut head.refused, true) {
                tracing::warn!(head = number, ?size, "a picture is too large and is not shown; choose a smaller mode");
            }
            if std::mem::take(&mut head.lit) {
                head.picture = Arc::new(Picture::black(now));
                head.told = false;
                self.tell(number, |watch| watch.damage.add(damage::whole(now)));
            }
            return;
        }
        head.lit = true;
        // A device that was started again says the size that it had: what is shown is right until it says more.
        if size != now {
            head.picture = Arc::new(Picture::black(size));
            head.told = false;
            self.tell(number, |watch| {
                watch.resized = true;
                watch.damage.clear();
                watch.damage.add(damage::whole(size));
            });
        }
    }

    fn cursor(&mut self, number: usize, shown: bool, looks: Option<((u32, u32), &[u8; CURSOR_BYTES])>) {
        let Some(head) = self.heads.get_mut(number) else { return };
        let before = head.cursor.as_ref().is_some_and(|cursor| cursor.shown);
        let changed = looks.is_some() || before != shown;
        if let Some((hot, picture)) = looks {
            head.cursor = Some(Cursor { picture: Box::new(*picture), hot, shown });
        } else if let Some(cursor) = &mut head.cursor {
            cursor.shown = shown;
        }
        if changed {
            self.tell(number, |watch| watch.cursor = true);
        }
    }

    fn tell(&mut self, head: usize, note: impl Fn(&mut Watch)) {
        for watch in self.watches.values_mut().filter(|watch| watch.head == head) {
            note(watch);
            watch.wake.notify_one();
        }
    }

    /// Somebody looks at a head from now on, and is woken when there is something new.
    pub fn watch(&mut self, head: usize, wake: Arc<Notify>) -> ViewerId {
        let id = self.next;
        self.next += 1;
        let mut watch = Watch { head, damage: Damage::default(), resized: false, cursor: true, wake };
        watch.damage.add(damage::whole(self.size(head)));
        self.watches.insert(id, watch);
        id
    }

    /// Nobody does any more.
    pub fn unwatch(&mut self, viewer: ViewerId) {
        self.watches.remove(&viewer);
    }

    /// What a viewer has not seen.
    pub fn news(&mut self, viewer: ViewerId) -> Option<&mut Watch> {
        self.watches.get_mut(&viewer)
    }

    /// Columns and rows of a head's picture.
    #[must_use]
    pub fn size(&self, head: usize) -> (u32, u32) {
        self.heads.get(head).map_or((0, 0), |head| head.picture.size())
    }

    /// The picture of a head that shows something, once there is one: a display that was started again has been told a size before
    /// it is told pixels.
    #[must_use]
    pub fn shown(&self, head: usize) -> Option<Arc<Picture>> {
        self.heads.get(head).filter(|head| head.lit && head.told).map(|head| Arc::clone(&head.picture))
    }

    /// A head's picture as it is at this moment; what comes later does not change it.
    #[must_use]
    pub fn picture(&self, head: usize) -> Arc<Picture> {
        self.heads.get(head).map(|head| Arc::clone(&head.picture)).unwrap_or_default()
    }

    /// The pointer of a head, if it is shown.
    #[must_use]
    pub fn pointer(&self, head: usize) -> Option<&Cursor> {
        self.heads.get(head)?.cursor.as_ref().filter(|cursor| cursor.shown)
    }

    /// Where a head's pixel is among those of all heads that are enabled, and how large they are together.
    #[must_use]
    pub fn place(&self, head: usize, (x, y): (u32, u32)) -> ((u32, u32), Rect) {
        let mut all = Rect::default();
        let mut place = (x, y);
        for (number, head_of) in self.heads.iter().enumerate().filter(|(_, head)| head.wanted.enabled) {
            let (width, height) = head_of.picture.size();
            if number == head {
                place.0 = x.min(width.saturating_sub(1)).saturating_add(all.width);
            }
            all.width = all.width.saturating_add(width);
            all.height = all.height.max(height);
        }
        (place, all)
    }

    /// What there is, for who asks.
    #[must_use]
    pub fn describe(&self) -> Vec<HeadInfo> {
        let mut list = Vec::new();
        for (number, head) in self.heads.iter().enumerate() {
            let viewers = self.watches.values().filter(|watch| watch.head == number).count() as u32;
            if !head.lit && !head.wanted.enabled && viewers == 0 {
                continue;
            }
            let (width, height) = if head.lit { head.picture.size() } else { (0, 0) };
            let wanted = head.wanted.rect;
            let recorded = self.recorded.get(number).copied().unwrap_or(false);
            let viewers = viewers - u32::from(recorded).min(viewers);
            list.push(HeadInfo {
                head: number as u32,
                width,
                height,
                wanted_width: wanted.width,
                wanted_height: wanted.height,
                viewers,
                recorded,
            });
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Rect = Rect { x: 0, y: 0, width: 2, height: 2 };

    /// The device's process dies and comes back: what was shown stays, until there is something new.
    #[test]
    fn the_last_picture_stays() {
        let stage = Stage::new(&[(640, 480)]);
        let mut heads = stage.lock();
        assert!(heads.shown(0).is_none() && heads.size(0) == (640, 480));
        let viewer = heads.watch(0, Arc::default());
        heads.hear(&Request::Scanout { scanout: 0, width: 2, height: 2 });
        assert!(heads.shown(0).is_none(), "a size is no picture");
        heads.hear(&Request::Update { scanout: 0, rect: WHOLE, pixels: &[7; 16] });
        let news = heads.news(viewer).unwrap();
        assert!(news.resized && news.damage.take(WHOLE) == [WHOLE]);
        news.resized = false;
        heads.hear(&Request::Scanout { scanout: 0, width: 2, height: 2 });
        assert!(heads.news(viewer).unwrap().damage.is_empty());
        assert_eq!(heads.shown(0).unwrap().pixels(), [7; 16]);
        heads.hear(&Request::Scanout { scanout: 0, width: 0, height: 0 });
        assert!(heads.shown(0).is_none() && heads.size(0) == (2, 2));
        assert_eq!(heads.news(viewer).unwrap().damage.take(WHOLE), [WHOLE]);
        heads.hear(&Request::Update { scanout: 0, rect: WHOLE, pixels: &[7; 16] });
        assert!(heads.news(viewer).unwrap().damage.is_empty(), "there is nothing to draw on");
        heads.hear(&Request::Scanout { scanout: 0, width: 16384, height: 2 });
        assert!(heads.shown(0).is_none());
    }

    /// Who holds on to a picture keeps that moment, and the room of one that nobody holds is used again.
    #[test]
    fn a_moment_stays_as_it_was() {
        let stage = Stage::new(&[(2, 2)]);
        let mut heads = stage.lock();
        heads.hear(&Request::Scanout { scanout: 0, width: 2, height: 2 });
        let tell = |heads: &mut Heads, rect: Rect, value: u8| {
            let mut message = vec![value; 20 + pixel_bytes(rect)];
            heads.update(0, rect, &mut message, 20);
            message.len()
        };
        assert_eq!(tell(&mut heads, WHOLE, 1), 16, "the black one's bytes");
        let moment = heads.picture(0);
        assert_eq!(tell(&mut heads, WHOLE, 2), 0);
        assert_eq!(tell(&mut heads, WHOLE, 3), 36);
        let later = heads.picture(0);
        tell(&mut heads, Rect { x: 0, y: 0, width: 1, height: 1 }, 4);
        assert_eq!((moment.pixels(), later.pixels()), (&[1; 16][..], &[3; 16][..]));
        assert_eq!(heads.picture(0).pixels(), [&[4; 4][..], &[3; 12]].concat());
    }

    /// A pointer on the second of two heads is beyond the first.
    #[test]
    fn heads_stand_beside_each_other() {
        let stage = Stage::new(&[(640, 480), (800, 600)]);
        assert!(stage.resize(1, (1024, 768)), "a device that comes will ask");
        stage.lock().follows = Some(false);
        assert!(!stage.resize(1, (1024, 768)), "it does not follow");
        let heads = stage.lock();
        assert_eq!(heads.info().screens[1].rect, Rect { x: 640, y: 0, width: 1024, height: 768 });
        let (place, all) = heads.place(1, (10, 20));
        assert_eq!((place, (all.width, all.height)), ((650, 20), (1440, 600)));
        assert_eq!(heads.describe().len(), 2);
    }
}
