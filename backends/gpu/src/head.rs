//! One scanout: what it shows, and what the screen has not been told yet.
//!
//! Nothing is queued for a screen. What has changed is noted, the newest state is what is told, and between two tellings
//! there is a sixtieth of a second at least: a screen that is slow, or a guest that draws a lot, costs frames and nothing else.

use std::time::{Duration, Instant};

use atoll_protocol::display::{CURSOR_BYTES, CursorPosition, PIXEL_BYTES, PIXELS_MAX, Rect, Request, Screen};
use vm_memory::Bytes;

use crate::frame_memory::Telling;
use crate::geometry;
use crate::record::{CursorWords, Record};
use crate::resource::{Resource, Resources};

/// The time between two frames of a scanout, at least.
pub const FRAME: Duration = Duration::from_micros(16_667);

/// What a scanout shows: a part of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The resource.
    pub id: u32,
    /// Which part of it.
    pub rect: Rect,
}

/// What the screen has still to hear of the cursor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum CursorNews {
    #[default]
    Nothing,
    Place,
    Picture,
}

/// A scanout.
#[derive(Debug)]
pub struct Head {
    number: usize,
    /// What the screen wants.
    pub wanted: Screen,
    view: Option<View>,
    cursor: CursorWords,
    /// Columns and rows that the screen was told of; zero when it shows nothing.
    told: (u32, u32),
    /// What has changed in the view, in its own coordinates.
    damage: Option<Rect>,
    /// The guest wants it to be seen.
    flushed: bool,
    cursor_news: CursorNews,
    /// Nothing is told before.
    rests_until: Option<Instant>,
}

/// What is to be done for a screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Messages were written, and there may be more.
    Told,
    /// There is something, later.
    At(Instant),
    /// There is nothing.
    Nothing,
}

impl Head {
    /// A scanout that shows nothing yet, on a screen that wants this.
    pub fn new(number: usize, wanted: Screen) -> Self {
        Self {
            number,
            wanted,
            view: None,
            cursor: CursorWords::default(),
            told: (0, 0),
            damage: None,
            flushed: false,
            cursor_news: CursorNews::Nothing,
            rests_until: None,
        }
    }

    /// Takes what a predecessor has written down; what cannot be right is nothing.
    pub fn load(&mut self, record: &Record, resources: &Resources) {
        let [id, x, y, width, height] = record.scanout(self.number);
        let view = View { id, rect: Rect { x, y, width, height } };
        let fits = |view: &View| {
            let within = |r: &Resource| r.is_visible() && geometry::is_within(view.rect, r.width, r.height);
            resources.get(view.id).is_ok_and(within)
        };
        self.view = Some(view).filter(fits);
        self.cursor = record.cursor(self.number);
        let [x, y, width, height, enabled, told] = record.screen(self.number);
        if told != 0 {
            self.wanted = Screen { rect: Rect { x, y, width, height }, enabled: enabled != 0, flags: 0 };
        }
        self.greet();
    }

    /// Writes down what the screen wants, and whether that is new.
    pub fn want(&mut self, record: &Record, wanted: Screen) -> bool {
        let Rect { x, y, width, height } = wanted.rect;
        record.set_screen(self.number, [x, y, width, height, u32::from(wanted.enabled), 1]);
        std::mem::replace(&mut self.wanted, wanted) != wanted
    }

    /// What is shown.
    pub fn view(&self) -> Option<View> {
        self.view
    }

    /// Shows something else from now on, or nothing; seen when it is flushed.
    pub fn show(&mut self, record: &Record, view: Option<View>) {
        let words = view.map_or([0; 5], |view| {
            let Rect { x, y, width, height } = view.rect;
            [view.id, x, y, width, height]
        });
        record.set_scanout(self.number, words);
        if self.view != view {
            self.view = view;
            self.damage = view.map(|view| geometry::whole(view.rect.width, view.rect.height));
            self.flushed = false;
        }
    }

    /// What the screen will be told of a resource if this part of it is flushed: with it all that has changed before.
    pub fn tells(&self, id: u32, rect: Rect) -> Option<Rect> {
        let view = self.view.filter(|view| view.id == id)?;
        let part = geometry::shared(rect, view.rect)?;
        let moved = |damage: Rect| Rect { x: damage.x + view.rect.x, y: damage.y + view.rect.y, ..damage };
        let all = self.damage.map_or(part, |damage| geometry::around(moved(damage), part));
        geometry::shared(all, view.rect)
    }

    /// A part of a resource is to be seen.
    pub fn flush(&mut self, id: u32, rect: Rect) {
        let Some(view) = self.view.filter(|view| view.id == id) else { return };
        let Some(part) = geometry::shared(rect, view.rect) else { return };
        let part = Rect { x: part.x - view.rect.x, y: part.y - view.rect.y, ..part };
        self.damage = Some(self.damage.map_or(part, |damage| geometry::around(damage, part)));
        self.flushed = true;
    }

    /// The cursor is elsewhere, or not shown.
    pub fn move_cursor(&mut self, record: &Record, position: CursorPosition, shown: bool) {
        // A screen that has come while it was hidden does not know what it looks like.
        let appears = shown && !self.cursor.shown && self.cursor.has_picture;
        (self.cursor.x, self.cursor.y, self.cursor.shown) = (position.x, position.y, shown);
        record.set_cursor(self.number, &self.cursor);
        let news = if appears { CursorNews::Picture } else { CursorNews::Place };
        self.cursor_news = self.cursor_news.max(news);
    }

    /// The cursor looks otherwise.
    pub fn draw_cursor(
        &mut self,
        record: &Record,
        position: CursorPosition,
        (hot_x, hot_y): (u32, u32),
        picture: &[u8; CURSOR_BYTES],
    ) {
        if let Some(place) = record.picture(self.number) {
            place.copy_from(picture);
        }
        (self.cursor.hot_x, self.cursor.hot_y, self.cursor.has_picture) = (hot_x, hot_y, true);
        self.move_cursor(record, position, true);
        self.cursor_news = CursorNews::Picture;
    }

    /// Another screen is there, which knows nothing.
    pub fn greet(&mut self) {
        self.told = (0, 0);
        self.damage = self.view.map(|view| geometry::whole(view.rect.width, view.rect.height));
        self.flushed = true;
        self.cursor_news = if self.cursor.has_picture { CursorNews::Picture } else { CursorNews::Nothing };
        self.rests_until = None;
    }

    /// As no driver has touched it.
    pub fn reset(&mut self) {
        (self.view, self.damage, self.flushed) = (None, None, false);
        self.cursor_news = if self.cursor.shown { CursorNews::Place } else { CursorNews::Nothing };
        self.cursor = CursorWords { x: self.cursor.x, y: self.cursor.y, ..CursorWords::default() };
    }

    fn size(&self) -> (u32, u32) {
        self.view.map_or((0, 0), |view| (view.rect.width, view.rect.height))
    }

    fn has_news(&self) -> bool {
        let picture = self.flushed && self.damage.is_some();
        self.size() != self.told || picture || self.cursor_news != CursorNews::Nothing
    }

    /// When there is something to tell: now, or later.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.has_news().then(|| self.rests_until.map_or(now, |until| until.max(now)))
    }

    /// Appends what is to be told to `out`, if it is time.
    pub fn tell(&mut self, now: Instant, record: &Record, resources: &Resources, out: &mut Telling<'_>) -> Turn {
        if !self.has_news() {
            return Turn::Nothing;
        }
        if let Some(until) = self.rests_until.filter(|until| now < *until) {
            return Turn::At(until);
        }
        let scanout = self.number as u32;
        let (width, height) = self.size();
        if (width, height) != self.told {
            Request::Scanout { scanout, width, height }.put(out.messages);
            self.told = (width, height);
        }
        if self.flushed {
            self.update(record, resources, out);
        }
        self.tell_cursor(record, out.messages);
        // A picture in parts is one frame.
        if !(self.flushed && self.damage.is_some()) {
            self.rests_until = Some(now + FRAME);
        }
        Turn::Told
    }

    fn update(&mut self, record: &Record, resources: &Resources, out: &mut Telling<'_>) {
        let (Some(view), Some(damage)) = (self.view, self.damage.take()) else { return };
        let whole = geometry::whole(view.rect.width, view.rect.height);
        let (Some(damage), Ok(resource)) = (geometry::shared(damage, whole), resources.get(view.id)) else { return };
        let rows_max = (PIXELS_MAX / PIXEL_BYTES) as u32 / damage.width.max(1);
        let part = Rect { height: damage.height.min(rows_max), ..damage };
        let source = Rect { x: view.rect.x + part.x, y: view.rect.y + part.y, ..part };
        out.update(
            self.number as u32,
            part,
            |room| resources.copy(record, resource, source, room),
            |messages| resources.read(record, resource, source, messages),
        );
        let left = Rect { y: damage.y + part.height, height: damage.height - part.height, ..damage };
        self.damage = Some(left).filter(|left| left.height > 0);
        self.flushed = self.damage.is_some();
    }

    fn tell_cursor(&mut self, record: &Record, out: &mut Vec<u8>) {
        let news = std::mem::take(&mut self.cursor_news);
        let CursorWords { x, y, hot_x, hot_y, .. } = self.cursor;
        let position = CursorPosition { scanout: self.number as u32, x, y };
        match news {
            CursorNews::Nothing => {}
            CursorNews::Place | CursorNews::Picture if !self.cursor.shown => Request::CursorHide(position).put(out),
            CursorNews::Place => Request::CursorPosition(position).put(out),
            CursorNews::Picture => {
                let mut picture = [0; CURSOR_BYTES];
                if let Some(place) = record.picture(self.number) {
                    // Both have the same length.
                    let _ = place.read_slice(&mut picture, 0);
                }
                Request::CursorUpdate { position, hot_x, hot_y, picture: &picture }.put(out);
            }
        }
    }
}
