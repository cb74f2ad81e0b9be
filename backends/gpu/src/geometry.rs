//! Rectangles: which lie within which, and what they share. Numbers of a guest's, so nothing here may overflow.

use atoll_protocol::display::Rect;

/// The whole of something of this size.
pub fn whole(width: u32, height: u32) -> Rect {
    Rect { x: 0, y: 0, width, height }
}

/// Whether `rect` has at least one pixel and lies within something of this size.
pub fn is_within(rect: Rect, width: u32, height: u32) -> bool {
    let fits = |at: u32, len: u32, size: u32| len > 0 && at.checked_add(len).is_some_and(|end| end <= size);
    fits(rect.x, rect.width, width) && fits(rect.y, rect.height, height)
}

/// What both have; none when that is nothing.
pub fn shared(a: Rect, b: Rect) -> Option<Rect> {
    let line = |a: u32, a_len: u32, b: u32, b_len: u32| {
        let (start, end) = (a.max(b), a.saturating_add(a_len).min(b.saturating_add(b_len)));
        end.checked_sub(start).filter(|len| *len > 0).map(|len| (start, len))
    };
    let (x, width) = line(a.x, a.width, b.x, b.width)?;
    let (y, height) = line(a.y, a.height, b.y, b.height)?;
    Some(Rect { x, y, width, height })
}

/// The least rectangle around both.
pub fn around(a: Rect, b: Rect) -> Rect {
    let line = |a: u32, a_len: u32, b: u32, b_len: u32| {
        let start = a.min(b);
        (start, a.saturating_add(a_len).max(b.saturating_add(b_len)) - start)
    };
    let (x, width) = line(a.x, a.width, b.x, b.width);
    let (y, height) = line(a.y, a.height, b.y, b.height);
    Rect { x, y, width, height }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rects() -> impl Strategy<Value = Rect> {
        let edge = || prop_oneof![0_u32..20, any::<u32>()];
        (edge(), edge(), edge(), edge()).prop_map(|(x, y, width, height)| Rect { x, y, width, height })
    }

    #[test]
    fn edges_count() {
        let rect = |x, y, width, height| Rect { x, y, width, height };
        assert!(is_within(rect(0, 0, 4, 4), 4, 4) && !is_within(rect(1, 0, 4, 4), 4, 4));
        assert!(!is_within(rect(0, 0, 0, 4), 4, 4) && !is_within(rect(u32::MAX, 0, 2, 1), 4, 4));
        assert_eq!(shared(rect(0, 0, 4, 4), rect(4, 0, 4, 4)), None);
        assert_eq!(shared(rect(0, 0, 4, 4), rect(2, 3, 9, 9)), Some(rect(2, 3, 2, 1)));
        assert_eq!(around(rect(1, 1, 1, 1), rect(5, 0, 1, 4)), rect(1, 0, 5, 4));
    }

    proptest! {
        #[test]
        fn any_rectangles_have_a_part_within_both_and_a_frame_around_them(a in rects(), b in rects()) {
            if let Some(part) = shared(a, b) {
                prop_assert!(part.width > 0 && part.height > 0 && part.x >= a.x && part.x >= b.x);
                prop_assert!(part.width <= a.width.min(b.width) && part.height <= a.height.min(b.height));
            }
            let frame = around(a, b);
            prop_assert!(frame.width >= a.width.min(u32::MAX - a.x) && frame.height >= b.height.min(u32::MAX - b.y));
        }
    }
}
