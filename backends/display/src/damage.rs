//! Rectangles, and the part of a picture that somebody has not seen yet.

use atoll_protocol::display::Rect;

/// Rectangles that are kept apart; more of them become the one around all.
const RECTS_MAX: usize = 16;

/// What both have, if anything.
#[must_use]
pub fn shared(a: Rect, b: Rect) -> Option<Rect> {
    let (x, y) = (a.x.max(b.x), a.y.max(b.y));
    let right = a.x.saturating_add(a.width).min(b.x.saturating_add(b.width));
    let bottom = a.y.saturating_add(a.height).min(b.y.saturating_add(b.height));
    (x < right && y < bottom).then(|| Rect { x, y, width: right - x, height: bottom - y })
}

/// The smallest that has both in it.
#[must_use]
pub fn around(a: Rect, b: Rect) -> Rect {
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    let right = a.x.saturating_add(a.width).max(b.x.saturating_add(b.width));
    let bottom = a.y.saturating_add(a.height).max(b.y.saturating_add(b.height));
    Rect { x, y, width: right - x, height: bottom - y }
}

/// A whole picture.
#[must_use]
pub fn whole((width, height): (u32, u32)) -> Rect {
    Rect { x: 0, y: 0, width, height }
}

/// What has changed since somebody looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage(Vec<Rect>);

impl Damage {
    /// Nothing has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// This has changed, too.
    pub fn add(&mut self, rect: Rect) {
        if rect.width == 0 || rect.height == 0 || self.0.iter().any(|known| shared(*known, rect) == Some(rect)) {
            return;
        }
        self.0.retain(|known| shared(*known, rect) != Some(*known));
        self.0.push(rect);
        if self.0.len() > RECTS_MAX {
            let all = self.0.iter().copied().reduce(around);
            self.0.clear();
            self.0.extend(all);
        }
    }

    /// Takes what lies within `area`; the rest stays.
    pub fn take(&mut self, area: Rect) -> Vec<Rect> {
        let mut taken = Vec::new();
        for rect in std::mem::take(&mut self.0) {
            let Some(part) = shared(rect, area) else {
                self.0.push(rect);
                continue;
            };
            taken.push(part);
            // What is above, below, left and right of it.
            let (right, bottom) = (rect.x + rect.width, rect.y + rect.height);
            let (part_right, part_bottom) = (part.x + part.width, part.y + part.height);
            let rest = [
                Rect { height: part.y - rect.y, ..rect },
                Rect { y: part_bottom, height: bottom - part_bottom, ..rect },
                Rect { x: rect.x, width: part.x - rect.x, ..part },
                Rect { x: part_right, width: right - part_right, ..part },
            ];
            self.0.extend(rest.into_iter().filter(|rect| rect.width > 0 && rect.height > 0));
        }
        let rest = std::mem::take(&mut self.0);
        rest.into_iter().for_each(|rect| self.add(rect));
        taken
    }

    /// Nothing is new any more.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The rectangles.
    #[must_use]
    pub fn rects(&self) -> &[Rect] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pixels(rects: &[Rect]) -> BTreeSet<(u32, u32)> {
        let of = |rect: &Rect| {
            let (x, y, right, bottom) = (rect.x, rect.y, rect.x + rect.width, rect.y + rect.height);
            (y..bottom).flat_map(move |row| (x..right).map(move |column| (column, row)))
        };
        rects.iter().flat_map(of).collect()
    }

    proptest! {
        /// Whatever is added and taken, no changed pixel is forgotten, and there are never many rectangles.
        #[test]
        fn no_pixel_is_forgotten(steps in prop::collection::vec((any::<bool>(), 0_u32..12, 0_u32..12, 0_u32..9, 0_u32..9), 0..60)) {
            let (mut damage, mut changed) = (Damage::default(), BTreeSet::new());
            for (takes, x, y, width, height) in steps {
                let rect = Rect { x, y, width, height };
                if takes {
                    let taken = pixels(&damage.take(rect));
                    let wanted = pixels(&[rect]);
                    prop_assert!(taken.is_subset(&wanted));
                    prop_assert!(changed.intersection(&wanted).all(|pixel| taken.contains(pixel)));
                    changed.retain(|pixel| !wanted.contains(pixel));
                } else {
                    damage.add(rect);
                    changed.extend(pixels(&[rect]));
                }
                prop_assert!(changed.is_subset(&pixels(damage.rects())));
                prop_assert!(damage.rects().len() <= RECTS_MAX);
            }
        }
    }
}
